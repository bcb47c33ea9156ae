"""Figures of chapter 02 about positions: tables, their similarity, rotations, losses by position.

Legend: P positions, C width, K pairs of columns.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from gpt2course.viz.embeddings import MARKERS, STEPS, Array, add_colourbar
from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, LINESTYLES, PALE, new_figure


def position_tables(tables: Mapping[str, Array]) -> Figure:
    """Whole tables as pictures, a row for each position; the colours saturate at the 98th percentile of each."""
    figure, axes = new_figure(1, len(tables), width=2.2 * len(tables) + 0.4, height=2.5, squeeze=False, sharey=True)
    for ax, (name, table_PC) in zip(axes[0], tables.items(), strict=True):
        top = float(np.percentile(np.abs(table_PC), 98))
        ax.imshow(table_PC, cmap=STEPS, vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
        ax.set_title(name)
        ax.set_xlabel("column")
    axes[0, 0].set_ylabel("position")
    return figure


def sinusoid_waves(table_PC: Array, columns: Sequence[int]) -> Figure:
    """A sinusoid table: the picture on the left, some of its columns as waves on the right."""
    figure, axes = new_figure(1, 2, width=7.2, height=2.7, width_ratios=[1, 1.25])
    image = axes[0].imshow(table_PC, cmap=STEPS, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes[0].set_xlabel("column")
    axes[0].set_ylabel("position")
    add_colourbar(figure, axes[0], image, "")
    P = len(table_PC)
    for i, column in enumerate(columns):
        base = -2.6 * i
        axes[1].axhline(base, 0, 0.82, color=PALE, linewidth=0.6, linestyle="-")
        axes[1].plot(base + table_PC[:, column], color=COLOURS[i], linestyle=LINESTYLES[i], linewidth=1.7)
        axes[1].text(P + 0.5, base, f"column {column}", fontsize=FONT_SIZE - 1, va="center", color=COLOURS[i])
    axes[1].set_yticks([])
    axes[1].spines["left"].set_visible(False)
    axes[1].set_xlabel("position")
    axes[1].set_xticks(range(0, P, 10))
    axes[1].set_xlim(0, P * 1.22)
    return figure


def dot_products(gram_PP: Array, starts: Sequence[int], reach: int) -> Figure:
    """Dot products of positions: the picture of all pairs, and rows of it laid over each other by distance."""
    figure, axes = new_figure(1, 2, width=7.2, height=2.6, width_ratios=[1, 1.4])
    top = float(np.abs(gram_PP).max())
    image = axes[0].imshow(gram_PP, cmap=STEPS, vmin=-top, vmax=top, interpolation="nearest")
    axes[0].set_xlabel("position j")
    axes[0].set_ylabel("position i")
    add_colourbar(figure, axes[0], image, "")
    for n, start in enumerate(starts):
        row = gram_PP[start, start : start + reach]
        dash, wide = LINESTYLES[n], 4.5 - 1.5 * n
        axes[1].plot(row, color=COLOURS[n], linestyle=dash, linewidth=wide, label=f"from position {start}")
        axes[0].axhline(start, color=COLOURS[n], linestyle=dash, linewidth=1.4)
    axes[1].axhline(0, color=PALE, linewidth=1, linestyle="-", zorder=0)
    axes[1].set_xlabel("distance j - i")
    axes[1].set_ylabel("dot product")
    axes[1].legend(frameon=False, fontsize=FONT_SIZE - 1)
    return figure


def rotations(omega_K: Array, pairs: Sequence[int], starts: Sequence[int], shift: int) -> Figure:
    """Positions as points of a circle, one circle a pair of columns, and the arc that a shift of the position makes.

    Args:
        omega_K: frequency of each pair, radians a position.
        pairs: which pairs to draw.
        starts: positions to start from; each has its own colour, dash and radius.
        shift: how far to go, in positions.
    """
    figure, axes = new_figure(1, len(pairs), width=2.5 * len(pairs), height=2.8, squeeze=False)
    turn = np.linspace(0, 2 * np.pi, 200)
    for ax, k in zip(axes[0], pairs, strict=True):
        ax.plot(np.cos(turn), np.sin(turn), color=PALE, linewidth=1, linestyle="-")
        for i, t in enumerate(starts):
            radius, colour = 0.9 - 0.16 * i, COLOURS[i]
            arc = omega_K[k] * np.linspace(t, t + shift, 60)
            x, y = radius * np.cos(arc), radius * np.sin(arc)
            ax.plot(x, y, color=colour, linestyle=LINESTYLES[i], linewidth=1.8)
            tip = {"arrowstyle": "-|>", "color": colour, "lw": 0, "mutation_scale": 16}
            ax.annotate("", (x[-1], y[-1]), (x[-8], y[-8]), arrowprops=tip)
            ax.plot(np.cos(arc[[0, -1]]), np.sin(arc[[0, -1]]), "o", color=colour, markersize=5)
            for angle, label in ((arc[0], t), (arc[-1], t + shift)):
                place = (1.16 * np.cos(angle), 1.16 * np.sin(angle))
                ax.text(*place, str(label), ha="center", va="center", fontsize=FONT_SIZE - 1, color=colour)
        ax.set_title(f"columns {2 * k} and {2 * k + 1}: {np.degrees(omega_K[k] * shift):.0f}°")
        ax.set_aspect("equal")
        ax.set_xlim(-1.3, 1.3)
        ax.set_ylim(-1.3, 1.3)
        ax.axis("off")
    return figure


def position_similarities(similarities: Mapping[str, Array]) -> Figure:
    """Cosines between all pairs of positions, one picture a table, one colour scale."""
    figure, axes = new_figure(
        1, len(similarities), width=2.1 * len(similarities) + 1.0, height=2.5, squeeze=False, sharey=True
    )
    for ax, (name, similarity_PP) in zip(axes[0], similarities.items(), strict=True):
        image = ax.imshow(similarity_PP, cmap=STEPS, vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(name)
        ax.set_xlabel("position")
    axes[0, 0].set_ylabel("position")
    bar = figure.colorbar(image, ax=list(axes[0]), label="cosine", shrink=0.8, pad=0.02)
    bar.ax.tick_params(labelsize=FONT_SIZE - 2)
    return figure


def spectra(shares: Mapping[str, Array], level: float = 0.9) -> Figure:
    """How much of a table's variance its first directions hold.

    Args:
        shares: by name, the variance along each principal direction over the whole, largest first.
        level: the share that a dot marks on each line.
    """
    figure, ax = new_figure(width=6.2, height=2.8)
    for i, (name, share_C) in enumerate(shares.items()):
        total = np.cumsum(share_C)
        needed = int(np.searchsorted(total, level)) + 1
        dimensions = np.arange(1, len(total) + 1)
        ax.plot(dimensions, total, label=f"{name}: {needed}", color=COLOURS[i], linestyle=LINESTYLES[i], linewidth=2)
        ax.plot(needed, total[needed - 1], "o", color=COLOURS[i], markersize=6)
    ax.axhline(level, color=PALE, linewidth=1, linestyle="-", zorder=0)
    ax.set_xscale("log")
    ticks = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n <= len(total)]
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("directions kept")
    ax.set_ylabel("share of the variance")
    ax.legend(frameon=False, fontsize=FONT_SIZE - 1, title=f"directions for {level:.0%}", title_fontsize=FONT_SIZE - 1)
    return figure


def similarity_profile(similarity_P: Array, position: int, name: str) -> Figure:
    """How much one position's vector is like every other's; for a slider."""
    figure, ax = new_figure(width=6.2, height=2.4)
    ax.axhline(0, color=PALE, linewidth=1, linestyle="-")
    ax.plot(similarity_P, color=COLOURS[0], linestyle="-", linewidth=1.4)
    ax.axvline(position, color=COLOURS[1], linestyle="--", linewidth=1.4)
    ax.plot(position, similarity_P[position], "o", color=COLOURS[1])
    ax.set_ylim(-1.08, 1.12)
    ax.set_xlim(-0.01 * len(similarity_P), 1.01 * len(similarity_P))
    ax.set_xlabel("other position")
    ax.set_ylabel("cosine")
    ax.set_title(f"{name}: position {position} against all the others")
    return figure


def norms_and_neighbours(norms_P: Array, by_distance: Mapping[str, Mapping[int, float]]) -> Figure:
    """A table of a language model: how long each position's row is, and how alike rows are by distance.

    Args:
        norms_P: lengths of the rows.
        by_distance: by name of the table, the mean cosine of rows by their distance.
    """
    figure, axes = new_figure(1, 2, width=7.4, height=2.7)
    axes[0].plot(norms_P, color=COLOURS[0], linewidth=1.2)
    axes[0].plot(0, norms_P[0], "o", color=COLOURS[1])
    axes[0].annotate("position 0", (0, norms_P[0]), (8, -3), textcoords="offset points", fontsize=FONT_SIZE - 1)
    axes[0].set_ylim(0, 1.08 * float(norms_P.max()))
    axes[0].set_xlabel("position")
    axes[0].set_ylabel("length of the row")
    axes[1].axhline(0, color=PALE, linewidth=1, linestyle="-", zorder=0)
    for i, (name, mean) in enumerate(by_distance.items()):
        style = {"color": COLOURS[i], "linestyle": LINESTYLES[i], "marker": MARKERS[i], "markersize": 5}
        axes[1].plot(list(mean), list(mean.values()), linewidth=1.8, label=name, **style)
        axes[1].set_xscale("log", base=2)
        axes[1].set_xticks(list(mean), [str(distance) for distance in mean])
    axes[1].minorticks_off()
    axes[1].set_xlabel("distance, to the next mark")
    axes[1].set_ylabel("mean cosine")
    axes[1].legend(frameon=False, fontsize=FONT_SIZE - 1)
    return figure


def loss_by_position(curves: Mapping[str, Array], prompt: int) -> Figure:
    """Mean loss at each position, one line a decoder, and where the prompt ends."""
    figure, ax = new_figure(width=6.4, height=2.7)
    top = max(float(curve.max()) for curve in curves.values())
    for i, (name, curve) in enumerate(curves.items()):
        ax.plot(curve, label=name, color=COLOURS[i], linestyle=LINESTYLES[i], linewidth=2.8 - 0.9 * i)
    ax.axvline(prompt - 0.5, color=INK, linewidth=1, linestyle=":")
    ax.text(prompt - 1, 1.06 * top, "the prompt, in one chunk", ha="right", fontsize=FONT_SIZE - 1)
    ax.text(prompt, 1.06 * top, "one token at a time", ha="left", fontsize=FONT_SIZE - 1)
    ax.set_ylim(0, 1.15 * top)
    ax.set_xlabel("position")
    ax.set_ylabel("loss, nats per token")
    ax.legend(frameon=False, fontsize=FONT_SIZE - 1, loc="lower right")
    return figure
