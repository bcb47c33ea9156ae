from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2course.masks import left_padded_positions, visible

Rule = Callable[[Tensor, Tensor, int | None], Tensor]


def assert_is_the_rule(rule: Rule, q: list[int], k: list[int], window: int | None) -> None:
    """Compare with the rule in words, one pair at a time."""
    mask_TS = rule(torch.tensor(q), torch.tensor(k), window)
    assert mask_TS.dtype == torch.bool
    assert mask_TS.shape == (len(q), len(k))
    for t, q_pos in enumerate(q):
        for s, k_pos in enumerate(k):
            exists, past = k_pos >= 0, k_pos <= q_pos
            near = window is None or k_pos > q_pos - window
            assert mask_TS[t, s].item() == (exists and past and near), (q_pos, k_pos, window)


positions = st.lists(st.integers(-1, 12), min_size=1, max_size=8)


@given(q=positions, k=positions, window=st.none() | st.integers(1, 15))
def test_visible_is_the_rule(q: list[int], k: list[int], window: int | None) -> None:
    """Bug: any slip in the one rule that training, prefill and decoding share."""
    assert_is_the_rule(visible, q, k, window)


def _no_self(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    return visible(q, k, window) & (k[..., None, :] < q[..., :, None])


def _one_too_many(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    return visible(q, k, None if window is None else window + 1)


def _sees_padding(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    return visible(q + 1, k + 1, window)


def _sees_the_next(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    return visible(q + 1, k, None if window is None else window + 1)


@pytest.mark.parametrize("mutant", [_no_self, _one_too_many, _sees_padding, _sees_the_next])
def test_the_check_catches_the_usual_slips(mutant: Rule) -> None:
    """Bug: a check that passes a mask which is off by one, counts the window without the query, or sees padding."""
    with pytest.raises(AssertionError):
        assert_is_the_rule(mutant, [-1, 0, 1, 2, 3, 4], [-1, 0, 1, 2, 3, 4], 2)


def test_a_window_counts_the_query_itself() -> None:
    """Bug: W keys before the query and itself, as FlashAttention's left=W means, W + 1 in all."""
    pos_T = torch.arange(6)
    assert visible(pos_T, pos_T, 3).sum(dim=1).tolist() == [1, 2, 3, 3, 3, 3]
    assert visible(pos_T, pos_T, 4).sum(dim=1).tolist() == [1, 2, 3, 4, 4, 4]


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
