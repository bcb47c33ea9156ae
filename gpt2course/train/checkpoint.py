"""Checkpoints of a training run: saved whole or not at all, refused when damaged, loaded by any number of processes.

A save writes to `tmp-step-00000020`, every file synced to the disk and hashed, `state.json` last, and then renames the
folder to `step-00000020`. So a folder of that name is complete, whenever the run was killed. What is saved does not
depend on how many processes trained it: full tensors by name, from which any other number takes its parts.

    checkpoints = Checkpoints(out / "checkpoints", world, keep_last=2)
    if newest := checkpoints.newest():
        meta = checkpoints.load(newest, strategy.module, optimizer)
    ...
    checkpoints.save(strategy.module, optimizer, {"step": 20, "tokens": 1000, "model": config.to_dict()}, val_loss)
"""

import math
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from gpt2course.hub import CheckpointError
from gpt2course.train import checkpoint_io as io
from gpt2course.train.restore import (
    ALONE,
    T,
    adam_step,
    best,
    complete,
    export,
    load,
    load_model,
    lowest,
    newest,
    tensors,
    together,
)
from gpt2course.train.world import World

__all__ = ["CheckpointError", "Checkpoints", "best", "export", "load", "load_model", "newest", "tensors"]


class Checkpoints:
    """The checkpoints of one run, in one folder. Every process calls each method, in the same order."""

    def __init__(self, folder: str | Path, world: World = ALONE, keep_last: int = 2, async_save: bool = False) -> None:
        """Remove what a killed run left half written.

        Args:
            folder: made at the first save.
            world: the processes of the run.
            keep_last: how many of the latest checkpoints stay, at least 1; the one with the lowest validation loss
                stays as well.
            async_save: copy the tensors, return, and write while training goes on.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; it must be at least 1, or a save would delete itself")
        self.folder, self.world, self.keep_last, self.async_save = Path(folder), world, keep_last, async_save
        # Writers that talk while training talks must have a group of their own, or their messages get mixed up.
        self._group = dist.new_group(backend="gloo") if async_save and world.world_size > 1 else None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[Future[dict[str, Any]], dict[str, Any]] | None = None
        self._known: set[int] = set()
        if world.first:
            self._tidy()

    def _tidy(self) -> None:
        for path in self.folder.glob("tmp-step-*"):
            target = self.folder / path.name.removeprefix("tmp-")
            try:
                io.check_sizes(path, io.read_state(path))
                if not target.exists():
                    path.rename(target)  # complete: the run was killed just before this line
            except (CheckpointError, OSError):
                pass
        for path in [*self.folder.glob("tmp-step-*"), *self.folder.glob("old-step-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Path | None:
        """The complete checkpoint with the highest step, as the first process sees it, or None."""
        found: Path | None = self.world.gather(newest(self.folder) if self.world.first else None)[0]
        return found

    def load(self, path: str | Path, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
        """`load`, by all processes of the run."""
        meta = load(path, module, optimizer, self.world)
        if Path(path).resolve().parent == self.folder.resolve():
            self._known.add(meta["step"])
        return meta

    def save(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        meta: dict[str, Any],
        val_loss: float | None = None,
    ) -> None:
        """Save model, optimizer and meta; with `async_save`, begin to.

        A step that this run has saved, or was loaded from, is not saved again. A folder of that step that stems from
        elsewhere is replaced, once the new one is whole.

        Args:
            module, optimizer: as in `tensors`.
            meta: for JSON: "step" and "tokens" so far, "model" (`GPTConfig.to_dict()`), and what else the run wants.
            val_loss: by which the best is chosen; None or not finite is no candidate.

        Raises:
            CheckpointError: on every process, if one could not write; earlier checkpoints are as they were.
        """
        self.wait()
        step = meta["step"]
        if step in self._known:
            return
        found = tensors(module, optimizer)
        kind = io.kind_of(found)
        state = {
            "kind": kind,
            "adam_step": adam_step(module, optimizer),
            "meta": {**meta, "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None},
        }
        tmp = self._tmp(step)
        self._guarded(tmp, self._prepare, tmp)
        job = self._job(tmp, kind, found)
        if self.async_save:
            self._pending = self._writer.submit(job), state
        else:
            self._finish(job, state)

    def ready(self) -> bool:
        """Whether this process has written its part of a save that is under way. Never blocks."""
        return self._pending is not None and self._pending[0].done()

    def commit(self) -> Path | None:
        """Finish the save that is under way, waiting for it if need be: only now is there a checkpoint.

        Returns:
            its path; None if no save was under way.

        Raises:
            CheckpointError: as `save` does.
        """
        if self._pending is None:
            return None
        (future, state), self._pending = self._pending, None
        return self._finish(future.result, state)

    def wait(self) -> None:
        """Finish what is under way: before the end of a run."""
        self.commit()

    def _tmp(self, step: int) -> Path:
        return self.folder / f"tmp-step-{step:08d}"

    def _guarded(self, tmp: Path, what: Callable[..., T], *args: Any) -> T:
        """A part of a save, on all processes; if it fails on one, the half-written folder goes and all raise."""
        try:
            return together(self.world, lambda: what(*args), f"could not save {self.folder / tmp.name[4:]}")
        except CheckpointError as error:
            if self.world.first:
                shutil.rmtree(tmp, ignore_errors=True)
            self.world.barrier()
            raise CheckpointError(
                f"{error}; make room, or choose a folder you may write. Earlier checkpoints are as they were"
            ) from None

    def _finish(self, job: Callable[[], dict[str, Any]], state: dict[str, Any]) -> Path:
        """Write, or wait for the writer; then the state.json, the rename, and what may go."""
        step = state["meta"]["step"]
        tmp, target = self._tmp(step), self.folder / f"step-{step:08d}"
        parts = self.world.gather(self._guarded(tmp, job))
        files = {name: entry for part in parts for name, entry in part.items()}
        self._guarded(tmp, self._publish, tmp, target, {**state, "files": files})
        self._known.add(step)
        if self.world.first:
            self._prune(step)
        self.world.barrier()
        return target

    def _prepare(self, tmp: Path) -> None:
        if self.world.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            if tmp.exists():
                shutil.rmtree(tmp)
            tmp.mkdir()

    def _job(self, tmp: Path, kind: str, found: dict[str, Tensor]) -> Callable[[], dict[str, Any]]:
        """What this process has to write, in a thread if need be: by then the tensors may have changed."""
        write: Callable[[], None]
        if kind == "sharded":
            # The writer's own staging: a copy of each shard in the memory of the CPU.
            copies = dcp.FileSystemWriter(tmp).stage(dict(found)) if self.async_save else found
            write = partial(io.write_sharded, tmp, copies, self._group)
        else:
            mine = found if self.world.first else {}
            copies = {name: t.to("cpu", copy=True) for name, t in mine.items()} if self.async_save else mine
            write = partial(io.write_single, tmp, copies)

        def job() -> dict[str, Any]:
            write()
            return io.seal_mine(tmp, kind, self.world.rank)

        return job

    def _publish(self, tmp: Path, target: Path, state: dict[str, Any]) -> None:
        if not self.world.first:
            return
        if missing := [name for name in state["files"] if not (tmp / name).exists()]:
            raise CheckpointError(f"{target} lacks {missing[0]}; every machine must see one and the same folder")
        io.write_state(tmp, state)
        replaced = self._take_name(target) if target.exists() else None
        tmp.rename(target)
        io.sync(self.folder)
        if replaced:
            shutil.rmtree(replaced, ignore_errors=True)

    def _take_name(self, path: Path) -> Path:
        """Rename what is to be deleted, so that what is half deleted never looks like a checkpoint."""
        gone = path.with_name(f"old-{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        return path.rename(gone)

    def _prune(self, step: int) -> None:
        """Delete what is neither among the latest nor the best. Later steps are of another run, and left alone."""
        found = list(complete(self.folder))
        here = [path for number, path, _ in found if number <= step]
        kept = {*here[: self.keep_last], lowest(found)}
        for path in (path for path in here if path not in kept):
            try:
                shutil.rmtree(self._take_name(path))
            except OSError as error:
                warnings.warn(f"could not delete the old checkpoint {path}: {io.reason(error)}", stacklevel=2)
