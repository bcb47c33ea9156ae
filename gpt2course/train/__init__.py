"""Training: one loop, three strategies (one process, DDP, FSDP), checkpoints that survive anything, and a log."""

from gpt2course.train.command import run
from gpt2course.train.config import TrainConfig, parse
from gpt2course.train.data import RunData, load_data
from gpt2course.train.loop import Result, train
from gpt2course.train.parallel import Strategy, ddp, fsdp, single
from gpt2course.train.step import DivergedError
from gpt2course.train.world import World, connect, leave

__all__ = [
    "DivergedError",
    "Result",
    "RunData",
    "Strategy",
    "TrainConfig",
    "World",
    "connect",
    "ddp",
    "fsdp",
    "leave",
    "load_data",
    "parse",
    "run",
    "single",
    "train",
]
