"""A killed `prepare` goes on, and what it makes is to the byte what an undisturbed one makes."""

import importlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from kill_campaign import OPTIONS, files

from gpt2course.data import Document, Prepared, prepare
from gpt2course.data.growing import HEADER, JOURNAL

ENCODE = importlib.import_module("gpt2course.data.encode")
MODULE = importlib.import_module("gpt2course.data.prepare")
CAMPAIGN = Path(__file__).with_name("kill_campaign.py")


def kill_again_and_again(corpus: Path, tmp_path: Path, runs: int, seed: int) -> dict[str, int]:
    """What the campaign tells; see there."""
    words = [str(corpus), str(tmp_path), str(runs), str(seed)]
    shown = subprocess.run([sys.executable, str(CAMPAIGN), *words], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    found: dict[str, int] = json.loads(shown.stdout)
    assert found["shards"] > 8
    return found


@pytest.mark.distributed
def test_killed_at_random_moments(corpus: Path, tmp_path: Path) -> None:
    """A shard with a hole or with tokens twice, a document lost between two runs, or half a folder under its name."""
    found = kill_again_and_again(corpus, tmp_path, runs=12, seed=0)
    assert found["kills"] >= 10
    assert found["with_journal"] >= 5


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.distributed
def test_killed_at_many_random_moments(corpus: Path, tmp_path: Path) -> None:
    """The same, hundreds of times."""
    assert kill_again_and_again(corpus, tmp_path, runs=300, seed=1)["kills"] >= 250


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> list[str]:
    """From now on the n-th document raises; the names of the documents that were tokenised are kept."""
    seen: list[str] = []
    real = ENCODE.encode

    def encode(item: Any) -> Any:
        seen.append(item[1].name)
        if len(seen) == number:
            raise error
        return real(item)

    monkeypatch.setattr(ENCODE, "encode", encode)
    monkeypatch.setattr(ENCODE, "CHUNK_DOCUMENTS", 4)
    return seen


def interrupted(corpus: Path | str, out: Path, monkeypatch: pytest.MonkeyPatch, number: int = 30) -> None:
    """A run that is stopped by Ctrl-C at the n-th document."""
    with monkeypatch.context() as patch:
        stop_at(patch, number, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus, out, **OPTIONS)


def test_what_is_there_is_not_tokenised_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of two days that starts over after a reboot."""
    whole = prepare(corpus, tmp_path / "whole", **OPTIONS)
    interrupted(corpus, tmp_path / "out", monkeypatch, 50)
    journal = json.loads((tmp_path / "out.part" / JOURNAL).read_text())
    seen = stop_at(monkeypatch, 0, KeyboardInterrupt())
    assert prepare(corpus, tmp_path / "out", **OPTIONS).fingerprint == whole.fingerprint
    assert journal["items"] >= 40
    assert len(seen) == 60 - journal["items"]


@pytest.mark.distributed
def test_going_on_with_more_processes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that must go on with as many processes as it was begun with."""
    whole = prepare(corpus, tmp_path / "whole", **OPTIONS)
    interrupted(corpus, tmp_path / "out", monkeypatch)
    made = prepare(corpus, tmp_path / "out", **OPTIONS, processes=2)
    assert files(made.folder) == files(whole.folder)


def test_it_says_what_is_kept(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody who removes the folder since nothing said that it is good."""
    monkeypatch.setitem(OPTIONS, "progress", True)
    interrupted(corpus, tmp_path / "out", monkeypatch)
    assert f"tokens are kept in {tmp_path / 'out.part'}; the same command goes on from there" in capsys.readouterr().err
    prepare(corpus, tmp_path / "out", **OPTIONS)
    assert "checking what is there" in capsys.readouterr().err


def test_other_settings_are_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two sizes in one folder, or the first half of one text and the second of another."""
    interrupted(corpus, tmp_path / "out", monkeypatch)
    with pytest.raises(ValueError, match=r"out\.part was begun with shard_tokens 150, not 99; choose another folder"):
        prepare(corpus, tmp_path / "out", **OPTIONS | {"shard_tokens": 99})
    (corpus / "000.txt").write_text("another text")
    with pytest.raises(ValueError, match=r"was begun with another text; choose"):
        prepare(corpus, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("damage", ["other bytes", "too short", "gone"])
def test_damaged_shards_are_not_gone_on_with(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A disk's fault in the first hour, found in the trained model."""
    interrupted(corpus, tmp_path / "out", monkeypatch)
    shard = tmp_path / "out.part" / "train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[HEADER.size + 10] ^= 1
    {"other bytes": lambda: shard.write_bytes(content), "too short": lambda: shard.write_bytes(content[:99])}.get(
        damage, shard.unlink
    )()
    with pytest.raises(ValueError, match=r"out\.part can't be gone on with \(.*\); remove it and start again"):
        prepare(corpus, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"settings": {}, "splits": {}, "items": 3}'])
def test_damaged_journal_is_told(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """A JSONDecodeError or a KeyError that names no file."""
    interrupted(corpus, tmp_path / "out", monkeypatch)
    (tmp_path / "out.part" / JOURNAL).write_text(content)
    with pytest.raises(ValueError, match=rf"{JOURNAL} can't be read .*; remove .*out\.part and start again"):
        prepare(corpus, tmp_path / "out", **OPTIONS)


def test_foreign_part_folder_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    """Somebody's folder that happens to be called out.part, emptied."""
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"out\.part exists and holds other things \(thesis\.txt\); choose another"):
        prepare(corpus, tmp_path / "out", progress=False)
    assert (tmp_path / "out.part" / "thesis.txt").read_text() == "years of work"


def test_full_disk_is_told_and_gone_on_from(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the last hour, and all that was done is lost, or half a shard taken for a whole one."""
    whole = prepare(corpus, tmp_path / "whole", **OPTIONS)
    monkeypatch.setattr(ENCODE, "CHUNK_DOCUMENTS", 4)
    real, calls = os.fsync, itertools.count()

    def full(descriptor: int) -> None:
        if next(calls) >= 20:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"no space is left for .*out\.part; make room, and run the same command again"
        ):
            prepare(corpus, tmp_path / "out", **OPTIONS)
        calls = itertools.count(20)
        with pytest.raises(OSError, match=r"no space is left for .*; make room, or choose another folder with --out"):
            prepare(corpus, tmp_path / "other", **OPTIONS)
    assert not (tmp_path / "other.part").exists()
    assert files(prepare(corpus, tmp_path / "out", **OPTIONS).folder) == files(whole.folder)


def test_small_disk_is_refused_at_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 5 GB that is full after two hours of tokenising 10 B tokens."""
    monkeypatch.setattr(MODULE.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**9))
    with pytest.raises(OSError, match=r"10,000,000,000 tokens take 20\.0 GB in .*, and 5\.0 GB are free; make room"):
        prepare(corpus, tmp_path / "new" / "out", max_tokens=10**10, progress=False)
    assert prepare(corpus, tmp_path / "out", max_tokens=10**3, progress=False).n_tokens["train"] > 0


@pytest.mark.distributed
def test_a_killed_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that the system kills for its memory, and a run that waits for it for ever."""

    def deadly(corpus: object) -> Iterator[Document]:
        for number in range(100_000):
            if number == 3000:
                for child in multiprocessing.active_children():
                    child.kill()
            yield Document(f"{number}", "a document of some ten tokens or so")

    monkeypatch.setattr(MODULE, "documents", deadly)
    with pytest.raises(OSError, match=r"one of the 2 processes that tokenise ended unasked, .* fewer --processes"):
        prepare("hf:owner/name", tmp_path / "out", processes=2, progress=False)


@pytest.mark.distributed
def test_workers_end_with_a_killed_run(tmp_path: Path) -> None:
    """Sixteen processes that wait for work for ever, after the one that gave it was killed."""
    code = f"""
import itertools, importlib, pathlib
from gpt2course.data import Document
module = importlib.import_module("gpt2course.data.prepare")
def endless(corpus):
    for n in itertools.count():
        if n == 5000:
            print("working", flush=True)
        yield Document(str(n), "a document of some ten tokens or so")
module.documents = endless
module.prepare("hf:owner/name", pathlib.Path({str(tmp_path / "out")!r}), processes=2, progress=False)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "working\n"
        workers = psutil.Process(run.pid).children(recursive=True)
        assert len(workers) >= 2
        run.kill()
    assert psutil.wait_procs(workers, timeout=30)[1] == []


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The real `datasets` library streaming three files of 200 rows from here, with no network to ask."""
    datasets = pytest.importorskip("datasets")
    arrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rng, paths = np.random.default_rng(0), []
    for number in range(3):
        paths.append(tmp_path / f"part-{number}.parquet")
        texts = [f"page {n} " + "word " * int(rng.integers(1, 40)) for n in range(200)]
        rows = [{"id": f"<urn:{number}:{n}>", "text": text} for n, text in enumerate(texts)]
        table.write_table(arrow.Table.from_pylist(rows), paths[-1], row_group_size=32)
    real = datasets.load_dataset

    def load(repo: str, config: str | None, **options: Any) -> Any:
        assert options == {"split": "train", "streaming": True}
        names = [str(path) for path in paths]
        return real("parquet", data_files=names, cache_dir=str(tmp_path / "hf"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return paths


@pytest.mark.parametrize("number", [7, 201, 450, 590])
def test_stream_goes_on_where_it_was(
    parquet: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Twenty gigabytes fetched again to be thrown away, or a document lost or read twice where the stream was cut."""
    whole = prepare("hf:owner/name", tmp_path / "whole", **OPTIONS)
    assert sum(whole.n_documents.values()) == 600
    interrupted("hf:owner/name", tmp_path / "out", monkeypatch, number)
    for path in parquet[1 : max(0, number - 16) // 200]:  # the first is looked at for the names of the columns
        path.write_bytes(b"cannot be read any more")
    assert files(prepare("hf:owner/name", tmp_path / "out", **OPTIONS).folder) == files(whole.folder)


def test_lost_connection_is_told_and_gone_on_from(
    parquet: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty lines of traceback from a library of a library, after which nobody knows whether to start over."""
    whole = prepare("hf:owner/name", tmp_path / "whole", **OPTIONS)
    content = parquet[2].read_bytes()
    parquet[2].write_bytes(b"cannot be read at the moment")
    monkeypatch.setattr(ENCODE, "CHUNK_DOCUMENTS", 4)
    with pytest.raises(ConnectionError, match=r"owner/name cannot be reached or read .* run the same command again"):
        prepare("hf:owner/name", tmp_path / "out", **OPTIONS)
    assert json.loads((tmp_path / "out.part" / JOURNAL).read_text())["items"] > 390
    parquet[2].write_bytes(content)
    assert files(prepare("hf:owner/name", tmp_path / "out", **OPTIONS).folder) == files(whole.folder)


def test_stream_that_knows_no_place_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older library, or another kind of stream, and a run that starts over or loses documents."""
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"page {n} " + "word " * (n % 17)} for n in range(100)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: iter(rows))
    whole = prepare("hf:owner/name", tmp_path / "whole", **OPTIONS)
    interrupted("hf:owner/name", tmp_path / "out", monkeypatch, 70)
    assert files(prepare("hf:owner/name", tmp_path / "out", **OPTIONS).folder) == files(whole.folder)
    assert Prepared.open(tmp_path / "out").n_documents == whole.n_documents
