"""Figures of chapter 05: the next-token distribution under temperature, top-k and top-p, and what the cache saves."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from gpt2course.viz.style import COLOURS, INK, LINESTYLES, PALE, new_figure

Values = npt.NDArray[np.floating]


def next_tokens(tokens: Sequence[str], before: Values, after: Values, title: str) -> Figure:
    """The likeliest next tokens: probability as the model gives it, and after the filters.

    Args:
        tokens: (n,) token texts, likeliest first.
        before: (n,) probabilities at temperature 1 without filters.
        after: (n,) probabilities after the filters; zero where a token was removed.
        title: put above.
    """
    figure, ax = new_figure(width=7.5, height=3.6)
    x = np.arange(len(tokens))
    ax.bar(x - 0.2, before, width=0.4, color=PALE, label="model, temperature 1")
    ax.bar(x + 0.2, after, width=0.4, color=COLOURS[0], label="after the filters")
    for i in np.flatnonzero(after == 0):
        ax.text(i + 0.2, 0.004, "×", color=COLOURS[1], ha="center", va="bottom", fontsize=11)
    ax.set_xticks(x, [repr(token)[1:-1] for token in tokens], rotation=50, ha="right", family="monospace")
    ax.set_ylim(0, max(0.5, float(after.max()) * 1.08, float(before.max()) * 1.08))
    ax.set_ylabel("probability")
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def cache_times(contexts: Sequence[int], times: Mapping[str, Sequence[Sequence[float]]], machine: str) -> Figure:
    """Milliseconds a new token against the length of the context, with every repeat as a dot.

    Args:
        contexts: tokens of context.
        times: by name, for each context the repeats in seconds.
        machine: what it was measured on.
    """
    figure, ax = new_figure(width=7.0, height=3.6)
    for i, (name, rows) in enumerate(times.items()):
        ms = [np.array(row) * 1e3 for row in rows]
        ax.plot(
            contexts, [np.median(row) for row in ms], color=COLOURS[i], linestyle=LINESTYLES[i], linewidth=2, label=name
        )
        for context, row in zip(contexts, ms, strict=True):
            ax.plot([context] * len(row), row, "o", color=COLOURS[i], markersize=3, alpha=0.5, linestyle="none")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks(contexts, [str(c) for c in contexts])
    ax.set_xlabel("tokens of context")
    ax.set_ylabel("milliseconds a new token")
    ax.set_title(f"line: median, dots: repeats, on\n{machine}", fontsize=9, loc="left", color=INK)
    ax.legend(frameon=False)
    return figure
