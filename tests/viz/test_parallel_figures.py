"""The figures of data parallel training show the numbers they were given."""

import pytest

from gpt2course.viz import parallel as draw
from gpt2course.viz.parallel import Span


def boxes(ax: object) -> list[tuple[float, float, float, float]]:
    """x, y, width and height of every box of an axes, from left to right in each lane."""
    extents = [path.get_extents() for collection in ax.collections for path in collection.get_paths()]
    found = [(e.x0, e.y0, e.width, e.height) for e in extents]
    return sorted(found, key=lambda box: (round(box[1]), box[0]))


def test_each_token_has_a_bar_as_high_as_its_weight() -> None:
    """Bars of one process on top of another's, or the panels on two scales, which would hide the difference."""
    figure = draw.token_weights({"right": [[0.2] * 3, [0.2] * 2], "wrong": [[0.1] * 3, [0.3] * 2]})
    right, wrong = figure.axes
    assert [bar.get_height() for bar in wrong.patches] == [0.1, 0.1, 0.1, 0.3, 0.3]
    assert len({bar.get_x() for bar in right.patches}) == 5
    assert right.get_ylim() == wrong.get_ylim()
    assert [text.get_text() for text in figure.legends[0].texts] == ["rank 0: 3 tokens", "rank 1: 2 tokens"]


def test_the_ring_frames_what_is_sent() -> None:
    """A frame around another chunk than the one that leaves, in the figure from which the rule is learnt."""
    held = [[[0], [0, 1], [0]], [[1], [1], [1, 2]], [[0, 2], [2], [2]]]
    ax = draw.ring(held, sends=[1, 2, 0], title="here").axes[0]
    frames = [patch for patch in ax.patches if not patch.get_fill()]
    centres = {(int(p.get_x() + p.get_width() / 2), int(p.get_y() + p.get_height() / 2)) for p in frames}
    assert centres == {(1, 0), (2, 1), (0, 2)}
    words = [text.get_text() for text in ax.texts]
    assert [word for word in words if "↓" in word] == ["0+1  ↓", "1+2  ↓", "0+2  ↓"]
    assert ax.get_title(loc="left") == "here"
    done = draw.ring(held).axes[0]
    assert all(patch.get_fill() for patch in done.patches)


def test_bytes_are_drawn_as_given() -> None:
    """A line that belongs to the other label."""
    ax = draw.bytes_sent([2, 4], {"all": [1, 3], "ring": [1, 1.5]}).axes[0]
    assert {line.get_label(): list(line.get_ydata()) for line in ax.lines[:2]} == {"all": [1, 3], "ring": [1, 1.5]}


def test_spans_that_overlap_do_not_hide_each_other() -> None:
    """Two all-reduces under way at once, of which only the later one was seen."""
    spans = [
        Span("backward", 0, 10, "3"),
        Span("all-reduce", 2, 6),
        Span("all-reduce", 4, 8),
        Span("all-reduce", 9, 12),
    ]
    figure = draw.timeline({"a": spans, "b": [Span("backward", 0, 30), Span("all-reduce", 30, 31)]})
    first, second = figure.axes
    (x, _, width, _), *sends = boxes(first)
    assert (x, width) == (0, 10)
    assert [(x, width) for x, _, width, _ in sends] == [(2, 4), (4, 4), (9, 3)]
    (_, y0, _, height), (_, y1, _, _), (_, y2, _, _) = sends
    assert y1 >= y0 + height
    assert y2 == y0
    assert first.get_title(loc="left") == "a: 12 ms"
    assert first.get_xlim() == second.get_xlim()
    assert first.lines[0].get_xdata()[0] == 12


def test_many_thin_spans_keep_their_colour() -> None:
    """Fifty all-reduces at once: white edges around boxes a pixel high left a white lane."""
    spans = [Span("backward", 0, 10), *(Span("all-reduce", i / 10, 20) for i in range(50))]
    ax = draw.timeline({"a": spans}).axes[0]
    assert len(boxes(ax)) == 51
    assert all(not len(lane.get_edgecolor()) and not lane.get_hatch() for lane in ax.collections[1:])


def test_the_chosen_bucket_size_is_the_one_with_the_ring() -> None:
    """A ring beside the curve, at a size whose timeline is not the one above."""
    spans = [Span("backward", 0, 5), Span("all-reduce", 4, 7)]
    figure = draw.overlap(spans, [1, 2, 4], [9.0, 7.0, 8.0], chosen=2, backward=5.0)
    top, bottom = figure.axes
    curve, ring, floor = bottom.lines
    assert list(curve.get_ydata()) == [9.0, 7.0, 8.0]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (2, 7.0)
    assert floor.get_ydata()[0] == 5.0
    assert [(x, width) for x, _, width, _ in boxes(top)] == [(0, 5), (4, 3)]
    with pytest.raises(ValueError, match="not in list"):
        draw.overlap(spans, [1, 2], [9.0, 7.0], chosen=3, backward=5.0)
