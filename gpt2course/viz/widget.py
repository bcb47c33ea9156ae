"""A figure with sliders. Live in JupyterLab; a still picture wherever there is no kernel."""

from collections.abc import Callable
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from gpt2course.viz.show import bundle, checked_alt, display_with_words, png_bytes

WIDGET_LIMIT_MS = 120
"""a redraw that takes longer lags behind a hand on a slider"""


class Explorer(ipywidgets.VBox):
    """Controls over a picture that is drawn again whenever one of them moves.

    `interact` keeps its picture in the widget state only, and a page without a kernel then shows nothing; this class
    puts a PNG of the present values beside the widget, so that a saved notebook and its HTML show that.

    Args:
        draw: takes the controls' values by keyword, returns the figure. Keep it under 120 ms.
        alt: what the figure shows, in a sentence.
        controls: ipywidgets (IntSlider, Dropdown …) by the keyword that `draw` takes.

    Raises:
        ValueError: if the alt text is empty or there is no control.
    """

    def __init__(self, draw: Callable[..., Figure], *, alt: str, **controls: ipywidgets.ValueWidget) -> None:
        if not controls:
            raise ValueError(
                "no controls; give at least one, such as query=IntSlider(0, 0, 7), or use show(figure, alt)"
            )
        self.draw = draw
        self.alt = checked_alt(alt)
        self.controls = controls
        for name, control in controls.items():
            control.description = control.description or name.replace("_", " ")
            control.tooltip = control.tooltip or control.description
            control.style.description_width = "initial"
        # No tooltip: ipywidgets 8 then asks for a description, which an Image has not, and shows an error instead.
        self.image = ipywidgets.Image(value=png_bytes(draw(**self.values), small=False), format="png")
        self.image.layout.max_width = "100%"
        self.image.layout.align_self = "flex-start"  # a box stretches what is in it to its own width
        self.message = ipywidgets.Label()
        super().__init__([*controls.values(), self.image, self.message])
        for control in controls.values():
            control.observe(self.redraw, names="value")

    @property
    def values(self) -> dict[str, Any]:
        """What the controls say now, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def redraw(self, _change: Any = None) -> None:
        """Draw at the present values. An error in `draw` is shown under the old picture, not swallowed."""
        try:
            self.image.value = png_bytes(self.draw(**self.values), small=False)
        except Exception as error:  # a callback's exception would vanish into the kernel's log
            self.message.value = f"could not draw this: {type(error).__name__}: {error}"
        else:
            self.message.value = ""

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        still, metadata = bundle(png_bytes(self.draw(**self.values)), self.alt)
        return {**(super()._repr_mimebundle_(**kwargs) or {}), **still}, metadata

    def _ipython_display_(self) -> None:
        display_with_words(*self._repr_mimebundle_(), self.alt)
