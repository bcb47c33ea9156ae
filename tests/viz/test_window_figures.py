"""Figures of chapter 08: what they show is what they were given."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, Wedge

from gpt2course.config import GPTConfig
from gpt2course.kv_cache import KVCache
from gpt2course.masks import visible
from gpt2course.viz import ring as draw_ring
from gpt2course.viz import window as draw
from gpt2course.viz.show import png_bytes
from gpt2course.viz.widget import WIDGET_LIMIT_MS
from tests.viz.looks import outside

EIGHT = range(8)
PANELS = [
    draw.MaskPanel("causal", EIGHT, EIGHT),
    draw.MaskPanel("window 3", EIGHT, EIGHT, 3),
    draw.MaskPanel("window 3, 2 sinks", EIGHT, EIGHT, 3, 2),
    draw.MaskPanel("left padding", [-1, -1, 0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3, 4, 5]),
    draw.MaskPanel("ring of 4 | new chunk", range(10, 15), [8, 9, 6, 7, *range(10, 15)], 4, split=4),
    draw.MaskPanel("a ring half empty, a sink", [3, 4], [0, 1, 2, -1, 3, 4], 2, 1),
]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_cells_are_the_one_rule(panel: draw.MaskPanel) -> None:
    """A picture of masks with a rule of its own, which drifts from the one that the model uses."""
    seen = [[kind in ("near", "sink") for kind in row] for row in draw.cell_kinds(panel)]
    rule = visible(torch.tensor(panel.q_pos), torch.tensor(panel.k_pos), panel.window, panel.sinks)
    assert torch.equal(torch.tensor(seen), rule)


def test_a_sink_is_told_from_a_near_key_and_only_once_it_is_behind() -> None:
    """A sink drawn amber while it is still in the window, as if it were counted twice."""
    kinds = draw.cell_kinds(PANELS[2])
    assert kinds[2][:3] == ["near", "near", "near"]
    assert kinds[3][:4] == ["sink", "near", "near", "near"]
    assert kinds[5][:4] == ["sink", "sink", "behind", "near"]
    assert kinds[0][1] == "future"


def test_mask_grid_draws_each_cell_in_its_colour() -> None:
    """Queries and keys exchanged, or colours that the legend does not name."""
    figure = draw.mask_grid(PANELS, columns=3)
    for ax, panel in zip(figure.axes, PANELS, strict=True):
        boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
        kinds = [kind for row in draw.cell_kinds(panel) for kind in row]
        assert [to_hex(box.get_facecolor()) for box in boxes] == [to_hex(draw.KINDS[kind][1]) for kind in kinds]
        assert [label.get_text() for label in ax.get_xticklabels()] == [str(k) if k >= 0 else "·" for k in panel.k_pos]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == [name for name, _ in draw.KINDS.values()]


def test_blocks_cover_every_visible_cell() -> None:
    """A block that is shown too few keys: the picture would teach the very bug."""
    T, window = 16, 4
    (ax,) = draw.blocks(T, window).axes
    covered = np.zeros((T, T), dtype=bool)
    frames = [patch for patch in ax.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    for frame in frames:
        left, top = round(frame.get_x() + 0.5), round(frame.get_y() + 0.5)
        covered[top : top + round(frame.get_height()), left : left + round(frame.get_width())] = True
    pos = torch.arange(T)
    assert not (visible(pos, pos, window).numpy() & ~covered).any()
    assert covered.sum() == window * window + (T // window - 1) * window * 2 * window
    with pytest.raises(ValueError, match="T is 15 and the window 4"):
        draw.blocks(15, 4)


def test_receptive_field_leaves_exact_zeros_grey() -> None:
    """A tiny gradient drawn like none, or none drawn like a tiny one: the difference is the whole point."""
    figure = draw.receptive_field([[0.0, 0.0, 1e-7, 2.0], [0.0, 1e-30, 1.0, 4.0]], [2, 3])
    shown = np.ma.getmaskarray(figure.axes[0].images[0].get_array())
    assert shown.tolist() == [[True, True, False, False], [True, False, False, False]]
    edges = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert edges == [-1.5, -2.5], "positions 0 and -1 are 2, so the edge lies between -1 and -2"


def test_pairs_name_the_factor_of_the_last_length() -> None:
    """The factor upside down, or of the first length."""
    (ax,) = draw.pairs([4, 8], {"full": [10, 36], "window": [9, 12]}).axes
    assert [text.get_text() for text in ax.texts] == ["full", "window: 1/3 of it"]


def test_cost_shows_median_and_spread() -> None:
    """The mean, which one slow run moves."""
    figure = draw.cost([64, 128], {"full": [[1, 2, 9], [3, 4, 5]]}, {"full": [1.0, 4.0]}, "a machine")
    left, right = figure.axes
    assert left.containers[0].lines[0].get_ydata().tolist() == [2, 4]
    assert right.lines[0].get_ydata().tolist() == [1.0, 4.0]


def test_bars_never_say_minus_nothing() -> None:
    """ "-0.000": a harm that rounds to nothing, with a sign."""
    (ax,) = draw.bars({"a": -0.0002, "b": 0.25}, "extra loss").axes
    assert [text.get_text() for text in ax.texts] == ["+0.000", "+0.250"]


@pytest.mark.parametrize(("window", "sinks"), [(4, 0), (4, 2), (1, 0), (3, 5)])
def test_ring_state_is_the_package_s_ring(window: int, sinks: int) -> None:
    """A clock face that turns another way than the real cache."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=2, vocab_size=9, block_size=64, window=window, sinks=sinks)
    cache = KVCache(config)
    for step in range(20):
        before = draw_ring.ring_state(step - 1, window, sinks) if step else None
        state = draw_ring.ring_state(step, window, sinks)
        cache.extend(cache.next_positions(1), plain=True)
        marked = torch.full((1, 1, 1, 2), float(step))
        cache.store(0, marked, marked)
        held = cache.k[0][0, 0, :, 0].tolist()
        assert [slot for slot in state.slots if slot >= 0] == held[: min(step + 1, window + sinks)]
        assert state.slots[state.written] == step
        assert state.lost == (before.slots[state.written] if before else -1)


