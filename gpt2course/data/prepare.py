"""Text to token shards, split into training and validation by document."""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from gpt2course.data.corpora import Document, cache_dir, documents
from gpt2course.data.shards import TokenStream, write_shard
from gpt2course.tokenizer import EOT, VOCAB_BPE_SHA256, get_tokenizer

META = "meta.json"
FORMAT = 2  # of the folder; part of its name in the cache, so that a change of it makes a new folder
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Prepared:
    """A tokenised corpus on disk.

    Attributes:
        folder: where the shards lie.
        corpus: the name it was made from.
        val_fraction, max_tokens: as given to `prepare`.
        n_documents, n_tokens, n_bytes: counts by split ("train", "val"); bytes are of the UTF-8 text.
        fingerprint: SHA-256 over both splits' tokens, in order.
    """

    folder: Path
    corpus: str
    val_fraction: float
    max_tokens: int | None
    n_documents: dict[str, int]
    n_tokens: dict[str, int]
    n_bytes: dict[str, int]
    fingerprint: str

    def stream(self, split: str) -> TokenStream:
        """The tokens of "train" or "val". Raises ValueError if a shard was lost or added since they were made."""
        stream = TokenStream.open(self.folder, split)
        if len(stream) != self.n_tokens[split]:
            raise ValueError(
                f"{self.folder} holds {len(stream):,} tokens for {split}, and {META} says {self.n_tokens[split]:,}; "
                "remove the folder and make it again"
            )
        return stream

    @classmethod
    def open(cls, folder: Path) -> "Prepared":
        """Read a folder made by `prepare`. Raises FileNotFoundError if it was never finished, ValueError if damaged."""
        meta = folder / META
        if not meta.exists():
            raise FileNotFoundError(f"{folder} has no {META}; make the shards with `gpt2course data`")
        try:
            return cls(folder=folder, **json.loads(meta.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{meta} can't be read ({error}); remove {folder} and make it again") from error


def split_of(name: str, val_fraction: float) -> str:
    """ "val" or "train", by a hash of the document's name, so that it never depends on order or on other documents."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "val" if share < val_fraction else "train"


def cut_single(document: Document, val_fraction: float) -> list[tuple[str, Document]]:
    """A corpus of one document is cut in two, its last part for validation.

    The cut is at a line's end, unless the line is so long that this would more than double the validation part.
    """
    text = document.text
    wanted = int(len(text) * (1 - val_fraction))
    line_end = text.rfind("\n", 0, wanted) + 1
    cut = line_end if len(text) - line_end <= 2 * (len(text) - wanted) else wanted
    return [("train", Document(document.name, text[:cut])), ("val", Document(document.name, text[cut:]))]


def assign(docs: Iterable[Document], val_fraction: float) -> Iterator[tuple[str, Document]]:
    """Each document with its split."""
    stream = iter(docs)
    first = next(stream, None)
    if first is None:
        return
    second = next(stream, None)
    if second is None:
        yield from cut_single(first, val_fraction)
        return
    for document in (first, second):
        yield split_of(document.name, val_fraction), document
    for document in stream:
        yield split_of(document.name, val_fraction), document


def encode(item: tuple[str, Document]) -> tuple[str, int, np.ndarray]:
    """Split, bytes of text, and token ids of one document, `<|endoftext|>` at its end."""
    split, document = item
    ids = get_tokenizer().encode_ordinary(document.text)
    return split, len(document.text.encode()), np.array([*ids, EOT], dtype=np.uint16)


class _SplitWriter:
    """Collects tokens of one split and writes a shard whenever one is full."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.buffer: list[np.ndarray] = []
        self.buffered = self.n_documents = self.n_tokens = self.n_bytes = self.n_shards = 0
        self.digest = hashlib.sha256()

    def add(self, n_bytes: int, ids: np.ndarray) -> None:
        self.buffer.append(ids)
        self.buffered += len(ids)
        self.n_documents += 1
        self.n_tokens += len(ids)
        self.n_bytes += n_bytes
        self.digest.update(ids.astype("<u2").tobytes())
        if self.buffered >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        if not self.buffered:
            return
        ids = np.concatenate(self.buffer)
        for start in range(0, len(ids), self.shard_tokens):
            write_shard(self.folder / f"{self.split}_{self.n_shards:06d}.bin", ids[start : start + self.shard_tokens])
            self.n_shards += 1
        self.buffer, self.buffered = [], 0


@contextmanager
def _encoder_map(processes: int) -> Iterator:
    if processes == 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:

        def in_batches(function: Callable, items: Iterable) -> Iterator:
            # imap alone reads its input to the end at once: a streamed corpus would pile up in memory. So it gets
            # batches, one being tokenised while the next is read.
            source, at_work = iter(items), deque[Iterable]()
            while batch := list(islice(source, 64 * processes)):
                at_work.append(pool.imap(function, batch, chunksize=16))
                if len(at_work) > 1:
                    yield from at_work.popleft()
            yield from chain.from_iterable(at_work)

        yield in_batches


def _source_key(corpus: str) -> str:
    """What tells two versions of a local corpus apart without reading it: names, sizes and times of its files."""
    path = Path(corpus).expanduser()
    if not path.exists():
        return corpus
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return "\n".join(f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)


def default_folder(corpus: str, val_fraction: float, max_tokens: int | None) -> Path:
    """The cache folder of a prepared corpus: its name and a hash of what it depends on."""
    python = sys.version if corpus.startswith("stdlib") else ""
    parts = (_source_key(corpus), python, str(val_fraction), str(max_tokens), str(FORMAT), VOCAB_BPE_SHA256)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(corpus).name) or "corpus"
    return cache_dir() / "tokens" / f"{slug}-{digest}"


def put_in_place(made: Path, folder: Path) -> None:
    """Give a finished folder its name, unless another process, which made the same one, was faster."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / META).exists():
            raise


def refuse_other(found: Prepared, **wanted: str | float | None) -> None:
    """Raise ValueError if a folder was made from another corpus or with other settings than are wanted now."""
    if differ := [name for name, value in wanted.items() if getattr(found, name) != value]:
        told = "; ".join(f"{name} {getattr(found, name)}, not {wanted[name]}" for name in differ)
        raise ValueError(f"{found.folder} was made with {told}; choose another folder or remove it")


def prepare(
    corpus: str | Path = "stdlib",
    folder: Path | None = None,
    *,
    val_fraction: float = 0.05,
    max_tokens: int | None = None,
    shard_tokens: int = 100_000_000,
    processes: int = 1,
    progress: bool = True,
) -> Prepared:
    """Tokenise a corpus into shards, or open them if that was done before.

    Args:
        corpus: see `documents`.
        folder: where to put the shards; by default a folder of the cache. It appears whole or not at all.
        val_fraction: share of documents (of characters, if there is but one document) kept for validation.
        max_tokens: stop at the end of the document with which there are this many tokens and both splits have some; no
            document is cut short.
        shard_tokens: tokens a shard, 2 bytes each.
        processes: worker processes that tokenise; 1 works in this process.
        progress: show a bar.

    Raises:
        ValueError: for bad arguments, an unknown corpus, one too small to split, or a folder made with others.
        ConnectionError: if the corpus must be fetched and cannot.
    """
    name = str(corpus)
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")
    if shard_tokens < 1 or processes < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(
            f"shard_tokens {shard_tokens}, processes {processes}, max_tokens {max_tokens}: each at least 1"
        )
    folder = folder or default_folder(name, val_fraction, max_tokens)
    if (folder / META).exists():
        found = Prepared.open(folder)
        refuse_other(found, corpus=name, val_fraction=val_fraction, max_tokens=max_tokens)
        return found
    if folder.exists():
        raise ValueError(f"{folder} exists and holds no finished corpus; choose another folder or remove it")
    source = documents(corpus)

    beside = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        writers = {split: _SplitWriter(beside, split, shard_tokens) for split in SPLITS}
        total = 0
        with (
            _encoder_map(processes) as encoder_map,
            tqdm(desc=f"tokenising {Path(name).name}", unit="tok", unit_scale=True, disable=not progress) as bar,
        ):
            for split, n_bytes, ids in encoder_map(encode, assign(source, val_fraction)):
                writers[split].add(n_bytes, ids)
                total += len(ids)
                bar.update(len(ids))
                if max_tokens is not None and total >= max_tokens and all(w.n_tokens for w in writers.values()):
                    break
        for split, writer in writers.items():
            writer.flush()
            if writer.n_bytes == 0:
                raise ValueError(f"no text of {name} fell to {split}; give more documents or another val_fraction")
        result = Prepared(
            folder=folder,
            corpus=name,
            val_fraction=val_fraction,
            max_tokens=max_tokens,
            n_documents={split: w.n_documents for split, w in writers.items()},
            n_tokens={split: w.n_tokens for split, w in writers.items()},
            n_bytes={split: w.n_bytes for split, w in writers.items()},
            fingerprint=hashlib.sha256(b"".join(writers[split].digest.digest() for split in SPLITS)).hexdigest(),
        )
        stored = {key: value for key, value in asdict(result).items() if key != "folder"}
        (beside / META).write_text(json.dumps(stored, indent=2) + "\n")
        put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return result
