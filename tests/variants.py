"""Every variant of the model, and the checks on it that more than one test makes.

Legend: B batch, T positions, S key positions, C model width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from gpt2course import GPT, GPTConfig
from gpt2course.kv_cache import KVCache
from gpt2course.masks import left_padded_positions

T = 12
HEADS = (4, 2, 1)
POSITIONS = ("learned", "rope")
BASE = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=53, rope_theta=100.0)
REACHES: list[dict[str, object]] = [
    {"window": None},
    *(
        {"window": window, "sinks": sinks, "window_pattern": pattern}
        for window, sinks, pattern in product((1, 3, 8, T + 8), (0, 2), ("S", "SL", "SSSL"))
    ),
]
"""what layers see: all of the past, or windows shorter and longer than the text, with and without sinks, by pattern"""
CHUNKINGS = ([T], [1] * T, [4, 8], [9, 1, 1, 1], [1, 10, 1], [2] * 6, [11, 1], [5, 5, 2])


def variant(n_kv_head: int, pos: str, reach: dict[str, object]) -> GPTConfig:
    """One variant, with layers enough for its whole pattern."""
    n_layer = max(2, len(str(reach.get("window_pattern", "S"))))
    return BASE.with_(n_kv_head=n_kv_head, pos=pos, n_layer=n_layer, **reach)


def name_of(config: GPTConfig) -> str:
    """A short name for a test's id."""
    sight = f"W{config.window}{config.window_pattern}+{config.sinks}" if config.window else "full"
    return f"G{config.kv_heads}-{config.pos}-{sight}"


VARIANTS = [variant(G, pos, reach) for G, pos, reach in product(HEADS, POSITIONS, REACHES)]
FEW = [
    variant(4, "learned", {"window": None}),
    variant(2, "rope", {"window": None}),
    variant(1, "learned", {"window": 3}),
    variant(2, "rope", {"window": 3}),
    variant(4, "rope", {"window": 1}),
    variant(1, "rope", {"window": 3, "sinks": 2}),
    variant(2, "rope", {"window": 3, "sinks": 2, "window_pattern": "SSSL"}),
]
"""one of each kind, where all of them would say no more"""


def token_ids(config: GPTConfig, B: int, length: int = T, seed: int = 1) -> Tensor:
    """(B, length) random token ids."""
    return torch.randint(config.vocab_size, (B, length), generator=torch.Generator().manual_seed(seed))


def spans(chunks: Sequence[int]) -> Iterator[slice]:
    start = 0
    for width in chunks:
        yield slice(start, start + width)
        start += width


@torch.no_grad()
def in_chunks(
    model: GPT, idx_BT: Tensor, chunks: Sequence[int], pos_BT: Tensor | None = None, given: bool = True
) -> Tensor:
    """Logits (B, T, V) with a cache, chunk by chunk.

    With `given` false, positions are given to chunks with padding only: after them the model goes on by itself.
    """
    cache = KVCache(model.config, idx_BT.shape[0], sum(chunks), dtype=model.wte.weight.dtype)
    logits = []
    for span in spans(chunks):
        own = pos_BT is None or not (given or bool((pos_BT[:, span] < 0).any()))
        logits.append(model(idx_BT[:, span], pos_BT=None if own or pos_BT is None else pos_BT[:, span], cache=cache))
    return torch.cat(logits, dim=1)


@torch.no_grad()
def assert_cache_changes_nothing(
    model: GPT, chunks: Sequence[int], lengths: Sequence[int] | None = None, given: bool = True, shift: int = 0
) -> float:
    """The check of every cache: chunk by chunk with it are the logits of one pass without, on every real token.

    Less than 1e-12 apart in float64, than 1e-5 in float32. Returns the largest difference.

    Args:
        model: of any variant.
        chunks: how the tokens are cut.
        lengths: real tokens in each row; the rest is padding on the left. None is two rows without any.
        given: as in `in_chunks`.
        shift: added to all positions.
    """
    width = sum(chunks)
    idx_BT = token_ids(model.config, 2 if lengths is None else len(lengths), width)
    pos_BT = None if lengths is None else left_padded_positions(torch.tensor(lengths), width)
    if shift:
        pos_BT = torch.arange(shift, shift + width).expand(idx_BT.shape) if pos_BT is None else pos_BT + shift
    real_BT = torch.ones(idx_BT.shape, dtype=torch.bool) if pos_BT is None else pos_BT >= 0
    whole_BTV = model(idx_BT, pos_BT=pos_BT)
    error = float((in_chunks(model, idx_BT, chunks, pos_BT, given) - whole_BTV)[real_BT].abs().max())
    limit = 1e-12 if model.wte.weight.dtype == torch.float64 else 1e-5
    assert error < limit, f"{error:.1e} {name_of(model.config)} chunks {list(chunks)} lengths {lengths} given {given}"
    return error


