"""What a learner is told, for each kind of mistake."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gpt2course.checks.base import Wrong, exercise, require, same_number, same_tensor, same_value


@exercise("03.1 The causal mask")
def causal_mask(answer: Callable[..., Any]) -> str:
    ones = torch.ones(3, 3)
    same_tensor(answer(ones), torch.ones(3, 3).tril(), "weights")
    require(bool((ones == 1).all()), "the input was changed")
    return "no query sees the future"


def stub(x: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("write your answer here")


def not_a_number(x: torch.Tensor) -> torch.Tensor:
    y = x.tril()
    y[2, 1] = float("nan")
    return y


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (stub, "not written yet"),
        (lambda x: None, r"weights is None \(is there a `return`\?\), expected a tensor of shape \(3, 3\)"),
        (lambda x: x.tolist(), "weights is a list, expected a tensor"),
        (lambda x: x[0], r"weights has shape \(3,\), expected \(3, 3\)"),
        (lambda x: x.tril().bool(), "weights has dtype torch.bool, expected floats"),
        (lambda x: x.tril(1), r"weights\[0, 1\] is 1.0, expected 0.0 \(2 of 9 entries differ\)"),
        (not_a_number, r"weights\[2, 1\] is nan, expected 1.0 \(1 of 9"),
        (lambda x: x.no_such(), r"your function raised AttributeError: .*no_such.*\(line \d+ of your cell: "),
        (lambda: None, "your function raised TypeError"),
        (torch.ones(3, 3), "the check wants your function itself, not a tensor"),
    ],
)
def test_mistakes_are_told_in_words(answer: Any, message: str) -> None:
    """A learner who reads `assert False`, or a traceback through files that are not theirs."""
    with pytest.raises(Wrong, match=f"^03.1 The causal mask: {message}"):
        causal_mask(answer)


def test_a_right_answer_is_told_what_it_showed(capsys: pytest.CaptureFixture[str]) -> None:
    """A pass that says nothing; a right answer refused since it works in place."""
    causal_mask(lambda x: x.tril_())
    assert capsys.readouterr().out == "✓ 03.1 The causal mask: no query sees the future\n"


def test_notebook_shows_the_message_and_no_traceback() -> None:
    """Forty lines of traceback around the one that helps."""
    assert Wrong("03.1 x: y")._render_traceback_() == ["Not yet. 03.1 x: y"]


def test_checks_leave_the_random_state_alone() -> None:
    """A check that changes the numbers of every cell after it, or whose verdict depends on the cells before."""
    seen = []

    @exercise("00.1 Draws")
    def draws(answer: Callable[..., Any]) -> str:
        seen.append((torch.rand(1).item(), np.random.rand(), random.random()))
        return "drawn"

    states = []
    for _ in range(2):
        states.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()))
        draws(print)
    assert states[0] == states[1]
    torch.rand(1)
    draws(print)
    assert len(set(seen)) == 1


def test_a_check_that_stumbles_over_the_answer_says_so() -> None:
    """An answer of an unforeseen kind that ends in an error about the check's own lines."""

    @exercise("00.1 Lengths")
    def lengths(answer: Callable[..., Any]) -> str:
        return str(len(answer()))

    with pytest.raises(Wrong, match=r"could not use what your function returned \(TypeError: object of type 'int'"):
        lengths(lambda: 3)


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (2.5, 3.0, "loss is 2.5, expected 3.0"),
        (torch.tensor([1.0, 2.0]), 3.0, r"loss is a tensor of shape \(2,\), expected a float"),
        (None, 3.0, "loss is None"),
        (float("nan"), 3.0, "loss is nan"),
        (True, 1, "loss is a bool, expected an int"),
        ("3", 3, "loss is a str, expected a number"),
    ],
)
def test_numbers(got: Any, want: float, message: str) -> None:
    """A NaN that passes since every comparison with it is false; True that passes for 1."""
    with pytest.raises(Wrong, match=message):
        same_number(got, want, "loss")


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        ([1, 7, 3], [1, 2, 3], r"ids\[1\] is 7, expected 2"),
        ([1, 2], [1, 2, 3], r"ids has 2 items, expected 3"),
        ((1, 2), [1, 2], "ids is a tuple, expected a list"),
        ("abd", "abc", r"ids\[2\] is 'd', expected 'c'"),
        (b"ab", "ab", "ids is a bytes, expected a str"),
        ({"a": 1}, {"a": 1, "b": 2}, "ids lacks the key 'b'"),
        ({"a": 1, "c": 2}, {"a": 1}, "ids should not have the key 'c'"),
        ({"a": 2}, {"a": 1}, r"ids\['a'\] is 2, expected 1"),
        (None, [1], "ids is None"),
    ],
)
def test_values(got: Any, want: Any, message: str) -> None:
    """A difference deep in a list that the learner has to look for."""
    with pytest.raises(Wrong, match=message):
        same_value(got, want, "ids")


def test_equal_things_pass() -> None:
    """A comparison that refuses what is right, by dtype width or by order of keys."""
    same_tensor(torch.tensor([1.0, float("-inf")], dtype=torch.float64), torch.tensor([1.0, float("-inf")]), "x")
    same_tensor(torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2]), "x")
    same_number(torch.tensor(2.0), 2.0, "x")
    same_value({"b": 1, "a": 2}, {"a": 2, "b": 1}, "x")
