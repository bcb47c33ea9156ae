"""The cache of layers that keep every position, and what rings share with it; test_ring_cache.py has the rest.

Legend: B batch, T positions, G key/value heads, N slots, D head width.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from variants import BASE, FEW, VARIANTS, assert_cache_changes_nothing, name_of

from gpt2course import GPT, GPTConfig
from gpt2course.kv_cache import KVCache, cache_bytes, layer_slots

SMALL = BASE.with_(block_size=16)
MIXED = SMALL.with_(window=3, window_pattern="SL")
Lively = Callable[..., GPT]


def _forgets_padding(cache: KVCache, pos_BT: Tensor, plain: bool = False) -> None:
    EXTEND(cache, torch.arange(cache.length, cache.length + pos_BT.shape[1]).expand(pos_BT.shape), plain)


def _writes_one_late(cache: KVCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = STORE(cache, layer, k, v)
    return keys.roll(1, dims=2), values.roll(1, dims=2)


def _shares_layers(cache: KVCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return STORE(cache, 0, k, v)


EXTEND, STORE = KVCache.extend, KVCache.store


@pytest.mark.parametrize(
    ("method", "mutant"),
    [("extend", _forgets_padding), ("store", _writes_one_late), ("store", _shares_layers)],
)
def test_the_check_catches_a_wrong_cache(
    lively: Lively, monkeypatch: pytest.MonkeyPatch, method: str, mutant: Callable[..., object]
) -> None:
    """Bug: padding seen, slots off by one, or one layer's keys read by another, and no test that fails."""
    model = lively(BASE)
    assert_cache_changes_nothing(model, [4, 3, 3], [10, 4])
    monkeypatch.setattr(KVCache, method, mutant)
    with pytest.raises(AssertionError, match="chunks"):
        assert_cache_changes_nothing(model, [4, 3, 3], [10, 4])


def contents(cache: KVCache) -> list[Tensor]:
    """Everything a refused pass must leave alone."""
    positions = [slots.pos_BN for slots in cache._slots.values()]
    return [x.clone() for x in (*cache.k, *cache.v, *positions, torch.tensor(cache.length))]


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=name_of)
def test_overflow_is_an_error_that_changes_nothing(lively: Lively, config: GPTConfig) -> None:
    """Bug: the oldest or newest keys are overwritten in silence, or a refused chunk still takes its slots."""
    model = lively(config)
    cache = KVCache(config, batch_size=1, capacity=4, dtype=torch.float64)
    idx_BT = torch.randint(0, 53, (1, 3))
    with torch.no_grad():
        model(idx_BT, cache=cache)
        before = contents(cache)
        with pytest.raises(
            ValueError, match="holds 4 positions, 3 are used and 2 more do not fit; make it with a larger"
        ):
            model(idx_BT[:, :2], cache=cache)
        assert all(map(torch.equal, before, contents(cache)))
        again = model(idx_BT[:, :1], cache=cache)
        whole = model(torch.cat([idx_BT, idx_BT[:, :1]], dim=1))
    assert (again[:, 0] - whole[:, 3]).abs().max() < 1e-12


@pytest.mark.parametrize("config", [SMALL, MIXED, SMALL.with_(window=3)], ids=name_of)
def test_past_the_position_table_is_an_error_that_changes_nothing(lively: Lively, config: GPTConfig) -> None:
    """Bug: the cache is longer than block_size, or a ring that never fills up, and the table is read past its end."""
    model = lively(config)
    cache = KVCache(config, capacity=20, dtype=torch.float64)
    with torch.no_grad():
        model(torch.zeros(1, 16, dtype=torch.long), cache=cache)
        before = contents(cache)
        with pytest.raises(ValueError, match="17 positions, but the learned table has block_size 16"):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    assert all(map(torch.equal, before, contents(cache)))


@pytest.mark.parametrize("config", [SMALL, MIXED], ids=name_of)
def test_a_refused_token_id_changes_nothing(lively: Lively, config: GPTConfig) -> None:
    """Bug: slots are taken for tokens that were then refused, and every later token stands at a wrong position."""
    model = lively(config)
    cache = KVCache(config, capacity=8, dtype=torch.float64)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long), cache=cache)
        before = contents(cache)
        with pytest.raises(ValueError, match="token id 53 is outside the vocabulary"):
            model(torch.full((1, 2), 53), cache=cache)
    assert all(map(torch.equal, before, contents(cache)))


