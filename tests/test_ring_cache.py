"""The ring of layers with a window: its slots, its memory, and texts far longer than it.

Legend: B batch, T positions, G key/value heads, N slots, D head width.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from variants import BASE, FEW, POSITIONS, assert_memory_is_constant, name_of, token_ids

from gpt2course import GPT, GPTConfig
from gpt2course.generate import GenerateOptions, generate, stream
from gpt2course.kv_cache import KVCache, cache_bytes
from gpt2course.masks import left_padded_positions

Lively = Callable[..., GPT]
ONE = GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=8, vocab_size=5)
PROMPTS = [[5, 9, 2, 44], [7], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39], [1, 2]]


def feed(cache: KVCache, pos_BT: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
    """Stores positions as keys and their negatives as values, so that each slot tells what it holds."""
    cache.extend(pos_BT, plain)
    numbers = pos_BT[:, None, :, None].expand(-1, 1, -1, 2).double()
    return cache.store(0, numbers, -numbers)


class Plain:
    """The ring in words: a list of the positions of one row, thrown away when nobody can see them any more."""

    def __init__(self, window: int, sinks: int) -> None:
        self.window, self.sinks, self.held = window, sinks, []

    def feed(self, positions: list[int]) -> None:
        self.held += [p for p in positions if p >= 0]
        self.held = self.held[: self.sinks] + self.held[self.sinks :][-self.window :]


@given(
    window=st.integers(1, 7),
    sinks=st.integers(0, 4),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    chunks=st.lists(st.integers(1, 12), max_size=14),
    own=st.booleans(),
)
def test_a_ring_holds_the_last_positions_and_the_sinks(
    window: int, sinks: int, lengths: list[int], chunks: list[int], own: bool
) -> None:
    """Bug: a key overwritten that is still in sight, one kept that is not, a sink overwritten at the wrap, a value that
    does not follow its key."""
    config = ONE.with_(window=window, sinks=sinks)
    cache = KVCache(config, len(lengths), dtype=torch.float64)
    rows = [Plain(window, sinks) for _ in lengths]
    pos_BT = left_padded_positions(torch.tensor(lengths), max(lengths))
    padded = min(lengths) < max(lengths)
    for step, T in enumerate([0, *chunks]):
        pos_BT = cache.next_positions(T) if step else pos_BT
        before = [list(row.held) for row in rows]
        keys, values = feed(cache, pos_BT, plain=own and not padded)
        given_BS = cache.key_positions(0)
        assert torch.equal(values, -keys)
        for b, row in enumerate(rows):
            new = pos_BT[b][pos_BT[b] >= 0].tolist()
            row.feed(new)
            ring = cache._slots[window]
            assert ring.pos_BN.shape == (len(lengths), window + sinks)
            assert sorted(p for p in ring.pos_BN[b].tolist() if p >= 0) == row.held
            filled = ring.pos_BN[b] >= 0
            assert torch.equal(cache.k[0][b, 0, filled, 0], ring.pos_BN[b, filled].double())
            assert torch.equal(cache.v[0], -cache.k[0])
            # What the pass may look at: all that a new query sees, each once, and the key that says where it is.
            real = given_BS[b] >= 0
            offered = given_BS[b][real].tolist()
            assert torch.equal(keys[b, 0, real, 0], given_BS[b, real].double())
            assert len(set(offered)) == len(offered)
            needed = {p for p in before[b] if any(q - p < window or p < sinks for q in new)} | set(new)
            assert needed <= set(offered) <= {*before[b], *new}


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_memory_stays_as_it_is_for_thousands_of_tokens(lively: Lively, sinks: int, padded: bool) -> None:
    """Bug: a cache that is never trimmed, or that is made anew, a little larger, for every token."""
    model = lively(BASE.with_(pos="rope", n_kv_head=1, window=16, sinks=sinks), torch.float32)
    assert_memory_is_constant(model, 2500, lengths=(500, 3) if padded else None)


@pytest.mark.parametrize("config", [c for c in FEW if c.window], ids=name_of)
@torch.no_grad()
def test_far_from_the_start_too(lively: Lively, config: GPTConfig) -> None:
    """Bug: right on the first lap of the ring and wrong on the tenth."""
    config = config.with_(block_size=100)
    model = lively(config)
    idx_BT = token_ids(config, 2, 90)
    pos_BT = left_padded_positions(torch.tensor([40, 31]), 40)
    whole = torch.cat([pos_BT, pos_BT[:, -1:] + torch.arange(1, 51)], dim=1)
    wanted = {None: model(idx_BT), 40: model(idx_BT, pos_BT=whole)}
    for first, wanted_BTV in wanted.items():
        cache = KVCache(config, 2, 90, dtype=torch.float64)
        logits = [model(idx_BT[:, :40], pos_BT=None if first is None else pos_BT, cache=cache)]
        for t in range(40, 90):
            logits.append(model(idx_BT[:, t : t + 1], cache=cache))
        real_BT = whole >= 0
        assert (torch.cat(logits, dim=1) - wanted_BTV)[real_BT].abs().max() < 1e-12


def ids(model: GPT, prompts: list[list[int]], n: int, **changes: Any) -> list[list[int]]:
    options = GenerateOptions(**{"max_new_tokens": n, "temperature": 0, "stop_at_eot": False, **changes})
    return [c.token_ids for c in generate(model, prompts, options)]


@pytest.mark.parametrize("config", [c for c in FEW if c.pos == "rope"], ids=name_of)
def test_generation_goes_on_past_block_size(lively: Lively, config: GPTConfig) -> None:
    """Bug: with rotary positions text past block_size needs no table; it is refused, forgotten, or other than without a
    cache, alone or in a batch."""
    model = lively(config)
    n = 3 * config.block_size
    together = ids(model, PROMPTS, n)
    assert [len(row) for row in together] == [n] * len(PROMPTS)
    assert together == ids(model, PROMPTS, n, use_cache=False)
    assert ids(model, PROMPTS[1:2], n) == together[1:2]
    assert "".join(stream(model, PROMPTS[1], GenerateOptions(max_new_tokens=30, temperature=0, stop_at_eot=False)))


def test_the_ring_is_what_generation_keeps(lively: Lively, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: generation with a window makes a cache as long as the text."""
    made: list[KVCache] = []

    def spy(*args: Any) -> KVCache:
        made.append(KVCache(*args))
        return made[-1]

    monkeypatch.setattr("gpt2course.generate.KVCache", spy)
    config = BASE.with_(pos="rope", window=4, sinks=1)
    ids(lively(config, torch.bfloat16), PROMPTS, 60)
    assert [cache.nbytes for cache in made] == [cache_bytes(config, len(PROMPTS), bytes_per_number=2)]
    assert made[0].length == 10 + 60 - 1


