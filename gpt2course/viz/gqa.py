"""Figures of chapter 07: who reads which key head, what a cache weighs, and what decoding costs.

Legend: S key positions, H query heads, G key/value heads, D head width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike

from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, LINESTYLES, PALE, ink_on, new_figure

GROUP_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]
EMPTY = "#ececec"
GREY = "#767676"
MARKERS = "os^Dv"
GIB = 2**30


def group_colour(g: int) -> str:
    """The colour of key head g; neighbours differ."""
    return GROUP_COLOURS[g % len(GROUP_COLOURS)]


def kv_name(n_head: int, n_kv_head: int) -> str:
    """What a number of key/value heads is called: MHA, GQA or MQA."""
    return "MHA" if n_kv_head == n_head else "MQA" if n_kv_head == 1 else "GQA"


def head_sharing(n_head: int, kv_heads: Sequence[int]) -> Figure:
    """Which query head reads which key head: drawn as lines, and beside them the same as an H x G matrix.

    Args:
        n_head: H.
        kv_heads: a row of the figure for each G; each divides H.

    Raises:
        ValueError: if one of them does not divide H.
    """
    if bad := [G for G in kv_heads if G < 1 or n_head % G]:
        raise ValueError(f"{bad} key heads can't be shared evenly by {n_head} query heads; give divisors of {n_head}")
    rows = len(kv_heads)
    figure, axes = new_figure(rows, 2, width=7.0, height=1.72 * rows, squeeze=False, width_ratios=[3.3, 1])
    for (left, right), G in zip(axes, kv_heads, strict=True):
        _sharing_lines(left, n_head, G)
        _sharing_matrix(right, n_head, G)
    return figure


def _sharing_lines(ax: Axes, H: int, G: int) -> None:
    ax.set_axis_off()
    ax.set_xlim(-1.9, H - 0.4)
    ax.set_ylim(-0.36, 1.62)
    size = min(15.0, 190.0 / H)
    letters = min(9.0, 110.0 / H)
    for h in range(H):
        g = h // (H // G)
        centre = (g + 0.5) * (H // G) - 0.5
        ax.plot([h, centre], [1, 0], color=group_colour(g), linestyle="-", linewidth=1.8, zorder=1)
        ax.plot(h, 1, "o", color="white", markeredgecolor=group_colour(g), markeredgewidth=1.8, markersize=size)
        ax.text(h, 0.985, str(h), ha="center", va="center", fontsize=letters, color=INK)
    for g in range(G):
        centre = (g + 0.5) * (H // G) - 0.5
        ax.plot(centre, 0, "s", color=group_colour(g), markersize=size + 1)
        ink = ink_on(matplotlib.colors.to_rgb(group_colour(g)))
        ax.text(centre, -0.015, str(g), ha="center", va="center", fontsize=letters, color=ink)
    ax.text(-0.75, 1, "query\nheads", ha="right", va="center", fontsize=FONT_SIZE - 1, color=INK)
    ax.text(-0.75, 0, "key/value\nheads", ha="right", va="center", fontsize=FONT_SIZE - 1, color=INK)
    readers = f"each read by {H // G} query heads" if G < H else "each read by one query head"
    heads = f"{G} key/value heads" if G > 1 else "one key/value head"
    words = f"{kv_name(H, G)}: {heads}, {readers if G > 1 else f'read by all {H} query heads'}"
    ax.text(-1.9, 1.5, words, ha="left", va="center", fontsize=FONT_SIZE, fontweight="bold", color=INK)


def _sharing_matrix(ax: Axes, H: int, G: int) -> None:
    ax.set_aspect("equal")
    ax.set_xlim(-0.5, H - 0.5)  # as wide as MHA's, so that cells have one size in all rows
    ax.set_ylim(H - 0.5, -0.5)
    for h in range(H):
        for g in range(G):
            face = group_colour(g) if g == h // (H // G) else EMPTY
            ax.add_patch(Rectangle((g - 0.5, h - 0.5), 1, 1, facecolor=face, edgecolor="white", linewidth=0.8))
    for side in ax.spines.values():
        side.set_visible(False)
    ax.tick_params(length=0, pad=1, labelsize=FONT_SIZE - 2)
    ax.set_xticks(sorted({0, G - 1}))
    ax.set_yticks([0, H - 1])
    ax.set_xlabel("key head", fontsize=FONT_SIZE - 1, x=max(G / H / 2, 0.17), labelpad=1)
    ax.set_ylabel("query head", fontsize=FONT_SIZE - 1, labelpad=1)


@dataclass(frozen=True)
class Reading:
    """What one decode step of one model reads, for `bytes_read`.

    Attributes:
        title: of the model.
        contexts: tokens of context.
        cache: label to bytes of the cache at each context, for one text.
        levels: label to bytes that do not depend on the context, such as the weights.
    """

    title: str
    contexts: Sequence[int]
    cache: Mapping[str, ArrayLike]
    levels: Mapping[str, float]


def bytes_read(models: Sequence[Reading]) -> Figure:
    """Bytes read for one new token of one text, against the context: the cache's lines and the weights' levels."""
    figure, axes = new_figure(1, len(models), width=7.0, height=3.7, squeeze=False, sharey=True)
    for ax, model in zip(axes[0], models, strict=True):
        handles = []
        for i, (label, values) in enumerate(model.cache.items()):
            style = {"color": COLOURS[i], "linestyle": LINESTYLES[i], "linewidth": 2}
            handles += ax.plot(model.contexts, np.asarray(values, dtype=float), label=label, **style)
        for i, (label, level) in enumerate(model.levels.items()):
            handles.append(
                ax.axhline(level, color=INK, linewidth=1.1, linestyle=("-", (0, (2, 2)))[i % 2], label=label)
            )
        ax.set_title(model.title)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ticks = list(model.contexts[::2]) if len(model.contexts) > 5 else list(model.contexts)
        ax.set_xticks(ticks, [short_count(n) for n in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("tokens of context")
    axes[0, 0].set_ylim(1.2e5, 1.5e11)
    axes[0, 0].set_yticks([1e6, 1e7, 1e8, 1e9, 1e10, 1e11], ["1 MB", "10 MB", "100 MB", "1 GB", "10 GB", "100 GB"])
    axes[0, 0].yaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("read for one new token")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=FONT_SIZE - 1)
    return figure


def short_count(n: int) -> str:
    """1024 as "1k", 512 as "512"."""
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def qkv_widths(n_head: int, kv_heads: Sequence[int], head_dim: int) -> Figure:
    """The rows of the matrix `c_attn`: how many make queries, keys and values, for each G."""
    figure, ax = new_figure(width=7.0, height=0.55 * len(kv_heads) + 0.75)
    for y, G in enumerate(kv_heads):
        start = 0
        for name, heads, colour in (("q", n_head, COLOURS[0]), ("k", G, COLOURS[1]), ("v", G, COLOURS[2])):
            width = heads * head_dim
            ax.barh(y, width, left=start, height=0.62, color=colour, edgecolor="white", linewidth=1.5)
            if width > 0.028 * 3 * n_head * head_dim:
                ink = ink_on(matplotlib.colors.to_rgb(colour))
                words = f"{name} {width}" if width > 0.07 * 3 * n_head * head_dim else name
                ax.text(start + width / 2, y, words, ha="center", va="center", color=ink, fontsize=FONT_SIZE - 1)
            start += width
        words = f"  {start:,} rows" + (f", {start / (3 * n_head * head_dim):.0%} of MHA's" if n_head > G else "")
        ax.text(start, y, words, ha="left", va="center", fontsize=FONT_SIZE - 1, color=INK)
    ax.set_yticks(range(len(kv_heads)), [f"{kv_name(n_head, G)}, n_kv_head {G}" for G in kv_heads])
    ax.set_ylim(len(kv_heads) - 0.5, -0.5)
    ax.set_xlim(0, 3.55 * n_head * head_dim)
    ax.set_xlabel("rows of c_attn (its outputs)")
    return figure


def cache_against_memory(
    contexts: Sequence[int],
    cache_bytes: Mapping[int, ArrayLike],
    chosen: int,
    context: int,
    memories: Mapping[str, float],
    title: str,
) -> Figure:
    """The size of a cache against the context, beside what machines have; one n_kv_head is in ink, the others pale.

    Args:
        contexts: tokens.
        cache_bytes: n_kv_head to bytes at each context.
        chosen: the n_kv_head that is drawn in full.
        context: the length at which its size is marked.
        memories: name of a machine to its bytes of memory.
        title: put above.
    """
    # Fixed margins, plain texts and axes that are logarithms already: a slider has to redraw in a tenth of a second.
    figure, ax = new_figure(width=7.0, height=4.0)
    figure.set_layout_engine("none")
    ax.set_position((0.12, 0.135, 0.74, 0.775))
    x, low, high = np.log2(np.asarray(contexts, dtype=float)), -6.5, 10.5
    sizes = {G: np.log2(np.asarray(values, dtype=float) / GIB) for G, values in cache_bytes.items()}
    for i, (name, memory) in enumerate(memories.items()):
        level = float(np.log2(memory / GIB))
        ax.plot([x[0], x[-1]], [level, level], color=INK, linewidth=1.1, linestyle=LINESTYLES[1 + i % 3])
        ax.text(x[0] + 0.06, level + 0.12, name, ha="left", va="bottom", fontsize=FONT_SIZE - 1, color=INK)
    for G, y in sizes.items():
        width, colour, weight = (2.6, COLOURS[0], "bold") if chosen == G else (1.1, PALE, "normal")
        ax.plot(x, y, linestyle="-", color=colour, linewidth=width, zorder=3 if chosen == G else 1)
        words = {"color": colour if chosen == G else GREY, "weight": weight, "fontsize": FONT_SIZE - 2}
        ax.text(x[-1] + 0.1, y[-1], f"{G} kv heads" if G > 1 else "1 kv head", va="center", **words)
    at = float(np.log2(context))
    here = float(np.interp(at, x, sizes[chosen]))
    ax.plot([at, at, x[0]], [low, here, here], color=COLOURS[0], linewidth=1, linestyle=":", zorder=2)
    ax.plot(at, here, "o", color=COLOURS[0], markersize=8, zorder=4)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.9}
    words = {"color": COLOURS[0], "fontsize": FONT_SIZE + 2, "fontweight": "bold", "bbox": box, "zorder": 5}
    if at > (x[0] + x[-1]) / 2:
        ax.text(at - 0.15, here + 0.35, human(GIB * 2**here), ha="right", va="bottom", **words)
    else:
        ax.text(at + 0.15, here - 0.45, human(GIB * 2**here), ha="left", va="top", **words)
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(low, high)
    ax.set_xticks(x[::2], [short_count(n) for n in contexts[::2]])
    powers = range(-6, 11, 2)
    ax.set_yticks(list(powers), [human(GIB * 2.0**p, digits=0) for p in powers])
    ax.set_xlabel("tokens of context")
    ax.set_ylabel("keys and values")
    ax.set_title(title, loc="left")
    return figure


def human(n_bytes: float, digits: int = 1) -> str:
    """Bytes in the largest unit that leaves at least 1: "36 MiB", "4.0 GiB"."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{digits if n_bytes < 100 * size else 0}f} {unit}"
    return f"{n_bytes:.0f} B"


