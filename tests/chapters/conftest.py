"""Fixtures of the tests of the chapters' machinery."""

import shutil
from pathlib import Path

import pytest
from sample_chapter import make_chapter

from gpt2course import chapters


@pytest.fixture(scope="session")
def refreshed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sample chapter, run once."""
    folder = tmp_path_factory.mktemp("chapters") / "notebooks"
    make_chapter(folder)
    chapters.refresh(["04"], folder)
    return folder


@pytest.fixture
def folder(refreshed: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    shutil.copytree(refreshed, tmp_path / "notebooks")
    return tmp_path / "notebooks"
