"""Scaled dot-product attention written out, and the one attention module for every variant.

Legend: B batch, T query positions, S key positions, C model width, H query heads, G key/value heads, D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2course import flex
from gpt2course.blocked import blocked_attention
from gpt2course.config import BACKENDS, GPTConfig
from gpt2course.kv_cache import KVCache
from gpt2course.masks import Causal
from gpt2course.rope import Rotation, rotate

Mask = Tensor | Causal | None
CAUSAL = Causal()


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


def choose(q_BHTD: Tensor, mask: Mask, backend: str = "auto", dropout: float = 0.0) -> str:
    """Which path computes this: "reference", "sdpa", "blocked" or "flex". The one place that decides.

    Only a window over a whole sequence longer than it leaves anything to skip. Everything else, padding and passes
    after a cached past among it, goes to torch's fused kernel, whatever faster path was asked for.

    Raises:
        ValueError: for an unknown backend, or one that can't compute this here, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return backend
    T = q_BHTD.shape[2]
    if backend == "sdpa" or not isinstance(mask, Causal) or not mask.hides(T):
        return "sdpa"
    problem = flex.why_not(q_BHTD.device, q_BHTD.dtype, dropout, q_BHTD.shape[-1])
    if backend == "flex" and problem:
        raise ValueError(f"attention backend 'flex' can't be used here: {problem}; use auto or blocked")
    if backend == "auto":
        return "flex" if problem is None else "blocked"
    return backend


def attend(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: Mask,
    backend: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """Attention by the path that `choose` names.

    Args:
        q_BHTD, k_BGSD, v_BGSD: queries, keys, values; G divides H.
        mask: bool, broadcastable to (B, H, T, S), True where visible; `Causal`, for as many queries as keys at the same
            positions; or None where every query sees every key.
        backend: "reference", "sdpa", "blocked", "flex" or "auto".
        dropout: probability of dropping a weight.

    Returns:
        (B, H, T, D).

    Raises:
        ValueError: as `choose`, or if mask is `Causal` and T differs from S.
    """
    (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    if isinstance(mask, Causal) and T != S:
        raise ValueError(f"causal attention over whole sequences needs as many queries as keys, not {T} and {S}")
    path = choose(q_BHTD, mask, backend, dropout)
    if isinstance(mask, Causal):
        if path == "blocked":
            assert mask.window is not None
            return blocked_attention(q_BHTD, k_BGSD, v_BGSD, mask.window, mask.sinks, dropout)
        if path == "flex":
            return flex.flex_window(q_BHTD, k_BGSD, v_BGSD, mask)
        is_causal = path == "sdpa" and not mask.hides(T)
        mask_TS = None if is_causal else mask.mask(T, q_BHTD.device)
    else:
        is_causal, mask_TS = False, mask
    if path == "reference":
        return attend_reference(q_BHTD, k_BGSD, v_BGSD, mask_TS, dropout)
    if T == 1 and H != G and (mask_TS is None or mask_TS.ndim < 3 or mask_TS.shape[-3] == 1):
        # Decoding reads every key to do little with it. The query heads of a group become the queries of one head, so
        # that each key is read once for all of them, and not once for each.
        folded_BGRD = q_BHTD.reshape(B, G, H // G, D)
        return F.scaled_dot_product_attention(folded_BGRD, k_BGSD, v_BGSD, mask_TS, dropout).reshape(B, H, 1, D)
    return F.scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, attn_mask=mask_TS, dropout_p=dropout, is_causal=is_causal, enable_gqa=H != G
    )


class Attention(nn.Module):
    """Multi-head causal self-attention; with n_kv_head < n_head grouped-query, with a window sliding, with rope turned.

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

    def rotated_qkv(self, x_BTC: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `qkv`, with queries and keys turned to their positions; None turns nothing."""
        q_BHTD, k_BGTD, v_BGTD = self.qkv(x_BTC)
        if rotation is not None:
            q_BHTD, k_BGTD = (rotate(x, rotation.cos, rotation.sin, rotation.layout) for x in (q_BHTD, k_BGTD))
        return q_BHTD, k_BGTD, v_BGTD

    def forward(
        self, x_BTC: Tensor, mask: Mask = CAUSAL, rotation: Rotation | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Mix information between positions. (B, T, C) to (B, T, C).

        Args:
            x_BTC: the normalised residual stream.
            mask: as in `attend`; by default causal over these T positions.
            rotation: of these T positions; keys are turned before they are cached.
            cache: keys and values of the past, extended in place; its `extend` must have been called for this pass.
        """
        q_BHTD, k_BGSD, v_BGSD = self.rotated_qkv(x_BTC, rotation)
        if cache is not None:
            k_BGSD, v_BGSD = cache.store(self.layer, k_BGSD, v_BGSD)
        dropout = self.config.dropout if self.training else 0.0
        y_BHTD = attend(q_BHTD, k_BGSD, v_BGSD, mask, self.config.attention_backend, dropout)
        y_BTC = y_BHTD.transpose(1, 2).reshape(x_BTC.shape)
        return self.resid_dropout(self.c_proj(y_BTC))
