"""Put a figure into a notebook as a PNG that also says in words what it shows."""

import io
from base64 import b64encode
from html import escape
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from gpt2course.viz.style import DPI

FEW_COLOURS = 32
COLOURS = 192  # of a palette


def png_bytes(figure: Figure, small: bool = True) -> bytes:
    """The figure as a PNG at 100 dots an inch, the same bytes each time: no date, no version of the software.

    Lines, boxes and letters need few colours: a palette makes the file less than half as large. A figure with an
    image in it (`imshow`) keeps every colour, since a palette would put steps into its colour map, unless that map has
    but few steps itself (`colormap.resampled(21)`).

    Args:
        figure: what to draw.
        small: look for a palette, which takes some ten milliseconds; a picture that is not kept can do without.
    """
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    if not small or any(image.get_cmap().N > FEW_COLOURS for ax in figure.axes for image in ax.images):
        return out.getvalue()
    packed = io.BytesIO()
    with Image.open(out) as full:
        # Of Pillow's methods the one that keeps white white; a test holds the others to 8 of 255.
        palette = full.convert("RGB").quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(packed, "png", optimize=True)
    return packed.getvalue()


def checked_alt(alt: str) -> str:
    """The alt text on one line.

    Raises:
        ValueError: if there is none.
    """
    text = " ".join(alt.split()) if isinstance(alt, str) else ""
    if not text:
        raise ValueError(f"alt is {alt!r}; say in a sentence what the figure shows, for readers who cannot see it")
    return text


def bundle(png: bytes, words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A PNG with its alt text, as data and metadata of a notebook's output."""
    return {"image/png": b64encode(png).decode(), "text/plain": words}, {"image/png": {"alt": words}}


def display_with_words(data: dict[str, Any], metadata: dict[str, Any], alt: str) -> None:
    """Display a picture, and under it its alt text, folded.

    JupyterLab and nbconvert's page both drop an output's alt text, and Lab cuts pictures out of HTML from a notebook
    that is not trusted yet; a folded paragraph of HTML reaches the reader in each of them.
    """
    from IPython.display import display

    display(data, metadata=metadata, raw=True)
    display_words(alt)


def display_words(alt: str) -> None:
    """Display an alt text, folded."""
    from IPython.display import display

    folded = f"<details><summary>Figure in words</summary><p>{escape(alt)}</p></details>"
    display({"text/html": folded, "text/plain": alt}, raw=True)


class Picture:
    """A PNG and its alt text, as a notebook displays them."""

    def __init__(self, png: bytes, alt: str) -> None:
        self.png = png
        self.alt = checked_alt(alt)

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        return bundle(self.png, self.alt)

    def _ipython_display_(self) -> None:
        display_with_words(*bundle(self.png, self.alt), self.alt)


def show(figure: Figure, alt: str) -> Picture:
    """Display a figure, as the last line of a cell.

    Args:
        figure: from `gpt2course.viz.style.new_figure`, or any matplotlib figure.
        alt: what the figure shows, in a sentence.

    Raises:
        ValueError: if the alt text is empty.
    """
    return Picture(png_bytes(figure), alt)
