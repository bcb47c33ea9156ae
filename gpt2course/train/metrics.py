"""What a run tells of itself: the time of each phase, the memory it holds, how well it uses a GPU, and the log.

A row of the log, one a step:

    schema          1
    step            steps done, this one included
    loss            nats per token of the global batch, before the update
    grad_norm       of all gradients of all processes, before clipping
    lr              learning rate of this step
    tokens          predicted so far, by all processes
    tokens_per_s    of all processes, in this step
    seconds         data, forward, backward, communication, optimizer, other, total: of one process (rank 0 in the log);
                    communication is null on CUDA, where it runs beside the rest
    memory          bytes of one process: parameters, gradients, optimizer, peak
    sent            bytes a step that each process sends: ring (at least needed), gloo (what gloo sends for it)
    mfu             share of the GPUs' peak; null where that is unknown
    skipped         steps not taken so far
    val_loss        nats per token of held-out text, in rows of steps after which it was computed
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gpt2course.config import GPTConfig
from gpt2course.flops import training_flops
from gpt2course.train.comm import Waiting
from gpt2course.train.peaks import peak_flops, products_precision
from gpt2course.train.world import World

SCHEMA = 1
PHASES = ("data", "forward", "backward", "communication", "optimizer", "other")
OWN_KEYS = ("step", "seconds", "memory", "sent")
"""what the small file of each process has of a row"""
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class PhaseClock:
    """Where the time of a step goes. `start()`, then `mark(phase)` when a phase ends, then `finish()`.

    On CUDA the marks are events in the GPU's own stream, read once at the end of the step: a clock of the CPU would
    measure how fast work is handed over, not how long it takes.

    Args:
        device: of the computation.
        waiting: what this process waits for the others is taken off the phase it lies in, and is "communication".
    """

    def __init__(self, device: torch.device, waiting: Waiting | None = None) -> None:
        self.cuda = device.type == "cuda"
        self.waiting = waiting
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._begin = self._last = 0.0

    def start(self) -> None:
        """The step begins."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events = []
        if self.waiting is not None:
            self.waiting.take()
        if self.cuda:
            self._event("start")
        self._begin = self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """The time since the last mark belongs to `phase`: data, forward, backward, optimizer or other."""
        if self.cuda:
            self._event(phase)
            return
        waited = (self.waiting.take() or 0.0) if self.waiting is not None else 0.0
        now = time.perf_counter()
        self._seconds[phase] += now - self._last - waited
        self._seconds["communication"] += waited
        self._last = now

    def _event(self, phase: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((phase, event))

    def finish(self) -> dict[str, float | None]:
        """Seconds by phase, which add up to "total"; time after the last mark is "other"."""
        self.mark("other")
        if not self.cuda:
            return {**self._seconds, "total": self._last - self._begin}
        self._events[-1][1].synchronize()
        for (_, before), (phase, event) in zip(self._events, self._events[1:], strict=False):
            self._seconds[phase] += before.elapsed_time(event) / 1000
        total = self._events[0][1].elapsed_time(self._events[-1][1]) / 1000
        alone = self.waiting is None or self.waiting.take() is not None
        return {**self._seconds, "communication": 0.0 if alone else None, "total": total}


def tensor_memory(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state that THIS process holds: of a DTensor its own shard.

    The memory behind the tensors is counted, each piece once: gradients may be views of one bucket, and a sharded
    parameter lies in a piece that is padded to the same size on every process. Buckets that hold copies of the
    gradients (DDP without `gradient_as_bucket_view`) are not seen.
    """
    parameters = list(module.parameters())
    return {
        "parameters": _held(parameters),
        "gradients": _held(p.grad for p in parameters if p.grad is not None),
        "optimizer": _held(t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)),
    }


def _held(tensors: Iterable[Tensor]) -> int:
    pieces = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        pieces[storage.data_ptr()] = 0 if local.is_meta else storage.nbytes()
    return sum(pieces.values())


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: on CUDA of its tensors, else all of the process (its resident size)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def mfu(config: GPTConfig, tokens_per_s: float, T: int, world: World, precision: str) -> float | None:
    """Model FLOPs utilisation: arithmetic that the model needs, over what the GPUs could do at best.

    Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), appendix B; attention is counted by what a query sees, so a window
    makes it less. What activation checkpointing computes twice counts once.

    Args:
        config: of the model.
        tokens_per_s: of all processes.
        T: length of the sequences, in tokens.
        world: the processes, each with a device of this kind.
        precision: fp32, bf16 or fp16.

    Returns:
        a share of 1; None where the peak is unknown, as on a CPU.
    """
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device), products_precision(precision))
    return None if peak is None else training_flops(config, T) / T * tokens_per_s / (peak * world.world_size)


class MetricsLog:
    """The log of a run: rank 0 writes a row a step, and every process a small file with what is its own.

    Lines of JSON; `metrics.jsonl` has beside it `metrics-rank00000.jsonl`, `metrics-rank00001.jsonl` and so on. Each
    row is one write to the end of the file, so that a reader meanwhile sees whole rows, and a killed process leaves
    half a row at most. NaN and infinities, which JSON lacks, are the strings "nan", "inf" and "-inf"; `read` gives
    numbers back.

    Args:
        path: of rank 0's file.
        world: the processes.
        resume_step: the step of the checkpoint that the run goes on from: rows after it are dropped, since these steps
            will be done again. None begins new files.
        tensorboard: folder for TensorBoard's files of rank 0, or None.

    Raises:
        ValueError: if TensorBoard is wanted and not installed, or the log is of another version.
    """

    def __init__(
        self, path: Path, world: World, resume_step: int | None = None, tensorboard: Path | None = None
    ) -> None:
        self.path, self.world = path, world
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = [rank_path(path, world.rank)]
        if world.first:
            mine = [path, *mine]
            gone = (other for other in path.parent.iterdir() if (_rank_of(path, other) or 0) >= world.world_size)
            for other in gone:  # of a process that an earlier start of the run had, with more processes
                _keep_up_to(other, resume_step)
        for file in mine:
            _keep_up_to(file, resume_step)
        self._files: list[BinaryIO] = [file.open("ab", buffering=0) for file in mine]
        self._board = _board(tensorboard, resume_step) if tensorboard is not None and world.first else None

    def write(self, row: dict[str, Any]) -> None:
        """Add the row of a step; it must have "step". Every process calls it with its own seconds and memory."""
        own = {key: row[key] for key in OWN_KEYS if key in row}
        for file, part in zip(self._files, [row, own] if self.world.first else [own], strict=True):
            line = json.dumps({"schema": SCHEMA, **_valid(part)}, allow_nan=False).encode() + b"\n"
            try:
                cut = "" if file.write(line) == len(line) else "a row was cut short"
            except OSError as error:  # which does not name the file
                cut = error.strerror or str(error)
            if cut:
                raise OSError(f"{file.name}: {cut}; the disk may be full, free some space and resume")
        if self._board is not None:
            for name, value in _flat(row):
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def rank_path(path: Path, rank: int) -> Path:
    """The small file of one process, beside the log: metrics.jsonl, metrics-rank00001.jsonl."""
    return path.with_name(f"{path.stem}-rank{rank:05d}{path.suffix}")


def _rank_of(path: Path, other: Path) -> int | None:
    found = re.fullmatch(rf"{re.escape(path.stem)}-rank(\d{{5}}){re.escape(path.suffix)}", other.name)
    return int(found[1]) if found else None


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, or of the small file of one process, in the order they were written.

    Half a row at the end, of a process that was killed or is writing now, is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a line elsewhere that is no row, or a log of another version; with its number.
    """
    return [_numbers(row) for row, _ in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each row and its line, without the end of the line."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number}: {line[:60]!r} is no row of a log; remove the line") from None
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            found = row.get("schema") if isinstance(row, dict) else None
            raise ValueError(
                f"{path}, line {number}: schema is {found}, this version of gpt2course reads {SCHEMA}; "
                "use the version that wrote the log"
            )
        yield row, line


def _keep_up_to(path: Path, step: int | None) -> None:
    """Drop the rows after a step, and half a row at the end; with None, all. A kill leaves the old file or the new."""
    kept = [line for row, line in _rows(path) if row["step"] <= step] if step is not None and path.exists() else []
    beside = path.with_name(path.name + ".new")
    with beside.open("wb") as file:
        file.write(b"".join(line + b"\n" for line in kept))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _valid(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _valid(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _flat(row: dict[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}/")
        elif isinstance(value, int | float):
            yield before + key, value


def _board(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "tensorboard is not installed; pip install tensorboard, or run without --tensorboard"
        ) from None
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)
