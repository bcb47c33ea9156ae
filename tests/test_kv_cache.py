"""Legend: B batch, T positions, S stored positions, V vocabulary."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2course import GPT, GPTConfig
from gpt2course.kv_cache import KVCache
from gpt2course.masks import left_padded_positions

T = 10
BASE = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=97)
Lively = Callable[..., GPT]


@st.composite
def compositions(draw: st.DrawFn, total: int = T) -> list[int]:
    """Any way to cut `total` tokens into chunks, order included: 2^(total - 1) of them."""
    cuts = [draw(st.booleans()) for _ in range(total - 1)]
    edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), total]
    return [b - a for a, b in pairwise(edges)]


@torch.no_grad()
def in_chunks(model: GPT, idx_BT: Tensor, chunks: list[int], pos_BT: Tensor | None = None) -> Tensor:
    cache = KVCache(model.config, idx_BT.shape[0], T, dtype=model.wte.weight.dtype)
    spans: Iterator[Tensor] = iter(torch.arange(T).split(chunks))
    logits = [model(idx_BT[:, s], pos_BT=None if pos_BT is None else pos_BT[:, s], cache=cache) for s in spans]
    return torch.cat(logits, dim=1)


def worst_error(model: GPT, chunks: list[int], lengths: list[int] | None = None) -> float:
    """Largest difference of a logit, on real tokens, between one pass without a cache and chunks with it."""
    generator = torch.Generator().manual_seed(1)
    idx_BT = torch.randint(0, 97, (2, T), generator=generator)
    pos_BT = None if lengths is None else left_padded_positions(torch.tensor(lengths), T)
    with torch.no_grad():
        whole = model(idx_BT, pos_BT=pos_BT)
    real = torch.ones(2, T, dtype=torch.bool) if pos_BT is None else pos_BT >= 0
    return (in_chunks(model, idx_BT, chunks, pos_BT) - whole)[real].abs().max().item()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(("G", "window"), [(4, None), (2, None), (1, 3), (4, 1), (2, 4)])
@given(chunks=compositions(), lengths=st.none() | st.tuples(st.integers(1, T), st.integers(1, T)))
def test_any_split_of_the_prompt_gives_the_same_logits(
    lively: Lively, backend: str, G: int, window: int | None, chunks: list[int], lengths: tuple[int, int] | None
) -> None:
    """Bug: a cache that changes the output: a chunk's mask is aligned to the wrong corner, positions start again at 0,
    a window is cut at the chunk instead of at the query, padding is seen."""
    config = BASE.with_(n_kv_head=G, window=window, attention_backend=backend)
    ragged = None if lengths is None else list(lengths)
    assert worst_error(lively(config), chunks, ragged) < 1e-12


@pytest.mark.parametrize("chunks", [[10], [1] * 10, [4, 6], [7, 1, 1, 1]])
@pytest.mark.parametrize(("G", "window"), [(4, None), (2, 3)])
def test_in_float32_too(lively: Lively, chunks: list[int], G: int, window: int | None) -> None:
    """Bug: exact in float64 only."""
    config = BASE.with_(n_kv_head=G, window=window)
    model = lively(config, torch.float32)
    assert worst_error(model, chunks) < 1e-5
    assert worst_error(model, chunks, [10, 4]) < 1e-5


def _forgets_positions(cache: KVCache, pos_BT: Tensor) -> Tensor:
    cache.length += pos_BT.shape[1]
    return torch.arange(cache.length).expand(pos_BT.shape[0], -1)


def _writes_one_late(cache: KVCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    start = min(cache.length - k.shape[2] + 1, cache.capacity - k.shape[2])
    cache.k_LBGSD[layer, :, :, start : start + k.shape[2]] = k
    cache.v_LBGSD[layer, :, :, start : start + k.shape[2]] = v
    return cache.k_LBGSD[layer, :, :, : cache.length], cache.v_LBGSD[layer, :, :, : cache.length]


def _shares_layers(cache: KVCache, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return STORE(cache, 0, k, v)


STORE = KVCache.store


@pytest.mark.parametrize(
    ("method", "mutant"),
    [("extend", _forgets_positions), ("store", _writes_one_late), ("store", _shares_layers)],
)
def test_the_check_catches_a_wrong_cache(
    lively: Lively, monkeypatch: pytest.MonkeyPatch, method: str, mutant: Callable[..., object]
) -> None:
    """Bug: padding seen, slots off by one, or one layer's keys read by another, and no test that fails."""
    model = lively(BASE)
    monkeypatch.setattr(KVCache, method, mutant)
    assert worst_error(model, [4, 3, 3], [10, 4]) > 1e-3


