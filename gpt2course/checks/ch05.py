"""Checks of chapter 05, the published weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gpt2course.checks.base import Wrong, exercise, require, same_number, same_tensor
from gpt2course.config import PRESETS, GPTConfig
from gpt2course.hf_format import expand


@exercise("05.1 Which tensors to turn")
def to_linear(answer: Callable[[str, Tensor], Tensor]) -> str:
    """The learner's `to_linear(name, tensor)` gives each stored tensor in nn.Linear's layout."""
    shapes = {
        "wte.weight": (11, 4), "wpe.weight": (7, 4), "ln_1.weight": (4,), "ln_1.bias": (4,), "ln_2.weight": (4,),
        "ln_2.bias": (4,), "c_attn.weight": (4, 12), "c_attn.bias": (12,), "attn.c_proj.weight": (4, 4),
        "c_proj.bias": (4,), "c_fc.weight": (4, 16), "c_fc.bias": (16,), "mlp.c_proj.weight": (16, 4),
        "ln_f.weight": (4,), "ln_f.bias": (4,),
    }  # fmt: skip
    turned = 0
    for row in expand(n_layer=2):
        stored = torch.randn(next(shape for end, shape in shapes.items() if row.theirs.endswith(end)))
        want = stored.t() if row.transpose else stored
        got = answer(row.theirs, stored)
        require(isinstance(got, Tensor), f"{row.theirs}: you returned {type(got).__name__}, expected a tensor")
        if got.shape != want.shape or not torch.equal(got, want):
            if row.transpose and stored.shape[0] == stored.shape[1]:
                raise Wrong(
                    f"{row.theirs} is square, so its shape fits either way; it is stored (in, out) all the same"
                )
            if row.transpose:
                raise Wrong(
                    f"{row.theirs} came back as {tuple(got.shape)}; it is stored (in, out), Linear wants (out, in)"
                )
            raise Wrong(f"{row.theirs} was turned or changed, but it is no Conv1D weight and is stored as we want it")
        turned += row.transpose
    return f"{turned} tensors of two blocks turned, every other one left alone"


@exercise("05.2 The first tensor that is off")
def first_wrong(answer: Callable[[dict[str, float], float], str | None]) -> str:
    """The learner's `first_wrong(differences, limit)` names the first result beyond the limit, or None."""
    good = {"wte": 0.0, "h.0": 1e-7, "h.1": 2e-7, "lm_head": 3e-7}
    got = answer(good, 1e-4)
    require(got is None, f"nothing is off here, yet you returned {got!r}; return None when all differences are small")
    growing = {"wte": 0.0, "h.0": 1e-7, "h.1": 0.02, "h.2": 0.5, "lm_head": 9.0}
    got = answer(growing, 1e-4)
    if got == "lm_head":
        raise Wrong("you named lm_head, the largest or last difference; an error grows on its way, so name the first")
    require(got == "h.1", f"the first difference beyond 1e-4 is at h.1, you returned {got!r}")
    broken = {"wte": 0.0, "h.0": math.nan, "h.1": math.nan, "lm_head": 9.0}
    got = answer(broken, 1e-4)
    require(got == "h.0", f"h.0 is NaN and so is off; `nan > limit` is False, and you returned {got!r}")
    return "the first difference is found, also when it is NaN, and None when there is none"


@exercise("05.3 Top-p")
def top_p_keep(answer: Callable[[Tensor, float], Tensor]) -> str:
    """The learner's `top_p_keep(p_V, top_p)` marks the fewest likeliest tokens that reach top_p."""
    p_V = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    want = torch.tensor([False, True, False, True, False])
    got = answer(p_V, 0.6)
    require(isinstance(got, Tensor), f"you returned {type(got).__name__}, expected a tensor of booleans")
    require(got.dtype == torch.bool, f"you returned {got.dtype}, expected booleans: True where a token stays")
    require(got.shape == p_V.shape, f"you returned shape {tuple(got.shape)}, expected {tuple(p_V.shape)}")
    kept = [round(x, 2) for x in p_V[got].tolist()]
    if torch.equal(got, torch.tensor([False, True, False, False, False])):
        raise Wrong("you kept 0.4 alone, which does not reach 0.6; the token that crosses the line stays too")
    if torch.equal(got, torch.tensor([True, True, False, False, False])):
        raise Wrong("your answer is in sorted order; carry it back to the order of the tokens (scatter, or argsort)")
    same_tensor(got, want, f"kept for top_p 0.6 (you kept {kept})")
    got = answer(torch.tensor([0.02, 0.95, 0.03]), 0.5)
    require(bool(got.any()), "one token has 0.95, more than top_p 0.5, and you kept none; the likeliest always stays")
    same_tensor(got, torch.tensor([False, True, False]), "kept where one token alone passes top_p")
    p_V = torch.rand(50)
    p_V = p_V / p_V.sum()
    mass, least = float(p_V[answer(p_V, 0.9)].sum()), float(p_V[answer(p_V, 0.9)].min())
    require(mass >= 0.9, f"on 50 random tokens you kept {mass:.3f} of the mass, expected at least 0.9")
    require(mass - least < 0.9, "on 50 random tokens you kept more than needed: without the least one 0.9 was reached")
    return "the fewest tokens that reach top_p, in the order of the tokens"


@exercise("05.4 What a cache weighs")
def kv_cache_bytes(answer: Callable[[GPTConfig, int, int, int], int]) -> str:
    """The learner's `kv_cache_bytes(config, batch_size, positions, bytes_per_number)`."""
    config = PRESETS["gpt2"]
    want = 2 * 12 * 1024 * 768 * 2
    got = answer(config, 1, 1024, 2)
    if got == want // 2:
        raise Wrong(f"GPT-2 at 1,024 positions: you say {got:,}; both keys and values are kept")
    if got == want // 12:
        raise Wrong(f"GPT-2 at 1,024 positions: you say {got:,}; every one of the 12 layers keeps its own")
    same_number(got, want, "bytes of GPT-2 small at 1,024 positions, 2 bytes a number")
    same_number(answer(config, 3, 10, 4), 2 * 12 * 10 * 768 * 4 * 3, "bytes at batch 3, 10 positions, 4 bytes a number")
    shared = config.with_(n_kv_head=4)
    got = answer(shared, 1, 1024, 2)
    require(
        got != want, f"with n_kv_head 4 you still say {got:,}; only 4 of the 12 heads have keys and values of their own"
    )
    same_number(got, want // 3, "bytes with n_kv_head 4 of 12 heads")
    return f"GPT-2 small needs {want / 2**20:.0f} MiB at 1,024 positions in float16"
