"""Checks of chapter 12, fully sharded training. Each usual mistake is tried first, so that the message can name it.

Legend: N processes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt2course.checks.base import Wrong, a_kind, exercise, require, same_number, same_tensor, short

MIXED = {"parameters": 2, "gradients": 2, "optimizer": 12}
FIRST_STAGE = {"parameters": 3, "gradients": 2, "optimizer": 1}


@exercise("12.1 Bytes a process")
def bytes_per_rank(answer: Callable[[int, int, int], dict[str, float]]) -> str:
    """The learner's `bytes_per_rank(n_params, world_size, stage)`: bytes by part, of 2 + 2 + 12 a parameter."""
    for P, N in ((1000, 10), (7_500_000_000, 64), (10, 3), (5, 1)):
        for stage in range(4):
            explain_bytes(answer(P, N, stage), P, N, stage)
    return "16 bytes without sharing, then 4 + 12/N, 2 + 14/N and 16/N"


def explain_bytes(got: Any, P: int, N: int, stage: int) -> None:
    """Say which part of a bill is wrong, and how it came about."""
    label = f"stage {stage}, {P:,} parameters, {N} processes"
    if not isinstance(got, dict):
        raise Wrong(f"{label}: you give {a_kind(got)}, expected a dict with {', '.join(MIXED)}")
    require(set(got) == set(MIXED), f"{label}: the parts are {sorted(map(str, got))}, expected {', '.join(MIXED)}")
    for part in ("optimizer", "gradients", "parameters"):
        first, size = FIRST_STAGE[part], P * MIXED[part]
        slips = {
            size / N: f"stage {stage} does not share out the {part}" + (": it shares out nothing" if not stage else ""),
            size: f"the {part} are whole; they are shared out from stage {first} on",
        }
        if part == "optimizer":
            why = "two averages take 8 bytes a parameter, and the float32 copy of the parameters takes 4 more"
            slips |= {8 * P: why, 8 * P / N: why, 4 * P + 8 * P / N: "the float32 copy is shared out as well"}
        else:
            slips |= {4 * P: "4 bytes is the bill of float32; here it is 2", 4 * P / N: "here it is 2 bytes, not 4"}
        want = size / N if stage >= first else size
        for value, reason in slips.items():
            wrong = is_near(got[part], value) and not is_near(want, value)
            require(not wrong, f"{label}: {part}, {short(got[part])} bytes: {reason}")
        same_number(got[part], want, f"{label}: the bytes of the {part}")


def is_near(got: Any, want: float) -> bool:
    """Whether a number is the wanted one, so that a message can be chosen."""
    return isinstance(got, int | float) and math.isclose(got, want, rel_tol=1e-9)


@exercise("12.2 Pad and cut")
def to_shards(answer: Callable[[list[Tensor], int], list[Tensor]]) -> str:
    """The learner's `to_shards(tensors, world_size)`: one flat tensor a process, all of one length."""
    tensors = [torch.arange(1.0, 5).view(2, 2), torch.arange(5.0, 9)]
    explain_shards(answer(tensors, 3), tensors, 3)
    for shapes, N in (([(2, 3), (2,)], 3), ([(2, 2)], 4), ([(3,)], 5), ([(5, 4), (4,), ()], 2), ([(7,)], 1)):
        tensors = [torch.randn(shape) for shape in shapes]
        want = wanted_shards(tensors, N)
        got = answer(tensors, N)
        label = f"{sum(t.numel() for t in tensors)} numbers on {N} processes"
        require(isinstance(got, list | tuple), f"{label}: you give {a_kind(got)}, expected a list of {N} tensors")
        require(len(got) == N, f"{label}: you give {len(got)} shards, expected one a process")
        for rank, (mine, wanted) in enumerate(zip(got, want, strict=True)):
            same_tensor(mine, wanted, f"{label}: the shard of rank {rank}", tol=0.0)
    return "every shard has the same length, and end to end they are the tensors, then zeros"


