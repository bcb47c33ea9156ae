"""Kills processes of a run that torchrun restarts, at random moments and inside saves, and notes what was hit."""

import contextlib
import json
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from gpt2course import GPT
from gpt2course.launch import MARK, child_environment, stop
from gpt2course.train import metrics
from gpt2course.train.checkpoint import load, newest, tensors
from gpt2course.train.optim import make_optimizer
from tests.distributed.faults_worker import Config
from tests.distributed.made_runs import TINY
from tests.distributed.resume_runs import SAME

T = TypeVar("T")
WORKER = Path(__file__).with_name("faults_worker.py")
AIMS = ("step", "save", "start")
"""a kill between two saves, inside one, or before the first step of a start"""
PATIENCE_S = 150.0
"""a run that does not move for so long hangs; torchrun itself waits 30 s for processes that it ends"""
POLL_S = 0.001


class Lost(AssertionError):
    """A run that did not end, or not well; with what it wrote."""


@dataclass
class Notes:
    """What a run went through."""

    config: Config
    world_size: int
    kills: list[dict[str, Any]] = field(default_factory=list)
    """of each: aim, rank, step (the last one logged), inside_save"""
    seconds: float = 0.0


class Run:
    """The worker under torchrun, with as many restarts as it will be killed: one failure of its own ends it."""

    def __init__(self, config: Config, world_size: int, kills: int, seed: int) -> None:
        self.config, self.kills = config, kills
        self.rng = random.Random(seed)
        self.seed = seed
        self.notes = Notes(config, world_size)
        self.log = config.metrics_path
        self.text = config.out.with_suffix(".txt")
        self.start_s = 4.0
        """seconds from the first sight of a process to its first step; measured when there is one"""

    def command(self) -> list[str]:
        c = self.config
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += [f"--nproc-per-node={self.notes.world_size}", f"--max-restarts={self.kills}"]
        torchrun += [f"--log-dir={self.config.out.with_suffix('.logs')}"]
        script = [str(WORKER), "--strategy", c.strategy, "--out", str(c.out), "--device", c.device]
        script += ["--steps", str(c.steps), "--save-every", str(c.save_every)]
        return torchrun + script + ["--async-save"] * c.async_save

    def go(self) -> Notes:
        """Start, kill, and wait for the end. Raises Lost."""
        started = time.monotonic()
        with self.started():
            for attempt in range(self.kills):
                self.kill_one(attempt)
            code = self.process.wait(PATIENCE_S)
        if code:
            raise self.lost(f"exit code {code}")
        self.notes.seconds = time.monotonic() - started
        return self.notes

    def ask_to_stop(self, step: int) -> None:
        """Start, and after some step tell torchrun to end, as a cluster does before it takes a machine away."""
        with self.started():
            self.wait_for(lambda: last_step(self.log) >= step)
            self.process.terminate()
            self.process.wait(PATIENCE_S)

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """The worker runs; nothing is left of it at the end."""
        mark = uuid.uuid4().hex
        environment = {**child_environment(self.notes.world_size), "OMP_NUM_THREADS": "1", MARK: mark}
        with self.text.open("wb") as output:
            self.process = subprocess.Popen(
                self.command(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                yield
            except (subprocess.TimeoutExpired, psutil.NoSuchProcess) as error:
                raise self.lost(str(error)) from error
            finally:
                stop(self.process, mark, grace=1.0)

    def lost(self, why: str) -> Lost:
        return Lost(f"{why}\n{self.notes}\n{self.text.read_text(errors='replace')[-8000:]}")

    def wait_for(self, what: Callable[[], T]) -> T:
        """Until it is true; its value."""
        end = time.monotonic() + PATIENCE_S
        while not (found := what()):
            if self.process.poll() is not None:
                raise self.lost(f"it ended with code {self.process.returncode}, and was to be killed again")
            if time.monotonic() > end:
                raise self.lost(f"it did not move for {PATIENCE_S:g} s")
            time.sleep(POLL_S)
        return found

    def ranks(self, attempt: int) -> dict[int, psutil.Process]:
        """The processes that torchrun started this time, if all of them are there."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                environment = child.environ()
            except psutil.Error:
                continue
            count = int(environment.get("TORCHELASTIC_RESTART_COUNT", -1))
            if count > attempt:
                raise self.lost(f"start {attempt} failed before it was killed")
            if count == attempt:
                found[int(environment["RANK"])] = child
        return found if len(found) == self.notes.world_size else {}

    def saving(self) -> bool:
        return any((self.config.out / "checkpoints").glob("tmp-step-*"))

    def kill_one(self, attempt: int) -> None:
        """Wait for the moment, and kill one process of this start."""
        rng, aim = self.rng, AIMS[(self.seed + attempt) % len(AIMS)]
        window = self.config.steps // (self.kills + 1)
        ranks = self.wait_for(lambda: self.ranks(attempt))
        rank = rng.choice(sorted(ranks))
        seen, before = time.monotonic(), last_step(self.log)
        if aim == "start":
            time.sleep(rng.uniform(0, self.start_s))
        else:
            # Rows of the start before are still there until this one has loaded its checkpoint.
            self.wait_for(lambda: last_step(self.log) > before)
            self.start_s = time.monotonic() - seen
            target = attempt * window + rng.randrange(window)
            self.wait_for(lambda: last_step(self.log) >= target)
            if aim == "save":
                self.wait_for(self.saving)
            time.sleep(rng.uniform(0, 0.01))
        # Stopped, it can't leave its save while we look. Before its first step, what lies there is of an earlier kill.
        ranks[rank].suspend()
        inside = aim != "start" and self.saving()
        self.notes.kills.append({"aim": aim, "rank": rank, "step": last_step(self.log), "inside_save": inside})
        ranks[rank].kill()


def last_step(log: Path) -> int:
    """Of the last whole row; 0 if there is none."""
    try:
        rows = log.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [row for row in rows[-2:] if row.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def outcome(out: Path) -> tuple[list[dict[str, Any]], list[str], dict[str, Tensor]]:
    """What a run left: its rows, the names of its checkpoints, and weights and averages of the newest one."""
    rows = [{key: row[key] for key in SAME if key in row} for row in metrics.read(out / "metrics.jsonl")]
    path = newest(out / "checkpoints")
    assert path is not None
    model = GPT(TINY)
    optimizer = make_optimizer(model.parameters())
    load(path, model, optimizer)
    return rows, sorted(p.name for p in path.parent.iterdir()), tensors(model, optimizer)


def differences(out: Path, other: Path, world_size: int) -> list[str]:
    """What is not the same, bit for bit, in two finished runs."""
    (rows, names, state), (rows_b, names_b, state_b) = outcome(out), outcome(other)
    found = [f"rows of step {a['step']}: {a}, {b}" for a, b in zip(rows, rows_b, strict=False) if a != b]
    if len(rows) != len(rows_b):
        found.append(f"{len(rows)} rows, {len(rows_b)} rows")
    for rank in range(world_size):
        if [row["step"] for row in metrics.read(metrics.rank_path(other / "metrics.jsonl", rank))] != [
            row["step"] for row in rows
        ]:
            found.append(f"steps in the small file of rank {rank}")
    if names != names_b:
        found.append(f"checkpoints {names}, {names_b}")
    return found + [name for name in state.keys() | state_b.keys() if not torch.equal(state[name], state_b[name])]
