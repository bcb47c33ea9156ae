"""The optimizer's groups and the schedule: properties that hold for any run length, warm-up and end value."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gpt2course import GPT, GPTConfig
from gpt2course.train.optim import SCHEDULES, learning_rate_at, make_optimizer
from gpt2course.train.world import World
from tests.distributed.ranks import run_ranks

PEAK = 0.3
CONFIG = GPTConfig(n_layer=1, n_head=3, n_embd=18, block_size=16, vocab_size=97)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Any schedule whose peak is reached."""
    steps = draw(st.integers(1, 300))
    return {
        "steps": steps,
        "peak": PEAK,
        "schedule": draw(st.sampled_from(SCHEDULES)),
        "warmup_steps": draw(st.integers(0, steps)),
        "decay_fraction": draw(st.floats(0, 1)),
        "final_fraction": draw(st.floats(0, 1)),
    }


def all_rates(plan: dict[str, Any]) -> list[float]:
    return [learning_rate_at(step, **plan) for step in range(plan["steps"] + 1)]


@given(plans())
def test_every_schedule_rises_to_the_peak_and_falls_to_its_end(plan: dict[str, Any]) -> None:
    """A peak that is missed or passed, a first step at rate 0, a warm-up of 0 that divides by it, a bump at a seam."""
    rates, warmup = all_rates(plan), plan["warmup_steps"]
    top = max(0, warmup - 1)
    assert rates[top] == max(rates) == PEAK
    assert rates[: top + 1] == pytest.approx([PEAK * (step + 1) / max(1, warmup) for step in range(top + 1)])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    end = 0.0 if plan["schedule"] == "linear" else plan["final_fraction"]
    if warmup < plan["steps"]:
        assert rates[-1] == pytest.approx(PEAK * end, abs=1e-12)
        assert learning_rate_at(plan["steps"] + 50, **plan) == rates[-1]
    assert all(rate > 0 for rate in rates[:-1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 50, 100])
def test_a_run_shorter_than_the_warm_up_only_rises(schedule: str, steps: int) -> None:
    """A short trial that divides by zero, goes down the hill backwards, or passes the peak."""
    rates = [learning_rate_at(s, steps=steps, peak=PEAK, schedule=schedule, warmup_steps=100) for s in range(steps)]
    assert rates == [PEAK * ((s + 1) / 100) for s in range(steps)]


def test_a_cosine_is_half_way_down_in_the_middle() -> None:
    """A whole cosine, one in degrees, or one over all steps and not over those after the warm-up."""
    plan: dict[str, Any] = {"steps": 110, "peak": 1.0, "schedule": "cosine", "warmup_steps": 10, "final_fraction": 0.1}
    rates = all_rates(plan)
    assert rates[60] == pytest.approx(0.55)
    assert rates[35] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert rates[110] == pytest.approx(0.1)


def test_warm_up_stable_decay_is_flat_until_its_last_part() -> None:
    """A fall over the wrong part, or one that starts before the warm-up has ended."""
    plan: dict[str, Any] = {"steps": 100, "peak": 1.0, "schedule": "wsd", "warmup_steps": 10, "decay_fraction": 0.2}
    rates = all_rates(plan)
    assert rates[9:81] == [1.0] * 72
    assert rates[81] < 1.0
    assert rates[85] == pytest.approx(0.5)  # a quarter of the way: 1 - sqrt(1/4)
    assert rates[100] == 0
    assert all_rates(plan | {"decay_fraction": 1.0})[9:11] == [1.0, 1.0]
    assert set(all_rates(plan | {"decay_fraction": 0.0})[9:100]) == {1.0}


def test_a_longer_wsd_run_begins_like_the_shorter() -> None:
    """What this schedule is for: until the short run's decay the two have the same rates, so a run can be extended."""
    plan: dict[str, Any] = {"peak": 1.0, "schedule": "wsd", "warmup_steps": 10, "decay_fraction": 0.2}
    assert all_rates(plan | {"steps": 100})[:81] == all_rates(plan | {"steps": 400})[:81]