def wanted_shards(tensors: list[Tensor], N: int) -> list[Tensor]:
    """Tensors end to end, zeros at the end, cut into N runs of one length."""
    flat = torch.cat([t.flatten() for t in tensors])
    return list(torch.cat([flat, flat.new_zeros(-len(flat) % N)]).view(N, -1))


def explain_shards(got: Any, tensors: list[Tensor], N: int) -> None:
    """Say what a wrong list of shards of the numbers 1 to 8 does with them."""
    require(isinstance(got, list | tuple), f"you give {a_kind(got)}, expected a list of {N} tensors, one a process")
    require(all(isinstance(piece, Tensor) for piece in got), "the list must hold tensors, one a process")
    require(len(got) == N, f"you give {len(got)} shards for {N} processes, expected one for each")
    sizes = [tuple(piece.shape) for piece in got]
    require(
        all(piece.ndim == 1 for piece in got),
        f"the shards have shapes {sizes}; lay the tensors end to end first, so that each shard is flat",
    )
    padded = [torch.cat([t.flatten(), torch.zeros(-t.numel() % N)]) for t in tensors]
    for slip in (torch.cat([t.view(N, -1) for t in padded], dim=1), torch.cat(padded).view(N, -1)):
        require(
            not torch.equal(torch.cat(list(got)), slip.flatten()),
            "you pad each tensor for itself; lay all of them end to end first, and pad once",
        )
    total = sum(len(piece) for piece in got)
    if total < 8:
        raise Wrong(f"the shards hold {total} numbers of 8: the last ones fell off the end; pad before you cut")
    require(
        len(set(sizes)) == 1,
        f"the shards have lengths {[len(piece) for piece in got]}; an all-gather takes pieces of one length, so pad "
        "with zeros first",
    )
    require(
        len(got[0]) == 3, f"each shard has {len(got[0])} numbers; 8 numbers on 3 processes need 3 each, no more padding"
    )
    end_to_end = torch.cat(list(got))
    require(
        not torch.equal(end_to_end, torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8])),
        "the zero stands in front; put it at the end, or every tensor begins one place late",
    )
    require(
        not torch.equal(end_to_end, torch.tensor([1.0, 4, 7, 2, 5, 8, 3, 6, 0])),
        "the numbers are dealt out like cards; rank 0 keeps the first run, so that gathering is laying end to end",
    )


@exercise("12.3 Which rows are mine")
def rows_on_rank(answer: Callable[[int, int, int], tuple[int, int]]) -> str:
    """The learner's `rows_on_rank(n_rows, world_size, rank)`, as (begin, end)."""
    for n_rows, N in ((8, 4), (10, 4), (50257, 4), (9, 4), (5, 4), (2, 4), (7, 1), (1, 3)):
        size = -(-n_rows // N)
        got = [answer(n_rows, N, rank) for rank in range(N)]
        label = f"{n_rows:,} rows on {N} processes"
        for rank, pair in enumerate(got):
            require(
                isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(end, int) for end in pair),
                f"{label}: rank {rank} gets {short(pair)}, expected two whole numbers (begin, end)",
            )
        lengths = [end - begin for begin, end in got]
        require(
            lengths != [size - 1] * N or n_rows != N * size,
            f"{label}: rank 0 gets {got[0]}; end is the row after the last one: the end is not included",
        )
        want = [min(n_rows, (rank + 1) * size) - min(n_rows, rank * size) for rank in range(N)]
        if lengths != want:
            explain_rows(label, lengths, want, n_rows, N)
        for rank, (begin, end) in enumerate(got):
            if want[rank]:
                require(
                    (begin, end) == (rank * size, rank * size + want[rank]),
                    f"{label}: rank {rank} gets rows {begin} to {end}, expected {rank * size} to "
                    f"{rank * size + want[rank]} (the end is not included)",
                )
    return "runs of ceil(rows / N), the last ones shorter, and empty when the rows have run out"