@pytest.mark.parametrize("window", [None, 3])
def test_a_learned_table_refuses_and_says_why(lively: Lively, window: int | None) -> None:
    """Bug: a window of 3 keys is thought to make a table of 24 rows endless."""
    model = lively(BASE.with_(window=window))
    assert len(ids(model, PROMPTS, 15)[2]) == 15  # 10 + 15 - 1 = 24
    with pytest.raises(ValueError, match=r"25 positions are needed .* block_size is 24: the learned table has no row"):
        ids(model, PROMPTS, 16)
    with pytest.raises(ValueError, match=r"25 positions, but the learned table has block_size 24 rows .* pos='rope'"):
        model(torch.zeros(1, 25, dtype=torch.long))
    cache = KVCache(model.config, dtype=torch.float64)
    one = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(24):
            model(one, cache=cache)
        with pytest.raises(ValueError, match=r"25 positions, but the learned table"):
            model(one, cache=cache)
    assert cache.length == 24


@pytest.mark.parametrize("config", FEW, ids=name_of)
def test_a_sliding_context_works_for_every_variant(lively: Lively, config: GPTConfig) -> None:
    """Bug: after a slide a ring keeps keys of the forgotten text, or of other positions."""
    model = lively(config)
    found = ids(model, PROMPTS, 60, context="slide")
    assert found == ids(model, PROMPTS, 60, context="slide", use_cache=False)
    assert len(found[0]) == 60


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_window_forgets_what_is_out_of_its_reach(lively: Lively, sinks: int, pos: str) -> None:
    """Bug: old keys stay visible after a prompt longer than the window, and what is said depends on its first words."""
    config = BASE.with_(n_layer=1, window=4, sinks=sinks, pos=pos)
    model = lively(config)
    prompt, other = [3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 4, 50, 51, 52, 8, 9, 10, 11]
    assert ids(model, [prompt], 8) == ids(model, [other], 8)
    assert ids(lively(config.with_(window=None, sinks=0)), [prompt], 8) != ids(
        lively(config.with_(window=None, sinks=0)), [other], 8
    )


def test_a_cache_filled_in_one_mode_goes_on_in_another() -> None:
    """Bug: the ring's positions are made anew under inference_mode, and can't be written outside of it."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=11, pos="rope", window=3)
    model, cache = GPT(config).eval(), KVCache(config)
    idx_BT = torch.randint(0, 11, (1, 7))
    with torch.inference_mode():
        model(idx_BT[:, :5], cache=cache)
    with torch.no_grad():
        later = model(idx_BT[:, 5:6], cache=cache), model(idx_BT[:, 6:], cache=cache)
        assert (torch.cat(later, dim=1) - model(idx_BT)[:, 5:]).abs().max() < 1e-5


def test_an_empty_chunk_after_padding_is_no_error() -> None:
    """Bug: the largest of no positions is asked for."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=11)
    model, cache = GPT(config).eval(), KVCache(config, 2)
    idx_BT = torch.randint(0, 11, (2, 5))
    pos_BT = left_padded_positions(torch.tensor([4, 2]), 4)
    with torch.no_grad():
        model(idx_BT[:, :4], pos_BT=pos_BT, cache=cache)
        assert model(idx_BT[:, :0], cache=cache).shape == (2, 0, 11)
        assert model(idx_BT[:, 4:], cache=cache).shape == (2, 1, 11)
