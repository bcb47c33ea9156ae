from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from gpt2course.detokenize import TextWriter


class Letters:
    """A tokenizer of letters and bytes, to place token borders by hand; 256 is end-of-text, 257 on are pieces."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.eot_token = 256
        self.n_vocab = 257 + len(pieces)

    def decode_single_token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else self.pieces[token - 257].encode()


def written(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextWriter]:
    writer = TextWriter(tokenizer, stop)
    pieces = []
    for token in tokens:
        pieces.append(writer.push(token))
        if writer.reason:
            break
    return [*pieces, writer.finish()], writer


@example(text="né", cut=1)
@example(text="€n", cut=3)
@given(text=st.text(max_size=20), cut=st.integers(0, 4))
def test_pieces_make_the_text(text: str, cut: int) -> None:
    """Bug: a character of several bytes comes out as U+FFFD when a token border cuts it."""
    data = text.encode()
    data = data[: len(data) - cut]
    pieces, writer = written(Letters(), list(data))
    assert "".join(pieces) == writer.text == data.decode(errors="replace")


def test_an_incomplete_character_is_held_back() -> None:
    """Bug: a stream shows broken bytes for a moment."""
    pieces, _ = written(Letters(), list("aé€".encode()))
    assert pieces == ["a", "", "é", "", "", "€", ""]


@given(
    text=st.text(alphabet="ab", max_size=14),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_is_the_first_place_in_the_whole_text(text: str, stop: list[str]) -> None:
    """Bug: a stop sequence across token borders is missed, or its beginning has already been shown."""
    ends = [text.find(s) + len(s) for s in stop if s in text]
    pieces, writer = written(Letters(), list(text.encode()), tuple(stop))
    if ends:
        seen = text[: min(ends)]  # the token with which the first stop is complete
        assert writer.reason == "stop"
        assert writer.text == seen[: min(seen.find(s) for s in stop if s in seen)]
        assert len(writer.token_ids) == len(seen)
    else:
        assert writer.reason == "length"
        assert writer.text == text
    assert "".join(pieces) == writer.text


def test_stop_inside_a_long_token_cuts_the_rest() -> None:
    """Bug: what a token holds after the stop sequence is kept; of two stops, the later one cuts."""
    tokenizer = Letters("one\n\ntwo", "x END")
    pieces, writer = written(tokenizer, [257, 65], ("two", "\n\n"))
    assert (writer.text, writer.reason, writer.token_ids) == ("one", "stop", [257])
    assert pieces == ["one", ""]
    pieces, writer = written(tokenizer, [*b"ENDE"[:2], *b"EN", 258], ("END",))
    assert (writer.text, writer.reason) == ("ENENx ", "stop")


def test_end_of_text_ends_and_shows_what_was_held() -> None:
    """Bug: text held back as a possible stop sequence is lost at the end."""
    pieces, writer = written(Letters(), [*b"ab", 256, 99], ("bc",))
    assert pieces == ["a", "", "", "b"]
    assert (writer.text, writer.reason, writer.token_ids) == ("ab", "eot", [97, 98, 256])
