"""A short continued training that gets a model used to what surgery did to it.

Legend: B batch, T positions, N = B x T, C model width, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gpt2course.loss import IGNORE, chunked_cross_entropy
from gpt2course.model import GPT
from gpt2course.train.optim import learning_rate_at, make_optimizer
from gpt2course.train.step import DivergedError
from gpt2course.train.world import own_generators


class Steps(Protocol):
    """Batches by step, such as `gpt2course.data.Batches`."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64."""


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

    AdamW that decays matrices only, a rate that rises and falls to zero,
    clipped gradients. The same arguments give the same weights, bit for bit, on one machine with one number of threads.
    Parameters with `requires_grad=False` stay as they are.

    Args:
        model: on any device; back in its own mode afterwards.
        batches: step s trains on `batches.batch(s)`.
        steps: how many.
        learning_rate, warmup: the peak, and the steps to reach it; by default a tenth of all.
        weight_decay, clip: of AdamW; of the gradient's norm.
        autocast: torch.bfloat16 computes in it where torch deems it safe; the weights stay as they are.
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
    if autocast == torch.float16:
        raise ValueError("autocast to float16 needs its loss scaled, which heal does not do; use torch.bfloat16")
    if not trained:
        raise ValueError("no parameter has requires_grad; there is nothing to train")
    optimizer = make_optimizer(trained, weight_decay=weight_decay)
    warmup = max(1, steps // 10) if warmup is None else warmup
    device = model.wte.weight.device
    compute_loss = _loss_function(model, vocabulary)
    losses: list[float] = []
    norms: list[float] = []
    n_tokens, interrupted, was_training, started = 0, False, model.training, time.perf_counter()
    model.train()
    try:
        with own_generators(device), tqdm(total=steps, desc="healing", unit="step", disable=not progress) as bar:
            torch.manual_seed(seed)
            for step in range(steps):
                rate = learning_rate_at(step, steps=steps, peak=learning_rate, schedule="linear", warmup_steps=warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
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
