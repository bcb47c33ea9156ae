"""The figure of `gpt2course bench attention`: training by length, memory by length, decoding by context."""

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from gpt2course.viz.style import FONT_SIZE, INK, PALE, new_figure

if TYPE_CHECKING:
    from gpt2course.bench.report import Report
    from gpt2course.bench.timing import Spread

MARKERS = ("o", "s", "D", "^")
MIB = 2**20


def attention_figure(report: "Report") -> Figure:
    """Four panels: time and ratio of a training step's attention, its peak memory, and the speed of decoding."""
    figure, axes = new_figure(2, 2, width=9.6, height=7.0)
    (times, ratios), (memory, decoding) = axes
    _times(times, report)
    _ratios(ratios, report)
    _memory(memory, report)
    _decoding(decoding, report)
    figure.suptitle(f"{report.machine}; threads: {report.threads}, {report.dtype}", fontsize=FONT_SIZE - 2, color=INK)
    return figure


def brief_figure(report: "Report") -> Figure:
    """Two of the panels, for a page: what the window saves in training, and the speed of decoding."""
    figure, axes = new_figure(1, 2, width=7.6, height=3.1)
    _ratios(axes[0], report)
    _decoding(axes[1], report)
    return figure


def size(n: int) -> str:
    """1,024 as 1k, 16,384 as 16k, and what is no multiple of 1,024 as it is."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def _length_axis(ax: Axes, values: list[int], label: str) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator([float(v) for v in values]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([size(v) for v in values])
    ax.set_xlabel(label)
    ax.grid(color=PALE, lw=0.5, linestyle="-")


def _log_amounts(ax: Axes) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _with_spread(ax: Axes, x: list[int], spreads: "list[Spread]", marker: str, label: str) -> None:
    """A line through the medians, with a bar from quartile to quartile."""
    below, above = [s.median - s.low for s in spreads], [s.high - s.median for s in spreads]
    ax.errorbar(x, [s.median for s in spreads], yerr=[below, above], marker=marker, ms=5, capsize=3, label=label)


def _times(ax: Axes, report: "Report") -> None:
    from gpt2course.bench.timing import Spread

    lengths = [p.T for p in report.training]
    for marker, name, rows in (
        ("o", "full causal", [p.full_seconds for p in report.training]),
        ("s", f"window {report.window}", [p.window_seconds for p in report.training]),
    ):
        _with_spread(ax, lengths, [Spread.of([1e3 * seconds for seconds in row]) for row in rows], marker, name)
    _log_amounts(ax)
    _length_axis(ax, lengths, "T, positions")
    ax.set_ylabel("forward + backward, ms")
    ax.set_title("Attention in training: time", loc="left")
    ax.legend(frameon=False)


def _ratios(ax: Axes, report: "Report") -> None:
    lengths, ratios = [p.T for p in report.training], [p.ratio for p in report.training]
    _with_spread(ax, lengths, ratios, "o", "time")
    ax.plot(
        lengths, [p.window_flops / p.full_flops for p in report.training], marker="s", ms=5, label="work: visible pairs"
    )
    for T, r in zip(lengths, ratios, strict=True):
        ax.annotate(f"{r.median:.2f}", (T, r.median), xytext=(5, 5), textcoords="offset points", fontsize=FONT_SIZE - 2)
    ax.axhline(1.0, color=INK, lw=1, linestyle="-")
    ax.set_ylim(0, max(1.1, 1.1 * max(r.high for r in ratios)))
    _length_axis(ax, lengths, "T, positions")
    ax.set_ylabel(f"window {report.window} / full")
    ax.set_title("The window's share of the full price", loc="left")
    ax.legend(frameon=False)


def _memory(ax: Axes, report: "Report") -> None:
    lengths = [p.T for p in report.training]
    ax.plot(lengths, [p.full_peak_bytes / MIB for p in report.training], marker="o", ms=5, label="full causal")
    ax.plot(
        lengths, [p.window_peak_bytes / MIB for p in report.training], marker="s", ms=5, label=f"window {report.window}"
    )
    _log_amounts(ax)
    _length_axis(ax, lengths, "T, positions")
    ax.set_ylabel("peak memory, MiB")
    ax.set_title("Attention in training: memory", loc="left")
    ax.legend(frameon=False)


def _decoding(ax: Axes, report: "Report") -> None:
    variants = list(dict.fromkeys(d.variant for d in report.decoding))
    for variant, marker in zip(variants, MARKERS, strict=True):
        rows = [report.cell(variant, context) for context in report.contexts]
        label = f"{variant} ({rows[-1].cache_bytes / MIB:,.4g} MiB at {size(report.contexts[-1])})"
        _with_spread(ax, report.contexts, [d.tokens_per_second for d in rows], marker, label)
    ax.set_ylim(bottom=0)
    _length_axis(ax, report.contexts, "context, positions in the cache")
    ax.set_ylabel("tokens per second")
    ax.set_title("Decoding: speed, and the cache it needs", loc="left")
    ax.legend(frameon=False, fontsize=FONT_SIZE - 2)
