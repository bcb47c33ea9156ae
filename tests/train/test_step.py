"""One step and the loop around it, in one process: what a step is made of, and what happens when it goes wrong."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2course.loss import IGNORE
from gpt2course.train import RunData, TrainConfig, World, single, train
from gpt2course.train.optim import learning_rate_at, make_optimizer
from gpt2course.train.parallel import seeded
from gpt2course.train.step import LossScale, global_norm, micro_batches
from tests.distributed.made_runs import TINY, MadeText


def config_for(out: Path, **changes: Any) -> TrainConfig:
    """A tiny run."""
    return dataclasses.replace(
        TrainConfig(model=TINY, out=out, steps=6, learning_rate=3e-3, warmup_steps=2, save_every=0), **changes
    )


def run(config: TrainConfig, **made: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights."""
    strategy = single(config, World())
    result = train(config, strategy, RunData(MadeText(**made)))
    return result.losses, strategy.module.state_dict()


@given(st.integers(0, 9), st.integers(1, 5))
def test_micro_batches_hold_every_row_once_and_none_is_empty(B: int, n: int) -> None:
    """A row lost or seen twice changes the batch; an empty micro-batch would skip a collective."""
    x_BT = torch.arange(1, B + 1)[:, None].expand(B, 4)
    pieces = list(micro_batches(x_BT, x_BT + 100, n))
    assert len(pieces) == n
    assert all(len(x) == len(y) >= 1 for x, y in pieces)
    real = [(x, y) for x, y in pieces if (y != IGNORE).all()]
    assert torch.equal(torch.cat([x for x, _ in real]) if real else x_BT[:0], x_BT)
    assert sum((y == IGNORE).all().item() for _, y in pieces) == max(0, n - B)


def test_the_loop_is_a_bare_loop_bit_for_bit(tmp_path: Path) -> None:
    """All that the loop adds (log, clock, agreement, checkpoints) must leave the numbers alone."""
    config = config_for(tmp_path)
    losses, weights = run(config)
    model = seeded(config, torch.device("cpu"))
    optimizer = make_optimizer(model.parameters(), betas=(0.9, 0.95))
    expected = []
    for step in range(config.steps):
        rate = learning_rate_at(step, steps=6, peak=3e-3, warmup_steps=2, final_fraction=0.1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        x_BT, y_BT = MadeText().batch(step)
        loss = model(x_BT, y_BT, reduction="sum") / y_BT.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == expected
    assert all(torch.equal(weights[name], p) for name, p in model.state_dict().items())


def test_the_same_run_twice_is_the_same_with_dropout_too(tmp_path: Path) -> None:
    """A generator that the loop does not seed would make every run its own."""
    config = config_for(tmp_path / "a", model=TINY.with_(dropout=0.2))
    first, _ = run(config)
    torch.rand(17)
    again, _ = run(dataclasses.replace(config, out=tmp_path / "b"))
    assert first == again
    other, _ = run(dataclasses.replace(config, out=tmp_path / "c", model=TINY))
    assert first[0] != other[0]  # dropout was on


def test_training_leaves_the_callers_generator_alone(tmp_path: Path) -> None:
    """A notebook that trains in one cell must draw the same numbers in the next one."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(config_for(tmp_path))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("changes", [{"checkpoint_activations": True}, {"async_save": True, "save_every": 2}])
def test_options_that_must_not_change_a_number(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Recomputed activations are the same activations, and a save in the background copies before it writes."""
    losses, weights = run(config_for(tmp_path / "plain"))
    changed_losses, changed = run(config_for(tmp_path / "changed", **changes))
    assert losses == changed_losses
    assert all(torch.equal(weights[name], changed[name]) for name in weights)


def test_bf16_follows_fp32_closely_and_not_exactly(tmp_path: Path) -> None:
    """Equal to the bit would mean that nothing was computed in bfloat16."""
    plain, _ = run(config_for(tmp_path / "a"))
    low, weights = run(config_for(tmp_path / "b", precision="bf16"))
    assert plain != low
    assert max(abs(a - b) for a, b in zip(plain, low, strict=True)) < 0.02
    assert {p.dtype for p in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    """Compiling a block must not change what it computes, by more than the order of its sums."""
    plain, _ = run(config_for(tmp_path / "a", steps=3))
    compiled, _ = run(config_for(tmp_path / "b", steps=3, compile=True))
    assert max(abs(a - b) for a, b in zip(plain, compiled, strict=True)) < 2e-6


def test_clip_zero_leaves_gradients_alone(tmp_path: Path) -> None:
    """0 means no clipping; a norm of 0 would stop all learning."""
    free, _ = run(config_for(tmp_path / "a", clip=0.0))
    wide, _ = run(config_for(tmp_path / "b", clip=1e9))
    tight, _ = run(config_for(tmp_path / "c", clip=0.01))
    assert free == wide
    assert free != tight
    assert free[-1] < free[0]


def test_global_norm_is_that_of_all_gradients_as_one_vector() -> None:
    """The norm of the largest parameter, or a sum of norms, would clip by another measure."""
    model = seeded(TrainConfig(model=TINY), torch.device("cpu"))
    model(*MadeText().batch(0)).backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert global_norm(model.parameters()) == pytest.approx(flat.norm().item(), rel=1e-6)


def test_loss_scale_halves_on_overflow_and_doubles_with_patience() -> None:
    """Micikevicius et al.: a scale that only falls ends in vanishing gradients, one that only rises in overflow."""
    scale = LossScale.for_precision("fp16")
    for overflowed, factor in [(True, 32768.0), (True, 16384.0), *[(False, 16384.0)] * 1999, (False, 32768.0)]:
        scale.update(overflowed)
        assert scale.factor == factor
    for precision in ("fp32", "bf16"):
        still = LossScale.for_precision(precision)
        still.update(True)
        assert still.factor == 1.0


def test_a_scaled_loss_trains_as_an_unscaled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping before the scale is taken out would clip every step: a famous bug. A power of two changes no bit."""
    plain, _ = run(config_for(tmp_path / "a", clip=0.5))
    monkeypatch.setattr(LossScale, "for_precision", classmethod(lambda cls, precision: cls(65536.0, moves=True)))
    scaled, _ = run(config_for(tmp_path / "b", clip=0.5))
    assert plain == scaled


def test_a_run_that_is_done_stays_done(tmp_path: Path) -> None:
    """The same command once more must neither train on nor fail: torchrun may start it again."""
    config = config_for(tmp_path)
    _, weights = run(config)
    losses, again = run(config)
    assert losses == []
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_on_step_sees_each_row_of_the_log(tmp_path: Path) -> None:
    """Live figures are drawn from it."""
    config, seen = config_for(tmp_path), []
    result = train(
        config, single(config, World()), RunData(MadeText()), on_step=lambda row: seen.append(copy.copy(row))
    )
    assert [row["step"] for row in seen] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in seen] == result.losses
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 6
