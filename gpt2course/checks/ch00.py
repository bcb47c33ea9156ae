"""Checks of chapter 00 (the likeliest tokens, temperature, the cost of training), and the bug that its reader hunts.

Legend: V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from gpt2course.checks.base import exercise, require, same_number, same_tensor

SECONDS_A_DAY = 86_400


@exercise("00.1 The likeliest tokens")
def likeliest(answer: Callable[..., Any]) -> str:
    logits_V = torch.tensor([0.5, 2.0, -3.0, 1.0, 1.5])
    got = answer(logits_V, 3)
    if isinstance(got, list | tuple):
        got = torch.tensor(got)
    if isinstance(got, torch.Tensor) and got.is_floating_point():
        require(False, f"you return logits, {got.tolist()}; the ids are their places in the row, such as 1 for 2.0")
    if isinstance(got, torch.Tensor) and got.tolist() == [3, 4, 1]:
        require(False, "the ids [3, 4, 1] are the right ones in the wrong order; the likeliest comes first")
    if isinstance(got, torch.Tensor) and got.tolist() == [2, 0, 3]:
        require(False, "the ids [2, 0, 3] have the smallest logits; the likeliest tokens have the largest")
    same_tensor(got, torch.tensor([1, 4, 3]), "ids")
    shuffled_V = torch.randn(1000)
    same_tensor(torch.as_tensor(answer(shuffled_V, 5)), shuffled_V.topk(5).indices, "ids of 1,000 random logits")
    return "ids in the order of their logits, for 5 and for 1,000 tokens"


@exercise("00.2 Temperature")
def probabilities(answer: Callable[..., Any]) -> str:
    logits_V = torch.tensor([2.0, 1.0, 0.0])
    p_V = answer(logits_V, 1.0)
    same_tensor(p_V, logits_V.softmax(0), "probabilities at temperature 1", tol=1e-5)
    require(abs(float(p_V.sum()) - 1) < 1e-5, f"the probabilities sum to {float(p_V.sum()):.3f}, not to 1")
    cold_V = answer(logits_V, 0.5)
    total = float(cold_V.sum())
    require(abs(total - 1) < 1e-4, f"at temperature 0.5 they sum to {total:.3f}; divide the logits, not the result")
    same_on_wrong_side = torch.allclose(cold_V, (logits_V * 0.5).softmax(0), atol=1e-5)
    require(not same_on_wrong_side, "a temperature below 1 must sharpen the choice; yours flattens it")
    same_tensor(cold_V, (logits_V / 0.5).softmax(0), "probabilities at temperature 0.5", tol=1e-5)
    large_V = torch.tensor([1000.0, 999.0])
    got_V = answer(large_V, 1.0)
    require(
        bool(torch.isfinite(got_V).all()),
        f"logits of 1000 give {got_V.tolist()}: exp(1000) is infinite; take the largest logit off all of them first",
    )
    same_tensor(got_V, large_V.softmax(0), "probabilities of large logits", tol=1e-5)
    return "they sum to 1, a low temperature sharpens them, and logits of 1000 do not overflow"


@exercise("00.3 Days of training")
def training_days(answer: Callable[..., Any]) -> str:
    parameters, tokens, rate = 124_439_808, 10_000_000_000, 1e14
    days = 6 * parameters * tokens / rate / SECONDS_A_DAY
    got = answer(parameters, tokens, rate)
    for factor, hint in (
        (
            1 / 3,
            "a third of it: 2 operations for each parameter and token are the forward pass alone; training takes 6",
        ),
        (SECONDS_A_DAY, "that is in seconds; a day has 86,400 of them"),
        (24, "that is in hours; divide by 24 once more"),
        (1 / 6, "a sixth of it: training takes 6 operations for each parameter and token, not 1"),
    ):
        close = isinstance(got, int | float) and math.isclose(got, factor * days, rel_tol=1e-3)
        require(not close, f"GPT-2 on 10 billion tokens at 100 TFLOP/s: you get {got}; {hint}")
    same_number(got, days, "days for GPT-2 on 10 billion tokens at 100 TFLOP/s", tol=1e-3)
    same_number(answer(parameters, tokens, 2 * rate), days / 2, "days at twice the speed", tol=1e-3)
    same_number(answer(3 * parameters, tokens, rate), 3 * days, "days for three times the parameters", tol=1e-3)
    return f"GPT-2 on 10 billion tokens at 100 TFLOP/s takes {days:.2f} days"


Expected = list[tuple[str, float]]


def somebodys_reader(top_next: Callable[..., Expected]) -> Callable[[str], Expected]:
    """The function of the lab "three prompts, one answer". Look at its pictures before you read its code."""

    def their_next(text: str) -> Expected:
        return top_next(text, row=0, k=5)

    return their_next
