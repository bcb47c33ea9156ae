"""Figures of RoPE beyond its training: rounding errors, slowed frequencies, loss against position.

Legend: K pairs of a head, N points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike

from gpt2course.viz.rope import spread
from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, LINESTYLES, PALE, new_figure

SMALL = FONT_SIZE - 1
MARKERS = "os^DvPX"


@dataclass(frozen=True)
class Curve:
    """A mean loss over spans of positions."""

    position: ArrayLike
    """(N,) where each span is drawn"""
    loss: ArrayLike
    """(N,) nats per token"""
    low: ArrayLike
    """(N,) lower end of the spread"""
    high: ArrayLike
    """(N,) upper end"""


def rounding(exact: float, positions: ArrayLike, scores: Mapping[str, ArrayLike], distance: int, late: int) -> Figure:
    """The score of one query and key at a fixed distance, moved along the text, one panel for each place of rounding.

    Args:
        exact: the score without rounding, the same everywhere.
        positions: (N,) of the query.
        scores: what is rounded (title) to (N,) scores.
        distance: for the axis label.
        late: titles name the mean error from this position on.
    """
    figure, axes = new_figure(1, len(scores), width=7.2, height=2.8, sharey=True, squeeze=False)
    for i, (ax, (title, score_N)) in enumerate(zip(axes[0], scores.items(), strict=True)):
        x, y = np.asarray(positions), np.asarray(score_N)
        ax.axhline(exact, color=INK, linestyle=":", linewidth=1.2, zorder=3)
        ax.plot(x, y, color=COLOURS[i], linestyle="-", linewidth=0.8)
        error = f"{float(np.abs(y[x >= late] - exact).mean()):.1g}"
        ax.set_title(f"{title}\nerror from {late:,} on: {error}")
        ax.set_xlabel("query position")
        ax.set_xticks([0, 4000, 8000], ["0", "4,000", "8,000"])
    axes[0, 0].set_ylabel(f"score, key {distance} back")
    return figure


def multipliers(lines: Mapping[str, ArrayLike], last_full: int) -> Figure:
    """What each pair's frequency is multiplied by.

    Args:
        lines: label to (K,) multipliers, the pairs from fast to slow.
        last_full: the slowest pair that still goes round within the trained length.
    """
    figure, ax = new_figure(width=7.0, height=3.3)
    K = max(len(np.asarray(values)) for values in lines.values())
    border = last_full + 0.5
    ax.axvline(border, color=INK, linestyle=":", linewidth=1.2)
    ax.text(border - 0.3, 1.4, "go round in training", ha="right", va="center", fontsize=SMALL)
    ax.text(border + 0.3, 1.4, "never do", ha="left", va="center", fontsize=SMALL)
    for i, (label, values) in enumerate(lines.items()):
        ax.plot(np.asarray(values), label=label, marker=MARKERS[i], markersize=4, linewidth=1.5)
    ax.set_yscale("log", base=2)
    low = min(float(np.min(np.asarray(values))) for values in lines.values())
    ticks = [2.0**-n for n in range(round(-np.log2(low)) + 1)]
    ax.set_yticks(ticks, ["1" if tick == 1 else f"1/{1 / tick:.0f}" for tick in ticks])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(0.85 * low, 1.55)
    ax.set_xlim(-0.5, K - 0.5)
    ax.set_xlabel("pair, from fast to slow")
    ax.set_ylabel("frequency multiplied by")
    ax.legend(frameon=False, fontsize=SMALL, loc="lower left", bbox_to_anchor=(0.0, 0.1))
    return figure


def loss_by_length(curves: Mapping[str, Curve], trained: int, ticks: Sequence[int]) -> Figure:
    """Loss against the position, on a logarithmic axis, each line with its spread and its name at its end.

    Args:
        curves: label to losses.
        trained: length of training in tokens.
        ticks: positions on the axis.
    """
    figure, ax = new_figure(width=7.0, height=3.9)
    last = 0.0
    ends: dict[str, tuple[float, str]] = {}
    for i, (label, curve) in enumerate(curves.items()):
        x, y = np.asarray(curve.position), np.asarray(curve.loss)
        style = {"color": COLOURS[i], "linestyle": LINESTYLES[i]}
        ax.plot(x, y, marker=MARKERS[i], markersize=4, linewidth=1.7, **style)
        ax.fill_between(x, np.asarray(curve.low), np.asarray(curve.high), color=COLOURS[i], alpha=0.13, linewidth=0)
        last = max(last, float(x[-1]))
        ends[label] = (float(y[-1]), COLOURS[i])
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = ax.get_ylim()
    to_the_end = {label: end for label, end in ends.items() if float(np.asarray(curves[label].position)[-1]) == last}
    heights = spread([y for y, _ in to_the_end.values()], 0.062 * (high - low))
    for (label, (_, colour)), height in zip(to_the_end.items(), heights, strict=True):
        ax.text(1.09 * last, height, label, color=colour, va="center", fontsize=SMALL)
    for label in ends.keys() - to_the_end.keys():
        # A line that ends early has its name over its start, where the later ones cannot cross it.
        x, top = np.asarray(curves[label].position)[0], float(np.max(np.asarray(curves[label].high)))
        ax.text(x, top + 0.02 * (high - low), label, color=ends[label][1], va="bottom", fontsize=SMALL)
    ax.axvline(trained, color=INK, linestyle=":", linewidth=1.2)
    ax.text(0.96 * trained, high, f"trained on {trained} bytes", ha="right", va="top", fontsize=SMALL)
    ax.text(1.04 * trained, high, "never seen", ha="left", va="top", fontsize=SMALL)
    ax.set_xlim(None, 3.4 * last)
    ax.spines["bottom"].set_bounds(ax.get_xlim()[0], last)
    ax.grid(axis="y", color=PALE, linewidth=0.4, linestyle="-")
    ax.set_ylim(low, high)
    ax.set_xlabel("position in the text, bytes")
    ax.set_ylabel("loss, nats per byte")
    return figure


def extra_loss(curves: Mapping[str, ArrayLike], prompt: int) -> Figure:
    """How much more loss each decoder has than the whole text read at once, one panel each, all to one scale.

    Args:
        curves: name to (T,) extra nats at each position.
        prompt: its length; it is shaded.
    """
    figure, axes = new_figure(2, 2, width=7.0, height=3.9, sharex=True, sharey=True)
    for i, (ax, (name, values)) in enumerate(zip(axes.flat, curves.items(), strict=True)):
        extra = np.asarray(values, dtype=float)
        ax.axvspan(-0.5, prompt - 0.5, color="#efefef", linewidth=0)
        ax.axhline(0, color=PALE, linewidth=0.8, linestyle="-")
        ax.plot(extra, color=COLOURS[i], linestyle="-", linewidth=1.6)
        ax.set_title(f"decoder {name}")
        ax.set_xlim(-0.5, len(extra) - 0.5)
    top = max(float(np.max(np.asarray(values))) for values in curves.values())
    axes[0, 0].text(0.5, 0.98 * top, "prompt", fontsize=SMALL, va="top")
    axes[0, 0].text(prompt + 0.5, 0.98 * top, "one byte at a time", fontsize=SMALL, va="top")
    for ax in axes[1]:
        ax.set_xlabel("position")
    for ax in axes[:, 0]:
        ax.set_ylabel("extra nats")
    return figure
