"""From tokens back to text, one token at a time: bytes that end inside a character and stop sequences are held back."""

import codecs
from collections.abc import Sequence

import tiktoken


class TextWriter:
    """Turns a growing row of tokens into text, and says when the row has ended.

    Attributes:
        text: the text given out so far; never a part of a stop sequence.
        token_ids: every token taken.
        reason: None while the row goes on, then "stop", "eot" or "length".
    """

    def __init__(self, tokenizer: tiktoken.Encoding, stop: Sequence[str] = (), stop_at_eot: bool = True) -> None:
        self.tokenizer, self.stop, self.stop_at_eot = tokenizer, tuple(stop), stop_at_eot
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.token_ids: list[int] = []
        self.text = ""
        self.held = ""
        self.reason: str | None = None

    def push(self, token: int) -> str:
        """Take one token; return the text that has become certain with it, maybe none."""
        self.token_ids.append(token)
        if self.stop_at_eot and token == self.tokenizer.eot_token:
            self.reason = "eot"
            return ""
        return self._release(self.utf8.decode(self.tokenizer.decode_single_token_bytes(token)))

    def finish(self) -> str:
        """End the row and return what was held back. Broken bytes come out as U+FFFD, as in `tokenizer.decode`."""
        if self.reason == "stop":
            return ""
        piece = self._release(self.utf8.decode(b"", final=True))
        if self.reason != "stop":
            self.reason = self.reason or "length"
            piece, self.text, self.held = piece + self.held, self.text + self.held, ""
        return piece

    def _release(self, new: str) -> str:
        self.held += new
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            piece, self.held, self.reason = self.held[: min(found)], "", "stop"
        else:
            # The end of the text may be the beginning of a stop sequence, whose rest comes with a later token.
            cut = len(self.held) - max((_overlap(self.held, stop) for stop in self.stop), default=0)
            piece, self.held = self.held[:cut], self.held[cut:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
