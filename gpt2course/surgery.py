"""Retrofits on a trained model: fewer key/value heads, a window, rotary positions; and a short training that heals.

Each operation leaves the given model as it was, and returns a new one with a report of what was done.

Legend: B batch, T positions, N = B x T, C model width, H query heads, G key/value heads, D head width, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gpt2course.config import GPTConfig, RopeScaling
from gpt2course.hf_format import HEAD
from gpt2course.kv_cache import cache_bytes
from gpt2course.loss import IGNORE, chunked_cross_entropy
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


class Steps(Protocol):
    """Batches by step, such as `gpt2course.data.Batches`."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64."""


class DivergedError(ValueError):
    """The loss or its gradient is no longer a finite number. The weights are those of the last good step."""


@dataclass(frozen=True)
class Healing:
    """How a short continued training went."""

    losses: tuple[float, ...]
    """training loss before each step's update, nats a token; over the restricted vocabulary if one was given"""
    gradient_norms: tuple[float, ...]
    """before clipping"""
    n_tokens: int
    """tokens trained on"""
    seconds: float
    interrupted: bool = False
    """Ctrl-C came; the model has the steps until then"""

    def __str__(self) -> str:
        text = f"{len(self.losses)} steps of healing, {self.n_tokens:,} tokens, {self.seconds:.1f} s"
        if self.losses:
            k = max(1, len(self.losses) // 10)
            first, last = sum(self.losses[:k]) / k, sum(self.losses[-k:]) / k
            text += f": training loss {first:.3f} -> {last:.3f} (means of {k})"
        return text + (", interrupted" if self.interrupted else "")


def rate_at(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to the peak over `warmup` steps, then linear to zero (Bergsma et al. 2025, arXiv:2502.15938)."""
    return peak * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))


def heal(
    model: GPT,
    batches: Steps,
    steps: int,
    *,
    learning_rate: float = 1e-3,
    warmup: int | None = None,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    autocast: torch.dtype | None = None,
    vocabulary: Tensor | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Healing:
    """Train a model a little further, in place, so that its weights get used to what surgery did to them.

    AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) that decays matrices only, a rate that rises and falls to zero,
    clipped gradients. The same arguments give the same weights, bit for bit, on one machine with one number of threads.
    Parameters with `requires_grad=False` stay as they are.

    Args:
        model: on any device; back in its own mode afterwards.
        batches: step s trains on `batches.batch(s)`.
        steps: how many.
        learning_rate, warmup: the peak, and the steps to reach it; by default a tenth of all.
        weight_decay, clip: of AdamW; of the gradient's norm.
        autocast: compute in this dtype where torch deems it safe, such as torch.bfloat16; the weights stay as they are.
        vocabulary: (n,) token ids, each once; the target is compared with these alone. Much faster where a text uses
            few of the 50,257 tokens; those left out are then not taught to be unlikely, and gain probability: of the
            course checkpoint's 2 % in 200 steps. Evaluate with all of them.
        seed: of dropout.
        progress: show a bar.

    Returns:
        the losses. On Ctrl-C those of the steps until then, with `interrupted` set: the model keeps what it learned.

    Raises:
        ValueError: for arguments out of range, or a target outside the vocabulary given.
        DivergedError: if loss or gradient is not finite; that step is not taken.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if steps < 1 or learning_rate <= 0 or clip <= 0:
        raise ValueError(f"steps {steps} must be at least 1, learning_rate {learning_rate} and clip {clip} above 0")
    if not trained:
        raise ValueError("no parameter has requires_grad; there is nothing to train")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    warmup = max(1, steps // 10) if warmup is None else warmup
    device = model.wte.weight.device
    compute_loss = _loss_function(model, vocabulary)
    losses: list[float] = []
    norms: list[float] = []
    n_tokens, interrupted, was_training, started = 0, False, model.training, time.perf_counter()
    model.train()
    try:
        with torch.random.fork_rng(), tqdm(total=steps, desc="healing", unit="step", disable=not progress) as bar:
            torch.manual_seed(seed)
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(step, steps, learning_rate, warmup)
                x_BT, y_BT = (ids.to(device) for ids in batches.batch(step))
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    loss = compute_loss(x_BT, y_BT)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained, clip)
                if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                    raise DivergedError(
                        f"at step {step + 1} of {steps} the loss is {loss.item()} and its gradient's norm "
                        f"{norm.item()}; the step was not taken. Use a learning_rate below {learning_rate}, or look "
                        "for weights that are not finite"
                    )
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                norms.append(norm.item())
                n_tokens += y_BT.numel()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        model.train(was_training)
        model.zero_grad()
    return Healing(tuple(losses), tuple(norms), n_tokens, time.perf_counter() - started, interrupted)


def _loss_function(model: GPT, vocabulary: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Inputs and targets to the mean loss, over all tokens or over those of a vocabulary."""
    if vocabulary is None:
        return model
    V = model.config.vocab_size
    ids = vocabulary.to(model.wte.weight.device, torch.long)
    if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= V or len(ids.unique()) < len(ids):
        raise ValueError(f"vocabulary of shape {tuple(ids.shape)} must be one row of different ids from 0 to {V - 1}")
    place_V = torch.full((V,), IGNORE, device=ids.device)
    place_V[ids] = torch.arange(len(ids), device=ids.device)

    def restricted(x_BT: Tensor, y_BT: Tensor) -> Tensor:
        targets_N, h_NC = y_BT.flatten(), model.hidden(x_BT).flatten(0, 1)
        places_N = torch.where(targets_N == IGNORE, IGNORE, place_V[targets_N.clamp(min=0)])
        counted = int((places_N != IGNORE).sum())
        if counted < int((targets_N != IGNORE).sum()):
            outside = targets_N[(places_N == IGNORE) & (targets_N != IGNORE)][0].item()
            raise ValueError(f"token id {outside} is to be predicted and is not in the vocabulary given; add it")
        return chunked_cross_entropy(h_NC, model.wte.weight[ids], places_N) / max(1, counted)

    return restricted
