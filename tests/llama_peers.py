"""Attention of other libraries' rotary models, run inside those models, against ours run inside a GPT.

Both sides run for real: their model makes its own masks, rotation and cache, ours too. Only what goes into each
attention is the same: what went into theirs is recorded, and put in the place of what would go into ours.

Legend: B batch, T new positions, C model width, H heads, G key/value heads, D head width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gpt2course import GPT, GPTConfig
from gpt2course.config import RopeScaling
from gpt2course.kv_cache import KVCache

FP32 = 1e-5
"""largest difference of any output in float32; outputs go up to about 8"""
BF16 = 0.02
"""as a share of the largest output. bfloat16 has 8 bits, so each number is rounded by up to 0.004 of itself, scores of
about 10 by up to 0.03, and transformers rounds cos and sin as well, where ours stay float32"""
CAUGHT = 0.1
"""what a mutant must exceed, as a share of the largest output: far above either limit"""
N_LAYER, H, C, V = 2, 4, 64, 97
LONGEST = 512
"""positions the peers are made for; ours have no end"""

Call = list[tuple[Tensor, Tensor]]
"""one forward pass: for each layer what went into its attention, and what came out, both (B, T, C)"""


def random_peer(
    family: type[PreTrainedModel],
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
    n_kv_head: int = H,
    implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> PreTrainedModel:
    """A small random model of a family of the transformers library, lively enough that a wrong mask or head shows."""
    config = family.config_class(
        num_hidden_layers=N_LAYER,
        num_attention_heads=H,
        num_key_value_heads=n_kv_head,
        hidden_size=C,
        intermediate_size=32,
        vocab_size=V,
        max_position_embeddings=LONGEST,
        rope_parameters=rope_parameters(theta, scaling, settings.pop("fraction", 1.0)),
        bos_token_id=0,
        eos_token_id=V - 1,
        pad_token_id=0,
        attn_implementation=implementation,
        **settings,
    )
    peer = family(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    return cast(peer, dtype)


def cast(peer: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The peer in another dtype, its frequencies still float32, as `from_pretrained` leaves them.

    `.to(dtype)` alone rounds them, as they lie in a buffer: the very bug that ours must not have.
    """
    buffers = {name: buffer.clone() for name, buffer in peer.named_buffers()}
    peer = peer.to(dtype)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(peer.get_submodule(owner), leaf, buffer)
    return peer


def rope_parameters(theta: float, scaling: RopeScaling | None, fraction: float = 1.0) -> dict[str, Any]:
    """Our scaling in the words of the transformers library."""
    words: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if fraction != 1.0:
        words["partial_rotary_factor"] = fraction
    if scaling is not None:
        words |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind != "linear":
        words["original_max_position_embeddings"] = scaling.original_block_size
    if scaling is not None and scaling.kind == "llama3":
        words |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling is not None and scaling.kind == "yarn":
        words |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        words |= {"attention_factor": scaling.attention_factor}
    return words


def our_config(peer: PreTrainedModel, scaling: RopeScaling | None = None, **changes: Any) -> GPTConfig:
    """The config of ours that should compute what the peer's attention does."""
    theirs: PreTrainedConfig = peer.config
    return GPTConfig(
        n_layer=theirs.num_hidden_layers,
        n_head=theirs.num_attention_heads,
        n_kv_head=theirs.num_key_value_heads,
        n_embd=theirs.hidden_size,
        vocab_size=theirs.vocab_size,
        block_size=LONGEST,
        pos="rope",
        rope_theta=theirs.rope_parameters["rope_theta"],
        rope_fraction=theirs.rope_parameters.get("partial_rotary_factor", 1.0),
        rope_scaling=scaling,
        window=getattr(theirs, "sliding_window", None),
    ).with_(**changes)


