"""Figures of chapter 07: what they show is what they were given."""

import io
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from gpt2course.viz import gqa, pooling
from gpt2course.viz.show import png_bytes
from gpt2course.viz.widget import WIDGET_LIMIT_MS

CONTEXTS = [2**i for i in range(10, 18)]
CACHES = {G: [16384 * G * n for n in CONTEXTS] for G in (32, 16, 8, 4, 2, 1)}
MEMORIES = {"a laptop: 16 GiB": 16 * 2**30, "a large GPU: 80 GiB": 80 * 2**30}
MAPS = np.tile(np.tri(6) / np.arange(1, 7)[:, None], (4, 1, 1))


def weighed(chosen: int = 8, context: int = 32768) -> Figure:
    return gqa.cache_against_memory(CONTEXTS, CACHES, chosen, context, MEMORIES, "one text")


def reading() -> gqa.Reading:
    lines = {"MHA": [4e6, 8e6, 16e6], "GQA, a quarter of the heads": [1e6, 2e6, 4e6]}
    return gqa.Reading("GPT-2 small", [64, 128, 256], lines, {"weights": 249e6, "weights, a share of 16": 16e6})


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize(("H", "G"), [(12, 12), (12, 4), (12, 1), (6, 3)])
def test_lines_and_matrix_follow_the_rule(H: int, G: int) -> None:
    """A picture that deals the key heads out in turn, or a matrix that says something else than the lines."""
    left, right = gqa.head_sharing(H, [G]).axes
    ends = [line.get_xydata() for line in left.lines if len(line.get_xdata()) == 2]
    squares = {float(line.get_xdata()[0]): to_hex(line.get_color()) for line in left.lines if line.get_marker() == "s"}
    assert [end[0][0] for end in ends] == list(range(H))
    reads = [sorted(squares).index(float(end[1][0])) for end in ends]
    assert reads == [h // (H // G) for h in range(H)]
    coloured = {
        (round(box.get_x() + 0.5), round(box.get_y() + 0.5))
        for box in right.patches
        if isinstance(box, Rectangle) and to_hex(box.get_facecolor()) != gqa.EMPTY
    }
    assert coloured == {(h // (H // G), h) for h in range(H)}
    lines = [to_hex(line.get_color()) for line in left.lines if len(line.get_xdata()) == 2]
    assert lines == [to_hex(gqa.group_colour(h // (H // G))) for h in range(H)]


def test_neighbouring_key_heads_differ_in_colour() -> None:
    """Two groups that look like one."""
    assert all(gqa.group_colour(g) != gqa.group_colour(g + 1) for g in range(12))


@pytest.mark.parametrize("G", [0, 5, 24])
def test_heads_that_cannot_be_shared_are_refused(G: int) -> None:
    """A key head with a reader too few, drawn as if all were well."""
    with pytest.raises(ValueError, match=rf"\[{G}\] key heads .* give divisors of 12"):
        gqa.head_sharing(12, [12, G])


def test_names_of_the_kinds() -> None:
    """One head of one called MQA: with a single head there is nothing to share."""
    assert [gqa.kv_name(12, G) for G in (12, 4, 1)] == ["MHA", "GQA", "MQA"]
    assert gqa.kv_name(1, 1) == "MHA"


def test_bytes_read_draws_lines_and_levels() -> None:
    """A level that is missing in one panel, or two lines of one dash."""
    figure = gqa.bytes_read([reading(), reading()])
    for ax in figure.axes:
        mha, shared, weights, share = ax.lines
        assert mha.get_ydata().tolist() == [4e6, 8e6, 16e6]
        assert list(weights.get_ydata()) == [249e6, 249e6]
        assert mha.get_linestyle() != shared.get_linestyle()
        assert weights.get_linestyle() != share.get_linestyle()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*reading().cache, *reading().levels]


def test_widths_of_c_attn_add_up() -> None:
    """Bars of keys as wide as MHA's in every row."""
    (ax,) = gqa.qkv_widths(12, [12, 4, 1], 64).axes
    widths = [round(box.get_width()) for box in ax.patches]
    assert widths == [768, 768, 768, 768, 256, 256, 768, 64, 64]
    assert "  1,280 rows, 56% of MHA's" in texts(ax)


def test_the_marked_size_is_that_of_the_sliders() -> None:
    """A dot that stays where it was while the slider moves, or stands on another line."""
    for chosen, context, size in ((8, 32768, "4.0 GiB"), (32, 32768, "16.0 GiB"), (1, 1024, "16.0 MiB")):
        (ax,) = weighed(chosen, context).axes
        assert size in texts(ax)
        dot = next(line for line in ax.lines if line.get_marker() == "o")
        assert dot.get_xdata()[0] == math.log2(context)
        assert dot.get_ydata()[0] == pytest.approx(math.log2(16384 * chosen * context / 2**30))
        bold = [text.get_text() for text in ax.texts if text.get_fontweight() == "bold"]
        assert f"{chosen} kv head{'s' if chosen > 1 else ''}" in bold


def test_sizes_in_words() -> None:
    """1024 MiB instead of 1 GiB, or a size that rounds to 0."""
    assert [gqa.human(2**n) for n in (5, 10, 20, 30, 40)] == ["32 B", "1.0 KiB", "1.0 MiB", "1.0 GiB", "1.0 TiB"]
    assert gqa.human(36 * 2**20) == "36.0 MiB"
    assert gqa.human(512 * 2**20) == "512 MiB"
    assert [gqa.short_count(n) for n in (64, 512, 1024, 131072, 1500)] == ["64", "512", "1k", "128k", "1500"]


def test_slider_redraws_in_time() -> None:
    """A widget that lags behind the hand. The fastest of several, in time of this process: the machine may be busy."""
    png_bytes(weighed(), small=False)
    took = []
    for context in CONTEXTS[:5]:
        started = time.process_time()
        png_bytes(weighed(context=context), small=False)
        took.append(1000 * (time.process_time() - started))
    assert min(took) < WIDGET_LIMIT_MS


def decoding() -> Figure:
    rng = np.random.default_rng(0)
    mha = np.array([[1.0], [2.0], [4.0]]) * rng.uniform(0.9, 1.1, (3, 5))
    return gqa.decode_times([1024, 2048, 4096], {"MHA": mha, "folded": mha / 2, "copied": mha * 3}, "MHA", "2 cores")


def test_ratios_are_taken_repeat_by_repeat() -> None:
    """A ratio of medians of different moments: a busy second would show as a property of one way."""
    _, right = decoding().axes
    ratios = [line.get_ydata() for line in right.lines if len(line.get_xdata()) == 3]
    np.testing.assert_allclose(ratios, [[1, 1, 1], [0.5, 0.5, 0.5], [3, 3, 3]])


def test_cosines_stand_in_their_cells() -> None:
    """Rows and columns swapped, or a scale that makes 0 look like something."""
    cosines = np.array([[1.0, 0.2, 0.3], [-0.4, 1.0, 0.5], [0.6, 0.7, 1.0]])
    figure = pooling.head_likeness({"keys": cosines, "values": cosines.T}, "head")
    left, right = figure.axes
    assert {text.get_position(): text.get_text() for text in left.texts}[(0, 1)] == "-0.40"
    assert {text.get_position(): text.get_text() for text in right.texts}[(0, 1)] == "0.20"
    assert left.images[0].get_clim() == (-1, 1)
    assert not pooling.head_likeness({"keys": np.eye(12)}, "head").axes[0].texts, "144 numbers that nobody can read"


def price() -> Figure:
    curves = {"mean": [2.8, 4.5], "mean, healed": [2.2, math.nan]}
    return pooling.loss_against_bytes([3, 1.5, 0.75], ["MHA", "GQA, 2", "MQA"], curves, 1.88)


def test_each_curve_starts_at_the_trained_model() -> None:
    """Curves that do not begin where the model was, or a loss that was not measured drawn as zero."""
    (ax,) = price().axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["mean"] == [[3, 1.88], [1.5, 2.8], [0.75, 4.5]]
    assert lines["mean, healed"] == [[3, 1.88], [1.5, 2.2]]
    assert "as trained: 1.88" in texts(ax)


def suspects() -> Figure:
    return pooling.head_rows({"witness": MAPS, "A": MAPS, "B": MAPS}, [f"head {h}" for h in range(4)], 0.5)


def test_maps_hide_the_future_and_name_heads_and_models() -> None:
    """A grid in which nobody can tell which head of which model is broken; or given weights that are changed."""
    figure = suspects()
    assert [ax.get_title() for ax in figure.axes[:4]] == ["head 0", "head 1", "head 2", "head 3"]
    assert [ax.get_ylabel() for ax in figure.axes[::4]] == ["witness", "A", "B"]
    shown = figure.axes[5].images[0].get_array()
    assert np.ma.getmaskarray(shown)[~np.tri(6, dtype=bool)].all()
    assert not np.ma.getmaskarray(shown)[np.tri(6, dtype=bool)].any()
    assert not np.isnan(MAPS).any()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: gqa.head_sharing(12, [12, 4, 1]),
        lambda: gqa.head_sharing(4, [4, 2, 1]),
        lambda: gqa.bytes_read([reading(), reading()]),
        lambda: gqa.qkv_widths(12, [12, 4, 1], 64),
        weighed,
        lambda: weighed(32, 1024),
        lambda: weighed(32, 131072),
        decoding,
        lambda: pooling.head_likeness({"keys": np.eye(12), "values": np.eye(12)}, "head"),
        price,
        suspects,
    ],
)
def test_no_text_leaves_its_figure(draw: Callable[[], Figure]) -> None:
    """A label that is cut off at the edge."""
    figure = draw()
    figure.savefig(io.BytesIO(), format="png")
    renderer = figure.canvas.get_renderer()
    beyond: list[Text] = []
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low <= tick.get_loc() <= high:
                    beyond += [tick.label1, tick.label2]
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and not any(text is other for other in beyond):
            box = text.get_window_extent(renderer)
            assert -1 <= box.x0 <= box.x1 <= figure.bbox.width + 1, text.get_text()
            assert -1 <= box.y0 <= box.y1 <= figure.bbox.height + 1, text.get_text()
