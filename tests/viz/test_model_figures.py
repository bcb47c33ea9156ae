"""The figures of chapter 04 show the numbers they are given, and redraw fast enough for a slider."""

import math
import time

import numpy as np
import pytest
from matplotlib.figure import Figure

from gpt2course.viz import model as draw
from gpt2course.viz.show import png_bytes
from gpt2course.viz.style import COLOURS
from gpt2course.viz.widget import WIDGET_LIMIT_MS

PARTS = {"token embedding": 400, "position table": 8, "attention": 200, "MLP": 390, "layer norms": 2}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def lens(P: int, L: int) -> Figure:
    right_PL = np.zeros((P, L), dtype=bool)
    right_PL[0, 1] = True
    words = [[f" w{p}{depth}" for depth in range(L)] for p in range(P)]
    sure_PL = np.linspace(0, 1, P * L).reshape(P, L)
    return draw.logit_lens([f"t{p}" for p in range(P)], words, sure_PL, [str(i) for i in range(L)], right_PL)


def test_a_band_holds_every_run_and_the_line_is_their_mean() -> None:
    """A spread that shows only some runs, or a first run passed off as the mean."""
    runs = np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 0.0]])
    ax = draw.curves([draw.Panel("t", "x", "y", [draw.Curve("a", [0, 1, 2], runs)])]).axes[0]
    assert ax.lines[0].get_ydata().tolist() == [2.0, 2.0, 3.0]
    corners = {tuple(point) for point in ax.collections[0].get_paths()[0].vertices.tolist()}
    assert {(0.0, 1.0), (0.0, 3.0), (2.0, 0.0), (2.0, 6.0)} <= corners


def test_lines_differ_in_dash_as_well_as_colour() -> None:
    """Curves that a colour-blind reader, or a printed page, cannot tell apart."""
    lines = [draw.Curve(name, [0, 1], [1, 2]) for name in "abcd"]
    found = draw.curves([draw.Panel("t", "x", "y", lines)]).axes[0].lines
    assert len({line.get_color() for line in found}) == len({str(line.get_linestyle()) for line in found}) == 4


def test_a_level_line_stands_at_its_value_and_in_the_legend() -> None:
    """A reference such as ln V drawn at another height than the text says."""
    panel = draw.Panel("t", "x", "y", [draw.Curve("a", [0, 1], [1, 2])], level=("ln V", math.log(50257)))
    ax = draw.curves([panel]).axes[0]
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(10.825, abs=1e-3)
    assert "ln V" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_logarithmic_depth_axis_names_the_depths_measured() -> None:
    """Powers of two nobody measured on the axis, and 48 missing from it."""
    panel = draw.Panel("t", "x", "y", [draw.Curve("a", [2, 16, 48], [1, 2, 3])], log="x")
    labels = [label.get_text() for label in draw.curves([panel]).axes[0].get_xticklabels()]
    assert labels == ["2", "16", "48"]


def test_a_narrow_logarithmic_axis_has_plain_numbers() -> None:
    """`3 x 10^0` on an axis from 2 to 40, where a reader looks for a loss of 5."""
    figure = draw.curves([draw.Panel("t", "x", "y", [draw.Curve("a", [0, 1], [2.5, 40])], log="y")])
    png_bytes(figure)
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {"5", "10", "20"} <= set(shown)


def test_no_panel_is_refused() -> None:
    """An empty picture in place of a word on what is missing."""
    with pytest.raises(ValueError, match="no panels"):
        draw.curves([])


def test_wiring_draws_the_norm_on_the_branch_or_on_the_stream() -> None:
    """The one picture of the chapter, with its norms in the wrong place."""
    figure = draw.block_wiring(("pre-norm", "post-norm"))
    heights = [{text.get_text(): text.get_position()[1] for text in ax.texts} for ax in figure.axes]
    assert heights[0]["ln_1"] == heights[0]["attention"] > 1
    assert heights[1]["ln_1"] == heights[1]["ln_2"] < 0.1
    for ax in figure.axes:
        order = {text.get_text(): text.get_position()[0] for text in ax.texts}
        assert order["x"] < order["attention"] < order["MLP"] < order["x'"]
    with pytest.raises(ValueError, match="sideways"):
        draw.block_wiring(("sideways",))


def test_steps_label_every_bar_with_its_number() -> None:
    """Bars of one row under the name of another."""
    steps = {"before": np.array([[1.0, 2.0], [3.0, 4.0]]), "after": np.array([[-1.0, 1.0], [-0.25, 0.25]])}
    figure = draw.steps_of_a_row(steps, ["token 0", "token 1"])
    assert [ax.get_title() for ax in figure.axes] == ["before", "after"]
    assert [bar.get_height() for bar in figure.axes[0].patches] == [1, 2, 3, 4]
    assert texts(figure)[:4] == ["1", "2", "3", "4"]


