"""The second start of ./scripts/lab.sh, for real: with the .venv of this clone, if there is one."""

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash")
# On an idle machine it is to take under 10 s. The others share theirs with a whole test suite.
LIMIT_IDLE, LIMIT_BUSY = 10.0, 30.0


def installed() -> bool:
    """Whether .venv holds what lab.sh would install now, by lab.sh's own rule."""
    if BASH is None or not (ROOT / ".venv" / ".installed-lab").exists():
        return False
    return subprocess.run([BASH, "-c", ". scripts/common.sh && installed lab"], cwd=ROOT, timeout=60).returncode == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        return error.code == 403
    except OSError:
        return False


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.terminate()
    process.wait(timeout=20)
    _, alive = psutil.wait_procs(family, timeout=20)
    for member in alive:
        member.kill()
    assert not alive


@pytest.mark.distributed
@pytest.mark.slow
def test_second_start_is_quick(tmp_path: Path) -> None:
    """A start that installs again, waits for the network, or waits half a minute for a doctor in a hurry."""
    if not installed():
        pytest.skip("no .venv here that lab.sh would start without an install; run ./scripts/lab.sh --setup-only")
    assert BASH
    port = free_port()
    places = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    busy = psutil.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
    flags = ["--no-browser", "--port", str(port), "--ServerApp.port_retries=0"]
    started = time.monotonic()
    with (tmp_path / "shown").open("w") as shown:
        process = subprocess.Popen(
            [BASH, "scripts/lab.sh", *flags],
            cwd=ROOT,
            env=os.environ | places | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=shown,
            stderr=subprocess.STDOUT,
        )
    try:
        while not answers(f"http://127.0.0.1:{port}/api"):
            assert time.monotonic() - started < 120, (tmp_path / "shown").read_text()
            try:
                process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail("lab.sh ended:\n" + (tmp_path / "shown").read_text())
        took = time.monotonic() - started
    finally:
        if process.poll() is None:
            stop(process)
    print(f"second start: {took:.1f} s")
    assert "already installed" in (tmp_path / "shown").read_text()
    assert took < (LIMIT_BUSY if busy else LIMIT_IDLE)
