"""The chapters, run and as committed."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpt2course import chapters

STEMS = [path.stem for path in chapters.find()]
pytestmark = pytest.mark.chapters


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stem", STEMS)
def test_chapter_runs(stem: str, runs: dict) -> None:
    """A chapter that only runs in its author's kernel, or only with a network."""
    run = runs[stem]
    assert not run.failure, run.failure
    cells = chapters.notebook.code_cells(chapters.read(run.path))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


@pytest.mark.parametrize("stem", STEMS)
def test_committed_outputs_are_fresh(stem: str) -> None:
    """Outputs that the code beside them did not make; figures without words; links that lead nowhere."""
    assert chapters.check([stem]) == []


def test_every_chapter_tests_its_exercises() -> None:
    """An exercise whose check nobody tried with a wrong answer (tests/checks/test_chNN.py compares the names)."""
    assert STEMS, f"no chapters in {chapters.NOTEBOOKS}"
    tested = {path.stem[-2:] for path in (Path(__file__).parents[1] / "checks").glob("test_ch[0-9][0-9].py")}
    assert {stem[:2] for stem in STEMS} <= tested


REACH_OUT = """
import socket, threading, urllib.request
server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=server.accept, daemon=True).start()
socket.create_connection(server.getsockname(), timeout=5).close()
print("loopback works")
for reach in (
    lambda: socket.socket().connect(("192.0.2.1", 80)),
    lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
    lambda: socket.socket().connect_ex(("192.0.2.1", 80)),
    lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
    lambda: socket.getaddrinfo("example.org", 80),
    lambda: urllib.request.urlopen("http://example.org", timeout=5),
):
    try:
        reach()
        print("reached the network")
    except OSError as error:
        print(getattr(error, "reason", error))
"""


def test_guard_refuses_all_but_loopback(guarded_env: dict[str, str]) -> None:
    """A guard that guards nothing, so that a download in a chapter goes unseen."""
    done = subprocess.run(
        [sys.executable, "-c", REACH_OUT], env=guarded_env, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "loopback works"
    assert len(lines) == 7
    assert all("run without a network" in line for line in lines[1:]), lines


def test_guard_reaches_into_kernels(guarded_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that holds in pytest's process only, while the chapter runs in the kernel's."""
    from jupyter_client.manager import start_new_kernel

    for name, value in guarded_env.items():
        monkeypatch.setenv(name, value)
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        said: list[str] = []
        client.execute_interactive(
            "import socket\ntry:\n    socket.socket().connect(('192.0.2.1', 80))\nexcept OSError as e:\n    print(e)",
            output_hook=lambda message: said.append(message["content"].get("text", "")),
            timeout=60,
        )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "run without a network" in "".join(said), said
