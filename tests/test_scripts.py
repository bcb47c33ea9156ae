"""The set-up scripts, run on a copy of the tree with a stand-in for .venv: nothing is installed or downloaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shell import executable

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"])
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="needs bash")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the scripts read."""
    root = tmp_path / "a tree"
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def venv(tree: Path) -> Path:
    """A .venv whose python notes what it is asked to run, and does what the files pip, doctor say (exit codes)."""
    executable(
        tree / ".venv/bin/python",
        f"""#!/bin/sh
here=$(dirname "$0")
case "$1 $2" in
  "-m "*) echo "$*" >>"$here/asked" ;;
esac
case "$1 $2 $3" in
  "-m pip install") echo "ERROR: No matching distribution"; exit "$(cat "$here/pip" 2>/dev/null || echo 0)" ;;
  "-m gpt2course doctor") echo "FAIL Cache"; exit "$(cat "$here/doctor" 2>/dev/null || echo 0)" ;;
  "-m "*) exit 0 ;;
esac
exec "{sys.executable}" "$@"
""",
    )
    return tree / ".venv"


def bash(tree: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(tree)} | environment
    assert BASH
    return subprocess.run([BASH, "-c", command], cwd=tree, env=env, capture_output=True, text=True, timeout=60)


def asked(venv: Path) -> list[str]:
    note = venv / "bin/asked"
    return note.read_text().splitlines() if note.exists() else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    """A typo in a branch that is rarely taken."""
    assert subprocess.run([str(BASH), "-n", str(script)], timeout=30).returncode == 0


def test_shellcheck_finds_nothing() -> None:
    """Unquoted paths with a space in them, `cd` that fails unnoticed, and their like."""
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; it comes with the extra dev")
    found = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", ["scripts/lab.sh", "scripts/test.sh", ".ci/run"])
def test_script_may_be_executed(name: str) -> None:
    """`./scripts/lab.sh: Permission denied` as a reader's first impression."""
    assert os.access(ROOT / name, os.X_OK)


@pytest.mark.parametrize("name", ["lab.sh", "test.sh"])
def test_help_explains_and_installs_nothing(tree: Path, name: str) -> None:
    """--help that starts a download of minutes."""
    shown = bash(tree, f"scripts/{name} --no-browser --help")
    assert shown.returncode == 0
    assert "--setup-only" in shown.stdout
    assert not (tree / ".venv").exists()


def test_old_python_is_refused_with_the_mend(tree: Path, tmp_path: Path) -> None:
    """A syntax error deep inside pip, instead of the word that Python is too old."""
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        executable(tmp_path / "bin" / name, "#!/bin/sh\nexit 1\n")
    tools = ":".join(sorted({str(Path(shutil.which(tool) or "").parent) for tool in ("uname", "dirname", "cat")}))
    refused = bash(tree, "scripts/lab.sh", PATH=f"{tmp_path / 'bin'}:{tools}")
    assert refused.returncode == 1
    assert "no Python 3.11 to 3.13 found" in refused.stderr
    assert "install" in refused.stderr
    assert not (tree / ".venv").exists()


def test_a_chosen_python_that_does_not_do_is_named(tree: Path) -> None:
    """PYTHON=… that is silently ignored for another Python."""
    refused = bash(tree, "scripts/test.sh", PYTHON="/nowhere/python9")
    assert refused.returncode == 1
    assert "PYTHON=/nowhere/python9" in refused.stderr