def test_linear_is_the_course_checkpoints_schedule_to_the_bit() -> None:
    """A checkpoint that its own script can't make again."""
    for steps, warmup in ((1000, 100), (7, 0), (5, 5), (3, 10), (1, 1)):
        for step in range(steps):
            old = 0.5 * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))
            assert learning_rate_at(step, steps=steps, peak=0.5, schedule="linear", warmup_steps=warmup) == old


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schedule": "cosinus"}, "schedule is 'cosinus'; it must be one of cosine, wsd, linear"),
        ({"step": -1}, "step is -1; it must be at least 0"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"warmup_steps": -3}, "warmup_steps is -3"),
        ({"peak": float("nan")}, "learning rate is nan at its peak; it must be a positive number"),
        ({"decay_fraction": 1.5}, r"decay_fraction is 1\.5; it is a share"),
        ({"final_fraction": -0.1}, r"final_fraction is -0\.1; it is a share"),
    ],
)
def test_impossible_numbers_are_refused(change: dict[str, Any], says: str) -> None:
    """A rate that is negative, or NaN in every weight after the first step."""
    with pytest.raises(ValueError, match=says):
        learning_rate_at(**{"step": 0, "steps": 10, "peak": 1.0} | change)


def test_only_matrices_decay() -> None:
    """Layer norms pulled to zero: without a gradient a matrix must shrink and a vector must not move."""
    matrix, vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))
    optimizer = make_optimizer([matrix, vector], learning_rate=0.1, weight_decay=0.5)
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(matrix.detach(), torch.full((3, 4), 0.95))
    assert torch.equal(vector.detach(), torch.ones(5))


def test_embeddings_count_as_matrices_and_the_tied_head_once() -> None:
    """A tied weight that gets two updates a step."""
    model = GPT(CONFIG)
    matrices, vectors = make_optimizer(model.parameters()).param_groups
    assert any(p is model.wte.weight for p in matrices["params"])
    assert sum(p.numel() for group in (matrices, vectors) for p in group["params"]) == model.num_params()
    assert {p.ndim for p in vectors["params"]} == {1}


def test_frozen_parameters_are_passed_over() -> None:
    """Averages kept for weights that never get a gradient; weights that decay although they are frozen."""
    model = GPT(CONFIG)
    model.wte.weight.requires_grad_(False)
    model.ln_f.bias.requires_grad_(False)
    held = [p for group in make_optimizer(model.parameters()).param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters())) - 2
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer(model.parameters())


def test_without_a_fused_kernel_it_is_the_same_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without the fused kernel on which no run can start, or one that trains otherwise there."""
    plain = torch.optim.AdamW

    def refuses(*args: Any, fused: bool | None = None, **kwargs: Any) -> torch.optim.AdamW:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return plain(*args, **kwargs)

    weights = []
    for optimizer_class in (plain, refuses):
        monkeypatch.setattr(torch.optim, "AdamW", optimizer_class)
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 4))
        optimizer = make_optimizer([weight], learning_rate=0.1, betas=(0.8, 0.9))
        for _ in range(3):
            weight.grad = weight.detach().sin()
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)


def sharded_steps(world: World) -> list[Tensor]:
    """Three steps of a model whose parameters do not divide by the number of ranks."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    if world.world_size > 1:
        mesh = init_device_mesh("cpu", (world.world_size,))
        for block in model.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = make_optimizer(model.parameters(), learning_rate=0.01, weight_decay=5.0)
    assert len(optimizer.param_groups[0]["params"]) == sum(p.ndim >= 2 for p in GPT(CONFIG).parameters())
    x_BT = torch.arange(34).view(2, 17)
    for _ in range(3):
        model(x_BT[:, :-1], x_BT[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() if world.world_size == 1 else p.full_tensor().detach() for p in model.parameters()]


@pytest.mark.distributed
def test_shards_are_stepped_like_the_whole() -> None:
    """A fused kernel that does not know shards, or shards that lost the dimensions by which matrices decay."""
    whole = sharded_steps(World())
    for shards in run_ranks(sharded_steps, 2):
        for part, full in zip(shards, whole, strict=True):
            torch.testing.assert_close(part, full, rtol=1e-3, atol=2e-4)
