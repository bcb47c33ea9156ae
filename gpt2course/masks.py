"""Which key may a query see? One rule on absolute positions, for training, prefill and decode alike.

Legend: B batch, T query positions, S key positions.
"""

import torch
from torch import Tensor


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None = None) -> Tensor:
    """True where a query may look at a key.

    `visible(q, k) = k >= 0 and k <= q and (window is None or q - k < window)`. A key at position -1 is no key: padding,
    or a cache slot not written yet. `window` counts keys and includes the query's own, as Mistral counts it
    (Jiang et al. 2023, arXiv:2310.06825); FlashAttention's `left=W` would mean W + 1.

    Args:
        q_pos: (..., T) absolute query positions.
        k_pos: (..., S) absolute key positions.
        window: number of visible keys, or None for all of the past.

    Returns:
        (..., T, S) bool.
    """
    q, k = q_pos[..., :, None], k_pos[..., None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen = seen & (q - k < window)
    return seen


def left_padded_positions(lengths: Tensor, T: int) -> Tensor:
    """Positions of a left-padded batch: -1 on the padding, then 0, 1, 2 … on the tokens.

    Args:
        lengths: (B,) number of real tokens in each row.
        T: padded length in tokens.

    Returns:
        (B, T) int64.
    """
    offsets = torch.arange(T, device=lengths.device) - (T - lengths[:, None])
    return offsets.clamp(min=-1)
