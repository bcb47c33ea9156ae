"""What the price tag of the retrofits found: its table, its JSON, and the record that comes with the course."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

SCHEMA = 1
FILE = "price_tag.json"
RECORD = Path(__file__).parent / "assets" / "benchmarks" / FILE


@dataclass(frozen=True)
class Settings:
    """What the perplexities depend on. The fields are the flags of `gpt2course price-tag`."""

    model: str = "course"
    """"course", "gpt2" … "gpt2-xl", "auto", owner/name, folder, file"""
    corpus: str = "stdlib"
    """what to heal and evaluate on, as in `gpt2course data`"""
    steps: int = 200
    """healing steps"""
    batch_size: int = 8
    """rows of block_size tokens a step"""
    learning_rate: float = 1e-3
    """the peak; it rises for a tenth of the steps and falls to zero"""
    tokens: int = 65_536
    """held-out tokens to predict"""
    seed: int = 0
    """of the order of the training windows"""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """of the products in healing; evaluation is in float32"""
    full_vocabulary: bool = False
    """compare with all tokens in healing too, not only with those that occur in the training text; slower"""
    device: str = "cpu"
    """where to compute: cpu, cuda, mps"""

    def check(self) -> None:
        """Raise ValueError naming every number that is too small."""
        small = [
            f"{name} is {value}; it must be at least 1"
            for name in ("steps", "batch_size", "tokens")
            if (value := getattr(self, name)) < 1
        ]
        if not 0 < self.learning_rate < 1:
            small.append(f"learning_rate is {self.learning_rate}; it must lie between 0 and 1")
        if small:
            raise ValueError("price-tag:\n" + "\n".join(f"  - {problem}" for problem in small))

    @property
    def command(self) -> str:
        """The shell's words for these settings."""
        words = ["gpt2course price-tag"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default or field.name == "steps":
                flag = "--" + field.name.replace("_", "-")
                words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
        return " ".join(words)


@dataclass(frozen=True)
class Speed:
    """Decoding beside the unchanged model, both in turns; medians, and the quartiles of the ratio."""

    batch_size: int
    """sequences decoded at once"""
    tokens_per_second: float
    """of all the sequences together"""
    unchanged_tokens_per_second: float
    """of the unchanged model, measured in between"""
    ratio: float
    """median of the ratios of neighbouring blocks; above 1 is faster than the unchanged model"""
    ratio_low: float
    ratio_high: float
    """first and third quartile of those ratios"""
    blocks: int
    """how many pairs were measured"""
    threads: int
    machine: str


@dataclass(frozen=True)
class Row:
    """The price of one retrofit. Perplexities are of held-out text, full vocabulary, at block_size."""

    name: str
    done: str
    """what was done, by the operations' own reports"""
    parameters: int
    kv_per_token: int
    """bytes a token of context costs in the cache, one sequence, in layers that see all of the past"""
    kv_fixed: int
    """bytes of the rings, which don't grow"""
    perplexity_after: float
    """right after surgery"""
    perplexity_healed: float
    """after the healing steps"""
    training_losses: tuple[float, ...]
    """of every healing step"""
    seconds_a_step: float
    machine: str
    speeds: tuple[Speed, ...] = ()

    def kv_bytes(self, context: int) -> int:
        """Bytes of one sequence's cache at that many tokens of context (the rings are kept whole from the start)."""
        return self.kv_fixed + self.kv_per_token * context


@dataclass(frozen=True)
class Prices:
    """All rows, and what they were made with. The first row is the unchanged model, trained on by as much."""

    command: str
    """makes the same again"""
    model: str
    """which model, in a sentence"""
    torch: str
    settings: Settings
    weights: str
    """SHA-256 of the model's tensors"""
    corpus_fingerprint: str
    """of the tokens, as in `data.Prepared`"""
    held_out: str
    """which text the perplexities are of"""
    perplexity: float
    """of the model as it was"""
    block_size: int
    """tokens of a training and evaluation window, and of the context that the cache is stated at"""
    rows: tuple[Row, ...] = ()
    schema: int = SCHEMA

    def with_row(self, row: Row) -> "Prices":
        """With one row more, or in place of the one of that name."""
        rows = [row if old.name == row.name else old for old in self.rows]
        return replace(self, rows=tuple(rows if row.name in [old.name for old in self.rows] else [*rows, row]))

    def in_order(self, names: Sequence[str]) -> "Prices":
        """With the rows in the order of these names, any others after them."""
        place = {name: i for i, name in enumerate(names)}
        return replace(self, rows=tuple(sorted(self.rows, key=lambda row: place.get(row.name, len(place)))))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Prices":
        """Read what `to_json` wrote. Raises ValueError if it is something else, or of another version."""
        try:
            values = json.loads(text)
            if values.get("schema") != SCHEMA:
                raise ValueError(f"schema is {values.get('schema')!r}, this gpt2course reads {SCHEMA}")
            rows = []
            for row in values["rows"]:
                row["speeds"] = tuple(Speed(**speed) for speed in row["speeds"])
                row["training_losses"] = tuple(row["training_losses"])
                rows.append(Row(**row))
            return cls(**{**values, "settings": Settings(**values["settings"]), "rows": tuple(rows)})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no price tag that can be read ({error}); make it again") from error

    def save(self, folder: Path) -> Path:
        """Write FILE in the folder, whole or not at all: beside it first, then renamed over it."""
        folder.mkdir(parents=True, exist_ok=True)
        beside, path = folder / f"{FILE}.part-{os.getpid()}", folder / FILE
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)  # also after Ctrl-C
        return path

    def __str__(self) -> str:
        """The table of the terminal."""
        batch_sizes = [speed.batch_size for speed in self.rows[0].speeds] if self.rows else []
        head = ["retrofit", "before", "after", "healed", f"KV bytes/token at {self.block_size}"]
        for size in batch_sizes:
            head += [f"tokens/s x{size}", "ratio (quartiles)"]
        table = [head]
        for row in self.rows:
            cells = [row.name, *map(number, (self.perplexity, row.perplexity_after, row.perplexity_healed))]
            cells.append(f"{row.kv_bytes(self.block_size) / self.block_size:,.0f}")
            for speed in row.speeds:
                cells.append(f"{speed.tokens_per_second:,.0f}")
                cells.append(f"{speed.ratio:.2f} ({speed.ratio_low:.2f}-{speed.ratio_high:.2f})")
            table.append(cells)
        step = f"{self.settings.batch_size * self.block_size:,} tokens"
        about = f"Perplexity of {self.held_out}. Healed: {self.settings.steps} steps of {step}."
        return f"{self.model}\n{about}\n{aligned(table)}"


def number(perplexity: float) -> str:
    """As many digits as tell perplexities apart: 11.43, 431.2, 1,790."""
    if perplexity < 100:
        return f"{perplexity:.2f}"
    return f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Rows of words as columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        words = [word.rjust(width) for word, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *words]))
    return "\n".join(lines)


def load(path: Path) -> Prices:
    """The prices in a file. Raises FileNotFoundError, or ValueError if it can't be read, each with the file's name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; make it with `gpt2course price-tag --out {path.parent}`")
    try:
        return Prices.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def recorded() -> Prices:
    """The prices measured on the course checkpoint, which come with the course."""
    return load(RECORD)
