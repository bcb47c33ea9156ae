"""Every intermediate result of one forward pass, by the name of the module that made it.

Legend: B batch, T query positions, S key positions, C model width, H heads, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gpt2course.attention import Attention, attention_weights
from gpt2course.evaluate import evaluating
from gpt2course.masks import Causal
from gpt2course.model import GPT

WEIGHTS = "weights"


@torch.no_grad()
def trace(model: GPT, idx_BT: Tensor, pos_BT: Tensor | None = None) -> dict[str, Tensor]:
    """Run the model once and keep what every layer made.

    Args:
        model: run in eval mode, and put back in the mode it was in.
        idx_BT: (B, T) token ids.
        pos_BT: (B, T) absolute positions, -1 on left padding; by default 0, 1, 2 …

    Returns:
        results by name, in the order they were computed: `wte`, `wpe` (not with rotary positions), then for each block
        i `h.i.ln_1`, `h.i.attn.c_attn`, `h.i.attn.weights`, `h.i.attn.c_proj`, `h.i.attn` (what attention adds),
        `h.i.ln_2`, `h.i.mlp.c_fc`, `h.i.mlp.act`, `h.i.mlp.c_proj`, `h.i.mlp` (what the MLP adds), `h.i` (the residual
        stream after the block), and at the end `ln_f` and `lm_head`, the logits (B, T, V). `h.i.attn.weights` is
        (B, H, T, S), worked out again by hand from the queries and keys, as the fused kernel never shows them.
    """
    found: dict[str, Tensor] = {}
    handles = []

    def keep_output(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            found[name] = output.detach()

        return hook

    def keep_weights(name: str) -> Any:
        def hook(attention: Attention, args: tuple[Any, ...]) -> None:
            x_BTC, mask, rotation = args[:3]
            q_BHTD, k_BGSD, _ = attention.rotated_qkv(x_BTC, rotation)
            mask_TS = mask.mask(x_BTC.shape[1], x_BTC.device) if isinstance(mask, Causal) else mask
            found[f"{name}.{WEIGHTS}"] = attention_weights(q_BHTD, k_BGSD, mask_TS)

        return hook

    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList | nn.Dropout):
            handles.append(module.register_forward_hook(keep_output(name)))
        if isinstance(module, Attention):
            handles.append(module.register_forward_pre_hook(keep_weights(name)))
    try:
        with evaluating(model):
            model(idx_BT, pos_BT=pos_BT)
    finally:
        for handle in handles:
            handle.remove()
    return found


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference of each result in two traces, in the order of computation.

    Raises:
        ValueError: if the two traces do not hold the same names.
    """
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"only one of the two traces holds {', '.join(odd)}; are the models of the same shape?")
    return {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
