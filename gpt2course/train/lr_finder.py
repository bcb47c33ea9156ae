"""The learning-rate range test: which rates does a model learn at, and where does it fall apart?

Legend: B batch, T positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from gpt2course.healing import Steps
from gpt2course.train.optim import make_optimizer
from gpt2course.train.world import own_generators


@dataclass(frozen=True)
class RangeTest:
    """What a range test saw."""

    rates: tuple[float, ...]
    """learning rate of each step that was taken, rising by the same factor each time"""
    losses: tuple[float, ...]
    """training loss at each step, before its update"""
    smooth: tuple[float, ...]
    """their running mean, without a lag at the start (as in Adam's averages)"""
    suggestion: float | None
    """see `suggest`; None if there is no such place"""
    why: str
    """how the test ended, in a sentence"""

    def __str__(self) -> str:
        advice = "no suggestion" if self.suggestion is None else f"try a peak of {self.suggestion:.1e}"
        return f"{len(self.rates)} rates from {self.rates[0]:.1e} to {self.rates[-1]:.1e}: {self.why}; {advice}"


def find_learning_rate(
    model: nn.Module,
    batches: Steps,
    *,
    lowest: float = 1e-5,
    highest: float = 1.0,
    steps: int = 100,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    stop_at: float = 1.5,
    smoothing: float = 0.8,
    seed: int = 0,
    progress: bool = False,
) -> RangeTest:
    """Train for a moment at rates that grow from step to step, and look at the loss (Smith 2015, arXiv:1506.01186).

    The rate rises by a constant factor, as is usual since; Smith raised it in a straight line. The model comes back as
    it was: weights, buffers, mode, and no gradients; torch's random state too. That costs a copy of its weights.

    A test with few steps a rate cannot see slow trouble, and a warm-up stands higher rates than the test's sudden ones.
    So the suggestion is a place to start from, not the best rate.

    Args:
        model: called as model(inputs, targets), returns the mean loss; on any device.
        batches: step s trains on `batches.batch(s)`.
        lowest, highest: the range.
        steps: how many rates, at most.
        weight_decay, clip: of AdamW; of the gradient's norm, 0 clips nothing.
        stop_at: end as soon as the smooth loss is so many times its lowest.
        smoothing: weight of the past in the running mean.
        seed: of dropout.
        progress: show a bar.

    Raises:
        ValueError: for numbers out of range.
    """
    if not (0 < lowest < highest < math.inf and steps >= 2 and clip >= 0 and stop_at > 1 and 0 <= smoothing < 1):
        raise ValueError(
            f"lowest {lowest} must be above 0 and below highest {highest}, steps {steps} at least 2, clip {clip} at "
            f"least 0, stop_at {stop_at} above 1, smoothing {smoothing} in [0, 1)"
        )
    saved = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, weight_decay=weight_decay)
    device = trained[0].device
    rates: list[float] = []
    losses: list[float] = []
    smooth: list[float] = []
    mean = 0.0
    why = "the loss was still finite at the highest rate"
    model.train()
    try:
        with own_generators(device), tqdm(total=steps, desc="range test", unit="step", disable=not progress) as bar:
            torch.manual_seed(seed)
            for step in range(steps):
                rate = lowest * (highest / lowest) ** (step / (steps - 1))
                model.zero_grad()
                loss = model(*(ids.to(device) for ids in batches.batch(step)))
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained, clip or math.inf)
                mean = smoothing * mean + (1 - smoothing) * loss.item()
                rates.append(rate)
                losses.append(loss.item())
                smooth.append(mean / (1 - smoothing ** (step + 1)))
                if not math.isfinite(loss.item() + norm.item()):
                    why = f"at {rate:.1e} the loss was {loss.item():.3g} and its gradient's norm {norm.item():.3g}"
                    break
                if smooth[-1] > stop_at * min(smooth):
                    why = f"at {rate:.1e} the smooth loss was more than {stop_at:g} times its lowest, {min(smooth):.3g}"
                    break
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                bar.set_postfix(rate=f"{rate:.1e}", loss=f"{smooth[-1]:.3f}", refresh=False)
                bar.update()
    finally:
        model.load_state_dict(saved)
        for module, mode in modes.items():
            module.training = mode
        model.zero_grad()
    return RangeTest(tuple(rates), tuple(losses), tuple(smooth), suggest(rates, smooth), _told(rates, smooth, why))


def suggest(rates: Sequence[float], smooth: Sequence[float]) -> float | None:
    """The smaller of two rules of thumb: a tenth of the rate with the lowest loss, and the rate of the steepest fall.

    Each alone is caught out at times: the first by a loss that lies flat over two decades, the second by one that falls
    fastest just before it turns.

    Args:
        rates: rising, each the same factor above the one before.
        smooth: running mean of the loss at each.

    Returns:
        None if the loss is lowest at the first rate or at the last.
    """
    low = _lowest(smooth)
    if low in (0, len(smooth) - 1):
        return None
    falls = [smooth[i] - smooth[i + 1] for i in range(low)]
    return min(rates[low] / 10, rates[falls.index(max(falls))])


def _lowest(smooth: Sequence[float]) -> int:
    return min(range(len(smooth)), key=lambda i: smooth[i] if math.isfinite(smooth[i]) else math.inf)


def _told(rates: Sequence[float], smooth: Sequence[float], why: str) -> str:
    """How the test ended, with what it means for a suggestion."""
    low = _lowest(smooth)
    if low == 0:
        return f"{why}; it never fell below its start: begin lower, or look at the model and its data"
    if low == len(smooth) - 1:
        return f"{why} and still falling: end higher"
    return f"{why}; it was lowest at {rates[low]:.1e}"
