"""Training runs in which something happens to one process only: a signal, a loss that is not finite."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gpt2course.data import TokenStream
from gpt2course.train import loop
from gpt2course.train.checkpoint import load_model, newest
from gpt2course.train.data import RunData
from gpt2course.train.heldout import held_out_loss
from gpt2course.train.restore import io
from gpt2course.train.step import DivergedError, LossScale
from gpt2course.train.world import World
from tests.distributed.made_runs import Case, MadeText, strategy_of
from tests.distributed.resume_runs import HELD_OUT, settings

VICTIM = 1
AT = 5
"""the first step, counted from 0, in which something happens"""
WINDOWS = (1, 2, 4, 7)
TOO_LARGE = 2.0**24
"""a loss scale at which float16 gradients overflow"""


@dataclass(frozen=True)
class Scene:
    """A run, and what happens in it to process `VICTIM`."""

    strategy: str
    poison: str = ""
    """gradient: loss and gradients are NaN; loss: the loss is infinite and its gradients are as ever"""
    poisoned_steps: int = 1
    begin: int = AT
    """the first of them, counted from this start"""
    signal_at: int | None = None
    each_for_itself: bool = False
    """bug: a process skips a step by what it sees itself"""
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Seen:
    """What one process saw of it."""

    rows: list[dict[str, Any]]
    stopped: str
    checkpoint: str
    error: str
    before: list[list[Tensor]]
    """this process's weights before each step, and after the last"""
    reason: str
    saved_weight: Tensor
    """an entry of the newest checkpoint"""
    whole_weight: list[Tensor]
    """the same entry, whole, before the first poisoned step and at the end"""


@dataclass(frozen=True)
class Watched(MadeText):
    """Batches that note the weights when they are asked for, and send this process a signal."""

    weights: Callable[[], list[Tensor]] = list
    signal_at: int | None = None
    before: list[list[Tensor]] = field(default_factory=list)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        self.before.append(self.weights())
        if step == self.signal_at and rank == VICTIM:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step, rank, world_size)


class Poisoned(nn.Module):
    """A model whose loss is spoilt in some steps, on one process."""

    def __init__(self, model: nn.Module, how: str, now: Callable[[], bool]) -> None:
        super().__init__()
        self.model, self.how, self.now = model, how, now

    def forward(self, *args: Tensor, **kwargs: str) -> Tensor:
        loss: Tensor = self.model(*args, **kwargs)
        if not self.now():
            return loss
        return loss * torch.nan if self.how == "gradient" else loss + torch.inf


@dataclass(frozen=True)
class EachForItself(World):
    """Bug: whether a step is bad is not agreed upon. It is the second of the numbers that end a step."""

    def sum(self, *values: float) -> list[float]:
        total = super().sum(*values)
        return [total[0], float(values[1]), *total[2:]] if len(values) > 2 else total


def run_scene(world: World, scene: Scene, out: Path) -> Seen:
    """Train; every process calls it."""
    config = settings(out, steps=12, eval_every=0, **dict(scene.options))
    strategy = strategy_of(Case(scene.strategy), config, world)
    watched = strategy.module.get_parameter("h.1.mlp.c_fc.weight")

    def weights() -> list[Tensor]:
        found = [p.to_local() if isinstance(p, DTensor) else p for p in strategy.module.parameters()]
        return [p.detach().clone() for p in found]

    def whole() -> Tensor:
        return (watched.full_tensor() if isinstance(watched, DTensor) else watched).detach().clone()

    text = Watched(weights=weights, signal_at=scene.signal_at)

    def now() -> bool:
        return (
            world.rank == min(VICTIM, world.world_size - 1)
            and 0 < len(text.before) - scene.begin <= scene.poisoned_steps
        )

    changed = replace(strategy, model=Poisoned(strategy.model, scene.poison, now)) if scene.poison else strategy
    if scene.each_for_itself:
        changed = replace(changed, world=EachForItself(world.rank, world.world_size, world.local_rank))
    rows: list[dict[str, Any]] = []
    stopped = error = ""
    first = whole()
    log_row = loop.MetricsLog.write

    def keep(self: loop.MetricsLog, row: dict[str, Any]) -> None:
        rows.append(row)
        log_row(self, row)

    with mock.patch.object(loop.MetricsLog, "write", keep):
        try:
            stopped = loop.train(config, changed, RunData(text)).stopped
        except DivergedError as diverged:
            error = str(diverged)
    path = newest(out / "checkpoints")
    assert path is not None
    text.before.append(weights())
    return Seen(
        rows,
        stopped,
        path.name,
        error,
        text.before,
        io.read_state(path)["meta"]["reason"],
        load_model(path).get_parameter("h.1.mlp.c_fc.weight").detach(),
        [first, whole()],
    )


def run_scenes(world: World, scenes: list[Scene], out: Path) -> list[Seen]:
    """One after another."""
    return [run_scene(world, scene, out / str(i)) for i, scene in enumerate(scenes)]


def overflow(world: World, name: str, out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """float16 from too large a loss scale: rows of an undisturbed run, of one in two halves, and its last meta."""

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 11 and "whole" not in str(out_now):
            os.kill(os.getpid(), signal.SIGTERM)

    too_large = classmethod(lambda cls, precision: cls(TOO_LARGE, moves=True))
    found: list[list[dict[str, Any]]] = []
    with mock.patch.object(LossScale, "for_precision", too_large):
        for out_now in (out / "whole", out / "parts", out / "parts"):
            config = settings(out_now, precision="fp16", steps=24)
            strategy = strategy_of(Case(name), config, world)
            found.append(loop.train(config, strategy, RunData(MadeText(), HELD_OUT), on_step=stop).rows)
    path = newest(out / "parts" / "checkpoints")
    assert path is not None
    return found[0], found[1] + found[2], io.read_state(path)["meta"]


def held_out(world: World, name: str) -> list[float]:
    """Held-out losses of the same weights, over so many windows."""
    strategy = strategy_of(Case(name), settings(Path("unused")), world)
    return [held_out_loss(strategy, HELD_OUT, 16, 16 * n, rows=1 + n % 2) for n in WINDOWS]


def all_at_three(world: World, scenes: list[Scene], out: Path) -> dict[str, Any]:
    """Everything that takes three processes, in one launch."""
    return {
        "scenes": run_scenes(world, scenes, out / "scenes"),
        "overflow": {name: overflow(world, name, out / name) for name in ("ddp", "fsdp")},
        "held out": {name: held_out(world, name) for name in ("ddp", "fsdp")},
    }


class Counting(nn.Module):
    """Counts its forward passes: under FSDP each is a collective."""

    count = 0

    def forward(self, x_BT: Tensor, y_BT: Tensor, reduction: str) -> Tensor:
        self.count += 1
        return torch.zeros(())


def one_window_at_a_time(strategy: Any, stream: TokenStream, block_size: int, max_tokens: int, rows: int = 1) -> float:
    """Bug: each process evaluates its own windows, and no more; under FSDP those with more wait for ever."""
    n_windows = max_tokens // block_size
    for window in range(strategy.world.rank, n_windows, strategy.world.world_size):
        x_T = torch.from_numpy(stream.read(window * block_size, window * block_size + block_size).astype("int64"))
        strategy.model(x_T[None], x_T[None], reduction="sum")
    return 0.0
