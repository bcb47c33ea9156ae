"""Token shards: a 64-byte header, then token ids as little-endian uint16, read through a memory map.

Header: 8 bytes magic, uint32 version, 4 bytes of zero, 32 bytes SHA-256 of the vocabulary, uint64 token count, 8 bytes
of zero. The header says how long the file must be, so a truncated shard is refused; and which vocabulary made the ids,
so a foreign one is refused too.
"""

import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2course.tokenizer import VOCAB_BPE_SHA256, VOCAB_SIZE

MAGIC = b"GPT2TOKS"
VERSION = 1
HEADER = struct.Struct("<8sI4x32sQ8x")

Tokens = npt.NDArray[np.uint16]


def header(count: int) -> bytes:
    """The first 64 bytes of a shard of so many tokens."""
    return HEADER.pack(MAGIC, VERSION, bytes.fromhex(VOCAB_BPE_SHA256), count)


def write_shard(path: Path, tokens: npt.ArrayLike) -> None:
    """Write one shard, whole or not at all: beside the target first, then renamed over it.

    Args:
        path: the file to make.
        tokens: (n,) token ids, each below 50257.

    Raises:
        ValueError: if an id is not a GPT-2 token.
    """
    ids = np.asarray(tokens)
    if ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"tokens have dtype {ids.dtype}; ids are whole numbers")
    if ids.ndim != 1:
        raise ValueError(f"tokens have shape {ids.shape}; a shard is one row of ids")
    if ids.size and not (ids.min() >= 0 and ids.max() < VOCAB_SIZE):
        raise ValueError(f"token ids run from {ids.min()} to {ids.max()}; GPT-2 has 0 to {VOCAB_SIZE - 1}")
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        file.write(header(ids.size))
        file.write(ids.astype("<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


class TokenShard:
    """One shard, memory-mapped: opening a large one reads only its header.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a shard, is truncated, or was made with another vocabulary.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size or head[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{self.path} is not a gpt2course token shard; make shards with `gpt2course data`")
        _, version, vocabulary, count = HEADER.unpack(head)
        if version != VERSION:
            raise ValueError(f"{self.path} is a shard of version {version}, this gpt2course reads version {VERSION}")
        if vocabulary.hex() != VOCAB_BPE_SHA256:
            raise ValueError(
                f"{self.path} was made with vocabulary {vocabulary.hex()[:12]}…, not GPT-2's {VOCAB_BPE_SHA256[:12]}…; "
                "make it again from the text"
            )
        expected, found = HEADER.size + 2 * count, self.path.stat().st_size
        if found != expected:
            raise ValueError(
                f"{self.path} is damaged: {count:,} tokens take {expected:,} bytes, the file has {found:,}; "
                "make it again"
            )
        self.tokens: Tokens = (
            np.memmap(self.path, dtype="<u2", mode="r", offset=HEADER.size, shape=(count,))
            if count
            else np.empty(0, dtype=np.uint16)
        )
        if isinstance(self.tokens.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            # A window is 2 kB; the system would read 128 kB around each, and a run reads them in random order.
            self.tokens.base.madvise(mmap.MADV_RANDOM)

    def __len__(self) -> int:
        return len(self.tokens)


class TokenStream:
    """Several runs of tokens read as one; slices may cross from one into the next."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = list(accumulate(len(part) for part in self.parts))

    @classmethod
    def open(cls, folder: Path, split: str) -> "TokenStream":
        """The shards `<split>_*.bin` of a folder, in order. Raises FileNotFoundError if there are none."""
        paths = sorted(folder.glob(f"{split}_*.bin"))
        if not paths:
            raise FileNotFoundError(f"no {split}_*.bin in {folder}; make the shards with `gpt2course data`")
        return cls([TokenShard(path).tokens for path in paths])

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens start … stop - 1, as a copy. Raises IndexError past the end."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of a stream of {len(self)}")
        pieces: list[Tokens] = []
        part = bisect_right(self.ends, start)
        while start < stop:
            begin = self.ends[part] - len(self.parts[part])
            end = min(stop, self.ends[part])
            pieces.append(np.asarray(self.parts[part][start - begin : end - begin]))
            start, part = end, part + 1
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)