def decode_times(lengths: Sequence[int], times_ms: Mapping[str, ArrayLike], baseline: str, where: str) -> Figure:
    """Attention of one decode step: milliseconds (median and middle half), and the ratio to a baseline.

    Args:
        lengths: S, keys to attend over.
        times_ms: way of computing to (lengths, repeats) milliseconds, all ways measured in turn in each repeat.
        baseline: the way that the ratios are taken to, repeat by repeat.
        where: the machine, for the title.
    """
    figure, (left, right) = new_figure(1, 2, width=7.0, height=3.9)
    base = np.asarray(times_ms[baseline], dtype=float)
    for i, (label, values) in enumerate(times_ms.items()):
        measured = np.asarray(values, dtype=float)
        middle = np.median(measured, axis=1)
        spread = np.abs(np.quantile(measured, [0.25, 0.75], axis=1) - middle)
        style = {"color": COLOURS[i], "linestyle": LINESTYLES[i], "marker": MARKERS[i % 5], "markersize": 4}
        left.errorbar(lengths, middle, yerr=spread, capsize=2, elinewidth=0.8, linewidth=1.8, label=label, **style)
        right.plot(lengths, np.median(measured / base, axis=1), linewidth=1.8, **style)
    left.set_title("milliseconds (median, middle half)")
    right.set_title(f"times as long as {baseline}")
    for ax in (left, right):
        ax.set_xlabel("keys to attend over")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(lengths, [short_count(S) for S in lengths])
        ax.xaxis.set_minor_locator(NullLocator())
        low, high = ax.get_ylim()
        ticks = [tick for tick in (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.yaxis.set_minor_locator(NullLocator())
        ax.grid(axis="y", color="#eeeeee")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(where, fontsize=FONT_SIZE - 1)
    return figure
