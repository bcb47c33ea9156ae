"""The text of a run: where its batches come from, on every process the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from gpt2course.data import Batches, Prepared, TokenStream, prepare
from gpt2course.train.config import TrainConfig
from gpt2course.train.world import World


class Steps(Protocol):
    """Batches by step and process, such as `gpt2course.data.Batches`."""

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """This process's rows of the global batch: inputs and targets, each (b, T) int64, targets -100 where none."""


@dataclass(frozen=True)
class RunData:
    """What is trained on, and what is held out."""

    train: Steps
    val: TokenStream | None = None
    fingerprint: str = ""
    """of the text of both; batch_size and seed, which a checkpoint has too, say how it is cut"""


def load_data(config: TrainConfig, world: World) -> RunData:
    """The corpus of a run, as token shards, which the first process of each machine makes and the others wait for.

    Raises:
        ValueError, FileNotFoundError: for a corpus that is not there, or too short; on every process.
    """
    error = ""
    if world.local_rank == 0:
        try:
            _open(config.corpus)
        except (ValueError, OSError, ModuleNotFoundError) as problem:
            error = str(problem)
    if errors := [text for text in world.gather(error) if text]:
        raise ValueError(errors[0])
    made = _open(config.corpus)
    batches = Batches(made.stream("train"), config.batch_size, config.model.block_size, config.seed)
    return RunData(batches, made.stream("val"), made.fingerprint)


def _open(corpus: str) -> Prepared:
    folder = Path(corpus)
    return Prepared.open(folder) if (folder / "meta.json").is_file() else prepare(corpus)
