"""Token shards: what is written comes back, and what is not a whole shard of this vocabulary is refused."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2course.data.shards import HEADER, MAGIC, VERSION, TokenShard, TokenStream, write_shard
from gpt2course.tokenizer import VOCAB_BPE_SHA256

IDS = [0, 1, 255, 256, 257, 40000, 50256]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "train_000000.bin", IDS)
    return tmp_path / "train_000000.bin"


def header(
    magic: bytes = MAGIC, version: int = VERSION, vocabulary: str = VOCAB_BPE_SHA256, count: int = len(IDS)
) -> bytes:
    return HEADER.pack(magic, version, bytes.fromhex(vocabulary), count)


def test_round_trip(shard: Path) -> None:
    """Ids above 32767 that come back negative; a count that is off by one."""
    opened = TokenShard(shard)
    assert opened.tokens.tolist() == IDS
    assert len(opened) == len(IDS)


def test_format_on_disk(shard: Path) -> None:
    """A format that changes without a new version, or that depends on the machine's byte order."""
    assert HEADER.size == 64
    assert shard.read_bytes() == header() + b"".join(i.to_bytes(2, "little") for i in IDS)
    assert shard.read_bytes()[:12] == b"GPT2TOKS\x01\x00\x00\x00"


def test_empty_shard(tmp_path: Path) -> None:
    """A memory map of nothing, which is an error of the operating system."""
    write_shard(tmp_path / "x.bin", [])
    assert TokenShard(tmp_path / "x.bin").tokens.tolist() == []


def test_opening_reads_only_the_header(tmp_path: Path) -> None:
    """A shard of gigabytes read into memory by each process that opens it."""
    write_shard(tmp_path / "x.bin", np.zeros(100_000, dtype=np.uint16))
    assert isinstance(TokenShard(tmp_path / "x.bin").tokens, np.memmap)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says how a file is mapped")
def test_nothing_is_read_ahead(shard: Path) -> None:
    """64 times as much read from the disk as a batch of windows in random order needs."""
    opened = TokenShard(shard)
    mapped = Path("/proc/self/smaps").read_text().partition(str(opened.path))[2]
    flags = next(line for line in mapped.splitlines() if line.startswith("VmFlags:"))
    assert "rr" in flags.split()


def test_shard_cannot_be_written_through(shard: Path) -> None:
    """A training run that changes its own data on disk."""
    with pytest.raises(ValueError, match="read-only"):
        TokenShard(shard).tokens[0] = 1


@pytest.mark.parametrize("cut", [1, 2, 13])
def test_truncated_shard_is_refused(shard: Path, cut: int) -> None:
    """A copy that broke off, and a run that trains on what came through."""
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=rf"damaged: 7 tokens take 78 bytes, the file has {78 - cut}; make it again"):
        TokenShard(shard)


def test_longer_shard_is_refused(shard: Path) -> None:
    """Two shards written one behind the other."""
    shard.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(ValueError, match="damaged: 7 tokens take 78 bytes, the file has 156"):
        TokenShard(shard)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a gpt2course token shard"),
        (b"GPT2", "not a gpt2course token shard"),
        (struct.pack("<256i", 20240520, *range(255)), "not a gpt2course token shard"),
        (header(magic=b"GPT3TOKS") + bytes(14), "not a gpt2course token shard"),
        (header(version=2) + bytes(14), "a shard of version 2, this gpt2course reads version 1"),
        (header(vocabulary="ab" * 32) + bytes(14), "made with vocabulary abababababab…, not GPT-2's 1ce1664773c5…"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Any file at all reads as numbers; training on it gives no error, only a bad model."""
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TokenShard(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 50257], "token ids run from 0 to 50257; GPT-2 has 0 to 50256"),
        ([-1, 5], "run from -1 to 5"),
        ([65536], "run from 65536"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\); a shard is one row"),
        ([1.5], "dtype float64; ids are whole numbers"),
    ],
)
def test_what_is_no_token_is_not_written(tmp_path: Path, tokens: list, message: str) -> None:
    """65536 that becomes 0 in sixteen bits, without a word."""
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "x.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_crash_while_writing_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped while it wrote, and half a shard under the name of a whole one."""

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_shard(tmp_path / "x.bin", IDS)
    assert not (tmp_path / "x.bin").exists()


def test_crash_while_writing_leaves_the_old_shard(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file emptied before the new one is whole."""

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_shard(shard, [5, 6])
    assert TokenShard(shard).tokens.tolist() == IDS


@given(st.lists(st.lists(st.integers(0, 50256), max_size=7), max_size=6), st.data())
def test_slices_across_shards_equal_plain_concatenation(parts: list[list[int]], data: st.DataObject) -> None:
    """Tokens lost or read twice where one shard ends and the next begins, or where a shard is empty."""
    plain = [token for part in parts for token in part]
    stream = TokenStream([np.array(part, dtype=np.uint16) for part in parts])
    start = data.draw(st.integers(0, len(plain)))
    stop = data.draw(st.integers(start, len(plain)))
    assert len(stream) == len(plain)
    assert stream.read(start, stop).tolist() == plain[start:stop]
    assert stream.read(start, stop).dtype == np.uint16


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (-1, 3), (5, 4), (8, 9)])
def test_reading_past_the_end_is_an_error(shard: Path, start: int, stop: int) -> None:
    """A short last row, or Python's -1 that reads from the other end."""
    with pytest.raises(IndexError, match=f"tokens {start} to {stop} of a stream of 7"):
        TokenStream.open(shard.parent, "train").read(start, stop)


def test_shards_of_a_split_are_read_in_order(tmp_path: Path) -> None:
    """Shard 10 read before shard 2; validation tokens in the training stream."""
    for number in (10, 2, 0):
        write_shard(tmp_path / f"train_{number:06d}.bin", [number])
    write_shard(tmp_path / "val_000000.bin", [77])
    assert TokenStream.open(tmp_path, "train").read(0, 3).tolist() == [0, 2, 10]
    assert TokenStream.open(tmp_path, "val").read(0, 1).tolist() == [77]
    with pytest.raises(FileNotFoundError, match=r"no test_\*.bin in"):
        TokenStream.open(tmp_path, "test")


def test_read_gives_a_copy(shard: Path) -> None:
    """A batch that holds the file open, or that shares memory with the next."""
    stream = TokenStream.open(shard.parent, "train")
    first = stream.read(0, 3)
    first[:] = 9
    assert stream.read(0, 3).tolist() == IDS[:3]
