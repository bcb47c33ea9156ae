from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2course.masks import Causal, left_padded_positions, visible

Rule = Callable[[Tensor, Tensor, int | None, int], Tensor]


def assert_is_the_rule(rule: Rule, q: list[int], k: list[int], window: int | None, sinks: int = 0) -> None:
    """Compare with the rule in words, one pair at a time."""
    mask_TS = rule(torch.tensor(q), torch.tensor(k), window, sinks)
    assert mask_TS.dtype == torch.bool
    assert mask_TS.shape == (len(q), len(k))
    for t, q_pos in enumerate(q):
        for s, k_pos in enumerate(k):
            exists, past = k_pos >= 0, k_pos <= q_pos
            near = window is None or k_pos > q_pos - window or k_pos in range(sinks)
            assert mask_TS[t, s].item() == (exists and past and near), (q_pos, k_pos, window, sinks)


positions = st.lists(st.integers(-1, 12), min_size=1, max_size=8)


@given(q=positions, k=positions, window=st.none() | st.integers(1, 15), sinks=st.integers(0, 4))
def test_visible_is_the_rule(q: list[int], k: list[int], window: int | None, sinks: int) -> None:
    """Bug: any slip in the one rule that training, prefill and decoding share."""
    assert_is_the_rule(visible, q, k, window, sinks)


def _no_self(q: Tensor, k: Tensor, window: int | None, sinks: int) -> Tensor:
    return visible(q, k, window, sinks) & (k[..., None, :] < q[..., :, None])


def _one_too_many(q: Tensor, k: Tensor, window: int | None, sinks: int) -> Tensor:
    return visible(q, k, None if window is None else window + 1, sinks)


def _sees_padding(q: Tensor, k: Tensor, window: int | None, sinks: int) -> Tensor:
    return visible(q + 1, k + 1, window, sinks)


def _sees_the_next(q: Tensor, k: Tensor, window: int | None, sinks: int) -> Tensor:
    return visible(q + 1, k, None if window is None else window + 1, sinks)


def _a_sink_too_many(q: Tensor, k: Tensor, window: int | None, sinks: int) -> Tensor:
    return visible(q, k, window, sinks + 1)


def _sinks_from_the_future(q: Tensor, k: Tensor, window: int | None, sinks: int) -> Tensor:
    return visible(q, k, window) | ((k >= 0) & (k < sinks))


MUTANTS = [_no_self, _one_too_many, _sees_padding, _sees_the_next, _a_sink_too_many, _sinks_from_the_future]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_catches_the_usual_slips(mutant: Rule) -> None:
    """Bug: a check that passes a mask which is off by one, counts the window without the query, or sees padding."""
    with pytest.raises(AssertionError):
        assert_is_the_rule(mutant, [-1, 0, 1, 2, 3, 4, 5], [-1, 0, 1, 2, 3, 4, 5], 2, 2)


def test_a_window_counts_the_query_itself() -> None:
    """Bug: W keys before the query and itself, as FlashAttention's left=W means, W + 1 in all."""
    pos_T = torch.arange(6)
    assert visible(pos_T, pos_T, 3).sum(dim=1).tolist() == [1, 2, 3, 3, 3, 3]
    assert visible(pos_T, pos_T, 4).sum(dim=1).tolist() == [1, 2, 3, 4, 4, 4]


def test_sinks_stay_in_sight() -> None:
    """Bug: sinks are seen before they are there, count twice inside the window, or padding at -1 counts as one."""
    pos_T = torch.arange(6)
    assert visible(pos_T, pos_T, 2, 1).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]
    padded_T = torch.tensor([-1, -1, 0, 1, 2, 3])
    assert visible(padded_T, padded_T, 1, 2)[-1].tolist() == [False, False, True, True, False, True]


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (1, 0), (3, 0), (3, 2), (9, 1)])
def test_a_causal_mask_is_the_rule(window: int | None, sinks: int) -> None:
    """Bug: the mask that stands for itself is made by a second rule."""
    row = list(range(7))
    assert_is_the_rule(lambda q, k, window, sinks: Causal(window, sinks).mask(7), row, row, window, sinks)


def test_a_window_as_long_as_the_text_hides_nothing() -> None:
    """Bug: window >= T differs from full attention."""
    pos_T = torch.arange(6)
    assert torch.equal(visible(pos_T, pos_T, 6), visible(pos_T, pos_T))
    assert not torch.equal(visible(pos_T, pos_T, 5), visible(pos_T, pos_T))


def test_batches_keep_their_own_positions() -> None:
    """Bug: broadcasting mixes the rows of a batch."""
    q_BT, k_BS = torch.tensor([[3, 4], [0, 1]]), torch.tensor([[2, 3, 4], [-1, 0, 1]])
    mask_BTS = visible(q_BT, k_BS)
    for b in range(2):
        assert torch.equal(mask_BTS[b], visible(q_BT[b], k_BS[b]))


def test_left_padded_positions() -> None:
    """Bug: padding gets position 0, and is seen; or the first token does not get position 0."""
    assert left_padded_positions(torch.tensor([4, 2, 1]), 4).tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1], [-1, -1, -1, 0]]
