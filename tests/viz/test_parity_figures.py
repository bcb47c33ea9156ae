"""Figures of chapter 05 say what the data says."""

import math

import numpy as np
import pytest

from gpt2course.viz.parity import FLOOR, bytes_by_part, impostors, parity_microscope
from gpt2course.viz.sampling import cache_times, next_tokens


def names(n_layer: int) -> list[str]:
    parts = ["ln_1", "attn.c_attn", "attn.weights", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj"]
    blocks = [f"h.{i}.{part}" for i in range(n_layer) for part in parts] + [f"h.{i}" for i in range(n_layer)]
    return ["wte", "wpe", *blocks, "ln_f", "lm_head"]


def test_the_first_wrong_step_is_framed_in_its_place() -> None:
    """A microscope that frames the largest difference, or the wrong square, sends the reader to the wrong layer."""
    differences = dict.fromkeys(names(3), 0.0)
    differences |= {"h.1.attn.c_proj": 0.02, "h.1.ln_2": 0.5, "lm_head": 9.0}
    ax = parity_microscope(differences, n_layer=3).axes[0]
    (frame,) = ax.patches
    assert (frame.get_x() + 0.5, frame.get_y() + 0.5) == (2, 3)  # column of block 1, row of attn.c_proj
    assert "first off at h.1.attn.c_proj" in ax.get_title(loc="left")


def test_equal_models_get_no_frame_and_nan_counts_as_wrong() -> None:
    """NaN compares false with every limit, and a map that calls it right hides the worst bug of all."""
    right = dict.fromkeys(names(2), 0.0)
    ax = parity_microscope(right, n_layer=2).axes[0]
    assert not ax.patches
    assert "nothing beyond" in ax.get_title(loc="left")
    broken = right | {"h.0.mlp.act": math.nan}
    assert "first off at h.0.mlp.act" in parity_microscope(broken, n_layer=2).axes[0].get_title(loc="left")


def test_an_unrevealed_map_does_not_give_the_answer_away() -> None:
    """A lab whose picture names the culprit in its title."""
    differences = dict.fromkeys(names(3), 0.0) | {"h.1.ln_2": 0.5}
    ax = parity_microscope(differences, n_layer=3, title="where?", reveal=False).axes[0]
    assert not ax.patches
    assert ax.get_title(loc="left") == "where?"


def test_the_map_shows_the_numbers_it_was_given() -> None:
    """Columns shifted by one because of the embedding column."""
    differences = dict.fromkeys(names(2), 0.0) | {"h.1.ln_2": 0.25}
    shown = parity_microscope(differences, n_layer=2).axes[0].images[0].get_array()
    assert shown is not None
    assert shown[4, 2] == pytest.approx(0.25)
    assert float(np.nanmax(np.delete(shown[4], 2))) == pytest.approx(FLOOR)


def test_bars_are_as_long_as_the_bytes() -> None:
    """A bar chart in the wrong unit."""
    (ax,) = bytes_by_part({"wte": 3_000_000, "wpe": 1_000_000}).axes
    assert [patch.get_width() for patch in ax.patches] == [3.0, 1.0]
    assert "75%" in ax.texts[0].get_text()


def test_removed_tokens_are_crossed_and_kept_ones_are_not() -> None:
    """Bars of removed tokens that look merely small."""
    figure = next_tokens(["a", "b", "c"], np.array([0.5, 0.3, 0.2]), np.array([0.7, 0.3, 0.0]), "t")
    crosses = [text for text in figure.axes[0].texts if text.get_text() == "×"]
    assert len(crosses) == 1
    assert crosses[0].get_position()[0] == pytest.approx(2.2)


def test_every_repeat_is_a_dot_and_the_line_is_the_median() -> None:
    """A mean drawn as the typical time lets one hiccup tell the story."""
    figure = cache_times([16, 32], {"cache": [[0.001, 0.002, 0.1], [0.003, 0.004, 0.2]]}, "a machine")
    line, *dots = figure.axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([2.0, 4.0])
    assert sum(len(dot.get_xdata()) for dot in dots) == 6


def test_impostors_draw_a_zero_rise() -> None:
    """A zero rise on a log axis must not make the figure fail."""
    figure = impostors({"a": 0.0, "b": 1.0}, {"a": 0.01, "b": 2.0})
    assert [text.get_text() for text in figure.axes[1].texts] == ["0", "1"]


def test_a_step_that_is_missing_has_no_label() -> None:
    """White letters on the white of a square that holds nothing."""
    differences = dict.fromkeys(names(2), 0.0)
    del differences["wpe"]
    texts = [text.get_text() for text in parity_microscope(differences, n_layer=2).axes[0].texts]
    assert texts == ["wte", "ln_f", "logits"]