def test_positions_go_on_where_the_cache_ends(lively: Lively) -> None:
    """Bug: each chunk starts again at position 0; a decoder that feeds one token at a time never leaves it."""
    model = lively(BASE)
    idx_BT = torch.randint(0, 97, (2, T))
    with torch.no_grad():
        right = model(idx_BT)
        wrong = in_chunks(model, idx_BT, [1] * T, torch.zeros(2, T, dtype=torch.long))
    assert (in_chunks(model, idx_BT, [1] * T) - right).abs().max() < 1e-12
    assert (wrong - right).abs().max() > 1e-3


def test_overflow_is_an_error_that_changes_nothing() -> None:
    """Bug: the oldest or newest keys are overwritten in silence, or a refused chunk still takes its slots."""
    model = GPT(BASE).eval()
    cache = KVCache(BASE, batch_size=1, capacity=4)
    idx_BT = torch.randint(0, 97, (1, 3))
    with torch.no_grad():
        model(idx_BT, cache=cache)
        with pytest.raises(
            ValueError, match="holds 4 positions, 3 are used and 2 more do not fit; make it with a larger"
        ):
            model(idx_BT[:, :2], cache=cache)
        assert cache.length == 3
        assert cache.pos_BS.tolist() == [[0, 1, 2, -1]]
        again = model(idx_BT[:, :1], cache=cache)
        whole = model(torch.cat([idx_BT, idx_BT[:, :1]], dim=1))
    assert (again[:, 0] - whole[:, 3]).abs().max() < 1e-5


def test_past_the_position_table_is_an_error_that_changes_nothing() -> None:
    """Bug: the cache is longer than block_size, and the table is read past its end."""
    model = GPT(BASE).eval()
    cache = KVCache(BASE, capacity=20)
    with torch.no_grad():
        model(torch.zeros(1, 16, dtype=torch.long), cache=cache)
        with pytest.raises(ValueError, match="17 positions, but the learned table has block_size 16"):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    assert cache.length == 16


def test_a_refused_token_id_changes_nothing() -> None:
    """Bug: slots are taken for tokens that were then refused, and every later token stands at a wrong position."""
    model = GPT(BASE).eval()
    cache = KVCache(BASE, capacity=8)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long), cache=cache)
        with pytest.raises(ValueError, match="token id 97 is outside the vocabulary"):
            model(torch.full((1, 2), 97), cache=cache)
    assert cache.length == 3
    assert cache.pos_BS.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1]]


def test_wrong_sizes_are_refused() -> None:
    """Bug: a cache for one row is broadcast over a batch."""
    with pytest.raises(ValueError, match="made for a batch of 1, these are 2 rows"):
        GPT(BASE)(torch.zeros(2, 3, dtype=torch.long), cache=KVCache(BASE, batch_size=1))
    with pytest.raises(ValueError, match="capacity 0 and batch_size 1"):
        KVCache(BASE, capacity=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("G", [4, 1])
def test_nbytes_is_the_formula(dtype: torch.dtype, G: int) -> None:
    """Bug: GQA's cache is as large as plain attention's, since keys are copied before they are stored."""
    cache = KVCache(BASE.with_(n_kv_head=G), batch_size=3, capacity=7, dtype=dtype)
    n_layer, head_dim = 2, 8
    assert cache.nbytes == 2 * n_layer * 3 * G * 7 * head_dim * dtype.itemsize
    assert KVCache(BASE).capacity == BASE.block_size
