"""Draw notebooks/img/overview.png: the route from text to the next token, and the chapter that builds each part.

    python scripts/make_readme_picture.py

What is shown is real: the token ids, an attention map and the likeliest next tokens of the published GPT-2 124M, from
gpt2course/assets/gpt2_124m_logits.json. Only the stripes of the embeddings are drawn from a random generator.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from gpt2course.tokenizer import get_tokenizer
from gpt2course.viz.style import COLOURS, DIVERGING, INK, SEQUENTIAL

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "gpt2course" / "assets" / "gpt2_124m_logits.json"
BLUE, ORANGE, GREEN = COLOURS[:3]
WASH = {BLUE: "#E3EFF7", ORANGE: "#FBE9DC", GREEN: "#DFF2EB", INK: "#F2F2F2"}
WIDTH, HEIGHT = 16.0, 6.3
STREAM = 1.05
"""height of the residual stream in the picture"""


def box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, **changes: Any) -> None:
    """A rounded box with its lower left corner at (x, y)."""
    style: dict[str, Any] = {"facecolor": WASH.get(colour, "white"), "edgecolor": colour, "linewidth": 1.4}
    style["boxstyle"] = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch((x, y), width, height, **(style | changes)))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **changes: Any) -> None:
    """An arrow from start to end."""
    style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 13, "linewidth": 1.5, "color": INK}
    ax.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **(style | changes)))


def chapter(ax: Axes, x: float, y: float, number: str, colour: str) -> None:
    """The number of a chapter in a disc."""
    ax.add_patch(Circle((x, y), 0.27, facecolor=colour, edgecolor="white", linewidth=1.5, zorder=5))
    ax.text(x, y - 0.01, number, color="white", fontsize=10, fontweight="bold", ha="center", va="center", zorder=6)


def label(ax: Axes, x: float, y: float, text: str, **changes: Any) -> None:
    """Centred text."""
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 10, "color": INK}
    ax.text(x, y, text, **(style | changes))


def picture(values: np.ndarray, ax: Axes, extent: tuple[float, float, float, float], **options: Any) -> None:
    """A matrix as an image, without changing the limits of the axes."""
    ax.imshow(values, extent=extent, aspect="auto", interpolation="nearest", zorder=3, **options)
    left, right, low, high = extent
    box(
        ax, left, low, right - left, high - low, INK, facecolor="none", linewidth=0.8, zorder=4, boxstyle="square,pad=0"
    )


def draw_tokens(ax: Axes, pieces: list[str], ids: list[int], rows: list[float]) -> None:
    """The sentence, cut into tokens, with their ids."""
    for piece, token, y in zip(pieces, ids, rows, strict=True):
        box(ax, 0.3, y - 0.25, 1.75, 0.5, INK, linewidth=0.8)
        label(ax, 1.175, y, piece.replace(" ", "␣"), fontsize=10.5, family="DejaVu Sans Mono")
        arrow(ax, (2.13, y), (2.5, y), linewidth=0.9, mutation_scale=9)
        label(ax, 2.95, y, str(token), fontsize=10.5, family="DejaVu Sans Mono", color=BLUE)
        arrow(ax, (3.4, y), (3.85, y), linewidth=0.9, mutation_scale=9)


def draw_block(ax: Axes, attention: np.ndarray) -> None:
    """One of the twelve blocks: the residual stream below, attention and MLP each reading from it and adding to it."""
    for shift in (0.24, 0.12, 0.0):
        box(ax, 6.55 + shift, 0.6 + shift, 5.6, 4.3, INK, facecolor="white", linewidth=1.2)
    ax.plot([4.85, 4.85, 14.0, 14.0], [1.22, STREAM, STREAM, 1.6], color=INK, linewidth=2.6)
    arrow(ax, (14.0, 1.5), (14.0, 1.8), linewidth=2.6, mutation_scale=16)
    label(ax, 7.55, STREAM - 0.2, "residual stream", fontsize=9.5, style="italic")
    for x, name, colour in ((6.95, "attention", ORANGE), (9.75, "MLP", GREEN)):
        box(ax, x, 1.85, 1.85, 2.6, colour)
        label(ax, x + 0.925, 4.2, name, fontweight="bold", color=colour)
        box(ax, x + 0.2, 2.0, 1.45, 0.36, colour, facecolor="white", linewidth=0.9)
        label(ax, x + 0.925, 2.17, "LayerNorm", fontsize=9)
        arrow(ax, (x + 0.925, STREAM), (x + 0.925, 1.85), linewidth=1.3)
        out = x + 2.2
        ax.plot([x + 1.85, out], [3.3, 3.3], color=INK, linewidth=1.3)
        arrow(ax, (out, 3.3), (out, STREAM + 0.19), linewidth=1.3)
        ax.add_patch(Circle((out, STREAM), 0.19, facecolor="white", edgecolor=INK, linewidth=1.3, zorder=5))
        label(ax, out, STREAM - 0.01, "+", fontsize=12, zorder=6)
    picture(attention, ax, (7.2, 8.55, 2.55, 3.95), cmap=SEQUENTIAL, vmin=0.0, vmax=1.0)
    inputs = np.linspace(-3.0, 3.0, 200)
    gelu = 0.5 * inputs * (1 + np.tanh(math.sqrt(2 / math.pi) * (inputs + 0.044715 * inputs**3)))
    ax.plot([10.05, 11.3], [2.85, 2.85], color=INK, linewidth=0.6)
    ax.plot(10.675 + inputs * 0.205, 2.85 + gelu * 0.37, color=GREEN, linewidth=2.2)


def draw_logits(ax: Axes, words: list[str], odds: list[float], rows: list[float]) -> None:
    """The likeliest next tokens, each with a bar in proportion to its probability."""
    for word, share, y in zip(words, odds, rows, strict=True):
        label(ax, 13.25, y, word.replace(" ", "␣"), fontsize=10.5, family="DejaVu Sans Mono", ha="left")
        box(ax, 14.85, y - 0.14, 0.95 * share, 0.28, BLUE, facecolor=BLUE, linewidth=0, boxstyle="square,pad=0")


def overview() -> Figure:
    """The whole picture."""
    facts = json.loads(FACTS.read_text(encoding="utf-8"))["prompts"][2]
    tokenizer = get_tokenizer()
    ids = facts["token_ids"]
    best = facts["top20"][:5]
    figure = Figure(figsize=(12, 12 * HEIGHT / WIDTH), dpi=150, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()

    rows = [4.6 - 0.62 * i for i in range(len(ids))]
    draw_tokens(ax, [tokenizer.decode([i]) for i in ids], ids, rows)
    stripes = np.random.default_rng(0).standard_normal((len(ids), 12)) * 0.6
    for stripe, y in zip(stripes, rows, strict=True):
        picture(stripe[None], ax, (3.95, 5.75, y - 0.2, y + 0.2), cmap=DIVERGING, vmin=-2, vmax=2)
    draw_block(ax, np.array(facts["attention"]["weights"]))
    draw_logits(ax, [tokenizer.decode([i]) for i, _ in best], [math.exp(v - best[0][1]) for _, v in best], rows[:5])

    heads = ((1.175, "text"), (2.95, "tokens"), (4.85, "embeddings"), (9.47, "twelve blocks"), (14.5, "next token"))
    for x, text in heads:
        label(ax, x, 5.85, text, fontsize=12.5, fontweight="bold")
    for x, y, number, colour in (
        (2.075, 5.3, "01", BLUE),
        (4.85, 5.3, "02", BLUE),
        (6.95, 4.45, "03", ORANGE),
        (9.75, 4.45, "04", GREEN),
        (14.5, 5.3, "05", BLUE),
    ):
        chapter(ax, x, y, number, colour)
    note = "Discs: the chapter that builds the part. Token ids, attention map and next tokens are GPT-2's own."
    label(ax, WIDTH / 2, 0.25, note, fontsize=9.5)
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(0, HEIGHT)
    ax.set_aspect("auto")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "notebooks" / "img" / "overview.png")
    args = parser.parse_args()
    overview().savefig(args.out, metadata={"Software": None})
    print(f"wrote {args.out} ({args.out.stat().st_size / 1024:.0f} KB)")
