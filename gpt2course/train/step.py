"""One optimizer step, the same for every strategy: micro-batches, one global mean, one true norm, one agreement.

Legend: B rows of this process, b rows of a micro-batch, T positions.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gpt2course.loss import IGNORE
from gpt2course.train.metrics import PhaseClock
from gpt2course.train.parallel import Strategy


class DivergedError(ValueError):
    """Loss or gradient are no longer finite, and training ended. The weights are those of the last good step."""


@dataclass
class LossScale:
    """The factor that keeps float16 gradients from vanishing (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

    A gradient that overflowed halves it, and its step is skipped; `patience` good steps in a row double it. A factor
    of 1 that never moves stands for float32 and bfloat16, which need none.
    """

    factor: float = 1.0
    good_steps: int = 0
    moves: bool = False
    patience: int = 2000

    @classmethod
    def for_precision(cls, precision: str) -> "LossScale":
        """65,536 at the start for fp16, else 1 for good."""
        return cls(65536.0, moves=True) if precision == "fp16" else cls()

    def update(self, overflowed: bool) -> None:
        """After each step."""
        if not self.moves:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.factor /= 2
        elif self.good_steps == self.patience:
            self.factor, self.good_steps = self.factor * 2, 0


def micro_batches(x_BT: Tensor, y_BT: Tensor, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of a process in n runs whose lengths differ by at most one.

    An empty run becomes one row with nothing to predict: its loss and gradients are 0, and this process takes part in
    every collective of the others, which would wait for it for ever.
    """
    B = len(x_BT)
    for i in range(n):
        rows = slice(B * i // n, B * (i + 1) // n)
        x_bT, y_bT = x_BT[rows], y_BT[rows]
        if not len(x_bT):
            x_bT, y_bT = x_BT.new_zeros(1, x_BT.shape[1]), y_BT.new_full((1, y_BT.shape[1]), IGNORE)
        yield x_bT, y_bT


def compute_gradients(
    strategy: Strategy, x_BT: Tensor, y_BT: Tensor, grad_accum_steps: int, factor: float, clock: PhaseClock
) -> tuple[float, int]:
    """Forward and backward over the micro-batches of this process. Afterwards gradients are those of the global mean.

    The loss of a micro-batch is its sum over the number of valid tokens of ALL processes and micro-batches. A mean a
    micro-batch, averaged, would weigh the tokens of a short row more than others.

    Args:
        strategy: whose model it is.
        x_BT, y_BT: the rows of this process, int64; y is -100 where nothing is to be predicted.
        grad_accum_steps: micro-batches to cut them into.
        factor: the loss is multiplied by it (for float16).
        clock: told when a phase ends.

    Returns:
        this process's share of the loss (the shares of all add up to the mean), and the global number of valid tokens.
    """
    device = strategy.world.device
    n_valid = int(strategy.world.sum(float((y_BT != IGNORE).sum()))[0])
    # In float64, which MPS lacks: so the log does not show in which order processes and micro-batches are summed.
    share = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    clock.mark("other")
    for i, (x_bT, y_bT) in enumerate(micro_batches(x_BT, y_BT, grad_accum_steps)):
        x_bT, y_bT = x_bT.to(device, non_blocking=True), y_bT.to(device, non_blocking=True)
        with strategy.accumulate(i == grad_accum_steps - 1):
            with strategy.autocast():
                loss = strategy.model(x_bT, y_bT, reduction="sum") / max(1, n_valid)
            clock.mark("forward")
            (loss * factor).backward()
        share += loss.detach()
        clock.mark("backward")
    return share.item(), n_valid


def global_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The norm of all gradients of all processes as one vector, the same number on each of them.

    Under FSDP each process has the gradients of its shards only; clipping each by its own norm would turn the whole.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def apply_gradients(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], norm: float, clip: float) -> None:
    """Clip to the global norm and step. A clip of 0 leaves the gradients as they are."""
    if clip:
        total = torch.tensor(norm, device=parameters[0].device)
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, total)
    optimizer.step()


def unscale(parameters: list[nn.Parameter], factor: float) -> None:
    """Take a loss scale out of the gradients again, before anything is measured on them."""
    if factor != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / factor)


def finite(*numbers: float) -> bool:
    """True if every number is neither infinite nor NaN."""
    return all(map(math.isfinite, numbers))
