"""Documents to token ids, in this process or in several, in the order of the documents."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2course.data.hub_stream import Document
from gpt2course.tokenizer import EOT, get_tokenizer

CHUNK_DOCUMENTS = 128  # what a process gets at a time: so many documents, or so many characters
CHUNK_CHARS = 1 << 19

Item = tuple[str, Document]
EncodedItem = tuple[str, int, npt.NDArray[np.uint16]]


@dataclass(frozen=True)
class Place:
    """How far a corpus has been read."""

    items: int
    """documents before this place; the two parts of a single document count as two"""
    stream: dict[str, Any] | None = None
    """where a streamed corpus stood then"""


def usable_cores() -> int:
    """Cores that this process may use; a container or a batch system may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode(item: Item) -> EncodedItem:
    """Split, bytes of text, and token ids of one document, `<|endoftext|>` at its end."""
    split, document = item
    ids = get_tokenizer().encode_ordinary(document.text)
    return split, len(document.text.encode()), np.array([*ids, EOT], dtype=np.uint16)


def encode_all(items: list[Item]) -> list[EncodedItem]:
    """What a process does with a chunk."""
    return [encode(item) for item in items]


def chunks(
    items: Iterable[Item], begin: int, state: Callable[[], dict[str, Any] | None]
) -> Iterator[tuple[list[Item], Place]]:
    """Runs of documents, each with the place behind it. At least two a run, but for the last.

    Two, since whoever splits a corpus looks at its second document before it gives the first: only from the second on
    does `state` speak of the document that came last.
    """
    chunk: list[Item] = []
    chars, done = 0, begin
    for item in items:
        chunk.append(item)
        chars, done = chars + len(item[1].text), done + 1
        if len(chunk) >= 2 and (chars >= CHUNK_CHARS or len(chunk) >= CHUNK_DOCUMENTS):
            yield chunk, Place(done, state())
            chunk, chars = [], 0
    if chunk:
        yield chunk, Place(done, state())


def encode_in_order(
    work: Iterable[tuple[list[Item], Place]], processes: int
) -> Generator[tuple[list[EncodedItem], Place], None, None]:
    """Chunks tokenised, in order whatever the number of processes; never more than two a process are held in memory.

    Close it (`contextlib.closing`) when it is not read to its end, or the processes live on.

    Raises:
        OSError: if a process was killed, by the system for want of memory perhaps.
    """
    if processes == 1:
        for items, place in work:
            yield encode_all(items), place
        return
    spawn = multiprocessing.get_context("spawn")
    at_work: deque[tuple[Future[list[EncodedItem]], Place]] = deque()
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_start_worker) as pool:
        try:
            for items, place in work:
                at_work.append((pool.submit(encode_all, items), place))
                if len(at_work) == 2 * processes:
                    future, behind = at_work.popleft()
                    yield future.result(), behind
            for future, behind in at_work:
                yield future.result(), behind
        except BrokenProcessPool as error:
            raise OSError(
                f"one of the {processes} processes that tokenise ended unasked, for want of memory perhaps; "
                "run the same command again, with fewer --processes if it happens again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end when it does: a pool's processes outlive one that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()
