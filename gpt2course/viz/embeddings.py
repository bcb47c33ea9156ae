"""Figures of chapter 02: tables of vectors, of tokens and of positions.

Legend: V tokens, C width, P positions, N chosen points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gpt2course.viz.style import COLOURS, DIVERGING, DPI, FONT_SIZE, INK, PALE, new_figure

Array = npt.NDArray[np.floating]
# Steps instead of a smooth map: cells can be told apart and compared with the bar, and the file is a third of the size.
STEPS = colormaps[DIVERGING].resampled(21)
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


@dataclass(frozen=True)
class Grid:
    """A small matrix, to be drawn with its numbers."""

    title: str
    values: Array
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    then: str = ""
    """the sign between this grid and the next: "+", "×", "=" """


def number_grids(grids: Sequence[Grid], height: float = 2.1, decimals: int = 1) -> Figure:
    """Small matrices side by side, every number written in its cell, one colour scale for all.

    Args:
        grids: drawn from left to right, each as wide as its columns.
        height: inches.
        decimals: digits after the point.
    """
    widths = [grid.values.shape[1] + 1.0 for grid in grids]
    width = min(8.0, 0.52 * sum(widths) + 0.45 * len(grids))
    figure, axes = new_figure(1, len(grids), width=width, height=height, width_ratios=widths, squeeze=False)
    top = max(float(np.abs(grid.values).max()) for grid in grids) or 1.0
    colour_of = colormaps[DIVERGING]
    for ax, grid in zip(axes[0], grids, strict=True):
        n_rows, n_columns = grid.values.shape
        for (r, c), value in np.ndenumerate(grid.values):
            # Rectangles, not imshow: a quarter of the bytes. Half a colour map keeps the numbers legible.
            shade = colour_of(0.5 + 0.33 * value / top)
            ax.add_patch(Rectangle((c - 0.47, r - 0.46), 0.94, 0.92, facecolor=shade, linewidth=0))
            ax.text(c, r, f"{value:.{decimals}f}", ha="center", va="center", fontsize=FONT_SIZE - 1, color=INK)
        ax.set_xlim(-0.5, n_columns - 0.5)
        ax.set_ylim(n_rows - 0.5, -0.5)
        ax.set_xticks(range(n_columns), list(grid.columns) or [""] * n_columns)
        ax.set_yticks(range(n_rows), list(grid.rows) or [""] * n_rows)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(grid.title)
        if grid.then:
            ax.annotate(
                grid.then, (1.0, 0.5), (13, 0), "axes fraction", "offset points", fontsize=15, ha="center", va="center"
            )
    return figure


def similarity_grid(similarity_NN: Array, labels: Sequence[str], boxes: Sequence[tuple[int, int]] = ()) -> Figure:
    """Cosines between chosen tokens as a picture, groups of tokens framed.

    Args:
        similarity_NN: cosines.
        labels: N names.
        boxes: (first, one past the last) of each group.
    """
    n = len(labels)
    figure, ax = new_figure(width=5.4, height=4.6)
    image = ax.imshow(similarity_NN, cmap=STEPS, vmin=-1, vmax=1, interpolation="nearest")
    font = {"family": "monospace", "fontsize": FONT_SIZE - 2}
    ax.set_xticks(range(n), labels, rotation=90, **font)
    ax.set_yticks(range(n), labels, **font)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for begin, end in boxes:
        side = end - begin
        ax.add_patch(Rectangle((begin - 0.5, begin - 0.5), side, side, fill=False, edgecolor=INK, linewidth=1.6))
    figure.colorbar(image, ax=ax, label="cosine", shrink=0.8)
    return figure


def token_map(xy_N2: Array, labels: Sequence[str], groups: Sequence[str], share: float) -> Figure:
    """Tokens as points in the plane, each with its text, a colour and a mark for each group.

    Args:
        xy_N2: coordinates along the first two principal components.
        labels: the text beside each point.
        groups: the group of each point.
        share: the part of the points' variance that these two axes show, 0 to 1.
    """
    figure, ax = new_figure(width=6.6, height=4.0)
    for g, group in enumerate(dict.fromkeys(groups)):
        inside = np.array([name == group for name in groups])
        style = {"color": COLOURS[g % len(COLOURS)], "marker": MARKERS[g % len(MARKERS)]}
        ax.scatter(xy_N2[inside, 0], xy_N2[inside, 1], s=34, label=group, zorder=3, **style)
    ax.set_xlabel("first principal component")
    ax.set_ylabel("second principal component")
    ax.set_title(f"these two directions hold {share:.0%} of the variance")
    ax.margins(0.08)
    ax.legend(frameon=False, fontsize=FONT_SIZE - 1, loc="best")
    figure.draw_without_rendering()
    at_N2 = ax.transData.transform(xy_N2)
    for (x, y), label, (dx, dy) in zip(xy_N2, labels, label_offsets(at_N2, labels), strict=True):
        where = (dx * 72 / DPI, dy * 72 / DPI)
        ax.annotate(label, (x, y), where, textcoords="offset points", fontsize=FONT_SIZE - 2, family="monospace")
    return figure


def label_offsets(at_N2: Array, labels: Sequence[str]) -> list[tuple[float, float]]:
    """Where to write each label: of eight places around its point, the one that covers least. In pixels.

    Greedy, in order; a label may lie on neither a point nor a label written before it, if that can be had.
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at_N2]
    offsets = []
    for (x, y), label in zip(at_N2, labels, strict=True):
        w, h = 6.7 * len(label), 10.0
        places = [(6, 1), (6, -h - 1), (-w - 6, 1), (-w - 6, -h - 1), (-w / 2, 7), (-w / 2, -h - 7), (9, -h / 2)]
        places.append((-w - 9, -h / 2))

        def covered(place: tuple[float, float], x: float = x, y: float = y, w: float = w, h: float = h) -> float:
            left, low = x + place[0], y + place[1]
            return sum(
                max(0.0, min(left + w, b[2]) - max(left, b[0])) * max(0.0, min(low + h, b[3]) - max(low, b[1]))
                for b in taken
            )

        best = min(places, key=covered)
        offsets.append(best)
        taken.append((x + best[0], y + best[1], x + best[0] + w, y + best[1] + h))
    return offsets


