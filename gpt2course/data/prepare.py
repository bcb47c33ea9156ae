"""Text to token shards, split into training and validation by document."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from gpt2course.data.corpora import cache_dir, documents
from gpt2course.data.encode import Place, chunks, encode_in_order
from gpt2course.data.growing import META, SPLITS, GrowingCorpus, remove_lock
from gpt2course.data.hub_stream import Document, HubDocuments
from gpt2course.data.shards import TokenStream
from gpt2course.tokenizer import VOCAB_BPE_SHA256

FORMAT = 2  # of the folder; part of its name in the cache, so that a change of it makes a new folder


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


def _source_key(corpus: str) -> str:
    """What tells two versions of a local corpus apart without reading it: names, sizes and times of its files."""
    path = Path(corpus).expanduser()
    if not path.exists():
        return corpus
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return "\n".join(f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)


def _source_digest(corpus: str) -> str:
    """What else the tokens of a corpus depend on: its files, or Python's own."""
    python = sys.version if corpus.startswith("stdlib") else ""
    return hashlib.sha256(f"{_source_key(corpus)}\0{python}".encode()).hexdigest()


def default_folder(corpus: str, val_fraction: float, max_tokens: int | None) -> Path:
    """The cache folder of a prepared corpus: its name and a hash of what it depends on."""
    python = sys.version if corpus.startswith("stdlib") else ""
    parts = (_source_key(corpus), python, str(val_fraction), str(max_tokens), str(FORMAT), VOCAB_BPE_SHA256)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(corpus).name) or "corpus"
    return cache_dir() / "tokens" / f"{slug}-{digest}"


def refuse_other(found: Prepared, **wanted: str | float | None) -> None:
    """Raise ValueError if a folder was made from another corpus or with other settings than are wanted now."""
    if differ := [name for name, value in wanted.items() if getattr(found, name) != value]:
        told = "; ".join(f"{name} {getattr(found, name)}, not {wanted[name]}" for name in differ)
        raise ValueError(f"{found.folder} was made with {told}; choose another folder or remove it")


def refuse_small_disk(folder: Path, max_tokens: int) -> None:
    """Raise OSError if the tokens that are asked for, 2 bytes each, can't fit beside what is there of them already."""
    part = folder.with_name(folder.name + ".part")
    there = sum(path.stat().st_size for path in part.glob("*.bin"))
    disk = next(parent for parent in part.absolute().parents if parent.exists())
    needed, free = 2 * max_tokens - there, shutil.disk_usage(disk).free
    if needed > free:
        raise OSError(
            f"{max_tokens:,} tokens take {needed / 1e9:,.1f} GB in {folder.parent}, and {free / 1e9:,.1f} GB are free; "
            "make room, choose another folder with --out, or fewer --tokens"
        )


def remaining(source: Iterator[Document], val_fraction: float, place: Place | None) -> Iterator[tuple[str, Document]]:
    """The documents behind a place, each with its split."""
    if place is None:
        return assign(source, val_fraction)
    if place.stream is None or not isinstance(source, HubDocuments):
        return islice(assign(source, val_fraction), place.items, None)
    source.go_to(place.stream)
    return ((split_of(document.name, val_fraction), document) for document in source)


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

    A run that was stopped or killed goes on when it is called again with the same arguments; what it lost is at most
    10 million tokens' work. The shards are the same to the byte, whatever the number of processes and of kills.

    Args:
        corpus: see `documents`.
        folder: where to put the shards; by default a folder of the cache. It appears whole or not at all; until then
            they lie beside it, in a folder with ".part" at its name's end.
        val_fraction: share of documents (of characters, if there is but one document) kept for validation.
        max_tokens: stop at the end of the document with which there are this many tokens and both splits have some; no
            document is cut short.
        shard_tokens: tokens a shard, 2 bytes each.
        processes: worker processes that tokenise; 1 works in this process.
        progress: show a bar, with the time left if `max_tokens` is given.

    Raises:
        ValueError: for bad arguments, an unknown corpus, one too small to split, or a folder made with others.
        ConnectionError: if the corpus must be fetched and cannot.
        OSError: if the disk is full, or too small for `max_tokens`.
    """
    name = str(corpus)
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")
    if shard_tokens < 1 or processes < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(
            f"shard_tokens {shard_tokens}, processes {processes}, max_tokens {max_tokens}: each at least 1"
        )
    folder = folder or default_folder(name, val_fraction, max_tokens)
    wanted: dict[str, str | float | None] = {"corpus": name, "val_fraction": val_fraction, "max_tokens": max_tokens}
    if not (folder / META).exists():
        if folder.exists():
            raise ValueError(f"{folder} exists and holds no finished corpus; choose another folder or remove it")
        source = documents(corpus)
        if max_tokens is not None:
            refuse_small_disk(folder, max_tokens)
        settings = {**wanted, "shard_tokens": shard_tokens, "source": _source_digest(name)}
        with GrowingCorpus(folder, settings, shard_tokens, progress) as growing:
            if not growing.finished:
                _grow(growing, source, name, val_fraction, max_tokens, processes)
    remove_lock(folder)
    found = Prepared.open(folder)
    refuse_other(found, **wanted)
    return found


def _grow(
    growing: GrowingCorpus,
    source: Iterator[Document],
    name: str,
    val_fraction: float,
    max_tokens: int | None,
    processes: int,
) -> None:
    """Tokenise what is still missing, and finish."""

    def enough() -> bool:
        both = all(split.n_tokens for split in growing.splits.values())
        return max_tokens is not None and growing.n_tokens >= max_tokens and both

    items = remaining(source, val_fraction, growing.place)
    begin = growing.place.items if growing.place else 0
    work = chunks(items, begin, lambda: source.state() if isinstance(source, HubDocuments) else None)
    with (
        closing(encode_in_order(work, processes)) as encoded,
        tqdm(
            desc=f"tokenising {Path(name).name}",
            total=max_tokens,
            initial=growing.n_tokens,
            unit="tok",
            unit_scale=True,
            disable=not growing.progress,
        ) as bar,
    ):
        for part, place in encoded:
            for split, n_bytes, ids in part:
                growing.splits[split].add(n_bytes, ids)
                bar.update(len(ids))
                if enough():
                    break
            if enough():
                break
            if growing.due():
                growing.commit(place)
    for split, grown in growing.splits.items():
        if grown.n_bytes == 0:
            raise ValueError(f"no text of {name} fell to {split}; give more documents or another val_fraction")
    digests = b"".join(growing.splits[split].digest.digest() for split in SPLITS)
    meta = Prepared(
        folder=growing.folder,
        corpus=name,
        val_fraction=val_fraction,
        max_tokens=max_tokens,
        n_documents={split: grown.n_documents for split, grown in growing.splits.items()},
        n_tokens={split: grown.n_tokens for split, grown in growing.splits.items()},
        n_bytes={split: grown.n_bytes for split, grown in growing.splits.items()},
        fingerprint=hashlib.sha256(digests).hexdigest(),
    )
    growing.finish({key: value for key, value in asdict(meta).items() if key != "folder"})
