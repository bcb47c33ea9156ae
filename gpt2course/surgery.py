"""Retrofits on a trained model: fewer key/value heads, a window, rotary positions. `gpt2course.healing` comes after.

Each operation leaves the given model as it was, and returns a new one with a report of what was done.

Legend: T positions, C model width, H query heads, G key/value heads, D head width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2course.config import GPTConfig, RopeScaling
from gpt2course.hf_format import HEAD
from gpt2course.kv_cache import cache_bytes
from gpt2course.model import GPT

METHODS = ("mean", "first")


@dataclass(frozen=True)
class KVCost:
    """What one sequence costs in the cache: `fixed` bytes, and `per_token` more for each token of context."""

    per_token: int
    """bytes a token, in the layers that see all of the past"""
    fixed: int
    """bytes of the rings, in the layers with a window; they don't grow"""

    @classmethod
    def of(cls, config: GPTConfig, bytes_per_number: int = 4) -> "KVCost":
        """The cost by the formula of `kv_cache.cache_bytes`, which is a straight line in the context."""
        one, two = (cache_bytes(config, capacity=n, bytes_per_number=bytes_per_number) for n in (1, 2))
        return cls(per_token=two - one, fixed=2 * one - two)

    def __str__(self) -> str:
        parts = [f"{self.fixed:,} bytes"] if self.fixed else []
        parts += [f"{self.per_token:,} bytes a token"] if self.per_token else []
        return " + ".join(parts)


