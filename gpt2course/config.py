"""The shape of a model, checked the moment it is written down."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

POSITIONS = ("learned",)
BACKENDS = ("auto", "reference", "sdpa")


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
    """longest sequence the learned position table can address, in tokens"""
    vocab_size: int = 50257
    """number of token ids"""
    pos: str = "learned"
    """how positions enter the model: "learned" is GPT-2's table"""
    window: int | None = None
    """how many keys a query may see, itself included; None means all of the past"""
    dropout: float = 0.0
    """dropout probability in training (GPT-2 used 0.1)"""
    bias: bool = True
    """biases in the linear layers and layer norms, as GPT-2 has"""
    layer_norm_eps: float = 1e-5
    """added to the variance in every layer norm"""
    attention_backend: str = "auto"
    """"reference" is the hand-written softmax, "sdpa" torch's fused kernel, "auto" picks sdpa"""

    def __post_init__(self) -> None:
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if problems := self._problems():
            raise ValueError("GPTConfig:\n" + "\n".join(f"  - {problem}" for problem in problems))

    def _problems(self) -> list[str]:
        found = []
        sizes = {}
        for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "vocab_size", "window"):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
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
        if self.attention_backend not in BACKENDS:
            found.append(f"attention_backend is {self.attention_backend!r}; it must be one of {', '.join(BACKENDS)}")
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout is {self.dropout!r}; it must lie in [0, 1)")
        if not isinstance(self.bias, bool):
            found.append(f"bias is {self.bias!r}; it must be True or False")
        if not isinstance(self.layer_norm_eps, int | float) or not self.layer_norm_eps > 0.0:
            found.append(f"layer_norm_eps is {self.layer_norm_eps!r}; it must be greater than 0")
        return found

    @property
    def kv_heads(self) -> int:
        """G, the number of key/value heads, never None."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.n_embd // self.n_head

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
        if unknown:
            raise ValueError(f"GPTConfig has no field {', '.join(unknown)}; written by a newer version of gpt2course?")
        return cls(**values)


PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    "tiny": GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=64, vocab_size=50257),
}
