"""Figures of chapter 03: what they show is what they were given."""

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch, Rectangle

from gpt2course.viz import attention as draw
from gpt2course.viz.show import png_bytes
from gpt2course.viz.widget import WIDGET_LIMIT_MS
from tests.viz.looks import outside

TOKENS = ["def", " f", "(", "x", "):", "\n"]
WEIGHTS = np.array([0.1, 0.6, 0.0, 0.3, 0.0, 0.0])


def boxes(ax: Axes) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def test_labels_show_white_space() -> None:
    """Four tokens of spaces that all look like nothing."""
    assert draw.token_labels([" ", " the", "\n", "\t"]) == ["·", "·the", "↵", "→"]


def test_matrix_prints_each_entry_in_its_place() -> None:
    """Rows and columns swapped, or the first row at the bottom."""
    figure = draw.matrix_panels({"m": [[0.0, 0.25, 1.0], [0.5, math.nan, 0.75]]}, ["a", "b"], ["x", "y", "z"])
    (ax,) = figure.axes
    entries = {text.get_position(): text.get_text() for text in ax.texts}
    assert entries == {(0, 0): "0.00", (1, 0): "0.25", (2, 0): "1.00", (0, 1): "0.50", (2, 1): "0.75"}
    assert ax.get_ylim() == (1.5, -0.5)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "y", "z"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_matrix_crosses_out_what_is_hidden() -> None:
    """A hidden key drawn like a weight of zero: nobody can tell a mask from a small number."""
    (ax,) = draw.matrix_panels({"m": [[0.0, math.nan]]}).axes
    zero, hidden = boxes(ax)
    assert to_hex(hidden.get_facecolor()) == draw.HIDDEN != to_hex(zero.get_facecolor())
    (ax,) = draw.matrix_panels({"head": [[1.0, math.nan], [0.25, 0.75]]}, ["x", "y"]).axes
    assert [text.get_text() for text in ax.texts] == ["1.00", "0.25", "0.75"]
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[1.0, 0.0]]]


def test_panels_share_their_colours() -> None:
    """The same colour for 0.5 in one panel and 0.9 in the next."""
    left, right = draw.matrix_panels({"a": [[0.5, 0.5]], "b": [[0.5, 1.0]]}).axes
    assert boxes(left)[0].get_facecolor() == boxes(right)[0].get_facecolor() != boxes(right)[1].get_facecolor()


@pytest.mark.parametrize("top", [0.0, 0.2, 0.4, 0.5, 0.55, 0.6, 0.8, 1.0])
def test_numbers_can_be_read_on_their_cell(top: float) -> None:
    """White digits on yellow. WCAG's contrast of 4.5 is asked for."""
    (ax,) = draw.matrix_panels({"m": [[0.0, top]]}, vmax=1).axes

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    paper = luminance(boxes(ax)[1].get_facecolor())
    ink = 1.0 if ax.texts[1].get_color() == "white" else 0.0
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) >= 4.5


@pytest.mark.parametrize("panels", [{}, {"a": [1.0, 2.0]}, {"a": [[1.0]], "b": [[1.0], [2.0]]}])
def test_matrix_refuses_what_does_not_fit(panels: dict) -> None:
    """Panels of unequal height, whose rows then stand beside other rows' labels."""
    with pytest.raises(ValueError, match="give matrices with equal rows"):
        draw.matrix_panels(panels)


def test_query_view_shows_only_what_the_query_may_see() -> None:
    """A widget of causality that draws a bar for the future."""
    weights = np.array([0.1, 0.6, 0.0, 0.3, 0.9, 0.9])
    figure = draw.query_view(TOKENS, weights, 3, "title")
    (ax,) = figure.axes
    *bars, future = boxes(ax)
    assert [bar.get_height() for bar in bars] == [0.1, 0.6, 0.0, 0.3]
    assert (future.get_x(), future.get_width()) == (3.5, 2)
    arcs = [patch for patch in ax.patches if isinstance(patch, PathPatch)]
    assert [arc.get_path().vertices[-1][0] for arc in arcs] == [0, 1], "an arc for each key with weight, but itself"
    assert arcs[1].get_linewidth() > arcs[0].get_linewidth()
    assert ax.get_title() == "title"


def test_last_query_has_no_future() -> None:
    """A grey sliver after the last token."""
    (ax,) = draw.query_view(TOKENS, WEIGHTS, 5).axes
    assert len(boxes(ax)) == len(TOKENS)


@pytest.mark.parametrize("query", [-1, 6])
def test_query_view_refuses_a_query_outside(query: int) -> None:
    """Position -1 taken for the last one."""
    with pytest.raises(ValueError, match="positions 0 to 5"):
        draw.query_view(TOKENS, WEIGHTS, query)


