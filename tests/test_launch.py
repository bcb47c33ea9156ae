"""torchrun from a notebook: what it says of a run that fails, and that it leaves no process behind, however it ends."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from torch.distributed.run import get_args_parser

from gpt2course import launch, launch_report
from gpt2course.launch import LaunchError, Run, child_environment, torchrun
from gpt2course.launch_report import first_failure
from gpt2course.train.config import parse

ROOT = Path(__file__).parents[1]
distributed = pytest.mark.distributed
TRAINING = [ROOT / "scripts" / name for name in ("train_single_gpu.py", "train_ddp.py", "train_fsdp.py")]
Patch = pytest.MonkeyPatch

# Saves when it is asked to end; or does not listen, and starts something in a session of its own.
WAITING = """
import os, signal, subprocess, sys, time
rank = os.environ["RANK"]
def save(*_):
    open(f"saved-{rank}", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else save)
if "stubborn" in sys.argv:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("ready", flush=True)
open(f"ready-{rank}", "w").close()
while True:
    time.sleep(600)
"""
FAILING = """
import os, sys, time
from torch.distributed.elastic.multiprocessing.errors import record
@record
def main():
    if os.environ["RANK"] == "1":
        raise RuntimeError("the loss is a teapot")
    time.sleep(600)
main()
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def running(mark: str) -> list[psutil.Process]:
    """Every other process that was started, however indirectly, with this value in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("TEST_MARK") == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.fixture
def mark(monkeypatch: Patch) -> Iterator[str]:
    """A value that all processes of a test inherit; whoever a failed test leaves behind is ended."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("TEST_MARK", value)
    yield value
    for process in running(value):
        process.kill()


@distributed
def test_a_run_that_restarts_once_gives_its_lines_and_rows(tmp_path: Path, mark: str) -> None:
    """Arguments split at spaces, lines without their rank, a restart nobody hears of, the threads of all cores each."""
    path = script(
        tmp_path,
        """
import json, os, sys
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if rank == 1 and attempt == 0:
    sys.exit(3)
if rank == 0 and attempt == 1:
    with open(sys.argv[2], "w") as file:
        file.write(json.dumps({"step": 1, "loss": 2.5, "world_size": int(os.environ["WORLD_SIZE"])}) + "\\n")
print("threads", os.environ["OMP_NUM_THREADS"])
""",
    )
    metrics = tmp_path / "a folder" / "m.jsonl"
    metrics.parent.mkdir()
    run = torchrun(
        path, ["--jsonl", metrics], max_restarts=1, jsonl=metrics, env={"OMP_NUM_THREADS": "7"}, quiet=True, check=False
    )
    assert run.restarts == 1
    assert run.rows() == [{"step": 1, "loss": 2.5, "world_size": 2}]
    assert {"[rank 0] threads 7", "[rank 1] threads 7"} <= set(run.lines)
    assert run.seconds > 0
    assert running(mark) == []


@distributed
def test_in_a_notebook_a_failed_launch_fails_the_cell_and_names_the_rank(tmp_path: Path) -> None:
    """`!torchrun` that fails lets the notebook go on; torchrun's summary hides the reason among the other ranks'."""
    path = script(tmp_path, FAILING)
    cell = f"""
from gpt2course.launch import LaunchError, torchrun
try:
    torchrun({str(path)!r}, check=False)
except LaunchError as error:
    print("rank:", error.rank)
    raise
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell), nbformat.v4.new_code_cell("1")])
    environment = {name: value for name, value in child_environment().items() if name not in launch_report.LIVE_KERNEL}
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", shutdown_kernel="immediate")
    with pytest.raises(CellExecutionError) as caught:
        client.execute(env=environment, cwd=str(tmp_path))
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(caught.value))
    assert "script.py: rank 1 failed first (exit code 1)" in text
    assert 'raise RuntimeError("the loss is a teapot")' in text
    (printed,) = (out["text"] for out in notebook.cells[0].outputs if out.output_type == "stream")
    assert printed == "rank: 1\n", "a notebook that papermill runs keeps the lines of a launch out of its outputs"
    assert notebook.cells[1].execution_count is None


@distributed
def test_a_timeout_kills_also_who_does_not_listen(tmp_path: Path, mark: str, monkeypatch: Patch) -> None:
    """Ranks have sessions of their own: a signal to the launcher's group leaves them training for ever."""

    def clock() -> float:
        return 1e9 if (tmp_path / "ready-0").exists() and (tmp_path / "ready-1").exists() else 0.0

    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LaunchError, match=r"script.py was stopped: it had not ended after 60 s"):
        torchrun(script(tmp_path, WAITING), ["stubborn"], timeout=60, check=False, grace=0.5, quiet=True)
    assert running(mark) == []


