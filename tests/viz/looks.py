"""What a reader would see wrong with a figure, told without looking."""

import io

from matplotlib.figure import Figure
from matplotlib.text import Text


def outside(figure: Figure) -> list[str]:
    """Texts that stick out of the figure; labels of ticks beyond the ends of an axis exist, and are not drawn."""
    figure.savefig(io.BytesIO(), format="png")
    renderer = figure.canvas.get_renderer()
    hidden = []
    for axis in [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        drawn = [t for t in ticks if axis.axes.axison and low <= t.get_loc() <= high]
        hidden += [label for t in ticks if t not in drawn for label in (t.label1, t.label2)]
    found = []
    for text in figure.findobj(Text):
        box = text.get_window_extent(renderer)
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1
        if text.get_text() and text.get_visible() and text not in hidden and not inside:
            found.append(text.get_text())
    return found
