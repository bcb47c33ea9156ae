"""Scaled dot-product attention written out, and the one attention module for every variant.

Legend: B batch, T query positions, S key positions, C model width, H query heads, G key/value heads, D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2course.config import GPTConfig
from gpt2course.kv_cache import KVCache


def attention_weights(q_BHTD: Tensor, k_BGSD: Tensor, mask_TS: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)), with hidden keys at exactly zero weight (Vaswani et al. 2017, eq. 1).

    Query head h reads key head h // (H // G), which is `repeat_interleave`, not `repeat` (Ainslie et al. 2023,
    arXiv:2305.13245). A query that may see nothing, such as padding, gets all-zero weights instead of NaN.

    Args:
        q_BHTD: (B, H, T, D) queries.
        k_BGSD: (B, G, S, D) keys; G divides H.
        mask_TS: bool, broadcastable to (B, H, T, S), True where the key is visible; None lets every query see all keys.

    Returns:
        (B, H, T, S) weights; each row sums to one, or to zero where nothing is visible.
    """
    k_BHSD = k_BGSD.repeat_interleave(q_BHTD.shape[1] // k_BGSD.shape[1], dim=1)
    scores_BHTS = q_BHTD @ k_BHSD.transpose(-2, -1) / math.sqrt(q_BHTD.shape[-1])
    if mask_TS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_TS, -math.inf)
    # A row of -inf would give NaN in softmax, so its maximum is taken as zero: exp(-inf) is then zero everywhere.
    top_BHT1 = scores_BHTS.amax(dim=-1, keepdim=True).detach()
    exp_BHTS = torch.exp(scores_BHTS - top_BHT1.masked_fill(top_BHT1 == -math.inf, 0.0))
    # A row that sees anything has exp(0) = 1 in its sum, so the clamp changes only 0/0 into 0/1.
    return exp_BHTS / exp_BHTS.sum(dim=-1, keepdim=True).clamp(min=1.0)


def attend_reference(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_TS: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Attention by hand: the weighted mean of the values. Shapes as in `attention_weights`; returns (B, H, T, D)."""
    weights_BHTS = F.dropout(attention_weights(q_BHTD, k_BGSD, mask_TS), p=dropout, training=dropout > 0)
    v_BHSD = v_BGSD.repeat_interleave(q_BHTD.shape[1] // v_BGSD.shape[1], dim=1)
    return weights_BHTS @ v_BHSD


def attend(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask_TS: Tensor | None,
    backend: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """The one place that chooses how attention is computed.

    Args:
        q_BHTD, k_BGSD, v_BGSD: queries, keys, values; G divides H.
        mask_TS: bool, broadcastable to (B, H, T, S), True where visible. None means plain causal attention over T = S
            keys, which the fused kernel knows without being shown a mask.
        backend: "reference" by hand, "sdpa" torch's fused kernel, "auto" (sdpa).
        dropout: probability of dropping a weight.

    Returns:
        (B, H, T, D).

    Raises:
        ValueError: for another backend, or if mask is None and T differs from S.
    """
    T, S = q_BHTD.shape[2], k_BGSD.shape[2]
    if mask_TS is None and T != S:
        raise ValueError(f"causal attention without a mask needs as many queries as keys, not {T} and {S}")
    if backend == "reference":
        if mask_TS is None:
            mask_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device).tril()
        return attend_reference(q_BHTD, k_BGSD, v_BGSD, mask_TS, dropout)
    if backend not in ("auto", "sdpa"):
        raise ValueError(f"attention backend {backend!r} is unknown; use auto, reference or sdpa")
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BGSD,
        v_BGSD,
        attn_mask=mask_TS,
        dropout_p=dropout,
        is_causal=mask_TS is None,
        enable_gqa=q_BHTD.shape[1] != k_BGSD.shape[1],
    )


class Attention(nn.Module):
    """Multi-head causal self-attention; with n_kv_head < n_head grouped-query, with a window sliding.

    `c_attn` makes queries, keys and values in one product: (H + 2 G) x D outputs, in that order, as GPT-2 stores them.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = (config.n_head + 2 * config.kv_heads) * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def qkv(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys (B, G, T, D) and values (B, G, T, D) of the input (B, T, C)."""
        B, T, _ = x_BTC.shape
        H, G, D = self.config.n_head, self.config.kv_heads, self.config.head_dim
        q, k, v = self.c_attn(x_BTC).split([H * D, G * D, G * D], dim=2)
        return (
            q.view(B, T, H, D).transpose(1, 2),
            k.view(B, T, G, D).transpose(1, 2),
            v.view(B, T, G, D).transpose(1, 2),
        )

    def forward(self, x_BTC: Tensor, mask_TS: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Mix information between positions. (B, T, C) to (B, T, C).

        Args:
            x_BTC: the normalised residual stream.
            mask_TS: bool, broadcastable to (B, H, T, S); None means causal over these T positions.
            cache: keys and values of the past, extended in place; its `extend` must have been called for this pass.
        """
        q_BHTD, k_BGSD, v_BGSD = self.qkv(x_BTC)
        if cache is not None:
            k_BGSD, v_BGSD = cache.store(self.layer, k_BGSD, v_BGSD)
        dropout = self.config.dropout if self.training else 0.0
        y_BHTD = attend(q_BHTD, k_BGSD, v_BGSD, mask_TS, self.config.attention_backend, dropout)
        y_BTC = y_BHTD.transpose(1, 2).reshape(x_BTC.shape)
        return self.resid_dropout(self.c_proj(y_BTC))
