"""A tiny run as torchrun starts it, for tests that kill its processes: made data, dropout, held-out losses."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gpt2course.train import RunData, TrainConfig, World, run, train
from tests.distributed.made_runs import TINY, Case, MadeText, strategy_of
from tests.distributed.resume_runs import HELD_OUT


@dataclass(frozen=True)
class Config(TrainConfig):
    """A tiny run."""

    strategy: Literal["single", "ddp", "fsdp"] = "ddp"
    out: Path = Path("runs/faults")
    steps: int = 24
    learning_rate: float = 3e-3
    warmup_steps: int = 5
    grad_accum_steps: int = 2
    clip: float = 0.5
    save_every: int = 4
    eval_every: int = 6


def main(config: Config, world: World) -> None:
    config = replace(config, model=TINY.with_(dropout=0.1))
    train(config, strategy_of(Case(config.strategy), config, world), RunData(MadeText(), HELD_OUT, "made"))


def undisturbed(world: World, config: Config) -> None:
    """The same run, that nobody kills."""
    main(config, world)


if __name__ == "__main__":
    run(main, Config)
