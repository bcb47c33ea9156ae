"""One short run of several processes, for test_gloo_traps.py: `gloo_run.py FOLDER WAY_OUT [--die]`, under torchrun.

WAY_OUT is how a process ends: "course" by gpt2course's own way out, "destroy" by taking the group down and no more.
With --die, rank 1 is killed in the first attempt, as soon as all have met.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gpt2course.train.world import World, connect, guarded

STEPS = 5


def train_a_little(world: World, sharded: bool) -> float:
    """Some steps of DDP or FSDP on a model of 1,089 parameters, so that gloo's threads have had work."""
    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    model = fully_shard(model) if sharded else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x_BC = torch.randn(8, 32, generator=torch.Generator().manual_seed(world.rank))
    for _ in range(STEPS):
        loss = model(x_BC).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return world.sum(loss.item())[0]


def main() -> None:
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    world = connect("cpu", timeout_s=60.0)
    if "--die" in sys.argv and attempt == 0:
        world.barrier()
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    train_a_little(world, sharded=attempt % 2 == 1)
    Path(sys.argv[1], f"done-{world.rank}-{attempt}").touch()


if __name__ == "__main__":
    if sys.argv[2] == "destroy":
        main()
        dist.destroy_process_group()
    else:
        guarded(main)
