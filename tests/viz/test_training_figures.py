"""The figures of training put every number where it belongs, and keep what is equal apart from what is nearly so."""

import math
from typing import Any

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.figure import Figure

from gpt2course.viz import live, training
from gpt2course.viz.show import png_bytes
from gpt2course.viz.style import new_figure


def lines(ax: Any) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in ax.lines}


def test_the_overlay_shows_each_curve_and_its_distance() -> None:
    """A difference against the wrong curve, with a sign that the log scale drops, or drawn for the reference too."""
    curves = {"single": [3.0, 2.0, 1.0], "ddp": [3.0, 2.0 - 1e-6, 1.0 + 1e-4], "short": [3.5]}
    figure = training.curves_and_difference(curves, "single", tolerance=2e-6)
    top, bottom = figure.axes
    assert {name: lines(top)[name] for name in curves} == curves
    drawn = [list(line.get_ydata()) for line in bottom.lines if line.get_marker() != "None"]
    assert drawn[0][1:] == pytest.approx([1e-6, 1e-4], rel=1e-3)
    assert drawn[1] == [0.5]
    assert len(drawn) == 2
    assert any(list(line.get_ydata()) == [2e-6, 2e-6] for line in bottom.lines)
    assert top.get_xlim() == bottom.get_xlim()


def test_equal_is_a_place_of_its_own_below_every_difference() -> None:
    """Zeros that a log scale leaves out, so that runs which are equal look like runs that were never compared."""
    figure = training.curves_and_difference({"a": [1.0, 1.0], "b": [1.0, 1.0 + 1e-9]}, "a")
    bottom = figure.axes[1]
    floor, near = next(line for line in bottom.lines if line.get_marker() != "None").get_ydata()
    assert 0 < floor < 1e-9 <= near * 1.001
    assert next(label.get_text() for label in bottom.get_yticklabels()) == "equal"
    assert bottom.get_yticks()[0] == floor
    assert bottom.get_ylim()[0] < floor
    same = training.curves_and_difference({"a": [1.0], "b": [1.0]}, "a").axes[1]
    assert same.get_ylim()[0] < same.lines[-1].get_ydata()[0] < same.get_ylim()[1]


def test_a_curve_with_a_nan_is_still_drawn() -> None:
    """The run that diverged, which is the one to look at, ending in an error of the axis."""
    png_bytes(training.curves_and_difference({"a": [1.0, 2.0], "b": [1.5, math.nan]}, "a"))


@pytest.mark.parametrize("curves", [{"a": [1.0]}, {"b": [1.0], "c": [1.0]}])
def test_an_overlay_needs_its_reference_and_something_to_compare(curves: dict[str, list[float]]) -> None:
    """A typing error in a name that shows as a curve compared with itself."""
    with pytest.raises(ValueError, match="reference is 'a', the curves are"):
        training.curves_and_difference(curves, "a")


def test_the_running_mean_has_no_lag_at_its_start() -> None:
    """A smooth curve that starts at 0 and hides the first loss."""
    assert training.running_mean([4.0, 4.0, 4.0]) == pytest.approx([4.0] * 3)
    assert training.running_mean([1.0, 2.0], past=0.5) == pytest.approx([1.0, 5 / 3])


def test_losses_start_at_step_one() -> None:
    """Held-out dots one step beside the loss they belong to; an axis that grows under the reader's eyes."""
    figure = training.loss_curve([5.0, 4.0], steps=10, held_out={2: 4.5}, rates=[0.1, 0.2])
    top, bottom = figure.axes
    dots = next(line for line in top.lines if line.get_label() == "held out")
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == ([2], [4.5])
    assert list(top.lines[0].get_xdata()) == [1, 2]
    assert top.get_xlim()[1] >= 10
    assert list(bottom.lines[0].get_ydata()) == [0.1, 0.2]
    plain = training.loss_curve([5.0, 4.0], mean=False).axes[0]
    assert lines(plain) == {"each step": [5.0, 4.0]}


