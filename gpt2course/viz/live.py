"""A picture that is drawn again in place while something runs, under a bar with its rate and the time left."""

import time
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from gpt2course.viz.show import bundle, checked_alt, display_words, png_bytes

EVERY_S = 1.0
LEAST_WORK = 15
"""so many times as long as drawing takes, the next picture waits: a slow machine works, and does not only draw"""


class Live:
    """Show how a run goes while it goes; what stays in a saved notebook is the last picture, with its words.

        with Live(draw, "The loss falls.", total=100) as live:
            for step in range(100):
                ...
                live.update(step + 1)

    Where nothing can be displayed it does nothing.

    Args:
        draw: takes nothing, returns the figure of what is known by now. Called about once a second, and at the end.
        alt: what the last figure shows, in a sentence.
        total: how many steps there will be.
        unit: what a step is called.

    Raises:
        ValueError: if the alt text is empty.
    """

    def __init__(self, draw: Callable[[], Figure], alt: str, total: int, unit: str = "step") -> None:
        self.draw, self.alt, self.total, self.unit = draw, checked_alt(alt), total, unit
        self.done = 0
        self.started = self.drawn = 0.0
        self.pause = EVERY_S
        self._bar: Any = None
        self._picture: Any = None

    def __enter__(self) -> "Live":
        from IPython.display import display

        self.started = self.drawn = time.perf_counter()
        self._bar = display(self.bar(), raw=True, display_id=True)
        return self

    def update(self, done: int) -> None:
        """So many steps are done."""
        self.done = done
        began = time.perf_counter()
        if began - self.drawn >= self.pause:
            self._draw(small=False)
            if self._bar is not None:
                self._bar.update(self.bar(), raw=True)
            self.drawn = time.perf_counter()
            self.pause = max(EVERY_S, LEAST_WORK * (self.drawn - began))

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.update(self.bar(ended=True), raw=True)
        if self.done:
            self._draw(small=True)
            display_words(self.alt)

    def _draw(self, small: bool) -> None:
        from IPython.display import display

        data, metadata = bundle(png_bytes(self.draw(), small=small), self.alt)
        if self._picture is None:
            self._picture = display(data, metadata=metadata, raw=True, display_id=True)
        else:
            self._picture.update(data, metadata=metadata, raw=True)

    def bar(self, ended: bool = False) -> dict[str, str]:
        """The bar and its line of text, as a notebook's output."""
        seconds = time.perf_counter() - self.started
        rate = self.done / seconds if seconds > 0 else 0.0
        text = f"{self.done} of {self.total} {self.unit}s"
        if ended:
            text += f" in {seconds:.1f} s"
        elif rate:
            text += f", {rate:.1f} a second, {(self.total - self.done) / rate:.0f} s left"
        return {"text/plain": text, "text/html": f'<progress value="{self.done}" max="{self.total}"></progress> {text}'}
