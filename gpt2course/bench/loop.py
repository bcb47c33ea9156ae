"""`gpt2course bench-training`: what the training loop costs beyond its arithmetic, and what two processes cost here.

Two questions. How much longer is a step of the loop than the bare forward pass, backward pass and update that it
contains? And on one machine without a GPU, where two processes share the cores that one would have with two threads:
what do DDP and FSDP cost, and where does the time go?
"""

import dataclasses
import json
import os
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gpt2course.bench.timing import Spread, interleaved, ratio
from gpt2course.chapters.run import machine
from gpt2course.launch import torchrun
from gpt2course.train.config import SMALL, TrainConfig
from gpt2course.train.data import RunData, load_data
from gpt2course.train.loop import Training
from gpt2course.train.metrics import read
from gpt2course.train.optim import make_optimizer
from gpt2course.train.parallel import seeded, single
from gpt2course.train.stop import StopSignals
from gpt2course.train.world import World

FILE = "training_loop.json"
RECORD = Path(__file__).parents[1] / "assets" / "benchmarks" / FILE
SCRIPTS = Path(__file__).parents[2] / "scripts"
WARM = 3  # steps of each start that are not counted: torch and the allocator are still making room


@dataclass(frozen=True)
class Overhead:
    """A step of the loop beside a bare step, in turns, in one process; seconds."""

    bare: list[float]
    loop: list[float]

    @property
    def share(self) -> Spread:
        """How much longer the loop's step is, as a share of the bare one, round by round."""
        found = ratio(self.loop, self.bare)
        return Spread(found.median - 1, found.low - 1, found.high - 1)

    @property
    def seconds(self) -> Spread:
        """The same in seconds."""
        return Spread.of([b - a for a, b in zip(self.bare, self.loop, strict=True)])


@dataclass(frozen=True)
class Launched:
    """Steps of a script that was started as it would be by hand, over all starts; seconds."""

    name: str
    processes: int
    threads: int
    """of each process"""
    seconds: dict[str, list[float]]
    """by phase, of rank 0"""

    @property
    def total(self) -> Spread:
        return Spread.of(self.seconds["total"])


@dataclass(frozen=True)
class LoopReport:
    """All that was measured."""

    machine: str
    command: str
    config: dict[str, object]
    overhead: Overhead
    launched: list[Launched]

    def __str__(self) -> str:
        share, seconds = self.overhead.share, self.overhead.seconds
        lines = [
            f"{self.machine}",
            f"loop over a bare step: {share.median:+.2%} (quartiles {share.low:+.2%} to {share.high:+.2%}), "
            f"{1e3 * seconds.median:.2f} ms of {1e3 * Spread.of(self.overhead.bare).median:.1f}",
        ]
        for run in self.launched:
            split = ", ".join(
                f"{phase} {1e3 * statistics.median(values):.1f}"
                for phase, values in run.seconds.items()
                if phase != "total"
            )
            total = run.total
            lines.append(
                f"{run.name}, {run.processes} x {run.threads} threads: {1e3 * total.median:.1f} ms a step "
                f"({1e3 * total.low:.1f} to {1e3 * total.high:.1f}); {split}"
            )
        return "\n".join(lines)


def measure_overhead(config: TrainConfig, data: RunData, rounds: int) -> Overhead:
    """Bare steps and steps of the loop in turns, on models of the same seed."""
    model = seeded(config, torch.device("cpu"))
    optimizer = make_optimizer(model.parameters(), config.learning_rate)
    bare_steps = iter(range(rounds + 1))

    def bare() -> None:
        x_BT, y_BT = data.train.batch(next(bare_steps))
        model(x_BT, y_BT).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with StopSignals() as stop:
        training = Training(config, single(config, World()), data, stop)
        with training.log, training.waiting:
            training.take_step()  # its first step counts what is sent, which slows it
            found = interleaved(
                {"bare": bare, "loop": lambda: training.log.write(training.take_step())}, rounds, torch.device("cpu")
            )
    return Overhead(found["bare"], found["loop"])


def measure_launched(options: list[str], steps: int, starts: int, processes: int, quiet: bool) -> list[Launched]:
    """The three scripts in turns: one process with as many threads as the others have processes, DDP, and FSDP."""
    cases = [("single", 1, processes), ("ddp", processes, 1), ("fsdp", processes, 1)]
    found: dict[str, dict[str, list[float]]] = {name: {} for name, _, _ in cases}
    for _ in range(starts):
        for name, nproc, threads in cases:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "run")
                script = SCRIPTS / ("train_single_gpu.py" if name == "single" else f"train_{name}.py")
                words = [*options, "--steps", str(steps + WARM), "--out", str(out), "--device", "cpu"]
                torchrun(script, words, nproc=nproc, env={"OMP_NUM_THREADS": str(threads)}, quiet=quiet)
                for row in read(out / "metrics.jsonl")[WARM:]:
                    for phase, seconds in row["seconds"].items():
                        found[name].setdefault(phase, []).append(seconds)
    return [Launched(name, nproc, threads, found[name]) for name, nproc, threads in cases]


def run(steps: int = 30, starts: int = 3, processes: int = 2, quick: bool = False, quiet: bool = False) -> LoopReport:
    """Measure both, on the small model that the scripts train by default.

    Args:
        steps: counted, in each start and for the overhead.
        starts: of each script, in turns.
        processes: of DDP and FSDP.
        quick: a miniature in seconds, to see that it runs; its times say nothing.
        quiet: show no bars.
    """
    model = SMALL.with_(n_layer=1, n_head=2, n_embd=16, block_size=16) if quick else SMALL
    options = ["--save-every", "0", "--eval-every", "0", "--eval-tokens", "1024", "--warmup-steps", "1"]
    if quick:
        steps, starts = 3, 1
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            options += [f"--model.{name.replace('_', '-')}", str(getattr(model, name))]
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(TrainConfig(model=model), steps=10**6, out=Path(folder, "run"))
        overhead = measure_overhead(config, load_data(config, World()), steps)
    return LoopReport(
        machine=f"{machine()}, OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'not set')}",
        command="gpt2course bench-training" + (" --quick" if quick else ""),
        config={"model": model.to_dict(), "batch_size": config.batch_size},
        overhead=overhead,
        launched=measure_launched(options, steps, starts, processes, quiet),
    )


def save(report: LoopReport, folder: Path) -> Path:
    """Write training_loop.json, every single time in it, into a folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    record = {"schema": 1, "summary": str(report).splitlines(), **asdict(report)}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