@distributed
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_ending_the_caller_ends_the_run_and_lets_it_save(number: signal.Signals, tmp_path: Path, mark: str) -> None:
    """An interrupted cell, or a kernel that is killed, whose processes go on holding the memory."""
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent was killed")
    call = f"from gpt2course.launch import torchrun; torchrun({str(script(tmp_path, WAITING))!r}, check=False)"
    environment = {name: value for name, value in child_environment().items() if name != "CI"}
    with subprocess.Popen(
        [sys.executable, "-c", call],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as caller:
        assert caller.stdout
        assert {caller.stdout.readline(), caller.stdout.readline()} == {"[rank 0] ready\n", "[rank 1] ready\n"}
        processes = running(mark)
        assert len(processes) == 4  # caller, launcher, two ranks
        caller.send_signal(number)
        _, errors = caller.communicate(timeout=60)
    assert ("KeyboardInterrupt" in errors) is (number == signal.SIGINT)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_a_launch_whose_caller_has_just_died_does_not_start(tmp_path: Path) -> None:
    """A parent that ends before the kernel is asked to tell of it: nobody would ever send the signal."""
    boot = [sys.executable, "-P", str(launch.BOOT), "1", str(tmp_path / "report"), str(script(tmp_path, WAITING))]
    ended = subprocess.run(boot, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert ended.returncode == 1
    assert "process 1, which asked for this launch, has ended" in ended.stderr
    assert not list(tmp_path.glob("ready-*"))


def test_refused_options_start_nothing(tmp_path: Path) -> None:
    """Eight processes that each print the same complaint, after having waited for each other."""
    path = script(
        tmp_path,
        """
import sys
if "--check" in sys.argv:
    sys.exit(f"batch_size is 5; it must be divisible by {sys.argv[2]} processes: {sys.argv[3:]}")
open("started", "w").close()
""",
    )
    with pytest.raises(LaunchError, match=r"refuses to start:\nbatch_size is 5.* by 3 processes: \['--batch', '5'\]"):
        torchrun(path, ["--batch", 5], nproc=3)
    assert not (tmp_path / "started").exists()


def test_a_missing_script_and_an_impossible_number_are_told_at_once(tmp_path: Path) -> None:
    """A rendezvous of seconds, and then a traceback of torchrun's, for a typing error."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py; the working directory is"):
        torchrun(tmp_path / "nowhere.py")
    with pytest.raises(ValueError, match="nproc is 0"):
        torchrun(script(tmp_path, ""), nproc=0)
    with pytest.raises(ValueError, match="jsonl=PATH"):
        Run(0, 1.0, []).rows()


def test_the_check_of_options_may_not_take_for_ever(tmp_path: Path, monkeypatch: Patch) -> None:
    """A script without --check, which starts to train, alone."""
    monkeypatch.setattr(launch, "CHECK_TIMEOUT_S", 0.2)
    with pytest.raises(LaunchError, match="it should only look at its options"):
        torchrun(script(tmp_path, "import time; time.sleep(600)"))


def failed(rank: int, exit_code: int, time: float | None = None) -> dict[str, object]:
    return {"rank": rank, "exit_code": exit_code, "time": time}


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        ([failed(0, 1, 20.5), failed(1, 1, 20.25)], 1),
        ([failed(0, 1, 20.0), failed(1, -signal.SIGKILL)], 1),
        ([failed(0, 1, 20.0), failed(1, 3)], 1),
        ([failed(0, -signal.SIGTERM), failed(1, 1, 20.0)], 1),
        ([failed(0, -signal.SIGABRT), failed(1, 1, 20.0)], 1),
        ([failed(0, -signal.SIGTERM), failed(1, -signal.SIGABRT)], 1),
    ],
    ids=["older-error", "killed", "ended-itself", "stopped-by-torchrun", "aborted-after-another", "aborted"],
)
def test_the_rank_that_caused_the_others_failures_is_named(failures: list[dict[str, object]], first: int) -> None:
    """ "Connection closed by peer" on rank 0, for a rank 1 that the system killed."""
    assert first_failure(failures)["rank"] == first


def test_a_killed_rank_and_a_failed_torchrun_are_told_in_words(tmp_path: Path) -> None:
    """Exit code -9, which few can read; and a report that is not there, as torchrun itself was killed."""
    report = tmp_path / "report.json"
    report.write_text(json.dumps([{"rank": 2, "exit_code": -9, "time": None, "error": {"message": "<NONE>"}}]))
    killed = launch_report.failure(Path("x.py"), 1, report, ["[rank 0] step 7"])
    assert "x.py: rank 2 failed first (ended by SIGKILL" in str(killed)
    assert str(killed).endswith("[rank 0] step 7")
    assert (killed.rank, killed.returncode) == (2, 1)
    gone = launch_report.failure(Path("x.py"), -15, tmp_path / "none", [])
    assert "torchrun itself ended (ended by SIGTERM)" in str(gone)
    assert gone.rank is None


def test_a_traceback_is_told_once() -> None:
    """Thirty last lines that all repeat the traceback above them, instead of what came before."""
    lines = ["[rank 1] step 1", "[rank 1] Traceback (most recent call last):", "[rank 0] step 1", "[rank 1] Error: no"]
    assert list(launch_report.without_traceback(lines, "[rank 1] ")) == ["[rank 1] step 1", "[rank 0] step 1"]
    assert list(launch_report.without_traceback(lines, "[rank 0] ")) == lines


def test_the_environment_shares_the_cores_and_keeps_what_is_set(monkeypatch: Patch) -> None:
    """Two ranks with two threads each on two cores take twice as long or more; a user's own choice must win."""
    monkeypatch.setattr(launch, "usable_cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    found = child_environment(3)
    assert found["OMP_NUM_THREADS"] == "2"
    assert child_environment(16)["OMP_NUM_THREADS"] == "1"
    assert (found["OMP_WAIT_POLICY"], found["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]) == ("passive", "1")
    assert found["PYTHONPATH"] == f"{ROOT}{os.pathsep}elsewhere"
    assert not {"OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"} & set(child_environment())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert child_environment()["PYTHONPATH"] == str(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert (child_environment(3)["OMP_NUM_THREADS"], child_environment()["OMP_WAIT_POLICY"]) == ("5", "active")


def test_the_bar_follows_a_metrics_file_that_grows_shrinks_and_is_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bar that stops at a resume, or a run that dies since its bar read half a line."""
    metrics = tmp_path / "m.jsonl"
    with launch_report.Bar(metrics, 10, shown=True) as bar:
        bar.update()
        for text, step in [('{"step": 3, "loss": 2.5}\n{"st', 3), ('ep": 4, "loss": null}\n', 4), ("not json\n", 4)]:
            with metrics.open("a") as file:
                file.write(text)
            bar.update()
            assert bar._bar.n == step
        metrics.write_text('{"step": 2, "loss": 2.75}\n')
        bar.update()
        assert bar._bar.n == 2
    assert "2.7500" in capsys.readouterr().err


def test_only_the_first_lines_are_shown_and_all_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook of megabytes, by a script that prints every step."""
    output = launch_report.Output(shown=True)
    output.read(iter(f"line {i}\n" for i in range(5000)))  # type: ignore[arg-type]
    output.finish()
    shown = capsys.readouterr().out.splitlines()
    assert len(output.lines) == 5000
    assert len(shown) == launch_report.SHOWN_LINES + 1
    assert "Run.lines" in shown[-1]


def ambiguous(option: str) -> bool:
    """Whether torchrun, which also looks at the script's options, refuses this one as short for several of its own."""
    known = [name for action in get_args_parser()._actions for name in action.option_strings]
    return option not in known and sum(name.startswith(option) for name in known) > 1


def test_which_options_torchrun_finds_ambiguous() -> None:
    """The rule itself, against torchrun's own parser where that still stumbles (Python 3.11)."""
    assert [option for option in ("--log", "--max", "--jsonl", "--steps", "--check") if ambiguous(option)] == [
        "--log",
        "--max",
    ]
    if sys.version_info < (3, 12):
        with pytest.raises(SystemExit):
            get_args_parser().parse_args(["script.py", "--log", "x"])
    assert get_args_parser().parse_args(["script.py", "--jsonl", "x"]).training_script_args == ["--jsonl", "x"]


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_no_option_of_a_script_is_one_that_torchrun_refuses(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    """`error: ambiguous option: --log could match --log-dir, --logs-specs`, from a program the reader did not call."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit):
        parse(module.Config, ["--help"])
    options = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", capsys.readouterr().out))
    assert {"--jsonl", "--check", "--model.n-layer"} <= options
    assert not [option for option in options if ambiguous(option)]
