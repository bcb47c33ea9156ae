"""Training runs in several parts: stopped at a step and gone on with, by the same processes or others; and famous bugs.

A leg is one start of a run, up to its end or to a stop. Legs with the same folder are parts of one run.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from gpt2course.data import TokenStream
from gpt2course.train import loop
from gpt2course.train.checkpoint import tensors
from gpt2course.train.config import TrainConfig
from gpt2course.train.data import RunData
from gpt2course.train.optim import learning_rate_at
from gpt2course.train.world import World
from tests.distributed.made_runs import TINY, Case, MadeText, full, strategy_of

STEPS = 20
SAME = ("step", "loss", "grad_norm", "lr", "tokens", "skipped", "val_loss")
"""of a row of the log: all that does not measure time or space"""
HELD_OUT = TokenStream([(np.random.default_rng(0).random(16 * 7 + 1) ** 3 * 97).astype("<u2")])
"""seven windows of 16 tokens"""


@dataclass(frozen=True)
class Leg:
    """One start of a run."""

    run: str
    """folder"""
    strategy: str = "single"
    until: int | None = None
    """SIGTERM comes in time to stop after this step; None goes on to the end"""
    grad_accum_steps: int = 1
    uneven: bool = False
    dropout: float = 0.1
    mutant: str = ""
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Part:
    """What a leg did, as one process saw it."""

    first_step: int
    rows: list[dict[str, Any]]
    stopped: str
    checkpoint: str
    state: dict[str, Tensor]
    """weights and Adam's averages after it, whole"""


def settings(out: Path, **changes: Any) -> TrainConfig:
    """A tiny run."""
    usual: dict[str, Any] = {
        "model": TINY,
        "steps": STEPS,
        "clip": 0.5,
        "learning_rate": 3e-3,
        "warmup_steps": 5,
        "save_every": 0,
        "eval_every": 5,
        "eval_tokens": 1000,
    }
    return TrainConfig(out=out, **{**usual, **changes})


def run_leg(world: World, leg: Leg, folder: Path) -> Part:
    """Train a leg; every process calls it."""
    config = settings(
        folder / leg.run,
        model=TINY.with_(dropout=leg.dropout),
        grad_accum_steps=leg.grad_accum_steps,
        **dict(leg.options),
    )

    def stop_in_time(row: dict[str, Any]) -> None:
        if leg.until is not None and row["step"] == leg.until - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    strategy = strategy_of(Case(leg.strategy), config, world)
    with MUTANTS[leg.mutant](), mock.patch.object(loop, "make_optimizer", Keep(loop.make_optimizer)) as made:
        result = loop.train(config, strategy, RunData(MadeText(leg.uneven), HELD_OUT, "made"), on_step=stop_in_time)
    return Part(
        result.first_step,
        [{key: row[key] for key in SAME if key in row} for row in result.rows],
        result.stopped,
        result.checkpoint.name if result.checkpoint else "",
        {name: full(t) for name, t in tensors(strategy.module, made.last).items()},
    )


def run_legs(world: World, legs: list[Leg], folder: Path) -> list[Part]:
    """One after another, in one group of processes."""
    return [run_leg(world, leg, folder) for leg in legs]


class Keep:
    """A function that keeps what it returned last."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.last: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.last = self.function(*args, **kwargs)
        return self.last


# Bugs of runs that go on


def after_restore(change: Callable[[loop.Training], None]) -> Callable[[], mock._patch]:
    """Something that goes wrong when a checkpoint is loaded."""
    original = loop.Training.restore

    def restore(self: loop.Training) -> None:
        original(self)
        change(self)

    return lambda: mock.patch.object(loop.Training, "restore", restore)


@dataclass(frozen=True)
class FromTheFirst:
    """Bug: each start begins with the first batch."""

    text: Any
    first_step: int

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        return self.text.batch(step - self.first_step, rank, world_size)  # type: ignore[no-any-return]


def forget_position(training: loop.Training) -> None:
    training.data = RunData(FromTheFirst(training.data.train, training.step), training.data.val, "made")


def forget_averages(training: loop.Training) -> None:
    training.optimizer.state.clear()


def schedule_restarted() -> mock._patch:
    """Bug: the learning rate is a function of the steps since this start."""

    def learning_rate(self: loop.Training) -> float:
        c = self.config
        return learning_rate_at(
            self.step - self.first_step, steps=c.steps, peak=c.learning_rate, warmup_steps=5, final_fraction=0.1
        )

    return mock.patch.object(loop.Training, "learning_rate", learning_rate)


@contextmanager
def seeded_once() -> Iterator[None]:
    """Bug: each process seeds dropout by its rank when it starts, and no checkpoint has its generator's state."""
    streams: dict[int, torch.Generator] = {}

    def step_seed(seed: int, step: int, rank: int) -> int:
        stream = streams.setdefault(rank, torch.Generator().manual_seed(rank))
        return int(torch.randint(2**62, (), generator=stream))

    with mock.patch.object(loop, "step_seed", step_seed):
        yield


MUTANTS: dict[str, Callable[[], Any]] = {
    "": nullcontext,
    "data position lost": after_restore(forget_position),
    "averages lost": after_restore(forget_averages),
    "schedule restarted": schedule_restarted,
    "dropout seeded once, by rank": seeded_once,
}