def test_ring_shows_what_each_slot_holds() -> None:
    """The slot numbers and the positions in them mixed up, or the wrong wedge marked as new."""
    figure = draw_ring.ring(draw_ring.ring_state(13, 8))
    face, text = figure.axes
    wedges = [patch for patch in face.patches if isinstance(patch, Wedge)]
    assert [to_hex(w.get_facecolor()) == draw_ring.NEW.lower() for w in wedges] == [i == 5 for i in range(8)]
    words = [item.get_text() for item in face.texts]
    assert words.index("5 out") > words.index("13"), "the words stand with the new position"
    said = " / ".join(item.get_text() for item in text.texts)
    assert "13 mod 8 = 5" in said
    assert "sees 8 keys: 6 to 13" in said
    assert "gone: 6 positions" in said


def test_ring_with_sinks_in_words() -> None:
    """Sinks that are forgotten in the words, or joined with positions that are long gone."""
    state = draw_ring.ring_state(29, 8, 2)
    assert draw_ring.seen_in_words(state, 2) == "0 to 1 and 22 to 29"
    assert draw_ring.seen_in_words(draw_ring.ring_state(5, 8, 2), 2) == "0 to 5"
    assert draw_ring.seen_in_words(draw_ring.ring_state(0, 8, 0), 0) == "0"
    assert draw_ring.rule_in_words(29, 8, 2) == "2 + (29 - 2) mod 8 = 5"


def test_chunk_errors_show_an_exact_zero() -> None:
    """A zero that vanishes from a logarithmic axis, and the reader believes there was no measurement."""
    (ax,) = draw_ring.chunk_errors({"A": [0.0, 1.0]}, [0, 1], floor=1e-8).axes
    assert ax.lines[0].get_ydata().tolist() == [1e-8, 1.0]
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [-0.5, 0.5]


RUN = [[1.0, 2.0, 3.0], [4.0, 8.0, 9.0]]
FIGURES: dict[str, Callable[[], Figure]] = {
    "masks": lambda: draw.mask_grid(PANELS, columns=3),
    "blocks": lambda: draw.blocks(16, 4),
    "pairs": lambda: draw.pairs([256, 4096], {"full": [3e4, 8e6], "window 256": [3e4, 1e6]}),
    "cost": lambda: draw.cost(
        [512, 1024],
        {"full": RUN, "window 64 as a mask": RUN},
        {"full": [1, 2], "window 64 as a mask": [1, 4]},
        "2 cores, Linux",
    ),
    "reach": lambda: draw.receptive_field(np.tri(6, 48, 20)[:, ::-1] + 0.0, [21, 22, 23, 24, 25, 26], "window 8"),
    "extra": lambda: draw.extra_loss([16, 48], {"no sinks": {"window 16": [0, 1]}, "4 sinks": {"window 16": [0, 0.5]}}),
    "bars": lambda: draw.bars({"window 64, and keys 100 to 103": 1.0, "b": 0.25}, "extra loss", "title"),
    "ring": lambda: draw_ring.ring(draw_ring.ring_state(63, 8, 2), 2),
    "growth": lambda: draw_ring.cache_growth([0, 512], {"full": [0, 3072], "window 64, 4 sinks": [400, 400]}),
    "chunks": lambda: draw_ring.chunk_errors({"ring A": [1e-6] * 24, "ring B": [1.0] * 24}, [0, 12]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_cut_off(name: str) -> None:
    """Titles and labels that run out of the picture."""
    assert not outside(FIGURES[name]())


def test_cut_text_would_be_found() -> None:
    """The check above that finds nothing, whatever is drawn."""
    figure = FIGURES["bars"]()
    figure.text(0.8, 0.5, "a label that is much too long for the room that is left to it")
    assert outside(figure)


def test_ring_redraws_fast_enough_for_a_slider() -> None:
    """A slider that lags behind the hand."""
    state = draw_ring.ring_state(63, 8, 2)
    png_bytes(draw_ring.ring(state, 2), small=False)
    took = []
    for _ in range(7):
        started = time.process_time()
        png_bytes(draw_ring.ring(state, 2), small=False)
        took.append(1000 * (time.process_time() - started))
    assert min(took) < WIDGET_LIMIT_MS