@torch.inference_mode()
def assert_memory_is_constant(model: GPT, n: int, lengths: Sequence[int] | None = None) -> None:
    """With a window in every layer, n tokens fed in long chunks, then one by one, stay in the same small tensors."""
    config = model.config
    assert config.window is not None
    slots = config.window + config.sinks
    first = n // 5 if lengths is None else max(lengths)
    cache = KVCache(config, batch_size=2, dtype=model.wte.weight.dtype)
    places = [x.data_ptr() for x in (*cache.k, *cache.v)]
    idx_BT = token_ids(config, 2, n)
    pos_BT = None if lengths is None else left_padded_positions(torch.tensor(lengths), first)
    model.hidden(idx_BT[:, :first], pos_BT, cache)
    for span in torch.arange(first, n - n // 5).split(n // 10):
        model.hidden(idx_BT[:, span], cache=cache)
    for t in range(n - n // 5, n):
        model.hidden(idx_BT[:, t : t + 1], cache=cache)
        assert {x.shape[2] for x in (*cache.k, *cache.v)} == {slots}, f"after {t} tokens"
        # In a padded batch the new key lies beside the ring while it is looked at.
        assert cache.key_positions(0).shape[1] == slots + (lengths is not None)
    assert cache.length == n
    assert places == [x.data_ptr() for x in (*cache.k, *cache.v)]
    others = [x for x in vars(cache._slots[config.window]).values() if isinstance(x, Tensor)]
    assert max(x.numel() for x in others) <= 2 * (n // 10 + slots)


@torch.no_grad()
def assert_is_plain_attention_with_copied_keys(model: GPT) -> float:
    """The check of grouped queries, with and without a cache. Returns the error."""
    plain, idx_BT = spread(model), token_ids(model.config, 2)
    wanted_BTV = plain(idx_BT)
    error = max(float((x - wanted_BTV).abs().max()) for x in (model(idx_BT), in_chunks(model, idx_BT, [9, 1, 2])))
    assert error < 1e-12, f"{error:.1e} {name_of(model.config)}"
    return error


def seen(config: GPTConfig, layer: int, length: int = T) -> Tensor:
    """(T, T) bool: the rule in words, pair by pair, for one layer and positions 0, 1, 2 …"""
    short = config.window_pattern[layer % len(config.window_pattern)] == "S"

    def sees(q: int, k: int) -> bool:
        near = config.window is None or not short or k in range(q - config.window + 1, q + 1)
        return k <= q and (near or k in range(config.sinks))

    return torch.tensor([[sees(q, k) for k in range(length)] for q in range(length)])


def assert_sees_what_it_should(model: GPT) -> None:
    """By gradient: nothing from a key outside, something from each key inside, in every layer and through them all.

    The batch is T copies of one text. Row t is asked about query t only, so that one pass answers for all queries.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = [model.drop.register_forward_hook(lambda _module, _args, out: inputs.append(out))]
    for block in model.h:
        handles.append(block.attn.register_forward_pre_hook(lambda _module, args: inputs.append(args[0])))
        handles.append(block.attn.register_forward_hook(lambda _module, _args, out: outputs.append(out)))
    try:
        logits_BTV = model(token_ids(model.config, 1).expand(T, T))
    finally:
        for handle in handles:
            handle.remove()

    def reached(y_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        asked = y_BTC.diagonal(dim1=0, dim2=1).pow(2).sum()
        (grad_BTC,) = torch.autograd.grad(asked, x_BTC, retain_graph=True)
        return (grad_BTC != 0).any(dim=-1)

    through = torch.eye(T, dtype=torch.bool)
    for layer, (x_BTC, y_BTC) in enumerate(zip(inputs[1:], outputs, strict=True)):
        wanted = seen(model.config, layer)
        assert torch.equal(reached(y_BTC, x_BTC), wanted), f"layer {layer} of {name_of(model.config)}"
        through = (wanted.float() @ through.float()) > 0
    assert torch.equal(reached(logits_BTV, inputs[0]), through), f"all layers of {name_of(model.config)}"


@torch.no_grad()
def shift_error(model: GPT, shift: int) -> float:
    """How much the logits change when all positions move by `shift`, relative to the largest."""
    idx_BT = token_ids(model.config, 2)
    pos_BT = torch.arange(T).expand(2, T)
    here, there = (model(idx_BT, pos_BT=pos_BT + by) for by in (0, shift))
    return float((here - there).abs().max() / here.abs().max())


def assert_only_distance_counts(model: GPT, shift: int, limit: float = 1e-10) -> float:
    """The check of rotary positions: a shift of all positions changes no logit. Returns the error."""
    error = shift_error(model, shift)
    assert error < limit, f"{error:.1e} at shift {shift}, {name_of(model.config)}"
    return error


@torch.no_grad()
def spread(model: GPT) -> GPT:
    """The same function as plain multi-head attention: each query head has a key/value head of its own, a copy."""
    config, D = model.config, model.config.head_dim
    G, group = config.kv_heads, config.n_head // config.kv_heads
    plain = GPT(config.with_(n_kv_head=config.n_head)).to(model.wte.weight.dtype).eval()
    state = dict(model.state_dict())
    for name in [name for name in state if ".c_attn." in name]:
        q, k, v = state[name].split([config.n_head * D, G * D, G * D])
        heads = [x.unflatten(0, (G, D))[:, None] for x in (k, v)]
        k, v = (x.expand(G, group, *x.shape[2:]).reshape(G * group * D, *x.shape[3:]) for x in heads)
        state[name] = torch.cat([q, k, v])
    plain.load_state_dict(state)
    return plain
