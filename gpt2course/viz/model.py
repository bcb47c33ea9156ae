"""Figures of chapter 04: the wiring of a block, activations, curves with their spread, parameters by part, logit lens.

Legend: N points, P positions, L depths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, LINESTYLES, PALE, SEQUENTIAL, ink_on, new_figure

STREAM = COLOURS[0]
NORM, MIX, POINTWISE = "#fff1d6", "#dcebf7", "#dff1e9"
# Six parts of a model in reading order; pale fills carry dark text, dark fills carry white text.
PART_COLOURS = ["#0072B2", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#999999"]
MEMORY_COLOURS = ["#333333", "#5c5c5c", "#808080"]
LEGEND: dict[str, Any] = {"fontsize": FONT_SIZE - 1, "frameon": False}
INSIDE: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": FONT_SIZE - 1, "color": "white", "weight": "bold"}


@dataclass(frozen=True)
class Curve:
    """One line of a panel: its mean, and the band between its smallest and largest run."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | Sequence[Sequence[float]] | np.ndarray
    """(N,), or (runs, N) for a line with a band"""


@dataclass(frozen=True)
class Panel:
    """One set of axes with its curves."""

    title: str
    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    log: str = ""
    """"x", "y" or "xy": which axes are logarithmic"""
    level: tuple[str, float] | None = None
    """a label and a value to draw a level line at"""


def curves(panels: Sequence[Panel], height: float = 3.3) -> Figure:
    """Line plots side by side; several runs of a line become their mean and the band they fill.

    Args:
        panels: one to three panels.
        height: inches.

    Raises:
        ValueError: if there is no panel.
    """
    if not panels:
        raise ValueError("no panels; give at least one")
    figure, axes = new_figure(1, len(panels), width=6.2 if len(panels) == 1 else 8.6, height=height, squeeze=False)
    for ax, panel in zip(axes[0], panels, strict=True):
        for i, curve in enumerate(panel.curves):
            x_N, y_RN = np.asarray(curve.x, dtype=float), np.atleast_2d(np.asarray(curve.y, dtype=float))
            colour, dash = COLOURS[i % len(COLOURS)], LINESTYLES[i % len(LINESTYLES)]
            marker = "o" if len(x_N) <= 12 else None
            line = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4}
            ax.plot(x_N, y_RN.mean(axis=0), label=curve.label, **line)
            if len(y_RN) > 1:
                ax.fill_between(x_N, y_RN.min(axis=0), y_RN.max(axis=0), color=colour, alpha=0.18, linewidth=0)
        if panel.level is not None:
            label, value = panel.level
            ax.axhline(value, color=INK, linewidth=1, linestyle=(0, (1, 3)), label=label)
        if "x" in panel.log:
            ax.set_xscale("log", base=2)
        ticks = sorted({float(value) for curve in panel.curves for value in curve.x})
        if len(ticks) <= 8:
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        if "y" in panel.log:
            ax.set_yscale("log")
            low, high = ax.get_ylim()
            if high < 500 * low:  # powers of ten alone would leave one or two ticks
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        ax.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        ax.grid(axis="y", color=PALE, alpha=0.4, linewidth=0.6)
        if len(panel.curves) > 1 or panel.level is not None:
            ax.legend(**LEGEND)
    return figure


def block_wiring(kinds: Sequence[str] = ("pre-norm",)) -> Figure:
    """The wiring of a block, drawn once for each kind.

    Args:
        kinds: "pre-norm" (GPT-2) or "post-norm" (the first Transformer).

    Raises:
        ValueError: for another kind.
    """
    if unknown := set(kinds) - {"pre-norm", "post-norm"}:
        raise ValueError(f"wiring {', '.join(sorted(unknown))} is unknown; use pre-norm or post-norm")
    figure, axes = new_figure(len(kinds), 1, width=8.2, height=2.55 * len(kinds), squeeze=False)
    for ax, kind in zip(axes[:, 0], kinds, strict=True):
        ax.set(xlim=(-0.75, 10.9), ylim=(-0.75, 2.55), aspect="equal")
        ax.axis("off")
        _wire(ax, pre=kind == "pre-norm")
        if len(kinds) > 1:
            title = "pre-norm (GPT-2): nothing stands on the stream" if kind == "pre-norm" else None
            ax.set_title(title or "post-norm (Vaswani et al. 2017): every norm stands on the stream", loc="left")
    return figure


