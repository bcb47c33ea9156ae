"""What an installed copy of the course holds: every asset, and nothing of the tests or the notebooks."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpt2course"
ASSETS = {path for path in PACKAGE.glob("assets/**/*") if path.is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel that is built here, from a copy of the tree, with the setuptools that is installed."""
    setuptools = pytest.importorskip("setuptools", minversion="77")  # the version that pyproject.toml asks for
    assert setuptools
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name in ("gpt2course", "notebooks", "scripts", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    program = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tree / "dist" / done.stdout.split()[-1]) as archive:
        return set(archive.namelist())


def test_package_data_covers_the_assets() -> None:
    """A new kind of asset that is there in a clone and missing for whoever installs the package."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["gpt2course"]
    covered = {path for pattern in patterns for path in PACKAGE.glob(pattern) if path.is_file()}
    assert covered == ASSETS
    assert {"VOCABULARY_LICENSE", "gpt2_vocab.bpe.xz"} <= {path.name for path in ASSETS}


def test_wheel_holds_the_whole_package(wheel: set[str]) -> None:
    """A folder of assets or a subpackage that the build leaves out."""
    modules = {path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts}
    assert {path.relative_to(ROOT).as_posix() for path in ASSETS | modules} <= wheel


def test_wheel_holds_nothing_else(wheel: set[str]) -> None:
    """A top-level package called `tests` in everybody's site-packages."""
    top = {name.split("/")[0] for name in wheel}
    assert {name.split("-")[0] for name in top} == {"gpt2course"}
    assert len(top) == 2, "the package and its .dist-info"
