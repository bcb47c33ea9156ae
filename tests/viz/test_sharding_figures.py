"""Figures of chapter 12: what they show is what they were given."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gpt2course.viz import sharding as draw
from gpt2course.viz.show import png_bytes
from gpt2course.viz.widget import WIDGET_LIMIT_MS
from tests.viz.looks import outside

BILL = {
    "DDP": {"parameters": 14.0, "gradients": 14.0, "optimizer": 84.0},
    "ZeRO-3, FSDP": {"parameters": 0.25, "gradients": 0.25, "optimizer": 1.5},
}
GPUS = {"16 GB": 16.0, "24 GB": 24.0, "80 GB": 80.0}
WAYS = {"DDP": {"counted": 1.0, "on the wire": 1.0}, "FSDP": {"counted": 1.5, "on the wire": 2.0}}
UNDISTURBED = draw.Leg("undisturbed", range(1, 9), [9.0 - i for i in range(8)])
LEGS = [
    draw.Leg("4 processes", range(1, 6), [9.0, 8.0, 7.0, 6.0, 5.0]),
    draw.Leg("2 processes", range(5, 9), [5.0, 4.0, 3.000001, 2.0]),
]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def boxes(ax: Axes) -> list[tuple[float, float]]:
    """(left, width) of each coloured rectangle, in the order in which they were drawn."""
    return [(p.get_x(), p.get_width()) for p in ax.patches if isinstance(p, Rectangle)]


def test_bars_are_stacked_and_add_up() -> None:
    """A part drawn over another, or a total that is not their sum."""
    (ax,) = draw.memory_bars(BILL, "GB", GPUS).axes
    assert boxes(ax) == [(0, 14), (14, 14), (28, 84), (0, 0.25), (0.25, 0.25), (0.5, 1.5)]
    assert {"112 GB", "2 GB"} <= set(texts(ax))
    assert [line.get_xdata()[0] for line in ax.lines] == list(GPUS.values())
    assert len({str(line.get_linestyle()) for line in ax.lines}) == len(GPUS)


def test_a_bar_past_the_end_says_so() -> None:
    """112 GB that end with the axis at 96, and look as if they nearly fitted."""
    (ax,) = draw.memory_bars(BILL, "GB", GPUS, most=96).axes
    assert "112 GB →" in texts(ax)
    assert "2 GB" in texts(ax)
    assert ax.get_xlim() == (0, 96)


def test_parts_differ_in_hatch_as_well_as_in_colour() -> None:
    """Parts that a colour-blind reader, or a printer, can't tell apart."""
    (ax,) = draw.memory_bars(BILL, "GB").axes
    looks = [(to_hex(p.get_facecolor()), p.get_hatch()) for p in ax.patches[:3]]
    assert len({colour for colour, _ in looks}) == len({hatch for _, hatch in looks}) == 3


def test_bars_of_other_parts_are_refused() -> None:
    """A colour that means gradients in one bar and activations in the next."""
    with pytest.raises(ValueError, match=r"'b' has parts \['x', 'z'\] and 'a' \['x', 'y'\]; give all the same"):
        draw.memory_bars({"a": {"x": 1, "y": 1}, "b": {"x": 1, "z": 1}}, "GB")


