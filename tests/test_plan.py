"""A run's memory and time by arithmetic, held against real shards and against numbers written down."""

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from gpt2course import GPT, PRESETS, GPTConfig
from gpt2course.plan import Memory, memory_bytes, run_time
from gpt2course.train.peaks import peak_flops
from gpt2course.train.world import World
from tests.distributed.ranks import run_ranks

ODD = GPTConfig(n_layer=3, n_head=4, n_embd=20, block_size=16, vocab_size=53)
"""53 rows of the embedding are not divisible by 2 or 3"""


def test_one_process_holds_sixteen_bytes_a_weight() -> None:
    """AdamW's second average forgotten, or the tied head counted twice."""
    model = GPT(ODD)
    held = memory_bytes(ODD)
    assert held == Memory(4 * model.num_params(), 4 * model.num_params(), 8 * model.num_params())
    assert held.total == held.kept == 16 * model.num_params()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(value.nbytes for value in states) == held.optimizer
    assert sum(p.grad.nbytes for p in model.parameters() if p.grad is not None) == held.gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_ddp_saves_nothing(precision: Any) -> None:
    """A plan that fits a model in memory which it does not fit in."""
    assert memory_bytes(ODD, 8, "ddp", precision) == memory_bytes(ODD)


def local_bytes(world: World) -> tuple[int, int]:
    """Bytes of this process's shards, and of all weights of two blocks and of the root while they are gathered."""
    model = GPT(ODD)
    for group in [*model.h, model]:
        fully_shard(group)
    shards = {p.to_local().untyped_storage().data_ptr(): p.to_local().nbytes for p in model.parameters()}
    model.unshard()
    for block in model.h[:2]:
        block.unshard()
    whole = sum(p.nbytes for p in model.parameters() if not hasattr(p, "to_local"))
    return sum(shards.values()), whole


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_are_as_large_as_reckoned(world_size: int) -> None:
    """Parameters / N, where the largest shard of a tensor that N does not divide is larger; or a group left out."""
    found = run_ranks(local_bytes, world_size)
    held = memory_bytes(ODD, world_size, "fsdp")
    assert max(shards for shards, _ in found) == found[0][0] == held.parameters
    assert all(gathered == held.gathered for _, gathered in found)
    assert held.parameters > memory_bytes(ODD).parameters / world_size


def test_fsdp_falls_as_one_over_n() -> None:
    """A plan that promises less, or more, than 1/N of GPT-2 XL."""
    config = PRESETS["gpt2-xl"]
    whole = memory_bytes(config)
    for n in (2, 64):
        part = memory_bytes(config, n, "fsdp")
        assert part.kept == pytest.approx(whole.kept / n, rel=0.001)
        assert (
            memory_bytes(config, n, "fsdp", "bf16").gathered * 2
            == part.gathered
            == memory_bytes(config, 2, "fsdp").gathered
        )
    assert whole.kept == 16 * 1_557_611_200


def test_time_of_gpt2_on_ten_billion_tokens() -> None:
    """The README's table: a factor of 3 for the backward pass forgotten, or a device that counts twice."""
    a100, h100 = peak_flops("NVIDIA A100-SXM4-80GB", "bf16"), peak_flops("NVIDIA H100 80GB HBM3", "bf16")
    assert a100 is not None
    assert h100 is not None
    hours = {
        (name, devices, mfu): run_time(PRESETS["gpt2"], 10e9, devices, peak, mfu) / 3600
        for name, peak in (("a100", a100), ("h100", h100))
        for devices in (1, 8)
        for mfu in (0.35, 0.45)
    }
    assert {key: round(value, 1) for key, value in hours.items()} == {
        ("a100", 1, 0.35): 20.3,
        ("a100", 1, 0.45): 15.8,
        ("a100", 8, 0.35): 2.5,
        ("a100", 8, 0.45): 2.0,
        ("h100", 1, 0.35): 6.4,
        ("h100", 1, 0.45): 5.0,
        ("h100", 8, 0.35): 0.8,
        ("h100", 8, 0.45): 0.6,
    }
    by_the_rule = 6 * 124_439_808 * 10e9 / (a100 * 0.35) / 3600
    assert hours["a100", 1, 0.35] == pytest.approx(by_the_rule, rel=0.1), "6 N tokens, which leaves attention out"


def test_a_window_saves_time() -> None:
    """Attention counted as if every query saw every key."""
    full = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=512)
    windowed = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=512, window=32)
    assert run_time(windowed, 1e6, 1, 1e12, 0.5) < run_time(full, 1e6, 1, 1e12, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "fsdp", "fp32"), "world_size is 0 with strategy fsdp"),
        ((2, "single", "fp32"), "world_size is 2 with strategy single; single takes 1"),
        ((2, "zero", "fp32"), "strategy 'zero', precision 'fp32'; they must be of"),
        ((2, "ddp", "int8"), "strategy 'ddp', precision 'int8'"),
    ],
)
def test_what_cannot_be_planned_is_told(arguments: Any, message: str) -> None:
    """A plan for one process of many."""
    with pytest.raises(ValueError, match=message):
        memory_bytes(ODD, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1e9, 1, 1e12, 0.0), "mfu is 0.0; it is a share"),
        ((1e9, 1, 1e12, 45), "mfu is 45; it is a share"),
        ((0, 1, 1e12, 0.4), "tokens 0, devices 1, .*: each must be above 0"),
        ((1e9, 0, 1e12, 0.4), "devices 0"),
        ((1e9, 1, 0, 0.4), "peak_flops 0"),
    ],
)
def test_impossible_times_are_told(arguments: Any, message: str) -> None:
    """45 for 45 %: a run of ten minutes in the plan that takes a day."""
    with pytest.raises(ValueError, match=message):
        run_time(ODD, *arguments)
