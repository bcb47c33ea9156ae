"""Keys and values of the past, kept so that decoding need not compute them again. Made outside the model.

Legend: B batch, T new positions, S stored positions, G key/value heads, D head width.
"""

import torch
from torch import Tensor

from gpt2course.config import GPTConfig


class KVCache:
    """A full cache: room for `capacity` positions in every layer.

    Memory: 2 (keys and values) x n_layer x B x n_kv_head x capacity x head_dim elements.

    Attributes:
        k_LBGSD, v_LBGSD: the stored keys and values.
        pos_BS: (B, capacity) absolute position of each slot, -1 for empty or padding.
        length: how many slots are in use.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int = 1,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.capacity = config.block_size if capacity is None else capacity
        if self.capacity < 1 or batch_size < 1:
            raise ValueError(f"capacity {self.capacity} and batch_size {batch_size} must each be at least 1")
        shape = (config.n_layer, batch_size, config.kv_heads, self.capacity, config.head_dim)
        self.k_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBGSD = torch.zeros(shape, device=device, dtype=dtype)
        self.pos_BS = torch.full((batch_size, self.capacity), -1, dtype=torch.long, device=device)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return self.k_LBGSD.nbytes + self.v_LBGSD.nbytes

    def extend(self, pos_BT: Tensor) -> Tensor:
        """Reserve slots for T new positions, once per forward pass and before any layer runs.

        Returns:
            (B, length) positions of every key in use, the new ones included.

        Raises:
            ValueError: if the batch differs, or the cache would overflow.
        """
        B, T = pos_BT.shape
        if self.pos_BS.shape[0] != B:
            raise ValueError(f"the cache was made for a batch of {self.pos_BS.shape[0]}, these are {B} rows")
        if self.length + T > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions, {self.length} are used and {T} more do not fit; "
                "make it with a larger capacity"
            )
        self.pos_BS[:, self.length : self.length + T] = pos_BT
        self.length += T
        return self.pos_BS[:, : self.length]

    def store(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values into the slots `extend` reserved.

        Returns:
            all keys and all values so far, each (B, G, length, D).
        """
        start = self.length - k_BGTD.shape[2]
        self.k_LBGSD[layer, :, :, start : self.length] = k_BGTD
        self.v_LBGSD[layer, :, :, start : self.length] = v_BGTD
        return self.k_LBGSD[layer, :, :, : self.length], self.v_LBGSD[layer, :, :, : self.length]
