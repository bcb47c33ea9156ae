"""Times that can be compared: taken in turns, given as a median with its spread."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, and the quartiles around it."""

    median: float
    low: float
    """first quartile"""
    high: float
    """third quartile"""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Raises ValueError if there are none."""
        if not values:
            raise ValueError("there are no measurements to take the median of")
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        return cls(median, low, high)


@dataclass(frozen=True)
class Line:
    """y = slope x + intercept, and R squared: the share of y's variance that the line explains, 1 if all."""

    slope: float
    intercept: float
    r2: float

    @classmethod
    def through(cls, x: Sequence[float], y: Sequence[float]) -> "Line":
        """The line of least squares. Raises ValueError for fewer than three points: two always lie on a line."""
        if len(x) < 3:
            raise ValueError(f"a line through {len(x)} points says nothing; measure at three or more")
        slope, intercept = np.polyfit(x, y, 1).tolist()
        rest = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
        mean = statistics.fmean(y)
        total = sum((b - mean) ** 2 for b in y)
        return cls(slope, intercept, 1.0 - rest / total if total else 1.0)


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """The spread of a ratio, taken round by round: what slowed a whole round down cancels out."""
    return Spread.of([a / b for a, b in zip(of, to, strict=True)])


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    after_each: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each case, `repeats` times, after one run that is not counted.

    Every round runs each case once, in an order that turns from round to round, so that whatever else the machine does
    meets all of them alike. What a case returns is released within its time.
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            synchronize(device)
            started = time.perf_counter()
            cases[name]()
            synchronize(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - started)
            after_each()
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