def norm_by_frequency(counts_V: Array, norms_V: Array, bins: int = 9, dots: int = 1000) -> Figure:
    """How long a token's row is against how often the token occurs: the median and half of all as a line and a band,
    some tokens as dots, tokens that never occur apart on the left.

    Args:
        counts_V: occurrences in a corpus.
        norms_V: lengths of the rows.
        bins: groups of equal width in log frequency.
        dots: draw so many tokens, chosen at random.
    """
    figure, (left, ax) = new_figure(1, 2, width=6.6, height=2.8, sharey=True, width_ratios=[1, 7])
    seen = counts_V > 0
    generator = np.random.default_rng(0)
    some = norms_V[~seen][: dots // 4]
    left.scatter(generator.uniform(-0.3, 0.3, len(some)), some, s=2, color=PALE)
    if (~seen).any():
        left.plot([-0.4, 0.4], [np.median(norms_V[~seen])] * 2, color=COLOURS[1], linewidth=2)
    left.set_xticks([0], ["never"])
    left.set_xlim(-0.6, 0.6)
    left.set_ylabel("length of the row")
    some = generator.permutation(np.flatnonzero(seen))[:dots]
    ax.scatter(counts_V[some], norms_V[some], s=2, color=PALE)
    edges = np.geomspace(1, counts_V.max() * 1.001, bins + 1)
    which = np.digitize(counts_V[seen], edges) - 1
    quartiles = [np.percentile(norms_V[seen][which == b], [25, 50, 75]) for b in range(bins) if (which == b).any()]
    centres = [np.exp(np.log(counts_V[seen][which == b]).mean()) for b in range(bins) if (which == b).any()]
    low, middle, high = np.array(quartiles).T
    ax.fill_between(centres, low, high, color=COLOURS[0], alpha=0.25, linewidth=0, label="half of all tokens")
    ax.plot(centres, middle, color=COLOURS[1], linewidth=2, label="median")
    ax.set_xscale("log")
    ax.set_xlabel("occurrences in the training text")
    ax.legend(frameon=False, fontsize=FONT_SIZE - 1, loc="best")
    return figure


def loss_bars(losses: Mapping[str, Mapping[str, float]], baselines: Mapping[str, tuple[float, str]]) -> Figure:
    """Horizontal bars of losses with their values, a panel for each model, and a dashed line to compare with.

    Args:
        losses: by model, then by position table; the first table is the model's own.
        baselines: by model, a loss to compare with and what it is.
    """
    rows = max(len(bars) for bars in losses.values())
    height = 0.36 * rows + 1.15
    figure, axes = new_figure(1, len(losses), width=8.0, height=height, sharey=True, squeeze=False)
    for ax, (model, bars) in zip(axes[0], losses.items(), strict=True):
        level, what = baselines[model]
        top = max([*bars.values(), level])
        colours = [COLOURS[0]] + [COLOURS[5]] * (len(bars) - 1)
        ax.barh(range(len(bars)), list(bars.values()), color=colours, height=0.62)
        for y, value in enumerate(bars.values()):
            pad = {"facecolor": "white", "linewidth": 0, "pad": 0.8}
            ax.text(value + 0.015 * top, y, f"{value:.2f}", va="center", fontsize=FONT_SIZE - 1, bbox=pad)
        ax.axvline(level, color=INK, linestyle="--", linewidth=1)
        ax.text(level, -0.52, what, ha="right", va="bottom", fontsize=FONT_SIZE - 2)
        ax.set_yticks(range(len(bars)), list(bars))
        ax.set_ylim(len(bars) - 0.5, -1.1)
        ax.set_title(model)
        ax.set_xlabel("loss, nats per token")
        ax.set_xlim(0, 1.16 * top)
    return figure


def add_colourbar(figure: Figure, ax: Axes, image: object, label: str) -> None:
    """A narrow colour bar beside one picture."""
    bar = figure.colorbar(image, ax=ax, label=label, shrink=0.9, pad=0.02)  # type: ignore[arg-type]
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=FONT_SIZE - 2, color=PALE)
