"""The figure of the attention benchmark says what the report says."""

import pytest

from gpt2course.bench.decoding import Decoding
from gpt2course.bench.report import Report
from gpt2course.bench.training import Length
from gpt2course.viz.bench import attention_figure, brief_figure, size

MIB = 2**20


@pytest.fixture
def report() -> Report:
    lengths = [
        Length(T, "blocked", [T / 1e3, T / 1e3, T / 1e3], [0.25, 0.5, 1.0], 4 * T * MIB, 5 * T * MIB, 4 * T, T)
        for T in (1024, 2048, 4096)
    ]
    speeds = {"MHA": 0.1, "GQA-4": 0.05, "MQA": 0.04, "window, ring": 0.02}
    cells = [
        Decoding(name, context, [seconds] * 3, 3 * context * 1024)
        for name, seconds in speeds.items()
        for context in (1024, 16384)
    ]
    return Report("c", "a machine", "2", "cpu", "float32", 2, "passive", 256, 12, 64, {}, lengths, cells, [])


def test_each_panel_shows_its_figures(report: Report) -> None:
    """Bug: full and window swapped, seconds called ms, bytes called MiB, the ratio upside down."""
    times, ratios, memory, decoding = attention_figure(report).axes
    assert [line.get_ydata()[0] for line in times.containers[0].lines[:1]] == pytest.approx([1024.0])
    assert list(times.containers[1].lines[0].get_ydata()) == pytest.approx([500.0] * 3)
    assert list(ratios.containers[0].lines[0].get_ydata()) == pytest.approx([0.5 / 1.024, 0.5 / 2.048, 0.5 / 4.096])
    assert [list(line.get_ydata()) for line in memory.lines] == [[4096.0, 8192.0, 16384.0], [5120.0, 10240.0, 20480.0]]
    assert [list(c.lines[0].get_ydata()) for c in decoding.containers] == [
        pytest.approx([rate, rate]) for rate in (10, 20, 25, 50)
    ]


def test_the_legend_names_variants_and_their_caches(report: Report) -> None:
    """Bug: a line whose variant or whose price nobody can tell."""
    decoding = attention_figure(report).axes[3]
    texts = [text.get_text() for text in decoding.get_legend().get_texts()]
    assert texts == [f"{name} (48 MiB at 16k)" for name in ("MHA", "GQA-4", "MQA", "window, ring")]


def test_lines_differ_in_dash_as_well(report: Report) -> None:
    """Bug: lines that a colour-blind reader, or a printer, can't tell apart."""
    for ax in attention_figure(report).axes:
        lines = [c.lines[0] for c in ax.containers] or ax.lines
        assert len({str(line.get_linestyle()) for line in lines}) == len(lines)


def test_sizes_are_short() -> None:
    """Bug: ticks of five digits that run into each other."""
    assert [size(n) for n in (64, 1024, 16384, 1500)] == ["64", "1k", "16k", "1500"]


def test_the_brief_figure_has_the_same_two_panels(report: Report) -> None:
    """Bug: a page that shows other numbers than the command's own figure."""
    _, ratios, _, decoding = attention_figure(report).axes
    for brief, full in zip(brief_figure(report).axes, (ratios, decoding), strict=True):
        assert [list(line.get_ydata()) for line in brief.lines] == [list(line.get_ydata()) for line in full.lines]
        assert brief.lines