def _wire(ax: Axes, pre: bool) -> None:
    """One block: the stream from left to right, two branches above it."""
    ax.annotate("", (10.35, 0), (-0.1, 0), arrowprops={"arrowstyle": "-|>", "color": STREAM, "lw": 4, "shrinkB": 0})
    ax.text(-0.25, 0, "x", ha="right", va="center", fontsize=FONT_SIZE + 3, style="italic", color=STREAM)
    ax.text(10.5, 0, "x'", ha="left", va="center", fontsize=FONT_SIZE + 3, style="italic", color=STREAM)
    ax.text(0.0, -0.28, "residual stream (B, T, C)", ha="left", va="top", fontsize=FONT_SIZE - 1, color=STREAM)
    parts = [("ln_1", "attention", MIX, "mixes positions"), ("ln_2", "MLP", POINTWISE, "each position alone")]
    for start, (norm, name, fill, note) in zip((0.5, 5.3), parts, strict=True):
        join = start + (4.1 if pre else 3.0)
        names = [(norm, NORM, 0.9), (name, fill, 1.55)] if pre else [(name, fill, 1.7)]
        _branch(ax, start, join, names)
        middle = join - 0.55 - names[-1][2] / 2 if pre else (start + join) / 2
        ax.text(middle, 2.28, note, ha="center", va="center", fontsize=FONT_SIZE - 2, color="#666666")
        ax.add_patch(Circle((join, 0), 0.24, facecolor="white", edgecolor=STREAM, linewidth=2, zorder=4))
        ax.text(join, -0.02, "+", ha="center", va="center", fontsize=FONT_SIZE + 5, color=STREAM, zorder=5)
        if not pre:
            _box(ax, join + 0.95, 0, 0.9, norm, NORM)


def _branch(ax: Axes, start: float, join: float, boxes: Sequence[tuple[str, str, float]]) -> None:
    """A wire that leaves the stream at `start`, goes through the boxes, and comes down on it at `join`."""
    ax.plot([start, start, join], [0, 1.6, 1.6], color=INK, lw=1.5, linestyle="-")
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (join, 0.26), (join, 1.6), arrowprops=arrow)
    ax.add_patch(Circle((start, 0), 0.1, facecolor=STREAM, edgecolor="none", zorder=4))
    gap = (join - start - sum(width for *_, width in boxes)) / (len(boxes) + 1)
    x = start + gap
    for name, fill, width in boxes:
        _box(ax, x + width / 2, 1.6, width, name, fill)
        x += width + gap


def _box(ax: Axes, x: float, y: float, width: float, name: str, fill: str) -> None:
    corner, shape = (x - width / 2, y - 0.39), "round,pad=0.02,rounding_size=0.12"
    box = FancyBboxPatch(corner, width, 0.78, boxstyle=shape, facecolor=fill, edgecolor=INK, linewidth=1.2, zorder=3)
    ax.add_patch(box)
    ax.text(x, y - 0.02, name, ha="center", va="center", fontsize=FONT_SIZE, color=INK, zorder=5)


def steps_of_a_row(steps: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """What happens to a few rows of numbers, step by step: one panel a step, one group of bars a row.

    Args:
        steps: title of each step to its values, all (rows, width).
        names: what to call the rows.
    """
    figure, axes = new_figure(1, len(steps), width=8.6, height=2.9, squeeze=False)
    for ax, (title, values) in zip(axes[0], steps.items(), strict=True):
        rows, width = values.shape
        for i, row in enumerate(values):
            places = np.arange(width) + i * (width + 1)
            bars = ax.bar(places, row, 0.8, color=COLOURS[i], hatch=["", "//"][i % 2], edgecolor="white", linewidth=0)
            ax.bar_label(bars, [f"{round(value, 1):g}" for value in row], fontsize=FONT_SIZE - 2, padding=2, color=INK)
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_xticks([i * (width + 1) + (width - 1) / 2 for i in range(rows)], names)
        ax.tick_params(axis="x", length=0)
        ax.margins(y=0.18)
        ax.set_title(title)
    return figure


def activations(x_N: np.ndarray, values: Mapping[str, np.ndarray], difference_N: np.ndarray) -> Figure:
    """Activation functions on one set of axes; beside them a difference too small to be seen there.

    Args:
        x_N: the inputs.
        values: label to outputs, each (N,).
        difference_N: drawn by itself, on its own scale.
    """
    figure, (left, right) = new_figure(1, 2, width=8.6, height=3.2)
    for i, (label, y_N) in enumerate(values.items()):
        left.plot(x_N, y_N, color=COLOURS[i], linestyle=LINESTYLES[i], label=label, linewidth=2.4 - 0.5 * i)
    left.legend(**LEGEND)
    left.set(title="the three look like two", xlabel="input", ylabel="output")
    right.plot(x_N, difference_N, color=COLOURS[3], linestyle="-")
    right.axhline(0, color=INK, linewidth=0.8)
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    right.set(title="tanh form minus exact form", xlabel="input", ylabel="difference")
    for ax in (left, right):
        ax.grid(color=PALE, alpha=0.4, linewidth=0.6)
    return figure


def parameter_bars(models: Mapping[str, Mapping[str, int]]) -> Figure:
    """Parameters by part for several models: how many on the left, which share on the right.

    Args:
        models: name of the model to {name of the part: number of parameters}; the same parts in each.
    """
    figure, axes = new_figure(1, 2, width=9.0, height=1.5 + 0.5 * len(models), sharey=True)
    places = np.arange(len(models))[::-1]
    counts = np.array([list(parts.values()) for parts in models.values()], dtype=float)
    totals = counts.sum(axis=1)
    for ax, numbers in zip(axes, (counts / 1e6, 100 * counts / totals[:, None]), strict=True):
        left = np.zeros(len(models))
        for i, part in enumerate(next(iter(models.values()))):
            ax.barh(places, numbers[:, i], 0.66, left=left, color=PART_COLOURS[i], label=part, edgecolor="white")
            left += numbers[:, i]
        ax.tick_params(axis="y", length=0)
    for place, total in zip(places, totals, strict=True):
        axes[0].text(total / 1e6 + 15, place, f"{total / 1e6:,.0f} M", va="center", fontsize=FONT_SIZE - 1, color=INK)
    for i, row in enumerate(100 * counts / totals[:, None]):
        for share, end in zip(row, row.cumsum(), strict=True):
            if share >= 8:
                axes[1].text(end - share / 2, places[i], f"{share:.0f} %", **INSIDE)
    axes[0].set(xlabel="million parameters", yticks=places, yticklabels=list(models))
    axes[0].set_xlim(0, totals.max() / 1e6 * 1.18)
    axes[1].set(xlabel="share of all parameters, %", xlim=(0, 100))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, **LEGEND)
    return figure


