"""SIGTERM and SIGINT as a wish to stop, which the loop grants at the end of a step, when all processes agree."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While entered, the first SIGTERM or SIGINT (Ctrl-C) only sets `wanted`; a second SIGINT interrupts at once.

    A process that left its step by itself would keep the others waiting in a collective, and half a checkpoint is
    none. torchrun passes both signals on and waits 30 s, so a step and a save together must take less than that.
    Outside the main thread Python can't take signals, and nothing is changed.
    """

    def __init__(self) -> None:
        self.wanted = ""
        """name of the signal that came, or empty"""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = signal.Signals(number).name

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