@pytest.mark.parametrize(
    ("size", "words"), [(1120, "1,120"), (99.94, "99.9"), (16.62, "16.6"), (0.516, "0.516"), (0, "0")]
)
def test_numbers_are_short(size: float, words: str) -> None:
    """16.6000000001 GB."""
    assert draw.number(size) == words


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_flat_shards_have_one_length_and_cover_all(world_size: int) -> None:
    """A last shard that is shorter, or padding that is drawn where there is none."""
    (ax,) = draw.flat_layout({"weight": 16, "bias": 4}, world_size).axes
    length = -(-20 // world_size)
    drawn = boxes(ax)
    assert drawn[:3] == [(0, 16), (16, 4), (20, length * world_size - 20)]
    assert drawn[3:] == [(rank * length, length) for rank in range(world_size)]
    missing = length * world_size - 20
    assert ("zero" in texts(ax), "zeros" in texts(ax)) == (missing == 1, missing > 1)


def test_rows_are_drawn_to_scale_and_empty_ranks_named() -> None:
    """A process without rows that vanishes from the picture."""
    (ax,) = draw.row_layout({"5 rows": [2, 2, 1, 0]}).axes
    heights = [p.get_height() for p in ax.patches if isinstance(p, Rectangle)]
    assert heights == pytest.approx([0.4, 0.4, 0.2, 0.0])
    assert texts(ax) == ["rank 0: 2", "rank 1: 2", "rank 2: 1", "rank 3: 0, empty"]


def test_neighbours_differ_in_colour() -> None:
    """Two shards that look like one."""
    assert all(draw.rank_colour(rank) != draw.rank_colour(rank + 1) for rank in range(12))


def test_held_draws_the_amounts() -> None:
    """Lines that are sorted, scaled, or of one dash."""
    (ax,) = draw.held(["1", "2", "2", "1"], {"DDP": [8, 8, 8, 8], "FSDP": [3, 3, 4, 3]}, "M").axes
    level, sharded, _ = ax.lines
    assert [list(line.get_ydata()) for line in (level, sharded)] == [[8, 8, 8, 8], [3, 3, 4, 3]]
    assert level.get_linestyle() != sharded.get_linestyle()


def test_traffic_shows_each_way_of_counting() -> None:
    """Ways and strategies swapped."""
    left, right = draw.traffic({"2 processes": WAYS, "4 processes": WAYS}).axes
    for ax in (left, right):
        bars = [c for c in ax.containers if isinstance(c, BarContainer)]
        assert [[p.get_height() for p in c] for c in bars] == [[1.0, 1.5], [1.0, 2.0]]
        assert texts(ax) == ["1.00", "1.50", "1.00", "2.00"]


def test_traffic_without_a_measure_still_draws() -> None:
    """A system that does not count what is sent (NaN), and the chapter stops."""
    panel = {"DDP": {"counted": 1.0, "on the wire": float("nan")}}
    (ax,) = draw.traffic({"2 processes": panel}).axes
    assert texts(ax) == ["1.00"]


def test_fingerprints_mark_where_a_shard_begins() -> None:
    """Borders in other places than the shards have them, which hides what the lab is about."""
    (ax,) = draw.fingerprints({"A": np.repeat([1.0, 2.0, 3.0], 4)}, 3, "ratio").axes
    assert ax.lines[0].get_ydata().tolist() == np.repeat([1.0, 2.0, 3.0], 4).tolist()
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [-0.5, 3.5, 7.5]


def test_fingerprints_share_one_scale_from_zero() -> None:
    """A level that looks as high as one three times as large; padding (NaN) that takes the scale away."""
    panels = {"A": [0.3, 0.2, float("nan")], "B": [0.1, 0.1, float("nan")]}
    for ax in draw.fingerprints(panels, 3, "ratio").axes:
        assert ax.get_ylim() == pytest.approx((0.0, 0.36))


def test_relay_measures_each_leg_against_the_same_step() -> None:
    """A leg that starts late, compared with the first steps; or a zero that vanishes from a logarithmic axis."""
    curve, difference = draw.relay(UNDISTURBED, LEGS, 2e-6).axes
    first, second = (line for line in difference.lines if line.get_marker() in ("o", "s"))
    floor = difference.get_ylim()[0]
    assert len(set(first.get_ydata())) == 1
    assert first.get_ydata()[0] > floor
    assert list(second.get_xdata()) == [5, 6, 7, 8]
    assert second.get_ydata()[2] == pytest.approx(1e-6)
    assert list(curve.lines[2].get_ydata()) == LEGS[1].losses


def test_relay_names_the_checkpoints_and_the_tolerance() -> None:
    """Lines in a picture that nobody can read: where a leg began, and what it was let differ."""
    curve, difference = draw.relay(UNDISTURBED, LEGS, 2e-6).axes
    assert [text.strip() for text in texts(curve)] == ["checkpoint, step 4"]
    assert texts(difference) == ["tolerance"]


def test_legs_on_the_same_step_both_show() -> None:
    """Steps that were done twice, and the second marker hides the first."""
    curve, _ = draw.relay(UNDISTURBED, LEGS, 2e-6).axes
    below, above = curve.lines[1:3]
    assert below.get_markersize() > above.get_markersize()


def test_break_even_draws_one() -> None:
    """The line that all is about, in another place."""
    (ax,) = draw.break_even([512, 1024, 2048], {"a": [4, 2, 1], "b": [8, 4, 2]}).axes
    assert [list(line.get_ydata()) for line in ax.lines] == [[4, 2, 1], [8, 4, 2], [1, 1]]
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()


@pytest.mark.parametrize(("n", "words"), [(512, "512"), (1024, "1k"), (2**21, "2M"), (1536, "1.5k")])
def test_sizes_in_powers_of_two(n: int, words: str) -> None:
    """Ticks of seven digits that run into each other."""
    assert draw.size_in_words(n) == words


def test_start_rows_share_one_scale() -> None:
    """Tables that look alike only because each has a scale of its own."""
    figure = draw.start_rows({"a": [[1.0, -2.0]], "b": [[0.5, 0.5]]}, 2)
    assert {image.get_clim() for ax in figure.axes for image in ax.images} == {(-2.0, 2.0)}


FIGURES: dict[str, Callable[[], Figure]] = {
    "bars": lambda: draw.memory_bars(BILL, "GB", GPUS),
    "bars past the end": lambda: draw.memory_bars(BILL, "GB", GPUS, most=96, title="1,024 processes"),
    "flat": lambda: draw.flat_layout({"weight: 16 numbers": 16, "bias: 4": 4}, 3),
    "rows": lambda: draw.row_layout({"wte.weight\n50,257 rows": [12565, 12565, 12565, 12562], "5 rows": [2, 2, 1, 0]}),
    "held": lambda: draw.held(["1", "2", "2", "1"], {"DDP": [8] * 4, "FSDP, kept after forward": [3, 5, 5, 3]}, "M"),
    "traffic": lambda: draw.traffic({"2 processes": WAYS, "4 processes": WAYS}),
    "fingerprints": lambda: draw.fingerprints({"program A": np.ones(12), "program B": np.arange(12)}, 3, "clipped"),
    "relay": lambda: draw.relay(UNDISTURBED, LEGS, 2e-6),
    "break even": lambda: draw.break_even([2**n for n in range(9, 22)], {"Ethernet, 1.25 GB/s": range(13, 0, -1)}),
    "start": lambda: draw.start_rows({f"broadcast, rank {rank}": np.eye(4) for rank in range(4)}, 4),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_off(name: str) -> None:
    """Titles and labels that run out of the picture."""
    assert not outside(FIGURES[name]())


def test_cut_text_would_be_found() -> None:
    """The check above that finds nothing, whatever is drawn."""
    figure = FIGURES["flat"]()
    figure.text(0.8, 0.5, "a label that is much too long for the room that is left to it")
    assert len(outside(figure)) == 1


def test_the_widget_is_quick() -> None:
    """A slider that lags behind the hand."""
    png_bytes(FIGURES["bars past the end"](), small=False)
    took = []
    for _ in range(7):
        started = time.process_time()
        png_bytes(FIGURES["bars past the end"](), small=False)
        took.append(1000 * (time.process_time() - started))
    assert min(took) < WIDGET_LIMIT_MS