def model_budget(parts: Mapping[str, int], memory: Mapping[str, float], title: str) -> Figure:
    """One model: its parameters by part, and what they need in memory while they are trained.

    Args:
        parts: number of parameters by part.
        memory: gigabytes by what holds them.
        title: said above the bars.
    """
    figure, (top, bottom) = new_figure(2, 1, width=8.2, height=2.9)
    figure.set_layout_engine(None)  # solving for the layout would double the time of a redraw
    figure.subplots_adjust(left=0.02, right=0.98, top=0.78, bottom=0.05, hspace=0.95)
    scale, unit = (1e6, "million") if sum(parts.values()) < 2e9 else (1e9, "billion")
    _one_bar(top, parts, [f"{100 * count / sum(parts.values()):.0f} %" for count in parts.values()], PART_COLOURS)
    _one_bar(bottom, memory, [f"{name}\n{size:,.3g} GB" for name, size in memory.items()], MEMORY_COLOURS)
    names = [f"{name} {count / scale:,.3g}" for name, count in parts.items()]
    legend = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": 6, "columnspacing": 1.2, "handlelength": 1}
    top.legend(top.containers, names, **legend, **LEGEND)
    top.set_title(f"{title}\n{sum(parts.values()) / scale:,.4g} {unit} parameters, by part", fontsize=FONT_SIZE)
    total = f"{sum(memory.values()):,.3g} gigabytes while training in float32, without activations"
    bottom.set_title(total, fontsize=FONT_SIZE)
    return figure


def _one_bar(ax: Axes, parts: Mapping[str, float], labels: Sequence[str], colours: Sequence[str]) -> None:
    """One stacked bar over the whole width; a part wide enough carries its label."""
    total, left = sum(parts.values()), 0.0
    for value, label, colour in zip(parts.values(), labels, colours, strict=False):
        ax.barh([0], [value], 0.8, left=left, color=colour, edgecolor="white")
        if value > 0.07 * total:
            ax.text(left + value / 2, 0, label, **INSIDE)
        left += value
    ax.set(xlim=(0, total * 1.001), ylim=(-0.4, 0.4))
    ax.axis("off")


def logit_lens(
    tokens: Sequence[str],
    predictions: Sequence[Sequence[str]],
    probability_PL: np.ndarray,
    depths: Sequence[str],
    right_PL: np.ndarray,
) -> Figure:
    """What each depth would predict as the next token: a table of words over a heat map of how sure it is.

    Args:
        tokens: P tokens as text, the rows.
        predictions: P rows of L tokens as text.
        probability_PL: probability of each prediction, the colour.
        depths: L names of columns.
        right_PL: bool, True where the prediction is the token that follows; framed.
    """
    P, L = probability_PL.shape
    figure, ax = new_figure(width=max(6.5, 1.6 + 0.84 * L), height=1.2 + 0.31 * P)
    picture = ax.imshow(probability_PL, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    for p in range(P):
        for depth in range(L):
            ink = ink_on(picture.to_rgba(probability_PL[p, depth]))
            weight = "bold" if right_PL[p, depth] else "normal"
            text = {"fontsize": FONT_SIZE - 1.5, "family": "monospace", "color": ink, "weight": weight}
            ax.text(depth, p, visible(predictions[p][depth]), ha="center", va="center", **text)
            if right_PL[p, depth]:
                ax.add_patch(Rectangle((depth - 0.45, p - 0.41), 0.9, 0.82, fill=False, edgecolor=ink, linewidth=1.6))
    ax.set_yticks(range(P), [visible(token) for token in tokens], family="monospace", fontsize=FONT_SIZE - 1)
    ax.set_xticks(range(L), depths)
    ax.tick_params(length=0)
    ax.set(xlabel="the stream is read after", ylabel="token so far")
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=ax, fraction=0.04, pad=0.015)
    bar.set_label("probability of the prediction", fontsize=FONT_SIZE - 1)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=FONT_SIZE - 2)
    return figure


def visible(token: str, limit: int = 9) -> str:
    """A token short enough for a cell, with its spaces and line ends drawn. `$` is kept from starting mathematics."""
    text = token.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u2192").replace("$", r"\$")
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"
