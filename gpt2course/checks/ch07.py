"""Checks of chapter 07, grouped-query attention.

Legend: B batch, S key positions, C model width, H query heads, G key/value heads, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt2course.checks.base import Wrong, a_kind, exercise, require, same_number, same_tensor
from gpt2course.config import GPTConfig
from gpt2course.kv_cache import cache_bytes

SHAPES = [(12, 4), (8, 2), (6, 6), (6, 1), (12, 3)]


@exercise("07.1 Which key head")
def key_head_of(answer: Callable[[int, int, int], int]) -> str:
    """The learner's `key_head_of(h, n_head, n_kv_head)` gives the key/value head that query head h reads."""
    for H, G in SHAPES:
        want = [h // (H // G) for h in range(H)]
        got = [_whole(answer(h, H, G), h) for h in range(H)]
        if got == want:
            continue
        told = f"{H} query heads, {G} key heads: you say {got}"
        if got == [h % G for h in range(H)]:
            raise Wrong(f"{told}; the readers of one key head lie side by side, you deal them out in turn (`repeat`)")
        if got == [h // G for h in range(H)]:
            raise Wrong(f"{told}; n_kv_head is the number of key heads, you use it as the number of readers of each")
        if max(got) >= G or min(got) < 0:
            raise Wrong(f"{told}; key heads have the numbers 0 to {G - 1}")
        first = next(h for h in range(H) if got[h] != want[h])
        raise Wrong(f"{told}; query head {first} reads key head {want[first]}")
    return f"right for {', '.join(f'{H} over {G}' for H, G in SHAPES)}"


def _whole(value: Any, h: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Wrong(f"query head {h}: you returned {a_kind(value)} ({value!r}), expected a whole number; use //")
    return value


@exercise("07.2 A key head for every query head")
def expand_heads(answer: Callable[[Tensor, int], Tensor]) -> str:
    """The learner's `expand_heads(k_BGSD, n_head)` gives (B, H, S, D): each key head once for each of its readers."""
    for H, G in SHAPES:
        B, S, D = 2, 5, 3
        k_BGSD = torch.randn(B, G, S, D)
        want = k_BGSD[:, [h // (H // G) for h in range(H)]]
        got = answer(k_BGSD, H)
        require(isinstance(got, Tensor), f"you returned {a_kind(got)}, expected a tensor")
        if got.shape == (B, G * H, S, D) and H != 1 and G != 1:
            raise Wrong(f"you returned {G * H} heads: each of {G} is wanted {H // G} times, not {H} times")
        if got.shape != want.shape:
            raise Wrong(f"from {G} key heads for {H}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        if torch.equal(got, want):
            continue
        if torch.equal(got, k_BGSD.repeat(1, H // G, 1, 1)):
            raise Wrong(
                f"query head 1 of {H} gets key head 1, and should get {1 // (H // G)}: this is the order of `repeat`, "
                "0 1 … 0 1 …; copies of one head must lie side by side, 0 0 … 1 1 …"
            )
        if torch.equal(got.sort(dim=2).values, want.sort(dim=2).values):
            raise Wrong("the heads are right, but their positions have changed places; only axis 1 may grow")
        same_tensor(got, want, f"keys for {H} query heads over {G}")
    return "each key head stands beside its copies, also for MHA and MQA"


@exercise("07.3 How long a text fits")
def longest_context(answer: Callable[[GPTConfig, int, int, int], int]) -> str:
    """The learner's `longest_context(config, memory_bytes, bytes_per_number, texts)`."""
    config = GPTConfig(n_layer=32, n_head=32, n_kv_head=4, n_embd=4096, block_size=32768)
    memory = 16 * 2**30
    want = memory // (2 * 32 * 4 * 128 * 4)
    got = answer(config, memory, 4, 1)
    require(
        isinstance(got, int) and not isinstance(got, bool),
        f"you returned {a_kind(got)} ({got!r}), expected a whole number of tokens",
    )
    told = f"32 layers, 4 of 32 heads of 128, 4 bytes a number, 16 GiB: you say {got:,} tokens"
    slips = {
        2 * want: "a token has a key and a value",
        4 * want: "each number takes 4 bytes",
        32 * want: "every layer keeps keys and values of its own",
        128 * want: "a key is head_dim numbers wide",
        want // 2: "n_kv_head is the number of key heads, not how many query heads share one",
        want // 4: "you count keys for all 32 heads, and no values",
        want // 8: "only n_kv_head of the heads have keys and values, you count all 32",
        want // 32: "a key is head_dim numbers wide, not n_embd",
    }
    if got != want and got in slips:
        raise Wrong(f"{told}; {slips[got]}")
    require(got == want, f"{told}, expected {want:,}")
    shared = answer(config, memory, 4, 5)
    require(shared != want, f"5 texts at once: you still say {want:,}; every text has a cache of its own")
    require(
        shared * 5 * cache_bytes(config, 1, 1, 4) <= memory,
        f"5 texts of {shared:,} tokens each take more than the memory; round down",
    )
    same_number(shared, want // 5, "tokens of each of 5 texts")
    small = GPTConfig(n_layer=3, n_head=6, n_kv_head=3, n_embd=30)
    bytes_a_token = cache_bytes(small, 1, 1, 4)
    same_number(answer(small, 10 * bytes_a_token + 7, 4, 1), 10, "tokens where ten and a bit fit")
    return f"{want:,} tokens fit into 16 GiB with 4 of 32 heads, and a fifth of that for each of five texts"


@exercise("07.4 Pooling heads")
def mean_pool(answer: Callable[[Tensor, int, int], Tensor]) -> str:
    """The learner's `mean_pool(rows, n_head, n_kv_head)`: the mean of each group of heads, for weights and biases."""
    for H, G in SHAPES:
        D, C = 3, 5
        weight = torch.randn(H * D, C)
        _same_pooling(answer(weight, H, G), weight, H, G, "weight")
        bias = torch.randn(H * D)
        try:
            pooled = answer(bias, H, G)
        except Wrong as wrong:
            raise Wrong(f"your function pools a weight, but not a bias of shape ({H * D},): {wrong}") from wrong
        _same_pooling(pooled, bias, H, G, "bias")
    return "weights and biases, each group of neighbouring heads by its mean"


def _same_pooling(got: Any, rows: Tensor, H: int, G: int, name: str) -> None:
    D, R, rest = rows.shape[0] // H, H // G, rows.shape[1:]
    want = rows.reshape(G, R, D, *rest).mean(1).reshape(G * D, *rest)
    case = f"{name} of {H} heads to {G}"
    require(isinstance(got, Tensor), f"{case}: you returned {a_kind(got)}, expected a tensor")
    if got.shape != want.shape:
        raise Wrong(f"{case}: from shape {tuple(rows.shape)} to {tuple(got.shape)}, expected {tuple(want.shape)}")
    if torch.allclose(got, want, atol=1e-6):
        return
    usual = {
        "you average heads that lie apart (0, 0 + G …); the readers of one key head lie side by side": rows.reshape(
            R, G, D, *rest
        ).mean(0),
        "you average neighbouring rows inside a head; pool whole heads, entry by entry": rows.reshape(
            G, D, R, *rest
        ).mean(2),
        "you add the heads of a group up; divide by their number": want * R,
        "you keep the first head of each group; take the mean of all": rows.reshape(G, R, D, *rest)[:, 0],
    }
    for what, values in usual.items():
        if torch.allclose(got, values.reshape(want.shape), atol=1e-6):
            raise Wrong(f"{case}: {what}")
    same_tensor(got, want, case)
