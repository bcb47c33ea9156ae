"""Kills `prepare` again and again: python kill_campaign.py CORPUS FOLDER RUNS SEED.

A program of its own, of one thread, since it forks its runs: a process that is forked from a busy one, such as pytest
after tests with pyarrow, may wait for ever for a lock that a thread held.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from gpt2course.data import encode, prepare
from gpt2course.data.growing import JOURNAL

CONTEXT = multiprocessing.get_context("fork")
OPTIONS: dict[str, Any] = {"val_fraction": 0.3, "shard_tokens": 150, "progress": False}
"""shards of 150 tokens are full, and a journal is written, every few documents"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def prepare_and_die(corpus: Path, out: Path, after: int | None, counted: Any) -> None:
    """Body of a process: counts the calls of C functions, and kills itself at one of them."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        if event == "c_call":
            calls += 1
            if calls == after:
                os.kill(os.getpid(), signal.SIGKILL)

    encode.CHUNK_DOCUMENTS = 4
    sys.setprofile(count)
    prepare(corpus, out, **OPTIONS)
    sys.setprofile(None)
    counted.value = calls


def attempt(corpus: Path, out: Path, after: int | None = None) -> int | None:
    """One attempt in a process of its own: how many calls it took, or None if it was killed."""
    counted = CONTEXT.Value("q", 0)
    child = CONTEXT.Process(target=prepare_and_die, args=(corpus, out, after, counted))
    child.start()
    child.join()
    assert child.exitcode == (-signal.SIGKILL if after and not counted.value else 0), child.exitcode
    return counted.value or None


def campaign(corpus: Path, folder: Path, runs: int, seed: int) -> dict[str, int]:
    """So many runs, each killed and started again until it is done; all must make what an undisturbed one makes."""
    encode.get_tokenizer()  # or most of the calls would be those that make it
    whole = attempt(corpus, folder / "whole")
    assert whole is not None
    expected, rng = files(folder / "whole"), random.Random(seed)
    found = {"runs": runs, "shards": len(expected) - 1, "kills": 0, "with_journal": 0}
    for run in range(runs):
        out, part = folder / f"run-{run}", folder / f"run-{run}.part"
        while attempt(corpus, out, rng.randrange(1, whole)) is None:
            found["kills"] += 1
            found["with_journal"] += (part / JOURNAL).exists()
            there = files(out) if out.exists() else expected
            there.pop("lock", None)
            assert there == expected, f"run {run} of seed {seed}: half a folder under its name"
        assert files(out) == expected, f"run {run} of seed {seed} made other files"
        assert not part.exists()
    return found


if __name__ == "__main__":
    print(json.dumps(campaign(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
