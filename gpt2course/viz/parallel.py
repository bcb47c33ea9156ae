"""Figures of data parallel training: what each token weighs, a ring at work, who sends how much, and what ran when.

Legend: N processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, PALE, SEQUENTIAL, ink_on, new_figure

SMALL = FONT_SIZE - 2
MANY = 8
HATCHES = ["", "///", "...", "xx"]


def token_weights(panels: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """How much each token counts in the gradient: a bar a token, one panel a way of taking the mean.

    Args:
        panels: title to the weights of each process's tokens, process by process.
    """
    figure, axes = new_figure(1, len(panels), width=7.0, height=2.6, sharey=True, squeeze=False)
    for ax, (title, ranks) in zip(axes[0], panels.items(), strict=True):
        begin = 0
        for rank, weights in enumerate(ranks):
            places = np.arange(begin, begin + len(weights))
            look = {"color": COLOURS[rank % 7], "hatch": HATCHES[rank % 4], "edgecolor": "white", "linewidth": 0.5}
            ax.bar(places, weights, 0.9, label=f"rank {rank}: {len(weights)} tokens", **look)
            begin += len(weights) + 1
        ax.set_title(title, loc="left")
        ax.set_xticks([])
        ax.set_xlabel("one bar per valid token")
    axes[0, 0].set_ylabel("weight in the loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=SMALL)
    return figure


def ring(held: Sequence[Sequence[Sequence[int]]], sends: Sequence[int] | None = None, title: str = "") -> Figure:
    """What each process of a ring holds, chunk by chunk: whose numbers are summed up in it already.

    Args:
        held: by process, by chunk, the processes whose numbers are in the sum.
        sends: the chunk that each process hands to the next one in this step; it has a frame and an arrow.
        title: a line above.
    """
    n = len(held)
    figure, ax = new_figure(width=5.6, height=0.55 * n + 0.9)
    colours = matplotlib.colormaps[SEQUENTIAL]
    ax.set_axis_off()
    ax.set_xlim(-1.0, n + 0.02)
    ax.set_ylim(n + 0.1, -0.55)
    ax.set_title(title, loc="left")
    for chunk in range(n):
        ax.text(chunk + 0.5, -0.12, f"chunk {chunk}", ha="center", va="bottom", fontsize=SMALL, color=INK)
    for rank, chunks in enumerate(held):
        ax.text(-0.1, rank + 0.5, f"rank {rank}", ha="right", va="center", fontsize=FONT_SIZE - 1, color=INK)
        for chunk, members in enumerate(chunks):
            face = colours((len(members) - 1) / max(1, n - 1))
            ax.add_patch(Rectangle((chunk, rank), 1, 1, fc=face, ec="white", lw=2))
            words = "+".join(map(str, members))
            going = sends is not None and sends[rank] == chunk
            ax.text(
                chunk + 0.5,
                rank + 0.5,
                f"{words}  ↓" if going else words,
                ha="center",
                va="center",
                fontsize=SMALL,
                color=ink_on(face),
                weight="bold" if going else "normal",
            )
            if going:
                box = (chunk + 0.05, rank + 0.06)
                ax.add_patch(Rectangle(box, 0.9, 0.88, fill=False, ec=COLOURS[1], lw=3))
    return figure


def bytes_sent(ns: Sequence[int], lines: Mapping[str, Sequence[float]]) -> Figure:
    """What the busiest process sends, in multiples of the tensor, against the number of processes."""
    figure, ax = new_figure(width=7.0, height=3.0)
    for i, (label, values) in enumerate(lines.items()):
        ax.plot(ns, values, lw=2, marker="o^sD"[i % 4], ms=4, label=label)
    ax.axhline(2.0, color=PALE, lw=1, ls="-", zorder=0)
    ax.annotate("2", (0.005, 2.0), xycoords=("axes fraction", "data"), va="bottom", fontsize=SMALL)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(list(ns), [str(n) for n in ns])
    low, high = (f([v for values in lines.values() for v in values]) for f in (min, max))
    powers = [2.0**i for i in range(int(np.floor(np.log2(low))), int(np.ceil(np.log2(high))) + 1, 2)]
    ax.set_yticks(powers, [f"{p:g}" for p in powers])
    ax.minorticks_off()
    ax.set_xlabel("processes")
    ax.set_ylabel("bytes sent / bytes of the tensor")
    ax.legend(frameon=False, fontsize=SMALL)
    return figure


@dataclass(frozen=True)
class Span:
    """Something that took a while.

    Attributes:
        lane: the row it is drawn in: "backward" or "all-reduce".
        start, end: milliseconds.
        label: a word to write into it, where there is room.
    """

    lane: str
    start: float
    end: float
    label: str = ""


def timeline(panels: Mapping[str, Sequence[Span]], unit: str = "ms") -> Figure:
    """Who worked when: a panel a run, a row a lane, a box a span; all panels have one time axis.

    Spans of one lane that overlap are drawn below each other.

    Args:
        panels: title to spans.
        unit: of the times.
    """
    lanes = list(dict.fromkeys(span.lane for spans in panels.values() for span in spans))
    end = max(span.end for spans in panels.values() for span in spans)
    figure, axes = new_figure(
        len(panels), 1, width=7.0, height=0.5 + 1.1 * len(panels), sharex=True, sharey=True, squeeze=False
    )
    for ax, (title, spans) in zip(axes[:, 0], panels.items(), strict=True):
        for row, lane in enumerate(lanes):
            _lane(ax, row, [span for span in spans if span.lane == lane], end)
        last = max(span.end for span in spans)
        ax.axvline(last, color=INK, ls="--", lw=1)
        ax.set_title(f"{title}: {last:.3g} {unit}", loc="left")
        ax.set_yticks(range(len(lanes)), lanes)
        ax.set_ylim(len(lanes) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0)
    axes[-1, 0].set_xlim(0, 1.02 * end)
    axes[-1, 0].set_xlabel(f"{unit} since the backward pass began")
    return figure


def _lane(ax: Axes, row: int, spans: Sequence[Span], end: float) -> None:
    """The boxes of one lane, on as many levels as overlap needs."""
    free: list[float] = []
    levels = []
    for span in sorted(spans, key=lambda span: span.start):
        level = next((i for i, until in enumerate(free) if until <= span.start), len(free))
        free[level : level + 1] = [span.end]
        levels.append((level, span))
    height = 0.8 / max(1, len(free))
    face, hatch, edge = COLOURS[(0, 5, 2, 3)[row % 4]], ("", "///")[row % 2], "white"
    if len(free) > MANY:  # white edges and stripes would leave nothing of boxes as thin as these
        hatch, edge = "", "none"
    for level in range(len(free)):
        y = row - 0.4 + level * height
        # One artist for all boxes of a level: fifty patches would take half of the time of a redraw.
        own = [(span.start, span.end - span.start) for at, span in levels if at == level]
        ax.broken_barh(own, (y, height), facecolor=face, hatch=hatch, edgecolor=edge, linewidth=0.6)
    for level, span in levels:
        if span.label and span.end - span.start > 0.012 * end * len(span.label) and height > 0.35:
            middle = ((span.start + span.end) / 2, row - 0.4 + (level + 0.5) * height)
            ink = ink_on(matplotlib.colors.to_rgb(face))
            ax.text(*middle, span.label, ha="center", va="center", fontsize=SMALL, color=ink)


def overlap(
    spans: Sequence[Span], sizes: Sequence[float], times: Sequence[float], chosen: float, backward: float
) -> Figure:
    """A timeline for one bucket size, and below how long each size takes, with a ring around the chosen one.

    Args:
        spans: of the chosen size.
        sizes: of a bucket, KiB.
        times: milliseconds until the last sum has arrived, by size.
        chosen: one of the sizes.
        backward: milliseconds of the backward pass alone, which no size can go below.
    """
    figure, (top, bottom) = new_figure(2, 1, width=7.0, height=3.9, height_ratios=(1, 1.5))
    figure.set_layout_engine(None)  # it would take half of the time of a redraw
    figure.subplots_adjust(left=0.115, right=0.98, top=0.98, bottom=0.13, hspace=0.55)
    lanes = list(dict.fromkeys(span.lane for span in spans))
    for row, lane in enumerate(lanes):
        _lane(top, row, [span for span in spans if span.lane == lane], max(times))
    top.set_yticks(range(len(lanes)), lanes)
    top.set_ylim(len(lanes) - 0.5, -0.5)
    top.set_xlim(0, 1.02 * max(times))
    top.tick_params(axis="y", length=0)
    top.set_xlabel("ms since the backward pass began")
    bottom.plot(sizes, times, lw=2, label="until the last sum is there")
    bottom.plot(chosen, times[list(sizes).index(chosen)], "o", mfc="none", mew=2, ms=10, color=COLOURS[1])
    bottom.axhline(backward, color=INK, ls="--", lw=1, label="backward alone")
    bottom.set_xscale("log", base=2)
    bottom.set_xticks(sizes[::2], [f"{size:,.0f}" for size in sizes[::2]])
    bottom.minorticks_off()
    bottom.set_ylim(0, 1.35 * max(times))  # with room for the legend
    bottom.set_xlabel("bucket size (KiB)")
    bottom.set_ylabel("ms until done")
    bottom.legend(frameon=False, fontsize=SMALL, loc="upper right", ncols=2)
    return figure
