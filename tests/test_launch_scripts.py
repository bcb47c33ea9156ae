"""launch_ddp.sh, launch_fsdp.sh and the Slurm job: the command they make, what they refuse, and that signals arrive."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2course.launch import child_environment
from tests.shell import executable

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash") or "bash"
LAUNCHERS = ("launch_ddp.sh", "launch_fsdp.sh")
JOB = ROOT / "scripts" / "train_fsdp.sbatch"
TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
SLURM = {
    "SLURM_JOB_ID": "70123",
    "SLURM_NNODES": "4",
    "SLURM_JOB_NODELIST": "rack[1-4]",
    "SLURM_STEP_ID": "0",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
}
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Stands in for a training script: refuses a batch that the processes cannot share, else waits until it is told to stop.
TRAINING = r"""
import os, signal, sys, time
if "--check" in sys.argv:
    world_size = int(sys.argv[sys.argv.index("--check") + 1])
    batch = int(sys.argv[sys.argv.index("--batch") + 1]) if "--batch" in sys.argv else world_size
    sys.exit(f"batch {batch} over {world_size} processes" if batch % world_size else 0)
def say(*words):
    os.write(1, (" ".join([os.environ["RANK"], *words]) + "\n").encode())  # print writes a line in pieces
def stop(*_):
    say("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
say("ready", *sys.argv[1:])
while True:
    time.sleep(600)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the shell scripts, with stand-ins for the training scripts and for Slurm's scontrol."""
    root = tmp_path / "a tree"
    root.mkdir()
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in ("train_ddp.py", "train_fsdp.py"):
        (root / "scripts" / name).write_text(TRAINING)
    executable(root / "bin/scontrol", '#!/bin/sh\necho "$3" | sed "s/rack.*/rack1\\nrack2/"\n')
    return root


def environment(tree: Path, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    path = f"{tree / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **more}


def call(tree: Path, line: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BASH, "-c", line], cwd=tree, env=environment(tree, **more), capture_output=True, text=True, timeout=120
    )


def torchrun_of(tree: Path, line: str, **more: str) -> tuple[dict[str, str], list[str]]:
    """The environment and the arguments of torchrun that a dry run prints."""
    shown = call(tree, f"{line} --dry-run", **more)
    assert shown.returncode == 0, shown.stderr
    *exports, command = shown.stdout.splitlines()
    found = dict(shlex.split(line)[1].split("=", 1) for line in exports)
    words = shlex.split(command)
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    return found, words[3:]


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_teaches_without_a_python_that_works(tree: Path, name: str) -> None:
    """The first thing one asks on a cluster, before anything is installed."""
    shown = call(tree, f"scripts/{name} --nproc 2 --help", PYTHON="/nowhere/python")
    assert shown.returncode == 0
    for word in (
        "--nproc",
        "--max-restarts",
        "--dry-run",
        "NNODES=2 NODE_RANK=0 MASTER_ADDR",
        "srun",
        f"./scripts/{name}",
    ):
        assert word in shown.stdout
    assert os.access(ROOT / "scripts" / name, os.X_OK)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_one_node_gets_a_standalone_torchrun_and_the_environment_of_launch_py(
    tree: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launchers whose runs differ in threads or in the store; arguments with a space that fall apart."""
    for variable in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONUNBUFFERED", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.delenv(variable, raising=False)
    found, command = torchrun_of(tree, f"scripts/{name} --steps 3 --nproc 2 --out 'my run' --max-restarts=4")
    script = str(tree / "scripts" / name.replace("launch", "train").replace(".sh", ".py"))
    assert command[command.index(script) :] == [script, "--steps", "3", "--out", "my run"]
    assert command[: command.index(script)] == ["--nproc-per-node", "2", "--max-restarts", "4", "--standalone"]
    ours = child_environment(2)
    assert {name for name in found if name != "PYTHONPATH" and found[name] != ours[name]} == set()
    assert set(found) == set(ours) - set(os.environ) | {"PYTHONPATH"}
    assert found["PYTHONPATH"].split(os.pathsep)[0] in (str(tree), str(ROOT))


def test_all_nodes_meet_under_one_name_at_node_0(tree: Path) -> None:
    """A rendezvous id made up by each node: they wait for each other until the time is up."""
    commands = [torchrun_of(tree, "scripts/launch_ddp.sh --nproc 2", **{**TWO, "NODE_RANK": rank})[1] for rank in "01"]
    for option, expected in (
        ("--nnodes", ["2", "2"]),
        ("--node-rank", ["0", "1"]),
        ("--rdzv-backend", ["c10d", "c10d"]),
        ("--rdzv-endpoint", ["node0:29500", "node0:29500"]),
        ("--rdzv-conf", ["is_host=1", "is_host=0"]),
    ):
        assert [value(command, option) for command in commands] == expected
    assert value(commands[0], "--rdzv-id") == value(commands[1], "--rdzv-id") != ""
    assert "--standalone" not in commands[0]
    _, other = torchrun_of(
        tree, "scripts/launch_ddp.sh --nproc 2", **TWO, MASTER_PORT="4711", RUN_ID="mine", LOCAL_ADDR="10.0.0.2"
    )
    assert (value(other, "--rdzv-endpoint"), value(other, "--rdzv-id")) == ("node0:4711", "mine")
    assert value(other, "--local-addr") == "10.0.0.2"


def test_slurm_tells_the_nodes(tree: Path) -> None:
    """A job script that repeats by hand what Slurm knows; two jobs on one node that take the same port."""
    _, command = torchrun_of(tree, "scripts/launch_fsdp.sh --nproc 8", **SLURM)
    assert (value(command, "--nnodes"), value(command, "--node-rank")) == ("4", "2")
    assert value(command, "--rdzv-id") == "gpt2course-70123"
    host, port = value(command, "--rdzv-endpoint").split(":")
    assert host == "rack1"
    assert 1024 < int(port) < 32768
    _, next_job = torchrun_of(tree, "scripts/launch_fsdp.sh --nproc 8", **{**SLURM, "SLURM_JOB_ID": "70124"})
    assert value(next_job, "--rdzv-endpoint") != f"{host}:{port}"
    _, part = torchrun_of(tree, "scripts/launch_fsdp.sh --nproc 8", **SLURM, SLURM_STEP_NUM_NODES="1")
    assert "--standalone" in part
    _, alone = torchrun_of(tree, "scripts/launch_fsdp.sh --nproc 8", **SLURM, NNODES="1")
    assert "--standalone" in alone


@pytest.mark.parametrize(
    ("flags", "more", "says"),
    [
        ("--nproc two", {}, r"--nproc is 'two'; it must be a whole number of at least 1"),
        ("--nproc 0", {}, r"--nproc is 0; it must be at least 1"),
        ("--nproc", {}, r"--nproc is ''"),
        ("--nproc 2 --max-restarts=-1", {}, r"--max-restarts is '-1'"),
        ("--nproc 2", {"NNODES": "2"}, r"NNODES is 2, and NODE_RANK is not set; it is 0 on one machine"),
        ("--nproc 2", {"NNODES": "2", "NODE_RANK": "0"}, r"MASTER_ADDR is not set; it is the address"),
        ("--nproc 2", {**TWO, "NODE_RANK": "2"}, r"NODE_RANK is 2, and there are 2 nodes; it must be 0 to 1"),
        ("--nproc 2", {**TWO, "MASTER_PORT": "http"}, r"MASTER_PORT is 'http'"),
        (
            "--nproc 2",
            {**SLURM, "SLURM_STEP_ID": ""},
            r"only this one would start: call it by srun --ntasks-per-node 1",
        ),
        ("--nproc 2", {**SLURM, "SLURM_LOCALID": "1"}, r"several tasks on this node; .* --ntasks-per-node 1"),
        ("--nproc 2", {"PYTHON": "/nowhere/python"}, r"/nowhere/python is not a Python that has torch"),
        ("", {"CUDA_VISIBLE_DEVICES": ""}, r"no GPU here; give --nproc 2 to run on the CPU"),
        ("--nproc 2 --batch 6", TWO, r"refuses these options, and nothing was started:\s+batch 6 over 4 processes"),
    ],
)
def test_what_cannot_work_is_refused_with_the_mend(tree: Path, flags: str, more: dict[str, str], says: str) -> None:
    """A job that waits a day in the queue, to end with a traceback of torchrun's."""
    refused = call(tree, f"scripts/launch_ddp.sh {flags}", **more)
    assert refused.returncode == 1
    assert re.search(says, refused.stderr), refused.stderr
    assert "ready" not in refused.stdout


def test_the_check_knows_how_many_processes_are_on_this_machine(tree: Path) -> None:
    """Bug: the processes of all machines counted against the GPUs of one; every run on several was refused."""
    says = "import os, sys; sys.exit(f'{os.environ[\"NPROC_PER_NODE\"]} here of {sys.argv[2]}')"
    (tree / "scripts/train_ddp.py").write_text(says)
    refused = call(tree, "scripts/launch_ddp.sh --nproc 8", **TWO)
    assert "8 here of 16" in refused.stderr


@pytest.mark.distributed
def test_the_launcher_becomes_torchrun_so_that_a_signal_reaches_the_processes(tree: Path) -> None:
    """A shell in between: Slurm's SIGTERM ends the shell, nobody saves, and the processes stay."""
    with subprocess.Popen(
        [str(tree / "scripts/launch_ddp.sh"), "--nproc", "2", "--out", "my run"],
        env=environment(tree),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as launcher:
        assert launcher.stdout
        assert sorted(launcher.stdout.readline() for _ in range(2)) == [
            "0 ready --out my run\n",
            "1 ready --out my run\n",
        ]
        launcher.send_signal(signal.SIGTERM)
        rest, _ = launcher.communicate(timeout=60)
    assert sorted(rest.splitlines()) == ["0 saved", "1 saved"]


def test_the_slurm_job_is_a_sound_script_that_grants_the_time_to_save(tree: Path) -> None:
    """A save that Slurm cuts off, since torchrun waits longer than Slurm does; options that never reach the script."""
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck:
        found = subprocess.run([shellcheck, str(JOB)], capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stdout
    executable(tree / "bin/srun", '#!/bin/sh\necho "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"\nprintf "%s\\n" "$@"\n')
    shown = call(tree, "scripts/train_fsdp.sbatch --preset gpt2-xl --out 'my run'")
    assert shown.returncode == 0, shown.stderr
    patience, *words = shown.stdout.splitlines()
    assert words[1] == "./scripts/launch_fsdp.sh"
    assert words[-4:] == ["--preset", "gpt2-xl", "--out", "my run"]
    told = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", JOB.read_text(), re.MULTILINE))
    assert (told["ntasks-per-node"], told["signal"].split("@")[0]) == ("1", "TERM")
    assert int(patience) < int(told["signal"].split("@")[1])
