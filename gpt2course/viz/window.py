"""Figures of the sliding window: masks cell by cell, the band and its blocks, what it costs, and how far it reaches.

Legend: T query positions, S key positions, L layers, W window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike

from gpt2course.viz.attention import cost_lines
from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, PALE, SEQUENTIAL, new_figure

# What a cell of a mask is: name, colour.
KINDS = {
    "near": ("in the window", COLOURS[0]),
    "sink": ("a sink", COLOURS[5]),
    "behind": ("out of the window", "#d9d9d9"),
    "future": ("the future", "#f4f4f4"),
    "empty": ("no key there", "white"),
}
MARKERS = "os^Dv"


@dataclass(frozen=True)
class MaskPanel:
    """One mask of the grid."""

    title: str
    q_pos: Sequence[int]
    """positions of the queries, from the top; -1 is padding"""
    k_pos: Sequence[int]
    """positions of the keys, from the left; -1 where there is none"""
    window: int | None = None
    sinks: int = 0
    split: int | None = None
    """draw a line before this key: what is left of it lay in the cache"""


def cell_kinds(panel: MaskPanel) -> list[list[str]]:
    """For each query and key why it is visible ("near", "sink") or why not ("behind", "future", "empty")."""

    def kind(q: int, k: int) -> str:
        if k < 0 or q < 0:
            return "empty"
        if k > q:
            return "future"
        if panel.window is None or q - k < panel.window:
            return "near"
        return "sink" if k < panel.sinks else "behind"

    return [[kind(q, k) for k in panel.k_pos] for q in panel.q_pos]


def mask_grid(panels: Sequence[MaskPanel], columns: int = 4, cell: float = 0.165) -> Figure:
    """Masks side by side: rows are queries, columns are keys, and each cell says why it is visible or hidden.

    Args:
        panels: the masks, row by row.
        columns: how many stand in a row.
        cell: width and height of a cell in inches.
    """
    n_rows = -(-len(panels) // columns)
    above, below, legend = 0.36, 0.46, 0.32
    pitch_x, pitch_y = 7.0 / columns, above + below + cell * max(len(panel.q_pos) for panel in panels)
    height = n_rows * pitch_y + legend
    figure, axes = new_figure(n_rows, columns, width=7.0, height=height, squeeze=False)
    figure.set_layout_engine("none")  # placed by hand: all cells are of one size
    for i, ax in enumerate(axes.flat):
        if i >= len(panels):
            ax.set_visible(False)
            continue
        panel, (row, column) = panels[i], divmod(i, columns)
        wide, tall = cell * len(panel.k_pos), cell * len(panel.q_pos)
        left, top = column * pitch_x + (pitch_x - wide) / 2 + 0.08, height - row * pitch_y - above
        ax.set_position((left / 7.0, (top - tall) / height, wide / 7.0, tall / height))
        draw_mask(ax, panel)
        ax.set_title(panel.title, fontsize=FONT_SIZE - 1)
        if column == 0:
            ax.set_ylabel("query", fontsize=FONT_SIZE - 1, labelpad=2)
        ax.set_xlabel("key", fontsize=FONT_SIZE - 1, labelpad=1)
    kind_legend(figure, [kind for panel in panels for row in cell_kinds(panel) for kind in row])
    return figure


def draw_mask(ax: Axes, panel: MaskPanel) -> None:
    """One mask, a box a cell, with the positions of queries and keys at its sides."""
    for side in ax.spines.values():
        side.set_visible(False)
    for row, kinds in enumerate(cell_kinds(panel)):
        for column, kind in enumerate(kinds):
            draw_cell(ax, column, row, kind)
    ax.set_xlim(-0.5, len(panel.k_pos) - 0.5)
    ax.set_ylim(len(panel.q_pos) - 0.5, -0.5)
    ax.tick_params(length=0, labelsize=7, pad=1)
    ax.set_xticks(range(len(panel.k_pos)), ["·" if k < 0 else str(k) for k in panel.k_pos])
    ax.set_yticks(range(len(panel.q_pos)), ["·" if q < 0 else str(q) for q in panel.q_pos])
    if panel.split is not None:
        ax.axvline(panel.split - 0.5, color=INK, linewidth=1.6)


def draw_cell(ax: Axes, column: float, row: float, kind: str) -> None:
    """One cell of a mask; where there is no key, a box with a cross."""
    edge = PALE if kind == "empty" else "white"
    box = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=KINDS[kind][1], edgecolor=edge, linewidth=0.8)
    ax.add_patch(box)
    if kind == "empty":
        ax.plot(column, row, marker="x", color=PALE, markersize=4)
    if kind == "sink":
        ax.plot(column, row, marker="o", color="white", markersize=3)


def kind_legend(figure: Figure, kinds: Sequence[str]) -> None:
    """What the colours of the cells mean, at the lower edge; only those that occur."""
    used = [kind for kind in KINDS if kind in kinds]
    patches = [
        Patch(facecolor=KINDS[kind][1], edgecolor=PALE, label=KINDS[kind][0], hatch="xx" if kind == "empty" else None)
        for kind in used
    ]
    figure.legend(handles=patches, loc="lower center", ncols=len(used), frameon=False, fontsize=FONT_SIZE - 1)


def pairs(lengths: Sequence[int], lines: Mapping[str, ArrayLike]) -> Figure:
    """Visible pairs against T, on logarithmic axes, with the factor to the first line at the right end.

    Args:
        lengths: T.
        lines: legend to pairs at each length; the first is what the others are compared with.
    """
    figure, ax = new_figure(width=6.6, height=3.6)
    first = np.asarray(next(iter(lines.values())), dtype=float)
    for i, (label, values) in enumerate(lines.items()):
        counted = np.asarray(values, dtype=float)
        ax.plot(lengths, counted, marker=MARKERS[i % 5], markersize=4)
        times = "" if i == 0 else f": 1/{first[-1] / counted[-1]:.0f} of it"
        ax.annotate(
            label + times,
            (lengths[-1], counted[-1]),
            (7, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[i],
            fontsize=FONT_SIZE - 1,
        )
    log_lengths(ax, lengths)
    ax.set_xlim(None, lengths[-1] * 14)
    ax.set_ylabel("pairs of query and visible key")
    return figure


def log_lengths(ax: Axes, lengths: Sequence[int]) -> None:
    """Logarithmic axes with a tick at each length."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, [f"{T // 1024}k" if T % 1024 == 0 else str(T) for T in lengths])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("sequence length T, tokens")


def blocks(T: int, window: int) -> Figure:
    """The band of a window with the boxes that a blocked computation works out: W queries by 2 W keys each.

    Args:
        T: positions, a multiple of the window.
        window: W, also the length of a block.

    Raises:
        ValueError: if T is no multiple of the window.
    """
    if T % window:
        raise ValueError(f"T is {T} and the window {window}; whole blocks are drawn, so give a multiple")
    panel = MaskPanel("", range(T), range(T), window)
    figure, ax = new_figure(width=7.0, height=4.3)
    figure.set_layout_engine("none")
    ax.set_position((0.07, 0.2, 0.78 * 4.3 / 7.0, 0.78))
    draw_mask(ax, panel)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    for block in range(T // window):
        left = max(block - 1, 0) * window
        wide = window if block == 0 else 2 * window
        box = Rectangle(
            (left - 0.5, block * window - 0.5), wide, window, fill=False, edgecolor=COLOURS[1], linewidth=2.2
        )
        ax.add_patch(box)
        words = (
            f"block {block}: keys 0 to {window - 1}"
            if block == 0
            else f"block {block}: keys {left} to {left + wide - 1}"
        )
        ax.annotate(
            words,
            (1, (block + 0.5) * window - 0.5),
            (10, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=COLOURS[1],
            annotation_clip=False,
        )
    kind_legend(figure, ["near", "behind", "future"])
    return figure


def cost(
    lengths: Sequence[int], times_ms: Mapping[str, ArrayLike], peaks_mib: Mapping[str, ArrayLike], where: str
) -> Figure:
    """Time of forward and backward pass (median, lowest, highest) and peak memory against T, on logarithmic axes.

    Args:
        lengths: T.
        times_ms: way of computing to (lengths, repeats) milliseconds.
        peaks_mib: way of computing to (lengths,) MiB.
        where: the machine, for the title.
    """
    figure, (left, right) = new_figure(1, 2, width=7.0, height=3.7)
    cost_lines(left, right, lengths, times_ms, peaks_mib)
    left.set_title("forward and backward, milliseconds")
    right.set_title("peak extra memory, MiB")
    for ax in (left, right):
        log_lengths(ax, lengths)
        slope_guides(ax, lengths)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(where, fontsize=FONT_SIZE)
    return figure


def slope_guides(ax: Axes, lengths: Sequence[int]) -> None:
    """Two pale lines from the lower left corner of the data: how T and T² grow."""
    low, high = ax.get_ylim()
    x = np.asarray(lengths, dtype=float)
    for power, word in ((1, "T"), (2, "T²")):
        y = low * 1.3 * (x / x[0]) ** power
        ax.plot(x, y, color=PALE, linewidth=1, linestyle="-", zorder=0)
        inside = int(np.flatnonzero(y <= high)[-1])
        ax.text(x[inside], y[inside], f" {word}", color="#777777", fontsize=FONT_SIZE - 1, va="center")
    ax.set_ylim(low, high)
    ax.set_xlim(None, lengths[-1] * 1.6)


def receptive_field(norms_LS: ArrayLike, reaches: Sequence[int], title: str = "") -> Figure:
    """How strongly the last position depends on each input, after 1, 2, 3 … layers; exact zeros are left grey.

    Args:
        norms_LS: (L, S) gradient norms, one row a layer, one column an input position.
        reaches: L numbers of positions that can be reached; a line is drawn where each ends.
        title: above the picture.
    """
    norms = np.array(norms_LS, dtype=float)
    L, S = norms.shape
    norms /= norms.max(axis=1, keepdims=True)
    shown = np.where(norms > 0, norms, np.nan)
    figure, ax = new_figure(width=7.0, height=1.3 + 0.3 * L)
    cmap = matplotlib.colormaps[SEQUENTIAL].resampled(24).with_extremes(bad=KINDS["behind"][1])
    scale = LogNorm(max(float(np.nanmin(shown)), 1e-8), 1.0)
    image = ax.imshow(
        shown, cmap=cmap, norm=scale, aspect="auto", interpolation="nearest", extent=(-S + 0.5, 0.5, L, 0)
    )
    for row, reach in enumerate(reaches):
        if reach < S:
            edge = 0.5 - reach
            ax.plot([edge, edge], [row, row + 1], color=COLOURS[1], linewidth=2.5, linestyle="-")
            ax.text(edge - 0.2, row + 0.5, str(reach), ha="right", va="center", color=INK, fontsize=FONT_SIZE - 1)
    ax.set_yticks(np.arange(L) + 0.5, [str(layer + 1) for layer in range(L)])
    ax.tick_params(axis="y", length=0)
    ax.set_ylabel("layers")
    ax.set_xlabel("input position, counted from the last one (0)")
    ax.set_title(title)
    bar = figure.colorbar(image, ax=ax, pad=0.015, aspect=12)
    bar.set_label("|gradient|, 1: its row's largest", fontsize=FONT_SIZE - 1)
    bar.ax.tick_params(labelsize=FONT_SIZE - 2)
    return figure


def extra_loss(positions: ArrayLike, panels: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """How much worse each position is predicted than without a window; one panel a family of lines.

    Args:
        positions: middle of each bin of positions.
        panels: title to legend to extra loss in each bin, nats per token. Line i has the same look in all panels.
    """
    figure, axes = new_figure(1, len(panels), width=7.0, height=3.3, squeeze=False, sharey=True)
    for ax, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for i, (label, values) in enumerate(lines.items()):
            ax.plot(positions, np.asarray(values), marker=MARKERS[i % 5], markersize=4, label=label)
        ax.axhline(0, color=PALE, linewidth=1, zorder=0)
        ax.set_title(title)
        ax.set_xlabel("position in the text")
        ax.legend(frameon=False, fontsize=FONT_SIZE - 1)
    axes[0, 0].set_ylabel("extra loss, nats per token")
    return figure


def bars(values: Mapping[str, float], xlabel: str, title: str = "") -> Figure:
    """Horizontal bars with their numbers, signed and to three decimals, in the given order from the top."""
    figure, ax = new_figure(width=6.6, height=0.9 + 0.3 * len(values))
    numbers = list(values.values())
    ax.barh(range(len(values)), numbers, color=COLOURS[0], height=0.62)
    top = max(max(numbers), 1e-9)
    for row, value in enumerate(numbers):
        words = f"{round(value, 3) + 0.0:+.3f}"  # a rounded -0.0002 plus 0.0 is 0, not -0
        ax.text(max(value, 0) + 0.012 * top, row, words, va="center", fontsize=FONT_SIZE - 1, color=INK)
    ax.set_yticks(range(len(values)), list(values))
    ax.invert_yaxis()
    ax.set_xlim(min(0.0, *numbers), 1.14 * top)
    ax.set_xlabel(xlabel)
    ax.set_title(title)
    return figure
