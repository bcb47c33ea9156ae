"""Figures of chapter 00: the map of the course, the tokens a model expects next, a measurement with its spread."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, PALE, new_figure


def course_map(stations: Sequence[tuple[str, str]], flows: Sequence[str]) -> Figure:
    """The chapters as a line of boxes, and what one hands to the next.

    Args:
        stations: number and title of each chapter, in order; a line break in a title is kept.
        flows: what goes into the first box, between each two, and out of the last: one more than there are boxes.

    Raises:
        ValueError: if the numbers of boxes and arrows do not fit.
    """
    if len(flows) != len(stations) + 1:
        raise ValueError(f"{len(flows)} flows for {len(stations)} stations; there must be {len(stations) + 1}")
    figure, ax = new_figure(width=8.6, height=1.9)
    ax.axis("off")
    step, width = 1.6, 1.0
    for i, (number, title) in enumerate(stations):
        left = i * step
        colour = COLOURS[i % (len(COLOURS) - 1)]
        ax.add_patch(_box(left, width, colour))
        ax.text(left + width / 2, 0.73, number, ha="center", va="center", weight="bold", color=INK)
        ax.text(left + width / 2, 0.36, title, ha="center", va="center", size=FONT_SIZE - 1.5, color=INK)
    for i, flow in enumerate(flows):
        start = i * step - (step - width)
        arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.2}
        ax.annotate("", (start + 0.57, 0.5), (start + 0.03, 0.5), arrowprops=arrow)
        ax.text(start + (step - width) / 2, 0.58, flow, ha="center", va="bottom", size=FONT_SIZE - 2, color=INK)
    ax.set_xlim(-0.65, len(stations) * step + 0.05)
    ax.set_ylim(-0.05, 1.05)
    return figure


def _box(left: float, width: float, colour: str) -> FancyBboxPatch:
    return FancyBboxPatch((left, 0.05), width, 0.9, "round,pad=0,rounding_size=0.06", fc="white", ec=colour, lw=2)


def next_tokens(expected: Mapping[str, Sequence[tuple[str, float]]]) -> Figure:
    """Bars of the likeliest next tokens, one panel for each prompt. All share one scale, which the longest bar sets.

    Args:
        expected: by prompt, the tokens' texts and probabilities, largest first.
    """
    limit = rounded_up(max(chance for tokens in expected.values() for _, chance in tokens))
    rows = max(len(tokens) for tokens in expected.values())
    figure, axes = new_figure(1, len(expected), width=7.2, height=0.8 + 0.27 * rows, squeeze=False, sharex=True)
    for ax, (prompt, tokens) in zip(axes[0], expected.items(), strict=True):
        _bars(ax, tokens, limit)
        ax.set_title(f"after {prompt!a}", parse_math=False)
        ax.set_xlabel("probability")
    return figure


def rounded_up(chance: float) -> float:
    """The next 1, 2 or 5 times a power of ten that is not below this probability; at most 1."""
    power = 10.0 ** math.floor(math.log10(chance))
    # Rounding may leave the chance a hair above the step that it equals.
    return min(1.0, next(step * power for step in (1, 2, 5, 10) if chance <= step * power * (1 + 1e-9)))


def _bars(ax: Axes, tokens: Sequence[tuple[str, float]], limit: float) -> None:
    places = range(len(tokens))
    chances = [chance for _, chance in tokens]
    ax.barh(places, chances, color=COLOURS[0], height=0.7)
    # A dollar sign in a token is a dollar sign, not the start of a formula.
    ax.set_yticks(places, [ascii(text) for text, _ in tokens], family="monospace", parse_math=False)
    ax.invert_yaxis()
    # Room on the right for the number beside the longest bar.
    ax.set_xlim(0, 1.2 * limit)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    for place, chance in zip(places, chances, strict=True):
        ax.text(chance + 0.02 * limit, place, percent(chance), va="center", size=FONT_SIZE - 2, color=INK)


def percent(chance: float) -> str:
    """A probability in percent, with two digits where it is small: 47%, 2.8%, 0.021%."""
    if chance >= 0.01:
        return f"{chance:.0%}" if chance >= 0.1 else f"{chance:.1%}"
    return f"{100 * chance:#.2g}%" if chance >= 1e-5 else "<0.001%"


def spread(samples: Mapping[str, Sequence[float]], unit: str) -> Figure:
    """Every single measurement as a dot, the median as a bar, on a logarithmic axis.

    Args:
        samples: measurements by what was measured.
        unit: what they are in.
    """
    figure, ax = new_figure(width=7.0, height=0.9 + 0.45 * len(samples))
    for place, values in enumerate(samples.values()):
        heights = place + np.linspace(-0.15, 0.15, len(values))
        ax.scatter(values, heights, s=18, color=COLOURS[place], alpha=0.7, linewidths=0)
        median = float(np.median(values))
        ax.plot([median, median], [place - 0.3, place + 0.3], color=INK, linestyle="-", lw=1.5)
        ax.annotate(f"{median:.3g}", (median, place - 0.32), ha="center", va="bottom", size=FONT_SIZE - 1, color=INK)
    ax.set_yticks(range(len(samples)), list(samples))
    ax.set_ylim(len(samples) - 0.4, -0.75)
    ax.set_xscale("log")
    low, high = min(map(min, samples.values())), max(map(max, samples.values()))
    ax.set_xlim(low / 2, high * 2)
    ax.set_xlabel(unit)
    ax.grid(axis="x", color=PALE, lw=0.5)
    return figure
