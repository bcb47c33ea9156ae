"""Figures of chapter 06: what they show is what they were given, and the widget's is quick enough for a slider."""

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, PathPatch, Wedge

from gpt2course.viz import extrapolation
from gpt2course.viz import rope as draw
from gpt2course.viz.show import png_bytes
from gpt2course.viz.style import COLOURS
from gpt2course.viz.widget import WIDGET_LIMIT_MS
from tests.viz.looks import outside

OMEGA = 10000.0 ** (-np.arange(0, 32, 2) / 32)
Q, K = np.array([2.0, 1.0]), np.array([0.5, -1.0])


def curve(level: float, n: int = 6) -> extrapolation.Curve:
    loss = np.linspace(level, level + 0.1, n)
    return extrapolation.Curve(2.0 ** np.arange(3, 3 + n), loss, loss - 0.05, loss + 0.05)


FIGURES: dict[str, Callable[[], Figure]] = {
    "arrow_panels": lambda: draw.arrow_panels({"one": [draw.Arrow((2, 1), "q")], "two": [draw.Arrow((0, -1), "k")]}),
    "clock_faces": lambda: draw.clock_faces(OMEGA, 40, 64),
    "periods": lambda: draw.periods({"long": OMEGA, "short": OMEGA[::2]}, {"trained": 64}),
    "scores_by_place": lambda: draw.scores_by_place(np.random.default_rng(0).normal(size=(48, 48)), [1, 4], "learned"),
    "two_hands": lambda: draw.two_hands(Q, K, 0.5, 12, 5, 64),
    "layouts": lambda: draw.layouts(8),
    "rounding": lambda: extrapolation.rounding(1.0, np.arange(9), {"a": np.ones(9), "b": np.arange(9)}, 5, 4),
    "multipliers": lambda: extrapolation.multipliers({"linear": np.full(16, 0.125), "none": np.ones(16)}, 4),
    "loss_by_length": lambda: extrapolation.loss_by_length({"a": curve(2.0), "b": curve(2.1)}, 32, [8, 64]),
    "extra_loss": lambda: extrapolation.extra_loss({name: np.linspace(0, 1, 20) for name in "ABCD"}, 6),
}


