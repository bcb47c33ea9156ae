"""Figures of chapter 00 say what the data says."""

import numpy as np
import pytest

from gpt2course.viz.start import course_map, next_tokens, percent, rounded_up, spread


@pytest.mark.parametrize("largest", [1.0, 0.93, 0.2, 0.1, 0.031, 0.001, 2.1e-5])
def test_the_longest_bar_fills_at_least_two_fifths_of_its_scale(largest: float) -> None:
    """A still picture of slivers, or a bar that runs out of its axes."""
    figure = next_tokens({"a": [("x", largest), ("y", largest / 2)], "b": [("z", largest / 4)]})
    limit = rounded_up(largest)
    assert 0.4 * limit <= largest <= limit * (1 + 1e-9)
    assert limit <= 1
    for ax in figure.axes:
        assert ax.get_xlim() == pytest.approx((0, 1.2 * limit))
    widths = [bar.get_window_extent().width for bar in figure.axes[0].patches]
    assert widths[0] == pytest.approx(2 * widths[1])


def test_small_probabilities_keep_two_digits() -> None:
    """Bars of different lengths that are all labelled 0.0%."""
    chances = [0.473, 0.1, 0.0281, 0.003, 0.000213, 1e-9, 0.0]
    assert [percent(chance) for chance in chances] == ["47%", "10%", "2.8%", "0.30%", "0.021%", "<0.001%", "<0.001%"]


def test_the_map_has_an_arrow_into_and_out_of_every_box() -> None:
    """A map whose arrows carry the neighbour's words."""
    texts = [text.get_text() for text in course_map([("01", "a"), ("02", "b")], ["in", "between", "out"]).axes[0].texts]
    assert [text for text in texts if text] == ["01", "a", "02", "b", "in", "between", "out"]
    with pytest.raises(ValueError, match="2 flows for 2 stations; there must be 3"):
        course_map([("01", "a"), ("02", "b")], ["in", "out"])


def test_every_measurement_is_a_dot_and_the_label_is_the_median() -> None:
    """A mean that one slow run spoils, shown as what is usual."""
    ax = spread({"fast": [1.0, 2.0, 90.0], "slow": [0.1, 0.2, 0.3]}, "GFLOP/s").axes[0]
    assert [np.shape(dots.get_offsets())[0] for dots in ax.collections] == [3, 3]
    assert [text.get_text() for text in ax.texts] == ["2", "0.2"]
