"""Corpora by name: what they hold, and what is said when one cannot be had."""

import hashlib
import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt2course.data import CORPORA, Document, cache_dir, corpora, documents

PLAY = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 4000


class Server(http.server.ThreadingHTTPServer):
    """Stands in for the address of tinyshakespeare; its `answer` says how it behaves."""

    answer = "good"
    requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/input.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests += 1
        body = PLAY.encode()
        if self.server.answer == "missing":
            self.send_error(404)
            return
        if self.server.answer == "corrupt":
            body = body[:-1] + b"?"
        self.send_response(200)
        self.close_connection = True
        if self.server.answer == "broken-off chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s" % (len(body), body[: len(body) // 2]))
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.server.answer == "broken-off" else body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(corpora, "TINYSHAKESPEARE_URL", running.url)
        monkeypatch.setattr(corpora, "TINYSHAKESPEARE_SHA256", hashlib.sha256(PLAY.encode()).hexdigest())
        yield running
        running.shutdown()
        thread.join()


def test_names() -> None:
    """A corpus that the documentation names and the code does not know."""
    assert list(CORPORA) == ["stdlib", "stdlib-prose", "tinyshakespeare", "fineweb-edu"]
    assert documents.__doc__ is not None
    assert all(f'"{name}"' in documents.__doc__ for name in CORPORA)


@pytest.mark.parametrize("corpus", ["stdlb", "/no/such/folder", "hub:owner/name", ""])
def test_unknown_corpus_is_told(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt name taken for a path, and an error about a file that nobody asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diary.txt").write_text("not meant: an empty name is not the current folder")
    with pytest.raises(ValueError, match=r"no corpus .*: use stdlib, stdlib-prose, tinyshakespeare, fineweb-edu, hf:"):
        documents(corpus)


def test_stdlib() -> None:
    """A corpus too small to train on, with tests or installed packages in it, or in an order of its own each time."""
    first, second = list(documents("stdlib")), list(documents("stdlib"))
    assert first == second
    assert sum(len(document.text) for document in first) > 5_000_000
    names = [document.name for document in first]
    assert len(set(names)) == len(names) > 300
    assert {"ast.py", "json/decoder.py", "typing.py"} <= set(names)
    assert not any({"site-packages", "test", "tests"} & set(name.split("/")) for name in names)
    by_name = {document.name: document.text for document in first}
    assert by_name["json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")


def test_stdlib_prose_is_docstrings() -> None:
    """Code among the prose, or docstrings of functions lost."""
    prose = {document.name: document.text for document in itertools.islice(documents("stdlib-prose"), 100)}
    assert sum(map(len, prose.values())) > 100_000
    text = prose["bisect.py"]
    assert text.startswith("Bisection algorithms.")
    assert "Insert item x in list a, and keep it sorted assuming a is sorted." in text
    assert "def insort" not in text
    assert all(prose.values())


def test_docstrings_of_what_is_no_python() -> None:
    """One file that does not parse, and the whole corpus lost."""
    assert corpora._docstrings("def f(:\n") == ""
    assert (
        corpora._docstrings('"""A."""\nclass B:\n    "C."\n    async def d(self):\n        "E."\n') == "A.\n\nC.\n\nE."
    )


def test_file_is_one_document(tmp_path: Path) -> None:
    """A path given as text or as Path; letters outside ASCII read in the machine's own encoding."""
    path = tmp_path / "poem.txt"
    path.write_text("Über\nallen Gipfeln\n", encoding="utf-8")
    expected = [Document("poem.txt", "Über\nallen Gipfeln\n")]
    assert list(documents(path)) == list(documents(str(path))) == expected


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~/books`, which a program started without a shell sees as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert [document.name for document in documents("~/a.txt")] == ["a.txt"]


def test_folder_is_its_files_in_order(tmp_path: Path) -> None:
    """An order that the file system chooses; a version history or a cache taken for text."""
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "A.txt", ".hidden", ".git/objects/aa", "a/.cache/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = list(documents(tmp_path))
    assert [document.name for document in found] == ["A.txt", "a/b/c.txt", "a/z.txt", "b.txt"]
    assert all(document.text == document.name for document in found)


def test_binary_files_of_a_folder_are_skipped_and_counted(tmp_path: Path) -> None:
    """Pictures and weights beside the texts, decoded into megabytes of U+FFFD and trained on."""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "b.bin").write_bytes(b"x" * 8191 + b"\0")
    (tmp_path / "c.txt").write_bytes(b"text " * 2000 + b"\0")
    with pytest.warns(UserWarning, match="2 with a NUL byte") as warned:
        assert [document.name for document in documents(tmp_path)] == ["c.txt"]
    assert len(warned) == 1


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    """`gpt2course data model.safetensors`, which gives a corpus of noise."""
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"model\.safetensors is no text: .* NUL byte"):
        documents(tmp_path / "model.safetensors")


def test_bytes_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    """One old file in Latin-1 that stops a run of hours."""
    (tmp_path / "old.txt").write_bytes(b"caf\xe9")
    assert list(documents(tmp_path)) == [Document("old.txt", "caf�")]


def test_cache_folder_is_made(cache: Path) -> None:
    """A first start that fails since nobody made the folder."""
    assert not cache.exists()
    assert cache_dir() == cache
    assert cache.is_dir()


def test_download_is_kept(server: Server, cache: Path) -> None:
    """The same megabyte fetched at each start."""
    expected = [Document("tinyshakespeare", PLAY)]
    assert list(documents("tinyshakespeare")) == expected
    assert [path.name for path in cache.iterdir()] == ["tinyshakespeare.txt"]
    server.answer = "missing"
    assert list(documents("tinyshakespeare")) == expected
    assert server.requests == 1


def test_damaged_cache_is_fetched_again(server: Server, cache: Path) -> None:
    """A cached file that was cut short, used for ever after."""
    cache.mkdir()
    (cache / "tinyshakespeare.txt").write_text(PLAY[:100])
    assert list(documents("tinyshakespeare")) == [Document("tinyshakespeare", PLAY)]
    assert server.requests == 1


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ("corrupt", ValueError, "has SHA-256 .*, expected .*; the file there is not the known one"),
        ("broken-off", ConnectionError, f"it broke off after {len(PLAY) // 2:,} of {len(PLAY):,} bytes"),
        ("broken-off chunks", ConnectionError, "cannot be reached or read .*IncompleteRead"),
        ("missing", ConnectionError, r"cannot be reached or read \(HTTP Error 404"),
    ],
)
def test_bad_download_is_refused(
    server: Server, cache: Path, answer: str, error: type[Exception], message: str
) -> None:
    """Half a file kept as the whole one; a broken line told as a wrong file."""
    server.answer = answer
    with pytest.raises(error, match=message):
        list(documents("tinyshakespeare"))
    assert list(cache.iterdir()) == []
    server.answer = "good"
    assert list(documents("tinyshakespeare")) == [Document("tinyshakespeare", PLAY)]


def test_ctrl_c_leaves_no_part_of_a_download(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file left in the cache for good."""

    class Interrupted(corpora.tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            raise KeyboardInterrupt

    monkeypatch.setattr(corpora, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(documents("tinyshakespeare"))
    assert list(cache.iterdir()) == []


def test_no_network_is_told(cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback of forty lines in place of: connect once, put the file there, or take another corpus."""
    monkeypatch.setattr(corpora, "TINYSHAKESPEARE_URL", server.url)
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=r"put the file at .*tinyshakespeare\.txt, or use"):
        list(documents("tinyshakespeare"))
    assert list(cache.iterdir()) == []


@pytest.fixture
def local_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The real `datasets` library streaming rows from a file here; what it was asked for is kept."""
    datasets = pytest.importorskip("datasets")
    real, asked = datasets.load_dataset, []
    rows = [{"id": "one", "text": "First text.", "score": 1.0}, {"id": "two", "text": "Zweiter Text.", "score": 2.0}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def load(repo: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((repo, config))
        assert (split, streaming) == ("train", True)
        return real("json", data_files=str(path), split=split, streaming=streaming, cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize(
    ("corpus", "asked"),
    [
        ("fineweb-edu", ("HuggingFaceFW/fineweb-edu", "sample-10BT")),
        ("hf:owner/name", ("owner/name", None)),
        ("hf:owner/name:part", ("owner/name", "part")),
    ],
)
def test_hugging_face(local_dataset: list, corpus: str, asked: tuple[str, str | None]) -> None:
    """A whole data set downloaded before the first document; a configuration that is not passed on."""
    assert list(documents(corpus)) == [Document("one", "First text."), Document("two", "Zweiter Text.")]
    assert local_dataset == [asked]


def test_hugging_face_without_text_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyError in place of the columns that there are."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: [{"content": "x", "id": 1}])
    with pytest.raises(ValueError, match="owner/name has no column 'text', only content, id"):
        list(documents("hf:owner/name"))


def test_hugging_face_without_the_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError that does not say what to install."""
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the extra: pip install 'gpt2course\[hub\]'"):
        list(documents("hf:owner/name"))
