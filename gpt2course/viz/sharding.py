"""Figures of chapter 12: what lies in whose memory, what travels, and curves that other processes carry on.

Legend: N processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from gpt2course.viz.style import COLOURS, DIVERGING, FONT_SIZE, INK, LINESTYLES, PALE, ink_on, new_figure
from gpt2course.viz.training import difference_scale

HATCHES = ["", "///", "...", "\\\\\\", "xxx"]
RANK_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
TENSOR_COLOURS = ["#d9e6f2", "#f5e3c4"]
PAD = "#ffffff"
GREY = "#767676"


def memory_bars(
    rows: Mapping[str, Mapping[str, float]],
    unit: str,
    limits: Mapping[str, float] | None = None,
    most: float | None = None,
    title: str = "",
) -> Figure:
    """What a process holds: a stacked bar a row, with its total, and memories to hold it against.

    Args:
        rows: label of a bar to part to size; every bar has the same parts.
        unit: of all sizes: "GB".
        limits: name of a memory to its size: a line over all bars.
        most: where the axis ends; longer bars run out of the picture, and their total says so. By default all fits.
        title: what the bars have in common.
    """
    limits = limits or {}
    totals = [sum(parts.values()) for parts in rows.values()]
    end = most or 1.16 * max(*totals, *limits.values(), 0.0)
    figure, ax = new_figure(width=7.0, height=0.36 * len(rows) + 1.25)
    for row, (parts, total) in enumerate(zip(rows.values(), totals, strict=True)):
        begin = 0.0
        for i, size in enumerate(parts.values()):
            ax.barh(row, size, left=begin, height=0.66, color=COLOURS[i], hatch=HATCHES[i], edgecolor="white", lw=0.5)
            begin += size
        beyond = total > 0.98 * end
        words = f"{number(total)} {unit}" + (" →" if beyond else "")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        x, side = (0.985 * end, "right") if beyond else (total + 0.01 * end, "left")
        ax.text(x, row, words, ha=side, va="center", fontsize=FONT_SIZE - 1, color=INK, bbox=box, zorder=4)
    for i, (name, size) in enumerate(limits.items()):
        ax.axvline(size, color=INK, lw=1.2, ls=LINESTYLES[(i + 1) % 4], zorder=3)
        side = "right" if any(size < other < size + 0.1 * end for other in limits.values()) else "left"
        ax.text(size, -0.62, name, ha=side, va="bottom", fontsize=FONT_SIZE - 2, color=INK)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.6)
    ax.set_xlim(0, end)
    ax.set_xlabel(f"{unit} a process" + (f", {title}" if title else ""))
    handles = [Rectangle((0, 0), 1, 1, fc=COLOURS[i], hatch=HATCHES[i], ec="white") for i in range(len(parts_of(rows)))]
    figure.legend(handles, parts_of(rows), loc="outside upper center", ncols=5, frameon=False, fontsize=FONT_SIZE - 1)
    return figure


def parts_of(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The names of the parts, the same in every bar.

    Raises:
        ValueError: if two bars have other parts: their colours would not mean the same.
    """
    (first, *others) = rows.items()
    for label, parts in others:
        if list(parts) != list(first[1]):
            raise ValueError(f"{label!r} has parts {list(parts)} and {first[0]!r} {list(first[1])}; give all the same")
    return list(first[1])


