"""The price tag of the retrofits as a figure: perplexity, cache and speed side by side, one line a retrofit."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from gpt2course.prices import Prices, number
from gpt2course.viz.style import COLOURS, FONT_SIZE, INK, PALE, new_figure

SMALL = FONT_SIZE - 2
AFTER, HEALED = COLOURS[1], COLOURS[0]
MARKERS = ("o", "D", "s", "^")


def price_tag_figure(prices: Prices) -> Figure:
    """Three panels: perplexity from right after surgery to healed, cache bytes, decoding speed beside unchanged."""
    figure, axes = new_figure(
        1, 3, width=10.0, height=1.5 + 0.38 * max(1, len(prices.rows)), sharey=True, width_ratios=(2.2, 1, 1.2)
    )
    _perplexity(axes[0], prices)
    _cache(axes[1], prices)
    _speed(axes[2], prices)
    axes[0].set_yticks(range(len(prices.rows)), [row.name for row in prices.rows])
    axes[0].set_ylim(len(prices.rows) - 0.4, -0.6)
    for ax in axes:
        ax.grid(axis="x", color=PALE, lw=0.5)
        ax.tick_params(axis="y", length=0)
    return figure


def _perplexity(ax: Axes, prices: Prices) -> None:
    places = range(len(prices.rows))
    after = [row.perplexity_after for row in prices.rows]
    healed = [row.perplexity_healed for row in prices.rows]
    ax.hlines(places, after, healed, color=PALE, lw=3, linestyle="-", zorder=1)
    # The ring lies over the dot, so that both are seen where healing changed little.
    ax.plot(after, places, "o", mfc="none", mew=1.6, color=AFTER, ms=8, zorder=4, label="right after surgery")
    steps = f"after {prices.settings.steps} healing steps"
    ax.plot(healed, places, "o", mew=0, color=HEALED, ms=7, zorder=3, label=steps)
    ax.axvline(
        prices.perplexity, color=INK, ls="--", lw=1, zorder=0, label=f"before surgery: {number(prices.perplexity)}"
    )
    if healed:
        # What more training does to a model nobody touched: the healed dots compare with this, not with "before".
        control = f"{prices.rows[0].name}, trained on as long: {number(healed[0])}"
        ax.axvline(healed[0], color=HEALED, ls=":", lw=1.4, zorder=0, label=control)
    ax.set_xscale("log")
    low, high = min([prices.perplexity, *healed, *after]), max([prices.perplexity, *healed, *after])
    span = math.log(max(high / low, 1.5))
    ax.set_xlim(low * math.exp(-0.18 * span), high * math.exp(0.18 * span))
    for place, a, h in zip(places, after, healed, strict=True):
        # The smaller number stands left of its dot and the larger right, so that they never meet.
        _beside(ax, a, place, AFTER, left=a < h)
        _beside(ax, h, place, HEALED, left=a >= h)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("held-out perplexity (log scale; lower is better)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=SMALL, handletextpad=0.3)


def _beside(ax: Axes, value: float, place: int, colour: str, left: bool) -> None:
    """A perplexity in its dot's colour, on white, since a grid line may run under it."""
    side, gap = ("right", -7) if left else ("left", 7)
    ax.annotate(
        number(value),
        (value, place),
        (gap, 0),
        textcoords="offset points",
        ha=side,
        va="center",
        size=SMALL,
        color=colour,
        bbox={"fc": "white", "ec": "none", "pad": 0.6},
        zorder=2,
    )


def _cache(ax: Axes, prices: Prices) -> None:
    sizes = [row.kv_bytes(prices.block_size) / prices.block_size for row in prices.rows]
    ax.barh(range(len(sizes)), sizes, color=COLOURS[4], height=0.6)
    for place, value in enumerate(sizes):
        ax.annotate(f"{value:,.0f}", (value, place), (3, 0), textcoords="offset points", va="center", size=SMALL)
    ax.set_xlim(0, 1.25 * max(sizes, default=1))
    ax.set_xlabel(f"KV cache, bytes a token\nin a text of {prices.block_size:,}")


def _speed(ax: Axes, prices: Prices) -> None:
    batch_sizes = [speed.batch_size for speed in prices.rows[0].speeds] if prices.rows else []
    for i, batch_size in enumerate(batch_sizes):
        shift = 0.3 * (i - (len(batch_sizes) - 1) / 2)
        found = [(place, row.speeds[i]) for place, row in enumerate(prices.rows)]
        ratios = [speed.ratio for _, speed in found]
        errors = [[s.ratio - s.ratio_low for _, s in found], [s.ratio_high - s.ratio for _, s in found]]
        places = [place + shift for place, _ in found]
        label = f"{batch_size} at once" if batch_size > 1 else "1 sequence"
        ax.errorbar(
            ratios, places, xerr=errors, fmt=MARKERS[i], ms=5, color=COLOURS[2 + i], capsize=2, lw=1, label=label
        )
    ax.axvline(1.0, color=INK, ls="--", lw=1, zorder=0)
    ax.set_xlabel("decoding speed / unchanged\n(median, quartiles)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=SMALL, handletextpad=0.1)