def test_shares_are_drawn_with_their_error() -> None:
    """A share of no lines at all that divides by zero; an error bar of the wrong size."""
    figure = training.learning([3.0, 2.0], {0: (0, 0), 2: (20, 100)}, {"text": 0.7}, steps=2)
    bottom = figure.axes[1]
    low, high = bottom.containers[0].lines[2][0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((0.2 - 0.04, 0.2 + 0.04))
    assert lines(bottom)["text"] == [0.7, 0.7]
    assert bottom.get_ylim() == (0, 1.03)


def test_the_range_test_marks_the_lowest_loss_and_the_suggestion() -> None:
    """A loss that ends in NaN or in thousands, and presses everything else flat."""
    rates, smooth = [1e-3, 1e-2, 1e-1, 1.0], [5.0, 3.0, 900.0, math.nan]
    ax = training.range_test(rates, smooth, smooth, 1e-3).axes[0]
    assert "lowest, at 1.0e-02" in lines(ax)
    assert lines(ax)["lowest, at 1.0e-02"] == [3.0]
    assert 5.0 < ax.get_ylim()[1] < 10
    assert "suggested: 1.0e-03" in lines(ax)
    assert [text.get_text() for text in ax.texts] == ["↑ up to 900"]
    assert not training.range_test(rates, [5.0, 3.0, 4.0, 5.0], [5.0, 3.0, 4.0, 5.0]).axes[0].texts


def test_what_a_format_loses_is_hatched() -> None:
    """Numbers that become zero counted among those that are kept: below half the smallest everything rounds to 0."""
    values = 2.0 ** np.array([-30.5, -25.5, -24.5, -10.5, -10.5, 3.5])
    figure = training.magnitudes({"all": values}, smallest=2.0**-24, largest=65504.0, normal=2.0**-14)
    bars = figure.axes[0].patches
    lost = sum(bar.get_height() for bar in bars if bar.get_hatch())
    assert lost == pytest.approx(2 / 6)
    assert sum(bar.get_height() for bar in bars) == pytest.approx(1.0)
    half = np.float32(values).astype(np.float16)
    assert lost == pytest.approx((half == 0).mean())
    places = {text.get_text().strip(): text.xy[0] for text in figure.axes[0].texts}
    assert (places["half of it: becomes 0"], places["smallest"]) == (-25, -24)


def test_schedules_and_norms_have_a_line_a_name() -> None:
    """A line missing, or two that can't be told apart without colour."""
    ax = training.schedules({"cosine": [0.1, 0.2], "wsd": [0.2, 0.1]}, warmup_steps=1).axes[0]
    assert len({str(line.get_linestyle()) for line in ax.lines[:2]}) == 2
    left, right = training.loss_and_norm({"A": [(3.0, 1.0)], "B": [(2.0, 4.0)]}, clip=1.0).axes
    assert lines(left)["B"] == pytest.approx([2.0])
    assert lines(right)["B"] == pytest.approx([4.0])
    assert right.get_yscale() == "log"


class Drawn:
    """Counts how often the figure was asked for."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Figure:
        self.times += 1
        return new_figure(height=1.0)[0]


def test_a_live_picture_is_replaced_and_keeps_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook with a hundred pictures of one run, or one without alt text."""
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    monkeypatch.setattr(live, "LEAST_WORK", 0)
    InteractiveShell.instance()
    draw = Drawn()
    with capture_output() as captured, live.Live(draw, "the loss falls", total=3) as shown:
        for step in range(3):
            shown.update(step + 1)
    InteractiveShell.clear_instance()
    assert draw.times == 4
    new = [out for out in captured.outputs if not out.update]
    pictures = [out for out in new if "image/png" in out.data]
    assert len(pictures) == 1
    assert pictures[0].metadata["image/png"]["alt"] == "the loss falls"
    assert sum("image/png" in out.data for out in captured.outputs) == 4
    assert "the loss falls" in new[-1].data["text/html"]
    texts = [out.data["text/plain"] for out in captured.outputs if "<progress" in out.data.get("text/html", "")]
    assert texts[0] == "0 of 3 steps"
    assert "a second, 0 s left" in texts[-2]
    assert texts[-1].startswith("3 of 3 steps in ")


def test_a_live_picture_is_not_drawn_at_every_step() -> None:
    """A run that spends its time on drawing: within a second there is the last picture only."""
    draw = Drawn()
    with capture_output(), live.Live(draw, "the loss falls", total=50) as shown:
        for step in range(50):
            shown.update(step + 1)
    assert draw.times <= 2
    with pytest.raises(ValueError, match="alt is"):
        live.Live(draw, " ", total=1)
