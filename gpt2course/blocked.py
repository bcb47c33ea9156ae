"""Causal attention with a sliding window, whose cost grows with T and not with T squared. Right on every device.

Legend: B batch, T positions, N queries of a block, S keys it is shown, H query heads, G key/value heads, D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt2course.masks import visible


def block_size(window: int) -> int:
    """How many queries to take at a time: half a window, from 64 to 256.

    A block of b queries is shown window + b keys. A small b wastes few of them, but makes many small calls, and keys
    are read again in every block. Times against full causal attention, forward and backward, T = 4,096, 12 heads of 64,
    one thread of two cores (b = 64, 128, 256): window 16: 0.12, 0.15, 0.19; window 64: 0.15, 0.17, 0.22; window 256:
    0.26, 0.26, 0.29; window 1,024: 0.71, 0.69, 0.64.
    """
    return min(max(window // 2, 64), 256)


def blocked_attention(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, window: int, sinks: int = 0, dropout: float = 0.0
) -> Tensor:
    """Attention of T queries over the same T positions, by the rule k <= q and (q - k < window or k < sinks).

    The first window + sinks queries see all of their past: that is plain causal attention. The others come in blocks. A
    block of b queries is shown the window + b keys up to its own last one, and the sinks, which all lie before those.
    So every block looks alike, and one small mask serves them all.

    Blocks could also be stacked in the batch dimension, and be one call. That was slower, since keys and gradients laid
    out for all blocks leave the processor's caches: forward and backward at T = 8,192, window 256 and 12 heads of 64
    then took 0.20 to 0.22 of the time of full causal attention on two cores, against 0.15 to 0.17 block by block.

    Args:
        q_BHTD, k_BGTD, v_BGTD: queries, keys, values; G divides H.
        window: number of keys a query sees, its own included; at least 1.
        sinks: how many of the first keys every later query sees.
        dropout: probability of dropping a weight.

    Returns:
        (B, H, T, D).
    """
    T, whole, block = q_BHTD.shape[2], window + sinks, block_size(window)
    gqa = q_BHTD.shape[1] != k_BGTD.shape[1]
    if whole >= T:
        return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, None, dropout, is_causal=True, enable_gqa=gqa)

    # The mask of the first block. As numbers to add: a bool mask would be converted in every call.
    pos_S = torch.arange(whole + block, device=q_BHTD.device)
    mask_NS = torch.zeros(block, whole + block, dtype=q_BHTD.dtype, device=q_BHTD.device)
    mask_NS.masked_fill_(~visible(pos_S[whole:], pos_S, window, sinks), float("-inf"))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=gqa)
        return y.transpose(1, 2)

    # From here on positions come before heads, as they lie in a model's memory: pieces are then joined in long runs.
    q_BTHD, k_BTGD, v_BTGD = (x.transpose(1, 2) for x in (q_BHTD, k_BGTD, v_BGTD))
    starts = range(whole, T, block)
    q_first, *q_blocks = q_BTHD.split([whole, *(min(block, T - start) for start in starts)], dim=1)
    k_first, k_BTGD = _Excerpt.apply(k_BTGD, 0, whole)
    v_first, v_BTGD = _Excerpt.apply(v_BTGD, 0, whole)
    k_sinks, v_sinks = k_first[:, :sinks], v_first[:, :sinks]
    outputs = [attend(q_first, k_first, v_first, None)]
    for start, q_BNHD in zip(starts, q_blocks, strict=True):
        begin, end = start - window, start + q_BNHD.shape[1]
        k_BSGD, k_BTGD = _Excerpt.apply(k_BTGD, begin, end)
        v_BSGD, v_BTGD = _Excerpt.apply(v_BTGD, begin, end)
        if sinks:
            k_BSGD, v_BSGD = torch.cat([k_sinks, k_BSGD], dim=1), torch.cat([v_sinks, v_BSGD], dim=1)
        outputs.append(attend(q_BNHD, k_BSGD, v_BSGD, mask_NS[: q_BNHD.shape[1], : k_BSGD.shape[1]]))
    return torch.cat(outputs, dim=1).transpose(1, 2)


class _Excerpt(torch.autograd.Function):
    """x[:, begin:end], and x itself for the excerpts that follow.

    A plain slice would give the same, but its gradient is as large as x and zero nearly everywhere: T / b of them cost
    T squared again. In this chain one gradient passes from the last excerpt to the first, and each adds its part to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        ctx.begin, ctx.end = begin, end
        return x[:, begin:end], x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_excerpt: Tensor, grad_x: Tensor) -> tuple[Tensor, None, None]:
        if torch.compiler.is_compiling():  # a compiled graph may not change a gradient in place
            part = grad_x[:, ctx.begin : ctx.end] + grad_excerpt
            return torch.slice_scatter(grad_x, part, 1, ctx.begin, ctx.end), None, None
        grad_x[:, ctx.begin : ctx.end] += grad_excerpt
        return grad_x, None, None
