"""Fetching published checkpoints, and telling a whole file from a damaged one. Knows nothing of models."""

import errno
import hashlib
import json
import os
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# A full disk or quota, a folder one may not write, a broken disk.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
OFFLINE_ADVICE = 'Without a network, use the checkpoint that comes with the course: open_model("course").'


class CheckpointError(ValueError):
    """A checkpoint that is not what this package can load; the text says what is off and what to do."""


class CorruptFileError(CheckpointError):
    """A weights file whose bytes are not the published ones."""


class HubUnreachableError(ConnectionError):
    """The weights are neither cached here nor to be had from the network."""


@dataclass(frozen=True)
class Published:
    """One published checkpoint, pinned, so that the same name means the same bytes tomorrow."""

    repo: str
    """repository on the Hugging Face hub"""
    revision: str
    """commit of that repository"""
    sha256: str | None
    """SHA-256 of its model.safetensors, where we know it; otherwise the hub's own record is used"""


PUBLISHED: dict[str, Published] = {
    "gpt2": Published(
        "openai-community/gpt2",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": Published("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None),
    "gpt2-large": Published("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", None),
    "gpt2-xl": Published(
        "openai-community/gpt2-xl",
        "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    ),
}


def looks_like_repo(source: str) -> bool:
    """Whether the text has the form owner/name of a hub repository."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not source.startswith(".")


def lookup(name: str) -> Published:
    """The pin of a published name, or an unpinned entry (its main branch) for any other owner/name."""
    return PUBLISHED.get(name) or Published(name, "main", None)


def is_cached(name: str) -> bool:
    """Whether config and weights of a published name or repository lie in the local cache. Opens no connection."""
    from huggingface_hub import try_to_load_from_cache

    entry = lookup(name)
    found = [try_to_load_from_cache(entry.repo, filename, revision=entry.revision) for filename in (CONFIG, WEIGHTS)]
    return all(isinstance(path, str) for path in found)


def fetch(name: str) -> tuple[Path, Path]:
    """Config and weights of a published name or repository: from the cache, else downloaded, then checked.

    Goes through huggingface_hub: its cache (`HF_HOME`), its progress bar, and mirrors by `HF_ENDPOINT`. A connection
    that breaks off or stalls is taken up again where it broke, while the program runs.

    Returns:
        paths of config.json and model.safetensors in the cache.

    Raises:
        HubUnreachableError: if a file is not cached and can't be downloaded.
        CheckpointError: if the repository does not exist, or holds no safetensors.
        OSError: if the disk is full or the cache can't be written.
        CorruptFileError: if the bytes are not the published ones; the bad file is deleted, so that a retry can work.
    """
    entry = lookup(name)
    if not is_cached(name) and not offline_by_choice() and not reachable(entry):
        raise HubUnreachableError(
            _unreachable(f"the weights of {entry.repo}", OSError(f"no good answer from {endpoint()}"))
        )
    config = _download(entry, CONFIG)
    weights = _download(entry, WEIGHTS)
    try:
        check_sha256(weights, entry.sha256 or recorded_sha256(weights))
        check_extents(weights)
    except CorruptFileError as error:
        delete_cached(weights)
        raise CorruptFileError(
            f"{error} The bad file was deleted from the cache: run this again to fetch it."
        ) from None
    return config, weights


def endpoint() -> str:
    """Address of the hub, or of the mirror in `HF_ENDPOINT`, read now: huggingface_hub reads it only when imported."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def offline_by_choice() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def reachable(entry: Published = PUBLISHED["gpt2"], timeout: float = 5.0) -> bool:
    """Whether the hub answers in time when asked for a config; huggingface_hub itself gives up after 20 seconds.

    Looking up a name has no time limit of its own, hence the thread. A refusal such as 404 is an answer, an error of
    the server such as 503 is none.
    """
    url = f"{endpoint()}/{entry.repo}/resolve/{entry.revision}/{CONFIG}"
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
            answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)
        except Exception:  # whatever it was, there was no answer, and a thread has nobody to tell
            answers.append(False)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout)
    return answers == [True]


def _download(entry: Published, filename: str) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{filename} of {entry.repo}"
    try:
        path = hf_hub_download(
            entry.repo, filename, revision=entry.revision, endpoint=endpoint(), library_name="gpt2course"
        )
    except LocalEntryNotFoundError as error:
        raise HubUnreachableError(_unreachable(what, error)) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{entry.repo} has no revision {entry.revision}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(f"there is no public repository {entry.repo} at {endpoint()}") from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{entry.repo} has no {filename}. Only safetensors are loaded: pytorch_model.bin is a pickle, "
            "and unpickling can run any code"
        ) from error
    except Exception as error:  # huggingface_hub has changed its HTTP library twice; the advice is the same for all
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            advice = "make room there, or set HF_HOME to a folder you may write, on a disk with room"
            folder = constants.HF_HUB_CACHE
            raise OSError(error.errno, f"could not store {what} in {folder} ({error.strerror}); {advice}") from error
        raise HubUnreachableError(_unreachable(what, error)) from error
    return Path(path)


def _unreachable(what: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return (
        f"could not fetch {what} ({reason}). Check the network, or set HF_ENDPOINT to a mirror you can reach, "
        f"and run this again. {OFFLINE_ADVICE}"
    )


def recorded_sha256(path: Path) -> str | None:
    """The SHA-256 the hub stated for a cached file: huggingface_hub links to large files by it; None for others.

    Only the first link counts: a blob may itself be a link into a store that names files by another hash.
    """
    blob = path.readlink().name if path.is_symlink() else path.name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str | None) -> None:
    """Raise CorruptFileError unless the file has this SHA-256; None checks nothing."""
    if expected is not None and (found := file_sha256(path)) != expected:
        raise CorruptFileError(f"{path} has SHA-256 {found[:12]}…, expected {expected[:12]}…: it is damaged.")


def check_extents(path: Path) -> None:
    """Raise CorruptFileError unless the file is a safetensors file of exactly the size its header says.

    The format: 8 bytes with the length of the header, the header as JSON with the extent of every tensor, the tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise CorruptFileError(f"{path} ({size:,} bytes) is not a safetensors file: its header has no such length.")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise CorruptFileError(f"{path} is not a safetensors file: its header can't be read.") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CorruptFileError(
            f"{path} has {size:,} bytes, but its header says {expected:,}: it is cut off or damaged."
        )


def delete_cached(path: Path) -> None:
    """Delete a cached file and every link on the way to it, the name in the snapshot and the blob."""
    while True:
        target = path.parent / path.readlink() if path.is_symlink() else None
        path.unlink(missing_ok=True)
        if target is None:
            return
        path = target
