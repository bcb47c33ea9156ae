"""What `gpt2course bench attention` found, as data: kept as JSON, and read from it again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2course.bench.decoding import Decoding, Sharing
from gpt2course.bench.timing import Line, Spread
from gpt2course.bench.training import Length

SCHEMA = 1
FILE = "attention.json"
RECORD = Path(__file__).parents[1] / "assets" / "benchmarks" / FILE


@dataclass(frozen=True)
class Report:
    """Everything that was measured, and where; `save` and `load` keep it as JSON."""

    command: str
    machine: str
    torch: str
    device: str
    dtype: str
    threads: int
    omp_wait_policy: str
    window: int
    n_head: int
    head_dim: int
    decode_config: dict[str, Any]
    training: list[Length]
    decoding: list[Decoding]
    sharing: list[Sharing]

    @property
    def n_kv_head(self) -> str:
        """Name of the variant with few key heads."""
        return next(d.variant for d in self.decoding if d.variant.startswith("GQA"))

    def cell(self, variant: str, context: int) -> Decoding:
        return next(d for d in self.decoding if (d.variant, d.context) == (variant, context))

    @property
    def contexts(self) -> list[int]:
        return sorted({d.context for d in self.decoding})


def command_line(flags: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """The shell's words for a run: the flags that were not left as they are. Where it was written to is no matter."""
    words = ["gpt2course", "bench", "attention"]
    for name, value in flags.items():
        if value != defaults[name]:
            values = [] if value is True else value if isinstance(value, tuple) else [value]
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    return " ".join(words)


def time_line(report: Report) -> Line:
    """Seconds of the window's forward and backward pass by T: the line through the medians."""
    return Line.through([p.T for p in report.training], [Spread.of(p.window_seconds).median for p in report.training])


def memory_line(report: Report) -> Line:
    """Peak bytes of the window's forward and backward pass by T."""
    return Line.through([p.T for p in report.training], [p.window_peak_bytes for p in report.training])


def load(path: Path) -> Report:
    """The report that `save` wrote. Raises ValueError for another schema."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} is not a report of schema {SCHEMA}; make it again with `gpt2course bench attention`")
    record.pop("summary")
    for name, kind in (("training", Length), ("decoding", Decoding), ("sharing", Sharing)):
        record[name] = [kind(**row) for row in record[name]]
    return Report(**record)


def recorded() -> Report:
    """The report that comes with the course. Raises FileNotFoundError if the package was installed without it."""
    return load(RECORD)
