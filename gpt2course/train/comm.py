"""What a process sends to the others, counted in three ways, and how long it stands still for it.

- `Traffic` sees each collective as it is called: how often, and how many bytes of tensor. From these follow the bytes
  that a process has to send at least (`ring_bytes`) and those that gloo sends (`gloo_bytes`).
- `WireMeter` reads what really went over the loopback interface.
- `Waiting` measures the seconds in which a process can do nothing else.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2course.train.world import World


@dataclass
class SumState:
    """What `summing_hook` remembers of a backward pass."""

    group: dist.ProcessGroup | None = None
    """who sums; None means all processes"""
    last_started: float | None = None
    """time.perf_counter() at which the last bucket of a backward pass left, until `Waiting` has taken it"""


def summing_hook(state: SumState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the SUM of the bucket over all processes. DDP's own would divide by their number.

    The last bucket leaves when the last gradient is there, so that whatever backward still takes is waiting.
    """
    if bucket.is_last():
        state.last_started = time.perf_counter()
    work = dist.all_reduce(bucket.buffer(), group=state.group, async_op=True)
    assert work is not None
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


class Waiting:
    """Seconds in which this process stood still for the others, while `with waiting:` is open.

    On the CPU: the time inside `Work.wait`, through which every collective of torch.distributed goes that is not asked
    to be asynchronous (FSDP's and `World.sum` among them), the time inside the wait of DTensor's collectives, and with
    DDP the time from the start of the last bucket to the end of the backward pass. To see the first two, one method
    and one function of torch are replaced while the context is open. Only the thread that opened it is measured, so
    that a checkpoint written in the background does not count.

    What overlaps with computing is not seen, and is not free: gloo's threads use the same cores. On CUDA there is
    nothing to measure, since there collectives run beside the computation, and the process goes on at once: None.

    Args:
        world: the processes.
        sums: the state of `summing_hook`, under DDP.
    """

    def __init__(self, world: World, sums: SumState | None = None) -> None:
        self.world, self.sums = world, sums
        self._seconds = 0.0
        self._busy = False
        self._thread = threading.get_ident()
        self._saved: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def __enter__(self) -> "Waiting":
        if self.world.world_size > 1 and self.world.device.type == "cpu":
            self._thread = threading.get_ident()
            self._saved = dist.Work.wait, functional.wait_tensor
            self._install(*map(self._timed, self._saved))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._saved:
            self._install(*self._saved)
            self._saved = None

    def _install(self, wait: Callable[..., Any], wait_tensor: Callable[..., Any]) -> None:
        dist.Work.wait = wait  # type: ignore[method-assign]
        functional.wait_tensor = wait_tensor

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count the body as waiting. A wait within a wait counts once."""
        if self._busy or threading.get_ident() != self._thread:
            yield
            return
        self._busy = True
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start
            self._busy = False

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measured():
                return wait(*args, **kwargs)

        return timed

    def take(self) -> float | None:
        """Seconds since the last call. A process alone waits for nobody; None where it can't be known (CUDA)."""
        if self.world.world_size > 1 and self.world.device.type != "cpu":
            return None
        seconds, self._seconds = self._seconds, 0.0
        if self.sums is not None and self.sums.last_started is not None:
            seconds += time.perf_counter() - self.sums.last_started
            self.sums.last_started = None
        return seconds


def _bytes(tensors: Any) -> int:
    """Of one tensor, or of a nested list of them."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def _group_size(args: tuple[Any, ...]) -> int:
    """How many processes take part: the size of the group among the arguments of a collective."""
    for arg in reversed(args):
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).size()
        if isinstance(arg, dist.ProcessGroup):
            return arg.size()
    return dist.distributed_c10d._resolve_process_group(args[-1]).size()


class Traffic(TorchDispatchMode):
    """Counts the collectives of this process while it is open: `with Traffic() as traffic: forward(); backward()`.

    Bytes are those of the full tensor: what is reduced, all that is gathered, all that is scattered. Any number of
    passes may run in one context. Every operation of torch becomes slower meanwhile, so a step is counted, not a run.
    """

    KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
    SILENT = ("wait_tensor", "_wrap_tensor_autograd", "check_for_nan")
    """operations of the same libraries that send nothing"""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        """number of calls by kind; a coalesced call counts once"""
        self.unknown: Counter[str] = Counter()
        """calls of other operations between processes, by name; they are in no sum of bytes"""
        self._bytes: Counter[tuple[str, int]] = Counter()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # or torch.compile would leave what it first meets in this context uncompiled

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.count(func.namespace, func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def count(self, namespace: str, name: str, args: tuple[Any, ...]) -> None:
        """Note one call of an operation of torch.distributed."""
        plain = name.replace("allreduce", "all_reduce").replace("allgather", "all_gather")
        kind = next((kind for kind in self.KINDS if kind in plain), None)
        if kind is None:
            if name not in self.SILENT:
                self.unknown[name] += 1
            return
        eager = namespace == "c10d"  # there the outputs come first; the functional operations have inputs only
        size = _bytes(args[1] if eager and kind == "reduce_scatter" else args[0])
        if kind == "all_gather" and not eager:
            size *= args[1]
        self.calls[kind] += 1
        self._bytes[kind, _group_size(args)] += size

    @property
    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of the full tensors by kind."""
        return {kind: sum(n for (k, _), n in self._bytes.items() if k == kind) for kind in self.KINDS}

    def ring_bytes(self, world_size: int | None = None) -> int:
        """Bytes that each process has to send at least, of a tensor of S bytes over N processes: 2 (N-1)/N S to
        all-reduce it, (N-1)/N S to gather or to reduce-scatter it (a ring reaches both: Patarasuk and Yuan 2009,
        "Bandwidth optimal all-reduce algorithms for clusters of workstations"; the factors of PERFORMANCE.md in
        NVIDIA's nccl-tests), and (N-1)/N S to broadcast it, the mean of all processes: N - 1 of them must get S.

        Args:
            world_size: N; by default, for each call, the number of processes that took part in it.
        """
        return self._sent({"all_reduce": 2}, world_size)

    def gloo_bytes(self, world_size: int | None = None) -> int:
        """Bytes that each process sends by gloo, which is what torch uses on CPUs. Its reduce-scatter is an all-reduce
        of which each process keeps its part (torch's ProcessGroupGloo.cpp), so it costs twice the least; the rest is
        as in `ring_bytes`.
        """
        return self._sent({"all_reduce": 2, "reduce_scatter": 2}, world_size)

    def _sent(self, rounds: dict[str, int], world_size: int | None) -> int:
        total = 0.0
        for (kind, group_size), size in self._bytes.items():
            N = world_size or group_size
            total += rounds.get(kind, 1) * (N - 1) / N * size
        return round(total)


class WireMeter:
    """Bytes that went over a network interface, by the kernel's count.

    It counts all that uses the interface: every process on this machine, headers, other programs. So it belongs around
    something large, on a quiet machine.
    """

    TABLE = Path("/proc/net/dev")

    def __init__(self, interface: str = "lo") -> None:
        self.interface = interface
        self._last = self._read()

    def _read(self) -> int | None:
        if not self.TABLE.exists():
            return None
        for line in self.TABLE.read_text().splitlines():
            name, _, counts = line.partition(":")
            if name.strip() == self.interface:
                return int(counts.split()[8])  # eight columns of what came in, then what went out, bytes first
        return None

    def take(self) -> int | None:
        """Bytes sent since the last call, by all together; None where the kernel has no such table (macOS, Windows)."""
        now, last = self._read(), self._last
        self._last = now
        return None if now is None or last is None else now - last
