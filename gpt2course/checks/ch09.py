"""Checks of chapter 09, the training loop. Each usual mistake is tried first, so that the message can name it.

Legend: B rows of a micro-batch, T positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gpt2course.checks.base import Wrong, a_kind, exercise, require, same_number, same_tensor
from gpt2course.config import GPTConfig
from gpt2course.model import GPT
from gpt2course.train.optim import learning_rate_at

Micro = list[tuple[Tensor, Tensor]]


@contextmanager
def explained(error: str, message: str) -> Iterator[None]:
    """Say `message` where the learner's function raises an error of this name."""
    try:
        yield
    except Wrong as found:
        raise (Wrong(message) if error in str(found) else found) from None


@exercise("09.1 Warm-up and cosine")
def rate_of_step(answer: Callable[[int, int, float, int, float], float]) -> str:
    """The learner's `rate_of_step(step, steps, peak, warmup_steps, floor)`."""
    steps, peak, warmup, floor = 110, 1.0, 10, 0.1
    got = answer(0, steps, peak, warmup, floor)
    require(got != 0, "step 0 has rate 0 and is wasted; step s of the warm-up has (s + 1) / warmup_steps of the peak")
    same_number(got, 0.1, "with a peak of 1 and 10 steps of warm-up the rate of step 0")
    got = answer(9, steps, peak, warmup, floor)
    same_number(got, 1.0, "the last step of the warm-up, step 9 of 10, must be at the peak of 1: its rate")
    half = answer(60, steps, peak, warmup, floor)
    slips = {
        0.5: "the cosine ends at 0; let it run from the peak down to the floor",
        0.6: "the floor is added to a cosine that starts at the peak; the way down is only peak - floor long",
        1.0: "1 + cos runs from 2 to 0; halve it",
        _cosine_at(60 / 110): "the cosine runs over all steps; it begins after the warm-up",
        _cosine_at(50 / 99): "the floor is reached in step steps - 1; it belongs to step `steps`, the first not taken",
        _cosine_at(51 / 100): "the cosine begins in step warmup_steps - 1; it begins at the peak in step warmup_steps",
        _cosine_at(51 / 101): "the cosine begins in step warmup_steps - 1; it begins at the peak in step warmup_steps",
    }
    for value, why in slips.items():
        if isinstance(half, float) and math.isclose(half, value, abs_tol=1e-6):
            raise Wrong(f"half-way between warm-up and end, at step 60 of 110, you say {half:.4g}: {why}")
    same_number(half, 0.55, "half-way between warm-up and end, at step 60 of 110 with a floor of 0.1, the rate")
    quarter = answer(35, steps, peak, warmup, floor)
    if isinstance(quarter, float) and math.isclose(quarter, _cosine_at(0.75), abs_tol=1e-6):
        raise Wrong(
            f"a quarter of the way, at step 35 of 110, you say {quarter:.4g}: the cosine goes up, from the floor"
        )
    same_number(quarter, _cosine_at(0.25), "a quarter of the way the rate")
    same_number(answer(steps, steps, peak, warmup, floor), floor, "at the end, step 110 of 110, the rate")
    with explained(
        "ZeroDivisionError", "without a warm-up (warmup_steps = 0) it divides by zero; then step 0 is at the peak"
    ):
        first = answer(0, 20, 0.5, 0, 0.0)
    same_number(first, 0.5, "without a warm-up the rate of step 0")
    for plan in ((200, 3e-3, 20, 3e-4), (7, 1.0, 3, 0.5), (50, 2.0, 0, 0.0)):
        n, top, warm, end = plan
        for step in range(n):
            shape = {"schedule": "cosine", "warmup_steps": warm, "final_fraction": end / top}
            want = learning_rate_at(step, steps=n, peak=top, **shape)  # type: ignore[arg-type]
            same_number(answer(step, *plan), want, f"rate_of_step({step}, {', '.join(map(str, plan))})")
    return "at the peak in the last step of the warm-up, at the floor at the end, and equal to the package's"


def _cosine_at(gone: float) -> float:
    """From 1 down to 0.1, when this part of the way is gone."""
    return 0.1 + 0.9 * (1 + math.cos(math.pi * gone)) / 2


