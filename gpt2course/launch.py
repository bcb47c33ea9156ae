"""Start torchrun from a notebook or a script, watch it, and leave no process behind.

`torchrun("scripts/train_ddp.py", ["--steps", "20"], nproc=2)` blocks until all processes have ended. A run that fails
raises `LaunchError`, which fails the cell, and says which rank failed first and why.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gpt2course.launch_report import TAIL_LINES, Bar, LaunchError, Output, failure, nobody_looks, too_late

BOOT = Path(__file__).with_name("launch_boot.py")
POLL_S = 0.1
SAVE_GRACE_S = 35.0
"""seconds that a stopped run has to save what it has: torchrun grants its ranks 30 before it kills them"""
CHECK_TIMEOUT_S = 120.0
KILL_ROUNDS = 5
MARK = "GPT2COURSE_LAUNCH"
"""the environment variable that all processes of one launch have in common, and no others have"""


@dataclass(frozen=True)
class Run:
    """A run that ended well."""

    returncode: int
    seconds: float
    lines: list[str] = field(repr=False)
    """what the processes wrote, each line with the rank that wrote it"""
    restarts: int = 0
    """how often torchrun started all ranks again"""
    jsonl: Path | None = field(default=None, repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the metrics file, as dicts. Raises ValueError if the launch was not told of one."""
        if self.jsonl is None:
            raise ValueError("this launch was not told of a metrics file; give torchrun(..., jsonl=PATH)")
        return [json.loads(line) for line in self.jsonl.read_text().splitlines()]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child_environment(nproc: int | None = None) -> dict[str, str]:
    """This process's environment for processes of ours: this copy of the package, and threads that do not spin.

    On a few cores that others use too, spinning costs far more than it saves (see scripts/common.sh).

    Args:
        nproc: how many processes will train together on this machine; each gets its share of the cores. Without it,
            nothing is said about threads or torchrun.
    """
    root = str(Path(__file__).parents[1])
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", root)]
    found = {
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, *inherited]),
    }
    if nproc is None:
        return found
    return {
        # With as many ranks as cores, two threads a rank took 1.9 to 4.1 times as long as one.
        "OMP_NUM_THREADS": str(max(1, usable_cores() // nproc)),
        "PYTHONUNBUFFERED": "1",
        # A restart that meets in the store of the attempt before finds its stale addresses there and fails.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **found,
    }


def shell_exports(nproc: int) -> str:
    """What `child_environment(nproc)` sets, as lines for a shell: scripts/launch_common.sh runs them."""
    names = (
        "PYTHONPATH",
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "PYTHONUNBUFFERED",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    )
    environment = child_environment(nproc)
    return "\n".join(f"export {name}={shlex.quote(environment[name])}" for name in names)


def torchrun(
    script: str | Path,
    args: Sequence[str | Path | float] = (),
    *,
    nproc: int = 2,
    max_restarts: int = 0,
    timeout: float | None = None,
    jsonl: str | Path | None = None,
    steps: int | None = None,
    env: Mapping[str, str] | None = None,
    quiet: bool | None = None,
    check: bool = True,
    grace: float = SAVE_GRACE_S,
) -> Run:
    """Run `script` in `nproc` processes of this machine until all have ended.

    Interrupting it stops every process: first torchrun is asked to, so that a script that saves on SIGTERM can, then
    whoever is left is killed. On Linux the processes end with this one, even if it is killed.

    Args:
        script: a Python file that joins the other processes by torchrun's environment variables.
        args: its arguments.
        nproc: how many processes.
        max_restarts: how often torchrun starts all of them again after one has failed.
        timeout: seconds after which the run is stopped and counts as failed.
        jsonl: the metrics file that the script writes, for the progress bar and for `Run.rows`.
        steps: how many steps the script will take, for the bar's time left.
        env: environment variables to add.
        quiet: show neither lines nor bar. By default so in a notebook that a program runs, and in CI.
        check: first run the script alone with `--check nproc`, which says whether its options can work.
        grace: seconds that the processes have to save and end when they are stopped.

    Raises:
        FileNotFoundError: there is no such script.
        LaunchError: the options are refused, a rank failed (the first is named, with its traceback), or the time is up.
    """
    path = Path(script)
    if not path.is_file():
        raise FileNotFoundError(f"there is no script {path}; the working directory is {Path.cwd()}")
    if nproc < 1:
        raise ValueError(f"nproc is {nproc}; it takes at least 1 process")
    arguments = [str(argument) for argument in args]
    mark = uuid.uuid4().hex
    environment = {
        **child_environment(nproc),
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ",
        **(env or {}),
        MARK: mark,
    }
    if check:
        _check(path, arguments, nproc, environment)
    with tempfile.TemporaryDirectory(prefix="gpt2course-launch-", ignore_cleanup_errors=True) as folder:
        report, logs = Path(folder, "failures.json"), Path(folder, "logs")
        launcher = ["--standalone", f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
        # The ranks' output goes through files: two ranks that write at once do not tear each other's lines.
        launcher += [f"--log-dir={logs}", "--tee=3", str(path), *arguments]
        command = [sys.executable, "-P", str(BOOT), str(os.getpid()), str(report), *launcher]
        started = time.monotonic()
        watched = Output(shown=not (nobody_looks() if quiet is None else quiet))
        with _launched(command, environment, mark, grace) as process, Bar(jsonl, steps, watched.shown) as bar:
            watched.read(process.stdout)
            try:
                in_time = _ended(process, bar, started + (float("inf") if timeout is None else timeout))
            except KeyboardInterrupt:
                watched.say(f"stopping; the script has {grace:g} s to save, interrupt again to kill it")
                raise
        watched.finish()
        if not in_time:
            raise too_late(path, timeout or 0.0, watched.lines)
        if process.returncode != 0:
            raise failure(path, process.returncode, report, watched.lines)
        restarts = max((int(attempt.name.split("_")[1]) for attempt in logs.glob("*/attempt_*")), default=0)
        seconds = time.monotonic() - started
        return Run(0, seconds, watched.lines, restarts, None if jsonl is None else Path(jsonl))


def _check(path: Path, arguments: Sequence[str], nproc: int, environment: Mapping[str, str]) -> None:
    command = [sys.executable, str(path), "--check", str(nproc), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        late = f"{path.name} --check {nproc} had not ended after {CHECK_TIMEOUT_S:g} s"
        raise LaunchError(f"{late}; it should only look at its options") from None
    if done.returncode:
        text = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise LaunchError("\n".join([f"{path.name} refuses to start:", *text[-TAIL_LINES:]]), lines=text)


def _ended(process: subprocess.Popen[str], bar: Bar, deadline: float) -> bool:
    """Wait for the launcher; False if it has not ended by the deadline."""
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
        bar.update()
    return True


@contextlib.contextmanager
def _launched(
    command: Sequence[str], environment: Mapping[str, str], mark: str, grace: float
) -> Iterator[subprocess.Popen[str]]:
    """The launcher, of which nothing is left at the end, however the block is left."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # A notebook's interrupt goes to the kernel's whole group; the launcher gets one signal, from here.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        stop(process, mark, grace)


def stop(process: subprocess.Popen[str], mark: str, grace: float) -> None:
    """End the launcher and all processes of its launch: politely, then by force. Interrupting it goes on to force.

    Each rank has a session of its own, so no signal to a group reaches them all: the launcher knows them, and passes
    SIGTERM on. Whoever outlives it has the mark of this launch.
    """
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        # Again, for whoever was started meanwhile; not for ever, as one that waits for a device cannot be killed.
        for _ in range(KILL_ROUNDS):
            if not (left := marked(mark)):
                break
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, timeout=1.0)


def marked(mark: str) -> list[psutil.Process]:
    """The running processes of one launch."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found
