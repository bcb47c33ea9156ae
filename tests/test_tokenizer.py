"""The tokenizer gives the published ids, from the file in assets/ alone."""

import hashlib
import lzma
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given
from hypothesis import strategies as st

from gpt2course import tokenizer
from gpt2course.tokenizer import EOT, get_tokenizer

SPECIAL = {tokenizer.END_OF_TEXT}
PUBLISHED = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"

TEXTS = [
    "",
    "Hello, world!",
    "naïve café, Straße, Ελληνικά, Русский, עברית, العربية, हिन्दी, 中文, 日本語, 한국어",
    "🙂 👩‍🚀 🏳️‍🌈 🇫🇷 ❤️ e\u0301 \u202etrick\u202c",
    "def f(x):\n    if x:\n\t\treturn {'a': [1, 2.5e-3], **x}  # why\n\n\n",
    "I'm we'll they've he'd 'tis O'Neil's IT'S rock'n'roll",
    "1234567890 3.14159 1,000,000 ½ ⅷ ١٢٣ x² 0xFF",
    " ",
    "          ",
    "a  b   c    d     e",
    "\n\n\n  \n\t\t \t\r\n\r  x",
    "end in blanks   ",
    "end in lines\n\n",
    "\u00a0\u2003\u3000x\u200b\ufeffy\u0085z\u2028",
    "\x00\x01\x7f\u0080",
    "a" * 3000,
    "ab" * 1000 + "!" * 1000 + " " * 1000,
    "<|endoftext|>",
    "one<|endoftext|>two<|endoftext|>",
    "<|endoftext<|endoftext|>|>",
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiktoken.Encoding]:
    """tiktoken's own constructor, with its own hash checks, reading files that are made again from our asset."""
    folder = tmp_path_factory.mktemp("tiktoken")
    vocabulary = tokenizer.vocabulary_bytes()
    files = {
        "vocab.bpe": vocabulary,
        "encoder.json": tokenizer.encoder_json(tokenizer.ranks_from_merges(vocabulary)),
    }
    for name, content in files.items():
        (folder / hashlib.sha1((PUBLISHED + name).encode()).hexdigest()).write_bytes(content)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("tiktoken wanted to download: the files made from our asset are not the published ones")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        patch.setattr("tiktoken.load.read_file", refuse)
        yield tiktoken.Encoding(**tiktoken_ext.openai_public.gpt2())


def test_vocabulary_is_the_published_one(published: tiktoken.Encoding) -> None:
    """One wrong rank, which gives other ids for a few words and no error."""
    ours = get_tokenizer()
    assert ours._mergeable_ranks == published._mergeable_ranks
    assert ours.n_vocab == published.n_vocab == tokenizer.VOCAB_SIZE == 50257
    assert ours.eot_token == published.eot_token == EOT == 50256
    assert ours.special_tokens_set == published.special_tokens_set == SPECIAL
    assert ours.name == "gpt2"


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_the_published_ones(published: tiktoken.Encoding, text: str) -> None:
    """A pattern that cuts blanks, contractions, digits or scripts in another way than GPT-2's."""
    ours = get_tokenizer()
    ids = published.encode_ordinary(text)
    assert ours.encode_ordinary(text) == ids
    assert ours.decode(ids) == text
    assert ours.encode(text, allowed_special="all") == published.encode(text, allowed_special="all")


@given(st.text(max_size=200))
def test_any_text_gives_the_published_ids(published: tiktoken.Encoding, text: str) -> None:
    """Code points that nobody thought of; text that does not come back."""
    ids = get_tokenizer().encode_ordinary(text)
    assert ids == published.encode_ordinary(text)
    assert get_tokenizer().decode(ids) == text


@given(st.text(alphabet=" \t\n\r'sdmtlvre1a.\u00a0é", max_size=60))
def test_blanks_and_endings_give_the_published_ids(published: tiktoken.Encoding, text: str) -> None:
    """Runs of blanks before a word, and what looks like a contraction: where spellings of the pattern differ."""
    assert get_tokenizer().encode_ordinary(text) == published.encode_ordinary(text)


def test_a_megabyte_gives_the_published_ids(published: tiktoken.Encoding) -> None:
    """A difference that only shows at length."""
    rng = random.Random(0)
    words = [
        "".join(chr(rng.choice((rng.randrange(97, 123), rng.randrange(32, 0x2FF)))) for _ in range(6))
        for _ in range(5000)
    ]
    parts, size = [], 0
    while size < 1_000_000:
        parts.append(rng.choice(words) if rng.random() < 0.5 else rng.choice(TEXTS[1:15]))
        size += len(parts[-1].encode()) + 1
    text = " ".join(parts)
    ids = get_tokenizer().encode_ordinary(text)
    assert ids == published.encode_ordinary(text)
    assert get_tokenizer().decode(ids) == text


def test_special_token_needs_leave() -> None:
    """A document whose text ends the document, since somebody wrote `<|endoftext|>` into it."""
    ours = get_tokenizer()
    text = "a<|endoftext|>b"
    with pytest.raises(ValueError, match="disallowed special token"):
        ours.encode(text)
    assert EOT not in ours.encode_ordinary(text)
    assert EOT not in ours.encode(text, disallowed_special=())
    assert ours.encode(text, allowed_special=SPECIAL) == [*ours.encode("a"), EOT, *ours.encode("b")]
    assert ours.decode([EOT]) == tokenizer.END_OF_TEXT


def test_no_socket_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download on first use, which fails on a machine without a network."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the tokenizer opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    get_tokenizer.cache_clear()
    assert get_tokenizer().encode("Hello world") == [15496, 995]


@pytest.mark.parametrize("damage", ["one merge swapped", "cut short", "not compressed"])
def test_damaged_asset_is_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged vocabulary that loads, and gives ids that no checkpoint knows."""
    lines = tokenizer.vocabulary_bytes().splitlines(keepends=True)
    if damage == "one merge swapped":
        lines[700], lines[701] = lines[701], lines[700]
    packed = lzma.compress(b"".join(lines), preset=0)
    if damage == "cut short":
        packed = packed[:-100]
    if damage == "not compressed":
        packed = b"".join(lines)
    (tmp_path / "vocab.xz").write_bytes(packed)
    monkeypatch.setattr(tokenizer, "VOCABULARY_FILE", tmp_path / "vocab.xz")
    get_tokenizer.cache_clear()
    with pytest.raises(ValueError, match="reinstall gpt2course"):
        get_tokenizer()
    monkeypatch.undo()
    assert get_tokenizer().n_vocab == 50257


def test_first_ids_are_the_bytes() -> None:
    """Bytes taken in the order of their values: ids 0 to 255 all wrong, and the text still comes back."""
    ours = get_tokenizer()
    assert [ours.decode_single_token_bytes(i) for i in range(256)] == [bytes([b]) for b in tokenizer.byte_letters()]
    assert ours.encode("!") == [0]
    assert tokenizer.byte_letters()[ord(" ")] == "Ġ"
    assert len(set(tokenizer.byte_letters().values())) == 256


def test_it_is_made_once() -> None:
    """Fifty thousand merges read anew for each call."""
    assert get_tokenizer() is get_tokenizer()
