"""Documents streamed from a Hugging Face data set, with a place in the stream that can be kept and gone back to."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Document:
    """One document: the unit that goes whole into training or into validation."""

    name: str
    text: str


class HubDocuments(Iterator[Document]):
    """The rows of a data set's split "train", in order; nothing is fetched before the first is asked for.

    Raises:
        ValueError: if the library `datasets` is not installed, or the rows have no column `text`.
        ConnectionError: if the data set cannot be reached, or the connection is lost for good.
    """

    def __init__(self, repo: str, config: str | None) -> None:
        self.repo, self.config = repo, config
        self.number = 0
        self._stream: Any = None
        self._rows: Iterator[dict[str, Any]] | None = None
        self._start: dict[str, Any] | None = None

    def state(self) -> dict[str, Any] | None:
        """The place behind the last document, as JSON can hold it; None where the stream cannot say."""
        if not hasattr(self._stream, "state_dict"):
            return None
        return {"number": self.number, "stream": self._stream.state_dict()}

    def go_to(self, state: dict[str, Any]) -> None:
        """Start at a place of an earlier stream, without fetching the files that lie wholly before it."""
        self.number, self._start = state["number"], state["stream"]

    def __next__(self) -> Document:
        try:
            if self._rows is None:
                self._rows = self._open()
        except (ValueError, FileNotFoundError):  # no such data set or configuration
            raise
        except Exception as error:
            raise self._unreachable(error) from error
        try:
            row = next(self._rows)
        except StopIteration:
            raise
        except Exception as error:
            raise self._unreachable(error) from error
        if "text" not in row:
            raise ValueError(f"{self.repo} has no column 'text', only {', '.join(sorted(row))}")
        document = Document(str(row.get("id", self.number)), row["text"])
        self.number += 1
        return document

    def _unreachable(self, error: Exception) -> ConnectionError:
        """For errors of datasets, pyarrow, fsspec, aiohttp, httpx or requests, whichever was at work."""
        return ConnectionError(
            f"{self.repo} cannot be reached or read on the Hugging Face hub ({type(error).__name__}: {error}); look at "
            "the network, and run the same command again"
        )

    def _open(self) -> Iterator[dict[str, Any]]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(f"the data set {self.repo} needs the extra: pip install 'gpt2course[hub]'") from error
        self._stream = load_dataset(self.repo, self.config, split="train", streaming=True)
        if self._start is not None:
            self._stream.load_state_dict(self._start)
        return iter(self._stream)
