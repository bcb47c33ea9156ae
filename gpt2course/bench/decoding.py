"""What a token costs in decoding after a long past: for all key heads, few, one, and for a window with its ring.

Legend: B batch, T positions, S keys, G key/value heads, D head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from gpt2course.attention import attend
from gpt2course.bench.timing import Spread, interleaved
from gpt2course.config import GPTConfig
from gpt2course.kv_cache import KVCache, cache_bytes
from gpt2course.model import GPT

MHA, MQA, RING = "MHA", "MQA", "window, ring"


@dataclass(frozen=True)
class Decoding:
    """Decoding of one variant, one row at a time, up to `context` positions."""

    variant: str
    context: int
    seconds: list[float]
    """for each token"""
    cache_bytes: int
    """of keys and values, with room for `context` positions"""

    @property
    def tokens_per_second(self) -> Spread:
        return Spread.of([1.0 / s for s in self.seconds])


@dataclass(frozen=True)
class Sharing:
    """One query's attention in all layers at the longest context, for a way to let query heads share key heads."""

    way: str
    seconds: list[float]


def variants(config: GPTConfig, n_kv_head: int, window: int) -> dict[str, GPTConfig]:
    """The same shape with all key heads, with few, with one, and with all and a window."""
    return {
        MHA: config,
        f"GQA-{n_kv_head}": config.with_(n_kv_head=n_kv_head),
        MQA: config.with_(n_kv_head=1),
        RING: config.with_(window=window),
    }


def filled(
    config: GPTConfig, context: int, free: int, device: torch.device, dtype: torch.dtype, batch_size: int = 1
) -> KVCache:
    """A cache for `context` positions, full of random keys and values but for the last `free`.

    Computing them by a prefill would take longer than everything that is measured, and time does not ask what the
    numbers are.

    Raises:
        RuntimeError: if its size is not what the formula says.
    """
    cache = KVCache(config, batch_size, context, device, dtype)
    expected = cache_bytes(config, batch_size, context, torch.empty((), dtype=dtype).element_size())
    if cache.nbytes != expected:
        raise RuntimeError(f"the cache holds {cache.nbytes} bytes, not {expected}")
    S = context - free
    shape = (batch_size, config.kv_heads, S, config.head_dim)
    k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in "kv")
    cache.extend(cache.next_positions(S), plain=True)
    for layer in range(config.n_layer):
        cache.store(layer, k, v)
    return cache


@torch.inference_mode()
def measure_decoding(
    config: GPTConfig,
    n_kv_head: int,
    window: int,
    contexts: Sequence[int],
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[Decoding], list[Sharing]]:
    """Seconds a token of every variant at every context, in turns, so that every two of them can be compared."""
    shapes = variants(config, n_kv_head, window)
    models = {name: GPT(shape).to(device, dtype).eval() for name, shape in shapes.items()}
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def step(name: str, cache: KVCache) -> Tensor:
        return models[name](token, cache=cache).argmax(dim=-1)

    cells = {(name, context): f"{name} {context}" for name in shapes for context in contexts}
    caches = {cell: filled(shapes[cell[0]], cell[1], repeats + 1, device, dtype) for cell in cells}
    cases = {label: partial(step, cell[0], caches[cell]) for cell, label in cells.items()}
    with tqdm(total=len(cases) * (repeats + 1), desc="decoding", unit="token", leave=False) as bar:
        seconds = interleaved(cases, repeats, device, bar.update)
    found = [Decoding(*cell, seconds[label], caches[cell].nbytes) for cell, label in cells.items()]
    longest = max(contexts)
    grouped = caches[f"GQA-{n_kv_head}", longest]
    return found, measure_sharing(config.n_head, caches[MHA, longest], grouped, repeats, device)


def measure_sharing(n_head: int, plain: KVCache, grouped: KVCache, repeats: int, device: torch.device) -> list[Sharing]:
    """A query's attention in all layers: a key head for each query head, and three ways to share one."""
    D, group = plain.k[0].shape[-1], n_head // grouped.k[0].shape[1]
    q_BHTD = torch.randn(1, n_head, 1, D, device=device, dtype=plain.k[0].dtype)

    def in_all_layers(attention: Callable[[Tensor, Tensor, Tensor], Tensor], cache: KVCache) -> None:
        for k_BGSD, v_BGSD in zip(cache.k, cache.v, strict=True):
            attention(q_BHTD, k_BGSD, v_BGSD)

    def copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))

    G = grouped.k[0].shape[1]
    cases = {
        MHA: partial(in_all_layers, partial(attend, mask=None), plain),
        f"GQA-{G}, a head's keys read once": partial(in_all_layers, partial(attend, mask=None), grouped),
        f"GQA-{G}, read for each query head": partial(
            in_all_layers, partial(F.scaled_dot_product_attention, enable_gqa=True), grouped
        ),
        f"GQA-{G}, copied for each query head": partial(in_all_layers, copied, grouped),
    }
    return [Sharing(way, seconds) for way, seconds in interleaved(cases, repeats, device).items()]
