"""Shards that grow until a corpus is whole, and a journal from which a killed run goes on.

The shards of a corpus are written into the folder `<name>.part`, beside the one that they are meant for. Now and then
they are flushed to the disk, and then the journal is replaced in one step: it says how far the corpus has been read and
how many tokens of each split are good. A run that finds a journal cuts the shards back to what it says and goes on from
there. When all is done the folder gets its name. So a folder of that name is whole, and whoever was killed, at whatever
moment, is followed by a run that writes the same bytes as one that was left in peace.
"""

import errno
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from gpt2course.data.encode import Place
from gpt2course.data.shards import HEADER, header

META = "meta.json"
JOURNAL = "journal.json"
LOCK = "lock"
SPLITS = ("train", "val")
COMMIT_TOKENS = 10_000_000  # the most work that a kill can cost
BLOCK = 1 << 23


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all, so that not even a power cut leaves half of it."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_lock(folder: Path) -> None:
    """Take the lock's file out of a finished folder, where a process that was killed in the last step left it."""
    with suppress(OSError):  # a folder that may be read only, for instance
        (folder / LOCK).unlink(missing_ok=True)


class GrowingSplit:
    """The shards of one split; tokens are appended, and all shards but the last are full."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.n_documents = self.n_tokens = self.n_bytes = 0
        self.digest = hashlib.sha256()
        self.file: BinaryIO | None = None

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{self.split}_{number:06d}.bin"

    def add(self, n_bytes: int, ids: npt.NDArray[np.uint16]) -> None:
        """Append one document."""
        content = memoryview(ids.astype("<u2").tobytes())
        self.digest.update(content)
        self.n_documents += 1
        self.n_bytes += n_bytes
        while content:
            number, inside = divmod(self.n_tokens, self.shard_tokens)
            if self.file is None:
                self.file = self.path(number).open("wb")
                self.file.write(header(self.shard_tokens))
            taken = content[: 2 * (self.shard_tokens - inside)]
            self.file.write(taken)
            self.n_tokens += len(taken) // 2
            content = content[len(taken) :]
            if self.n_tokens % self.shard_tokens == 0:
                self.sync()
                self.file.close()
                self.file = None

    def sync(self) -> None:
        """Flush what was appended to the disk."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def seal(self) -> None:
        """Let the last shard's header say how many tokens it has."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(header(self.n_tokens % self.shard_tokens))
            self.sync()
            self.file.close()
            self.file = None

    def counts(self) -> dict[str, Any]:
        """What the journal keeps."""
        return {
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "n_bytes": self.n_bytes,
            "sha256": self.digest.hexdigest(),
        }

    def restore(self, counts: dict[str, Any], seen: Callable[[int], object]) -> None:
        """Cut the files back to what the journal says, and read it all once: its SHA-256 must be the journal's.

        Args:
            counts: as `counts` gave them.
            seen: told how many tokens were read.

        Raises:
            ValueError: if the files are not those that were written.
        """
        self.n_documents, self.n_tokens, self.n_bytes = counts["n_documents"], counts["n_tokens"], counts["n_bytes"]
        whole, rest = divmod(self.n_tokens, self.shard_tokens)
        try:
            if rest:
                self.file = self.path(whole).open("r+b")
                self.file.write(header(self.shard_tokens))
                self.file.truncate(HEADER.size + 2 * rest)
                self.file.seek(0, os.SEEK_END)
            for number in range(whole + bool(rest)):
                with self.path(number).open("rb") as file:
                    file.seek(HEADER.size)
                    while block := file.read(BLOCK):
                        self.digest.update(block)
                        seen(len(block) // 2)
        except OSError as error:
            raise self._damaged(str(error)) from error
        if self.digest.hexdigest() != counts["sha256"]:
            raise self._damaged("the tokens are not those that were written")
        for path in self.folder.glob(f"{self.split}_*.bin"):
            if path not in map(self.path, range(whole + bool(rest))):
                path.unlink()

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.folder} can't be gone on with ({why}); remove it and start again")


class GrowingCorpus:
    """The folder `<name>.part`, for one process at a time; used as a context.

    Attributes:
        part: the folder.
        splits: what has been written of "train" and "val".
        place: how far the corpus has been read for that; None at the very start.
        finished: True if another process has made the corpus while this one waited for it.

    Raises:
        ValueError: if the folder was begun with other settings, holds other things, or is damaged.
        OSError: on entry if the file system knows no locks; on the way out if it is full, with what to do.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], shard_tokens: int, progress: bool) -> None:
        self.folder, self.settings, self.progress = folder, settings, progress
        self.part = folder.with_name(folder.name + ".part")
        self.splits = {split: GrowingSplit(self.part, split, shard_tokens) for split in SPLITS}
        self.commit_tokens = min(shard_tokens, COMMIT_TOKENS)
        self.place: Place | None = None
        self.finished = False
        self.committed = 0
        self._lock: int | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of both splits."""
        return sum(split.n_tokens for split in self.splits.values())

    def __enter__(self) -> Self:
        try:
            self._acquire()
            if not self.finished:
                self._restore()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self.splits.values():
            if split.file is not None:
                with suppress(OSError):  # a full disk says so again
                    split.file.close()
        kept = (self.part / JOURNAL).exists()
        if kind is not None and not kept:
            self._remove()
        self._release()
        if kind is not None and kept and self.progress:
            print(
                f"{self.committed:,} tokens are kept in {self.part}; the same command goes on from there",
                file=sys.stderr,
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"no space is left for {self.part}; make room, and run the same command again"
                if kept
                else f"no space is left for {self.part}; make room, or choose another folder with --out"
            ) from error

    def due(self) -> bool:
        """Whether it is time for `commit`."""
        return self.n_tokens - self.committed >= self.commit_tokens

    def commit(self, place: Place) -> None:
        """Flush the shards, then say in the journal that all that was added so far, up to `place`, is good."""
        for split in self.splits.values():
            split.sync()
        write_whole(
            self.part / JOURNAL,
            {
                "settings": self.settings,
                "items": place.items,
                "stream": place.stream,
                "splits": {name: split.counts() for name, split in self.splits.items()},
            },
        )
        self.committed = self.n_tokens

    def finish(self, meta: dict[str, Any]) -> None:
        """Seal the shards, add the corpus's facts, and give the folder its name."""
        for split in self.splits.values():
            split.seal()
        write_whole(self.part / META, meta)
        self._give_name()

    def _give_name(self) -> None:
        for path in self.part.glob(f"{JOURNAL}*"):
            path.unlink()
        self.part.rename(self.folder)
        remove_lock(self.folder)
        sync_folder(self.folder.parent)

    def _acquire(self) -> None:
        """Take the folder for this process alone, or find that it isn't needed any more."""
        waited = False
        while True:
            self.part.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = os.open(self.part / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:  # named or removed since the line before
                continue
            except BlockingIOError:
                if self.progress and not waited:
                    print(f"another process makes {self.folder}; waiting for it", file=sys.stderr)
                waited = True
                assert self._lock is not None
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise OSError(
                        f"{self.part} lies on a file system without locks; choose another with --out"
                    ) from error
                raise
            if self._is_ours():
                break
            self._release()
        if (self.folder / META).exists():
            self.finished = True
            self._remove()
        elif (self.part / META).exists():  # killed between the last two steps
            self._give_name()
            self.finished = True

    def _is_ours(self) -> bool:
        """Whether the file that is locked is still the one in the folder."""
        assert self._lock is not None
        try:
            return os.path.samestat(os.fstat(self._lock), os.stat(self.part / LOCK))
        except FileNotFoundError:
            return False

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _own_files(self) -> Iterator[Path]:
        for name in (JOURNAL, META, LOCK):
            yield from self.part.glob(f"{name}*")
        for split in SPLITS:
            yield from self.part.glob(f"{split}_*.bin")

    def _remove(self) -> None:
        """Take away what this class wrote, and the folder if nothing else is in it."""
        for path in self._own_files():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.part.rmdir()

    def _restore(self) -> None:
        """Go back to what the journal says; without one, to the start."""
        journal = self.part / JOURNAL
        if not journal.exists():
            if others := sorted(p.name for p in set(self.part.iterdir()) - set(self._own_files())):
                raise ValueError(f"{self.part} exists and holds other things ({others[0]}); choose another folder")
            for path in set(self._own_files()) - {self.part / LOCK}:
                path.unlink()
            return
        try:
            found = json.loads(journal.read_text())
            settings, counts = found["settings"], found["splits"]
            place = Place(found["items"], found["stream"])
            total = sum(counts[split]["n_tokens"] for split in SPLITS)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{journal} can't be read ({error!r}); remove {self.part} and start again") from error
        if differ := [name for name, value in self.settings.items() if settings.get(name) != value]:
            told = "; ".join(
                "another text" if name == "source" else f"{name} {settings.get(name)}, not {self.settings[name]}"
                for name in differ
            )
            raise ValueError(f"{self.part} was begun with {told}; choose another folder, or remove it and start again")
        with tqdm(
            desc="checking what is there", total=total, unit="tok", unit_scale=True, disable=not self.progress
        ) as bar:
            for name, split in self.splits.items():
                split.restore(counts[name], bar.update)
        self.place, self.committed = place, self.n_tokens
