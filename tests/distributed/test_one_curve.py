"""Single device, DDP and FSDP train on one curve: the same loss at every step, and the same weights at the end."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2course.train.world import World
from tests.distributed.made_runs import Case, Outcome, run_case, run_cases
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

SHAPES = [(1, False), (3, False), (1, True), (3, True)]
LOSS = 2e-6
WEIGHTS = 5e-5  # Adam divides by roots of tiny averages, which enlarges the last bits of a gradient

CASES = {
    2: [Case(name, accum, uneven) for name in ("ddp", "fsdp") for accum, uneven in SHAPES],
    3: [Case(name, accum, uneven) for name in ("ddp", "fsdp") for accum, uneven in SHAPES],
    4: [Case(name, accum, uneven) for name in ("fsdp", "hsdp", "fsdp-kept") for accum, uneven in SHAPES[1::2]],
}
BUGS = [
    ("ddp", "unsynced accumulation", False),
    ("fsdp", "unsynced accumulation", False),
    ("ddp", "mean of means", True),
    ("fsdp", "mean of means", True),
    ("ddp", "rank seeds", False),
    ("fsdp", "rank seeds", False),
    ("fsdp", "local norm", False),
    ("ddp", "skipped row", False),
    ("fsdp", "skipped row", False),
    ("ddp", "averaged", False),
    ("fsdp", "averaged", False),
]


@functools.cache
def alone(accum: int, uneven: bool) -> Outcome:
    """The run of one process."""
    with tempfile.TemporaryDirectory() as out:
        return run_case(World(), Case("single", accum, uneven), Path(out))


@functools.cache
def together(world_size: int) -> list[list[Outcome]]:
    """All cases of a world size, by rank; one group of processes runs them all."""
    with tempfile.TemporaryDirectory() as out:
        return run_ranks(run_cases, world_size, CASES[world_size], Path(out), timeout=280)


@functools.cache
def with_bugs() -> dict[tuple[str, str, bool], Outcome]:
    """Each bug on two ranks."""
    cases = [Case(name, 3, uneven, mutant=bug) for name, bug, uneven in BUGS]
    with tempfile.TemporaryDirectory() as out:
        return dict(zip(BUGS, run_ranks(run_cases, 2, cases, Path(out), timeout=280)[0], strict=True))


def largest_differences(a: Outcome, b: Outcome) -> tuple[float, float]:
    """Of the loss at any step, and of any weight at the end."""
    assert len(a.losses) == len(b.losses)
    assert a.parameters.keys() == b.parameters.keys()
    loss = max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))
    return loss, max((a.parameters[name] - b.parameters[name]).abs().max().item() for name in a.parameters)


@pytest.mark.parametrize(
    ("world_size", "i"), [(N, i) for N, cases in CASES.items() for i in range(len(cases))], ids=lambda v: str(v)
)
def test_the_curve_of_one_process_and_of_many_is_one(
    world_size: int, i: int, worst: Callable[[str, float], None]
) -> None:
    """With accumulation, with uneven last batches (ranks without any row among them), with masked tokens."""
    case = CASES[world_size][i]
    ranks = [outcomes[i] for outcomes in together(world_size)]
    assert all(rank.losses == ranks[0].losses and rank.norms == ranks[0].norms for rank in ranks)
    for rank in ranks[1:]:
        assert all(torch.equal(rank.parameters[name], p) for name, p in ranks[0].parameters.items())
    loss, weight = largest_differences(alone(case.grad_accum_steps, case.uneven), ranks[0])
    worst(f"loss a step, single against {case.strategy} on {world_size} ranks (fp32)", loss)
    worst(f"weights after 20 steps, single against {case.strategy} on {world_size} ranks (fp32)", weight)
    assert loss <= LOSS
    assert weight <= WEIGHTS


def test_the_runs_learn_and_clip() -> None:
    """Curves of models that don't move, and norms that are never clipped, would agree about nothing."""
    for accum, uneven in SHAPES:
        run = alone(accum, uneven)
        assert run.losses[-1] < run.losses[0] - 0.1
        assert max(run.norms) > 0.5


def test_accumulation_is_the_large_batch() -> None:
    """Three micro-batches and one batch of three times the rows are the same step."""
    for uneven in (False, True):
        assert largest_differences(alone(1, uneven), alone(3, uneven))[0] <= LOSS


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: "-".join(map(str, bug)))
def test_each_famous_bug_leaves_the_curve(bug: tuple[str, str, bool]) -> None:
    """A proof that a bug passes proves nothing. Each is ten times outside of the limit at least."""
    loss, _ = largest_differences(alone(3, bug[2]), with_bugs()[bug])
    assert loss > 10 * LOSS