@torch.no_grad()
def our_twin(peer: PreTrainedModel, config: GPTConfig) -> GPT:
    """A GPT whose attentions have the peer's weights; the rest of it is never looked at."""
    ours = GPT(config).to(peer.dtype).eval()
    for block, layer in zip(ours.h, peer.model.layers, strict=True):
        their, our = layer.self_attn, block.attn
        our.c_attn.weight.copy_(torch.cat([p.weight for p in (their.q_proj, their.k_proj, their.v_proj)]))
        our.c_proj.weight.copy_(their.o_proj.weight)
        biases = [p.bias for p in (their.q_proj, their.k_proj, their.v_proj)]
        if config.bias:
            our.c_attn.bias.copy_(torch.zeros_like(our.c_attn.bias) if biases[0] is None else torch.cat(biases))
            our.c_proj.bias.zero_()
    return ours


@contextmanager
def recorded(peer: PreTrainedModel) -> Iterator[list[Call]]:
    """What goes into and comes out of the peer's attentions, for each forward pass made inside."""
    calls: list[Call] = []

    def note(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: tuple[Tensor, ...]) -> None:
            if layer == 0:
                calls.append([])
            calls[-1].append((args[0] if args else kwargs["hidden_states"], out[0]))

        return hook

    with torch.no_grad(), ExitStack() as hooks:
        for layer, block in enumerate(peer.model.layers):
            hooks.enter_context(_removed(block.self_attn.register_forward_hook(note(layer), with_kwargs=True)))
        yield calls


@contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def token_ids(T: int, rows: int = 2) -> Tensor:
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(1))


def fed_in_chunks(
    peer: PreTrainedModel, idx_BT: Tensor, chunks: Sequence[int] | None = None, pos_BT: Tensor | None = None
) -> list[Call]:
    """Run the peer on the tokens: in chunks with its own cache, or in one pass without, at any positions."""
    with recorded(peer) as calls:
        if chunks is None:
            # Without a mask of ones it would take a gap in the positions for the start of another text.
            seen = None if pos_BT is None else torch.ones_like(idx_BT)
            peer(idx_BT, position_ids=pos_BT, attention_mask=seen, use_cache=False)
        else:
            past = None
            for idx_Bt in idx_BT.split(list(chunks), dim=1):
                past = peer(idx_Bt, past_key_values=past, use_cache=True).past_key_values
    return calls


@torch.no_grad()
def our_outputs(ours: GPT, calls: list[Call], with_cache: bool, pos_BT: Tensor | None = None) -> list[Tensor]:
    """The outputs of our attentions in the same passes, in the order of the calls and of their layers.

    Args:
        pos_BT: positions of the first pass, -1 on padding; by default 0, 1, 2 …. The later ones go on from there.
    """
    (B, _, _), dtype = calls[0][0][0].shape, ours.wte.weight.dtype
    total = sum(call[0][0].shape[1] for call in calls)
    cache = KVCache(ours.config, B, total, dtype=dtype) if with_cache else None
    outputs: list[Tensor] = []

    def theirs_instead(call: Call) -> Callable[..., tuple[Any, ...]]:
        def hook(attention: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return call[attention.layer][0].to(dtype), *args[1:]

        return hook

    def keep(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
        outputs.append(out)

    for call in calls:
        with ExitStack() as hooks:
            for block in ours.h:
                hooks.enter_context(_removed(block.attn.register_forward_pre_hook(theirs_instead(call))))
                hooks.enter_context(_removed(block.attn.register_forward_hook(keep)))
            idx_BT = torch.zeros(call[0][0].shape[:2], dtype=torch.long)
            ours.hidden(idx_BT, pos_BT if call is calls[0] else None, cache)
    return outputs


def worst_difference(a: list[Tensor], b: list[Tensor], relative: bool = False) -> float:
    """The largest difference of any number; relative: as a share of the largest number of b."""
    worst = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    return worst / max(float(y.abs().max()) for y in b) if relative else worst


def their_outputs(calls: list[Call]) -> list[Tensor]:
    return [out for call in calls for _, out in call]


def worst_error(ours: GPT, calls: list[Call], with_cache: bool, relative: bool = False) -> float:
    """Run the same passes through ours, and give the largest difference of any output of any attention."""
    return worst_difference(our_outputs(ours, calls, with_cache), their_outputs(calls), relative)


def one_by_one(prompt: int, total: int) -> list[int]:
    """Chunks: the prompt at once, then a token at a time."""
    return [b - a for a, b in pairwise([0, *range(prompt, total + 1)])]