@exercise("09.2 One step of AdamW")
def adamw_step(answer: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> str:
    """The learner's `adamw_step(p, g, m, v, t, rate, beta1, beta2, eps, decay)`."""
    numbers = {"rate": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    zero = torch.zeros(3)
    p, g = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, -0.1, 20.0])
    found = answer(p, g, zero, zero, 1, *numbers.values(), 0.0)
    is_three = isinstance(found, tuple) and len(found) == 3
    require(is_three, f"it returns {a_kind(found)}; it should return three tensors: p, m, v")
    new_p, m, v = found
    for name, mean, corrected in (("m", m, g), ("v", v, g**2)):
        if isinstance(mean, Tensor) and mean.shape == g.shape and torch.allclose(mean, corrected, rtol=1e-4):
            raise Wrong(f"{name} is returned corrected, or was not averaged at all; return the running mean itself")
    same_tensor(m, 0.1 * g, "after the first step m")
    same_tensor(v, 0.05 * g**2, "after the first step v")
    moved = (p - new_p) / g.sign()
    if torch.allclose(moved, torch.full((3,), 0.1 * 0.1 / math.sqrt(0.05)), rtol=1e-4):
        raise Wrong(
            "the first step is not corrected: m and v start at 0, so divide them by 1 - beta1^t and 1 - beta2^t"
        )
    if torch.allclose(new_p, p + 0.1 * g.sign(), rtol=1e-4):
        raise Wrong("it goes uphill: the step is subtracted")
    _slipped(new_p, p - 0.1 * g.sign(), _other_steps(p, g, m, v, 1, 0.1, 0.9, 0.95, 1e-8, 0.0), 1)
    same_tensor(
        new_p, p - 0.1 * g.sign(), "the first step moves each weight by the rate, against its gradient's sign; p", 1e-5
    )
    decayed = answer(p, zero, zero, zero, 1, *numbers.values(), 0.5)[0]
    if torch.allclose(decayed, p * 0.5):
        raise Wrong("with a gradient of 0, rate 0.1 and decay 0.5 half of p is gone; the decay is rate x decay of p")
    require(
        not torch.allclose(decayed, p - 0.1 * p.sign(), rtol=1e-3),
        "the decay goes through the running means, as in Adam with L2; in AdamW it is apart from the gradient",
    )
    same_tensor(decayed, p * 0.95, "with a gradient of 0, rate 0.1 and decay 0.5 the new p")
    _against_torch(answer, numbers)
    return "the same weights as torch.optim.AdamW over twelve steps, with decay"


def _other_steps(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, rate: float, b1: float, b2: float, eps: float, decay: float
) -> dict[str, Tensor]:
    """Where p goes by the usual slips, from the new means m and v."""
    c1, c2, left = 1 - b1**t, 1 - b2**t, 1 - rate * decay
    root = (v / c2).sqrt()
    return {
        "the decay comes after the step; take it from the weights as they were before": (
            (p - rate * (m / c1) / (root + eps)) * left
        ),
        "eps is added under the root; it is added to the root": p * left - rate * (m / c1) / (v / c2 + eps).sqrt(),
        "eps is added before the correction of v; it is added to the root of the corrected v": (
            p * left - rate * (m / c1) * math.sqrt(c2) / (v.sqrt() + eps)
        ),
        "the corrections are swapped: m belongs to beta1, v to beta2": (
            p * left - rate * (m / c2) / ((v / c1).sqrt() + eps)
        ),
        "the correction is that of the first step; its powers grow with t": (
            p * left - rate * (m / (1 - b1)) / ((v / (1 - b2)).sqrt() + eps)
        ),
    }


def _slipped(got: object, want: Tensor, others: dict[str, Tensor], t: int) -> None:
    """Raise with the slip that leads where p is, if it is one of these."""
    if not isinstance(got, Tensor) or got.shape != want.shape or torch.allclose(got, want, rtol=1e-5, atol=1e-5):
        return
    for why, other in others.items():
        if torch.allclose(got, other, rtol=1e-5, atol=1e-6):
            raise Wrong(f"in step {t} {why}")


