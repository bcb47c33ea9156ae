"""Small training runs for tests: made data with uneven batches and masked tokens, each strategy, and famous bugs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gpt2course import GPTConfig
from gpt2course.loss import IGNORE
from gpt2course.train import loop, step
from gpt2course.train.config import TrainConfig
from gpt2course.train.data import RunData
from gpt2course.train.parallel import Strategy, ddp, fsdp, single
from gpt2course.train.world import World

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=97)


@dataclass(frozen=True)
class MadeText:
    """Batches of made tokens, a pure function of seed and step; small numbers are frequent, which is soon learned.

    Uneven batches have 8, 5, 7 and 2 rows in turn, so that with several ranks and micro-batches some have no row at
    all; a third of their targets are masked, and of some rows every one.
    """

    uneven: bool = False
    seed: int = 0
    rows: int = 12

    def whole(self, step: int) -> tuple[Tensor, Tensor]:
        """The global batch."""
        draw = torch.Generator().manual_seed(1000 * self.seed + step)
        B = (8, 5, 7, 2)[step % 4] if self.uneven else self.rows
        ids = (torch.rand(B, TINY.block_size + 1, generator=draw) ** 3 * 97).long()
        x, y = ids[:, :-1], ids[:, 1:].clone()
        if self.uneven:
            y[torch.rand(y.shape, generator=draw) < 0.33] = IGNORE
            y[step % B] = IGNORE
        return x, y

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        x, y = self.whole(step)
        rows = slice(len(x) * rank // world_size, len(x) * (rank + 1) // world_size)
        return x[rows], y[rows]


@dataclass(frozen=True)
class RankSeeds(MadeText):
    """Bug: each rank draws data of its own."""

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        return MadeText.batch(replace(self, seed=self.seed + rank), step, rank, world_size)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SkippedRow(MadeText):
    """Bug: the last rank leaves out its last row."""

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        x, y = super().batch(step, rank, world_size)
        return (x[:-1], y[:-1]) if rank == world_size - 1 and world_size > 1 else (x, y)


@dataclass(frozen=True)
class Case:
    """One run."""

    strategy: str = "single"
    grad_accum_steps: int = 1
    uneven: bool = False
    steps: int = 20
    clip: float = 0.5
    mutant: str = ""
    options: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a run did: the same on every rank."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


def strategy_of(case: Case, config: TrainConfig, world: World) -> Strategy:
    """The strategy that a case names."""
    if case.strategy == "hsdp":
        return fsdp(config, world, replicas=2)
    if case.strategy == "fsdp-kept":
        return fsdp(config, world, reshard_after_forward=False)
    return {"single": single, "ddp": ddp, "fsdp": fsdp}[case.strategy](config, world)


def full(tensor: Tensor) -> Tensor:
    """A tensor as it would be on one process, on its own."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def run_case(world: World, case: Case, out: Path) -> Outcome:
    """Train a case; every rank calls it."""
    config = TrainConfig(
        model=TINY,
        out=out,
        steps=case.steps,
        grad_accum_steps=case.grad_accum_steps,
        clip=case.clip,
        learning_rate=3e-3,
        warmup_steps=5,
        save_every=0,
        **dict(case.options),  # type: ignore[arg-type]
    )
    text = {"rank seeds": RankSeeds, "skipped row": SkippedRow}.get(case.mutant, MadeText)(case.uneven)
    strategy = strategy_of(case, config, world)
    with MUTANTS.get(case.mutant, no_mutant)(strategy) as changed:
        result = loop.train(config, changed, RunData(text))
    parameters = {name: full(p) for name, p in strategy.module.named_parameters()}
    return Outcome(result.losses, [row["grad_norm"] for row in result.rows], parameters)


def run_cases(world: World, cases: list[Case], out: Path) -> list[Outcome]:
    """Several in one group of processes."""
    return [run_case(world, case, out / f"{world.world_size}-{i}") for i, case in enumerate(cases)]


@contextmanager
def no_mutant(strategy: Strategy) -> Iterator[Strategy]:
    yield strategy


@contextmanager
def unsynced_accumulation(strategy: Strategy) -> Iterator[Strategy]:
    """Bug: the last micro-batch's gradients are the ones that stay at home."""
    yield replace(strategy, accumulate=lambda last: strategy.accumulate(False))


@contextmanager
def mean_of_means(strategy: Strategy) -> Iterator[Strategy]:
    """Bug: each micro-batch is averaged over its own valid tokens, and the averages are averaged."""
    parts = strategy.world.world_size

    def model(x_bT: Tensor, y_bT: Tensor, reduction: str) -> Tensor:
        n_valid, n_global = (y_bT != IGNORE).sum().clamp(min=1), model.n_valid  # type: ignore[attr-defined]
        return strategy.model(x_bT, y_bT, reduction=reduction) / n_valid * n_global / parts

    def counting(changed: Strategy, x_BT: Tensor, y_BT: Tensor, *rest: object) -> object:
        model.n_valid = changed.world.sum(float((y_BT != IGNORE).sum()))[0]  # type: ignore[attr-defined]
        return original(changed, x_BT, y_BT, *rest)  # type: ignore[arg-type]

    original = step.compute_gradients
    with mock.patch.object(loop, "compute_gradients", counting):
        yield replace(strategy, model=_Called(model, strategy.model))


class _Called(torch.nn.Module):
    """A function in the place of a model."""

    def __init__(self, function: Callable[..., Tensor], model: torch.nn.Module) -> None:
        super().__init__()
        self.function = function
        self.model = model

    def forward(self, *args: Tensor, **kwargs: str) -> Tensor:
        return self.function(*args, **kwargs)


@contextmanager
def local_norm(strategy: Strategy) -> Iterator[Strategy]:
    """Bug: every rank clips by the norm of what it has itself."""

    def of_shards(parameters: list[torch.nn.Parameter]) -> float:
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads).item()

    with mock.patch.object(loop, "global_norm", of_shards):
        yield strategy


@contextmanager
def averaged(strategy: Strategy) -> Iterator[Strategy]:
    """Bug: the gradients of the ranks are averaged although each is already divided by the global count."""
    world = strategy.world

    def shrink(*args: object) -> object:
        out = original(*args)  # type: ignore[arg-type]
        for p in strategy.module.parameters():
            p.grad = p.grad / world.world_size if p.grad is not None else None
        return out

    original = step.compute_gradients
    with mock.patch.object(loop, "compute_gradients", shrink):
        yield strategy


MUTANTS: dict[str, Callable[[Strategy], object]] = {
    "unsynced accumulation": unsynced_accumulation,
    "mean of means": mean_of_means,
    "local norm": local_norm,
    "averaged": averaged,
}
