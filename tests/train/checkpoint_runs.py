"""Small runs to save and load: a GPT with AdamW, for one process and for many."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gpt2course import GPT, GPTConfig
from gpt2course.train.checkpoint import Checkpoints, tensors
from gpt2course.train.optim import make_optimizer
from gpt2course.train.world import World

# Rows that divide by no number of processes, so that the shards are of unequal size.
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=10, block_size=11, vocab_size=97)


class Run:
    """Model and optimizer of one process: kind is single, ddp, fsdp or hsdp (two replicas)."""

    def __init__(self, kind: str = "single", world: World | None = None, config: GPTConfig = CONFIG, seed: int = 0):
        torch.manual_seed(seed)
        self.world = world or World()
        self.module = GPT(config)
        self.model: nn.Module = self.module
        if kind == "ddp":
            self.model = DistributedDataParallel(self.module)
        elif kind != "single":
            size = self.world.world_size
            shape, names = ((size,), ("shard",)) if kind == "fsdp" else ((2, size // 2), ("replicate", "shard"))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for group in [*self.module.h, self.module]:
                fully_shard(group, mesh=mesh)
        self.optimizer = make_optimizer(self.module.parameters())

    def step(self) -> None:
        """One training step on random tokens."""
        idx_BT = torch.randint(97, (2, 9))
        self.model(idx_BT, idx_BT).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, checkpoints: Checkpoints, step: int, val_loss: float | None = None, **more: Any) -> None:
        meta = {"step": step, "tokens": 18 * step, "model": self.module.config.to_dict(), **more}
        checkpoints.save(self.module, self.optimizer, meta, val_loss)

    def full(self) -> dict[str, Tensor]:
        """A copy of every tensor of the run, whole."""
        found = tensors(self.module, self.optimizer)
        return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in found.items()}


def saved(folder: Path, steps: int = 1, val_loss: float | None = None) -> tuple[Run, Path]:
    """A run of one process after some steps, and its checkpoint."""
    run = Run()
    for _ in range(steps):
        run.step()
    checkpoints = Checkpoints(folder)
    run.save(checkpoints, steps, val_loss)
    path = checkpoints.newest()
    assert path is not None
    return run, path


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two runs hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flip(path: Path, at: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)
