"""Causal attention with a sliding window on CUDA: torch compiles a kernel that skips the blocks nobody may see.

Dong et al. 2024, "Flex Attention", arXiv:2412.05496.
Legend: B batch, T positions, H query heads, G key/value heads, D head width.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gpt2course.masks import Causal


def why_not(device: torch.device | str, dtype: torch.dtype, dropout: float, head_dim: int) -> str | None:
    """Why `flex_window` can't compute this, or None if it can."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"flex attention has no backward pass on {device.type} (torch 2.13), only on cuda"
    if dropout > 0:
        return f"flex attention knows no dropout, and dropout is {dropout}"
    if dtype == torch.float64:
        return "flex attention does not compute in float64"
    if head_dim < 16:
        return f"flex attention needs heads at least 16 wide, and these are {head_dim}"
    return None


def rule(mask: Causal) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`masks.visible` for one query position and one key position at a time, as flex attention asks it."""
    window, sinks = mask.window, mask.sinks

    def may_see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if window is None:
            return k <= q
        return (k <= q) & ((q - k < window) | (k < sinks))

    return may_see


@lru_cache(maxsize=64)
def block_mask(mask: Causal, T: int, device: torch.device) -> BlockMask:
    """Which 128 x 128 blocks hold a visible pair. Making it costs more than a layer, so it is made once for all."""
    with torch.inference_mode(False):  # or a mask first made in evaluation could not be used in training
        return create_block_mask(rule(mask), B=None, H=None, Q_LEN=T, KV_LEN=T, device=str(device))


@lru_cache(maxsize=1)
def compiled() -> Callable[..., Any]:
    """flex attention, compiled at its first call; uncompiled it would hold all T x T scores.

    Each mask, dtype and mode is compiled apart. Past torch's limit of 8 it would go on uncompiled, in silence.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention)


def flex_window(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, mask: Causal) -> Tensor:
    """Attention of T queries over the same T positions, by the mask's rule. Ask `why_not` first.

    Args:
        q_BHTD, k_BGTD, v_BGTD: queries, keys, values, on CUDA; G divides H.
        mask: window and sinks.

    Returns:
        (B, H, T, D).
    """
    T, gqa = q_BHTD.shape[2], q_BHTD.shape[1] != k_BGTD.shape[1]
    y_BHTD: Tensor = compiled()(q_BHTD, k_BGTD, v_BGTD, block_mask=block_mask(mask, T, q_BHTD.device), enable_gqa=gqa)
    return y_BHTD
