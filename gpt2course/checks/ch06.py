"""Checks of chapter 06: frequencies, the turn, a decoding step, the two layouts, NTK-aware theta.

Legend: T positions, S cached positions, D head width, R how many of the D numbers are turned, C model width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gpt2course.checks.base import Wrong, exercise, require, same_number, same_tensor
from gpt2course.rope import change_layout, inverse_frequencies, rotate


@exercise("06.1 How fast each pair turns")
def frequencies(answer: Callable[[int, float], Tensor]) -> str:
    """The learner's `frequencies(rotary_dim, theta)` gives theta^(-2i/R) for each pair."""
    R, theta = 8, 10000.0
    want = inverse_frequencies(R, theta)
    got = answer(R, theta)
    require(isinstance(got, Tensor), f"you returned {type(got).__name__}, expected a tensor of {R // 2} numbers")
    if got.shape == (R,):
        raise Wrong(f"you returned {R} frequencies, expected {R // 2}: one for each pair of numbers")
    same_shape(got, want, "frequencies")
    require(got.dtype in (torch.float32, torch.float64), f"you returned {got.dtype}; angles need float32 at least")
    mistakes = {
        "these are periods or their like, growing from pair to pair; frequencies fall, so the exponent is negative": 1
        / want,
        "pair i has the exponent -2i/R; you have -i/R, and the slowest pair is too fast": want**0.5,
        "you divided by the last pair's number, so that the slowest pair is exactly 1/theta; the exponent is -2i/R": (
            theta ** -torch.linspace(0, 1, R // 2)
        ),
        "these are turns a token, or turned by 2π; angles are in radians, and the first pair turns by exactly 1": None,
    }
    for sentence, values in mistakes.items():
        turns = values is None and any(close(got, want * by) for by in (2 * math.pi, 1 / (2 * math.pi)))
        if turns or (values is not None and close(got, values)):
            raise Wrong(sentence)
    if close(got, want.flip(0)):
        raise Wrong("the pairs are in the wrong order: the fastest, with 1 radian a token, comes first")
    same_tensor(got, want, "frequencies for R = 8, theta = 10,000")
    got = answer(6, 500_000.0)
    if close(got, inverse_frequencies(6, 10000.0)):
        raise Wrong("with theta = 500,000 you give the frequencies of 10,000; take theta from the argument")
    same_tensor(got, inverse_frequencies(6, 500_000.0), "frequencies for R = 6, theta = 500,000")
    return "theta^(-2i/R) for heads of 8 and 6 numbers and two thetas"


@exercise("06.2 Turn a head")
def turn(answer: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    """The learner's `turn(x_TD, pos_T, theta)` rotates the pairs (i, i + D/2) by pos times frequency."""
    D, theta = 8, 10000.0
    x_TD, pos_T = torch.randn(5, D, dtype=torch.float64), torch.tensor([0, 1, 2, 7, 40])
    want = turned(x_TD, pos_T, theta)
    got = answer(x_TD, pos_T, theta)
    same_shape(got, want, "turned")
    same_tensor(got[0], x_TD[0], "the row at position 0, where nothing turns,")
    omega_K = inverse_frequencies(D, theta).double()
    angle_TK = pos_T[:, None] * omega_K
    ways = {
        "the sine has the wrong sign: (a, b) becomes (a cos - b sin, a sin + b cos), anticlockwise": (
            rotate(x_TD, angle_TK.cos(), -angle_TK.sin())
        ),
        "you paired 2i with 2i + 1, the interleaved layout; here number i goes with i + D/2": (
            rotate(x_TD, angle_TK.cos(), angle_TK.sin(), "interleaved")
        ),
        "the angles are radians already; cos and sin take radians, so there is nothing to convert": (
            rotate(x_TD, torch.deg2rad(angle_TK).cos(), torch.deg2rad(angle_TK).sin())
        ),
        "rows were turned by their number 0, 1, 2 …; row 3 stands at position 7, as pos_T says": (
            turned(x_TD, torch.arange(5), theta)
        ),
        "both halves carry the same frequencies: join them with cat, repeat_interleave gives each its neighbour's": (
            mixed(x_TD, angle_TK)
        ),
        "both of the pair have a minus or both a plus; only a cos - b sin has the minus": mirrored(x_TD, angle_TK),
    }
    for sentence, values in ways.items():
        if close(got, values):
            raise Wrong(sentence)
    longer = got.norm(dim=1) / x_TD.norm(dim=1)
    if not close(longer, torch.ones(5, dtype=torch.float64), 1e-4):
        row = int((longer - 1).abs().argmax())
        raise Wrong(f"row {row} is {longer[row]:.3f} times as long as before; a turn changes no length")
    require(
        got.dtype == x_TD.dtype or not close(got, want, 1e-4),
        f"x is float64 and you returned {got.dtype}; keep the dtype of x",
    )
    same_tensor(got, want, "turned", tol=1e-5)
    low_TD, far_T = torch.randn(1, D, dtype=torch.bfloat16), torch.tensor([8001])
    got = answer(low_TD, far_T, theta)
    require(got.dtype == torch.bfloat16, f"x is bfloat16 and you returned {got.dtype}; keep the dtype of x")
    want = turned(low_TD.float(), far_T, theta)
    if not close(got.float(), want, 0.05):
        raise Wrong("a bfloat16 row at position 8,001 is far off: make the angles in float32, whatever x is")
    got = answer(x_TD, pos_T, 500.0)
    same_tensor(got, turned(x_TD, pos_T, 500.0), "turned with theta = 500", tol=1e-5)
    return "right for five positions, for two thetas, and in bfloat16 at position 8,001; no length has changed"


@exercise("06.3 From one layout to the other")
def to_interleaved(answer: Callable[[Tensor, int], Tensor]) -> str:
    """The learner's `to_interleaved(weight, n_head)` reorders the outputs of a half-split projection, head by head."""
    n_head, D, C = 2, 6, 4
    weight = torch.randn(n_head * D, C)
    want = change_layout(weight, D, D, "interleaved")
    got = answer(weight, n_head)
    same_shape(got, want, "weight")
    if close(got, weight):
        raise Wrong("nothing was reordered: the rows still come half by half")
    if close(got, change_layout(weight, D, D, "half")):
        raise Wrong("this is the way back, from interleaved to half-split; row 1 of a head must be its old row D/2")
    if close(got, change_layout(weight, n_head * D, n_head * D, "interleaved")):
        raise Wrong("the heads were mixed: the rows of each head, D in number, are reordered among themselves")
    if not close(got.sum(dim=0), weight.sum(dim=0), 1e-4):
        raise Wrong("some rows are missing, doubled or changed inside; only their order may change")
    same_tensor(got, want, "weight")
    x_TC, pos_T = torch.randn(5, C), torch.arange(5)
    cos, sin = (
        (pos_T[:, None] * inverse_frequencies(D, 100.0)).cos(),
        (pos_T[:, None] * inverse_frequencies(D, 100.0)).sin(),
    )
    before = rotate((x_TC @ weight.T).view(5, n_head, D).transpose(0, 1), cos, sin, "half")
    after = rotate((x_TC @ got.T).view(5, n_head, D).transpose(0, 1), cos, sin, "interleaved")
    same_tensor(after @ after.mT, before @ before.mT, "scores after the change", tol=1e-4)
    return "each head in the other order, and every score as before"


@exercise("06.4 One step of decoding")
def decode_step(answer: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> str:
    """The learner's `decode_step(q_D, k_D, v_D, k_SD, v_SD, turn)` turns what is new by its place, and only that."""
    D, S = 8, 6
    q_TD, k_TD, v_TD = torch.randn(3, S + 1, D, dtype=torch.float64)
    k_TD, q_TD = 2 * k_TD, 2 * q_TD

    def by_place(x_ND: Tensor, pos_N: Tensor) -> Tensor:
        if x_ND.ndim != 2 or pos_N.shape != x_ND.shape[:1]:
            given = f"{tuple(x_ND.shape)} and {tuple(pos_N.shape)}"
            raise ValueError(f"turn wants rows (N, D) and a position for each (N,), not {given}")
        return turned(x_ND, pos_N, 10000.0)

    pos_T = torch.arange(S + 1)
    turned_k_TD, query_D = by_place(k_TD, pos_T), by_place(q_TD, pos_T)[-1]
    weights_T = (turned_k_TD @ query_D / math.sqrt(D)).softmax(dim=0)
    want = weights_T @ v_TD
    got = answer(q_TD[-1], k_TD[-1], v_TD[-1], turned_k_TD[:-1], v_TD[:-1], by_place)
    require(isinstance(got, tuple) and len(got) == 3, "return three things: the output, the keys and the values")
    out_D, keys_TD, values_TD = got
    same_shape(keys_TD, turned_k_TD, "the keys")
    same_shape(values_TD, v_TD, "the values")
    if not close(values_TD, v_TD):
        raise Wrong("the values have changed; only queries and keys are turned, what is handed over stays as it is")
    if not close(keys_TD[:-1], turned_k_TD[:-1]):
        raise Wrong("the cached keys have changed; they were turned when they came in, and are never touched again")
    if close(keys_TD[-1], k_TD[-1]):
        raise Wrong(f"the new key was turned to position 0, or not at all; {S} keys are cached, so it stands at {S}")
    if not close(keys_TD[-1], turned_k_TD[-1]):
        raise Wrong(f"the new key is turned, but not to position {S}: {S} keys are cached, at 0 to {S - 1}")
    same_shape(out_D, want, "the output")
    for place in (0, S - 1, S + 1):
        other_D = by_place(q_TD[-1:], torch.tensor([place]))[0]
        if close(out_D, (turned_k_TD @ other_D / math.sqrt(D)).softmax(dim=0) @ v_TD):
            raise Wrong(f"the keys are right, but the query was turned to {place}; it stands at {S}, as its key does")
    if close(out_D, (turned_k_TD @ query_D).softmax(dim=0) @ v_TD):
        raise Wrong("the scores are not divided by √D")
    if close(out_D, (turned_k_TD[:-1] @ query_D / math.sqrt(D)).softmax(dim=0) @ v_TD[:-1]):
        raise Wrong("the query does not see its own, new key; put it into the cache first, then attend")
    same_tensor(out_D, want, "the output", tol=1e-5)
    first = answer(q_TD[0], k_TD[0], v_TD[0], k_TD[:0], v_TD[:0], by_place)[0]
    same_tensor(first, v_TD[0], "the output of the very first token, which sees only itself,", tol=1e-5)
    return "the seventh token gets what the whole text at once gives it, and the cached keys stay as they were"


@exercise("06.5 NTK-aware theta")
def ntk_theta(answer: Callable[[float, int, float], float]) -> str:
    """The learner's `ntk_theta(theta, rotary_dim, factor)` slows the slowest pair by exactly the factor."""
    theta, R, factor = 10000.0, 64, 8.0
    want = theta * factor ** (R / (R - 2))
    got = answer(theta, R, factor)
    wrong = {
        theta * factor: "theta times the factor slows the slowest pair by too little: its exponent is (R - 2)/R, not 1",
        theta * factor ** ((R - 2) / R): "the exponent is upside down: R/(R - 2), a little more than 1",
        theta ** (R / (R - 2)) * factor: "the exponent R/(R - 2) belongs to the factor, not to theta",
        theta * factor ** (R / 2 / (R / 2 - 2)): "R is the width that is turned, 64 here, not the number of pairs",
        theta / factor ** (R / (R - 2)): "a smaller theta makes the pairs faster; they are to be slowed",
    }
    for value, sentence in wrong.items():
        if isinstance(got, int | float) and math.isclose(got, value, rel_tol=1e-6):
            raise Wrong(f"theta becomes {got:,.0f}; {sentence}")
    same_number(got, want, "theta for 8 times the length, R = 64")
    old, new = inverse_frequencies(32, 500.0).double(), inverse_frequencies(32, answer(500.0, 32, 4.0)).double()
    same_number(float(old[-1] / new[-1]), 4.0, "how much slower the slowest of 16 pairs is, for factor 4", tol=1e-4)
    return "the fastest pair stays as it is, the slowest is slowed by exactly the factor"


def turned(x_TD: Tensor, pos_T: Tensor, theta: float) -> Tensor:
    """(T, D) turned in the half-split layout, with angles in the dtype of x, float32 at least."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    angle_TK = pos_T[:, None].to(dtype) * inverse_frequencies(x_TD.shape[1], theta).to(dtype)
    return rotate(x_TD, angle_TK.cos(), angle_TK.sin())


def mixed(x_TD: Tensor, angle_TK: Tensor) -> Tensor:
    """The half-split turn with the angles of each pair on two neighbours."""
    angle_TD = angle_TK.repeat_interleave(2, dim=1)
    a_TK, b_TK = x_TD.chunk(2, dim=1)
    return x_TD * angle_TD.cos() + torch.cat([-b_TK, a_TK], dim=1) * angle_TD.sin()


def mirrored(x_TD: Tensor, angle_TK: Tensor) -> Tensor:
    """The half-split turn without the minus."""
    a_TK, b_TK = x_TD.chunk(2, dim=1)
    return (
        x_TD * torch.cat([angle_TK, angle_TK], dim=1).cos()
        + torch.cat([b_TK, a_TK], dim=1) * torch.cat([angle_TK, angle_TK], dim=1).sin()
    )


def same_shape(got: object, want: Tensor, name: str) -> None:
    """Require a tensor of the wanted shape, whatever is in it."""
    if not isinstance(got, Tensor):
        raise Wrong(f"{name}: you returned {type(got).__name__}, expected a tensor of shape {tuple(want.shape)}")
    require(got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")


def close(got: Tensor, want: Tensor, tol: float = 1e-5) -> bool:
    """Whether two tensors of one shape are equal up to rounding."""
    return got.shape == want.shape and torch.allclose(got.double(), want.double(), rtol=tol, atol=tol)
