"""`gpt2course verify gpt2`: is this the published model, and does this package compute what it computes?

The facts are in assets/gpt2_124m_logits.json: for three prompts, the next-token logits of 40 ids and two attention maps
of the original GPT-2 124M checkpoint, read off a public visualisation that ran it.

Legend: T query positions, S key positions, V vocabulary.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2course.config import PRESETS
from gpt2course.model import GPT
from gpt2course.tokenizer import get_tokenizer
from gpt2course.trace import WEIGHTS, trace

FACTS_FILE = Path(__file__).parent / "assets" / "gpt2_124m_logits.json"

LOGIT_LIMIT = 0.05
"""largest allowed difference of a logit, absolute; the facts state it"""
ATTENTION_LIMIT = 1e-3
"""largest allowed difference of an attention weight; 4 decimals leave 0.00005, the rest is room for other kernels"""

Pair = tuple[str, float, float]
"""where it is, our number, the fact"""


@dataclass(frozen=True)
class Check:
    """One comparison with the facts."""

    name: str
    error: float
    """largest absolute difference found"""
    limit: float
    detail: str
    """where the largest difference is, or what was compared"""
    suspects: str
    """which parts can be to blame, given that all earlier checks were good"""

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    def __str__(self) -> str:
        mark = "✓" if self.ok else "✗"
        text = f"{mark} {self.name}: largest difference {self.error:.2g}, limit {self.limit:g} ({self.detail})"
        return text if self.ok else f"{text}\n  look at: {self.suspects}"


@dataclass(frozen=True)
class Report:
    """All checks, in the order in which the model computes."""

    checks: tuple[Check, ...]

    @property
    def first_wrong(self) -> Check | None:
        """The first check that failed; what comes after it may only be a consequence."""
        return next((check for check in self.checks if not check.ok), None)

    @property
    def ok(self) -> bool:
        return self.first_wrong is None

    def __str__(self) -> str:
        lines = [str(check) for check in self.checks]
        wrong = self.first_wrong
        lines.append("All facts agree." if wrong is None else f"The first thing that is off: {wrong.name}.")
        return "\n".join(lines)


def golden_facts() -> dict[str, Any]:
    """The facts as they are stored: prompts, token ids, logits, attention maps."""
    facts: dict[str, Any] = json.loads(FACTS_FILE.read_text(encoding="utf-8"))
    return facts


def verify(model: GPT, facts: dict[str, Any] | None = None) -> Report:
    """Compare a model with the facts: the token ids, then the attention maps from the first layer up, then the logits.

    Args:
        model: the published GPT-2 124M, unless other facts are given.
        facts: in the form of `golden_facts`, which is the default.

    Raises:
        ValueError: if the facts are about another shape of model, so that comparing would say nothing.
    """
    if facts is None:
        facts = golden_facts()
        if model.config.with_(attention_backend="auto", dropout=0.0) != PRESETS["gpt2"]:
            raise ValueError(
                f"the facts are about the published gpt2 (124M) only; this model has another config: {model.config}"
            )
    return Report(tuple(_checks(model, facts["prompts"])))


def _checks(model: GPT, prompts: list[dict[str, Any]]) -> Iterator[Check]:
    yield _token_check(prompts)
    device = model.wte.weight.device
    traces = [trace(model, torch.tensor([prompt["token_ids"]], device=device)) for prompt in prompts]
    maps = {(p[key]["layer"], p[key]["head"]) for p in prompts for key in ("attention", "attention_last")}
    for layer, head in sorted(maps):
        yield _attention_check(prompts, traces, layer, head)
    yield _logit_check(prompts, traces, len(model.h) - 1)


def _token_check(prompts: list[dict[str, Any]]) -> Check:
    tokenizer = get_tokenizer()
    wrong = [p["prompt"] for p in prompts if tokenizer.encode_ordinary(p["prompt"]) != p["token_ids"]]
    detail = f"{len(wrong)} of {len(prompts)} prompts are cut otherwise"
    return Check("token ids", float(len(wrong)), 0.0, detail, "the vocabulary file and the pattern that cuts the text")


def _attention_check(prompts: list[dict[str, Any]], traces: list[dict[str, Tensor]], layer: int, head: int) -> Check:
    pairs: list[Pair] = []
    for prompt, found in zip(prompts, traces, strict=True):
        for fact in (prompt["attention"], prompt["attention_last"]):
            if (fact["layer"], fact["head"]) == (layer, head):
                ours_TS = found[f"h.{layer}.attn.{WEIGHTS}"][0, head].tolist()
                pairs += [
                    (f"'{prompt['prompt']}', query {q}, key {k}", ours_TS[q][k], weight)
                    for q, row in enumerate(fact["weights"])
                    for k, weight in enumerate(row)
                ]
    if layer == 0:
        suspects = "the embeddings, ln_1 and c_attn of block 0, the number of heads, the mask"
    else:
        suspects = f"blocks 0 to {layer - 1} (a missed transpose, a swapped block, the GELU), c_attn of block {layer}"
    return _compare(f"attention of layer {layer}, head {head}", pairs, ATTENTION_LIMIT, suspects)


def _logit_check(prompts: list[dict[str, Any]], traces: list[dict[str, Tensor]], last: int) -> Check:
    pairs: list[Pair] = []
    for prompt, found in zip(prompts, traces, strict=True):
        ours_V = found["lm_head"][0, -1].tolist()
        pairs += [
            (f"'{prompt['prompt']}', token {token}", ours_V[token], logit)
            for token, logit in prompt["top20"] + prompt["fixed"]
        ]
    suspects = f"the GELU, the other heads, c_proj and the MLP of block {last}, ln_f, the head that must be tied to wte"
    return _compare("next-token logits", pairs, LOGIT_LIMIT, suspects)


def _compare(name: str, pairs: list[Pair], limit: float, suspects: str) -> Check:
    """The check of all pairs (where, ours, fact), told by the worst of them. NaN counts as the worst."""

    def error(pair: Pair) -> float:
        difference = abs(pair[1] - pair[2])
        return math.inf if math.isnan(difference) else difference

    worst = max(pairs, key=error)
    detail = f"worst of {len(pairs)} at {worst[0]}: {worst[1]:.4f}, fact {worst[2]:.4f}"
    return Check(name, error(worst), limit, detail, suspects)
