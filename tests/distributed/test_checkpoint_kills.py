"""Runs that are killed inside a save, by SIGKILL: the newest complete checkpoint always loads, and no work is lost.

A kill is aimed: the process counts every call by which a save touches the disk (make, open, write, sync, rename,
delete) and kills itself at the n-th. Or it comes from outside at a random moment. The folder is the same from kill to
kill, as in a run that is started again and again.
"""

import os
import random
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2course.train import checkpoint_io
from gpt2course.train.checkpoint import Checkpoints, best, load
from gpt2course.train.world import World
from tests.distributed.ranks import CONTEXT, _body
from tests.train.checkpoint_runs import Run, same

pytestmark = pytest.mark.distributed
TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.scandir"}
SAVES = 3


class Trap:
    """Counts what a process does to the files of a folder, and ends it by SIGKILL: just before the n-th (0: never), or,
    given the name of one, between the first of that name and the next of any."""

    def __init__(self, folder: Path, at: int | str) -> None:
        self.folder, self.at, self.due = str(folder), at, False
        self.touches: list[str] = []
        sync, write = os.fsync, checkpoint_io.save_file

        def counted_sync(descriptor: int) -> None:
            self.touch("sync")
            sync(descriptor)

        def torn_write(tensors: dict[str, Tensor], path: Path) -> None:
            self.touch("write")
            write(tensors, path)
            if self.due or len(self.touches) + 1 == self.at:
                os.truncate(path, path.stat().st_size // 2)

        os.fsync = counted_sync
        checkpoint_io.save_file = torn_write  # type: ignore[assignment]
        sys.addaudithook(self.heard)

    def heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in TOUCHES:
            return
        path = Path(str(args[0]))
        inside = str(path).startswith(self.folder)
        # Whole trees are deleted by bare names, relative to a folder that is held open.
        if inside or (event in ("os.remove", "os.rmdir") and not path.is_absolute()):
            self.touch(f"{'create' if args[1:2] == ('w',) else event} {path.name}")

    def touch(self, what: str) -> None:
        self.touches.append(what)
        if self.due or len(self.touches) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.due = isinstance(self.at, str) and what.startswith(self.at)


def advance(run: Run, step: int) -> None:
    torch.manual_seed(step)
    run.step()


def train(
    world: World,
    kind: str,
    async_save: bool,
    folder: Path,
    victim: int,
    at: int | str,
    saves: int,
    begun: Event,
    notes: Path,
) -> None:
    """Go on from the newest checkpoint for some steps, with a save at each; one process has a trap."""
    run = Run(kind, world)
    trap = Trap(folder, at if world.rank == victim else 0)
    checkpoints = Checkpoints(folder, world, keep_last=2, async_save=async_save)
    path = checkpoints.newest()
    done = checkpoints.load(path, run.module, run.optimizer)["step"] if path else 0
    if world.rank == victim:
        begun.set()
    for step in range(done + 1, done + saves + 1):
        advance(run, step)
        run.save(checkpoints, step, val_loss=1.0 / (1 + step % 4))
    checkpoints.wait()
    (notes / f"{world.rank}").write_text("\n".join(trap.touches))


def alone(*args: Any) -> None:
    torch.set_num_threads(1)
    train(World(), *args)


class Campaign:
    """One folder, one run that is killed and started again, and what it must find each time."""

    def __init__(self, folder: Path, kind: str = "single", size: int = 1, async_save: bool = False) -> None:
        self.folder, self.kind, self.size, self.async_save = folder / "checkpoints", kind, size, async_save
        self.notes, self.kills, self.newest = folder, 0, 0
        self.reference, self.states = Run(), [Run().full()]

    def wanted(self, step: int) -> dict[str, Tensor]:
        """The state after a step of a run of one process that was never disturbed."""
        while len(self.states) <= step:
            advance(self.reference, len(self.states))
            self.states.append(self.reference.full())
        return self.states[step]

    def start(self, at: int | str, victim: int = 0, delay: float | None = None) -> bool:
        """Start the run; whether it was killed. With a delay the kill comes from outside, seconds after the loading."""
        with tempfile.TemporaryDirectory() as meeting:
            begun, saves = CONTEXT.Event(), SAVES if delay is None else 10**6
            args = self.kind, self.async_save, self.folder, victim, at, saves, begun, self.notes
            ranks: list[BaseProcess] = [
                CONTEXT.Process(target=alone, args=args)
                if self.size == 1
                else CONTEXT.Process(target=_body, args=(train, rank, self.size, meeting, args))
                for rank in range(self.size)
            ]
            for rank in ranks:
                rank.start()
            if delay is not None:
                assert begun.wait(120)
            ranks[victim].join(120 if delay is None else delay)
            if delay is not None:
                ranks[victim].kill()
                ranks[victim].join()
            killed = ranks[victim].exitcode == -signal.SIGKILL
            for rank in ranks:
                if killed:
                    rank.kill()  # as torchrun ends the others
                rank.join()
        assert killed or [rank.exitcode for rank in ranks] == [0] * self.size
        self.kills += killed
        return killed

    def check(self, same_bits: bool = True) -> None:
        """Whatever has a checkpoint's name is whole; the newest is of no earlier step than before, and the undisturbed
        run's."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # best looks at all of them, and warns of what it skips
            best(self.folder)
            path = Checkpoints(self.folder).newest()
        if path is None:
            assert self.newest == 0
            return
        run = Run(seed=1)
        step = load(path, run.module, run.optimizer)["step"]
        assert step >= self.newest
        self.newest = step
        assert not same_bits or same(run.full(), self.wanted(step))
        assert all(path.name.startswith("step-") for path in self.folder.iterdir())


def aimed(campaign: Campaign, points: Callable[[list[str]], Iterable[int]], victim: int = 0) -> None:
    """Kill at points chosen from what an undisturbed start does to the disk, once there is something to delete."""
    exact = campaign.size == 1
    for _ in range(2):
        assert not campaign.start(0)
        campaign.check(exact)
    for at in points((campaign.notes / f"{victim}").read_text().splitlines()):
        campaign.start(at, victim)
        campaign.check(exact)
    assert not campaign.start(0)
    campaign.check(exact)
    assert len(list(campaign.folder.iterdir())) <= 3  # the last two and the best


def spread(count: int) -> Callable[[list[str]], range]:
    """So many points from the first to the last touch."""
    return lambda touches: range(max(1, len(touches) // (2 * count)), len(touches) + 1, max(1, len(touches) // count))


def test_a_run_killed_inside_a_save_goes_on(tmp_path: Path) -> None:
    """Bug: a folder with a checkpoint's name that is not a whole checkpoint, or the loss of the last good one."""
    campaign = Campaign(tmp_path)
    for after in ("os.mkdir tmp-", "write", "create state.json", "os.rename tmp-", "os.remove"):
        for _ in range(2):  # so that there is something to delete, and nothing left of the last kill
            assert not campaign.start(0)
            campaign.check()
        assert campaign.start(after), after
        campaign.check()


def test_processes_killed_inside_a_sharded_save_go_on(tmp_path: Path) -> None:
    """Bug: shards of one step beside those of another, or without their .metadata."""
    campaign = Campaign(tmp_path, "fsdp", 2)
    aimed(campaign, spread(2), victim=1)
    assert campaign.kills >= 2


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("async_save", [False, True])
def test_every_touch_of_the_disk_is_survived(tmp_path: Path, async_save: bool) -> None:
    """Bug: the one stage of a save that no random kill has hit."""
    campaign = Campaign(tmp_path, async_save=async_save)
    aimed(campaign, lambda touches: range(1, len(touches) + 1))
    print(f"{campaign.kills} kills survived, at every touch of the disk, step {campaign.newest}")
    assert campaign.kills >= 50


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_kills_at_random_moments_are_survived(tmp_path: Path) -> None:
    """Bug: a moment inside a call, such as half a file, that no aimed kill reaches."""
    campaign, pick = Campaign(tmp_path), random.Random(0)
    while campaign.kills < 50:
        campaign.start(0, delay=pick.uniform(0.0, 0.5))
        campaign.check()
    print(f"{campaign.kills} kills survived, at random moments, step {campaign.newest}")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_every_touch_of_a_shard_is_survived(tmp_path: Path, victim: int, async_save: bool) -> None:
    """Bug: a stage of a sharded save, on the first process or another, that leaves half a checkpoint."""
    campaign = Campaign(tmp_path, "fsdp", 2, async_save)
    aimed(campaign, spread(30), victim)
    print(f"{campaign.kills} kills of process {victim} survived, step {campaign.newest}")
    assert campaign.kills >= 25