def test_activations_draw_the_difference_by_itself() -> None:
    """A difference of 5e-4 on the scale of the functions, where it is a flat line."""
    x_N = np.linspace(-3, 3, 31)
    figure = draw.activations(x_N, {"one": x_N, "two": x_N + 4e-4}, np.full(31, 4e-4))
    left, right = figure.axes
    assert len(left.lines) == 2
    assert right.lines[0].get_ydata().max() == 4e-4
    assert right.get_ylim()[1] < 1e-3


def test_parameter_bars_add_up_to_the_model() -> None:
    """A part left out of the bar, or shares that do not make 100 %."""
    figure = draw.parameter_bars({"small": PARTS, "large": {name: 3 * count for name, count in PARTS.items()}})
    counts, shares = figure.axes
    ends = [bar.get_x() + bar.get_width() for bar in counts.patches]
    assert max(ends) == pytest.approx(3e-3)
    assert max(bar.get_x() + bar.get_width() for bar in shares.patches) == pytest.approx(100)
    assert [label.get_text() for label in counts.get_yticklabels()] == ["small", "large"]
    assert counts.get_yticks()[0] > counts.get_yticks()[1], "the first model stands on top"
    assert "40 %" in texts(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(PARTS)


def test_every_part_has_a_colour_of_its_own() -> None:
    """Two parts in one colour, told apart by nobody."""
    bars = draw.model_budget(PARTS, {"weights": 1.0}, "a model").axes[0].patches
    assert len({bar.get_facecolor() for bar in bars}) == len(PARTS)


def test_budget_shows_numbers_beside_the_names() -> None:
    """A bar whose smallest part can be neither seen nor read."""
    figure = draw.model_budget(PARTS, {"weights": 2.0, "gradients": 2.0}, "a model")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend[-1] == "layer norms 2e-06"
    assert texts(figure)[-2:] == ["weights\n2 GB", "gradients\n2 GB"]
    assert figure.axes[1].get_title().startswith("4 gigabytes")
    large = draw.model_budget({"MLP": 3_000_000_000}, {"weights": 12.0}, "")
    assert "3 billion parameters" in large.axes[0].get_title()


def test_budget_redraws_fast_enough_for_a_slider() -> None:
    """A slider that lags. The fastest of five draws, as other programs use this machine too."""
    memory = dict.fromkeys(("weights", "gradients", "Adam, first moment", "Adam, second moment"), 0.5)
    took = []
    for _ in range(5):
        start = time.process_time()
        png_bytes(draw.model_budget(PARTS, memory, "1,000 parameters"), small=False)
        took.append(1000 * (time.process_time() - start))
    assert min(took) < WIDGET_LIMIT_MS, f"{min(took):.0f} ms"


def test_lens_puts_words_on_their_depth_and_frames_the_right_ones() -> None:
    """A table that is turned round: depths for tokens."""
    figure = lens(3, 5)
    ax = figure.axes[0]
    placed = {text.get_text(): text.get_position() for text in ax.texts}
    assert placed["\u00b7w21"] == (1, 2)
    (frame,) = ax.patches
    assert frame.get_x() < 1 < frame.get_x() + frame.get_width()
    assert frame.get_y() < 0 < frame.get_y() + frame.get_height()
    assert ax.images[0].get_array().shape == (3, 5)


@pytest.mark.parametrize(
    ("token", "shown"), [(" the", "\u00b7the"), ("\n\n", "\u21b5\u21b5"), ("x" * 20, "x" * 8 + "\u2026")]
)
def test_tokens_are_made_visible(token: str, shown: str) -> None:
    """Tokens of spaces and line ends that look like nothing, or words that run over their cell."""
    assert draw.visible(token) == shown


def test_dollar_signs_do_not_start_mathematics() -> None:
    """A pair of dollar signs in the tokens makes matplotlib read what is between them as a formula, and fail."""
    words = [["$\\frac$", "$x"]]
    png_bytes(draw.logit_lens(["$"], words, np.array([[0.1, 0.9]]), ["a", "b"], np.zeros((1, 2), dtype=bool)))


def test_figures_are_the_same_bytes_each_time() -> None:
    """Notebooks that differ after every run, though nothing changed."""
    assert png_bytes(draw.block_wiring()) == png_bytes(draw.block_wiring())
    assert png_bytes(lens(2, 2)) == png_bytes(lens(2, 2))
    assert COLOURS[0] == draw.STREAM
