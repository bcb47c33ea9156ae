"""Legend: B batch, T positions."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from variants import BASE, FEW, name_of, seen

from gpt2course import GPT, PRESETS, GPTConfig
from gpt2course.flops import attention_flops, forward_flops, training_flops, visible_pairs
from gpt2course.masks import Causal


@pytest.mark.parametrize("T", [1, 2, 3, 7, 12, 33])
def test_visible_pairs_are_counted_by_the_mask(T: int) -> None:
    """Bug: the triangle at the start of a window is forgotten, sinks inside the window count twice, W = T is off."""
    assert visible_pairs(T) == int(Causal().mask(T).sum())
    for window in (1, 2, 3, 8, T, T + 1, 100):
        for sinks in (0, 1, 2, 5, T, 100):
            assert visible_pairs(T, window, sinks) == int(Causal(window, sinks).mask(T).sum()), (window, sinks)


@given(T=st.integers(0, 80), window=st.none() | st.integers(1, 90), sinks=st.integers(0, 90))
def test_visible_pairs_anywhere(T: int, window: int | None, sinks: int) -> None:
    """Bug: as above, where nobody looked."""
    assert visible_pairs(T, window, sinks if window else 0) == int(Causal(window, sinks).mask(T).sum())


def counted(config: GPTConfig, T: int, train: bool = False) -> int:
    """What torch counts in the matrix products of one pass, attention by hand: every query with all T keys."""
    model = GPT(config.with_(attention_backend="reference"))
    idx_BT = torch.zeros(1, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        logits_BTV = model(idx_BT)
        if train:
            logits_BTV.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", FEW, ids=name_of)
def test_the_forward_pass_is_what_torch_counts(config: GPTConfig) -> None:
    """Bug: a matrix is forgotten (the head, the projection), GQA's keys cost as much as plain ones, a pattern's long
    layers cost as little as its short ones.

    Torch counts all T x T pairs of a query and a key, seen or not: 4 D a pair, head and layer. We count those that are
    seen, so the difference is what the mask hides.
    """
    T = 12
    hidden = sum(T * T - int(seen(config, layer, T).sum()) for layer in range(config.n_layer))
    assert forward_flops(config, T) == counted(config, T) - 4 * config.n_head * config.head_dim * hidden


def test_training_is_three_forward_passes() -> None:
    """Bug: the backward pass counts once.

    It costs two products for each of the forward pass: the gradient of either factor. Torch counts both, also for the
    first layer, whose input is an embedding with a gradient of its own.
    """
    assert counted(BASE, 12, train=True) == 3 * counted(BASE, 12)
    assert training_flops(BASE, 12) == 3 * forward_flops(BASE, 12)


def test_gpt2_by_hand() -> None:
    """Bug: right for small shapes only. GPT-2's 123,532,032 numbers in matrices, head included, cost 2 a token."""
    config, T = PRESETS["gpt2"], 1024
    with torch.device("meta"):
        matrices = sum(p.numel() for name, p in GPT(config).named_parameters() if p.ndim == 2 and "wpe" not in name)
    assert matrices == 123_532_032
    assert forward_flops(config, T) == 2 * matrices * T + 12 * 12 * 4 * 64 * (1024 * 1025 // 2)


def test_a_window_costs_the_same_for_each_further_token() -> None:
    """Bug: the price of a window counted by T squared, so that longer texts seem to gain nothing."""
    config = PRESETS["gpt2"].with_(window=256)
    lengths = range(1024, 16_385, 1024)
    for changed in (config, config.with_(sinks=4)):
        costs = [forward_flops(changed, T) for T in lengths]
        assert len({b - a for a, b in pairwise(costs)}) == 1
    full = [attention_flops(12, 64, T) for T in (8192, 16_384)]
    short = [attention_flops(12, 64, T, 256) for T in (8192, 16_384)]
    assert full[1] / full[0] == pytest.approx(4, abs=1e-3)
    assert short[1] / short[0] == pytest.approx(2, abs=0.04)