def test_query_view_refuses_weights_of_another_sentence() -> None:
    """The weights of one line over the tokens of another."""
    with pytest.raises(ValueError, match="one weight a token"):
        draw.query_view(TOKENS, WEIGHTS[:5], 0)


def test_query_view_is_quick(record_property: Callable[[str, object], None]) -> None:
    """A slider that lags. Counted in time of this thread, which other programs do not lengthen much."""
    tokens, taken = [f" t{i}" for i in range(20)], []
    for query in range(12, 19):
        started = time.thread_time()
        png_bytes(draw.query_view(tokens, np.full(20, 1 / (query + 1)), query))
        taken.append(1000 * (time.thread_time() - started))
    record_property("redraw_ms", round(sorted(taken)[3], 1))
    print(f"redraw of a query over 20 tokens: {sorted(taken)[3]:.0f} ms of work")
    assert sorted(taken)[3] < 1.5 * WIDGET_LIMIT_MS


def test_head_grid_hides_the_future_and_frames_the_marked() -> None:
    """The upper triangle drawn as weight zero, or the frame around the wrong head."""
    figure = draw.head_grid(np.full((3, 4, 4), 0.25), ["0.0", "0.1", "0.2"], columns=2, marked=[1])
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 3
    for i, ax in enumerate(shown):
        assert np.array_equal(np.ma.getmaskarray(ax.images[0].get_array()), ~np.tri(4, dtype=bool))
        assert ax.spines["left"].get_visible() == (i == 1)


def test_head_grid_names_the_bright_end_of_its_colours() -> None:
    """Small weights made bright, and nobody told that bright no longer means 1."""
    figure = draw.head_grid(np.full((1, 4, 4), 0.25), ["0.0"], columns=1, vmax=0.3)
    assert figure.axes[0].images[0].get_clim() == (0, 0.3)
    assert "0.3 and more" in figure.get_suptitle()


def test_scaling_uses_a_logarithmic_axis_only_where_it_must() -> None:
    """A weight between 0 and 1 on a logarithmic axis, where 0.1 looks like half."""
    study = {"variance": {"a": [4.0, 1000.0]}, "weight": {"a": [0.01, 0.9]}}
    assert [ax.get_yscale() for ax in draw.scaling([4, 1024], study).axes] == ["log", "linear"]


def test_cost_shows_median_and_spread() -> None:
    """The mean, which one slow run moves, or bars that leave the slow run out."""
    figure = draw.cost([64, 128], {"by hand": [[1, 2, 9], [3, 4, 5]]}, {"by hand": [1.0, 4.0]}, "a machine")
    left, right = figure.axes
    assert left.containers[0].lines[0].get_ydata().tolist() == [2, 4]
    ends = [segment[:, 1].tolist() for segment in left.containers[0].lines[2][0].get_segments()]
    assert ends == [[1, 9], [3, 5]]
    assert right.lines[1].get_ydata().tolist() == [1.0, 4.0], "the dotted line grows as T squared"


def test_loss_curves_name_each_line_at_its_end() -> None:
    """Labels exchanged between the curves."""
    (ax,) = draw.loss_curves({"A": [3.0, 2.0], "B": [3.0, 0.5]}, {"packed": 1.0}).axes
    labels = {text.get_text(): (text.get_position()[1], text.get_color()) for text in ax.texts}
    assert labels["A"] == (2.5, ax.lines[0].get_color())
    assert labels["B"] == (1.75, ax.lines[1].get_color())


FIGURES = {
    "matrix": lambda: draw.matrix_panels(
        {"one\ntwo": np.ones((6, 6)), "b": np.ones((6, 2))}, [" the long one", *TOKENS[1:]], decimals=2
    ),
    "query": lambda: draw.query_view([*TOKENS, " a longer one"], np.full(7, 0.1), 5, "layer 3, head 2"),
    "query of many": lambda: draw.query_view([" height"] * 24, np.full(24, 0.04), 20, "layer 3, head 2"),
    "grid": lambda: draw.head_grid(np.ones((9, 5, 5)), [f"11.{i}" for i in range(9)], columns=8, vmax=0.5),
    "scaling": lambda: draw.scaling([4, 16], {"a": {"x": [1, 99], "y": [1, 2]}, "b": {"x": [0, 1], "y": [1, 0]}}),
    "cost": lambda: draw.cost([4, 8], {"a": [[1, 2], [3, 4]]}, {"a": [1, 2]}, "a machine with a name"),
    "loss": lambda: draw.loss_curves({"A": [3, 2, 1], "B": [3, 1, 0.1]}, {"the same text packed by lzma": 1.1}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_off(name: str) -> None:
    """Titles and labels that run out of the picture."""
    assert not outside(FIGURES[name]())


def test_cut_text_would_be_found() -> None:
    """The check above that finds nothing, whatever is drawn."""
    figure = FIGURES["loss"]()
    figure.text(0.8, 0.5, "a label that is much too long for the room that is left to it")
    assert outside(figure)
