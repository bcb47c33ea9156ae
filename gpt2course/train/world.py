"""The processes of a run: which one am I, who is with me, and how we part."""

import datetime
import os
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from gpt2course.distributed.way_out import leave

__all__ = ["World", "choose_device", "connect", "guarded", "leave", "own_generators"]

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""environment variable: where torchrun looks for the error of this process"""


@dataclass(frozen=True)
class World:
    """This process among all processes of a run; the default is a process alone."""

    rank: int = 0
    """number of this process, 0 … world_size - 1"""
    world_size: int = 1
    """how many processes train together"""
    local_rank: int = 0
    """number of this process on its machine"""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """True in the one process that writes what is written once."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in float64, the same bits on each. Blocks until all call it."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """One small Python object of every process, by rank, on every process. Blocks until all call it."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process has come here."""
        self.sum(0.0)


def choose_device(device: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of this process: with "auto" a GPU of its own, else Apple's, else the CPU.

    Raises:
        ValueError: for a device that is not here, with what is.
    """
    if device == "auto":
        alone = "WORLD_SIZE" not in os.environ
        device = "cuda" if torch.cuda.is_available() else "mps" if alone and torch.mps.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device is cuda, and torch sees no GPU here; use --device cpu, or ask `gpt2course doctor`")
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}; "
                "start as many processes as GPUs, or use --device cpu"
            )
        return torch.device("cuda", local_rank)
    if device not in ("cpu", "mps"):
        raise ValueError(f"device is {device!r}; it must be auto, cpu, cuda or mps")
    return torch.device(device)


def own_generators(device: torch.device) -> AbstractContextManager[None]:
    """While entered, random numbers may be drawn on the CPU and this device; afterwards its generators are as before.

    Without a list of devices, torch's `fork_rng` keeps the states of all GPUs of a machine, and warns of it.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def connect(device: str = "auto", timeout_s: float = 600.0) -> World:
    """Join the processes that torchrun started, as its environment variables say; alone without them.

    GPUs talk by NCCL. What lies on the CPU, a handful of numbers a step, always goes by gloo.

    Args:
        device: auto, cpu, cuda or mps.
        timeout_s: seconds after which a process that waits for a lost one gives up.
    """
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return World(rank, world_size, local_rank, chosen)


def _recorded(main: Callable[[], None]) -> None:
    """Call main; if it raises, torchrun finds the error's traceback in the file it named, whole or not at all.

    When one process is lost, the others fail as well, and torchrun ends them while they write theirs. Half a file is
    not JSON, on which torchrun itself fails and starts nothing again.
    """
    file = os.environ.get(ERROR_FILE)
    if file is not None:
        os.environ[ERROR_FILE] = f"{file}.part"
    try:
        record(main)()
    finally:
        if file is not None and os.path.exists(f"{file}.part"):
            os.replace(f"{file}.part", file)


def guarded(main: Callable[[], None]) -> NoReturn:
    """Run the body of a process that torchrun started, and end the process: 0, or 1 after an error.

    The error's traceback is kept where torchrun looks for it, so that its summary shows the rank that failed first.
    """
    try:
        _recorded(main)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)
