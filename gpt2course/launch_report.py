"""What a launch shows while it runs, and what it says when it failed."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

SHOWN_LINES = 200
TAIL_LINES = 30
LIVE_KERNEL = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
"""environment variables that tell a notebook somebody looks at from one that papermill runs"""
SIGNALS_OF_A_LOST_PEER = (-signal.SIGABRT, -signal.SIGTERM)
"""how a rank ends because another one has: its communication library gives up, or torchrun stops it"""


class LaunchError(RuntimeError):
    """A run that did not start, failed, or took too long; the text says why.

    Attributes:
        rank: the rank that failed first; None if no rank did.
        lines: everything that the processes wrote.
        returncode: torchrun's exit code; None if it was never started.
    """

    def __init__(
        self, text: str, *, rank: int | None = None, lines: Sequence[str] = (), returncode: int | None = None
    ) -> None:
        super().__init__(text)
        self.rank = rank
        self.lines = lines
        self.returncode = returncode


class Output:
    """The lines that the processes write: all are kept, the first ones shown."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.lines: list[str] = []
        self._thread: threading.Thread | None = None

    def read(self, stream: IO[str] | None) -> None:
        assert stream is not None
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line.rstrip("\n"))
            if len(self.lines) <= SHOWN_LINES:
                self.say(self.lines[-1])
            elif len(self.lines) == SHOWN_LINES + 1:
                self.say(f"… further lines are kept in Run.lines; {SHOWN_LINES} are shown")

    def say(self, text: str) -> None:
        if self.shown:
            print(text, flush=True)

    def finish(self) -> None:
        """Wait until what was written is read; a process that is left over and holds the pipe is not waited for."""
        if self._thread is not None:
            self._thread.join(5.0)


class Bar:
    """A progress bar over the metrics file, which grows while the processes run."""

    def __init__(self, jsonl: str | Path | None, steps: int | None, shown: bool) -> None:
        self._path = None if jsonl is None else Path(jsonl)
        self._read = 0
        self._bar = tqdm(total=steps, unit="step", disable=not shown or jsonl is None)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        self._bar.close()

    def update(self) -> None:
        if self._bar.disable or self._path is None or not self._path.is_file():
            return
        if self._path.stat().st_size < self._read:
            self._read = 0  # a resumed run drops the rows past its checkpoint
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # half a line, of a file that was replaced by a longer one
                self._show(json.loads(line))
        if whole:
            self._bar.refresh()

    def _show(self, row: dict[str, Any]) -> None:
        self._bar.n = row.get("step", self._bar.n)
        if row.get("loss") is not None:
            self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)


def nobody_looks() -> bool:
    """Whether this is a notebook that a program runs, or CI."""
    if "ipykernel" in sys.modules:
        return not any(name in os.environ for name in LIVE_KERNEL)
    return "CI" in os.environ


def too_late(path: Path, timeout: float, lines: Sequence[str]) -> LaunchError:
    """The error of a run that was stopped after `timeout` seconds."""
    text = f"{path.name} was stopped: it had not ended after {timeout:g} s; give it a longer timeout, or less to do"
    return LaunchError("\n".join([text, *_tail(lines)]), lines=lines)


def failure(path: Path, returncode: int, report: Path, lines: Sequence[str]) -> LaunchError:
    """The error of a run that failed: which rank was the first, its traceback, and the end of the output.

    Args:
        report: what launch_boot.py wrote; missing if torchrun ended for a reason of its own.
    """
    failures = json.loads(report.read_text()) if report.is_file() else []
    if not failures:
        why = f"{path.name}: torchrun itself ended ({_how(returncode)})"
        return LaunchError("\n".join([why, *_tail(lines)]), lines=lines, returncode=returncode)
    first = first_failure(failures)
    message = first["error"].get("message")
    traceback = message["extraInfo"]["py_callstack"].rstrip() if isinstance(message, dict) else ""
    rest = without_traceback(lines, f"[rank {first['rank']}] ") if traceback else lines
    why = f"{path.name}: rank {first['rank']} failed first ({_how(first['exit_code'])})"
    text = "\n".join(filter(None, [why, traceback, *_tail(rest)]))
    return LaunchError(text, rank=first["rank"], lines=lines, returncode=returncode)


def without_traceback(lines: Sequence[str], prefix: str) -> Sequence[str]:
    """The lines, without those that begin with the prefix from its last traceback on."""
    starts = [i for i, line in enumerate(lines) if line.startswith(f"{prefix}Traceback (most recent call last)")]
    if not starts:
        return lines
    return [*lines[: starts[-1]], *(line for line in lines[starts[-1] :] if not line.startswith(prefix))]


def first_failure(failures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The failure that caused the others, of those in a report of launch_boot.py.

    A rank that is killed, or ends itself with a code, writes no error file, and the others then complain of a lost
    connection: so those come first. Else it is the oldest error file; torchrun's own times are whole seconds, which
    ranks share.
    """

    def order(failure: dict[str, Any]) -> tuple[int, float]:
        code, written = failure["exit_code"], failure["time"]
        if written is not None:
            return 1, written
        return (2 + SIGNALS_OF_A_LOST_PEER.index(code) if code in SIGNALS_OF_A_LOST_PEER else 0), 0.0

    return min(failures, key=order)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in {number.value for number in signal.Signals} else f"signal {-code}"
    return f"ended by {name}" + (", which the system sends when memory runs out" if name == "SIGKILL" else "")


def _tail(lines: Sequence[str]) -> list[str]:
    return ["the last lines of its output:", *lines[-TAIL_LINES:]]
