"""Medians, ratios and lines of the benchmarks."""

import pytest
import torch

from gpt2course.bench.timing import Line, Spread, interleaved, ratio

CPU = torch.device("cpu")


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    """Bug: the mean for the median, so that one disturbed run decides; or the extremes for the quartiles."""
    assert Spread.of([9.0, 1.0, 2.0, 3.0, 1000.0]) == Spread(3.0, 2.0, 9.0)
    with pytest.raises(ValueError, match="no measurements"):
        Spread.of([])


def test_a_ratio_is_taken_round_by_round() -> None:
    """Bug: the ratio of two medians from different moments. Here each round of the second half was ten times slower."""
    full = [1.0, 1.0, 10.0, 10.0, 10.0]
    window = [0.5, 0.5, 5.0, 5.0, 5.0]
    assert ratio(window, full) == Spread(0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="shorter"):
        ratio(window, full[:-1])


def test_cases_take_turns() -> None:
    """Bug: all runs of one case, then all of the other, or one always right after the same one; warm-ups counted."""
    calls: list[str] = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 3, CPU)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(s >= 0 for case in seconds.values() for s in case)


def test_a_line_through_points() -> None:
    """Bug: slope and intercept swapped; a curve called straight."""
    straight = Line.through([1, 2, 4], [5.0, 7.0, 11.0])
    assert straight.slope == pytest.approx(2.0)
    assert straight.intercept == pytest.approx(3.0)
    assert straight.r2 == pytest.approx(1.0)
    assert Line.through([1, 2, 4, 8, 16], [1.0, 4.0, 16.0, 64.0, 256.0]).r2 < 0.97
    with pytest.raises(ValueError, match="through 2 points says nothing"):
        Line.through([1, 2], [1.0, 2.0])
