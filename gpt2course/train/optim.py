"""AdamW as language models are trained with it, and the learning rate of each step as a pure function of the step."""

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import nn

Schedule = Literal["cosine", "wsd", "linear"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) that decays matrices and leaves biases and norms alone.

    Betas and decay are GPT-3's (Brown et al. 2020, arXiv:2005.14165, appendix B). The update runs as one fused kernel
    where this device has one, as a few large ones elsewhere.

    Args:
        parameters: `model.parameters()`; frozen ones (`requires_grad=False`) are passed over. Shards of `fully_shard`
            are fine: they keep their number of dimensions, by which matrices are told from vectors.
        learning_rate: of both groups, until a schedule sets it.
        weight_decay: a step takes learning_rate x weight_decay of each entry of a matrix.
        betas: how much the averages of gradient and squared gradient keep at each step.

    Returns:
        an optimizer with two groups, matrices first.

    Raises:
        ValueError: if nothing is to be trained, or torch refuses a number.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("no parameter has requires_grad; there is nothing to train")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    try:
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    except RuntimeError:  # torch's own list of devices with a fused kernel is private; it says no by this error
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, foreach=True)


def learning_rate_at(
    step: int,
    *,
    steps: int,
    peak: float,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    decay_fraction: float = 0.2,
    final_fraction: float = 0.0,
) -> float:
    """The learning rate of one step: up in a straight line to the peak, then down as the schedule says.

    Step s of the warm-up has (s + 1) / warmup_steps of the peak, so the first step moves already and the last one is
    at the peak. After it

    - "cosine" falls along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts; GPT-3 keeps a
      tenth: final_fraction 0.1),
    - "wsd" (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395) stays at the peak and falls as one minus a root
      over the last part (Hägele et al. 2024, arXiv:2405.18392), so a run can be made longer without a plan,
    - "linear" falls in a straight line to zero (Bergsma et al. 2025, arXiv:2502.15938).

    The end value, peak x final_fraction, belongs to step `steps`, the first one that is not taken any more.

    Args:
        step: 0 … steps; later steps have the end value.
        steps: of the whole run.
        peak: the highest rate.
        schedule: "cosine", "wsd" or "linear".
        warmup_steps: how many; 0 starts at the peak.
        decay_fraction: of "wsd" only: the part of all steps that falls; at most what the warm-up leaves.
        final_fraction: of "cosine" and "wsd": the end value as a part of the peak.

    Raises:
        ValueError: naming every number out of range.
    """
    problems = schedule_problems(steps, peak, schedule, warmup_steps, decay_fraction, final_fraction)
    if step < 0:
        problems.append(f"step is {step}; it must be at least 0")
    if problems:
        raise ValueError("learning_rate_at:\n" + "\n".join(f"  - {problem}" for problem in problems))
    after_warmup = max(1, steps - warmup_steps)
    falls = min(after_warmup, max(1, round(steps * decay_fraction))) if schedule == "wsd" else after_warmup
    left = max(0, steps - step) / falls  # 1 where the fall begins, 0 at the end, above 1 before
    if schedule == "linear":
        share = left
    else:
        gone = max(0.0, 1.0 - left)
        shape = (1.0 + math.cos(math.pi * gone)) / 2 if schedule == "cosine" else 1.0 - math.sqrt(gone)
        share = 1.0 - (1.0 - final_fraction) * (1.0 - shape)  # in this order exactly 1 where the shape is 1
    return peak * min((step + 1) / max(1, warmup_steps), 1.0, share)


def schedule_problems(
    steps: int, peak: float, schedule: str, warmup_steps: int, decay_fraction: float, final_fraction: float
) -> list[str]:
    """What is wrong with the numbers of a schedule, each as a sentence; an empty list is a pass."""
    problems = []
    if schedule not in SCHEDULES:
        problems.append(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}")
    for name, number, least in (("steps", steps, 1), ("warmup_steps", warmup_steps, 0)):
        if number < least:
            problems.append(f"{name} is {number}; it must be at least {least}")
    if not 0 < peak < math.inf:
        problems.append(f"learning rate is {peak} at its peak; it must be a positive number")
    for name, share in (("decay_fraction", decay_fraction), ("final_fraction", final_fraction)):
        if not 0 <= share <= 1:
            problems.append(f"{name} is {share}; it is a share, from 0 to 1")
    return problems
