"""How every figure of the course looks, and the one way to start one.

Figures are made without pyplot: no window, no global state, the same bytes on every machine with the same matplotlib.
"""

from typing import Any

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

DPI = 100
FONT_SIZE = 10
INK = "#222222"
PALE = "#bbbbbb"

# Okabe and Ito 2008, "Color Universal Design"; the yellow is left out, since it is too pale for a line on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
LINESTYLES: list[Any] = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1))]
SEQUENTIAL = "cividis"
DIVERGING = "PuOr"
# Relative luminance below which white letters have more contrast than black ones (WCAG 2: (L + 0.05)^2 = 1.05 x 0.05).
DARK_BELOW = 0.179


class CourseAxes(Axes):
    """Axes whose titles are as large as the other text; `set_title` takes its size from global settings otherwise."""

    def set_title(self, label: str, *args: Any, **kwargs: Any) -> Text:
        if not {"size", "fontsize"} & kwargs.keys():
            kwargs["fontsize"] = FONT_SIZE
        return super().set_title(label, *args, **kwargs)


def new_figure(
    nrows: int = 1, ncols: int = 1, width: float = 7.0, height: float = 3.5, **subplots_kw: Any
) -> tuple[Figure, Any]:
    """An empty figure in the course's style, and its axes.

    Args:
        nrows, ncols: the grid of axes.
        width, height: size of the whole figure in inches; 100 pixels an inch.
        subplots_kw: handed to `Figure.subplots` (`sharex`, `width_ratios`, `squeeze` …).

    Returns:
        The figure, and what `Figure.subplots` gives: one `Axes`, or an array of them.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes_kw = {"axes_class": CourseAxes} | subplots_kw.pop("subplot_kw", {})
    if "projection" in axes_kw:
        axes_kw.pop("axes_class")
    axes = figure.subplots(nrows, ncols, subplot_kw=axes_kw, **subplots_kw)
    for ax in np.ravel(np.asarray(axes, dtype=object)):
        tidy(ax)
    return figure, axes


def ink_on(colour: tuple[float, ...]) -> str:
    """White or black, whichever reads better on a colour: red, green, blue from 0 to 1; a fourth number is ignored."""
    red, green, blue = colour[:3]
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return "white" if luminance < DARK_BELOW else "black"


def tidy(ax: Axes) -> None:
    """Light spines, small ticks, and lines that differ in dash as well as in colour."""
    for side, spine in ax.spines.items():
        spine.set_visible(side not in ("top", "right"))
        spine.set_color(PALE)
    ax.tick_params(color=PALE, labelcolor=INK, labelsize=FONT_SIZE - 1)
    ax.xaxis.label.set_fontsize(FONT_SIZE)
    ax.yaxis.label.set_fontsize(FONT_SIZE)
    ax.set_axisbelow(True)
    ax.set_prop_cycle(cycler(color=COLOURS) + cycler(linestyle=LINESTYLES))
