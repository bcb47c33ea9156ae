"""The shape of a model, checked the moment it is written down."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

POSITIONS = ("learned", "rope")
LAYOUTS = ("half", "interleaved")
SCALINGS = ("linear", "ntk", "yarn", "llama3")
BACKENDS = ("auto", "reference", "sdpa", "blocked", "flex")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are slowed down for texts longer than those of training; formulas in `gpt2course.rope`.

    Raises:
        ValueError: naming every problem at once, each with the value, the limit and the mend.
    """

    kind: str
    """"linear", "ntk", "yarn" or "llama3\""""
    factor: float
    """how many times the trained length is wanted"""
    original_block_size: int | None = None
    """length of training, in tokens; None means the config's block_size"""
    low_freq_factor: float = 1.0
    """llama3: a pair that turns fewer times than this within the trained length is slowed by the whole factor"""
    high_freq_factor: float = 4.0
    """llama3: a pair that turns more often than this is left as it is"""
    beta_slow: float = 1.0
    """yarn: as low_freq_factor"""
    beta_fast: float = 32.0
    """yarn: as high_freq_factor"""
    attention_factor: float | None = None
    """yarn: what cos and sin are multiplied by; None means 0.1 ln(factor) + 1"""

    def __post_init__(self) -> None:
        found = []
        if self.kind not in SCALINGS:
            found.append(f"kind is {self.kind!r}; it must be one of {', '.join(SCALINGS)}")
        if not _positive(self.factor) or self.factor < 1:
            found.append(f"factor is {self.factor!r}; it must be at least 1")
        if self.original_block_size is not None and not _whole(self.original_block_size):
            found.append(
                f"original_block_size is {self.original_block_size!r}; it must be a whole number of at least 1"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            a, b = getattr(self, low), getattr(self, high)
            if not (_positive(a) and _positive(b) and a < b):
                found.append(f"{low} is {a!r} and {high} {b!r}; they must be positive, the first smaller")
        if self.attention_factor is not None and not _positive(self.attention_factor):
            found.append(f"attention_factor is {self.attention_factor!r}; it must be greater than 0, or None")
        if found:
            raise ValueError("RopeScaling:\n" + "\n".join(f"  - {problem}" for problem in found))


@dataclass(frozen=True)
class GPTConfig:
    """Every choice that fixes the shape of a GPT; the defaults are GPT-2 small (124,439,808 parameters).

    Sizes are Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2. The 117M and 345M
    printed there were miscounts; the released checkpoints have the 124M and 355M parameters asserted in our tests.

    Raises:
        ValueError: naming every problem at once, each with the value, the limit and the mend.
    """

    n_layer: int = 12
    """number of blocks"""
    n_head: int = 12
    """number of query heads"""
    n_kv_head: int | None = None
    """number of key/value heads (the number, not the group size); None means n_head, plain multi-head attention"""
    n_embd: int = 768
    """model width C"""
    block_size: int = 1024
    """longest sequence the learned position table can address, in tokens; with "rope" the length of training"""
    vocab_size: int = 50257
    """number of token ids"""
    pos: str = "learned"
    """how positions enter the model: "learned" is GPT-2's table, "rope" turns queries and keys (`gpt2course.rope`)"""
    rope_theta: float = 10000.0
    """rope: base of the frequencies; the larger, the slower the slowest pair turns"""
    rope_fraction: float = 1.0
    """rope: share of each head's width that is turned, from its start"""
    rope_layout: str = "half"
    """rope: which numbers form a pair: "half" i and i + R/2, as Hugging Face; "interleaved" 2i and 2i + 1"""
    rope_scaling: RopeScaling | None = None
    """rope: slower frequencies for texts longer than those of training"""
    window: int | None = None
    """how many keys a query may see, itself included; None means all of the past"""
    window_pattern: str = "S"
    """which layers have the window, repeated over them: S short (the window), L long (all of the past)"""
    sinks: int = 0
    """with a window: so many of the first keys are always visible (Xiao et al. 2023, arXiv:2309.17453)"""
    dropout: float = 0.0
    """dropout probability in training (GPT-2 used 0.1)"""
    bias: bool = True
    """biases in the linear layers and layer norms, as GPT-2 has"""
    layer_norm_eps: float = 1e-5
    """added to the variance in every layer norm"""
    attention_backend: str = "auto"
    """how whole sequences are computed: "reference" by hand, "sdpa" torch's fused kernel, "blocked" and "flex" skip
    what a window hides, "auto" picks. With padding or after a cached past it is "sdpa", unless this is "reference" """

    def __post_init__(self) -> None:
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        scaling = self.rope_scaling
        if isinstance(scaling, RopeScaling) and scaling.original_block_size is None and _whole(self.block_size):
            object.__setattr__(self, "rope_scaling", replace(scaling, original_block_size=self.block_size))
        if problems := self._problems():
            raise ValueError("GPTConfig:\n" + "\n".join(f"  - {problem}" for problem in problems))

    def _problems(self) -> list[str]:
        found = []
        sizes = {}
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size", "window"):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            if _whole(value):
                sizes[name] = value
            else:
                found.append(f"{name} is {value!r}; it must be a whole number of at least 1")
        if {"n_head", "n_embd"} <= sizes.keys() and self.n_embd % self.n_head:
            found.append(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; "
                f"the heads share the width, so try n_embd {-(-self.n_embd // self.n_head) * self.n_head}"
            )
        if {"n_head", "n_kv_head"} <= sizes.keys() and self.n_head % sizes["n_kv_head"]:
            divisors = [d for d in range(1, self.n_head + 1) if self.n_head % d == 0]
            found.append(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}; use one of {divisors}")
        if self.pos not in POSITIONS:
            found.append(f"pos is {self.pos!r}; it must be one of {', '.join(POSITIONS)}")
        else:
            found += self._rope_problems({"n_head", "n_embd"} <= sizes.keys())
        found += self._window_problems()
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout is {self.dropout!r}; it must lie in [0, 1)")
        if not isinstance(self.bias, bool):
            found.append(f"bias is {self.bias!r}; it must be True or False")
        if not isinstance(self.layer_norm_eps, int | float) or not self.layer_norm_eps > 0.0:
            found.append(f"layer_norm_eps is {self.layer_norm_eps!r}; it must be greater than 0")
        return found

    def _rope_problems(self, sized: bool) -> list[str]:
        found = []
        if self.rope_layout not in LAYOUTS:
            found.append(f"rope_layout is {self.rope_layout!r}; it must be one of {', '.join(LAYOUTS)}")
        if not _positive(self.rope_theta) or self.rope_theta <= 1:
            found.append(f"rope_theta is {self.rope_theta!r}; it must be greater than 1, such as 10000.0")
        if not _positive(self.rope_fraction) or self.rope_fraction > 1:
            found.append(f"rope_fraction is {self.rope_fraction!r}; it must lie in (0, 1]")
        elif self.pos == "rope" and sized and (self.rotary_dim % 2 or not self.rotary_dim):
            found.append(
                f"rope_fraction {self.rope_fraction} of head_dim {self.head_dim} are {self.rotary_dim} numbers; "
                "pairs are turned, so it must be an even number of at least 2"
            )
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            found.append(f"rope_scaling is {self.rope_scaling!r}; it must be a RopeScaling, or None")
        elif self.rope_scaling is not None and self.pos != "rope":
            found.append(f"rope_scaling is set and pos is {self.pos!r}; scaling needs pos 'rope'")
        return found

    def _window_problems(self) -> list[str]:
        found = []
        if not isinstance(self.window_pattern, str) or not self.window_pattern or set(self.window_pattern) - set("SL"):
            found.append(
                f"window_pattern is {self.window_pattern!r}; it must be made of S (short) and L (long), such as 'SSSL'"
            )
        elif self.window_pattern != "S" and self.window is None:
            found.append(f"window_pattern is {self.window_pattern!r} without a window; give window as well, or drop it")
        if self.sinks != 0 and not _whole(self.sinks):
            found.append(f"sinks is {self.sinks!r}; it must be a whole number of at least 0")
        elif self.sinks and self.window is None:
            found.append(
                f"sinks is {self.sinks} without a window, where every key is visible; give window as well, or drop it"
            )
        if self.attention_backend not in BACKENDS:
            found.append(f"attention_backend is {self.attention_backend!r}; it must be one of {', '.join(BACKENDS)}")
        elif self.attention_backend in ("blocked", "flex") and self.window is None:
            found.append(
                f"attention_backend {self.attention_backend!r} skips what a window hides, and there is no window; "
                "use auto or sdpa"
            )
        return found

    def layer_window(self, layer: int) -> int | None:
        """The window of one layer, by `window_pattern`; None means all of the past."""
        return self.window if self.window_pattern[layer % len(self.window_pattern)] == "S" else None

    @property
    def kv_heads(self) -> int:
        """G, the number of key/value heads, never None."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.n_embd // self.n_head

    @property
    def rotary_dim(self) -> int:
        """R, how many numbers of a head are turned."""
        return int(self.head_dim * self.rope_fraction + 1e-6)  # 88 x (30 / 88) is a little less than 30

    def with_(self, **changes: Any) -> "GPTConfig":
        """A copy with some fields changed, validated again. A new n_head takes an n_kv_head that equalled it along."""
        if "n_head" in changes and self.n_kv_head == self.n_head:
            changes.setdefault("n_kv_head", None)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        """The config stored by `to_dict`. Raises ValueError naming unknown fields."""
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if isinstance(scaling := values.get("rope_scaling"), dict):
            unknown += [
                f"rope_scaling.{name}" for name in sorted(scaling.keys() - {f.name for f in fields(RopeScaling)})
            ]
        if unknown:
            raise ValueError(f"GPTConfig has no field {', '.join(unknown)}; written by a newer version of gpt2course?")
        if isinstance(scaling, dict):
            values = {**values, "rope_scaling": RopeScaling(**scaling)}
        return cls(**values)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "tiny": GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=64, vocab_size=50257),
}
