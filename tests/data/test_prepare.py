"""Text to shards: every document whole in one split, the folder whole or not there at all."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_corpus import TEXTS

from gpt2course.data import Document, Prepared, TokenStream, prepare
from gpt2course.data.prepare import META, assign, cut_single, default_folder, split_of
from gpt2course.tokenizer import EOT, get_tokenizer

MODULE = importlib.import_module("gpt2course.data.prepare")  # the package has a function of that name


def tokens_of(prepared: Prepared, split: str) -> list[int]:
    stream = prepared.stream(split)
    return stream.read(0, len(stream)).tolist()


def split_at_ends(ids: list[int]) -> list[str]:
    """The documents of a stream, decoded."""
    found: list[str] = []
    current: list[int] = []
    for token in ids:
        if token == EOT:
            found.append(get_tokenizer().decode(current))
            current = []
        else:
            current.append(token)
    assert not current, "the stream does not end with a document"
    return found


def test_every_document_is_whole_in_one_split(corpus: Path) -> None:
    """Near-copies of validation windows in training, as windows of one document fall on both sides."""
    made = prepare(corpus, val_fraction=0.3, progress=False)
    expected: dict[str, list[str]] = {"train": [], "val": []}
    for name, text in TEXTS.items():
        expected[split_of(name, 0.3)].append(text)
    assert 5 < len(expected["val"]) < 35
    for split in ("train", "val"):
        assert split_at_ends(tokens_of(made, split)) == expected[split]
        assert made.n_documents[split] == len(expected[split])
        assert made.n_bytes[split] == sum(len(text.encode()) for text in expected[split])
        assert made.n_tokens[split] == len(tokens_of(made, split))


def test_text_cannot_end_a_document(corpus: Path) -> None:
    """`<|endoftext|>` in a text, taken for the end of the document."""
    made = prepare(corpus, progress=False)
    ends = sum(tokens_of(made, split).count(EOT) for split in ("train", "val"))
    assert ends == len(TEXTS)
    assert any("<|endoftext|>" in text for text in TEXTS.values())


def test_split_depends_on_the_name_alone() -> None:
    """A new document that moves others from validation into training."""
    names = [f"document {n}" for n in range(4000)]
    val = {name for name in names if split_of(name, 0.05) == "val"}
    assert 0.04 < len(val) / len(names) < 0.06
    assert val <= {name for name in names if split_of(name, 0.1) == "val"}
    few = [Document(name, "x") for name in names[:50]]
    assert {d.name: s for s, d in assign(few, 0.05)} == {d.name: s for s, d in assign(reversed(few), 0.05)}


def test_single_document_is_cut_at_a_line() -> None:
    """Validation text that begins in the middle of a line, or a corpus of one file that cannot be split."""
    text = "".join(f"line {n}\n" for n in range(100))
    (train_split, train), (val_split, val) = cut_single(Document("one", text), 0.1)
    assert (train_split, val_split) == ("train", "val")
    assert train.text + val.text == text
    assert train.text.endswith("\n")
    assert val.text.startswith("line 9")
    assert 0.08 * len(text) < len(val.text) < 0.12 * len(text)


@pytest.mark.parametrize("text", ["x" * 1000, "title\n" + "x" * 1000, "\n" + "x y " * 300])
def test_single_long_line_is_cut_inside(text: str) -> None:
    """A file of one title and one endless line, of which all but the title goes into validation."""
    (_, train), (_, val) = cut_single(Document("one", text), 0.1)
    assert train.text + val.text == text
    assert len(val.text) == pytest.approx(0.1 * len(text), abs=2)


def test_single_file(tmp_path: Path) -> None:
    """`gpt2course data --corpus book.txt`."""
    path = tmp_path / "book.txt"
    path.write_text("a line of the book\n" * 200)
    made = prepare(path, val_fraction=0.1, progress=False)
    assert made.n_documents == {"train": 1, "val": 1}
    both = split_at_ends(tokens_of(made, "train")) + split_at_ends(tokens_of(made, "val"))
    assert "".join(both) == path.read_text()


def test_several_processes_equal_one(corpus: Path, tmp_path: Path) -> None:
    """Documents in the order in which workers happen to finish."""
    for n in range(len(TEXTS), 300):
        (corpus / f"{n:03}.txt").write_text(f"short document {n}")
    one = prepare(corpus, tmp_path / "one", val_fraction=0.2, progress=False)
    two = prepare(corpus, tmp_path / "two", val_fraction=0.2, processes=2, progress=False)
    assert one.fingerprint == two.fingerprint
    assert [tokens_of(one, split) for split in ("train", "val")] == [
        tokens_of(two, split) for split in ("train", "val")
    ]
    assert (one.n_documents, one.n_tokens, one.n_bytes) == (two.n_documents, two.n_tokens, two.n_bytes)


def test_several_processes_read_a_stream_as_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed corpus of terabytes read into memory to its end, since a pool takes its input as fast as it comes."""
    read = 0

    def endless(corpus: object) -> Iterator[Document]:
        nonlocal read
        while True:
            read += 1
            assert read < 2000, "documents are read far ahead of their use"
            yield Document(f"{read}", "a streamed document of some ten tokens or so")

    monkeypatch.setattr(MODULE, "documents", endless)
    made = prepare("hf:owner/name", tmp_path / "out", max_tokens=3000, processes=2, progress=False)
    assert 3000 <= sum(made.n_tokens.values()) < 4000


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 10**6])
def test_shard_size_does_not_change_the_tokens(corpus: Path, tmp_path: Path, shard_tokens: int) -> None:
    """Tokens lost where one shard is full and the next begins."""
    whole = prepare(corpus, tmp_path / "whole", val_fraction=0.5, max_tokens=300, progress=False)
    cut = prepare(corpus, tmp_path / "cut", val_fraction=0.5, max_tokens=300, shard_tokens=shard_tokens, progress=False)
    assert cut.fingerprint == whole.fingerprint
    assert tokens_of(cut, "train") == tokens_of(whole, "train")
    sizes = [len(part) for part in cut.stream("train").parts]
    assert max(sizes) <= shard_tokens


