"""The harness itself: processes that really meet, and errors that really arrive."""

import pytest

from gpt2course.train.world import World
from tests.distributed.ranks import run_ranks


def add_up(world: World, extra: int) -> list[float]:
    return world.sum(world.rank + extra, 1.0)


def fail_on_one(world: World) -> None:
    if world.rank == 1:
        raise RuntimeError("rank 1 had enough")


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_gets_the_same_sum(world_size: int) -> None:
    """A rank that talks to itself only would get its own number back."""
    expected = [sum(rank + 10 for rank in range(world_size)), world_size]
    assert run_ranks(add_up, world_size, 10) == [expected] * world_size


@pytest.mark.distributed
def test_an_error_on_one_rank_fails_the_test_with_its_traceback() -> None:
    """A harness that swallowed it would pass every test."""
    with pytest.raises(AssertionError, match="rank 1 had enough"):
        run_ranks(fail_on_one, 2)