@pytest.mark.parametrize("config", FEW, ids=name_of)
@pytest.mark.parametrize("given_positions", [False, True])
@pytest.mark.parametrize(("made_for", "rows"), [(1, 2), (2, 1), (3, 2)])
def test_a_cache_of_another_batch_is_refused(
    config: GPTConfig, made_for: int, rows: int, given_positions: bool
) -> None:
    """Bug: a cache for one row is broadcast over a batch, or fails as "expanded size of the tensor" deep inside."""
    idx_BT = torch.zeros(rows, 3, dtype=torch.long)
    pos_BT = torch.arange(3).expand(rows, 3) if given_positions else None
    cache = KVCache(config, batch_size=made_for)
    with pytest.raises(ValueError, match=f"made for a batch of {made_for}, these are {rows} rows"):
        GPT(config)(idx_BT, pos_BT=pos_BT, cache=cache)
    assert cache.length == 0


def test_no_room_at_all_is_refused() -> None:
    """Bug: an empty cache that fails at its first token."""
    with pytest.raises(ValueError, match="capacity 0 and batch_size 1"):
        KVCache(SMALL, capacity=0)
    with pytest.raises(ValueError, match="capacity 16 and batch_size 0"):
        KVCache(SMALL, batch_size=0)


@pytest.mark.parametrize("config", VARIANTS, ids=name_of)
def test_bytes_are_the_formula(config: GPTConfig) -> None:
    """Bug: GQA's cache is as large as plain attention's, as keys are copied before they are stored; a ring that keeps
    the whole text, or forgets to count its sinks; float32 under a bfloat16 model."""
    B, capacity = 3, 100
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(config, B, capacity, dtype=dtype)
        slots = 0
        for layer in range(config.n_layer):
            windowed = config.window is not None and config.window_pattern[layer % len(config.window_pattern)] == "S"
            slots += config.window + config.sinks if windowed else capacity
        wanted = 2 * B * config.n_kv_head * (32 // 4) * slots * dtype.itemsize
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (*cache.k, *cache.v)}
        assert cache.nbytes == cache_bytes(config, B, capacity, dtype.itemsize) == sum(held.values()) == wanted
        assert all(x.dtype == dtype for x in (*cache.k, *cache.v))


def test_without_a_capacity_it_is_block_size() -> None:
    """Bug: a default that differs between the cache and its formula."""
    assert KVCache(SMALL).capacity == 16
    assert KVCache(MIXED).nbytes == cache_bytes(MIXED)
    assert [layer_slots(MIXED, layer) for layer in range(2)] == [3, 16]


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), steps=st.lists(st.integers(1, 3), max_size=4))
def test_each_row_goes_on_from_its_own_end(lengths: list[int], steps: list[int]) -> None:
    """Bug: after a padded prompt every row goes on from the longest one's end."""
    width = max(lengths)
    cache = KVCache(MIXED, len(lengths), 64)
    assert cache.next_positions(2).tolist() == [[0, 1]] * len(lengths)
    cache.extend(torch.tensor([[max(-1, t - (width - n)) for t in range(width)] for n in lengths]))
    ends = list(lengths)
    for n in steps:
        assert cache.next_positions(n).tolist() == [list(range(end, end + n)) for end in ends]
        cache.extend(cache.next_positions(n))
        ends = [end + n for end in ends]
    assert cache.length == width + sum(steps)


@pytest.mark.parametrize("config", FEW, ids=name_of)
def test_a_pass_of_no_tokens_changes_nothing(lively: Lively, config: GPTConfig) -> None:
    """Bug: after an empty chunk, such as the end of a prompt that divides evenly, the cache has lost its place."""
    assert_cache_changes_nothing(lively(config), [0, 5, 0, 1, 0])


def test_a_cache_without_padding_is_plain_until_positions_are_given(lively: Lively) -> None:
    """Bug: padding once, then a pass that takes the short way of rows without any."""
    model, idx_BT = lively(MIXED), torch.zeros(1, 2, dtype=torch.long)
    cache = KVCache(MIXED, dtype=torch.float64)
    flags = []
    with torch.no_grad():
        for pos_BT in (None, None, torch.tensor([[4, 5]]), None):
            model(idx_BT, pos_BT=pos_BT, cache=cache)
            flags.append(cache.plain)
    assert flags == [True, True, False, False]
