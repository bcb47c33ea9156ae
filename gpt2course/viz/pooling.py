"""Figures of chapter 07: how alike a model's heads are, and what it costs to pool them.

Legend: T positions, H query heads, G key/value heads.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike

from gpt2course.viz.style import DIVERGING, FONT_SIZE, INK, PALE, SEQUENTIAL, ink_on, new_figure

EMPTY = "#ececec"
MARKERS = "os^Dv"


def head_likeness(panels: Mapping[str, ArrayLike], what: str) -> Figure:
    """Cosines between heads, one H x H panel a case: orange opposite, white unrelated, purple alike.

    Args:
        panels: title to (H, H) cosines.
        what: what rows and columns are: "key head".
    """
    figure, axes = new_figure(1, len(panels), width=7.0, height=7.0 / len(panels) + 0.1, squeeze=False)
    cmap = matplotlib.colormaps[DIVERGING].resampled(21)
    for ax, (title, values) in zip(axes[0], panels.items(), strict=True):
        cosines = np.asarray(values, dtype=float)
        H = len(cosines)
        ax.imshow(cosines, cmap=cmap, vmin=-1, vmax=1)
        if H <= 6:
            for (row, column), value in np.ndenumerate(cosines):
                ink = ink_on(cmap((value + 1) / 2))
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=FONT_SIZE - 1)
        ax.set_title(title)
        ax.set_xlabel(what)
        ax.set_xticks(range(H))
        ax.set_yticks(range(H))
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
    axes[0, 0].set_ylabel(what)
    figure.suptitle("1, purple: alike; 0, white: unrelated; -1, orange: opposite", fontsize=FONT_SIZE - 1)
    return figure


def loss_against_bytes(
    kib: Sequence[float], names: Sequence[str], curves: Mapping[str, Sequence[float]], original: float
) -> Figure:
    """Held-out loss against the bytes that the cache takes for each token: lower and further left is better.

    Args:
        kib: KiB a token for each G, the original's first.
        names: of each G, for the axis.
        curves: way of pooling to a loss for each G but the first, whose loss is `original`; NaN where not measured.
        original: loss of the model as it was trained.
    """
    figure, ax = new_figure(width=7.0, height=4.3)
    ax.axhline(original, color=PALE, linewidth=1)
    for i, (label, losses) in enumerate(curves.items()):
        values = np.array([original, *losses], dtype=float)
        known = ~np.isnan(values)
        ax.plot(np.asarray(kib)[known], values[known], marker=MARKERS[i % 5], markersize=6, linewidth=1.8, label=label)
    ax.plot(kib[0], original, "o", color=INK, markersize=10, zorder=5)
    below, above = ax.get_ylim()
    ax.set_ylim(below - 0.07 * (above - below), above)
    words = f"as trained: {original:.2f}"
    ax.annotate(words, (kib[0], original), (0, -9), textcoords="offset points", ha="right", va="top", color=INK)
    ax.set_xscale("log", base=2)
    ax.set_xticks(kib, [f"{size:.3g} KiB\n{name}" for size, name in zip(kib, names, strict=True)])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(min(kib) / 1.15, max(kib) * 1.15)
    ax.set_xlabel("keys and values of one token, float16")
    ax.set_ylabel("held-out loss, nats per token")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def head_rows(rows: Mapping[str, ArrayLike], titles: Sequence[str], vmax: float) -> Figure:
    """The attention weights of several models as rows of small pictures, one column a head; the future is grey.

    Args:
        rows: name of a model to (H, T, T) weights; all have the same H.
        titles: of the H columns.
        vmax: weight at the bright end of the colours; larger ones are as bright.
    """
    arrays = {name: np.array(weights, dtype=float) for name, weights in rows.items()}
    H, T, _ = next(iter(arrays.values())).shape
    cell = 6.3 / H
    figure, axes = new_figure(len(rows), H, width=7.0, height=len(rows) * (cell + 0.06) + 0.55, squeeze=False)
    cmap = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=EMPTY)
    for i, (row, (name, weights)) in enumerate(zip(axes, arrays.items(), strict=True)):
        weights[:, ~np.tri(T, dtype=bool)] = np.nan
        for h, ax in enumerate(row):
            ax.imshow(weights[h], cmap=cmap, vmin=0, vmax=vmax)
            ax.set_xticks([])
            ax.set_yticks([])
            for side in ax.spines.values():
                side.set_visible(False)
            if i == 0:
                ax.set_title(titles[h], fontsize=FONT_SIZE - 1)
        row[0].set_ylabel(name, rotation=90, fontsize=FONT_SIZE - 1)
    figure.suptitle(f"weight 0: dark; {vmax:g} and more: bright; grey: the future", fontsize=FONT_SIZE - 1)
    return figure
