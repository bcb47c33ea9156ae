"""What each strategy does with memory, precision, architecture and the first weights."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gpt2course import GPT, GPTConfig
from gpt2course.train import RunData, TrainConfig, World, ddp, fsdp, single, train
from gpt2course.train.config import TrainConfig as Config
from gpt2course.train.parallel import Strategy, make_mesh
from tests.distributed.made_runs import TINY, MadeText, full
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

# Every dimension divides by 4, so that no shard is padded.
EVEN = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=128)
MODERN = TINY.with_(pos="rope", n_head=4, n_kv_head=2, window=6, window_pattern="SL", sinks=1)

Answer = dict[str, Any]


def build(world: World, config: Config, name: str) -> Strategy:
    """A strategy by name."""
    if name == "offload":
        return fsdp(config, world, cpu_offload=True)
    return {"single": single, "ddp": ddp, "fsdp": fsdp}[name](config, world)


def start_of(world: World, config: Config, name: str) -> dict[str, Tensor]:
    """The full weights that a run begins with."""
    strategy = build(world, config, name)
    assert isinstance(strategy.module, GPT)
    assert strategy.module.lm_head.weight is strategy.module.wte.weight
    return {key: full(p) for key, p in strategy.module.named_parameters()}


def short_run(world: World, out: Path, name: str, **changes: Any) -> Answer:
    """Three steps: losses, bytes held, and how many numbers of each parameter lie here."""
    config = TrainConfig(model=EVEN, out=out, steps=3, warmup_steps=1, save_every=0)
    config = dataclasses.replace(config, **changes)
    strategy = build(world, config, name)
    result = train(config, strategy, RunData(MadeText()))
    local = [p.to_local() if isinstance(p, DTensor) else p for p in strategy.module.parameters()]
    return {
        "losses": result.losses,
        "memory": result.rows[-1]["memory"],
        "sent": result.rows[-1]["sent"],
        "numbers": sum(p.numel() for p in local),
        "dtypes": {p.dtype for p in local},
        "seconds": [row["seconds"] for row in result.rows],
    }


def many(world: World, out: Path) -> dict[str, Answer]:
    """All that this file asks of a world size, in one group of processes."""
    runs: dict[str, Answer] = {
        name: short_run(world, out / name, name, **changes)
        for name, changes in {
            "single" if world.world_size == 1 else "ddp": {},
            **({} if world.world_size == 1 else {"fsdp": {}, "offload": {}}),
        }.items()
    }
    name = "single" if world.world_size == 1 else "fsdp"
    runs["modern"] = short_run(world, out / "modern", name, model=MODERN)
    runs["bf16"] = short_run(world, out / "bf16", name, precision="bf16")
    runs["recomputed"] = short_run(world, out / "recomputed", name, checkpoint_activations=True)
    runs["accumulated"] = short_run(world, out / "accumulated", name, grad_accum_steps=3)
    config = TrainConfig(model=TINY, seed=3)
    starts = [name] if world.world_size == 1 else ["ddp", "fsdp"]
    runs["starts"] = {name: start_of(world, config, name) for name in starts}
    return runs


@functools.cache
def answers(world_size: int) -> list[dict[str, Answer]]:
    with tempfile.TemporaryDirectory() as out:
        if world_size == 1:
            return [many(World(), Path(out))]
        return run_ranks(many, world_size, Path(out), timeout=280)


@pytest.mark.parametrize("world_size", [2, 4])
def test_memory_falls_as_one_over_n_under_fsdp_and_stays_under_ddp(world_size: int) -> None:
    """A "sharded" run that keeps full averages or gradients somewhere has saved nothing. From the real local shards."""
    alone = answers(1)[0]["single"]["memory"]
    for rank in answers(world_size):
        for what in ("parameters", "gradients", "optimizer"):
            assert rank["ddp"]["memory"][what] == pytest.approx(alone[what], rel=0.01)
            assert rank["fsdp"]["memory"][what] * world_size == pytest.approx(alone[what], rel=0.01)
        assert rank["fsdp"]["numbers"] * world_size == GPT(EVEN).num_params()


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_world_size_and_strategy_starts_from_the_same_weights(world_size: int) -> None:
    """After to_empty the same seed gives every rank the same numbers: identical shards, and another model each N."""
    expected = answers(1)[0]["starts"]["single"]
    for rank in answers(world_size):
        for start in rank["starts"].values():
            assert start.keys() == expected.keys()
            assert all(torch.equal(start[name], p) for name, p in expected.items())
    wpe = expected["wpe.weight"]
    assert not torch.equal(*wpe.chunk(2))  # what that bug would have made


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", ["modern", "recomputed", "accumulated"])
def test_architectures_and_savings_train_alike_when_sharded(world_size: int, case: str) -> None:
    """RoPE, grouped heads, windows and sinks; activations computed again; gradients that wait for the last part."""
    expected = answers(1)[0][case]["losses"]
    for rank in answers(world_size):
        assert rank[case]["losses"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("world_size", [2, 4])
def test_offloaded_shards_train_alike(world_size: int) -> None:
    """On a CPU the shards lie there anyway; the policy must still do the same arithmetic."""
    for rank in answers(world_size):
        assert rank["offload"]["losses"] == rank["fsdp"]["losses"]


def test_bf16_under_fsdp_computes_low_and_keeps_float32() -> None:
    """Weights kept in bfloat16 would lose small updates: its numbers have 8 bits."""
    for rank in answers(2):
        assert rank["bf16"]["dtypes"] == {torch.float32}
        assert rank["bf16"]["losses"] != rank["fsdp"]["losses"]
        assert rank["bf16"]["losses"] == pytest.approx(rank["fsdp"]["losses"], abs=0.02)


def test_phases_add_up_and_the_others_are_waited_for() -> None:
    """A split that leaves time out would hide where it goes."""
    for rank in answers(2):
        for seconds in rank["fsdp"]["seconds"]:
            parts = sum(value for name, value in seconds.items() if name != "total")
            assert parts == pytest.approx(seconds["total"], rel=1e-6)
            assert seconds["communication"] > 0


def test_accumulation_reduces_once_a_step() -> None:
    """Three micro-batches gather three times and scatter once: far less than three times the bytes of one."""
    one, three = (answers(2)[0][name]["sent"]["ring"] for name in ("fsdp", "accumulated"))
    assert three / one == pytest.approx((3 * 2 + 1) / 3, rel=0.02)


def test_replicas_must_divide_the_world() -> None:
    """Four processes in three rows leave one without a model."""
    with pytest.raises(ValueError, match="world_size 4 is not divisible by replicas 3; use a divisor"):
        make_mesh(World(0, 4), 3)