def test_a_shim_with_nothing_behind_it_is_passed_over(tree: Path, tmp_path: Path) -> None:
    """pyenv puts python3.11 on PATH although that version is not active; it exits 127."""
    executable(tmp_path / "bin/python3.11", "#!/bin/sh\necho 'pyenv: python3.11: command not found' >&2\nexit 127\n")
    executable(tmp_path / "bin/python3.12", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    found = bash(tree, ". scripts/common.sh; find_python", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert found.stdout.strip() == "python3.12"


def test_second_start_does_not_call_pip(tree: Path, venv: Path) -> None:
    """A start that needs the network each time, or takes minutes."""
    for _ in range(2):
        assert bash(tree, "scripts/lab.sh --setup-only").returncode == 0
    assert sum("pip install" in line for line in asked(venv)) == 1


def test_lab_after_dev_does_not_call_pip(tree: Path, venv: Path) -> None:
    """dev contains lab: nothing is left to install."""
    assert bash(tree, "scripts/test.sh --setup-only").returncode == 0
    assert bash(tree, "scripts/lab.sh --setup-only").returncode == 0
    (install,) = (line for line in asked(venv) if "pip install" in line)
    assert "-e .[dev] torch==" in install
    assert install.endswith("-c constraints.txt")


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_installs_again(tree: Path, venv: Path, name: str) -> None:
    """An update by `git pull` whose new dependency is never installed."""
    bash(tree, "scripts/lab.sh --setup-only")
    (tree / name).write_text((tree / name).read_text() + "\n# changed\n")
    bash(tree, "scripts/lab.sh --setup-only")
    assert sum("pip install" in line for line in asked(venv)) == 2


def test_a_moved_tree_installs_again(tree: Path, venv: Path) -> None:
    """An editable install that still points to the folder's old place."""
    bash(tree, "scripts/lab.sh --setup-only")
    moved = tree.rename(tree.with_name("moved"))
    bash(moved, "scripts/lab.sh --setup-only")
    assert sum("pip install" in line for line in asked(moved / ".venv")) == 2


def test_a_failing_pip_says_why_and_is_tried_again(tree: Path, venv: Path) -> None:
    """An installation that broke off and is taken for done at the next start."""
    (venv / "bin/pip").write_text("1")
    failed = bash(tree, "scripts/lab.sh")
    assert failed.returncode == 1
    assert "ERROR: No matching distribution" in failed.stderr
    (venv / "bin/pip").write_text("0")
    assert bash(tree, "scripts/lab.sh --setup-only").returncode == 0
    assert sum("pip install" in line for line in asked(venv)) == 2


def test_lab_gets_the_flags_and_listens_on_loopback(tree: Path, venv: Path) -> None:
    """A flag that is eaten, or a Lab that the whole network can reach without a token."""
    assert bash(tree, "scripts/lab.sh --no-browser --port 8899").returncode == 0
    lab = asked(venv)[-1]
    assert lab.startswith("-m jupyterlab")
    assert "--no-browser --port 8899" in lab
    assert "--ServerApp.ip=127.0.0.1" in lab
    assert "notebooks/00_start_here.ipynb" in lab
    assert "token" not in lab


def test_doctor_that_fails_stops_lab_unless_forced(tree: Path, venv: Path) -> None:
    """Lab that opens on a course whose every chapter then fails."""
    (venv / "bin/doctor").write_text("1")
    stopped = bash(tree, "scripts/lab.sh")
    assert stopped.returncode == 1
    assert "FAIL Cache" in stopped.stdout
    assert "--force" in stopped.stderr
    assert not [line for line in asked(venv) if "jupyterlab" in line]
    assert bash(tree, "scripts/lab.sh --force").returncode == 0
    assert asked(venv)[-1].startswith("-m jupyterlab")


def test_test_script_runs_every_kind_of_check_and_passes_flags_on(tree: Path, venv: Path) -> None:
    """A linter that was dropped from CI, or `-k` that never reaches pytest."""
    executable(venv / "bin/shellcheck", '#!/bin/sh\necho "-m shellcheck $*" >>"$(dirname "$0")/asked"\n')
    assert bash(tree, "scripts/test.sh -k 'two words' -x").returncode == 0
    tools = [line.split()[1] for line in asked(venv)]
    assert tools == ["pip", "ruff", "ruff", "mypy", "shellcheck", "pytest"]
    assert asked(venv)[-1].endswith("-k two words -x")


@pytest.mark.parametrize("broken", ["ruff", "mypy", "pytest"])
def test_a_check_that_fails_fails_the_test_script(tree: Path, venv: Path, broken: str) -> None:
    """A red linter in a green CI."""
    executable(venv / "bin/shellcheck", "#!/bin/sh\n")
    python = venv / "bin/python"
    python.write_text(python.read_text().replace('"-m "*) exit 0', f'"-m {broken} "*) exit 1 ;;\n  "-m "*) exit 0'))
    assert bash(tree, "scripts/test.sh").returncode == 1


def test_a_venv_whose_making_was_broken_off_is_made_again(tree: Path, venv: Path) -> None:
    """Ctrl-C while pip goes into .venv: every later start finds a Python, and fails for want of pip."""
    executable(venv / "bin/python", f'#!/bin/sh\n[ "$2" = "import pip" ] && exit 1\nexec "{sys.executable}" "$@"\n')
    executable(tree / "bin/python", f'#!/bin/sh\n[ "$1" = -m ] && exit 1\nexec "{sys.executable}" "$@"\n')
    ended = bash(tree, "scripts/lab.sh", PYTHON=str(tree / "bin/python"))
    assert "making .venv" in ended.stdout
    assert "-m venv failed" in ended.stderr
