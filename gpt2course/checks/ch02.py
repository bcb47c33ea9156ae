"""What the exercises of chapter 02 must satisfy: look-up as a product, neighbours, sinusoids, padded positions.

Legend: B batch, T positions, V vocabulary, C width, P rows of a position table.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2course.checks.base import Wrong, a_kind, exercise, require, same_tensor, same_value

Answer = Callable[..., Any]


@exercise("02.1 A look-up is a matrix product")
def embed_by_product(answer: Answer) -> str:
    """`answer(idx_BT, table_VC)` is (B, T, C)."""
    table_VC = torch.randn(7, 3)
    # The highest id is missing on purpose: a width guessed from the ids is then too small.
    idx_BT = torch.tensor([[2, 0, 2, 5], [1, 4, 3, 0]])
    got = answer(idx_BT, table_VC)
    want = table_VC[idx_BT]
    if isinstance(got, Tensor) and got.shape == (2, 4, 7):
        raise Wrong("the result has shape (2, 4, 7): those are still one-hot rows; multiply them by the table")
    if isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got.float(), table_VC[:1].expand_as(got)):
        raise Wrong("every token got row 0 of the table")
    same_tensor(got, want, "x_BTC")

    weight_VC = torch.randn(7, 3, requires_grad=True)
    out = answer(idx_BT, weight_VC)
    require(
        out.requires_grad,
        "no gradient reaches the table, so it could never be trained; leave out detach, item, .data and numpy",
    )
    out.sum().backward()
    counts_V = torch.bincount(idx_BT.flatten(), minlength=7).float()
    same_tensor(weight_VC.grad, counts_V[:, None].expand(7, 3), "the gradient of the sum with respect to the table")
    return "equal to indexing for a batch of 2 x 4 ids, and row v of the gradient counts how often id v was used"


@exercise("02.2 Nearest neighbours")
def nearest(answer: Answer) -> str:
    """`answer(table_VC, token, k)` is a list of k ids, the most alike first."""
    # In the plane, so that each mistake picks others: 1 is near in angle, 2 is long, 6 is close by, 4 is opposite.
    table_VC = torch.tensor([[1.0, 0.0], [2.0, 0.2], [30.0, 20.0], [0.9, 0.5], [-1.0, 0.05], [0.3, 0.05], [1.0, 0.95]])
    cosine = F.cosine_similarity(table_VC, table_VC[:1], dim=1)
    cosine[0] = -torch.inf
    want = cosine.topk(3).indices.tolist()
    got = answer(table_VC, 0, 3)
    if isinstance(got, Tensor):
        raise Wrong("ids are a tensor, expected a list of int; end with .tolist()")
    require(isinstance(got, list), f"ids are {a_kind(got)}, expected a list of int")
    require(0 not in got, f"token 0 is in its own list {got}; every token is nearest to itself, so leave it out")
    require(len(got) == 3, f"the list has {len(got)} ids for k = 3: {got}")
    dot = table_VC @ table_VC[0]
    dot[0] = -torch.inf
    if got == dot.topk(3).indices.tolist():
        raise Wrong(f"{got} is the order by dot product: long vectors win; divide by both lengths first")
    if got == (-cosine).masked_fill(cosine.isinf(), -torch.inf).topk(3).indices.tolist():
        raise Wrong(f"{got} are the least alike; take the largest cosines, not the smallest")
    distance = (table_VC - table_VC[0]).norm(dim=1)
    distance[0] = torch.inf
    if got == distance.topk(3, largest=False).indices.tolist():
        raise Wrong(f"{got} is the order by distance; the cosine looks at the angle alone")
    if got != want and sorted(got) == sorted(want):
        raise Wrong(f"{got} are the right tokens in another order; the most alike comes first: {want}")
    same_value(got, want, "ids")

    other_VC = torch.randn(50, 8)
    for token in (7, 49):
        alike = F.cosine_similarity(other_VC, other_VC[token : token + 1], dim=1)
        alike[token] = -torch.inf
        same_value(answer(other_VC, token, 5), alike.topk(5).indices.tolist(), f"the neighbours of token {token}")
    return "right in the plane, where lengths mislead, and for 50 random rows"


@exercise("02.3 The sinusoid table")
def sinusoid_table(answer: Answer) -> str:
    """`answer(P, C)` is (P, C): sine in even columns, cosine in odd ones."""
    for P, C in ((6, 8), (40, 6)):
        got, want = answer(P, C), sinusoids(P, C)
        if isinstance(got, Tensor) and got.shape == want.shape and got.is_floating_point():
            name_the_slip(got, P, C)
        same_tensor(got, want, "p_PC", tol=1e-4)
    return "equal to section 3.5 of the paper for tables of 6 x 8 and 40 x 6"


def sinusoids(P: int, C: int, *, first: int = 0, base: float = 10000.0) -> Tensor:
    """Vaswani et al. 2017, section 3.5: sin(t / base^(2k/C)) in column 2k, cos of the same in column 2k + 1. (P, C)."""
    t_P1 = torch.arange(first, first + P, dtype=torch.float64)[:, None]
    angle_PK = t_P1 / base ** (torch.arange(0, C, 2, dtype=torch.float64) / C)
    return torch.stack([angle_PK.sin(), angle_PK.cos()], dim=-1).flatten(1).float()


def name_the_slip(got: Tensor, P: int, C: int) -> None:
    """Raise `Wrong` with its name if the table is one that a usual mistake makes."""
    want = sinusoids(P, C)
    columns = torch.arange(C, dtype=torch.float64)
    t_P1 = torch.arange(P, dtype=torch.float64)[:, None]
    halves = torch.cat([want[:, 0::2], want[:, 1::2]], dim=1)
    swapped = want.unflatten(1, (-1, 2)).flip(-1).flatten(1)
    half_angle = t_P1 / 10000.0 ** (columns[: C // 2] / C)
    own_angle = t_P1 / 10000.0 ** (columns / C)
    slips = {
        "every column is a sine; odd columns hold the cosine": want[:, 0::2].repeat_interleave(2, dim=1),
        "the sines come first and the cosines after them; the paper interleaves them, column by column": halves,
        "sine and cosine are swapped; column 0 is a sine, so p[0, 0] is 0": swapped,
        "positions start at 1; the first row is position 0": sinusoids(P, C, first=1),
        "the exponent is half of what it should be: pair k has 2k / C, not k / C": torch.stack(
            [half_angle.sin(), half_angle.cos()], dim=-1
        ).flatten(1),
        "each column has a frequency of its own; columns 2k and 2k + 1 share one": torch.where(
            columns % 2 == 0, own_angle.sin(), own_angle.cos()
        ),
        "every column has an angle and a sine of its own; columns 2k and 2k + 1 share one angle, sine and cosine": (
            own_angle.sin()
        ),
        "the angle grows with the column; divide the position by 10000^(2k / C), do not multiply": torch.stack(
            [(t_P1 * 10000.0 ** (columns[::2] / C)).sin(), (t_P1 * 10000.0 ** (columns[::2] / C)).cos()], dim=-1
        ).flatten(1),
    }
    for message, table in slips.items():
        if torch.allclose(got.double(), table.double(), atol=1e-4):
            raise Wrong(message)


@exercise("02.4 Positions under left padding")
def add_positions(answer: Answer) -> str:
    """`answer(x_BTC, table_PC, lengths_B)` adds a row of the table to each token, and row 0 to padding."""
    B, T, P, C = 3, 5, 9, 4
    # Table row p is 100 p + column, so that what was added can be read off as a position.
    table_PC = 100.0 * torch.arange(P)[:, None] + torch.arange(C)
    x_BTC = torch.rand(B, T, C)
    lengths_B = torch.tensor([5, 3, 1])
    want_BT = (torch.arange(T) - (T - lengths_B[:, None])).clamp(min=0)
    got = answer(x_BTC, table_PC, lengths_B)
    want = x_BTC + table_PC[want_BT]
    if not isinstance(got, Tensor) or got.shape != want.shape:
        same_tensor(got, want, "the sum")
    if torch.allclose(got, x_BTC):
        raise Wrong("nothing was added to the token vectors")
    if torch.equal(got, table_PC[want_BT]):
        raise Wrong("these are the position vectors alone; add them to x_BTC")
    row_BT = ((got - x_BTC).mean(dim=-1) / 100.0).round()
    name_the_row(row_BT, lengths_B, P)
    same_tensor(got, want, "the sum", tol=1e-4)
    return "each row starts at position 0 on its first token, and padding stays inside the table"


def name_the_row(row_BT: Tensor, lengths_B: Tensor, P: int) -> None:
    """Raise `Wrong` that says which row of the table went to which place, and what that means."""
    T = row_BT.shape[1]
    for b, length in enumerate(lengths_B.tolist()):
        pad = T - length
        rows = [int(row) for row in row_BT[b]]
        if pad and rows[:pad] == [P - 1] * pad:
            raise Wrong(
                f"row {b}, place 0 is padding, and -1 took the last row of the table, {P - 1}: Python counts "
                "from the end; clamp positions to 0 or more"
            )
        if pad and any(row >= P - pad for row in rows[:pad]):
            raise Wrong(f"row {b}: padding got table rows {rows[:pad]}, counted from the end; clamp to 0 or more")
        if pad and rows == list(range(T)):
            raise Wrong(f"row {b} starts with {pad} of padding, and they were counted: its first token got row {pad}")
        if rows[pad:] == list(range(length)) and not any(rows[:pad]):
            continue
        if pad and rows[:length] == list(range(length)):
            raise Wrong(f"row {b}: counted from the left, as if the padding were on the right")
        if rows[pad:] == list(range(1, length + 1)):
            raise Wrong(f"row {b}: its first token got row 1; positions start at 0")
        if rows[pad:] != list(range(length)):
            raise Wrong(f"row {b}: its {length} tokens got table rows {rows[pad:]}, expected 0 to {length - 1}")
        if any(rows[:pad]):
            raise Wrong(f"row {b}: padding got table rows {rows[:pad]}, expected row 0, as the model does")