def tips(ax: Axes) -> list[tuple[float, float]]:
    """Where the hands end; each has a shaft and a head."""
    arrows = [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    return [shaft._posA_posB[1] for shaft in arrows[::2]]


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_whole_and_small(name: str) -> None:
    """A figure that fails only when it is rendered, whose words are cut off, or that takes too much of a chapter."""
    assert outside(FIGURES[name]()) == []
    assert len(png_bytes(FIGURES[name]())) < 60_000


def test_hands_point_where_their_angle_is() -> None:
    """Hands that turn clockwise, or in degrees."""
    figure = draw.clock_faces(np.array([math.pi / 2, 0.25]), 1.0, 64)
    first, second = figure.axes[0], figure.axes[1]
    assert np.allclose(tips(first)[0], (0, 0.97), atol=1e-9)
    assert np.allclose(tips(second)[0], (0.97 * math.cos(0.25), 0.97 * math.sin(0.25)))


def test_dial_shades_what_training_has_shown() -> None:
    """A shaded sector in radians where degrees are wanted, or a hand that gets round drawn as one that does not."""
    figure = draw.clock_faces(np.array([1.0, 0.01]), 5.0, 64)
    sectors = [patch for ax in figure.axes for patch in ax.patches if isinstance(patch, Wedge)]
    assert sectors[0].theta2 == 360.0
    assert sectors[1].theta2 == pytest.approx(math.degrees(0.64))
    hands = [next(p for p in ax.patches if isinstance(p, FancyArrowPatch)) for ax in figure.axes[:2]]
    assert [to_hex(hand.get_edgecolor()).upper() for hand in hands] == [draw.QUERY, draw.KEY]


def test_period_is_written_under_each_dial() -> None:
    """The frequency, or its inverse without 2 pi, in place of the tokens of one turn."""
    figure = draw.clock_faces(np.array([1.0, 0.001]), 0.0, 64)
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["6.3", "6,283"]


def test_diagonals_are_queries_after_keys() -> None:
    """`4 back` drawn from the diagonal of the future, where the key comes after the query."""
    score = np.arange(100.0).reshape(10, 10)
    figure = draw.scores_by_place(score, [4], "t")
    (line,) = [ax.lines[0] for ax in figure.axes if ax.get_ylabel() == "score q · k"]
    assert line.get_xdata().tolist() == list(range(4, 10))
    assert line.get_ydata().tolist() == [score[t, t - 4] for t in range(4, 10)]


@pytest.mark.parametrize(("q_pos", "k_pos"), [(12, 5), (5, 12), (40, 33), (0, 0)])
def test_dot_of_the_widget_lies_on_its_curve(q_pos: int, k_pos: int) -> None:
    """A curve over key minus query, on which the dot jumps off for every distance but zero."""
    figure = draw.two_hands(Q, K, 0.5, q_pos, k_pos, 64)
    curve_line, dot = [line for line in figure.axes[1].lines if len(line.get_xdata()) != 2]
    (x,), (y,) = dot.get_data()
    assert x == q_pos - k_pos
    assert y == pytest.approx(np.interp(x, *curve_line.get_data()), abs=0.02)
    q, k = (complex(*xy) * np.exp(0.5j * pos) for xy, pos in ((Q, q_pos), (K, k_pos)))
    assert y == pytest.approx(q.real * k.real + q.imag * k.imag)


def test_widget_redraw_is_quick_enough_for_a_slider() -> None:
    """A slider that lags. Counted in time of this thread, which other programs do not lengthen much."""
    taken = []
    for query in range(8):
        started = time.thread_time()
        png_bytes(draw.two_hands(Q, K, 0.5, query, 5, 64), small=False)
        taken.append(1000 * (time.thread_time() - started))
    assert sorted(taken)[2] < 1.5 * WIDGET_LIMIT_MS


def test_layouts_join_the_two_of_a_pair() -> None:
    """Arcs of one layout drawn over the row of the other, or a number that lands in a wrong place."""
    ax = draw.layouts(8).axes[0]
    arcs = [patch for patch in ax.patches if isinstance(patch, PathPatch)]
    spans = [
        (path.vertices[0][0], path.vertices[-1][0], path.vertices[0][1] > 0.5)
        for path in (arc.get_path() for arc in arcs)
    ]
    assert spans == [(i, i + 4, True) for i in range(4)] + [(2 * i, 2 * i + 1, False) for i in range(4)]
    moves = [tuple(line.get_xdata()) for line in ax.lines]
    assert moves == [(0, 0), (1, 2), (2, 4), (3, 6), (4, 1), (5, 3), (6, 5), (7, 7)]
    names = [text.get_text() for text in ax.texts[:16]]
    assert names[:8] == [f"$a_{i}$" for i in range(4)] + [f"$b_{i}$" for i in range(4)]
    assert names[8:12] == ["$a_0$", "$b_0$", "$a_1$", "$b_1$"]


def test_labels_of_lines_that_end_together_are_apart() -> None:
    """Names of lines written over each other at the right end."""
    placed = draw.spread([0.3, 0.31, 0.1, 0.30], 0.05)
    assert placed[2] == 0.1
    assert np.diff(sorted(placed)).min() >= 0.05 - 1e-12
    assert placed[0] < placed[1]


def test_rounding_names_the_late_error() -> None:
    """The mean error over all positions, which the good early ones make look small."""
    score = np.array([1.0, 1.0, 3.0, 3.0])
    figure = extrapolation.rounding(1.0, [0, 1, 2, 3], {"bf16": score}, 5, 2)
    assert figure.axes[0].get_title() == "bf16\nerror from 2 on: 2"


def test_line_that_ends_early_keeps_its_name() -> None:
    """The learned table, which ends where it was trained, without a name."""
    figure = extrapolation.loss_by_length({"table": curve(2.4, 3), "rotary": curve(2.0)}, 32, [8, 64])
    assert {"table", "rotary"} <= {text.get_text() for text in figure.axes[0].texts}


def test_decoders_share_a_scale_and_keep_their_colours() -> None:
    """A small bump that looks as large as a disaster, since each panel has its own axis."""
    figure = extrapolation.extra_loss(
        {"A": np.array([0, 0.1, 0]), "B": np.ones(3), "C": np.zeros(3), "D": np.ones(3)}, 1
    )
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    assert [ax.lines[1].get_color() for ax in figure.axes] == COLOURS[:4]
    assert [ax.get_title() for ax in figure.axes] == [f"decoder {name}" for name in "ABCD"]
