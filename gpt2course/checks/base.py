"""How an exercise is checked: run the learner's function safely, and say in plain words where it is wrong.

A check is a function of the learner's answer. It raises `Wrong` with what is wrong; when all is well, it returns a
sentence with what was shown:

    @exercise("03.1 The causal mask")
    def causal_mask(answer) -> str:
        same_tensor(answer(4), torch.ones(4, 4).tril().bool(), "mask")
        return "every query sees itself and its past, for T = 4"
"""

import functools
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEED = 0


class Wrong(AssertionError):
    """The learner's answer is wrong; the text says where."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of a traceback through files that the learner did not write."""
        return [f"Not yet. {self}"]


def exercise(title: str) -> Callable[[Callable[..., str]], Callable[..., None]]:
    """Turn a check into what a notebook calls: it prints `✓ title: what was shown`, or raises `Wrong`.

    The learner's functions get copies of their tensors, so that changing them in place does no harm, and the random
    state of torch, numpy and Python is seeded for the check and put back after it.

    Args:
        title: number and name, as in the chapter's heading: "03.1 The causal mask".
    """

    def decorate(check: Callable[..., str]) -> Callable[..., None]:
        @functools.wraps(check)
        def run(*answers: Any) -> None:
            try:
                with seeded(SEED):
                    shown = check(*(guarded(answer) for answer in answers))
            except Wrong as wrong:
                raise Wrong(f"{title}: {wrong}") from wrong.__cause__
            except Exception as error:
                raise Wrong(
                    f"{title}: the check could not use what your function returned ({type(error).__name__}: {error})"
                ) from error
            print(f"✓ {title}: {shown}")

        return run

    return decorate


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and Python's random; put their states back at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def guarded(answer: Any) -> Callable[..., Any]:
    """The learner's function, with copied inputs and with its exceptions told as `Wrong`.

    Raises:
        Wrong: at once, if the answer is not a function.
    """
    if not callable(answer):
        raise Wrong(f"the check wants your function itself, not {a_kind(answer)}; write its name without brackets")

    @functools.wraps(answer)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return answer(*fresh(args), **fresh(kwargs))
        except NotImplementedError as error:
            raise Wrong("not written yet") from error
        except Exception as error:
            raise Wrong(f"your function raised {type(error).__name__}: {error}{where(error, answer)}") from error

    return call


def where(error: BaseException, answer: Any) -> str:
    """` (line 3 of your cell: y = x @ w)`: the innermost line of the learner's cell; nothing if it is not known."""
    filename = getattr(getattr(answer, "__code__", None), "co_filename", None)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == filename]
    return f" (line {own[-1].lineno} of your cell: {own[-1].line})" if own and own[-1].line else ""


def fresh(value: Any) -> Any:
    """A copy of tensors and arrays, also inside lists, tuples and dicts. Gradients still flow to the original."""
    if isinstance(value, torch.nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(fresh(item) for item in value)
    if type(value) is dict:
        return {key: fresh(item) for key, item in value.items()}
    return value


def a_kind(value: Any) -> str:
    """What a value is, in words: "a list", "an int", "a tensor", "None"."""
    if value is None:
        return "None (is there a `return`?)"
    name = "tensor" if isinstance(value, Tensor) else type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def require(condition: Any, message: str) -> None:
    """Raise `Wrong(message)` unless the condition holds."""
    if not condition:
        raise Wrong(message)


def same_tensor(got: Any, want: Tensor, name: str, tol: float = 1e-6) -> None:
    """Require a tensor of the same kind, shape and values.

    Args:
        got: what the learner's function gave.
        want: what it should be; its dtype only fixes the kind (float, whole number, bool).
        name: what to call it in the message: "weights".
        tol: largest difference of an entry that is let pass, absolute and relative to the wanted value.

    Raises:
        Wrong: "weights[0, 3] is 0.25, expected 0.0 (6 of 16 entries differ)", or what kind or shape it has.
    """
    if not isinstance(got, Tensor):
        raise Wrong(f"{name} is {a_kind(got)}, expected a tensor of shape {tuple(want.shape)}")
    if got.shape != want.shape:
        raise Wrong(f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if dtype_kind(got) != dtype_kind(want):
        raise Wrong(f"{name} has dtype {got.dtype}, expected {dtype_kind(want)} ({want.dtype})")
    left, right = got.detach().cpu(), want.detach().cpu()
    if dtype_kind(want) == "floats":
        off = ~torch.isclose(left.double(), right.double(), rtol=tol, atol=tol, equal_nan=True)
    else:
        off = left != right
    if off.any():
        place = tuple(off.nonzero()[0].tolist())
        count = f" ({int(off.sum())} of {off.numel()} entries differ)" if off.numel() > 1 else ""
        label = name + (f"[{', '.join(map(str, place))}]" if place else "")
        raise Wrong(f"{label} is {short(left[place].item())}, expected {short(right[place].item())}{count}")


def dtype_kind(tensor: Tensor) -> str:
    """ "floats", "booleans" or "whole numbers"."""
    if tensor.dtype == torch.bool:
        return "booleans"
    return "floats" if tensor.is_floating_point() else "whole numbers"


def same_number(got: Any, want: float, name: str, tol: float = 1e-6) -> None:
    """Require a number, or a tensor with one entry, near the wanted one (absolute and relative tolerance).

    Raises:
        Wrong: "loss is 2.5, expected 3.1".
    """
    if isinstance(got, Tensor) and got.numel() == 1:
        got = got.item()
    if isinstance(got, Tensor) or isinstance(got, bool) != isinstance(want, bool):
        what = f"a tensor of shape {tuple(got.shape)}" if isinstance(got, Tensor) else a_kind(got)
        raise Wrong(f"{name} is {what}, expected {a_kind(want)}")
    if not isinstance(got, int | float | np.number):
        raise Wrong(f"{name} is {a_kind(got)}, expected a number")
    if not abs(got - want) <= tol * max(1.0, abs(want)):
        raise Wrong(f"{name} is {short(float(got))}, expected {short(float(want))}")


def same_value(got: Any, want: Any, name: str) -> None:
    """Require equality of plain Python values; for lists and strings, say where they part.

    Raises:
        Wrong: "ids[2] is 7, expected 9", "ids has 3 items, expected 4: it ends early" …
    """
    if type(got) is not type(want):
        raise Wrong(f"{name} is {a_kind(got)}, expected {a_kind(want)}: {short(want)}")
    if got == want:
        return
    if isinstance(want, list | tuple | str | bytes):
        for i, (left, right) in enumerate(zip(got, want, strict=False)):
            if left != right:
                raise Wrong(f"{name}[{i}] is {short(left)}, expected {short(right)}")
        unit = "characters" if isinstance(want, str) else "items"
        raise Wrong(f"{name} has {len(got)} {unit}, expected {len(want)}: {short(got)} against {short(want)}")
    if isinstance(want, dict):
        for key in [*want, *got]:
            if key not in got or key not in want:
                raise Wrong(f"{name} {'lacks' if key in want else 'should not have'} the key {short(key)}")
            if got[key] != want[key]:
                raise Wrong(f"{name}[{short(key)}] is {short(got[key])}, expected {short(want[key])}")
    raise Wrong(f"{name} is {short(got)}, expected {short(want)}")


def short(value: Any, limit: int = 60) -> str:
    """A value for a message: floats with six digits, anything long cut off."""
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    if isinstance(value, float) and text.lstrip("-").isdigit():
        text += ".0"
    return text if len(text) <= limit else text[: limit - 1] + "…"