def _against_torch(answer: Callable[..., tuple[Tensor, Tensor, Tensor]], numbers: dict[str, float]) -> None:
    """Twelve steps with changing gradients."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5, 4, generator=generator)
    theirs = torch.nn.Parameter(p.clone())
    rate, betas = numbers["rate"], (numbers["beta1"], numbers["beta2"])
    optimizer = torch.optim.AdamW([theirs], lr=rate, betas=betas, eps=0.01, weight_decay=0.3)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, 13):
        g = torch.randn(5, 4, generator=generator) * 0.1
        theirs.grad = g.clone()
        optimizer.step()
        before = p
        p, m, v = answer(p, g, m, v, t, rate, *betas, 0.01, 0.3)
        _slipped(p, theirs.detach(), _other_steps(before, g, m, v, t, rate, *betas, 0.01, 0.3), t)
        same_tensor(p, theirs.detach(), f"after step {t}, with decay 0.3 and eps 0.01, p", 1e-5)


@exercise("09.3 Clip by the global norm")
def clip_by_global_norm(answer: Callable[[list[Tensor], float], tuple[list[Tensor], float]]) -> str:
    """The learner's `clip_by_global_norm(gradients, limit)`."""
    gradients = [torch.tensor([1.8, 2.4]), torch.tensor([[2.4], [-3.2]]), torch.tensor([7.2, -9.6])]
    found = answer(gradients, 1.3)
    is_pair = isinstance(found, tuple) and len(found) == 2
    require(is_pair, f"it returns {a_kind(found)}; it should return a list of tensors and the norm before")
    require(not isinstance(found[1], list), "it returns the list second; first the list of tensors, then the norm")
    is_list = isinstance(found[0], list)
    require(is_list, f"the first of the two that it returns is {a_kind(found[0])}; it should be a list of tensors")
    clipped, norm = found
    require(len(clipped) == 3, f"the list has {len(clipped)} tensors, 3 were given")
    value = float(norm)
    slips = {
        1.3: "the norm after clipping; return the one from before",
        169.0: "the sum of the squares, without the root",
        19.0: "the sum of the three norms; it is the root of the sum of all squares",
        12.0: "the largest of the three norms; it is the root of the sum of all squares",
    }
    for slip, why in slips.items():
        if math.isclose(value, slip, rel_tol=1e-4):
            raise Wrong(f"for gradients with norms 3, 4 and 12 you say {value:.4g}, that is {why}")
    same_number(norm, 13.0, "for gradients with norms 3, 4 and 12 the norm of all together", 1e-4)
    if all(torch.allclose(c, g.clamp(-1.3, 1.3)) for c, g in zip(clipped, gradients, strict=True)):
        raise Wrong("each number is clipped by itself, which turns the direction; take one factor for all")
    if all(
        math.isclose(float(c.norm()), min(1.3, float(g.norm())), rel_tol=1e-3)
        for c, g in zip(clipped, gradients, strict=True)
    ):
        raise Wrong("each tensor is clipped by its own norm, which turns the direction; take one factor for all")
    for i, g in enumerate(gradients):
        same_tensor(clipped[i], g * 0.1, f"clipped to 1.3 from a norm of 13, tensor {i}", 1e-4)
    small = answer([torch.tensor([0.3]), torch.tensor([0.4])], 1.0)[0]
    require(
        not math.isclose(float(torch.cat(small).norm()), 1.0, rel_tol=1e-3),
        "a gradient of norm 0.5 is made LONGER, to the limit of 1; what is below the limit stays as it is",
    )
    same_tensor(torch.cat(small), torch.tensor([0.3, 0.4]), "below the limit of 1 the gradient of norm 0.5", 1e-4)
    with explained("ZeroDivisionError", "a gradient of all zeros has norm 0, and it divides by it"):
        zero = answer([torch.zeros(2)], 1.0)[0][0]
    require(not zero.isnan().any(), "a gradient of all zeros becomes NaN: 0 / 0")
    same_tensor(zero, torch.zeros(2), "a gradient of all zeros")
    return "one factor for all tensors, nothing made longer, and the norm from before"


