"""A disk that is really full: a small tmpfs, in a mount namespace of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2course.train.checkpoint import CheckpointError, Checkpoints
from gpt2course.train.restore import newest
from tests.train.checkpoint_runs import Run

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size=512k tmpfs "$0" && exec "$@"'


def mount_problem(folder: Path) -> str:
    """Why no tmpfs can be mounted here; empty if one can."""
    if shutil.which("unshare") is None:
        return "there is no unshare here"
    done = subprocess.run([*NAMESPACE, MOUNT, str(folder), "true"], capture_output=True, text=True, check=False)
    return done.stderr.strip()


def fill(folder: Path) -> None:
    """Save after every step until the disk is full; what was saved must still be there, whole."""
    run, checkpoints = Run(), Checkpoints(folder / "checkpoints", keep_last=99)
    states = []
    while True:
        run.step()
        try:
            run.save(checkpoints, len(states) + 1)
        except CheckpointError as error:
            print(error)
            break
        states.append(run.full())
    assert len(states) >= 2
    assert not list(checkpoints.folder.glob("tmp-*"))
    path, again = newest(checkpoints.folder), Run(seed=1)
    assert path is not None
    assert Checkpoints(checkpoints.folder, keep_last=99).load(path, again.module, again.optimizer)["step"] == len(
        states
    )
    found = again.full()
    assert all((found[name] == value).all() for name, value in states[-1].items())


def test_a_full_disk_is_told_and_takes_nothing_with_it(tmp_path: Path) -> None:
    """Bug: a save that died on a full disk had deleted, or half overwritten, the checkpoint before it."""
    if problem := mount_problem(tmp_path):
        pytest.skip(f"no tmpfs of its own can be mounted: {problem}")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    here = f"tests.train.{Path(__file__).stem}"
    program = f"from pathlib import Path; from {here} import fill; fill(Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [*NAMESPACE, MOUNT, str(tmp_path), sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No space left on device" in done.stdout
    assert "make room, or choose a folder you may write. Earlier checkpoints are as they were" in done.stdout
    assert not list(tmp_path.iterdir())  # it really was another file system
