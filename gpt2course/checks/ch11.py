"""Checks of chapter 11, data parallel. Each usual mistake is tried first, so that the message can name it.

Legend: N processes.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpt2course.checks.base import Wrong, a_kind, exercise, require, same_number, same_tensor, short
from gpt2course.distributed.mini_ddp import assign_buckets


@exercise("11.1 The mean over all tokens")
def global_mean(answer: Callable[[list[float], list[int]], float]) -> str:
    """The learner's `global_mean(means, counts)`."""
    got = answer([2.0, 4.0], [30, 10])
    slips = {
        3.0: "the mean of the means: 10 tokens count as much as the other 30",
        100.0: "the sum over all tokens; divide it by their number, 40",
        3.5: "each mean is weighted by the other's number of tokens",
        50.0: "the sum over all tokens divided by the number of processes, 2; divide it by that of tokens, 40",
    }
    if isinstance(got, int | float) and not isinstance(got, bool):
        for slip, what in slips.items():
            if abs(got - slip) < 1e-9:
                raise Wrong(f"means 2 and 4 over 30 and 10 tokens: you say {short(float(got))}, that is {what}")
    same_number(got, 2.5, "the mean of means 2 and 4 over 30 and 10 tokens")
    got = answer([3.0, math.nan], [8, 0])
    require(
        not (isinstance(got, float) and math.isnan(got)),
        "means 3 and nan over 8 and 0 tokens: you say nan. A process without a token has the mean 0/0 = nan, and "
        "0 * nan is nan as well; leave it out",
    )
    same_number(got, 3.0, "the mean of 3 and nan over 8 and 0 tokens")
    try:
        got = answer([math.nan, math.nan], [0, 0])
    except Wrong as wrong:
        raise Wrong(f"with no token anywhere {wrong}; return 0.0, as the package does") from wrong
    same_number(got, 0.0, "the mean where no process has a token (the package's convention)")
    means, counts = [1.5, 2.25, 7.0, 3.0], [5, 17, 1, 40]
    want = sum(m * n for m, n in zip(means, counts, strict=True)) / sum(counts)
    same_number(answer(means, counts), want, "the mean of four processes")
    return "tokens weigh the same wherever they lie, and a process without any does no harm"


def ring_step_right(parts_NNC: Tensor, step: int) -> Tensor:
    """What every process holds after one step of the ring."""
    N = len(parts_NNC)
    after = parts_NNC.clone()
    for rank in range(N):
        chunk, to = (rank - step) % N, (rank + 1) % N
        arrived = parts_NNC[rank, chunk]
        after[to, chunk] = parts_NNC[to, chunk] + arrived if step < N - 1 else arrived
    return after


@exercise("11.2 One step of the ring")
def ring_step(answer: Callable[[Tensor, int], Tensor]) -> str:
    """The learner's `ring_step(parts_NNC, step)`."""
    for N in (4, 2, 3, 5):
        parts = torch.randint(1, 50, (N, N, 2)).double()
        total = parts.sum(dim=0)
        for step in range(2 * (N - 1)):
            want = ring_step_right(parts, step)
            got = answer(parts, step)
            if isinstance(got, Tensor) and got.shape == want.shape and not torch.equal(got.double(), want):
                explain_step(got.double(), parts, want, step)
            same_tensor(got, want, f"after step {step} of a ring of {N} parts")
            parts = want
        assert all(torch.equal(held, total) for held in parts)
    return "right in both rounds for 2 to 5 processes; after 2 (N - 1) steps all of them hold the sum"