def number(size: float) -> str:
    """Three digits that mean something: 0.52, 16.6, 1,120."""
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def flat_layout(sizes: Mapping[str, int], world_size: int) -> Figure:
    """Tensors end to end, the padding after them, and under it the equal runs that the processes keep.

    Args:
        sizes: name of a tensor to its number of entries.
        world_size: N.
    """
    total = sum(sizes.values())
    length = -(-total // world_size)
    padded = length * world_size
    figure, ax = new_figure(width=7.0, height=1.75)
    ax.set_axis_off()
    ax.set_xlim(-0.16 * padded, padded)
    ax.set_ylim(-0.2, 2.5)
    begin = 0
    zeros = "zero" if padded - total == 1 else "zeros"
    for i, (name, size) in enumerate([*sizes.items(), (zeros, padded - total)]):
        face = PAD if i == len(sizes) else TENSOR_COLOURS[i % 2]
        ax.add_patch(Rectangle((begin, 1.35), size, 0.8, fc=face, ec=GREY, lw=1, hatch="///" if face == PAD else ""))
        if size:
            above = size < 0.06 * padded
            right = above and begin + size == padded
            x, y = begin + size if right else begin + size / 2, 2.22 if above else 1.75
            sides = {"ha": "right" if right else "center", "va": "bottom" if above else "center"}
            box = {"facecolor": "white" if above else face, "edgecolor": "none", "pad": 2}  # over the dashed lines
            ax.text(x, y, name, fontsize=FONT_SIZE - 1, color=INK, bbox=box, zorder=4, **sides)
        begin += size
    for rank in range(world_size):
        face = rank_colour(rank)
        ax.add_patch(Rectangle((rank * length, 0.1), length, 0.8, fc=face, ec="white", lw=2))
        words = f"rank {rank}: {rank * length} to {(rank + 1) * length - 1}"
        ink = ink_on(to_rgb(face))
        ax.text((rank + 0.5) * length, 0.5, words, ha="center", va="center", fontsize=FONT_SIZE - 1, color=ink)
        ax.plot([rank * length] * 2, [0.1, 2.15], color=INK, lw=1, ls="--")
    ax.plot([padded] * 2, [0.1, 2.15], color=INK, lw=1, ls="--")
    for y, words in ((1.75, "tensors,\nend to end"), (0.5, "shards")):
        ax.text(-0.015 * padded, y, words, ha="right", va="center", fontsize=FONT_SIZE - 1, color=INK)
    return figure


def rank_colour(rank: int) -> str:
    """The colour of a process; neighbours differ."""
    return RANK_COLOURS[rank % len(RANK_COLOURS)]


def row_layout(tensors: Mapping[str, Sequence[int]]) -> Figure:
    """Tensors cut along their first dimension: a column each, and in it the rows that each process keeps.

    Args:
        tensors: title of a column to the number of rows on each rank.
    """
    figure, axes = new_figure(1, len(tensors), width=7.0, height=2.5, squeeze=False)
    for ax, (title, counts) in zip(axes[0], tensors.items(), strict=True):
        total = sum(counts)
        ax.set_xlim(-0.05, 2.2)
        ax.set_ylim(1.02, -0.02)
        ax.set_axis_off()
        ax.set_title(title, loc="left", fontsize=FONT_SIZE - 1)
        begin = 0.0
        for rank, count in enumerate(counts):
            share = count / total
            face = rank_colour(rank)
            ax.add_patch(Rectangle((0, begin), 1, share, fc=face, ec="white", lw=2, hatch=HATCHES[rank % 4]))
            y = begin + share / 2 if count else 1.0
            words = f"rank {rank}: {count:,}" + ("" if count else ", empty")
            ax.text(1.06, y, words, ha="left", va="center" if count else "bottom", fontsize=FONT_SIZE - 2, color=INK)
            begin += share
    return figure


def held(moments: Sequence[str], lines: Mapping[str, ArrayLike], unit: str) -> Figure:
    """How much of the model a process holds, whole or as a shard, while a step goes through its layers.

    Args:
        moments: what is computed: "1" for the first block … ; one a point.
        lines: label to the amount at each moment.
        unit: of the amounts.
    """
    figure, ax = new_figure(width=7.0, height=3.0)
    for label, amounts in lines.items():
        ax.plot(range(len(moments)), np.asarray(amounts, dtype=float), drawstyle="steps-mid", lw=2, label=label)
    half = len(moments) / 2 - 0.5
    ax.axvline(half, color=GREY, lw=1, ls=":")
    ax.text(half, 0, " backward begins", ha="left", va="bottom", fontsize=FONT_SIZE - 2, color=INK)
    ax.set_xticks(range(len(moments)), list(moments), fontsize=FONT_SIZE - 3)
    ax.set_ylim(0, None)
    ax.set_xlabel("forward through the blocks, then backward")
    ax.set_ylabel(unit)
    ax.legend(frameon=False, fontsize=FONT_SIZE - 1, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


def traffic(panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """What a process sends in a step, told in several ways, as multiples of the model's bytes.

    Args:
        panels: title to strategy to way of counting to multiples, NaN where unknown; the same ways everywhere.
    """
    figure, axes = new_figure(1, len(panels), width=7.0, height=3.1, squeeze=False, sharey=True)
    for ax, (title, strategies) in zip(axes[0], panels.items(), strict=True):
        ways = parts_of(strategies)
        width = 0.8 / len(ways)
        for i, way in enumerate(ways):
            x = np.arange(len(strategies)) + (i - (len(ways) - 1) / 2) * width
            heights = [counted[way] for counted in strategies.values()]
            ax.bar(x, heights, 0.92 * width, color=COLOURS[i], hatch=HATCHES[i], edgecolor="white", lw=0.5, label=way)
            for at, height in zip(x, heights, strict=True):
                if height != height:  # NaN: this system does not count it
                    continue
                ax.text(at, height + 0.03, f"{height:.2f}", ha="center", va="bottom", fontsize=FONT_SIZE - 3, color=INK)
        ax.set_xticks(range(len(strategies)), list(strategies), fontsize=FONT_SIZE - 1)
        ax.set_title(title, loc="left")
    axes[0, 0].set_ylabel("bytes sent / bytes of the model")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=FONT_SIZE - 1)
    return figure


def fingerprints(panels: Mapping[str, ArrayLike], world_size: int, ylabel: str) -> Figure:
    """A number for each parameter, in the flat order in which they are cut up; dashed lines where a shard begins.

    All panels have one scale from 0, so that their heights can be compared.

    Args:
        panels: title to one number a parameter.
        world_size: N; the shards are of one length.
        ylabel: what the numbers are.
    """
    size: dict[str, Any] = {"width": 7.0, "height": 1.3 * len(panels) + 0.6}
    figure, axes = new_figure(len(panels), 1, **size, squeeze=False, sharex=True, sharey=True)
    top = max(float(np.nanmax(np.asarray(values, dtype=float))) for values in panels.values())
    for ax, (title, values) in zip(axes[:, 0], panels.items(), strict=True):
        numbers = np.asarray(values, dtype=float)
        length = len(numbers) / world_size
        ax.plot(numbers, color=COLOURS[0], ls="none", marker="o", ms=2.5)
        for rank in range(world_size):
            ax.axvline(rank * length - 0.5, color=PALE, lw=1, ls="--", zorder=0)
        ax.set_title(title, loc="left")
        ax.set_ylim(0, 1.2 * top)
        ax.set_xticks([(rank + 0.5) * length for rank in range(world_size)], [f"rank {r}" for r in range(world_size)])
    axes[-1, 0].set_xlabel("the parameters, in the order in which they lie on the processes")
    figure.supylabel(ylabel, fontsize=FONT_SIZE)
    return figure


@dataclass(frozen=True)
class Leg:
    """A part of a curve that one group of processes computed.

    Attributes:
        label: who: "4 processes".
        steps, losses: the steps, and the loss at each.
    """

    label: str
    steps: Sequence[int]
    losses: Sequence[float]


def relay(reference: Leg, legs: Sequence[Leg], limit: float) -> Figure:
    """A curve that several groups of processes computed one after another, and its difference from an undisturbed one.

    Args:
        reference: the undisturbed run; it has every step of the legs.
        legs: in order.
        limit: a line in the panel of differences.
    """
    figure, (curve, difference) = new_figure(2, 1, width=7.0, height=4.2, sharex=True, height_ratios=[1.7, 1])
    curve.plot(reference.steps, reference.losses, color=PALE, lw=5, ls="-", label=reference.label)
    whole = dict(zip(reference.steps, reference.losses, strict=True))
    gaps = [np.array([abs(y - whole[step]) for step, y in zip(leg.steps, leg.losses, strict=True)]) for leg in legs]
    floor = difference_scale(difference, gaps, limit)
    for i, (leg, gap) in enumerate(zip(legs, gaps, strict=True)):
        look: dict[str, Any] = {
            "color": COLOURS[i],
            "ls": LINESTYLES[i],
            "marker": "os^Dv"[i % 5],
            "ms": max(4, 8 - 2 * i),
        }
        look["mfc"] = "white" if i == 0 else COLOURS[i]  # where two legs did the same step, both show
        curve.plot(leg.steps, leg.losses, label=leg.label, **look)
        difference.plot(leg.steps, np.maximum(gap, floor), **look)
        for ax in (curve, difference) if i else ():
            ax.axvline(leg.steps[0] - 0.5, color=GREY, lw=1, ls=":")
        if i:
            start: dict[str, Any] = {"xy": (leg.steps[0] - 0.5, 0.03), "xycoords": ("data", "axes fraction")}
            curve.annotate(f" checkpoint, step {leg.steps[0] - 1}", **start, fontsize=FONT_SIZE - 2, color=INK)
    difference.axhline(limit, color=INK, lw=1, ls="--")
    place: dict[str, Any] = {"xy": (reference.steps[-1], limit), "ha": "right", "va": "bottom"}
    difference.annotate("tolerance", **place, fontsize=FONT_SIZE - 2, color=INK)
    difference.set_ylabel("difference")
    difference.set_xlabel("step")
    difference.xaxis.set_major_locator(MaxNLocator(integer=True))
    curve.set_ylabel("loss (nats per token)")
    curve.legend(frameon=False, fontsize=FONT_SIZE - 1)
    return figure


def break_even(tokens: Sequence[float], ratios: Mapping[str, ArrayLike]) -> Figure:
    """Time of sending over time of computing, against the tokens of a process: one line a kind of wire.

    Args:
        tokens: tokens that a process works on in a step.
        ratios: label to time of sending / time of computing.
    """
    figure, ax = new_figure(width=7.0, height=3.3)
    for label, values in ratios.items():
        ax.plot(tokens, np.asarray(values, dtype=float), lw=2, label=label)
    ax.axhline(1.0, color=INK, lw=1, ls="-")
    ax.set_title("above the line a process waits for the wire, below it sending can be hidden", loc="left")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(list(tokens)[::2], [size_in_words(n) for n in list(tokens)[::2]])
    ax.minorticks_off()
    ax.set_xlabel("tokens a process works on in a step")
    ax.set_ylabel("sending / computing")
    ax.legend(frameon=False, fontsize=FONT_SIZE - 1, loc="upper right")
    return figure


def size_in_words(n: float) -> str:
    """512, 4k, 1M: in powers of two."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def start_rows(panels: Mapping[str, ArrayLike], columns: int) -> Figure:
    """Embeddings side by side, as pictures with one scale: the first rows that each process starts with.

    Args:
        panels: title to a 2-D array: tokens down, channels across.
        columns: panels a line.
    """
    lines = -(-len(panels) // columns)
    figure, axes = new_figure(lines, columns, width=7.0, height=1.45 * lines, squeeze=False)
    top = max(float(np.abs(np.asarray(values)).max()) for values in panels.values())
    for ax, (title, values) in zip(axes.flat, panels.items(), strict=True):
        look: dict[str, Any] = {
            "cmap": matplotlib.colormaps[DIVERGING].resampled(21),
            "vmin": -top,
            "vmax": top,
            "aspect": "auto",
        }
        image = ax.imshow(np.asarray(values, dtype=float), **look)
        ax.set_title(title, loc="left", fontsize=FONT_SIZE - 1)
        ax.set_xticks([])
        ax.set_yticks([])
    for row in axes:
        row[0].set_ylabel("tokens")
    for ax in axes[-1]:
        ax.set_xlabel("channels")
    figure.colorbar(image, ax=list(axes.flat), label="weight", aspect=30, pad=0.02)
    return figure
