"""Figures of chapter 05: what is in a checkpoint, and where two models part."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from gpt2course.viz.style import COLOURS, SEQUENTIAL, ink_on, new_figure

PARTS = ("ln_1", "attn.c_attn", "attn.weights", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj", "")
LABELS = ("ln_1", "c_attn", "weights", "c_proj", "ln_2", "mlp.c_fc", "gelu", "mlp.c_proj", "block out")
FLOOR = 1e-9


def parity_microscope(
    differences: Mapping[str, float], n_layer: int, limit: float = 1e-4, title: str = "", reveal: bool = True
) -> Figure:
    """A heat map of differences between two traces: a column a block, a row a step inside it.

    Args:
        differences: largest absolute difference by name, as from `gpt2course.trace.differences`.
        n_layer: number of blocks.
        limit: from here on a difference counts as wrong; the first one in order of computation gets a frame.
        title: put above the map.
        reveal: frame and name the first wrong step; False leaves the search to the reader.
    """
    grid = np.full((len(PARTS), n_layer + 2), np.nan)
    place: dict[str, tuple[int, int]] = {"wte": (0, 0), "wpe": (1, 0)}
    place |= {"ln_f": (0, n_layer + 1), "lm_head": (1, n_layer + 1)}
    for i in range(n_layer):
        place |= {f"h.{i}.{part}".rstrip("."): (row, i + 1) for row, part in enumerate(PARTS)}
    for name, value in differences.items():
        if name in place:
            grid[place[name]] = math.inf if math.isnan(value) else value
    first = next((name for name, value in differences.items() if name in place and not value <= limit), None)

    figure, ax = new_figure(width=min(9.0, 4.2 + 0.45 * n_layer), height=3.9)
    shown = np.clip(grid, FLOOR, 1e2)
    image = ax.imshow(shown, norm=LogNorm(FLOOR, 1e2), cmap=SEQUENTIAL, aspect="auto")
    bar = figure.colorbar(image, ax=ax, label="largest absolute difference")
    bar.ax.axhline(limit, color="white", linewidth=1.5)
    for name, text in {"wte": "wte", "wpe": "wpe", "ln_f": "ln_f", "lm_head": "logits"}.items():
        if name in differences:
            row, column = place[name]
            ink = ink_on(image.to_rgba(shown[row, column]))
            ax.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    if reveal:
        verdict = f"first off at {first}" if first else f"nothing beyond {limit:g}"
        title = f"{title}: {verdict}" if title else verdict
    if reveal and first:
        row, column = place[first]
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=3))
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_yticks(range(len(LABELS)), LABELS)
    ax.set_xticks(range(n_layer + 2), ["in", *map(str, range(n_layer)), "out"])
    ax.set_xlabel("block")
    return figure


def bytes_by_part(parts: Mapping[str, int]) -> Figure:
    """One horizontal bar that shows what a checkpoint's bytes are spent on.

    Args:
        parts: bytes by name.
    """
    figure, ax = new_figure(width=7.5, height=0.42 * len(parts) + 0.9)
    names, sizes = list(parts), np.array(list(parts.values())) / 1e6
    bars = ax.barh(names, sizes, color=COLOURS[0], height=0.7)
    ax.bar_label(bars, [f"{s:,.2f} MB ({s / sizes.sum():.0%})" for s in sizes], padding=4, fontsize=9)
    ax.set_xlim(0, sizes.max() * 1.28)
    ax.invert_yaxis()
    ax.set_xlabel("size in the file, MB")
    return figure


def impostors(loss_rise: Mapping[str, float], logit_error: Mapping[str, float]) -> Figure:
    """For each loading mistake: how far the logits move, and how much the loss on real text rises.

    Args:
        loss_rise: nats per token above the right model, by mistake.
        logit_error: largest absolute logit difference, by mistake; the same names.
    """
    figure, (left, right) = new_figure(1, 2, width=8.6, height=0.4 * len(loss_rise) + 1.0, sharey=True)
    names = list(loss_rise)
    for ax, values, label in (
        (left, logit_error, "largest logit difference"),
        (right, loss_rise, "rise of the loss, nats per token"),
    ):
        numbers = [values[name] for name in names]
        bars = ax.barh(names, np.maximum(numbers, 1e-5), color=COLOURS[0], height=0.7)
        ax.bar_label(bars, [f"{n:.2g}" for n in numbers], padding=3, fontsize=9)
        ax.set_xscale("log")
        ax.set_xlim(1e-5, max(numbers) * 30)
        ax.xaxis.set_major_locator(LogLocator(numticks=5))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel(label)
    left.axvline(1e-4, color=COLOURS[1], linestyle="--", linewidth=1.5)
    left.text(1.3e-4, -0.62, "parity limit 1e-4", color=COLOURS[1], fontsize=8, va="bottom")
    left.invert_yaxis()
    return figure
