"""Figures of attention: weights and masks as labelled grids, real heads, one query's view, and what it all costs.

Legend: T query positions, S key positions, L layers, H heads.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike

from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, LINESTYLES, PALE, SEQUENTIAL, ink_on, new_figure

HIDDEN = "#ececec"
CELL_INCHES = 0.46
PANEL_GAP = 0.22
SHOW_TOKEN_FROM = 0.005


def token_labels(tokens: Sequence[str]) -> list[str]:
    """Tokens as short labels: a leading space as "·", a line feed as "↵", a tab as "→"."""
    return [token.replace(" ", "·").replace("\n", "↵").replace("\t", "→") for token in tokens]


def matrix_panels(
    panels: Mapping[str, ArrayLike],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    *,
    xlabel: str = "key",
    ylabel: str = "query",
    decimals: int | None = 2,
    vmax: float | None = None,
    cell: float = CELL_INCHES,
) -> Figure:
    """Matrices side by side, each entry printed in its cell; NaN is drawn as a crossed-out, hidden cell.

    Args:
        panels: title to (rows, columns) numbers or bools. All have the same rows; the columns may differ.
        rows, columns: their labels; by default their numbers.
        xlabel, ylabel: what columns and rows are. The second holds for all panels.
        decimals: of the printed entries; None prints none.
        vmax: value at the bright end of the colours; by default the largest of all panels.
        cell: width and height of a cell in inches.

    Raises:
        ValueError: if there is no panel, or one is not a matrix with as many rows as the first.
    """
    arrays = {title: np.asarray(values, dtype=float) for title, values in panels.items()}
    if not arrays or {a.ndim for a in arrays.values()} != {2} or len({a.shape[0] for a in arrays.values()}) != 1:
        raise ValueError(f"panels have shapes {[a.shape for a in arrays.values()]}; give matrices with equal rows")
    n_rows = next(iter(arrays.values())).shape[0]
    sizes = [a.shape[1] for a in arrays.values()]
    top = max(float(np.nanmax(a)) for a in arrays.values()) if vmax is None else vmax
    low = min(0.0, *(float(np.nanmin(a)) for a in arrays.values()))
    row_names = [str(name) for name in (rows if rows is not None else range(n_rows))]
    # Placed by hand: the cells are square and all of one size, which the constrained layout cannot promise.
    left = 0.45 + 0.08 * max(map(len, row_names))
    below, above = 0.55, 0.12 + 0.19 * max(title.count("\n") + 1 for title in arrays)
    width = left + cell * sum(sizes) + PANEL_GAP * (len(sizes) - 1) + 0.15
    height = below + cell * n_rows + above
    figure, axes = new_figure(1, len(arrays), width=width, height=height, squeeze=False)
    figure.set_layout_engine("none")
    for i, (ax, (title, values)) in enumerate(zip(axes[0], arrays.items(), strict=True)):
        start = left + cell * sum(sizes[:i]) + PANEL_GAP * i
        ax.set_position((start / width, below / height, cell * sizes[i] / width, cell * n_rows / height))
        draw_matrix(ax, values, low, top, decimals)
        ax.set_title(title)
        ax.set_xlabel(xlabel)
        ax.set_xticks(range(sizes[i]), columns if columns is not None else range(sizes[i]))
        ax.set_yticks(range(n_rows), row_names if i == 0 else [""] * n_rows)
    axes[0, 0].set_ylabel(ylabel)
    return figure


def draw_matrix(ax: Axes, values: np.ndarray, low: float, top: float, decimals: int | None) -> None:
    """One matrix on its axes, from `low` (dark) to `top` (bright). Boxes, not an image: `show` packs them smaller."""
    cmap = matplotlib.colormaps[SEQUENTIAL]
    for side in ax.spines.values():
        side.set_visible(False)
    ax.tick_params(length=0)
    ax.set_xlim(-0.5, values.shape[1] - 0.5)
    ax.set_ylim(values.shape[0] - 0.5, -0.5)
    for (row, column), value in np.ndenumerate(values):
        hidden = np.isnan(value)
        colour = cmap((value - low) / max(top - low, 1e-9))
        face = HIDDEN if hidden else colour
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=face, edgecolor="white", linewidth=1))
        if hidden:
            ax.plot(column, row, marker="x", color="#9a9a9a", markersize=6)
        elif decimals is not None:
            ax.text(column, row, f"{value:.{decimals}f}", ha="center", va="center", color=ink_on(colour), fontsize=9)


def scaling(widths: Sequence[int], panels: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """What happens to the scores as the head grows wider: one panel a quantity, one line a way of scaling.

    A quantity that stays below 2, such as a weight, gets an axis from 0 to 1; any other a logarithmic one.

    Args:
        widths: head widths D, shared by all panels.
        panels: quantity (title) to way of scaling (legend) to one value a width.
    """
    figure, axes = new_figure(1, len(panels), width=3.3 * len(panels), height=3.1, squeeze=False)
    for ax, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for i, (label, values) in enumerate(lines.items()):
            ax.plot(widths, values, marker="os^"[i % 3], markersize=4, label=label)
        ax.set_title(title)
        ax.set_xlabel("head width D")
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, [str(D) for D in widths])
        if max(float(np.max(values)) for values in lines.values()) > 2:
            ax.set_yscale("log")
        else:
            ax.set_ylim(0, 1.08)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def cost(
    lengths: Sequence[int], times_ms: Mapping[str, ArrayLike], peaks_mib: Mapping[str, ArrayLike], where: str
) -> Figure:
    """Time (with its spread) and peak memory against the length of the sequence, on logarithmic axes.

    Args:
        lengths: T.
        times_ms: way of computing to (lengths, repeats) milliseconds.
        peaks_mib: way of computing to (lengths,) MiB.
        where: the machine, for the title.
    """
    figure, (left, right) = new_figure(1, 2, width=8.0, height=3.4)
    cost_lines(left, right, lengths, times_ms, peaks_mib)
    first = np.asarray(next(iter(peaks_mib.values())), dtype=float)
    quadratic = first[-1] * (np.asarray(lengths) / lengths[-1]) ** 2
    right.plot(lengths, quadratic, color=PALE, linestyle=":", label="grows as T²")
    left.set_title("time of one forward pass (median, lowest, highest)")
    left.set_ylabel("milliseconds")
    right.set_title("peak extra memory")
    right.set_ylabel("MiB")
    for ax in (left, right):
        ax.set_xlabel("sequence length T, tokens")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(lengths, [str(T) for T in lengths])
        ax.xaxis.set_minor_locator(NullLocator())
    right.legend(frameon=False, fontsize=FONT_SIZE - 1)
    figure.suptitle(where, fontsize=FONT_SIZE)
    return figure


def cost_lines(
    left: Axes,
    right: Axes,
    lengths: Sequence[int],
    times_ms: Mapping[str, ArrayLike],
    peaks_mib: Mapping[str, ArrayLike],
) -> None:
    """Times (median, lowest, highest) on the left and peaks on the right, a line for each way; as in `cost`."""
    for i, (label, values) in enumerate(times_ms.items()):
        measured = np.asarray(values, dtype=float)
        middle = np.median(measured, axis=1)
        spread = np.abs(np.stack([measured.min(axis=1), measured.max(axis=1)]) - middle)
        look = {"marker": "os^Dv"[i % 5], "markersize": 4, "linestyle": LINESTYLES[i], "color": COLOURS[i]}
        left.errorbar(lengths, middle, yerr=spread, capsize=3, label=label, **look)
        right.plot(lengths, np.asarray(peaks_mib[label], dtype=float), label=label, **look)


def head_grid(
    weights_NTS: ArrayLike, titles: Sequence[str], columns: int, marked: Sequence[int] = (), vmax: float = 1.0
) -> Figure:
    """The weights of many heads as small pictures, brightest where a query looks most; the future is left grey.

    Args:
        weights_NTS: (N, T, T) weights of N heads on one text.
        titles: N of them.
        columns: pictures in a row.
        marked: numbers of the pictures that get a coloured frame.
        vmax: weight at the bright end of the colours, which the figure names; larger ones are as bright.
    """
    weights = np.array(weights_NTS, dtype=float)
    N, T, _ = weights.shape
    weights[:, ~np.tri(T, dtype=bool)] = np.nan
    n_rows = -(-N // columns)
    figure, axes = new_figure(n_rows, columns, width=1.35 * columns, height=1.55 * n_rows + 0.35, squeeze=False)
    cmap = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=HIDDEN)
    for i, ax in enumerate(axes.flat):
        if i >= N:
            ax.set_visible(False)
            continue
        ax.imshow(weights[i], cmap=cmap, vmin=0, vmax=vmax)
        ax.set_title(titles[i], fontsize=FONT_SIZE - 1)
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ax.spines.values():
            side.set_visible(i in marked)
            side.set_color(COLOURS[1])
            side.set_linewidth(3)
    more = " and more" if vmax < 1 else ""
    figure.suptitle(f"weight 0: dark; {vmax:g}{more}: bright; grey: the future", fontsize=FONT_SIZE - 1)
    return figure


def query_view(tokens: Sequence[str], weights_S: ArrayLike, query: int, title: str = "") -> Figure:
    """What one query may see and how it weighs it: an arc and a bar for each key.

    Args:
        tokens: the sentence, one label a position.
        weights_S: (S,) weights of this query; those after `query` are drawn as hidden, whatever they are.
        query: its position.

    Raises:
        ValueError: if the query lies outside the sentence, or weights and tokens differ in number.
    """
    weights = np.asarray(weights_S, dtype=float)
    if weights.shape != (len(tokens),):
        raise ValueError(f"{len(tokens)} tokens and weights of shape {weights.shape}; give one weight a token")
    if not 0 <= query < len(tokens):
        raise ValueError(f"query is {query}; the sentence has positions 0 to {len(tokens) - 1}")
    S = len(tokens)
    # Fixed margins instead of the constrained layout: a slider has to redraw in a tenth of a second.
    figure, ax = new_figure(width=8.0, height=3.7)
    figure.set_layout_engine("none")
    ax.set_position((0.075, 0.23, 0.91, 0.68))
    base = 1.12
    for key in range(query + 1):
        ax.add_patch(Rectangle((key - 0.35, 0), 0.7, weights[key], facecolor=COLOURS[0]))
    if query + 1 < S:
        future = Rectangle((query + 0.5, 0), S - query - 1, base, color=HIDDEN, zorder=0)
        ax.add_patch(future)
        words = "the future: hidden" if S - query > 5 else "hidden" if S - query > 2 else ""
        ax.text((query + S) / 2, 0.55, words, ha="center", va="center", color="#666666", fontsize=9)
    draw_arcs(ax, weights, query, base)
    for key in np.argsort(-weights[: query + 1])[:3]:
        if weights[key] >= 0.05:
            ax.text(key, weights[key] + 0.02, f"{weights[key]:.2f}", ha="center", fontsize=9, color=INK)
    ax.plot(query, base, marker="v", color=COLOURS[1], markersize=10, zorder=4)
    ax.set_xlim(-0.6, S - 0.4)
    ax.set_ylim(0, 2.0)
    ax.set_yticks([0, 0.5, 1.0])
    ax.set_ylabel("weight", y=0.27)
    # Plain texts, since matplotlib measures every tick label three times before it draws it.
    ax.set_xticks([])
    for key, label in enumerate(token_labels(tokens)):
        style = {"color": COLOURS[1], "fontweight": "bold"} if key == query else {"color": INK}
        ax.text(
            key + 0.15, -0.06, label, rotation=50, ha="right", va="top", rotation_mode="anchor", fontsize=9, **style
        )
    ax.spines["left"].set_bounds(0, 1)
    ax.set_title(title)
    return figure


def draw_arcs(ax: Axes, weights: np.ndarray, query: int, base: float) -> None:
    """Arcs from the query to each key it looks at, as thick as its weight. The key at the query itself gets a ring."""
    for key in range(query + 1):
        if weights[key] < SHOW_TOKEN_FROM:
            continue
        width = 0.6 + 5.5 * float(weights[key])
        if key == query:
            ax.plot(
                key, base, marker="o", markersize=17, fillstyle="none", color=COLOURS[1], markeredgewidth=min(width, 4)
            )
            continue
        rise = base + 0.15 + 0.65 * (query - key) / max(len(weights) - 1, 1)
        curve = Path([(query, base), ((query + key) / 2, 2 * rise - base), (key, base)], [1, 3, 3])
        ax.add_patch(PathPatch(curve, fill=False, edgecolor=COLOURS[1], linewidth=width, alpha=0.85, capstyle="round"))


def loss_curves(curves: Mapping[str, ArrayLike], levels: Mapping[str, float]) -> Figure:
    """Training loss against the step, with horizontal lines for comparison.

    Args:
        curves: label to one loss a step, nats per token.
        levels: label to a loss.
    """
    figure, ax = new_figure(width=7.0, height=3.5)
    ends = {}
    for label, losses in curves.items():
        values = np.asarray(losses, dtype=float)
        ax.plot(values, linewidth=1.8)
        ends[label] = (len(values) - 1, float(values[-10:].mean()), ax.lines[-1].get_color())
    right = max(x for x, _, _ in ends.values())
    for label, (x, y, colour) in ends.items():
        ax.text(x + 0.015 * right, y, label, color=colour, va="center", fontsize=FONT_SIZE, fontweight="bold")
    for label, level in levels.items():
        ax.axhline(level, color=INK, linestyle=":", linewidth=1.2)
        ax.text(right, level + 0.06, label, ha="right", va="bottom", fontsize=FONT_SIZE - 1, color=INK)
    ax.set_xlim(0, 1.13 * right)
    ax.set_ylim(0, None)
    ax.set_xlabel("training step")
    ax.set_ylabel("loss, nats per byte")
    return figure
