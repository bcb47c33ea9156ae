"""Figures of training: losses and schedules, the range test, what a number format can hold, runs side by side.

All of them take plain sequences, one number a step, and draw steps from 1 on.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullFormatter, NullLocator

from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, LINESTYLES, PALE, new_figure

SMALL = FONT_SIZE - 1


def loss_curve(
    losses: Sequence[float],
    *,
    steps: int | None = None,
    held_out: Mapping[int, float] | None = None,
    rates: Sequence[float] | None = None,
    title: str = "",
    mean: bool = True,
) -> Figure:
    """Training loss a step, with its running mean; held-out losses as dots, the learning rate in a strip below.

    Args:
        losses: nats per token of steps 1, 2 …
        steps: how long the axis is, for a run that is not at its end yet.
        held_out: losses by step.
        rates: learning rate of each step; without it there is no strip.
        title: a line above.
        mean: draw the running mean; on a loss that falls steadily it only lies above it, a few steps late.
    """
    if rates is None:
        figure, top = new_figure(height=3.2)
        axes = [top]
    else:
        figure, axes = new_figure(2, 1, height=3.9, sharex=True, height_ratios=(3, 1))
        top = axes[0]
        axes[1].plot(range(1, len(rates) + 1), rates, color=COLOURS[2], linestyle="-")
        axes[1].set_ylabel("rate")
        axes[1].set_ylim(bottom=0)
    draw_losses(top, losses, held_out or {}, mean)
    step_axis(axes[-1], steps or len(losses))
    top.set_title(title, loc="left")
    return figure


def learning(
    losses: Sequence[float],
    shares: Mapping[int, tuple[int, int]],
    yardsticks: Mapping[str, float],
    *,
    steps: int,
    held_out: Mapping[int, float] | None = None,
) -> Figure:
    """The loss, and below it how much of what the model writes is right.

    Args:
        losses: as in `loss_curve`.
        shares: by step, how many were right of how many; drawn with one standard error up and down,
            sqrt(p (1 - p) / n).
        yardsticks: shares to compare with, by name.
        steps: how long the axis is.
        held_out: losses by step.
    """
    figure, (top, bottom) = new_figure(2, 1, height=4.8, sharex=True, height_ratios=(1.2, 1))
    draw_losses(top, losses, held_out or {})
    places, right, n = (np.array(column) for column in zip(*((s, *found) for s, found in shares.items()), strict=True))
    p = right / np.maximum(n, 1)
    error = np.sqrt(p * (1 - p) / np.maximum(n, 1))
    style = {"color": COLOURS[0], "linestyle": "-", "marker": "o", "markersize": 2.5, "capsize": 3.5, "elinewidth": 1.2}
    bottom.errorbar(places, p, error, label="this model", **style)
    for i, (name, share) in enumerate(yardsticks.items()):
        bottom.axhline(share, color=COLOURS[1 + i], linestyle=LINESTYLES[1 + i], label=name)
    bottom.set_ylim(0, 1.03)
    bottom.set_ylabel("share of lines\nthat parse")
    bottom.legend(frameon=False, fontsize=SMALL, ncols=1 + len(yardsticks), loc="lower center", bbox_to_anchor=(0.5, 1))
    step_axis(bottom, steps)
    return figure


def draw_losses(ax: Axes, losses: Sequence[float], held_out: Mapping[int, float], mean: bool = True) -> None:
    """The loss of each step, its running mean if asked for, and the held-out losses by step."""
    places = range(1, len(losses) + 1)
    if mean:
        ax.plot(places, losses, color=PALE, linestyle="-", linewidth=0.9, label="each step")
        ax.plot(places, running_mean(losses), color=COLOURS[0], linestyle="-", linewidth=1.8, label="running mean")
    else:
        ax.plot(places, losses, color=COLOURS[0], linestyle="-", linewidth=1.8, label="each step")
    if held_out:
        ax.plot(list(held_out), list(held_out.values()), "D", color=COLOURS[1], markersize=5, label="held out")
    ax.set_ylabel("loss (nats per token)")
    ax.legend(frameon=False, fontsize=SMALL, loc="upper right")


def step_axis(ax: Axes, steps: int) -> None:
    """Whole steps, from 1 to the last."""
    ax.set_xlabel("step")
    ax.set_xlim(0, 1.01 * max(1, steps) + 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def running_mean(values: Sequence[float], past: float = 0.9) -> list[float]:
    """Exponential mean without a lag at the start: the first value is the first number itself."""
    found, mean = [], 0.0
    for i, value in enumerate(values):
        mean = past * mean + (1 - past) * value
        found.append(mean / (1 - past ** (i + 1)))
    return found


def curves_and_difference(
    curves: Mapping[str, Sequence[float]],
    reference: str,
    *,
    quantity: str = "loss (nats per token)",
    tolerance: float | None = None,
) -> Figure:
    """Curves laid over each other, and below, on a log scale, how far each lies from the one they are compared with.

    An equal pair of numbers has no logarithm: it is drawn on a line of its own at the bottom, "equal".

    Args:
        curves: numbers a step by name, from step 1 on; a shorter one is compared as far as it goes.
        reference: name of the curve that the others are held against.
        quantity: what the upper axis shows.
        tolerance: draw a line at the largest difference that is let pass.

    Raises:
        ValueError: if there is no such curve, or nothing to compare it with.
    """
    if reference not in curves or len(curves) < 2:
        raise ValueError(f"reference is {reference!r}, the curves are {', '.join(curves)}; give it and one more")
    figure, (top, bottom) = new_figure(2, 1, height=4.6, sharex=True, height_ratios=(1.2, 1))
    known = np.asarray(curves[reference], dtype=float)
    others = [name for name in curves if name != reference]
    styles = {name: {"color": COLOURS[i % 7], "linestyle": LINESTYLES[(i + 1) % 7]} for i, name in enumerate(others)}
    # Wide and pale, so that those which lie on it are seen on it.
    top.plot(range(1, len(known) + 1), known, linewidth=6.0, label=reference, color=PALE)
    for i, name in enumerate(others):
        top.plot(
            range(1, len(curves[name]) + 1), curves[name], linewidth=max(1.2, 2.4 - 0.6 * i), label=name, **styles[name]
        )
    differences = {}
    for name, values in curves.items():
        if name != reference:
            n = min(len(values), len(known))
            differences[name] = np.abs(np.asarray(values[:n], dtype=float) - known[:n])
    floor = difference_scale(bottom, [*differences.values()], tolerance)
    for i, (name, off) in enumerate(differences.items()):
        bottom.plot(
            range(1, len(off) + 1), np.maximum(off, floor), marker="o^sDvPX"[i % 7], markersize=3, **styles[name]
        )
    if tolerance is not None:
        bottom.axhline(tolerance, color=INK, linestyle=(0, (1, 2)), linewidth=1)
        bottom.annotate(
            "tolerance", (0.995, tolerance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=SMALL
        )
    top.set_ylabel(quantity)
    top.legend(frameon=False, fontsize=SMALL)
    bottom.set_ylabel(f"distance from\n{reference}")
    step_axis(bottom, max(map(len, curves.values())))
    return figure


def difference_scale(ax: Axes, differences: Sequence[np.ndarray], tolerance: float | None) -> float:
    """A log axis in whole decades with a place for 0 below them. Returns where that place is."""
    every = np.concatenate([*differences, [tolerance or 0.0]])
    real = every[np.isfinite(every) & (every > 0)]
    low, high = (math.floor(math.log10(real.min())), math.ceil(math.log10(real.max()))) if len(real) else (-9, -6)
    high = max(high, low + 1)
    each = max(1, -(-(high - low) // 5))
    decades = range(high, low - 1, -each)
    floor = 10.0 ** (low - each)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator([floor, *(10.0**n for n in decades)]))
    ax.yaxis.set_major_formatter(FixedFormatter(["equal", *(f"1e{n}" for n in decades)]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylim(floor / 10 ** (0.3 * each), 10.0 ** (high + 0.3 * each))
    ax.axhline(floor, color=PALE, linestyle="-", linewidth=0.8, zorder=0)
    return floor


def schedules(lines: Mapping[str, Sequence[float]], warmup_steps: int = 0) -> Figure:
    """Learning rates step by step, one line a schedule; the warm-up shaded."""
    figure, ax = new_figure(height=3.0)
    for i, (name, rates) in enumerate(lines.items()):
        ax.plot(range(1, len(rates) + 1), rates, linewidth=1.8, label=name, linestyle=LINESTYLES[i % 7])
    if warmup_steps:
        ax.axvspan(0, warmup_steps, color=PALE, alpha=0.3, linewidth=0)
        ax.annotate("warm-up", (warmup_steps, 0), xytext=(4, 4), textcoords="offset points", fontsize=SMALL)
    ax.set_ylim(bottom=0)
    step_axis(ax, max(map(len, lines.values())))
    ax.set_ylabel("learning rate")
    ax.legend(frameon=False, fontsize=SMALL, loc="upper right")
    return figure


def range_test(
    rates: Sequence[float], losses: Sequence[float], smooth: Sequence[float], suggestion: float | None = None
) -> Figure:
    """A learning-rate range test: the loss at each rate, its running mean, and the rate that was suggested."""
    figure, ax = new_figure(height=3.2)
    ax.plot(rates, losses, color=PALE, linestyle="-", linewidth=0.9, label="each step")
    ax.plot(rates, smooth, color=COLOURS[0], linestyle="-", linewidth=1.8, label="running mean")
    finite = [value for value in smooth if math.isfinite(value)]
    low = min(finite)
    place = list(smooth).index(low)
    ax.plot(rates[place], low, "o", color=COLOURS[0], markersize=7, label=f"lowest, at {rates[place]:.1e}")
    if suggestion is not None:
        ax.axvline(suggestion, color=COLOURS[1], linestyle="--", label=f"suggested: {suggestion:.1e}")
    ax.set_xscale("log")
    lowest = min(low, *(value for value in losses if math.isfinite(value)))
    top = finite[0] + 0.6 * max(finite[0] - low, 0.1)
    ax.set_ylim(lowest - 0.05 * (finite[0] - low) - 0.05, top)
    above = max((value for value in losses if math.isfinite(value)), default=top)
    if above > top:
        ax.annotate(f"↑ up to {above:.3g}", (0.995, 1.01), xycoords="axes fraction", ha="right", fontsize=SMALL)
    ax.set_xlabel("learning rate (log scale)")
    ax.set_ylabel("loss (nats per token)")
    ax.legend(frameon=False, fontsize=SMALL, loc="lower left")
    return figure


def magnitudes(panels: Mapping[str, np.ndarray], smallest: float, largest: float, normal: float) -> Figure:
    """How large the numbers of each panel are, in powers of two, and which of them a format can hold.

    Args:
        panels: absolute values by title, zeros left out.
        smallest: below half of it a number becomes 0.
        largest: above it a number becomes infinite.
        normal: below it numbers lose digits.
    """
    figure, axes = new_figure(len(panels), 1, height=0.7 + 1.55 * len(panels), sharex=True, squeeze=False)
    # A handful of numbers far below all others would squeeze them together.
    lowest = min(float(np.log2(np.quantile(values, 0.0005))) for values in panels.values())
    edges = np.arange(math.floor(min(lowest, math.log2(smallest))) - 1, math.log2(largest) + 2)
    for ax, (title, values) in zip(axes[:, 0], panels.items(), strict=True):
        counts, _ = np.histogram(np.log2(values).clip(edges[0], edges[-1]), bins=edges)
        shares = counts / len(values)
        lost = edges[1:] <= math.log2(smallest) - 1
        ax.bar(edges[:-1][lost], shares[lost], 1.0, align="edge", color=COLOURS[1], hatch="//", edgecolor="white")
        ax.bar(edges[:-1][~lost], shares[~lost], 1.0, align="edge", color=COLOURS[0], edgecolor="white")
        for bound, word, side in (
            (smallest / 2, "half of it: becomes 0", "right"),
            (smallest, "smallest", "left"),
            (normal, "full digits", "left"),
            (largest, "largest", "right"),
        ):
            ax.axvline(math.log2(bound), color=INK, linestyle=":", linewidth=1)
            ax.annotate(
                f" {word} ",
                (math.log2(bound), 0.97),
                xycoords=("data", "axes fraction"),
                ha=side,
                va="top",
                fontsize=SMALL - 1,
            )
        ax.set_title(title, loc="left")
        ax.set_ylabel("share")
        ax.set_yticks([])
    axes[-1, 0].set_xlabel("magnitude, as a power of two")
    return figure


def loss_and_norm(runs: Mapping[str, Sequence[tuple[float, float]]], clip: float | None = None) -> Figure:
    """Running means of the losses of runs, and of the norms of their gradients before clipping, on a log scale.

    Args:
        runs: (loss, norm) of each step, by name.
        clip: draw a line at the largest norm that is let pass.
    """
    figure, (left, right) = new_figure(1, 2, width=8.0, height=3.4)
    for i, (name, rows) in enumerate(runs.items()):
        style = {"color": COLOURS[i % 7], "linestyle": LINESTYLES[i % 7], "linewidth": 1.5, "label": name}
        places = range(1, len(rows) + 1)
        left.plot(places, running_mean([loss for loss, _ in rows], 0.8), **style)
        right.plot(places, running_mean([norm for _, norm in rows], 0.8), **style)
    if clip is not None:
        right.axhline(clip, color=INK, linestyle=(0, (1, 2)), linewidth=1)
        right.annotate(
            "clip", (0.995, clip), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=SMALL
        )
    right.set_yscale("log")
    left.set_ylabel("running mean of loss (nats per token)")
    right.set_ylabel("running mean of gradient norm")
    left.legend(frameon=False, fontsize=SMALL)
    for ax in (left, right):
        step_axis(ax, max(map(len, runs.values())))
    return figure
