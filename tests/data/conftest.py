"""A folder of documents, and a cache folder that no other test uses."""

from pathlib import Path

import pytest
from made_corpus import TEXTS


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPT2COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
