"""Figures of the ring buffer: a clock face of slots, the bytes it holds, and what a chunk does to it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, Wedge
from numpy.typing import ArrayLike

from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, LINESTYLES, PALE, ink_on, new_figure

NEAR, SINK, NEW, GONE = COLOURS[0], COLOURS[5], COLOURS[1], "#e4e4e4"
ROW = 16


@dataclass(frozen=True)
class RingState:
    """What a ring holds after a position was written.

    Attributes:
        step: the position written last, the query's own.
        slots: position in each slot, the sinks' first; -1 where nothing was written yet.
        written: number of the slot that `step` went to.
        lost: the position that lay there before, or -1.
    """

    step: int
    slots: tuple[int, ...]
    written: int
    lost: int


def ring_state(step: int, window: int, sinks: int = 0) -> RingState:
    """The ring after positions 0 to `step`, fed one by one: position p in slot p, or sinks + (p - sinks) mod window."""
    slots = [-1] * (sinks + window)
    written, lost = 0, -1
    for p in range(step + 1):
        written = p if p < sinks else sinks + (p - sinks) % window
        lost, slots[written] = slots[written], p
    return RingState(step, tuple(slots), written, lost)


def ring(state: RingState, sinks: int = 0) -> Figure:
    """The ring as a clock face, and under it the text with what the query sees.

    Args:
        state: see `ring_state`.
        sinks: how many slots at the start are the sinks'.
    """
    window = len(state.slots) - sinks
    figure, (face, text) = new_figure(1, 2, width=7.0, height=3.3)
    figure.set_layout_engine("none")  # a slider has to redraw in a tenth of a second
    face.set_position((0.0, 0.0, 3.3 / 7.0, 1.0))
    text.set_position((3.45 / 7.0, 0.03, 3.5 / 7.0, 0.94))
    for ax in (face, text):
        ax.set_axis_off()
        ax.set_aspect("equal")
    draw_face(face, state, window, sinks)
    draw_text(text, state, window, sinks)
    return figure


def draw_face(ax: Axes, state: RingState, window: int, sinks: int) -> None:
    """Slots as wedges, slot 0 at twelve o'clock and on clockwise; the sinks' slots as squares in the middle."""
    ax.set_xlim(-1.32, 1.32)
    ax.set_ylim(-1.32, 1.32)
    for slot in range(window):
        number, held = sinks + slot, state.slots[sinks + slot]
        middle = 90 - 360 * (slot + 0.5) / window
        new = number == state.written
        face = "white" if held < 0 else NEW if new else NEAR
        half = 180 / window - 1.2
        ax.add_patch(
            Wedge((0, 0), 1.0, middle - half, middle + half, width=0.42, facecolor=face, edgecolor=PALE, linewidth=1)
        )
        x, y = math.cos(math.radians(middle)), math.sin(math.radians(middle))
        if held >= 0:
            ink = ink_on(to_rgb(face))
            ax.text(0.79 * x, 0.79 * y, str(held), ha="center", va="center", color=ink, fontsize=11, weight="bold")
        ax.text(1.13 * x, 1.13 * y, str(number), ha="center", va="center", color="#666666", fontsize=9)
        if new and state.lost >= 0:
            ax.text(0.42 * x, 0.42 * y, f"{state.lost} out", ha="center", va="center", color=NEW, fontsize=9)
    for number in range(sinks):
        held, x = state.slots[number], 0.24 * (number - (sinks - 1) / 2)
        colour = "white" if held < 0 else NEW if number == state.written else SINK
        ax.add_patch(Rectangle((x - 0.11, -0.11), 0.22, 0.22, facecolor=colour, edgecolor=PALE))
        if held >= 0:
            ink = ink_on(to_rgb(colour))
            ax.text(x, 0, str(held), ha="center", va="center", color=ink, fontsize=10, weight="bold")
    if sinks:
        ax.text(0, -0.22, "sinks", ha="center", va="center", color="#666666", fontsize=9)
    ax.text(0, 1.24, "slot", ha="center", va="center", color="#666666", fontsize=9)


def draw_text(ax: Axes, state: RingState, window: int, sinks: int) -> None:
    """The positions so far, sixteen a row: the query, what it sees, and what is gone; and a line of words for each."""
    held = set(state.slots)
    n_rows = max(4, state.step // ROW + 1)
    ax.set_xlim(-0.6, ROW - 0.4)
    ax.set_ylim(-0.6, 15.0)
    top = 13.2
    ax.text(-0.5, top + 1.15, "the text so far, by position", color=INK, fontsize=FONT_SIZE)
    for p in range(state.step + 1):
        row, column = divmod(p, ROW)
        colour = NEW if p == state.step else SINK if p < sinks else NEAR if p in held else GONE
        y = top - 1.05 * row
        ax.add_patch(Rectangle((column - 0.47, y - 0.47), 0.94, 0.94, facecolor=colour))
        if colour != GONE or column == 0:  # of the many that are gone only a few are named: letters are slow to draw
            ax.text(column, y, str(p), ha="center", va="center", color=ink_on(to_rgb(colour)), fontsize=7)
    slot = f"{state.step}" if state.step < sinks else rule_in_words(state.step, window, sinks)
    gone = state.step + 1 - len(held - {-1})
    lines = [
        (NEW, f"position {state.step} goes to slot {slot}"),
        (NEW, f"over position {state.lost}" if state.lost >= 0 else "which was empty"),
        (NEAR, f"its query sees {len(held - {-1})} keys: {seen_in_words(state, sinks)}"),
        ("#777777", f"gone: {gone} positions"),
    ]
    y = top - 1.05 * n_rows - 0.7
    for colour, words in lines:
        ax.text(-0.5, y, words, color=colour, fontsize=FONT_SIZE, va="center")
        y -= 1.25


def rule_in_words(step: int, window: int, sinks: int) -> str:
    """ "13 mod 8 = 5", or with two sinks "2 + (13 - 2) mod 8 = 5"."""
    if not sinks:
        return f"{step} mod {window} = {step % window}"
    return f"{sinks} + ({step} - {sinks}) mod {window} = {sinks + (step - sinks) % window}"


def seen_in_words(state: RingState, sinks: int) -> str:
    """ "6 to 13", or "0 to 1 and 6 to 13"."""
    ringed = [p for p in state.slots[sinks:] if p >= 0]
    runs = [[p for p in state.slots[:sinks] if p >= 0], sorted(ringed)]
    if runs[0] and runs[1] and runs[1][0] == runs[0][-1] + 1:
        runs = [runs[0] + runs[1]]
    return " and ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs if run)


def cache_growth(lengths: Sequence[int], kib: Mapping[str, ArrayLike]) -> Figure:
    """Bytes of the cache while a text grows.

    Args:
        lengths: positions fed.
        kib: legend to KiB at each length.
    """
    figure, ax = new_figure(width=6.6, height=3.1)
    for i, (label, values) in enumerate(kib.items()):
        held = np.asarray(values, dtype=float)
        ax.plot(lengths, held, linewidth=2)
        ax.annotate(
            label,
            (lengths[-1], held[-1]),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[i],
            fontsize=FONT_SIZE - 1,
        )
    ax.set_xlim(0, lengths[-1] * 1.45)
    ax.set_ylim(0, None)
    ax.set_xticks(np.linspace(0, lengths[-1], 5).round().astype(int))
    ax.set_xlabel("positions fed")
    ax.set_ylabel("keys and values kept, KiB")
    return figure


def chunk_errors(errors: Mapping[str, ArrayLike], starts: Sequence[int], floor: float = 1e-8) -> Figure:
    """Largest error of the logits at each position against the uncached model; thin lines where a chunk begins.

    Args:
        errors: title of a panel to one error a position.
        starts: first positions of the chunks.
        floor: smaller errors, exact zeros among them, are drawn here.
    """
    figure, axes = new_figure(len(errors), 1, width=7.0, height=1.75 * len(errors) + 0.5, squeeze=False, sharex=True)
    for i, (ax, (title, values)) in enumerate(zip(axes[:, 0], errors.items(), strict=True)):
        ax.plot(
            np.maximum(np.asarray(values, dtype=float), floor),
            color=COLOURS[i],
            linestyle=LINESTYLES[0],
            marker="os^"[i % 3],
            markersize=3,
            linewidth=1,
        )
        for start in starts:
            ax.axvline(start - 0.5, color=PALE, linewidth=1, zorder=0)
        ax.set_yscale("log")
        ax.set_ylim(floor / 3, 100)
        ax.set_title(title, loc="left")
    axes[-1, 0].set_xlabel("position (a grey line: a chunk begins)")
    figure.supylabel("error of the logits", fontsize=FONT_SIZE)
    return figure
