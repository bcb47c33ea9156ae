"""Figures and widgets as a notebook shows them."""

import io
import time
from base64 import b64decode

import ipywidgets
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from gpt2course.viz import show
from gpt2course.viz.show import png_bytes
from gpt2course.viz.style import COLOURS, FONT_SIZE, LINESTYLES, SEQUENTIAL, new_figure
from gpt2course.viz.widget import WIDGET_LIMIT_MS, Explorer

PNG = b"\x89PNG"


def draw_mask(query: int = 0, label: str = "mask") -> Figure:
    figure, ax = new_figure(width=5.0, height=4.0)
    ax.imshow(np.tri(64, 64, query), cmap=SEQUENTIAL)
    ax.set_title(label)
    return figure


def explorer() -> Explorer:
    return Explorer(draw_mask, alt="A mask.", query=ipywidgets.IntSlider(0, 0, 7), label=ipywidgets.Text("mask"))


def test_show_carries_its_alt_text() -> None:
    """A figure that a blind reader, or a page without pictures, knows nothing of."""
    data, metadata = show(draw_mask(), "A mask,\n  lower   triangle.")._repr_mimebundle_()
    assert b64decode(data["image/png"]).startswith(PNG)
    assert metadata == {"image/png": {"alt": "A mask, lower triangle."}}
    assert data["text/plain"] == "A mask, lower triangle."


@pytest.mark.parametrize("alt", ["", "  \n", None])
def test_alt_text_must_say_something(alt: str) -> None:
    """Alt text forgotten."""
    with pytest.raises(ValueError, match="say in a sentence"):
        show(draw_mask(), alt)
    with pytest.raises(ValueError, match="say in a sentence"):
        Explorer(draw_mask, alt=alt, query=ipywidgets.IntSlider(0, 0, 7))


def test_png_bytes_repeat() -> None:
    """A date or a version in the PNG, so that a refresh changes every figure in the history."""
    first, second = show(draw_mask(), "x").png, show(draw_mask(), "x").png
    assert first == second
    assert b"Software" not in first
    assert b"matplotlib" not in first


def test_palette_changes_no_colour_that_one_could_see() -> None:
    """A palette that turns the white page grey, or a pale colour into another."""
    figure, ax = new_figure()
    for colour, shift in zip(COLOURS, range(len(COLOURS)), strict=True):
        ax.plot([shift, shift + 1], color=colour, label=colour)
    ax.legend()
    exact, packed = png_bytes(figure, small=False), png_bytes(figure)
    assert len(packed) < 0.6 * len(exact)
    before, after = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int) for png in (exact, packed))
    assert (after[0, 0] == 255).all()
    assert np.abs(after - before).max() <= 8


def test_an_image_keeps_every_colour() -> None:
    """A colour map in steps, where there were none in the data."""
    figure = draw_mask()
    assert png_bytes(figure) == png_bytes(figure, small=False)


def test_figures_leave_no_global_state() -> None:
    """Figures that pile up in pyplot, which keeps every one alive."""
    before = pyplot.get_fignums()
    new_figure(2, 2)
    assert pyplot.get_fignums() == before


def test_titles_are_as_large_as_other_text() -> None:
    """Titles at matplotlib's 12 points, which run into their neighbours' in a row of panels."""
    _, (left, right) = new_figure(1, 2)
    assert left.set_title("after the prompt").get_fontsize() == FONT_SIZE
    assert right.set_title("after the prompt", fontsize=7).get_fontsize() == 7
    _, polar = new_figure(subplot_kw={"projection": "polar"})
    assert polar.name == "polar"


def test_lines_differ_in_dash_and_colour() -> None:
    """Lines that only colour tells apart."""
    _, ax = new_figure()
    lines = [ax.plot([0, 1])[0] for _ in COLOURS]
    assert len(COLOURS) == len(LINESTYLES) == len({line.get_color() for line in lines})
    patterns = {str(line._dash_pattern) for line in lines}
    assert len(patterns) == len(lines)


def test_widget_shows_a_picture_without_a_kernel() -> None:
    """`interact`, saved, shows nothing on a page."""
    widget = explorer()
    data, metadata = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert b64decode(data["image/png"]) == show(draw_mask(), "x").png
    assert metadata == {"image/png": {"alt": "A mask."}}
    widget.controls["query"].value = 3
    assert b64decode(widget._repr_mimebundle_()[0]["image/png"]) == show(draw_mask(3), "x").png


def test_widget_redraws_when_a_control_moves() -> None:
    """A slider that moves and a picture that does not."""
    widget = explorer()
    before = widget.image.value
    widget.controls["query"].value = 5
    assert widget.image.value != before
    assert widget.values == {"query": 5, "label": "mask"}


def test_widget_shows_an_error_and_recovers() -> None:
    """An exception in a callback vanishes, and the old picture is taken for the new one."""

    def draw(n: int) -> Figure:
        if n == 3:
            raise ValueError("three is too many")
        return draw_mask(n)

    widget = Explorer(draw, alt="A mask.", n=ipywidgets.IntSlider(0, 0, 7))
    widget.controls["n"].value = 3
    assert "ValueError: three is too many" in widget.message.value
    widget.controls["n"].value = 4
    assert widget.message.value == ""


def test_widget_names_its_controls() -> None:
    """A slider without a name beside it; ipywidgets shows none unless it is told."""
    widget = Explorer(draw_mask, alt="A mask.", query=ipywidgets.IntSlider(0, 0, 7))
    assert widget.controls["query"].description == "query"
    named = Explorer(draw_mask, alt="A mask.", query=ipywidgets.IntSlider(0, 0, 7, description="query row"))
    assert named.controls["query"].description == "query row"


def test_widget_s_image_has_no_tooltip() -> None:
    """An Image with a tooltip: JupyterLab shows "Click to show javascript error" in its place (ipywidgets 8.1)."""
    assert explorer().image.tooltip is None


def test_widget_without_controls_is_refused() -> None:
    """A widget that nothing can move."""
    with pytest.raises(ValueError, match="no controls"):
        Explorer(draw_mask, alt="A mask.")


def test_redraw_is_quick() -> None:
    """A slider that lags behind the hand. Counted in time of this thread, which other programs do not lengthen much."""
    widget = explorer()
    worked, waited = [], []
    for query in (1, 2, 3, 4, 5):
        started = time.thread_time(), time.perf_counter()
        widget.controls["query"].value = query
        worked.append(1000 * (time.thread_time() - started[0]))
        waited.append(1000 * (time.perf_counter() - started[1]))
    print(f"redraw of a 64x64 mask: {sorted(worked)[2]:.0f} ms of work, {sorted(waited)[2]:.0f} ms by the clock")
    assert sorted(worked)[2] < 1.5 * WIDGET_LIMIT_MS