def explain_step(got: Tensor, before: Tensor, want: Tensor, step: int) -> None:
    """Name the mistake behind a wrong step, if it is a usual one."""
    N = len(before)
    label = f"step {step} of a ring of {N}"
    require(not torch.equal(got, before), f"{label}: nothing has changed")
    usual = {
        "the chunk that rank r sends in this step is number r - step (mod N)": lambda r: (r, (r + step) % N, r + 1),
        "every rank sends the chunk of its own number; the chunk is r - step (mod N)": lambda r: (r, r, r + 1),
        "the numbers go to the rank before; rank r sends to rank r + 1 (mod N)": lambda r: (r, (r - step) % N, r - 1),
    }
    for words, rule in usual.items():
        for adds in (True, False):
            other = before.clone()
            for rank in range(N):
                source, chunk, to = rule(rank)
                arrived = before[source, chunk]
                other[to % N, chunk] = before[to % N, chunk] + arrived if adds else arrived
            if adds == (step < N - 1) and torch.equal(got, other):
                raise Wrong(f"{label}: {words}")
    shifted = before.clone()
    for rank in range(N):
        chunk = (rank + 1 - step) % N
        shifted[(rank + 1) % N, chunk] = before[rank, chunk]
    require(
        step < N - 1 or not torch.equal(got, shifted),
        f"{label}: rank r sends chunk r + 1 - step here; the rule for the chunk is the same in both rounds, "
        "r - step (mod N)",
    )
    swapped = before.clone()
    for rank in range(N):
        chunk, to = (rank - step) % N, (rank + 1) % N
        swapped[to, chunk] = before[rank, chunk] if step < N - 1 else before[to, chunk] + before[rank, chunk]
    if torch.equal(got, swapped):
        how = "overwritten; in the first N - 1 steps it is added" if step < N - 1 else "added; a complete sum replaces"
        raise Wrong(f"{label}: what arrives is {how}")
    rank, chunk = (got != want).any(dim=2).nonzero()[0].tolist()
    raise Wrong(
        f"{label}: rank {rank}, chunk {chunk} holds {short(got[rank, chunk].tolist())}, expected "
        f"{short(want[rank, chunk].tolist())}; it held {short(before[rank, chunk].tolist())} before"
    )


@exercise("11.3 Fill the buckets")
def fill_buckets(answer: Callable[[list[int], int], list[list[int]]]) -> str:
    """The learner's `fill_buckets(sizes, limit)`."""
    cases: Sequence[tuple[list[int], int]] = (
        ([4, 4, 4, 4], 8),
        ([1, 2, 3, 4, 5], 7),
        ([2, 9, 3], 5),
        ([3, 9], 5),
        ([5], 5),
        ([], 5),
        ([6, 1, 1, 1, 6, 2], 6),
    )
    for sizes, limit in cases:
        label = f"sizes {sizes}, limit {limit}"
        got, want = answer(sizes, limit), assign_buckets(sizes, limit)
        if not isinstance(got, list) or not all(isinstance(bucket, list) for bucket in got):
            raise Wrong(f"{label}: you return {a_kind(got)}, expected a list of lists of indices")
        if got == want:
            continue
        explain_buckets(got, sizes, limit, label)
        raise Wrong(f"{label}: you say {got}, expected {want}")
    return "last first, none over the limit unless it holds one parameter, and none closed too early"


def explain_buckets(got: list[list[int]], sizes: list[int], limit: int, label: str) -> None:
    """Name the mistake behind wrong buckets, if it is a usual one."""
    flat = [i for bucket in got for i in bucket]
    require([] not in got, f"{label}: a bucket is empty; open one only when there is something to put in")
    places = list(range(len(sizes)))
    require(
        sorted(flat) == places or sorted(flat) != sorted(sizes),
        f"{label}: you say {got}; these are sizes; give indices, which are places in the list of sizes",
    )
    if sorted(flat) != places:
        lost = sorted(set(places) - set(flat))
        what = f"{lost} are in no bucket" if lost else "an index is in two buckets, or is none"
        raise Wrong(f"{label}: {what}; the last bucket has to be kept as well, and each parameter is in one")
    require(
        flat != places,
        f"{label}: the first parameter comes first, but backward makes its gradient last; go from the end",
    )
    last_first = places[::-1]
    inside = [sorted(bucket, reverse=True) for bucket in got]
    require(
        inside == got or [i for bucket in inside for i in bucket] != last_first,
        f"{label}: you say {got}; the buckets are in order, but also within a bucket the last comes first",
    )
    heads = [bucket[0] for bucket in got]
    if flat != last_first and inside == got and heads == sorted(heads, reverse=True):
        late = next(b for a, b in zip(last_first, flat, strict=True) if a != b)
        raise Wrong(
            f"{label}: you say {got}; parameter {late} went into a bucket older than the newest. A bucket once left "
            "stays closed, even if something would still fit"
        )
    require(flat == last_first, f"{label}: the order is {flat}; go from the last to the first")
    for bucket, following in zip(got, [*got[1:], [-1]], strict=True):
        total = sum(sizes[i] for i in bucket)
        if total > limit and len(bucket) > 1:
            raise Wrong(f"{label}: bucket {bucket} holds {total}, over the limit; close it before it passes the limit")
        if following[0] >= 0 and total + sizes[following[0]] <= limit:
            raise Wrong(
                f"{label}: bucket {bucket} holds {total}, and parameter {following[0]} of {sizes[following[0]]} would "
                "still fit; a bucket may be filled up to the limit"
            )
