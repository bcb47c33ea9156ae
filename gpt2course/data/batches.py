"""The one batch rule: the global batch of step s is a pure function of (seed, s).

Every strategy and world size cuts the same batch, so their losses are one curve; and a resumed run needs to know one
integer, the step. Legend: B rows of the global batch, T positions.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt2course.data.shards import TokenStream


@lru_cache(maxsize=2)
def _epoch_order(n_windows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(n_windows)


@dataclass(frozen=True)
class Batches:
    """Deterministic global batches over a token stream.

    The stream is cut into windows of T + 1 tokens that overlap by one, so that every token but the first is predicted
    exactly once an epoch; each epoch visits the windows in an order of its own. At most T - 1 tokens at the end are
    left over.

    Raises:
        ValueError: if the stream is shorter than one window, or a size is below 1.
    """

    stream: TokenStream
    batch_size: int
    """B, rows of the global batch over all processes"""
    block_size: int
    """T, positions a row"""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.block_size < 1:
            raise ValueError(f"batch_size {self.batch_size} and block_size {self.block_size} must each be at least 1")
        if self.n_windows < 1:
            raise ValueError(
                f"{len(self.stream):,} tokens are too few for one window of block_size {self.block_size} + 1; "
                "use a larger corpus or a smaller block_size"
            )

    @property
    def n_windows(self) -> int:
        """Windows an epoch."""
        return (len(self.stream) - 1) // self.block_size

    def window_ids(self, step: int) -> list[int]:
        """Which window each of the B rows of a step reads."""
        first = step * self.batch_size
        rows = []
        for i in range(first, first + self.batch_size):
            epoch, slot = divmod(i, self.n_windows)
            rows.append(int(_epoch_order(self.n_windows, self.seed, epoch)[slot]))
        return rows

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """This rank's rows of the global batch: ranks take consecutive runs, whose lengths differ by at most one.

        Returns:
            inputs and targets, each (b, T) int64 with b rows, targets one token ahead.

        Raises:
            ValueError: for a rank outside 0 … world_size - 1 or a negative step.
        """
        if not 0 <= rank < world_size or step < 0:
            raise ValueError(
                f"rank {rank} of world_size {world_size} at step {step}; need 0 <= rank < world_size, step >= 0"
            )
        begin, end = self.batch_size * rank // world_size, self.batch_size * (rank + 1) // world_size
        T = self.block_size
        rows = [self.stream.read(w * T, w * T + T + 1) for w in self.window_ids(step)[begin:end]]
        block = torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, T + 1))
        return block[:, :-1], block[:, 1:]