def explain_rows(label: str, lengths: list[int], want: list[int], n_rows: int, N: int) -> None:
    """Say how the wrong numbers of rows came about."""
    rule = f"DTensor gives {want}: each rank takes ceil({n_rows} / {N}) = {want[0]} rows while there are any"
    why = f"you give them {lengths}; {rule}"
    if sum(lengths) > n_rows:
        why = f"you hand out {sum(lengths):,} rows, more than there are; a run ends with the tensor. {rule}"
    elif min(lengths) < 0:
        why = (
            f"rank {lengths.index(min(lengths))} gets {min(lengths)} rows; where none are left the run is empty. {rule}"
        )
    elif sum(lengths) < n_rows:
        why = f"you hand out {sum(lengths):,} rows; the others belong to nobody. {rule}"
    elif max(lengths) - min(lengths) <= 1:
        why = f"you share out evenly, {lengths}, as the rows of a batch are. {rule}"
    raise Wrong(f"{label}: {why}")


@exercise("12.4 Clip what is cut up")
def clip_shards(answer: Callable[[list[Tensor], float], list[Tensor]]) -> str:
    """The learner's `clip_shards(shards, max_norm)`: the shards of a gradient, clipped as the whole would be."""
    shards = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor([7.2, 9.6])]  # norms 3, 4 and 12: 13
    got = answer(shards, 6.5)
    require(isinstance(got, list | tuple) and len(got) == 3, f"you give {a_kind(got)}, expected a list of 3 shards")
    require(all(isinstance(piece, Tensor) for piece in got), "the list must hold tensors, one a process")
    require(
        not all(torch.equal(mine, whole.clamp(-6.5, 6.5)) for mine, whole in zip(got, shards, strict=True)),
        "you cut each number off at the limit; max_norm is a limit for the norm of the whole, and all shrink alike",
    )
    factors = [float(mine.sum() / whole.sum()) for mine, whole in zip(got, shards, strict=True)]
    if max(factors) - min(factors) > 1e-6:
        raise Wrong(
            f"the shards are scaled by {', '.join(short(f) for f in factors)}: each by a norm of its own. That turns "
            "the gradient; all must be scaled by one factor, from the norm of the whole"
        )
    slips = {
        1.0: "nothing is clipped: the whole has norm 13, the limit is 6.5",
        6.5 / 19: "you divide by 19, the sum of the shards' norms; squares add up, norms don't",
        6.5 / 169: "you divide by 169, the sum of squares; take its root",
        6.5 / 12: "you divide by 12, the largest norm of a shard",
        6.5 / 3: "you divide by 3, the norm of rank 0's shard, on every rank",
        6.5 / (19 / 3): "you divide by the mean of the shards' norms; squares add up, norms don't",
        6.5 / math.sqrt(169 / 3): "you took the mean of the squares; they are summed",
    }
    for factor, why in slips.items():
        require(not math.isclose(factors[0], factor, rel_tol=1e-4), why)
    for limit in (6.5, 13.0, 100.0, 1e-3):
        factor = min(1.0, limit / 13)
        for rank, (mine, whole) in enumerate(zip(answer(shards, limit), shards, strict=True)):
            require(
                limit <= 13 or not mine.norm() > 1.0001 * whole.norm(),
                "a gradient below the limit is made longer; clipping only ever shortens",
            )
            same_tensor(mine, whole * factor, f"max_norm {limit}: the shard of rank {rank}", tol=1e-4)
    pieces = list(torch.randn(20).split(6))
    whole = torch.cat(pieces)
    want = whole * min(1.0, 1.0 / whole.norm().item())
    same_tensor(torch.cat(list(answer(pieces, 1.0))), want, "the shards end to end", tol=1e-4)
    for mine in answer([torch.zeros(2), torch.zeros(2)], 1.0):
        require(
            isinstance(mine, Tensor) and mine.isfinite().all(),
            "a gradient of zeros becomes NaN: you divide by its norm, 0; add a little to the norm first, such as 1e-6",
        )
        same_tensor(mine, torch.zeros(2), "a gradient of zeros: a shard")
    return "one factor for all, from the norm of the whole, and never above 1"
