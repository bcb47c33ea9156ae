"""Checks of chapter 03, attention. Each usual mistake is tried first, so that the message can name it.

Legend: B batch, T query positions, S key positions, C model width, H heads, D head width.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gpt2course.attention import attend_reference
from gpt2course.checks.base import Wrong, exercise, require, same_tensor, short
from gpt2course.masks import visible

Answer = Callable[..., Tensor]
SAME = 1e-5
LOOSE = 1e-3


def name_the_mistake(got: Tensor, mistakes: Mapping[str, Tensor]) -> None:
    """Raise `Wrong` with the name of the first mistake whose numbers these are."""
    for message, numbers in mistakes.items():
        if got.shape == numbers.shape and torch.allclose(got.double(), numbers.double(), atol=SAME):
            raise Wrong(message)


def a_tensor(got: object, shape: tuple[int, ...], name: str) -> Tensor:
    """`got`, if it is a tensor of floats of this shape."""
    if not isinstance(got, Tensor) or tuple(got.shape) != shape or not got.is_floating_point():
        same_tensor(got, torch.zeros(shape), name)
    assert isinstance(got, Tensor)
    return got


@exercise("03.1 A softmax that does not overflow")
def stable_softmax(answer: Answer) -> str:
    scores_BTS = torch.randn(2, 3, 3)
    got = a_tensor(answer(scores_BTS), (2, 3, 3), "the result")
    exp = scores_BTS.exp()
    name_the_mistake(
        got,
        {
            f"the sum runs over axis {axis}; the weights of one query lie along the last axis, dim=-1": exp / total
            for axis, total in ((0, exp.sum(0, keepdim=True)), (1, exp.sum(1, keepdim=True)))
        }
        | {
            "the sum runs over the whole tensor; every query has weights of its own, so sum over dim=-1": exp
            / exp.sum(),
            "the numbers are not divided by their sum, so they are no weights": torch.exp(
                scores_BTS - scores_BTS.amax(-1, keepdim=True)
            ),
            "the sum has lost its axis and is divided along the wrong one; use keepdim=True": exp
            / exp.sum(-1)[:, None, :],
        },
    )
    same_tensor(got, scores_BTS.softmax(-1), "the result")

    big = torch.tensor([[1000.0, 999.0, 0.0]])
    got = answer(big)
    require(
        not got.isnan().any(),
        "scores of 1000 give NaN: exp(1000) is inf and inf/inf is NaN; take the largest score away before exp",
    )
    # Loose: s - logsumexp(s) is right as well, and float32 rounds it at 1000 to three or four digits.
    same_tensor(got, big.softmax(-1), "for the scores 1000, 999, 0 the result", tol=LOOSE)
    far = torch.tensor([[1000.0, 999.0], [-1000.0, -1001.0]])
    got = answer(far)
    require(
        not got.isnan().any() and (got > 0.1).all(),
        "a row of scores near -1000 beside a row near 1000 comes out as NaN or 0; each row needs its own maximum, "
        "amax(dim=-1, keepdim=True)",
    )
    same_tensor(got, far.softmax(-1), "for rows near 1000 and near -1000 the result", tol=LOOSE)
    hidden = torch.tensor([[0.5, -math.inf, 1.0]])
    got = answer(hidden)
    require(not got.isnan().any(), "a score of -inf, a hidden key, makes NaN; its weight must be 0")
    same_tensor(got, hidden.softmax(-1), "with a hidden key the result")
    wide = torch.tensor([[300.0, 150.0, -150.0, -300.0]], requires_grad=True)
    answer(wide)[0, 0].backward()
    require(
        wide.grad is not None and wide.grad.isfinite().all(), "the gradient is missing or not finite for large scores"
    )
    return "equal to torch's, and whole for scores of ±1000 and for hidden keys"


@exercise("03.2 The causal mask")
def causal_mask(answer: Answer) -> str:
    T = 4
    got = answer(T)
    want = torch.ones(T, T, dtype=torch.bool).tril()
    if isinstance(got, Tensor) and got.shape == want.shape and got.dtype != torch.bool:
        raise Wrong(f"the mask has dtype {got.dtype}; it says yes or no, so make it torch.bool (True: visible)")
    if isinstance(got, Tensor) and got.shape == want.shape:
        require(
            not torch.equal(got, ~want),
            "True and False are the wrong way round: True means visible, and row 0, column 0 says that the first query "
            "may not see itself",
        )
        require(
            not torch.equal(got, want.t()),
            "row 0 sees everything and the last row only itself: this is the upper triangle; rows are queries",
        )
        for query, key in torch.nonzero(got & ~want).tolist()[:1]:
            raise Wrong(f"row {query}, column {key}: the query at position {query} sees the future")
        for query, key in torch.nonzero(~got & want).tolist()[:1]:
            who = "itself" if query == key else f"position {key}, which is its past"
            raise Wrong(f"row {query}, column {key}: the query at position {query} does not see {who}")
    for T in (4, 1, 9):
        same_tensor(answer(T), torch.ones(T, T, dtype=torch.bool).tril(), f"the mask for T = {T}")
    return "each query sees itself and all of its past, for T = 1, 4 and 9"


def by_hand(
    q_BTC: Tensor,
    k_BTC: Tensor,
    v_BTC: Tensor,
    H: int,
    *,
    divisor: float | None = None,
    axis: int = -1,
    mask: str = "-inf",
    split: str = "transpose",
    merge: str = "transpose",
) -> Tensor:
    """Multi-head causal attention, or a version of it with one usual mistake."""
    B, T, C = q_BTC.shape
    D = C // H

    def heads(x_BTC: Tensor) -> Tensor:
        if split == "view":
            return x_BTC.reshape(B, H, T, D)
        if split == "interleaved":
            return x_BTC.reshape(B, T, D, H).permute(0, 3, 1, 2)
        return x_BTC.reshape(B, T, H, D).transpose(1, 2)

    q_BHTD, k_BHTD, v_BHTD = heads(q_BTC), heads(k_BTC), heads(v_BTC)
    scores = q_BHTD @ k_BHTD.transpose(-2, -1) / (math.sqrt(D) if divisor is None else divisor)
    seen = torch.ones(T, T, dtype=torch.bool).tril({"one more": 1, "one less": -1}.get(mask, 0))
    if mask == "zero":
        weights = (scores * seen).softmax(axis)
    elif mask in ("none", "after"):
        weights = scores.softmax(axis) * (seen if mask == "after" else 1)
    else:
        weights = scores.masked_fill(~seen, -math.inf).softmax(axis).nan_to_num()
    y_BHTD = weights @ v_BHTD
    return y_BHTD.reshape(B, T, C) if merge == "view" else y_BHTD.transpose(1, 2).reshape(B, T, C)


def usual_mistakes(q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, H: int) -> dict[str, Tensor]:
    """Message to the numbers that the mistake gives."""
    D, C = q_BTC.shape[-1] // H, q_BTC.shape[-1]
    versions: dict[str, dict[str, object]] = {
        "the scores are not scaled; divide them by √D, the root of the width of one head": {"divisor": 1.0},
        "the scores are divided by D instead of by its root": {"divisor": float(D)},
        "the scores are divided by √C, the root of the whole width; a head is only D = C / n_head wide": {
            "divisor": math.sqrt(C)
        },
        "the softmax runs over the queries (dim=-2); the weights of one query lie along the last axis": {"axis": -2},
        "the softmax runs over the heads (dim=1); the weights of one query lie along the last axis": {"axis": 1},
        "there is no causal mask: every query sees the future": {"mask": "none"},
        "the mask comes after the softmax, so the visible weights no longer sum to one; fill the scores with -inf "
        "before it": {"mask": "after"},
        "hidden scores are set to 0, and exp(0) is 1: the future keeps its weight; fill with -inf": {"mask": "zero"},
        "the mask is off by one: each query sees one position of the future": {"mask": "one more"},
        "the mask is off by one: no query sees itself": {"mask": "one less"},
        "the heads are scrambled: view(B, H, T, D) cuts across positions; view(B, T, H, D), then transpose(1, 2)": {
            "split": "view"
        },
        "a head takes every n_head-th column; it owns D columns side by side, view(B, T, H, D)": {
            "split": "interleaved"
        },
        "the heads are merged in the wrong order: transpose(1, 2) back to (B, T, H, D) before reshape": {
            "merge": "view"
        },
    }
    numbers = {message: by_hand(q_BTC, k_BTC, v_BTC, H, **how) for message, how in versions.items()}  # type: ignore[arg-type]
    both = by_hand(q_BTC, k_BTC, v_BTC, H, split="view", merge="view")
    numbers["the heads are scrambled, both in the split and in the merge: a view alone cuts across positions"] = both
    return numbers


@exercise("03.3 Many heads")
def multi_head(answer: Answer) -> str:
    B, T, C, H = 2, 5, 12, 3
    q, k, v = (torch.randn(B, T, C, requires_grad=True) for _ in range(3))
    got = a_tensor(answer(q, k, v, H), (B, T, C), "the result")
    name_the_mistake(got, usual_mistakes(q, k, v, H))
    want = by_hand(q, k, v, H)
    if not torch.allclose(got, want, atol=SAME):
        require(got.requires_grad, "no gradient flows through the result; leave out detach, item and no_grad")
        (grad_v,) = torch.autograd.grad(got[:, 1].sum(), [v], allow_unused=True)
        require(grad_v is not None, "the result does not depend on the values")
        assert grad_v is not None
        require(
            not grad_v[:, 2:].any(),
            "the output at position 1 depends on the value at a later position: a query sees the future",
        )
        steady = answer(q, k, torch.ones(B, T, C), H).detach()
        spread = f"{short(float(steady.min()))} to {short(float(steady.max()))}"
        require(
            torch.allclose(steady, torch.ones(B, T, C), atol=SAME),
            f"with all values equal to one the result must be one, and it is {spread}: the weights do not sum to one",
        )
    same_tensor(got, want, "the result", tol=SAME)
    one = by_hand(q[:1, :1], k[:1, :1], v[:1, :1], 1)
    same_tensor(answer(q[:1, :1], k[:1, :1], v[:1, :1], 1), one, "with one position and one head the result", tol=SAME)
    same_tensor(answer(q, k, v, C), by_hand(q, k, v, C), "with heads of width 1 the result", tol=SAME)
    return "equal to one head at a time, for 1, 3 and 12 heads"


@exercise("03.4 One rule for every mask")
def attend_by_rule(answer: Answer) -> str:
    T, S, D = 3, 6, 4
    q, k, v = torch.randn(T, D), torch.randn(S, D), torch.randn(S, D)
    # A chunk of three new queries over a ring of six slots: one slot is empty, and the keys lie out of order.
    q_pos, k_pos = torch.tensor([5, 6, 7]), torch.tensor([6, 7, -1, 3, 4, 5])
    index_q, index_k = torch.arange(T), torch.arange(S)

    def rule(seen_TS: Tensor) -> Tensor:
        return attend_reference(q[None, None], k[None, None], v[None, None], seen_TS)[0, 0]

    def at(window: int | None) -> Tensor:
        got = answer(q, k, v, q_pos, k_pos, window)
        return a_tensor(got, (T, D), f"the result for window = {window}")

    got = at(None)
    name_the_mistake(
        got,
        {
            "slots are compared instead of positions; use q_pos and k_pos, not arange": rule(visible(index_q, index_k)),
            "an empty slot (position -1) is read; a key needs k >= 0": rule(k_pos <= q_pos[:, None]),
            "every key is read, also later ones; a key needs k <= q": rule(k_pos.expand(T, S) >= 0),
            "a query does not see itself; a key needs k <= q, not k < q": rule((k_pos < q_pos[:, None]) & (k_pos >= 0)),
            "the scores are not scaled by √D": attend_reference(
                q[None, None] * math.sqrt(D), k[None, None], v[None, None], visible(q_pos, k_pos)
            )[0, 0],
        },
    )
    same_tensor(got, rule(visible(q_pos, k_pos)), "the result without a window", tol=SAME)
    for window in (2, 3):
        got = at(window)
        near = (q_pos[:, None] - k_pos).abs() < window
        more = f"window = {window} lets a query see {window + 1} keys"
        name_the_mistake(
            got,
            {
                f"{more}; it counts the query's own, so q - k < window": rule(visible(q_pos, k_pos, window + 1)),
                f"window = {window} lets a query see {window - 1} keys; q - k < window": rule(
                    visible(q_pos, k_pos, window - 1)
                ),
                "the window is ignored": rule(visible(q_pos, k_pos)),
                "the window reaches into the future as well; k <= q still holds": rule(near & (k_pos >= 0)),
            },
        )
        same_tensor(got, rule(visible(q_pos, k_pos, window)), f"the result for window = {window}", tol=SAME)
    same_tensor(at(1), v[[5, 0, 1]], "with window = 1, where each query sees only itself, the result", tol=SAME)
    return "right for a chunk over a ring with an empty slot, with no window and with windows of 1, 2 and 3"
