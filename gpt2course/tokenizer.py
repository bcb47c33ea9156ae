"""GPT-2's byte-pair encoding through tiktoken, from the vocabulary file in assets/. Never a download.

The asset is the list of merges, in order (`vocab.bpe`), compressed. The ids follow from it: first the 256 bytes, then
one id a merge, then `<|endoftext|>`. Its SHA-256, which tiktoken states, is checked each time it is read; that of
`encoder.json`, which can be made from it, when the asset is made.
"""

import hashlib
import json
import lzma
from functools import cache
from pathlib import Path

import tiktoken

VOCABULARY_FILE = Path(__file__).parent / "assets" / "gpt2_vocab.bpe.xz"
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT = "<|endoftext|>"
EOT = 50256
VOCAB_SIZE = 50257

# The pattern of the GPT-2 release that cuts text into pieces before any merge, in tiktoken's equivalent spelling.
PIECE_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@cache
def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in `vocab.bpe`.

    Bytes that print stand for themselves; the others, space among them, get the letters from code point 256 on. The
    order is the order of the first 256 ids.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    hidden = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def vocabulary_bytes() -> bytes:
    """The published `vocab.bpe`, decompressed and checked.

    Raises:
        ValueError: if the file in assets/ is damaged.
    """
    try:
        data = lzma.decompress(VOCABULARY_FILE.read_bytes())
    except lzma.LZMAError as error:
        raise ValueError(f"{VOCABULARY_FILE.name} cannot be decompressed ({error}); reinstall gpt2course") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != VOCAB_BPE_SHA256:
        raise ValueError(
            f"{VOCABULARY_FILE.name} has SHA-256 {digest[:12]}…, expected {VOCAB_BPE_SHA256[:12]}…; "
            "reinstall gpt2course"
        )
    return data


def ranks_from_merges(vocab_bpe: bytes) -> dict[bytes, int]:
    """Token bytes to id, from the text of `vocab.bpe`: a version line, then one merge of two letter strings a line."""
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    ranks = {bytes([byte]): i for i, byte in enumerate(byte_letters())}
    for line in vocab_bpe.decode().splitlines()[1:]:
        left, right = line.split(" ")
        ranks[bytes(byte_of[letter] for letter in left + right)] = len(ranks)
    return ranks


def encoder_json(ranks: dict[bytes, int]) -> bytes:
    """The published `encoder.json` made again from the ranks, byte for byte."""
    letters = byte_letters()
    table = {"".join(letters[b] for b in token): i for token, i in ranks.items()} | {END_OF_TEXT: EOT}
    return json.dumps(table).encode()


@cache
def get_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding, the same ids as `tiktoken.get_encoding("gpt2")`, without a socket ever opened.

    `encode` refuses `<|endoftext|>` in the text unless `allowed_special={"<|endoftext|>"}`; `encode_ordinary` takes it
    as plain text.

    Raises:
        ValueError: if the vocabulary file is damaged.
    """
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=PIECE_PATTERN,
        mergeable_ranks=ranks_from_merges(vocabulary_bytes()),
        special_tokens={END_OF_TEXT: EOT},
    )
