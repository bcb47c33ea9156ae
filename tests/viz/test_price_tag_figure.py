"""The figure of the price tag puts every number where it belongs."""

import pytest

from gpt2course.prices import Prices, Row, Settings, Speed
from gpt2course.viz.price_tag import price_tag_figure


def row(name: str, after: float, healed: float, per_token: int, fixed: int, ratio: float) -> Row:
    speeds = tuple(Speed(b, 100.0, 100.0, ratio, ratio - 0.1, ratio + 0.2, 5, 1, "here") for b in (1, 16))
    return Row(name, "", 1, per_token, fixed, after, healed, (1.0,), 0.1, "here", speeds)


ROWS = (
    row("unchanged", 6.6, 6.8, 6144, 0, 1.0),
    row("MQA, mean", 72.5, 7.74, 1536, 0, 1.4),
    row("window 128", 9.1, 7.0, 0, 786_432, 1.3),
)


def prices(rows: tuple[Row, ...] = ROWS) -> Prices:
    return Prices("", "", "", Settings(), "", "", "a text", 6.6, 512, rows)


def test_dots_bars_and_numbers_agree_with_the_rows() -> None:
    """After and healed exchanged, a bar of another retrofit."""
    perplexity, cache, speed = price_tag_figure(prices()).axes
    after, healed = perplexity.lines[:2]
    assert list(after.get_xdata()) == [6.6, 72.5, 9.1]
    assert list(healed.get_xdata()) == [6.8, 7.74, 7.0]
    assert [line.get_xdata()[0] for line in perplexity.lines[2:]] == [6.6, 6.8]
    assert after.get_label() == "right after surgery"
    assert healed.get_label() == "after 200 healing steps"
    assert [label.get_text() for label in perplexity.get_yticklabels()] == ["unchanged", "MQA, mean", "window 128"]
    assert [bar.get_width() for bar in cache.patches] == [6144, 1536, 1536]
    assert [text.get_text() for text in cache.texts] == ["6,144", "1,536", "1,536"]
    assert [text.get_text() for text in perplexity.texts] == ["6.60", "6.80", "72.50", "7.74", "9.10", "7.00"]
    for container in speed.containers:
        assert list(container.lines[0].get_xdata()) == [1.0, 1.4, 1.3]
        low, high = container.lines[2][0].get_segments()[1][:, 0]
        assert (low, high) == pytest.approx((1.3, 1.6))


def test_the_first_row_is_on_top_and_every_number_inside() -> None:
    """A control at the bottom, numbers beside the outermost dots cut off at the edge."""
    figure = price_tag_figure(prices())
    figure.canvas.draw()
    perplexity = figure.axes[0]
    bottom, top = perplexity.get_ylim()
    assert bottom > top
    box = perplexity.get_window_extent()
    for text in perplexity.texts:
        assert box.x0 <= text.get_window_extent().x0
        assert text.get_window_extent().x1 <= box.x1


def test_a_single_row_is_a_figure_too() -> None:
    """A campaign stopped after the control, where nothing spans the axis."""
    same = row("unchanged", 6.6, 6.6, 6144, 0, 1.0)
    low, high = price_tag_figure(prices((same,))).axes[0].get_xlim()
    assert low < 6.6 < high
