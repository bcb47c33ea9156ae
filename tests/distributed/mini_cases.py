"""Models, batches and the single-process training that the hand-made strategies are held equal to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gpt2course.config import GPTConfig
from gpt2course.model import GPT
from gpt2course.train.world import World

STEPS = 10
CLIP = 0.05
"""below every gradient norm of these models, so that clipping is always at work"""


class Odd(nn.Module):
    """Odd widths; a weight tied within a unit and one tied across units; a unit whose first layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(7, 11)
        self.tied = nn.Sequential(nn.Linear(11, 11), nn.GELU(), nn.Linear(11, 11))
        self.tied[2].weight = self.tied[0].weight
        self.mixed = nn.Sequential(nn.Linear(11, 9), nn.GELU(), nn.Linear(9, 11))
        self.mixed[0].requires_grad_(False)
        self.first, self.second = nn.Linear(11, 11), nn.Linear(11, 11)
        self.second.weight = self.first.weight
        self.leave = nn.Linear(11, 3)
        self.register_buffer("scale", torch.ones(1))

    def units(self) -> list[nn.Module]:
        return [self.tied, self.mixed, self.first, self.second]

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(self.tied(self.enter(x))) + x.mean()
        return self.leave(self.second(torch.tanh(self.first(x)))) * self.scale


class CNN(nn.Module):
    """No transformer at all, and an activation that writes in place on what a unit gave out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 7, 3)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(7, 3)

    def units(self) -> list[nn.Module]:
        return [self.one, self.two]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.relu(self.one(x))).mean((2, 3)))


class SmallGPT(nn.Module):
    """The course's GPT, returning logits of one row's positions as if they were rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(GPTConfig(vocab_size=31, block_size=8, n_layer=3, n_head=3, n_kv_head=1, n_embd=18))

    def units(self) -> list[nn.Module]:
        return list(self.gpt.h)

    def forward(self, x: Tensor) -> Tensor:
        return self.gpt(x).flatten(0, 1)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
    """random inputs and targets of so many rows"""


def _vectors(g: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 7, generator=g), torch.randint(3, (rows,), generator=g)


def _pictures(g: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 1, 6, 6, generator=g), torch.randint(3, (rows,), generator=g)


def _tokens(g: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    return torch.randint(31, (rows, 8), generator=g), torch.randint(31, (rows * 8,), generator=g)


CASES = {"odd": Case(Odd, _vectors), "cnn": Case(CNN, _pictures), "gpt": Case(SmallGPT, _tokens)}

Micro = tuple[Tensor, Tensor]


def make_model(name: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return CASES[name].make().to(dtype)


def batch(name: str, step: int, world_size: int, accumulate: int, dtype: torch.dtype) -> tuple[list[list[Micro]], int]:
    """The micro-batches of a step by rank, of uneven sizes and with masked targets, and the number of valid targets."""
    g = torch.Generator().manual_seed(1000 + step)
    ranks = []
    for rank in range(world_size):
        micros = []
        for micro in range(accumulate):
            x, y = CASES[name].draw(g, 1 + (rank + 2 * micro + step) % 3)
            y[1:][torch.rand(len(y) - 1, generator=g) < 0.3] = -100
            micros.append((x.to(dtype) if x.is_floating_point() else x, y))
        ranks.append(micros)
    return ranks, sum(int((y != -100).sum()) for micros in ranks for _, y in micros)


def loss_sum(logits: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(logits, y, ignore_index=-100, reduction="sum")


def clip_scale(norm: float) -> float:
    """torch's own rule: nothing grows, and no division by zero."""
    return min(1.0, CLIP / (norm + 1e-6))


def train_alone(name: str, world_size: int, accumulate: int, dtype: torch.dtype, steps: int = STEPS) -> nn.Module:
    """One process: the gradient of each rank's micro-batches, then their sum in the order of the ranks."""
    model = make_model(name, dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    for step in range(steps):
        ranks, valid = batch(name, step, world_size, accumulate, dtype)
        total: list[Tensor] = []
        for micros in ranks:
            optimizer.zero_grad()
            for x, y in micros:
                (loss_sum(model(x), y) / valid).backward()
            own = [p.grad for p in params]
            total = [a + b for a, b in zip(total, own, strict=True)] if total else own
        norm = float(torch.stack([g.double().square().sum() for g in total]).sum().sqrt())
        assert norm > CLIP
        for p, g in zip(params, total, strict=True):
            p.grad = g * clip_scale(norm)
        optimizer.step()
    return model


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def differences(
    world: World, train: Callable[..., dict[str, Tensor]], dtype: torch.dtype, accumulations: tuple[int, ...]
) -> dict[str, float]:
    """The largest difference of what `train` gives from the single process, by model and number of micro-batches."""
    return {
        f"{name} {accumulate}": largest_difference(
            train(world, name, accumulate, dtype), train_alone(name, world.world_size, accumulate, dtype).state_dict()
        )
        for name in CASES
        for accumulate in accumulations
    }
