"""Runs under torchrun whose processes are killed at random moments: each run ends as if nothing had happened."""

import contextlib
import json
import os
import signal
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TextIO
from unittest import mock

import pytest
import torch.distributed as dist

from gpt2course.chapters.run import machine
from gpt2course.train import World
from gpt2course.train.checkpoint import newest
from gpt2course.train.world import guarded, leave
from tests.distributed.faults import Lost, Notes, Run, differences, last_step
from tests.distributed.faults_worker import Config, main, undisturbed
from tests.distributed.ranks import CONTEXT, run_ranks

pytestmark = pytest.mark.distributed

RECORD = Path(__file__).parents[2] / "gpt2course/assets/benchmarks/faults.json"
COMMAND = "python -m pytest tests/distributed/test_faults.py --long --timeout 0 -k many -s"
KILLS = int(os.environ.get("GPT2COURSE_KILLS", "60"))
"""of the campaign"""
KILLS_A_RUN = 6
RUNS = (("ddp", 2, False), ("fsdp", 2, False), ("fsdp", 3, False), ("ddp", 3, True), ("fsdp", 2, True))
"""strategy, processes, async_save"""


def survive(config: Config, world_size: int, kills: int, seed: int) -> tuple[Notes, list[str]]:
    """Kill a run so often; what it went through, and what it ended with that the undisturbed one did not."""
    quiet = replace(config, out=config.out / "undisturbed")
    run_ranks(undisturbed, world_size, quiet, timeout=280)
    loud = replace(config, out=config.out / "killed")
    notes = Run(loud, world_size, kills, seed).go()
    return notes, differences(quiet.out, loud.out, world_size)


@pytest.mark.parametrize(("strategy", "seed"), [("ddp", 0), ("fsdp", 1)])
def test_a_killed_run_ends_as_if_nothing_had_happened(strategy: str, seed: int, tmp_path: Path) -> None:
    """Once between saves and once inside one (DDP), inside one and in the next start (FSDP)."""
    config = Config(strategy=strategy, out=tmp_path, device="cpu")  # type: ignore[arg-type]
    notes, found = survive(config, 2, 2, seed)
    assert found == []
    assert len(notes.kills) == 2


def test_torchrun_told_to_end_leaves_a_checkpoint_of_that_step(tmp_path: Path) -> None:
    """The signal comes to the processes one after the other, in the middle of a step or of an evaluation."""
    config = Config(strategy="fsdp", out=tmp_path, save_every=0, device="cpu")
    quiet, told = replace(config, out=tmp_path / "undisturbed"), replace(config, out=tmp_path / "told")
    run_ranks(undisturbed, 2, quiet, timeout=280)
    Run(told, 2, 0, 0).ask_to_stop(step=7)
    stopped = newest(told.out / "checkpoints")
    assert stopped is not None
    assert stopped.name == f"step-{last_step(told.metrics_path):08d}"
    assert "step-00000007" <= stopped.name < "step-00000024"
    Run(told, 2, 0, 0).go()
    found = differences(quiet.out, told.out, 2)
    assert [text for text in found if not text.startswith("checkpoints")] == []


@pytest.mark.parametrize("lost", [False, True])
def test_a_process_that_loses_another_at_the_end_still_ends(lost: bool) -> None:
    """An exception on the way out left the interpreter to clean up, where gloo's threads may hang it for good."""
    barrier = mock.Mock(side_effect=RuntimeError("Connection closed by peer") if lost else None)
    with (
        mock.patch.multiple(dist, is_initialized=lambda: True, barrier=barrier, destroy_process_group=mock.Mock()),
        mock.patch.object(os, "_exit", side_effect=SystemExit) as ended,
        pytest.raises(SystemExit),
    ):
        leave(0)
    ended.assert_called_once_with(int(lost))


def fail(error_file: str, torn: bool) -> None:
    """Fail as a process of torchrun's does; torn: killed in the middle of writing why."""

    def killed_writing(data: object, file: TextIO) -> None:
        file.write('{"message": {"mess')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def body() -> None:
        raise ValueError("a fault of its own")

    os.environ["TORCHELASTIC_ERROR_FILE"] = error_file
    with mock.patch.object(json, "dump", killed_writing) if torn else contextlib.nullcontext():
        guarded(body)


@pytest.mark.parametrize("torn", [False, True])
def test_torchrun_finds_a_whole_error_or_none(torn: bool, tmp_path: Path) -> None:
    """A process that was ended while it wrote left half a file, on which torchrun failed, and started nothing again."""
    process = CONTEXT.Process(target=fail, args=(str(tmp_path / "error.json"), torn))
    process.start()
    process.join(60)
    assert process.exitcode == (-signal.SIGKILL if torn else 1)
    if torn:
        assert not (tmp_path / "error.json").exists()
    else:
        assert "a fault of its own" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_a_run_that_went_another_way_is_seen(tmp_path: Path) -> None:
    """A comparison that rounds would forgive what a kill has changed: here averages that forget a little faster."""
    runs = [
        Config(strategy="single", out=tmp_path / str(beta2), steps=5, save_every=0, beta2=beta2, device="cpu")
        for beta2 in (0.95, 0.9501)
    ]
    for config in runs:
        main(config, World())
    found = differences(runs[0].out, runs[1].out, 1)
    assert any(text.startswith("rows of step 5") for text in found)
    assert "model.wte.weight" in found
    assert differences(runs[0].out, runs[0].out, 1) == []


@pytest.mark.long
def test_many_kills() -> None:
    """The campaign; its record is committed."""
    started, done, failures = time.monotonic(), list[Notes](), list[str]()
    while sum(len(notes.kills) for notes in done) < KILLS and len(failures) < 3:
        seed = len(done) + len(failures)
        strategy, world_size, async_save = RUNS[seed % len(RUNS)]
        with tempfile.TemporaryDirectory() as out:
            config = Config(strategy=strategy, out=Path(out), steps=84, async_save=async_save, device="cpu")  # type: ignore[arg-type]
            try:
                notes, found = survive(config, world_size, KILLS_A_RUN, seed)
            except Lost as lost:
                failures.append(str(lost))
                print(f"run {seed}: {lost}", flush=True)
                continue
        done.append(notes)
        failures += found
        print(f"run {seed}: {notes.seconds:.0f} s, {notes.kills}, {found}", flush=True)
    kills = [kill for notes in done for kill in notes.kills]
    record = {
        "command": COMMAND,
        "machine": machine(),
        "runs": len(done),
        "kills": len(kills),
        "inside_a_save": sum(kill["inside_save"] for kill in kills),
        "by_aim": Counter(kill["aim"] for kill in kills),
        "of_rank_0": sum(kill["rank"] == 0 for kill in kills),
        "by_run": Counter(
            f"{n.config.strategy}, {n.world_size} processes" + ", async" * n.config.async_save
            for n in done
            for _ in n.kills
        ),
        "restarts": len(kills),
        "failures": len(failures),
        "seconds": round(time.monotonic() - started),
    }
    assert not failures, "\n\n".join(failures)
    assert record["inside_a_save"] >= len(kills) // 6
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
