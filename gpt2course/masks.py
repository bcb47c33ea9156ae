"""Which key may a query see? One rule on absolute positions, for training, prefill and decode alike.

Legend: B batch, T query positions, S key positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """True where a query may look at a key.

    `visible(q, k) = k >= 0 and k <= q and (window is None or q - k < window or k < sinks)`. A key at position -1 is no
    key: padding, or a cache slot not written yet. `window` counts keys and includes the query's own, as Mistral counts
    it (Jiang et al. 2023, arXiv:2310.06825); FlashAttention's `left=W` would mean W + 1. `sinks` keeps the first keys
    in sight for ever (Xiao et al. 2023, arXiv:2309.17453).

    Args:
        q_pos: (..., T) absolute query positions.
        k_pos: (..., S) absolute key positions.
        window: number of visible keys, or None for all of the past.
        sinks: how many of the first keys every later query sees, whatever the window.

    Returns:
        (..., T, S) bool.
    """
    q, k = q_pos[..., :, None], k_pos[..., None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen = seen & ((q - k < window) | (k < sinks))
    return seen


@dataclass(frozen=True)
class Causal:
    """Stands for the mask of T queries over the same T positions, 0 to T - 1, which fast paths need not be shown."""

    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if (self.window is not None and self.window < 1) or self.sinks < 0:
            raise ValueError(f"window is {self.window} and sinks {self.sinks}; they must be at least 1 (or None) and 0")

    def hides(self, T: int) -> bool:
        """Whether the window hides any of the past from T queries."""
        return self.window is not None and self.window < T

    def mask(self, T: int, device: torch.device | str | None = None) -> Tensor:
        """(T, T) bool, by the one rule."""
        pos_T = torch.arange(T, device=device)
        return visible(pos_T, pos_T, self.window, self.sinks)


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
