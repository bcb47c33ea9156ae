"""Corpora by name: each is a run of documents, and none but the Hugging Face ones needs a network once it is cached."""

import ast
import hashlib
import http.client
import os
import sysconfig
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs
from tqdm.auto import tqdm

from gpt2course.data.hub_stream import Document, HubDocuments

TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
NOT_COURSE_TEXT = {"site-packages", "__pycache__", "test", "tests", "idle_test"}


def cache_dir() -> Path:
    """Where downloads and token shards are kept: $GPT2COURSE_CACHE, or the platform's cache folder. Made if missing."""
    chosen = os.environ.get("GPT2COURSE_CACHE")
    folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("gpt2course", appauthor=False))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not NOT_COURSE_TEXT & set(inside.parts):
            yield Document(inside.as_posix(), _read_text(path))


def _docstrings(source: str) -> str:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return "\n\n".join(text for text in found if text)


def _stdlib_prose() -> Iterator[Document]:
    for document in _stdlib():
        if prose := _docstrings(document.text):
            yield Document(document.name, prose)


def _download(url: str, sha256: str, target: Path) -> Path:
    """Fetch a file once: into a part file, checked, then renamed. Raises ConnectionError or ValueError."""
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
        return target
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    try:
        with (
            urllib.request.urlopen(url, timeout=30) as answer,
            part.open("wb") as file,
            tqdm(total=int(answer.headers.get("Content-Length", 0)) or None, unit="B", unit_scale=True) as bar,
        ):
            while block := answer.read(1 << 16):
                file.write(block)
                bar.update(len(block))
            if bar.total is not None and file.tell() < bar.total:
                raise ConnectionError(f"it broke off after {file.tell():,} of {bar.total:,} bytes")
        digest = hashlib.sha256(part.read_bytes()).hexdigest()
        if digest != sha256:
            raise ValueError(
                f"{url} has SHA-256 {digest[:12]}…, expected {sha256[:12]}…; the file there is not the known one"
            )
        return part.replace(target)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{url} cannot be reached or read ({error}); try again, or put the file at {target}, or use another corpus"
        ) from error
    finally:
        part.unlink(missing_ok=True)  # also after Ctrl-C


def _tinyshakespeare() -> Iterator[Document]:
    path = _download(TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256, cache_dir() / "tinyshakespeare.txt")
    yield Document("tinyshakespeare", _read_text(path))


def _is_binary(path: Path) -> bool:
    """Whether a file is no text, told as git does it: by a NUL byte near its start."""
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _folder(folder: Path) -> Iterator[Document]:
    skipped = 0
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        inside = file.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts):
            continue
        if _is_binary(file):
            skipped += 1
        else:
            yield Document(inside.as_posix(), _read_text(file))
    if skipped:
        warnings.warn(f"skipped in {folder}: {skipped:,} with a NUL byte, which is no text", stacklevel=2)


CORPORA: dict[str, Callable[[], Iterator[Document]]] = {
    "stdlib": _stdlib,
    "stdlib-prose": _stdlib_prose,
    "tinyshakespeare": _tinyshakespeare,
    "fineweb-edu": lambda: HubDocuments("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}


def documents(corpus: str | Path) -> Iterator[Document]:
    """The documents of a corpus, in a fixed order.

    Args:
        corpus: "stdlib" (the Python standard library's own source, on every machine, about 12 MB), "stdlib-prose" (its
            docstrings), "tinyshakespeare" (fetched once, 1.1 MB), "fineweb-edu" (streamed), a file, a folder (every
            file a document, but none that is hidden or in a hidden folder, and none with a NUL byte in its first 8 KiB,
            which is no text), or "hf:owner/name" or "hf:owner/name:config" for a Hugging Face data set with a column
            `text`.

    Raises:
        ValueError: for a name that is none of these, or a file that is no text.
        ConnectionError: if a corpus must be fetched and cannot.
    """
    if str(corpus) in CORPORA:
        return CORPORA[str(corpus)]()
    if str(corpus).startswith("hf:"):
        repo, _, config = str(corpus).removeprefix("hf:").partition(":")
        return HubDocuments(repo, config or None)
    path = Path(corpus).expanduser()
    if path.is_file():
        if _is_binary(path):
            raise ValueError(f"{path} is no text: it has a NUL byte near its start; give a text file, UTF-8")
        return iter([Document(path.name, _read_text(path))])
    if path.exists() and str(corpus):  # Path("") is the current folder, which an empty name does not ask for
        return _folder(path)
    raise ValueError(
        f"no corpus {str(corpus)!r}: use {', '.join(CORPORA)}, hf:owner/name, or a file or folder that exists"
    )
