"""The figures of chapter 02 say what the data say, and are quick enough for a slider."""

import time

import numpy as np
import pytest
from matplotlib.figure import Figure

from gpt2course.viz import embeddings, positions
from gpt2course.viz.show import png_bytes
from gpt2course.viz.widget import WIDGET_LIMIT_MS

P, C = 48, 16


def tables() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {"walk": generator.normal(size=(P, C)).cumsum(axis=0), "noise": generator.normal(size=(P, C))}


def figures() -> dict[str, Figure]:
    table_PC = tables()["walk"]
    gram_PP = table_PC @ table_PC.T
    curve = np.linspace(3, 1, P)
    return {
        "number_grids": embeddings.number_grids(
            [embeddings.Grid("a", table_PC[:3, :2], "xyz", "01", "+"), embeddings.Grid("b", table_PC[:3, :2])]
        ),
        "similarity_grid": embeddings.similarity_grid(np.eye(4), list("abcd"), [(0, 2), (2, 4)]),
        "token_map": embeddings.token_map(table_PC[:6, :2], list("abcdef"), ["one"] * 3 + ["two"] * 3, 0.5),
        "norm_by_frequency": embeddings.norm_by_frequency(np.arange(P) ** 3, np.linspace(1, 2, P)),
        "loss_bars": embeddings.loss_bars({"m": {"own": 1.0, "zeros": 2.0}}, {"m": (3.0, "blind")}),
        "position_tables": positions.position_tables(tables()),
        "sinusoid_waves": positions.sinusoid_waves(np.sin(table_PC), [0, 5]),
        "dot_products": positions.dot_products(gram_PP, [0, 9], 30),
        "rotations": positions.rotations(np.array([0.5, 0.1]), [0, 1], [0, 6], 4),
        "position_similarities": positions.position_similarities({"walk": gram_PP / gram_PP.max()}),
        "similarity_profile": positions.similarity_profile(np.linspace(0, 1, P), 3, "walk"),
        "spectra": positions.spectra({"flat": np.full(C, 1 / C), "one": np.eye(C)[0]}),
        "norms_and_neighbours": positions.norms_and_neighbours(curve, {"walk": {1: 0.9, 2: 0.5}}),
        "loss_by_position": positions.loss_by_position({"one": curve, "two": curve + 1}, 8),
    }


@pytest.mark.parametrize("name", figures())
def test_figure_is_drawn_whole_and_small(name: str) -> None:
    """A figure that fails only when it is rendered, or that alone takes a quarter of a chapter's bytes."""
    png = png_bytes(figures()[name])
    assert png.startswith(b"\x89PNG")
    assert len(png) < 60_000


def test_number_grids_write_every_number() -> None:
    """A number missing from a cell, or rounded away to another one."""
    values = np.array([[0.25, -1.5], [0.0, 2.0]])
    figure = embeddings.number_grids([embeddings.Grid("t", values, "ab", "01", "=")], decimals=2)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["0.25", "-1.50", "0.00", "2.00", "="]


def test_a_grid_of_zeros_can_be_drawn() -> None:
    """The gradient of a table that no token used: a division by its largest entry."""
    png_bytes(embeddings.number_grids([embeddings.Grid("zero", np.zeros((2, 2)))]))


def test_spectra_counts_directions() -> None:
    """A count that is off by one: one direction holds everything here, and the flat spectrum needs nine tenths."""
    figure = positions.spectra({"flat": np.full(10, 0.1), "one": np.eye(10)[0]}, level=0.85)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert "flat: 9" in labels
    assert "one: 1" in labels


def test_labels_do_not_cover_each_other() -> None:
    """Labels of tokens that lie side by side, written over each other."""
    at_N2 = np.array([[100.0, 100.0], [104.0, 101.0], [108.0, 100.0], [300.0, 50.0]])
    labels = ["·for", "·while", "·if", "x"]
    boxes = [
        (x + dx, y + dy, x + dx + 6.7 * len(label), y + dy + 10)
        for (x, y), (dx, dy), label in zip(at_N2, embeddings.label_offsets(at_N2, labels), labels, strict=True)
    ]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_rotation_arcs_span_one_angle() -> None:
    """Arcs of one circle that differ in length, though a shift turns every position by the same angle."""
    figure = positions.rotations(np.array([0.3]), [0], [0, 6, 12], 4)
    arcs = [line.get_xydata() for line in figure.axes[0].lines if len(line.get_xydata()) == 60]
    spans = [np.unwrap(np.arctan2(arc[:, 1], arc[:, 0])) for arc in arcs]
    assert len(spans) == 3
    np.testing.assert_allclose([span[-1] - span[0] for span in spans], 1.2, atol=1e-9)


def test_two_decoders_differ_in_more_than_colour() -> None:
    """Lines that a colour-blind reader cannot tell apart."""
    figure = positions.loss_by_position({"one": np.ones(9), "two": np.full(9, 2.0)}, 4)
    one, two = figure.axes[0].lines[:2]
    assert one.get_linestyle() != two.get_linestyle()


def test_slider_keeps_up() -> None:
    """A redraw that lags behind the hand. The fastest of several, in time of this process: the machine may be busy."""
    similarity_PP = np.corrcoef(tables()["walk"])
    took = []
    for position in range(5):
        started = time.process_time()
        png_bytes(positions.similarity_profile(similarity_PP[position], position, "walk"), small=False)
        took.append(1000 * (time.process_time() - started))
    assert min(took) < WIDGET_LIMIT_MS
