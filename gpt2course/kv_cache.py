"""Keys and values of the past, kept so that decoding need not compute them again. Made outside the model.

A layer that sees all of the past keeps every position. A layer with a window keeps a ring: position p lies in slot
p mod window, over the one that has just gone out of sight, so its memory does not grow with the text.

Legend: B batch, T new positions, S stored positions, G key/value heads, D head width, N slots of a layer.
"""

import torch
from torch import Tensor

from gpt2course.config import GPTConfig


def layer_slots(config: GPTConfig, layer: int, capacity: int | None = None) -> int:
    """How many positions the cache keeps in one layer: window + sinks, or, without a window, `capacity`."""
    window = config.layer_window(layer)
    return (config.block_size if capacity is None else capacity) if window is None else window + config.sinks


def cache_bytes(config: GPTConfig, batch_size: int = 1, capacity: int | None = None, bytes_per_number: int = 4) -> int:
    """Bytes of a cache: 2 (keys and values) x B x n_kv_head x head_dim x bytes a number x slots of all layers."""
    slots = sum(layer_slots(config, layer, capacity) for layer in range(config.n_layer))
    return 2 * batch_size * config.kv_heads * config.head_dim * bytes_per_number * slots


class KVCache:
    """The cache of one batch, a full one or a ring for each layer, as the config's window says.

    Use: `extend` once a pass, before any layer runs; `key_positions` says where the keys are that each layer's `store`
    will give. Under `torch.no_grad()` or `inference_mode()`, or the graph of every token ever fed is kept as well.

    Attributes:
        k, v: a (B, G, N, D) tensor for each layer.
        length: how many positions have been fed, padding included.
        plain: whether every row has the positions 0, 1, 2 … so far, without padding.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int = 1,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make an empty cache.

        Args:
            config: of the model.
            batch_size: B.
            capacity: most positions that can be fed; by default block_size. Where every layer has a window the cache
                never fills up, and capacity means nothing.
            device, dtype: as the keys are.
        """
        self.capacity = config.block_size if capacity is None else capacity
        if self.capacity < 1 or batch_size < 1:
            raise ValueError(f"capacity {self.capacity} and batch_size {batch_size} must each be at least 1")
        shapes = [
            (batch_size, config.kv_heads, layer_slots(config, layer, self.capacity), config.head_dim)
            for layer in range(config.n_layer)
        ]
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.length, self.plain = 0, True
        self._last_B1 = torch.full((batch_size, 1), -1, device=device)
        self._windows = [config.layer_window(layer) for layer in range(config.n_layer)]
        # Layers of one window put the same positions into the same slots.
        self._slots: dict[int | None, _Full | _Ring] = {
            window: _Full(batch_size, self.capacity, device)
            if window is None
            else _Ring(batch_size, window, config.sinks, device)
            for window in set(self._windows)
        }

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(x.nbytes for x in [*self.k, *self.v])

    def check_batch(self, B: int) -> None:
        """Raises ValueError if the cache was made for another number of rows."""
        if self._last_B1.shape[0] != B:
            raise ValueError(f"the cache was made for a batch of {self._last_B1.shape[0]}, these are {B} rows")

    def next_positions(self, T: int) -> Tensor:
        """(B, T) the positions that follow each row's last one."""
        return self._last_B1 + 1 + torch.arange(T, device=self._last_B1.device)

    def extend(self, pos_BT: Tensor, plain: bool = False) -> None:
        """Reserve slots for T new positions, once per forward pass and before any layer runs.

        Args:
            pos_BT: ascending by one in each row; -1 is padding, at the start of a row only.
            plain: the caller knows that no row has padding and all go on from `length`. A GPU need not be asked then.

        Raises:
            ValueError: if the batch differs, or a full layer's cache would overflow; the cache is as it was.
        """
        B, T = pos_BT.shape
        self.check_batch(B)
        if None in self._slots and self.length + T > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions, {self.length} are used and {T} more do not fit; "
                "make it with a larger capacity"
            )
        self.plain = self.plain and plain
        for slots in self._slots.values():
            slots.extend(pos_BT, self.length, self.plain)
        self.length += T
        if T:
            self._last_B1 = pos_BT[:, -1:]

    def key_positions(self, layer: int) -> Tensor:
        """(B, S) positions of the keys that `store` gives in this pass; -1 where there is none."""
        return self._slots[self._windows[layer]].seen_BS

    def store(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values into the slots `extend` reserved.

        Returns:
            the keys and the values to attend over, each (B, G, S, D), the new ones among them.
        """
        slots = self._slots[self._windows[layer]]
        return slots.store(self.k[layer], k_BGTD), slots.store(self.v[layer], v_BGTD)


class _Full:
    """Slots of the layers that keep every position: column after column."""

    def __init__(self, batch_size: int, capacity: int, device: torch.device | str | None) -> None:
        self.pos_BN = torch.full((batch_size, capacity), -1, dtype=torch.long, device=device)
        self.new = slice(0, 0)

    @property
    def seen_BS(self) -> Tensor:
        return self.pos_BN[:, : self.new.stop]

    def extend(self, pos_BT: Tensor, length: int, plain: bool) -> None:
        self.new = slice(length, length + pos_BT.shape[1])
        self.pos_BN[:, self.new] = pos_BT

    def store(self, kept_BGND: Tensor, new_BGTD: Tensor) -> Tensor:
        kept_BGND[:, :, self.new] = new_BGTD
        return kept_BGND[:, :, : self.new.stop]


class _Ring:
    """Slots of the layers with a window: the sinks' first, then position p in slot sinks + (p - sinks) mod window.

    Several new positions at once see each other and the old ring, so the keys to attend over are old and new together,
    and the ring is written after: overwriting first would take keys from the chunk's first queries.
    """

    def __init__(self, batch_size: int, window: int, sinks: int, device: torch.device | str | None) -> None:
        self.window, self.sinks = window, sinks
        self.pos_BN = torch.full((batch_size, window + sinks), -1, dtype=torch.long, device=device)
        self.seen_BS = self.pos_BN[:, :0]
        self.one: int | None = None
        self.first = False

    def extend(self, pos_BT: Tensor, length: int, plain: bool) -> None:
        N, T = self.pos_BN.shape[1], pos_BT.shape[1]
        self.first = length == 0
        if plain and T == 1 and not self.first:
            # A single new position takes the slot of the one that it puts out of sight, so nothing needs to be copied.
            self.one = length if length < self.sinks else self.sinks + (length - self.sinks) % self.window
            self.pos_BN[:, self.one] = pos_BT[:, 0]
            self.seen_BS = self.pos_BN[:, : length + 1]
            return
        self.one = None
        is_sink_BT = pos_BT < self.sinks
        stays_BT = (pos_BT >= 0) & (is_sink_BT | (pos_BT > pos_BT[:, -1:] - self.window))
        slot_BT = torch.where(is_sink_BT, pos_BT, self.sinks + (pos_BT - self.sinks) % self.window)
        slot_BT = torch.where(stays_BT, slot_BT, N)  # what the chunk itself puts out of sight goes to a slot too many
        place_BT = N + torch.arange(T, device=pos_BT.device).expand_as(slot_BT)
        # For each slot the place, in the row of old slots and new positions, of what it holds next.
        old_BN = torch.arange(N + 1, device=pos_BT.device).repeat(len(pos_BT), 1)
        self.source_BN = old_BN.scatter(1, slot_BT, place_BT)[:, :N]
        every_BS = torch.cat([self.pos_BN, pos_BT], dim=1)
        self.seen_BS = pos_BT if self.first else every_BS
        self.pos_BN.copy_(every_BS.gather(1, self.source_BN))  # in place: it may be used in another mode

    def store(self, kept_BGND: Tensor, new_BGTD: Tensor) -> Tensor:
        if self.one is not None:
            kept_BGND[:, :, self.one] = new_BGTD[:, :, 0]
            return kept_BGND[:, :, : self.seen_BS.shape[1]]
        every_BGSD = torch.cat([kept_BGND, new_BGTD], dim=2)
        kept_BGND.copy_(every_BGSD.gather(2, self.source_BN[:, None, :, None].expand_as(kept_BGND)))
        return new_BGTD if self.first else every_BGSD
