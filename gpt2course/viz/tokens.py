"""Figures of chapter 01: tokens as boxes, merges as trees, text length, shard bytes, windows, rows by rank, losses.

Legend: B rows of the global batch, T positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from gpt2course.viz.style import COLOURS, INK, PALE, new_figure

MONO = ["DejaVu Sans Mono", "DejaVu Sans"]
VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→"})
CHARACTER_INCHES = 0.602 * 10 / 72
"""width of a letter of DejaVu Sans Mono at 10 points"""
ROW_INCHES = 0.3
IDS_INCHES = 0.2


def tint(index: int, strength: float = 0.35) -> tuple[float, float, float]:
    """Colour number `index` of the course, mixed with white so that dark letters read well on it."""
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(COLOURS[index % len(COLOURS)]))
    return red, green, blue


@cache
def drawable() -> frozenset[int]:
    """Code points that matplotlib's own two DejaVu fonts can draw; what they lack would show as an empty box."""
    fonts = (get_font(findfont(FontProperties(family=name))) for name in MONO)
    return frozenset(point for font in fonts for point in font.get_charmap())


def token_label(token: bytes) -> str:
    """A token as text with its blanks made visible, or its bytes in hex where it is not text that can be drawn."""
    try:
        text = token.decode().translate(VISIBLE)
    except UnicodeDecodeError:
        return token.hex(" ")
    return text if text and all(ord(letter) in drawable() for letter in text) else token.hex(" ")


def token_boxes(
    tokens: Sequence[bytes], ids: Sequence[int] | None = None, title: str = "", width: float = 7.0
) -> Figure:
    """Tokens as coloured boxes in reading order, with a new row after a line's end and where a row is full.

    Args:
        tokens: the bytes of each token.
        ids: one a token, written under its box.
        title: above the boxes.
        width: of the figure in inches.

    Raises:
        ValueError: if there are not as many ids as tokens.
    """
    if ids is not None and len(ids) != len(tokens):
        raise ValueError(f"{len(ids)} ids for {len(tokens)} tokens; give one id a token, or none")
    columns = width / CHARACTER_INCHES
    labels = [token_label(token) for token in tokens]
    widths = [max(len(label), 0.8 * len(str(ids[i])) if ids else 0.0) + 0.7 for i, label in enumerate(labels)]
    places, x, row = [], 0.2, 0
    for i, box in enumerate(widths):
        if x > 0.2 and (x + box > columns or tokens[i - 1].endswith(b"\n")):
            x, row = 0.2, row + 1
        places.append((x, row))
        x += box + 0.15
    row_inches = ROW_INCHES + (IDS_INCHES if ids else 0.0)
    top = 0.32 if title else 0.06
    figure, ax = new_figure(width=width, height=(row + 1) * row_inches + top)
    figure.set_layout_engine("none")
    ax.set_position((0.0, 0.0, 1.0, 1.0))
    ax.set_axis_off()
    ax.set(xlim=(0, columns), ylim=((row + 1) * row_inches, -top))
    for i, (label, box, (x, line)) in enumerate(zip(labels, widths, places, strict=True)):
        y = line * row_inches
        # add_artist, since add_patch works out the limits of the axes anew for each of a hundred boxes
        ax.add_artist(Rectangle((x, y), box, ROW_INCHES - 0.05, facecolor=tint(i % 5), edgecolor=PALE, linewidth=0.6))
        write(ax, x + box / 2, y + (ROW_INCHES - 0.05) / 2, label)
        if ids:
            write(ax, x + box / 2, y + ROW_INCHES + 0.04, str(ids[i]), size=7)
    if title:
        ax.text(0.2, -top / 2 - 0.02, title, va="center", fontsize=10, color=INK, parse_math=False)
    return figure


def write(ax: Axes, x: float, y: float, text: str, size: float = 10) -> None:
    """Centred text in the letters of a typewriter; a dollar sign is a dollar sign."""
    family = MONO[:1] if text.isascii() else MONO  # looking through a second font takes time
    ax.text(x, y, text, ha="center", va="center", fontsize=size, family=family, color=INK, parse_math=False)


