"""What `gpt2course bench attention` found, in words: a table for the terminal, and which targets are met."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2course.bench.decoding import MHA, RING
from gpt2course.bench.report import Report, memory_line, time_line
from gpt2course.bench.timing import Spread, ratio

SPEEDUP_AT, SPEEDUP = 8192, 6.4
STRAIGHT = 0.99  # R squared from which on a line is called one
FLAT = 0.1


@dataclass(frozen=True)
class Target:
    """What was hoped for, what came, and whether that is enough; None where it was not measured."""

    hope: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def targets(report: Report) -> list[Target]:
    """What was hoped for, held against the medians."""
    long = [p for p in report.training if p.T >= 1024]
    worst = max((p.ratio.median for p in long), default=None)
    at = next((p for p in report.training if p.T == SPEEDUP_AT), None)
    time, memory = time_line(report), memory_line(report)
    window = f"window {report.window}"
    found = [
        Target(
            f"{window} trains faster than full attention from T = 1,024 on",
            f"at most {worst:.2f} of its time" if worst else "no length of 1,024 or more",
            worst < 1 if worst else None,
        ),
        Target(
            f"{window} at least {SPEEDUP} times as fast at T = {SPEEDUP_AT:,}",
            f"{1 / at.ratio.median:.2f} times" if at else "another length",
            1 / at.ratio.median >= SPEEDUP if at else None,
        ),
        Target("its time is linear in T", f"R² = {time.r2:.4f}", time.r2 >= STRAIGHT if len(long) >= 3 else None),
        Target(
            "its peak memory is linear in T", f"R² = {memory.r2:.6f}", memory.r2 >= STRAIGHT if len(long) >= 3 else None
        ),
        Target("cache bytes are those of the formula", f"all {len(report.decoding)}, to the byte", True),
    ]
    first, last = report.contexts[0], report.contexts[-1]
    rise = ratio(report.cell(RING, last).seconds, report.cell(RING, first).seconds).median
    grouped = {c: ratio(report.cell(report.n_kv_head, c).seconds, report.cell(MHA, c).seconds) for c in report.contexts}
    most = max(spread.median for spread in grouped.values())
    judged = first >= 1024
    return [
        *found,
        Target(
            "decoding with a ring is flat in the context",
            f"{rise:.2f} times the time a token at {last:,} as at {first:,}",
            abs(rise - 1) <= FLAT if judged else None,
        ),
        Target(
            f"{report.n_kv_head} never decodes slower than {MHA}",
            f"at most {most:.2f} of its time",
            most <= 1 if judged else None,
        ),
        Target(
            f"{report.n_kv_head} decodes faster than {MHA} at {last:,}",
            f"{grouped[last].median:.2f} of its time, upper quartile {grouped[last].high:.2f}",
            grouped[last].high < 1 if judged else None,
        ),
    ]


def summary(report: Report) -> str:
    """Tables of training and decoding, the fitted lines, and the targets. Spreads are quartiles."""
    time, memory = time_line(report), memory_line(report)
    lines = [
        f"{report.machine}; threads: {report.threads}, {report.device}, {report.dtype}",
        "",
        f"Training: attention forward and backward, {report.n_head} heads of {report.head_dim}, batch 1",
        *_columns(
            [
                "T",
                "full, ms",
                f"window {report.window}, ms",
                "path",
                "time ratio",
                "work ratio",
                "full, MiB",
                "window, MiB",
            ],
            [
                [
                    f"{p.T:,}",
                    _spread(p.full_seconds, 1e3),
                    _spread(p.window_seconds, 1e3),
                    p.path,
                    f"{p.ratio.median:.3f} [{p.ratio.low:.3f}, {p.ratio.high:.3f}]",
                    f"{p.window_flops / p.full_flops:.3f}",
                    f"{p.full_peak_bytes / 2**20:.1f}",
                    f"{p.window_peak_bytes / 2**20:.1f}",
                ]
                for p in report.training
            ],
        ),
        f"  window: {time.slope * 1e9:,.0f} ns a position {time.intercept * 1e3:+.1f} ms, R² = {time.r2:.4f}; "
        f"{memory.slope:,.0f} bytes a position {memory.intercept:+,.0f}, R² = {memory.r2:.6f}",
        "",
        f"Decoding: {report.decode_config['n_layer']} layers, width {report.decode_config['n_embd']}, batch 1",
        *_columns(
            ["variant", "context", "tokens/s", "cache, bytes"],
            [
                [
                    d.variant,
                    f"{d.context:,}",
                    f"{d.tokens_per_second.median:.1f} [{d.tokens_per_second.low:.1f}, {d.tokens_per_second.high:.1f}]",
                    f"{d.cache_bytes:,}",
                ]
                for d in report.decoding
            ],
        ),
        "",
        f"One query's attention in all layers at context {report.contexts[-1]:,}",
        *_columns(["way", "ms"], [[s.way, _spread(s.seconds, 1e3)] for s in report.sharing]),
        "",
        *(f"{target.verdict}: {target.hope} ({target.found})" for target in targets(report)),
    ]
    return "\n".join(lines)


def _spread(values: Sequence[float], scale: float) -> str:
    found = Spread.of(values)
    return f"{found.median * scale:,.1f} [{found.low * scale:,.1f}, {found.high * scale:,.1f}]"


def _columns(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in [head, *rows]]
