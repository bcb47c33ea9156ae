"""Real processes for tests: `run_ranks(fn, world_size, ...)` calls fn in each of them and gives back what they return.

They are forked from a server that has torch imported already, so that a start takes some ten milliseconds, and meet
through a file: no ports, no torchrun (tests of torchrun itself start it).
"""

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpt2course.train.world import World, leave

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch.nn.parallel",
        "torch._dynamo",  # which every optimizer's first step imports, for 0.6 s in each process
        "gpt2course",
        "gpt2course.data",
        "gpt2course.train",
    ]
)


def _body(fn: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    out = Path(folder, f"{rank}.pt")
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        torch.save({"result": fn(World(rank, world_size, rank), *args)}, out)
    except BaseException:
        torch.save({"error": traceback.format_exc()}, out)
        leave(1)
    leave(0)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """What fn(world, *args) returned, by rank; fn must be importable. AssertionError with the ranks' tracebacks."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [CONTEXT.Process(target=_body, args=(fn, rank, world_size, folder, args)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
        late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for rank in late:
            ranks[rank].kill()
            ranks[rank].join()
        found = [
            torch.load(path, weights_only=False) if (path := Path(folder, f"{rank}.pt")).exists() else {}
            for rank in range(world_size)
        ]
    errors = [f"rank {rank}:\n{item['error']}" for rank, item in enumerate(found) if "error" in item]
    errors += [f"rank {rank} was still running after {timeout} s" for rank in late]
    assert not errors, "\n".join(errors)
    codes = [process.exitcode for process in ranks]
    assert codes == [0] * world_size, f"exit codes {codes}"
    return [item["result"] for item in found]
