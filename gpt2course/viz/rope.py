"""Figures of rotary positions: turned arrows, pairs as clocks, scores by place, the two layouts.

Angles run anticlockwise from the right, as in mathematics.

Legend: T query positions, S key positions, K pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, PathPatch, Rectangle, Wedge
from matplotlib.path import Path

from gpt2course.viz.embeddings import STEPS, add_colourbar
from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, LINESTYLES, PALE, new_figure

Array = npt.NDArray[np.floating]
SMALL = FONT_SIZE - 1
QUERY, KEY = COLOURS[0], COLOURS[1]
SEEN = "#d5e5f0"


@dataclass(frozen=True)
class Arrow:
    """A vector of the plane, from the origin."""

    xy: tuple[float, float]
    label: str
    colour: str = QUERY
    dash: str = "-"


def arrow_panels(panels: Mapping[str, Sequence[Arrow]], size: float = 2.6) -> Figure:
    """Vectors of the plane, one panel a title, all to one scale, each with a circle through its tip.

    Args:
        panels: title to arrows.
        size: width of a panel in inches.
    """
    reach = 1.28 * max(math.hypot(*arrow.xy) for arrows in panels.values() for arrow in arrows)
    figure, axes = new_figure(1, len(panels), width=size * len(panels), height=size + 0.25, squeeze=False)
    for ax, (title, arrows) in zip(axes[0], panels.items(), strict=True):
        for length in {round(math.hypot(*arrow.xy), 6) for arrow in arrows}:
            ax.add_patch(Circle((0, 0), length, fill=False, edgecolor=PALE, linewidth=0.8))
        for arrow in arrows:
            hand(ax, arrow.xy, arrow.colour, arrow.dash)
            length = math.hypot(*arrow.xy)
            further = (length + 0.12 * reach) / length
            ax.text(
                *(further * np.array(arrow.xy)),
                arrow.label,
                ha="center",
                va="center",
                fontsize=SMALL,
                color=arrow.colour,
            )
        ax.plot(0, 0, "o", color=INK, markersize=3)
        ax.set_title(title)
        ax.set_aspect("equal")
        ax.set_xlim(-reach, reach)
        ax.set_ylim(-reach, reach)
        ax.axis("off")
    return figure


def hand(ax: Axes, xy: tuple[float, float], colour: str, dash: str = "-", width: float = 2.0) -> None:
    """An arrow from the origin."""
    ax.add_patch(FancyArrowPatch((0, 0), xy, arrowstyle="-", color=colour, linestyle=dash, linewidth=width, shrinkB=3))
    ax.add_patch(FancyArrowPatch((0.9 * xy[0], 0.9 * xy[1]), xy, arrowstyle="-|>", color=colour, mutation_scale=13))


def clock_faces(omega_K: Array, position: float, trained: int, columns: int = 8) -> Figure:
    """A dial for each pair, its hand at one position; the part that training showed it is shaded.

    Args:
        omega_K: radians a token, of each pair.
        position: where the hands are drawn.
        trained: length of training in tokens; a pair that does not get round within it has an orange hand.
        columns: dials in a row.
    """
    n_rows = -(-len(omega_K) // columns)
    figure, axes = new_figure(n_rows, columns, width=0.94 * columns, height=1.24 * n_rows + 0.3, squeeze=False)
    for ax in axes.flat[len(omega_K) :]:
        ax.set_visible(False)
    for i, (ax, omega) in enumerate(zip(axes.flat, omega_K, strict=False)):
        period = 2 * math.pi / omega
        seen = min(360.0, math.degrees(omega * trained))
        ax.add_patch(Wedge((0, 0), 1, 0, seen, facecolor=SEEN))
        ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor="#888888", linewidth=1))
        turn = omega * position
        hand(ax, (0.97 * math.cos(turn), 0.97 * math.sin(turn)), QUERY if period <= trained else KEY)
        ax.set_title(f"pair {i}", fontsize=SMALL, pad=2)
        ax.text(0, -1.16, f"{period:,.1f}" if period < 100 else f"{period:,.0f}", ha="center", va="top", fontsize=SMALL)
        ax.set_aspect("equal")
        ax.set_xlim(-1.12, 1.12)
        ax.set_ylim(-1.55, 1.12)
        ax.axis("off")
    words = f"blue: gets round within {trained} tokens, orange: does not; below each dial: tokens for one turn"
    figure.suptitle(words, fontsize=SMALL)
    return figure


def spread(values: Sequence[float], gap: float) -> list[float]:
    """The values moved up where needed, so that no two are closer than `gap`: places for labels."""
    placed = list(values)
    below = -math.inf
    for i in np.argsort(values):
        placed[i] = below = max(values[i], below + gap)
    return placed


def periods(lines: Mapping[str, Array], lengths: Mapping[str, int]) -> Figure:
    """How many tokens each pair needs to go round once, on a logarithmic axis.

    Args:
        lines: label to radians a token of each pair.
        lengths: label to a number of tokens, drawn as a level.
    """
    figure, ax = new_figure(width=7.0, height=3.3)
    right = max(len(omega_K) for omega_K in lines.values())
    for i, (label, omega_K) in enumerate(lines.items()):
        period_K = 2 * math.pi / np.asarray(omega_K)
        ax.plot(period_K, marker="os^D"[i % 4], markersize=4, linewidth=1.3)
        # A short line's name stands to its left, where no other line passes.
        side = {"ha": "left", "x": len(period_K) - 0.4, "y": period_K[-1]}
        if len(period_K) < right:
            side = {"ha": "right", "x": len(period_K) - 1.5, "y": 1.5 * period_K[-1]}
        ax.text(s=label, color=ax.lines[-1].get_color(), va="center", fontsize=SMALL, **side)
    ax.set_yscale("log")
    for label, length in lengths.items():
        ax.axhline(length, color=INK, linestyle=":", linewidth=1)
        ax.text(1.42 * right, 1.15 * length, label, fontsize=SMALL, ha="right", va="bottom")
    ax.set_xlim(-0.5, 1.42 * right)
    ax.set_xticks(range(0, right + 1, 4))
    ax.set_xlabel("pair")
    ax.set_ylabel("tokens for one turn")
    return figure


def scores_by_place(score_TS: Array, distances: Sequence[int], title: str) -> Figure:
    """One query content against one key content at all pairs of places: as a picture, and along some diagonals.

    Args:
        score_TS: (T, T) scores, query position down, key position to the right.
        distances: query position - key position; each is a line, drawn at the query's position.
        title: of the picture.
    """
    figure, (left, right) = new_figure(1, 2, width=7.0, height=2.9, width_ratios=[1, 1.25])
    score = np.asarray(score_TS, dtype=float)
    middle = float(np.median(score))
    top = float(np.percentile(np.abs(score - middle), 99.5))
    image = left.imshow(score, cmap=STEPS, vmin=middle - top, vmax=middle + top, interpolation="nearest")
    add_colourbar(figure, left, image, "")
    left.set_xlabel("key position")
    left.set_ylabel("query position")
    left.set_title(title)
    T = len(score)
    lines = [np.diagonal(score, -distance) for distance in distances]
    for i, (distance, along) in enumerate(zip(distances, lines, strict=True)):
        right.plot(np.arange(distance, T), along, color=COLOURS[i], linestyle=LINESTYLES[i], linewidth=1.5)
    low, high = right.get_ylim()
    heights = spread([float(along[-1]) for along in lines], 0.08 * (high - low))
    for i, (distance, height) in enumerate(zip(distances, heights, strict=True)):
        right.text(T + 2, height, f"{distance} back", color=COLOURS[i], va="center", fontsize=SMALL)
    right.set_title("the same two tokens, so far apart")
    right.set_xlim(0, 1.27 * T)
    right.set_xticks(range(0, T, max(1, T // 4)))
    right.spines["bottom"].set_bounds(0, T)
    right.set_xlabel("query position")
    right.set_ylabel("score q · k")
    return figure


def two_hands(q_2: Array, k_2: Array, omega: float, q_pos: int, k_pos: int, reach: int, title: str = "") -> Figure:
    """One pair of a query and of a key, turned to their places, and the score of this pair over all distances.

    Args:
        q_2, k_2: the two numbers of the pair, before they are turned.
        omega: radians a token.
        q_pos, k_pos: the places.
        reach: largest distance drawn.
    """
    # Fixed margins instead of the constrained layout: a slider has to redraw in a tenth of a second.
    figure, (dial, curve) = new_figure(1, 2, width=7.0, height=2.9)
    figure.set_layout_engine("none")
    dial.set_position((0.01, 0.06, 0.34, 0.82))
    curve.set_position((0.45, 0.18, 0.52, 0.68))
    turned = {}
    for name, xy, pos, colour in (("q", q_2, q_pos, QUERY), ("k", k_2, k_pos, KEY)):
        z = complex(*xy) * np.exp(1j * omega * pos)
        turned[name] = z
        hand(dial, (z.real, z.imag), colour, "-" if name == "q" else "--", 2.4)
        # Letters stand on different radii, so that two hands in one direction keep both.
        away = (1.34 if name == "q" else 1.1) * z / abs(z) * max(abs(complex(*q_2)), abs(complex(*k_2)))
        dial.text(away.real, away.imag, name, color=colour, ha="center", va="center", fontsize=FONT_SIZE + 1)
    size = max(abs(complex(*q_2)), abs(complex(*k_2)))
    dial.add_patch(Circle((0, 0), size, fill=False, edgecolor=PALE))
    dial.set_xlim(-1.5 * size, 1.5 * size)
    dial.set_ylim(-1.5 * size, 1.5 * size)
    dial.set_aspect("equal")
    dial.axis("off")
    dial.set_title(f"query at {q_pos}, key at {k_pos}")
    distance_N = np.linspace(-reach, reach, 400)
    score_N = (complex(*q_2) * np.conj(complex(*k_2)) * np.exp(1j * omega * distance_N)).real
    curve.axvspan(-reach, 0, color="#f2f2f2", linewidth=0)
    curve.axhline(0, color=PALE, linewidth=0.8, linestyle="-")
    curve.plot(distance_N, score_N, color="#666666", linestyle="-", linewidth=1.4)
    score = (turned["q"] * np.conj(turned["k"])).real
    curve.plot(q_pos - k_pos, score, "o", color=COLOURS[2], markersize=9)
    limit = 1.25 * abs(complex(*q_2)) * abs(complex(*k_2))
    curve.text(-0.97 * reach, 0.97 * limit, "the future", va="top", fontsize=SMALL, color="#666666")
    curve.set_xlim(-reach, reach)
    curve.set_ylim(-limit, limit)
    curve.set_xticks(range(-reach, reach + 1, reach // 2))
    curve.set_xlabel("distance, query position - key position")
    curve.set_title(f"{title}score {score:.2f} at distance {q_pos - k_pos}")
    return figure


def layouts(R: int) -> Figure:
    """Which of R numbers form a pair in either layout, and where each number of the one stands in the other."""
    figure, ax = new_figure(width=7.0, height=3.3)
    K = R // 2
    top, low, side = 1.0, 0.0, 0.4
    half = [(i, i % K) for i in range(R)]
    interleaved = [(i, i // 2) for i in range(R)]
    for y, row, up in ((top, half, 1), (low, interleaved, -1)):
        for place, pair in row:
            ax.add_patch(
                Rectangle((place - side, y - 0.11), 2 * side, 0.22, facecolor=COLOURS[pair % len(COLOURS)], alpha=0.25)
            )
            name = "a" if (place < K if up > 0 else place % 2 == 0) else "b"
            ax.text(place, y, f"${name}_{pair}$", ha="center", va="center", fontsize=FONT_SIZE + 2)
        for pair in range(K):
            ends = [place for place, p in row if p == pair]
            edge = y + 0.11 * up
            rise = edge + up * (0.16 + 0.34 * (ends[1] - ends[0]) / K) * (1.0 if up > 0 else 1.4)
            curve = Path([(ends[0], edge), (ends[0], rise), (ends[1], rise), (ends[1], edge)], [1, 4, 4, 4])
            style = {"edgecolor": COLOURS[pair % len(COLOURS)], "linestyle": LINESTYLES[pair % len(LINESTYLES)]}
            ax.add_patch(PathPatch(curve, fill=False, linewidth=2, **style))
    for place, pair in half:
        goal = 2 * pair + (place >= K)
        ax.plot([place, goal], [top - 0.13, low + 0.13], color="#999999", linestyle="-", linewidth=0.9, zorder=0)
    ax.text(-0.75, top, "half-split\nHugging Face", ha="right", va="center")
    ax.text(-0.75, low, "interleaved\nthe paper, Meta", ha="right", va="center")
    ax.set_xlim(-3.0, R - 0.4)
    ax.set_ylim(low - 0.52, top + 0.6)
    ax.axis("off")
    return figure
