"""What `prepare` leaves behind when it cannot finish, and what it says."""

import importlib
import threading
from pathlib import Path
from typing import Any

import pytest
from made_corpus import TEXTS

from gpt2course.data import Prepared, prepare
from gpt2course.data.prepare import META, default_folder

ENCODE = importlib.import_module("gpt2course.data.encode")
MODULE = importlib.import_module("gpt2course.data.prepare")  # the package has a function of that name


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_run_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """A run stopped half way, and a next one that trains on half the corpus."""
    real, calls = ENCODE.encode, 0

    def stop(item: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise error("stopped")
        return real(item)

    monkeypatch.setattr(ENCODE, "encode", stop)
    out = tmp_path / "out" / "tokens"
    with pytest.raises(error):
        prepare(corpus, out, shard_tokens=50, progress=False)
    assert list(out.parent.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("GPT2COURSE_CACHE", str(tmp_path / "cache"))
    assert sum(prepare(corpus, out, progress=False).n_documents.values()) == len(TEXTS)


def test_two_processes_at_once_make_it_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that prepare the same corpus into each other's files, or the slower one that fails at the end."""
    out = tmp_path / "tokens"
    real, calls = ENCODE.encode, 0
    theirs: list[Prepared] = []
    other = threading.Thread(target=lambda: theirs.append(prepare(corpus, out, progress=True)))

    def start_the_other(item: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:
            other.start()
            other.join(0.2)
            assert other.is_alive(), "it did not wait"
        return real(item)

    monkeypatch.setattr(ENCODE, "encode", start_the_other)
    mine = prepare(corpus, out, progress=False)
    other.join(60)
    assert theirs == [mine]
    assert calls == len(TEXTS)
    assert [path.name for path in tmp_path.iterdir() if "tokens" in path.name] == ["tokens"]
    assert sorted(path.name for path in out.iterdir()) == [META, "train_000000.bin", "val_000000.bin"]


def test_foreign_folder_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    """Somebody's folder of other things, replaced by shards."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and holds no finished corpus; choose another folder"):
        prepare(corpus, tmp_path / "mine", progress=False)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_unfinished_folder_is_not_opened(tmp_path: Path) -> None:
    """A folder without its meta.json, read as if it were whole."""
    with pytest.raises(FileNotFoundError, match=f"no {META}; make the shards with `gpt2course data`"):
        Prepared.open(tmp_path)


def test_folder_of_another_corpus_is_not_taken_for_this_one(corpus: Path, tmp_path: Path) -> None:
    """A folder named twice, and a run that trains on the other corpus without a word."""
    prepare(corpus, tmp_path / "tokens", progress=False)
    with pytest.raises(ValueError, match=r"made with corpus .*, not stdlib; choose another folder"):
        prepare("stdlib", tmp_path / "tokens", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.2}, r"val_fraction 0\.3, not 0\.2;"),
        ({"max_tokens": 500}, "max_tokens None, not 500;"),
    ],
)
def test_folder_made_otherwise_is_not_taken_for_this_one(
    corpus: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """`--out shards --max-tokens 500` that opens the whole corpus from last week, or the other split of it."""
    made = prepare(corpus, tmp_path / "tokens", val_fraction=0.3, progress=False)
    with pytest.raises(ValueError, match=message):
        prepare(corpus, tmp_path / "tokens", **({"val_fraction": 0.3, "progress": False} | options))
    assert prepare(corpus, tmp_path / "tokens", val_fraction=0.3, progress=False) == made


def test_another_format_makes_another_cache_folder(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder from an older version of the course, opened and called damaged."""
    old = default_folder(str(corpus), 0.05, None)
    monkeypatch.setattr(MODULE, "FORMAT", 1)
    assert default_folder(str(corpus), 0.05, None) != old


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_damaged_meta_is_told(content: str, tmp_path: Path) -> None:
    """A JSONDecodeError or a TypeError that names no file."""
    (tmp_path / META).write_text(content)
    with pytest.raises(ValueError, match=rf"{META} can't be read .* make it again"):
        Prepared.open(tmp_path)


def test_lost_shard_is_noticed(corpus: Path, tmp_path: Path) -> None:
    """One of many shards not copied, and a run that trains on the others without a word."""
    made = prepare(corpus, tmp_path / "tokens", shard_tokens=300, progress=False)
    (made.folder / "train_000001.bin").unlink()
    with pytest.raises(ValueError, match=r"tokens for train, and meta\.json says .*make it again"):
        made.stream("train")
    assert len(made.stream("val")) == made.n_tokens["val"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction is 0.0; it must lie between 0 and 1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"shard_tokens": 0}, "shard_tokens 0, processes 1, max_tokens None: each at least 1"),
        ({"processes": 0}, "processes 0"),
        ({"max_tokens": 0}, "max_tokens 0"),
    ],
)
def test_bad_arguments_are_told(corpus: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """An error an hour later, or an endless loop."""
    with pytest.raises(ValueError, match=message):
        prepare(corpus, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["empty folder", "empty file", "unknown"])
def test_nothing_to_split_is_told(tmp_path: Path, kind: str) -> None:
    """An empty corpus made into shards that hold one end of text each."""
    corpus = tmp_path / kind.replace(" ", "-")
    if kind == "empty folder":
        corpus.mkdir()
    if kind == "empty file":
        corpus.touch()
    with pytest.raises(ValueError, match="no corpus" if kind == "unknown" else "no text of .* fell to train"):
        prepare(corpus, tmp_path / "out", progress=False)
    assert not any("out" in path.name for path in tmp_path.iterdir())