@dataclass(frozen=True)
class MergeNode:
    """A token, and the two tokens that it was merged from; a single byte has none."""

    token: bytes
    label: str = ""
    """written small under the token: which merge made it"""
    parts: tuple["MergeNode", ...] = ()

    @property
    def height(self) -> int:
        """0 for a byte, else one more than the higher of its two parts."""
        return 1 + max(part.height for part in self.parts) if self.parts else 0


def merge_tree(root: MergeNode, title: str = "", width: float = 7.0) -> Figure:
    """A token over the two tokens that were merged into it, down to its bytes."""
    height = root.height
    figure, ax = new_figure(width=width, height=0.62 * (height + 1) + 0.4)
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize=10, parse_math=False)
    n_leaves = place(ax, root, 0)[1]
    ax.set(xlim=(-0.6, max(n_leaves - 0.4, 6.0)), ylim=(-0.5, height + 0.5))
    return figure


def place(ax: Axes, node: MergeNode, first: int) -> tuple[float, int]:
    """Draw a node over leaves from number `first` on. Returns where it stands and the number of the next free leaf."""
    free, below = first, []
    for part in node.parts:
        x, free = place(ax, part, free)
        below.append((x, part.height))
    where = sum(x for x, _ in below) / len(below) if below else float(first)
    for x, height in below:
        ax.plot([where, x], [node.height, height], color=PALE, linestyle="-", linewidth=1.2, zorder=1)
    box = {"boxstyle": "round,pad=0.3", "facecolor": tint(0 if node.parts else 5), "edgecolor": PALE}
    label = token_label(node.token) + (f"\n{node.label}" if node.label else "")
    ax.text(
        where, node.height, label, ha="center", va="center", fontsize=9, family=MONO, bbox=box, zorder=2,
        linespacing=1.1, parse_math=False,
    )  # fmt: skip
    return where, free if node.parts else first + 1


def length_curve(lengths: Sequence[int], marks: Mapping[int, str] | None = None) -> Figure:
    """How many tokens the text takes after 0, 1, 2 … merges.

    Args:
        lengths: tokens, first without any merge.
        marks: words to write at some of the merges.
    """
    figure, ax = new_figure(height=3.2)
    ax.plot(range(len(lengths)), lengths, marker="o", markersize=3.5)
    for merge, text in (marks or {}).items():
        ax.annotate(
            text, (merge, lengths[merge]), (14, 14), textcoords="offset points", family=MONO, fontsize=9,
            arrowprops={"arrowstyle": "-", "color": PALE}, parse_math=False,
        )  # fmt: skip
    ax.set(xlabel="merges learned", ylabel="tokens the paragraph takes", ylim=(0, None), xlim=(-0.5, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def bars(values: Mapping[str, float], xlabel: str, digits: int = 2) -> Figure:
    """Horizontal bars in the order given, each with its value.

    Args:
        values: by name.
        xlabel: what is measured, with its unit.
        digits: after the point.
    """
    figure, ax = new_figure(height=0.36 * len(values) + 0.8)
    names = list(values)
    ax.barh(names, list(values.values()), color=COLOURS[0], height=0.65)
    ax.invert_yaxis()
    for i, name in enumerate(names):
        ax.annotate(
            f"{values[name]:.{digits}f}", (values[name], i), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    ax.set(xlabel=xlabel, xlim=(0, 1.12 * max(values.values())))
    return figure


def byte_table(data: bytes, fields: Sequence[tuple[str, int]], per_row: int = 16) -> Figure:
    """The first bytes of a file in hex, coloured by the field they belong to.

    Args:
        data: the bytes to draw.
        fields: name and length in bytes, in order; bytes past the last field stay white.
        per_row: bytes a row.
    """
    ends = list(accumulate(length for _, length in fields))
    starts = [0, *ends]
    n_rows = -(-len(data) // per_row)
    figure, ax = new_figure(width=7.5, height=0.3 * n_rows + 0.3)
    ax.set_axis_off()
    ax.set(xlim=(-2.2, per_row), ylim=(n_rows, 0))
    for i, byte in enumerate(data):
        row, column = divmod(i, per_row)
        field = next((number for number, end in enumerate(ends) if i < end), None)
        face = "white" if field is None else tint(field)
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor=face, edgecolor="white", linewidth=0.8))
        write(ax, column + 0.5, row + 0.5, f"{byte:02x}", size=9)
    for row in range(n_rows):
        write(ax, -1.1, row + 0.5, f"byte {row * per_row}", size=8)
    handles = [
        Patch(facecolor=tint(number), edgecolor=PALE, label=f"{start}–{end - 1}  {name}")
        for number, ((name, _), start, end) in enumerate(zip(fields, starts, ends, strict=False))
    ]
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return figure


def window_strip(tokens: Sequence[bytes], block_size: int) -> Figure:
    """A stream of tokens cut into windows of T + 1 that overlap by one.

    Args:
        tokens: the stream; as short as a figure is wide.
        block_size: T.
    """
    T = block_size
    n_windows = (len(tokens) - 1) // T
    figure, ax = new_figure(width=7.5, height=0.42 * (n_windows + 1) + 0.7)
    ax.set_axis_off()
    ax.set(xlim=(-2.6, len(tokens) + 0.1), ylim=(n_windows + 1.1, -0.6))
    size = min(10.0, 60.0 / max(len(token_label(token)) for token in tokens))
    for i, token in enumerate(tokens):
        ax.add_patch(Rectangle((i, 0), 1, 0.75, facecolor=tint(i % 5), edgecolor="white"))
        write(ax, i + 0.5, 0.37, token_label(token), size=size)
        write(ax, i + 0.5, -0.3, str(i), size=7)
    write(ax, -1.3, 0.37, "stream", size=9)
    for w in range(n_windows):
        for i in range(w * T, w * T + T + 1):
            only_target = i == w * T + T
            face = "white" if only_target else tint(0)
            hatch = "///" if only_target else ("\\\\\\" if i == w * T else "")
            ax.add_patch(Rectangle((i, w + 1.1), 1, 0.7, facecolor=face, edgecolor=COLOURS[0], hatch=hatch))
        write(ax, -1.3, w + 1.45, f"window {w}", size=9)
    kinds = (("only an input", tint(0), "\\\\\\"), ("input and target", tint(0), ""), ("only a target", "white", "///"))
    handles = [Patch(facecolor=face, edgecolor=COLOURS[0], hatch=hatch, label=name) for name, face, hatch in kinds]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.55, 0.0), ncols=3, frameon=False, fontsize=9)
    return figure


