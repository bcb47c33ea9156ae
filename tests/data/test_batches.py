"""The one batch rule: the global batch of step s is a pure function of (seed, s)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2course.data import Batches, TokenStream
from gpt2course.data.batches import _epoch_order

FIRST_STEP = [18, 4, 21, 10, 11, 2]
EIGHTH_STEP = [21, 6, 8, 12, 2, 5]


def stream_of(length: int) -> TokenStream:
    """A stream whose tokens are their own places, in three parts."""
    return TokenStream(np.array_split(np.arange(length, dtype=np.uint16), 3))


def batches(length: int = 200, B: int = 6, T: int = 8, seed: int = 0) -> Batches:
    return Batches(stream_of(length), batch_size=B, block_size=T, seed=seed)


def test_targets_are_one_ahead() -> None:
    """Targets equal to inputs: the loss falls to zero and the model has learned to copy."""
    x_BT, y_BT = batches().batch(0)
    assert x_BT.shape == y_BT.shape == (6, 8)
    assert x_BT.dtype == y_BT.dtype == torch.int64
    assert torch.equal(y_BT, x_BT + 1)
    assert torch.equal(x_BT[:, 1:], x_BT[:, :-1] + 1)


def test_batch_is_a_pure_function_of_seed_and_step() -> None:
    """A batch that depends on which batches were read before, so that a resumed run reads others."""
    forward = [batches().batch(step) for step in range(20)]
    one = batches()
    for step in reversed(range(20)):
        for new, old in zip(one.batch(step), forward[step], strict=True):
            assert torch.equal(new, old)


def test_batch_does_not_depend_on_global_random_state() -> None:
    """Data order that changes with dropout, or with one more random number drawn elsewhere."""
    first = batches().window_ids(5)
    np.random.seed(123)
    torch.manual_seed(123)
    _epoch_order.cache_clear()
    assert batches().window_ids(5) == first


def test_seeds_give_other_orders() -> None:
    """A seed that nothing reads."""
    assert batches(seed=0).window_ids(0) != batches(seed=1).window_ids(0)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 40))
def test_ranks_cut_the_same_batch(B: int, world_size: int, step: int) -> None:
    """A run on more ranks that trains on other rows, or on some rows twice; B need not be a multiple."""
    whole = batches(B=B)
    x_BT, y_BT = whole.batch(step)
    parts = [whole.batch(step, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([x for x, _ in parts]), x_BT)
    assert torch.equal(torch.cat([y for _, y in parts]), y_BT)
    sizes = [len(x) for x, _ in parts]
    assert max(sizes) - min(sizes) <= 1


def test_rank_without_rows_gets_an_empty_batch() -> None:
    """More ranks than rows, and a crash on one of them while the others wait."""
    shapes = [tuple(batches(B=2).batch(0, rank, 3)[0].shape) for rank in range(3)]
    assert sorted(shapes) == [(0, 8), (1, 8), (1, 8)]


@given(st.integers(10, 120), st.integers(1, 7), st.integers(1, 9))
def test_an_epoch_reads_each_window_once(length: int, B: int, T: int) -> None:
    """Windows read twice or never, also where an epoch ends in the middle of a batch."""
    whole = batches(length, B, T)
    n = whole.n_windows
    assert n == (length - 1) // T
    ids = [w for step in range(-(-3 * n // B)) for w in whole.window_ids(step)]
    for epoch in range(3):
        assert sorted(ids[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_every_token_but_the_first_is_a_target_once() -> None:
    """Windows of T + 1 that do not overlap, which never train on one token in T + 1."""
    whole = batches(length=8 * 12 + 1, B=12, T=8)
    _, y_BT = whole.batch(0)
    assert sorted(y_BT.flatten().tolist()) == list(range(1, 8 * 12 + 1))


def test_epochs_have_orders_of_their_own() -> None:
    """The same order in each epoch."""
    whole = batches(B=1)
    epochs = [[whole.window_ids(e * whole.n_windows + i)[0] for i in range(whole.n_windows)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


def test_resume_needs_one_integer() -> None:
    """A resumed run that starts its data over."""
    unbroken = [batches().batch(step)[0] for step in range(10)]
    resumed = [batches().batch(step)[0] for step in range(6, 10)]
    assert all(torch.equal(a, b) for a, b in zip(unbroken[6:], resumed, strict=True))
    assert not torch.equal(unbroken[0], unbroken[6])


def test_order_is_fixed_for_good() -> None:
    """A change that gives every old run other data: these windows are written down."""
    assert batches().window_ids(0) == FIRST_STEP
    assert batches().window_ids(7) == EIGHTH_STEP


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"B": 0}, "batch_size 0 and block_size 8 must each be at least 1"),
        ({"T": 0}, "batch_size 6 and block_size 0 must"),
        ({"length": 8}, r"8 tokens are too few for one window of block_size 8 \+ 1"),
        ({"length": 0}, "0 tokens are too few"),
    ],
)
def test_bad_sizes_are_told(sizes: dict[str, int], message: str) -> None:
    """A division by zero at step 0 in place of a word about the data."""
    with pytest.raises(ValueError, match=message):
        batches(**sizes)


@pytest.mark.parametrize(("step", "rank", "world_size"), [(0, 2, 2), (0, -1, 2), (-1, 0, 1), (0, 0, 0)])
def test_bad_ranks_are_told(step: int, rank: int, world_size: int) -> None:
    """A rank that reads rows of nobody, or Python's -1."""
    with pytest.raises(ValueError, match=rf"rank {rank} of world_size {world_size} at step {step}; need"):
        batches().batch(step, rank, world_size)