@dataclass(frozen=True)
class Surgery:
    """What was done to a model. `print` it."""

    done: str
    """the operation in words"""
    before: GPTConfig
    after: GPTConfig
    parameters_before: int
    parameters_after: int
    bytes_per_number: int
    """of the weights' dtype, in which the cache is kept as well"""
    notes: tuple[str, ...] = ()
    """what the reader should know about it"""

    @property
    def kv_before(self) -> KVCost:
        return KVCost.of(self.before, self.bytes_per_number)

    @property
    def kv_after(self) -> KVCost:
        return KVCost.of(self.after, self.bytes_per_number)

    def __str__(self) -> str:
        old, new = self.before.to_dict(), self.after.to_dict()
        changes = [f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]
        lines = [
            self.done,
            f"config       {', '.join(changes) or 'unchanged'}",
            f"parameters   {self.parameters_before:,} -> {self.parameters_after:,}",
            f"KV cache     {self.kv_before} -> {self.kv_after}",
            *(f"note         {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def to_gqa(model: GPT, n_kv_head: int, method: str = "mean") -> tuple[GPT, Surgery]:
    """Fewer key/value heads: each group of consecutive heads is pooled into one.

    Ainslie et al. 2023, arXiv:2305.13245, section 2.1. Query head h reads key head h // (H // G), so the heads of a
    group lie side by side in `c_attn`, whose (H + 2 G) x D outputs are queries, keys, values. Queries stay as they are.

    Args:
        model: with G key/value heads.
        n_kv_head: how many to keep; 1 is multi-query attention.
        method: "mean" pools the weights (and biases) of a group by their mean, "first" keeps the group's first head.

    Raises:
        ValueError: if n_kv_head does not divide the present number of key/value heads, or the method is unknown.
    """
    config = model.config
    G, D, Q = config.kv_heads, config.head_dim, config.n_head * config.head_dim
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be mean or first")
    if not isinstance(n_kv_head, int) or isinstance(n_kv_head, bool) or n_kv_head < 1 or G % n_kv_head:
        divisors = [d for d in range(1, G + 1) if G % d == 0]
        raise ValueError(
            f"n_kv_head {n_kv_head!r} does not divide the {G} key/value heads that the model has; use one of {divisors}"
        )

    def pooled(rows: Tensor) -> Tensor:
        """(G x D, …) to (n_kv_head x D, …)."""
        groups = rows.unflatten(0, (n_kv_head, G // n_kv_head, D))
        return (groups.mean(1) if method == "mean" else groups[:, 0]).flatten(0, 1)

    state = copied_state(model)
    if n_kv_head < G:
        for name in [name for name in state if ".c_attn." in name]:
            q, k, v = state[name].split([Q, G * D, G * D])
            state[name] = torch.cat([q, pooled(k), pooled(v)])
    how = "the mean of each group" if method == "mean" else "the first of each group"
    done = f"{G} key/value heads -> {n_kv_head}: {how} of {G // n_kv_head}; {config.n_head} query heads as before"
    return rebuilt(model, config.with_(n_kv_head=n_kv_head), state, done)


def to_window(model: GPT, window: int, sinks: int = 0, pattern: str = "S") -> tuple[GPT, Surgery]:
    """A sliding window in the layers that the pattern marks with S. No weight changes; a window set before is replaced.

    Args:
        model: any.
        window: how many keys a query may see, itself included.
        sinks: the first so many keys stay visible (Xiao et al. 2023, arXiv:2309.17453).
        pattern: S short (the window), L long (all of the past), repeated over the layers.

    Raises:
        ValueError: for values that `GPTConfig` refuses, or a pattern that leaves no layer with a window.
    """
    config = model.config.with_(window=window, sinks=sinks, window_pattern=pattern)
    layers = [i for i in range(config.n_layer) if config.layer_window(i) is not None]
    if not layers:
        raise ValueError(f"pattern {pattern!r} gives none of the {config.n_layer} layers a window; begin it with S")
    done = f"window of {window} keys in {len(layers)} of {config.n_layer} layers" + f", {sinks} sinks" * (sinks > 0)
    notes = []
    if len(layers) == config.n_layer and not sinks:
        notes.append(f"news travels at most {len(layers)} x {window - 1} = {len(layers) * (window - 1):,} tokens")
    if window >= config.block_size:
        notes.append(f"block_size is {config.block_size:,}: within it the window hides nothing")
    return rebuilt(model, config, copied_state(model), done, *notes)


def to_rope(
    model: GPT, theta: float = 10000.0, fraction: float = 1.0, scaling: RopeScaling | None = None
) -> tuple[GPT, Surgery]:
    """Rotary positions in place of the learned table.

    The table's mean row is added to every row of `wte`, so that the layers go on seeing the average position vector
    they were trained with. Head and embedding are one tensor, so each logit of a position becomes h·w + h·m: the same
    number h·m for every token, which softmax does not see. What told one position from another is lost, and queries
    and keys were never trained to be turned: without healing the perplexity jumps.

    Args:
        model: with pos "learned".
        theta, fraction, scaling: `rope_theta`, `rope_fraction` and `rope_scaling` of the config.

    Raises:
        ValueError: if the model has rotary positions already, or for values that `GPTConfig` refuses.
    """
    if model.config.pos == "rope":
        raise ValueError("the model has rotary positions already; change its rope fields with config.with_ instead")
    config = model.config.with_(pos="rope", rope_theta=theta, rope_fraction=fraction, rope_scaling=scaling)
    state = copied_state(model)
    # In float64, and so on the CPU: not every accelerator has it.
    table_TC, tokens_VC = state.pop("wpe.weight").cpu().double(), state["wte.weight"]
    mean_C = table_TC.mean(0)
    state["wte.weight"] = (tokens_VC.cpu().double() + mean_C).to(tokens_VC)
    state[HEAD] = state["wte.weight"]
    left = (table_TC - mean_C).square().sum() / table_TC.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return rebuilt(
        model,
        config,
        state,
        f"learned positions -> rotary: {config.rotary_dim} of {config.head_dim} numbers of a head, theta {theta:g}",
        f"the table's mean row (length {mean_C.norm().item():.3g}) went into the token embeddings",
        f"the rest of the table, {left.item():.0%} of its sum of squares, is lost: heal before you judge",
    )


def copied_state(model: GPT) -> dict[str, Tensor]:
    """The model's tensors by name, copied; head and embedding share one copy."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name != HEAD}
    state[HEAD] = state["wte.weight"]
    return state


def rebuilt(model: GPT, config: GPTConfig, state: dict[str, Tensor], done: str, *notes: str) -> tuple[GPT, Surgery]:
    """A new model with another config and these tensors, in the given one's mode, and the report."""
    with torch.device("meta"):
        new = GPT(config)
    new.load_state_dict(state, strict=True, assign=True)
    new.tie_weights()
    new.train(model.training)
    size = model.wte.weight.element_size()
    return new, Surgery(done, model.config, config, model.num_params(), new.num_params(), size, notes)