def rows_by_rank(window_ids: Sequence[int], world_sizes: Sequence[int] = (1, 2, 3)) -> Figure:
    """The rows of one global batch, and which rank reads which, at several world sizes.

    Args:
        window_ids: (B,) the window that each row reads.
        world_sizes: one column each.
    """
    B = len(window_ids)
    figure, ax = new_figure(width=7.0, height=0.34 * B + 0.9)
    for column, world_size in enumerate(world_sizes):
        for rank in range(world_size):
            for row in range(B * rank // world_size, B * (rank + 1) // world_size):
                ax.add_patch(
                    Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, facecolor=tint(rank), edgecolor=COLOURS[rank])
                )
                write(ax, column + 0.5, row + 0.5, f"window {window_ids[row]} · rank {rank}", size=9)
    ax.set(xlim=(0, len(world_sizes)), ylim=(B, 0), ylabel="row of the global batch")
    ax.set_xticks([column + 0.5 for column in range(len(world_sizes))])
    ax.set_xticklabels([f"{size} {'rank' if size == 1 else 'ranks'}" for size in world_sizes])
    ax.set_yticks([row + 0.5 for row in range(B)], [str(row) for row in range(B)])
    return figure


def loss_lines(losses: Mapping[str, Sequence[float]], floor: float | None = None, floor_name: str = "floor") -> Figure:
    """Loss by step, one line a run, over a level that an honest run cannot pass.

    Args:
        losses: nats a token, by the name of the run.
        floor: the level, drawn as a grey line.
        floor_name: what to call it.
    """
    figure, ax = new_figure(height=3.4)
    for name, values in losses.items():
        ax.plot(range(len(values)), values, label=name, linewidth=2)
    if floor is not None:
        ax.axhline(floor, color=INK, linestyle=(0, (1, 2)), linewidth=1.2, label=f"{floor_name}: {floor:.2f}")
    ax.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None), xlim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=9)
    return figure
