"""Every chapter is run once, from a copy, without a network; the executed copies stay in build/ for the site."""

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from gpt2course import chapters

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "notebooks"
GUARD = Path(__file__).parent / "guard"
CELL_SECONDS = 300
SECONDS = pytest.StashKey[dict[str, float]]()


@dataclass(frozen=True)
class Run:
    """How one chapter's copy went."""

    path: Path
    seconds: float
    failure: str


def guarded_environment() -> dict[str, str]:
    """This environment with the guard in front: child processes and their kernels reach loopback only."""
    paths = [str(GUARD), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


@pytest.fixture(scope="session")
def guarded_env() -> dict[str, str]:
    return guarded_environment()


def ci_parameters() -> dict[str, dict[str, object]]:
    """Parameters by chapter number, as the tests run them."""
    return yaml.safe_load((Path(__file__).parent / "ci_parameters.yaml").read_text(encoding="utf-8")) or {}


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest) -> dict[str, Run]:
    """Prepare the chapters that this session tests (papermill), execute the copies once (nbmake); how each went."""
    wanted = {item.callspec.params["stem"] for item in request.session.items if "runs" in item.fixturenames}
    if len(wanted) == len(chapters.find()):
        shutil.rmtree(BUILD, ignore_errors=True)
    paths = chapters.prepare(BUILD, ci_parameters(), sorted(wanted))
    report = BUILD.parent / "chapters.xml"
    command = [sys.executable, "-m", "pytest", "--nbmake", "--overwrite", "--nbmake-kernel=python3", "-q"]
    command += [f"--nbmake-timeout={CELL_SECONDS}", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += [f"--rootdir={BUILD}", "-c", os.devnull, *map(str, paths)]
    done = subprocess.run(command, cwd=BUILD, env=guarded_environment(), capture_output=True, text=True, check=False)
    assert report.exists(), done.stdout + done.stderr
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        stem = next(path.stem for path in paths if path.stem in f"{case.get('classname')} {case.get('name')}")
        trouble = [*case.iter("failure"), *case.iter("error")]
        failure = "\n".join(re.sub(r"\x1b\[[0-9;]*m", "", item.text or "failed without a word") for item in trouble)
        path = next(path for path in paths if path.stem == stem)
        found[stem] = Run(path, float(case.get("time", "nan")), failure)
    request.config.stash[SECONDS] = {stem: run.seconds for stem, run in found.items()}
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how long each chapter took."""
    if seconds := config.stash.get(SECONDS, None):
        terminalreporter.section("chapters")
        for stem, taken in sorted(seconds.items()):
            terminalreporter.write_line(f"{taken:6.1f} s  {stem}")
        terminalreporter.write_line(f"{sum(seconds.values()):6.1f} s  together")
