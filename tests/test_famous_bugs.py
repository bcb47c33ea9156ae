"""The famous bugs of attention, positions and caches, planted one by one. The check named beside each must find it.

A check passes on the code as it is, then the bug is planted, and the same check must fail.
Legend: B batch, T positions, S key positions, G key/value heads, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_attention import assert_is_the_definition
from test_masks import assert_is_the_rule
from torch import Tensor
from variants import (
    BASE,
    T,
    assert_cache_changes_nothing,
    assert_is_plain_attention_with_copied_keys,
    assert_memory_is_constant,
    assert_only_distance_counts,
    assert_sees_what_it_should,
)

from gpt2course import GPT, GPTConfig, attention, kv_cache, masks
from gpt2course.attention import CAUSAL, Attention, attend
from gpt2course.kv_cache import KVCache
from gpt2course.masks import Causal, visible
from gpt2course.rope import Rotation, angles, rotate

Patch = pytest.MonkeyPatch
FUSED, BLOCKED, FORWARD = F.scaled_dot_product_attention, attention.blocked_attention, Attention.forward
ROPE = BASE.with_(pos="rope")
WINDOW = BASE.with_(window=3)
RING = ROPE.with_(window=3, n_kv_head=2)
SINKS = RING.with_(sinks=2)


@dataclass(frozen=True)
class Bug:
    plant: Callable[[Patch], object]
    check: Callable[[GPT], object]
    config: GPTConfig
    dtype: torch.dtype = torch.float64


def _repeat(patch: Patch) -> None:
    """Query head h reads key head h mod G. The shapes agree, and with G = 1 or G = H the numbers do too."""
    patch.setattr(Tensor, "repeat_interleave", lambda x, n, dim: x.repeat(1, n, 1, 1))


def _repeat_before_the_kernel(patch: Patch) -> None:
    def fused(q: Tensor, k: Tensor, v: Tensor, *args: Any, enable_gqa: bool = False, **named: Any) -> Tensor:
        n = q.shape[1] // k.shape[1]
        return FUSED(q, k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1), *args, **named)

    patch.setattr(F, "scaled_dot_product_attention", fused)


def _one_key_too_many(patch: Patch) -> None:
    """The window counts the keys before the query, as FlashAttention's left=W does: W + 1 with its own."""

    def wider(q: Tensor, k: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
        return visible(q, k, None if window is None else window + 1, sinks)

    patch.setattr(masks, "visible", wider)
    patch.setattr("gpt2course.model.visible", wider)
    patch.setattr("test_masks.visible", wider)


def _one_key_too_many_in_blocks(patch: Patch) -> None:
    patch.setattr(attention, "blocked_attention", lambda q, k, v, window, *rest: BLOCKED(q, k, v, window + 1, *rest))


def _prefill_past_the_window_forgets_the_future(patch: Patch) -> None:
    """A prompt that fits the window is masked by the causal kernel; a longer one by the band's lower edge alone."""

    def band(mask: Causal, T: int, device: Any = None) -> Tensor:
        pos_T = torch.arange(T, device=device)
        if mask.window is None or mask.window >= T:
            return visible(pos_T, pos_T)
        return pos_T[:, None] - pos_T < mask.window

    patch.setattr(Causal, "mask", band)


def _a_chunk_past_the_window_forgets_the_future(patch: Patch) -> None:
    """The same after a cached past: the ring holds only what a window allows, so no mask is thought to be needed."""
    make = GPT._mask

    def without(model: GPT, pos_BT: Tensor, k_pos_BS: Tensor, window: int | None, plain: bool, past: int) -> Any:
        if window is not None and past and pos_BT.shape[1] > window:
            return None
        return make(model, pos_BT, k_pos_BS, window, plain, past)

    patch.setattr(GPT, "_mask", without)


def _write_before_looking(patch: Patch) -> None:
    """The ring takes the whole chunk before its first query has looked: keys still in sight are overwritten."""
    extend, store = kv_cache._Ring.extend, kv_cache._Ring.store

    def extend_and_forget(ring: Any, *args: Any) -> None:
        extend(ring, *args)
        ring.seen_BS = ring.seen_BS if ring.first else ring.pos_BN

    def store_and_forget(ring: Any, kept_BGND: Tensor, new_BGTD: Tensor) -> Tensor:
        found_BGSD = store(ring, kept_BGND, new_BGTD)
        return found_BGSD if ring.first else kept_BGND

    patch.setattr(kv_cache._Ring, "extend", extend_and_forget)
    patch.setattr(kv_cache._Ring, "store", store_and_forget)


def _turned_at_read(positions: Callable[[KVCache, int], Tensor]) -> Callable[[Patch], None]:
    """Keys are cached as they are, and turned whenever they are read, to the positions that are given."""

    def forward(
        self: Attention,
        x_BTC: Tensor,
        mask: attention.Mask = CAUSAL,
        rotation: Rotation | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        if cache is None or rotation is None:
            return FORWARD(self, x_BTC, mask, rotation, cache)
        q_BHTD, k_BGTD, v_BGTD = self.qkv(x_BTC)
        k_BGSD, v_BGSD = cache.store(self.layer, k_BGTD, v_BGTD)
        turn = angles(positions(cache, self.layer)[:, None], self.config, x_BTC.dtype)
        k_BGSD = rotate(k_BGSD, turn.cos, turn.sin, turn.layout)
        q_BHTD = rotate(q_BHTD, rotation.cos, rotation.sin, rotation.layout)
        return self.c_proj(attend(q_BHTD, k_BGSD, v_BGSD, mask).transpose(1, 2).reshape(x_BTC.shape))

    return lambda patch: patch.setattr(Attention, "forward", forward)


def _slot_numbers(cache: KVCache, layer: int) -> Tensor:
    return torch.arange(cache.key_positions(layer).shape[1])[None]


_turned_by_slot = _turned_at_read(_slot_numbers)


def _new_keys_from_zero(patch: Patch) -> None:
    """Queries are turned to where they are, the new keys as if each chunk were a text of its own."""

    def rotated_qkv(self: Attention, x_BTC: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x_BTC)
        assert rotation is not None
        start = angles(torch.arange(x_BTC.shape[1]), self.config, x_BTC.dtype)
        return rotate(q, rotation.cos, rotation.sin), rotate(k, start.cos, start.sin), v

    patch.setattr(Attention, "rotated_qkv", rotated_qkv)


def _decode_at_zero(patch: Patch) -> None:
    """Every pass starts again at position 0; a decoder that feeds one token at a time never leaves it."""
    patch.setattr(KVCache, "next_positions", lambda cache, T: torch.arange(T).expand(cache.k[0].shape[0], T))


def _angles_in_bfloat16(patch: Patch) -> None:
    """A model in bfloat16 makes its angles in bfloat16, whose numbers lie 32 apart at position 8,000."""

    def rough(pos: Tensor, config: GPTConfig, dtype: torch.dtype) -> Rotation:
        steps = angles(torch.ones(1), config).cos.acos().to(torch.bfloat16)
        turned = pos[..., None].to(torch.bfloat16) * steps
        return Rotation(turned.cos().to(dtype), turned.sin().to(dtype), config.rope_layout)

    patch.setattr("gpt2course.model.angles", rough)


def _cos_and_sin_in_bfloat16(patch: Patch) -> None:
    """Exact angles, but cos and sin are rounded to the model's dtype."""

    def rounded(pos: Tensor, config: GPTConfig, dtype: torch.dtype) -> Rotation:
        exact = angles(pos, config, dtype)
        return Rotation(*(x.to(torch.bfloat16).to(dtype) for x in (exact.cos, exact.sin)), exact.layout)

    patch.setattr("gpt2course.model.angles", rounded)


class _Untrimmed(KVCache):
    """Keeps every key, and, as decoding needs no mask where a ring is right, shows every key."""

    def extend(self, pos_BT: Tensor, plain: bool = False) -> None:
        past = self.length
        super().extend(pos_BT, plain)
        self.all_BS = torch.cat([self.all_BS, pos_BT], dim=1) if past else pos_BT

    def key_positions(self, layer: int) -> Tensor:
        return self.all_BS

    def store(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        for held, new_BGTD in ((self.k, k_BGTD), (self.v, v_BGTD)):
            first = self.length == new_BGTD.shape[2]
            held[layer] = new_BGTD if first else torch.cat([held[layer], new_BGTD], dim=2)
        return self.k[layer], self.v[layer]


def _never_trimmed(patch: Patch) -> None:
    patch.setattr("variants.KVCache", _Untrimmed)


def _sinks_in_the_ring(patch: Patch) -> None:
    """The sinks have no slots of their own, and go when the ring comes round."""
    ring = kv_cache._Ring
    patch.setattr(kv_cache, "_Ring", lambda B, window, sinks, device: ring(B, window + sinks, 0, device))


def _definition(model: GPT) -> None:
    assert_is_the_definition(model.config.attention_backend)


def _rule(_model: GPT) -> None:
    assert_is_the_rule(masks.visible, list(range(-1, 6)), list(range(-1, 6)), 2, 1)


def _decode(model: GPT) -> None:
    assert_cache_changes_nothing(model, [7, 1, 1, 1, 1, 1])


def _long_chunks(model: GPT) -> None:
    assert_cache_changes_nothing(model, [2, 7, 3])


def _one_by_one(model: GPT) -> None:
    assert_cache_changes_nothing(model, [1] * T)


def _padded(model: GPT) -> None:
    assert_cache_changes_nothing(model, [7, 1, 1, 1, 1, 1], lengths=[T, 7])


def _far(model: GPT) -> None:
    assert_only_distance_counts(model, 8000, 5e-5)


def _memory(model: GPT) -> None:
    assert_memory_is_constant(model, 100)


BY_HAND, GROUPS = BASE.with_(attention_backend="reference", n_kv_head=2), BASE.with_(n_kv_head=2)
BY_HAND_WINDOW = WINDOW.with_(attention_backend="reference")
BUGS = {
    "repeat for repeat_interleave, by hand": Bug(_repeat, _definition, BY_HAND),
    "repeat for repeat_interleave, in the model": Bug(_repeat, assert_is_plain_attention_with_copied_keys, BY_HAND),
    "repeat before the fused kernel": Bug(
        _repeat_before_the_kernel, assert_is_plain_attention_with_copied_keys, GROUPS
    ),
    "W + 1 keys, by the rule": Bug(_one_key_too_many, _rule, WINDOW),
    "W + 1 keys, by gradient": Bug(_one_key_too_many, assert_sees_what_it_should, BY_HAND_WINDOW),
    "W + 1 keys in training, W in the ring": Bug(_one_key_too_many, _decode, BY_HAND_WINDOW),
    "W + 1 keys in blocks, by gradient": Bug(_one_key_too_many_in_blocks, assert_sees_what_it_should, WINDOW),
    "W + 1 keys in blocks, W in the ring": Bug(_one_key_too_many_in_blocks, _decode, WINDOW),
    "a prefill past the window sees the future": Bug(
        _prefill_past_the_window_forgets_the_future, assert_sees_what_it_should, BY_HAND_WINDOW
    ),
    "a prefill past the window, against one by one": Bug(
        _prefill_past_the_window_forgets_the_future, _one_by_one, BY_HAND_WINDOW
    ),
    "a later chunk past the window sees the future": Bug(
        _a_chunk_past_the_window_forgets_the_future, _long_chunks, RING
    ),
    "the ring is written before it is looked at": Bug(_write_before_looking, _long_chunks, RING),
    "the ring is written before it is looked at, learned": Bug(_write_before_looking, _long_chunks, WINDOW),
    "keys turned at read by slot, ring": Bug(_turned_by_slot, _decode, RING),
    "keys turned at read by slot, padding": Bug(_turned_by_slot, _padded, ROPE),
    "new keys turned from 0": Bug(_new_keys_from_zero, _decode, ROPE),
    "decode at position 0, learned": Bug(_decode_at_zero, _decode, BASE),
    "decode at position 0, rope": Bug(_decode_at_zero, _decode, ROPE),
    "decode at position 0, ring": Bug(_decode_at_zero, _decode, RING),
    "angles in bfloat16 at position 8,000": Bug(_angles_in_bfloat16, _far, ROPE, torch.float32),
    "cos and sin in bfloat16 at position 8,000": Bug(_cos_and_sin_in_bfloat16, _far, ROPE, torch.float32),
    "a cache never trimmed: memory": Bug(_never_trimmed, _memory, RING),
    "a cache never trimmed: old keys in sight": Bug(_never_trimmed, _decode, RING),
    "sinks overwritten when the ring comes round": Bug(_sinks_in_the_ring, _decode, SINKS),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_the_bug_is_caught(lively: Callable[..., GPT], monkeypatch: Patch, bug: Bug) -> None:
    """Bug: a check that holds whatever the code does."""
    model = lively(bug.config, bug.dtype)
    bug.check(model)
    bug.plant(monkeypatch)
    with pytest.raises(AssertionError):
        bug.check(model)
    monkeypatch.undo()
    bug.check(model)


@pytest.mark.parametrize("config", [ROPE, RING, SINKS], ids=["full", "ring", "sinks"])
def test_turning_at_read_is_right_at_the_right_positions(
    lively: Callable[..., GPT], monkeypatch: Patch, config: GPTConfig
) -> None:
    """Bug: the planted bug above fails for another reason than its offset."""
    _turned_at_read(KVCache.key_positions)(monkeypatch)
    _decode(lively(config))
    _padded(lively(config))