def test_max_tokens_ends_with_a_document(corpus: Path) -> None:
    """A whole corpus tokenised where a small part was asked for; half a document at its end."""
    everything = prepare(corpus, val_fraction=0.3, progress=False)
    some = prepare(corpus, val_fraction=0.3, max_tokens=800, progress=False)
    assert some.folder != everything.folder
    assert 800 <= sum(some.n_tokens.values()) < sum(everything.n_tokens.values())
    for split in ("train", "val"):
        part, whole = tokens_of(some, split), tokens_of(everything, split)
        assert part == whole[: len(part)]
        assert part[-1] == EOT


def test_max_tokens_leaves_something_to_validate_on(corpus: Path, tmp_path: Path) -> None:
    """A small max_tokens that is reached before the first validation document, and an error about it."""
    assert prepare(corpus, max_tokens=1, progress=False).n_documents["val"] == 1
    (tmp_path / "one.txt").write_text("a line\n" * 100)
    assert prepare(tmp_path / "one.txt", max_tokens=5, progress=False).n_documents == {"train": 1, "val": 1}


def test_second_time_opens_what_is_there(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of tokenising at each start."""
    first = prepare(corpus, progress=False)
    monkeypatch.setattr(MODULE, "encode_in_order", None)
    assert prepare(corpus, progress=False) == first
    assert prepare(str(corpus), progress=False) == first
    assert Prepared.open(first.folder) == first


def test_changed_corpus_is_made_anew(corpus: Path) -> None:
    """An edited file, and a run on the old tokens."""
    first = prepare(corpus, progress=False)
    (corpus / "000.txt").write_text("something else")
    second = prepare(corpus, progress=False)
    assert first.folder != second.folder
    assert first.fingerprint != second.fingerprint


def test_cache_folder_depends_on_what_matters(corpus: Path, cache: Path) -> None:
    """Two different corpora in one folder."""
    folders = [
        default_folder(str(corpus), 0.1, None),
        default_folder(str(corpus), 0.2, None),
        default_folder(str(corpus), 0.1, 1000),
        default_folder("stdlib", 0.1, None),
        default_folder("hf:owner/name:part", 0.1, None),
    ]
    assert len(set(folders)) == len(folders)
    assert all(folder.parent == cache / "tokens" for folder in folders)
    assert folders[4].name.startswith("name-part-")


def test_meta_is_plain_json(corpus: Path) -> None:
    """Facts about a corpus that only this program can read; a path of this machine in them."""
    made = prepare(corpus, progress=False)
    meta = json.loads((made.folder / META).read_text())
    assert meta.keys() == {
        "corpus",
        "val_fraction",
        "max_tokens",
        "n_documents",
        "n_tokens",
        "n_bytes",
        "fingerprint",
    }
    assert meta["fingerprint"] == made.fingerprint
    assert (meta["val_fraction"], meta["max_tokens"]) == (0.05, None)
    assert sorted(path.name for path in made.folder.iterdir()) == [META, "train_000000.bin", "val_000000.bin"]


def test_progress_can_be_off(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Bars in a log file or a notebook's output; or no bar at all where one was asked for."""
    prepare(corpus, tmp_path / "quiet", progress=False)
    assert capfd.readouterr() == ("", "")
    prepare(corpus, tmp_path / "loud", progress=True)
    assert "tokenising corpus" in capfd.readouterr().err


def test_small_stdlib(tmp_path: Path) -> None:
    """The default corpus, prepared without a network."""
    made = prepare("stdlib", tmp_path / "tokens", max_tokens=50_000, progress=False)
    assert made.corpus == "stdlib"
    assert isinstance(made.stream("train"), TokenStream)
    assert 1.5 < made.n_bytes["train"] / made.n_tokens["train"] < 6


def test_hugging_face_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streamed path, from the library's rows to shards."""
    datasets = pytest.importorskip("datasets")
    rows = [{"id": f"<urn:{n}>", "text": f"web page number {n} 🙂"} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    real = datasets.load_dataset

    def load(repo: str, config: str | None, **options: Any) -> Any:
        return real("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "hf"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    made = prepare("hf:owner/name", tmp_path / "tokens", val_fraction=0.2, progress=False)
    found = split_at_ends(tokens_of(made, "train")) + split_at_ends(tokens_of(made, "val"))
    assert sorted(found) == sorted(row["text"] for row in rows)
    assert made.n_documents["val"] == sum(split_of(row["id"], 0.2) == "val" for row in rows)