@exercise("09.4 Accumulate")
def accumulate(answer: Callable[[GPT, Micro], float]) -> str:
    """The learner's `accumulate(model, micro_batches)`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=31))
        ids = torch.randint(31, (6, 13))
    x_BT, y_BT = ids[:, :-1], ids[:, 1:].clone()
    y_BT[0, 3:] = y_BT[1, 1:] = y_BT[4, 6:] = -100
    micro = [(x_BT[rows], y_BT[rows]) for rows in (slice(0, 2), slice(2, 3), slice(3, 6))]
    want_loss, want = _whole(model, x_BT, y_BT)
    with Watch(model, most_rows=3) as watch:
        got_loss = answer(model, micro)
    got = _gradient(model)
    cleared = watch.backwards and not got.any()
    require(not cleared, "the gradients are cleared at the end; leave them where backward() has put them")
    counted = [int((y != -100).sum()) for _, y in micro]
    places = y_BT.numel()
    for name, factor in (
        ("the sum over all tokens, divided by nothing", sum(counted)),
        ("divided by all targets, those of -100 too", sum(counted) / places),
        ("the sum over the tokens, divided by the number of micro-batches only", sum(counted) / 3),
        ("divided by the number of tokens and by the number of micro-batches again", 1 / 3),
        ("divided by the tokens that count in the first micro-batch only", sum(counted) / counted[0]),
        ("divided by the tokens that count in the last micro-batch only", sum(counted) / counted[-1]),
    ):
        if torch.allclose(got, want * factor, rtol=1e-3, atol=1e-6):
            raise Wrong(f"the gradient is {factor:.4g} times the right one: it is {name}")
    _explain(got, model, micro, want)
    same_tensor(got, want, "against the gradient of the whole batch, entry", 1e-4)
    require(not watch.slip, watch.slip)
    for factor, why in (
        (1 / 3, "divided by the number of micro-batches again"),
        (sum(counted), "not a mean but a sum"),
    ):
        if isinstance(got_loss, float) and math.isclose(got_loss, want_loss * factor, rel_tol=1e-4):
            raise Wrong(f"the gradient is right, but the loss that it returns is {why}: {got_loss:.4g}")
    same_number(got_loss, want_loss, "the mean loss over all tokens that count", 1e-4)
    require(
        not isinstance(got_loss, Tensor), "the loss is still a tensor and keeps the graph in memory; return .item()"
    )
    twice = _with_gradient_already(answer, model, micro)
    require(
        torch.allclose(twice, 2 * want, rtol=1e-3, atol=1e-5), "the gradient that was there before is lost; add to it"
    )
    model.zero_grad()
    nothing = [(x_BT[:1], torch.full_like(y_BT[:1], -100))]
    with explained("ZeroDivisionError", "a step in which no target counts divides by zero; take max(1, n_valid)"):
        empty = answer(model, nothing)
    require(math.isfinite(empty), "a step in which no target counts gives NaN: 0 / 0; take max(1, n_valid)")
    return "the gradient and loss of the whole batch, with rows that end early, and added to what was there"


class Watch:
    """Sees whether a model is used one micro-batch at a time: forward, backward, and only then the next."""

    def __init__(self, model: GPT, most_rows: int) -> None:
        self.model, self.most_rows = model, most_rows
        self.slip, self.backwards, self.waiting = "", 0, False

    def __enter__(self) -> "Watch":
        self.handle = self.model.register_forward_hook(self.forward)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def forward(self, _: object, inputs: tuple[Tensor, ...], output: object) -> None:
        """After each forward pass."""
        if not (isinstance(output, Tensor) and output.requires_grad):
            return
        if inputs and len(inputs[0]) > self.most_rows:
            self.slip = self.slip or (
                f"right, but {len(inputs[0])} rows go through the model at once and need the memory of all; give it "
                "one micro-batch at a time"
            )
        if self.waiting:
            self.slip = self.slip or (
                "right, but a second forward comes before the first backward, so the graphs of all are in memory at "
                "once; call backward() for each micro-batch"
            )
        self.waiting = True
        output.register_hook(self.backward)

    def backward(self, _: Tensor) -> None:
        """When a backward pass has reached a loss."""
        self.backwards += 1
        self.waiting = False


def _gradient(model: GPT) -> Tensor:
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def _whole(model: GPT, x_BT: Tensor, y_BT: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient of the whole batch; leaves no gradients."""
    model.zero_grad()
    loss = model(x_BT, y_BT)
    loss.backward()
    found = loss.item(), _gradient(model)
    model.zero_grad()
    return found


def _explain(got: Tensor, model: GPT, micro: Sequence[tuple[Tensor, Tensor]], want: Tensor) -> None:
    """Name what the gradient is, if it is one of the usual other things."""
    model.zero_grad()
    parts = [_whole(model, x, y)[1] for x, y in micro]
    means = torch.stack(parts).sum(0)
    if torch.allclose(got, means / 3, rtol=1e-3, atol=1e-6):
        raise Wrong("the mean of the three means: a micro-batch with few tokens weighs as much as a full one")
    if torch.allclose(got, means, rtol=1e-3, atol=1e-6):
        raise Wrong(
            "the sum of the three means: it grows with the number of micro-batches; sum over tokens, divide by all"
        )
    shares = [sum(int((y != -100).sum()) for _, y in micro[: i + 1]) for i in range(len(micro))]
    counts = [int((y != -100).sum()) for _, y in micro]
    so_far = sum(part * n / upto for part, n, upto in zip(parts, counts, shares, strict=True))
    if torch.allclose(got, torch.as_tensor(so_far), rtol=1e-3, atol=1e-6):
        raise Wrong(
            "divided by the tokens counted so far: the first micro-batches weigh too much; count all of them first"
        )
    last = parts[-1] * counts[-1] / sum(counts)
    if torch.allclose(got, last, rtol=1e-3, atol=1e-6):
        raise Wrong("only the last micro-batch is in the gradient: it is cleared in between")
    require(bool(got.any()), "there is no gradient; call backward() on the loss of each micro-batch")


def _with_gradient_already(answer: Callable[[GPT, Micro], float], model: GPT, micro: Micro) -> Tensor:
    """The gradient after two calls without clearing."""
    model.zero_grad()
    answer(model, micro)
    answer(model, micro)
    return _gradient(model)
