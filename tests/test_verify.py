"""The comparison with facts, here made by the transformers library from a random model; every mutant must be named."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from gpt2course import GPT, PRESETS, GPTConfig, cli, hub
from gpt2course import verify as verify_module
from gpt2course.hub import PUBLISHED
from gpt2course.pretrained import load_checkpoint
from gpt2course.tokenizer import get_tokenizer
from gpt2course.verify import golden_facts, verify

PROMPTS = ("A cat sat on the mat", "import os, sys")
LAYERS, HEADS = 3, 4


@pytest.fixture(scope="module")
def peer() -> GPT2LMHeadModel:
    return peers.random_peer(LAYERS, HEADS, 16, vocab_size=50257, attn_implementation="eager", seed=3)


@pytest.fixture(scope="module")
def facts(peer: GPT2LMHeadModel) -> dict[str, Any]:
    """Facts in the form of the golden file, worked out by transformers' own attention and rounded as those are."""
    return {"prompts": [facts_of(peer, prompt) for prompt in PROMPTS]}


@torch.no_grad()
def facts_of(peer: GPT2LMHeadModel, prompt: str) -> dict[str, Any]:
    token_ids = get_tokenizer().encode_ordinary(prompt)
    out = peer(torch.tensor([token_ids]), output_attentions=True)
    logits_V = out.logits[0, -1]
    top = logits_V.topk(20)

    def attention(layer: int, head: int) -> dict[str, Any]:
        rows = out.attentions[layer][0, head].tolist()
        return {"layer": layer, "head": head, "weights": [[round(w, 4) for w in row] for row in rows]}

    return {
        "prompt": prompt,
        "token_ids": token_ids,
        "top20": [[i, round(v, 4)] for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
        "fixed": [[i, round(float(logits_V[i]), 4)] for i in (0, 13, 50256)],
        "attention": attention(0, 0),
        "attention_last": attention(LAYERS - 1, HEADS - 1),
    }


def load(peer: GPT2LMHeadModel, folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> GPT:
    return load_checkpoint(peers.write_folder(folder, peer, tensors), **changes)


def test_the_right_model_agrees_with_every_fact(peer: GPT2LMHeadModel, facts: dict[str, Any], tmp_path: Path) -> None:
    """A comparison of the wrong layer, head, row or token: it would refuse the right model."""
    report = verify(load(peer, tmp_path), facts)
    assert report.ok, str(report)
    names = [check.name for check in report.checks]
    assert names == ["token ids", "attention of layer 0, head 0", "attention of layer 2, head 3", "next-token logits"]
    assert str(report).endswith("All facts agree.")
    assert [check.error < 1e-4 for check in report.checks] == [True] * 4


Mutation = Callable[[dict[str, Tensor]], None]


def missed_transpose(tensors: dict[str, Tensor]) -> None:
    tensors["h.0.attn.c_proj.weight"] = tensors["h.0.attn.c_proj.weight"].t().contiguous()


def missed_transpose_in_the_last_block(tensors: dict[str, Tensor]) -> None:
    tensors["h.2.attn.c_proj.weight"] = tensors["h.2.attn.c_proj.weight"].t().contiguous()


def swapped_first_blocks(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("h.0.")]:
        other = name.replace("h.0.", "h.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def shifted_positions(tensors: dict[str, Tensor]) -> None:
    tensors["wpe.weight"] = tensors["wpe.weight"].roll(1, dims=0)


def other_final_norm(tensors: dict[str, Tensor]) -> None:
    tensors["ln_f.bias"] = tensors["ln_f.bias"] + 1


def not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors["wte.weight"][50256, 0] = math.nan  # the logit of one id, among many good ones


@pytest.mark.parametrize(
    ("mutate", "first"),
    [
        (shifted_positions, "attention of layer 0, head 0"),
        (swapped_first_blocks, "attention of layer 0, head 0"),
        (missed_transpose, "attention of layer 2, head 3"),
        (missed_transpose_in_the_last_block, "next-token logits"),
        (other_final_norm, "next-token logits"),
        (not_a_number, "next-token logits"),
    ],
)
def test_each_mutant_is_found_and_the_first_thing_off_is_named(
    mutate: Mutation,
    first: str,
    peer: GPT2LMHeadModel,
    facts: dict[str, Any],
    tmp_path: Path,
) -> None:
    """A verify that says only "the logits differ", or that NaN slips through."""
    tensors = peers.tensors_of(peer)
    mutate(tensors)
    report = verify(load(peer, tmp_path, tensors), facts)
    assert report.first_wrong is not None
    assert report.first_wrong.name == first
    assert f"The first thing that is off: {first}." in str(report)


def test_a_wrong_number_of_heads_is_named_in_layer_0(
    peer: GPT2LMHeadModel, facts: dict[str, Any], tmp_path: Path
) -> None:
    """n_head leaves no trace in any shape, so only the attention map can tell."""
    facts = {"prompts": [prompt | {"attention_last": prompt["attention"]} for prompt in facts["prompts"]]}
    report = verify(load(peer, tmp_path, n_head=2), facts)
    assert report.first_wrong is not None
    assert report.first_wrong.name == "attention of layer 0, head 0"
    assert "number of heads" in str(report)


def test_the_exact_gelu_is_found_after_layer_0(
    peer: GPT2LMHeadModel, facts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact GELU differs by at most 5e-4 at one point; only what adds up behind it shows."""
    model = load(peer, tmp_path)
    for block in model.h:
        monkeypatch.setattr(block.mlp, "act", torch.nn.GELU())
    monkeypatch.setattr(verify_module, "ATTENTION_LIMIT", 1e-4)
    monkeypatch.setattr(verify_module, "LOGIT_LIMIT", 1e-4)
    report = verify(model, facts)
    assert report.checks[1].ok
    assert report.first_wrong is not None
    assert "GELU" in report.first_wrong.suspects


def test_other_token_ids_are_the_first_thing_named(
    peer: GPT2LMHeadModel, facts: dict[str, Any], tmp_path: Path
) -> None:
    """A damaged vocabulary blamed on the weights."""
    wrong = json.loads(json.dumps(facts))
    wrong["prompts"][1]["token_ids"][0] += 1
    report = verify(load(peer, tmp_path), wrong)
    assert report.first_wrong is not None
    assert report.first_wrong.name == "token ids"
    assert "1 of 2 prompts are cut otherwise" in str(report)


def test_the_golden_facts_are_whole() -> None:
    """A facts file that lost its numbers would let every model pass."""
    prompts = golden_facts()["prompts"]
    assert len(prompts) == 3
    for prompt in prompts:
        assert get_tokenizer().encode_ordinary(prompt["prompt"]) == prompt["token_ids"]
        assert len(prompt["top20"]) == len(prompt["fixed"]) == 20
        top = [logit for _, logit in prompt["top20"]]
        assert top == sorted(top, reverse=True)
        assert max(logit for _, logit in prompt["fixed"]) <= top[0]
        for key, place in (("attention", (0, 0)), ("attention_last", (11, 11))):
            assert (prompt[key]["layer"], prompt[key]["head"]) == place
            weights_TS = torch.tensor(prompt[key]["weights"], dtype=torch.float64)
            torch.testing.assert_close(
                weights_TS.sum(dim=1), torch.ones(6, dtype=torch.float64), atol=6 * 0.5e-4, rtol=0
            )
            assert torch.equal(weights_TS, weights_TS.tril())


def test_facts_about_another_model_are_not_compared() -> None:
    """A verdict on gpt2-medium from the facts about gpt2: always wrong, and nobody's fault."""
    with pytest.raises(ValueError, match="another config"):
        verify(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=50257)))


def test_the_command_compares_and_exits_by_the_result(
    peer: GPT2LMHeadModel,
    facts: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A command that prints a fault and exits 0, so that a script goes on."""
    monkeypatch.setattr(verify_module, "golden_facts", lambda: facts)
    monkeypatch.setitem(PRESETS, "gpt2", load(peer, tmp_path).config)
    assert cli.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("✓") == 4
    tensors = peers.tensors_of(peer)
    missed_transpose(tensors)
    peers.write_folder(tmp_path, peer, tensors)
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith("The first thing that is off: attention of layer 2, head 3.\n")


@pytest.mark.network
@pytest.mark.slow
def test_the_published_gpt2_agrees_with_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, from the hub to the logits, on the weights the course is about."""
    if not hub.is_cached("gpt2") and not hub.reachable(PUBLISHED["gpt2"], timeout=2.0):
        pytest.skip(f"gpt2 is not in the cache, and there is no answer from {hub.endpoint()} within 2 seconds")
    assert cli.main(["verify", "gpt2"]) == 0, capsys.readouterr().out
