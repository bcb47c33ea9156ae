"""The hand-made data parallel against one process, on real processes, and the mistakes that must not pass."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt2course.distributed.mini_ddp import Bucket, MiniDDP, assign_buckets
from gpt2course.train.world import World
from tests.distributed.mini_cases import (
    batch,
    clip_scale,
    differences,
    largest_difference,
    loss_sum,
    make_model,
    train_alone,
)
from tests.distributed.ranks import run_ranks

BUCKET_BYTES = 500
"""several buckets in each model, some with one parameter that is larger"""


class ForgetsABucket(MiniDDP):
    def receive(self, bucket: Bucket) -> None:
        if bucket is self.buckets[1]:
            grads = [p.grad.clone() for p in bucket.params]
            super().receive(bucket)
            for p, grad in zip(bucket.params, grads, strict=True):
                p.grad = grad
        else:
            super().receive(bucket)


class SendsTooEarly(MiniDDP):
    """Syncs every micro-batch, and looks away from the sums that are there already."""

    def no_sync(self) -> Any:
        return nullcontext()

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)


class SendsAtTheFirstGradient(MiniDDP):
    """Takes a bucket for full when one of its gradients is there, so the others count as zero or stay stale."""

    def on_gradient(self, p: nn.Parameter) -> None:
        bucket = self.bucket_of[p]
        if self.synced and not bucket.ready:
            bucket.ready = len(bucket.params) - 1
        super().on_gradient(p)


def train(
    world: World, name: str, accumulate: int, dtype: torch.dtype, kind: type[MiniDDP] = MiniDDP
) -> dict[str, Tensor]:
    # A seed of its own on each rank: what makes them equal is the broadcast.
    model = make_model(name, dtype, seed=world.rank)
    ddp = kind(model, BUCKET_BYTES)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    for step in range(10):
        ranks, valid = batch(name, step, world.world_size, accumulate, dtype)
        optimizer.zero_grad()
        for i, (x, y) in enumerate(ranks[world.rank]):
            with nullcontext() if i == accumulate - 1 else ddp.no_sync():
                (loss_sum(ddp(x), y) / valid).backward()
        norm = float(torch.stack([p.grad.double().square().sum() for p in params]).sum().sqrt())
        for p in params:
            p.grad.mul_(clip_scale(norm))
        optimizer.step()
    return model.state_dict()


@pytest.mark.distributed
def test_two_ranks_are_one_process_bit_for_bit() -> None:
    """A gradient that is lost, counted twice, scaled or sent before it is complete shows here; a + b is b + a."""
    for found in run_ranks(differences, 2, train, torch.float32, (1, 3)):
        assert found == dict.fromkeys(found, 0.0)


@pytest.mark.distributed
def test_four_ranks_are_one_process_but_for_the_order_of_sums() -> None:
    """Four summands have many orders. In float32 the weights of ten steps then differ by up to 4e-6, as a small mistake
    might; in float64 by 7e-15, so that any real mistake stands out."""
    for found in run_ranks(differences, 4, train, torch.float64, (3,)):
        assert max(found.values()) < 1e-12, found


def wrong(world: World, kinds: list[type[MiniDDP]]) -> list[float]:
    alone = train_alone("odd", world.world_size, 3, torch.float64).state_dict()
    return [largest_difference(train(world, "odd", 3, torch.float64, kind), alone) for kind in kinds]


@pytest.mark.distributed
def test_the_mistakes_are_seen() -> None:
    """What the equality above is for: a comparison that these pass proves nothing."""
    for found in run_ranks(wrong, 2, [ForgetsABucket, SendsTooEarly, SendsAtTheFirstGradient]):
        assert min(found) > 1e-3, found


def other_properties(world: World) -> dict[str, Any]:
    model = make_model("odd", torch.float32, seed=world.rank)
    model.scale.fill_(world.rank + 2.0)
    ddp = MiniDDP(model, BUCKET_BYTES)
    found: dict[str, Any] = {"scale": model.scale.item(), "buckets": len(ddp.buckets)}

    x = torch.ones(2, 7)
    ddp(x).sum().backward()
    try:
        ddp(x)
    except RuntimeError as error:
        found["error"] = str(error)
    with torch.no_grad():
        ddp(x)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    ddp(x)
    for p in model.parameters():
        p.grad = None

    # Each rank uses another part of the model; the third is used by none.
    parts = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(3))
    MiniDDP(parts, 8)
    parts[world.rank](torch.ones(1, 2)).sum().backward()
    found["parts"] = [part.weight.grad.tolist() for part in parts]

    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    found["dtypes"] = [[p.dtype for p in bucket.params] for bucket in MiniDDP(mixed, 1000).buckets]
    return found


@pytest.mark.distributed
def test_what_else_it_promises() -> None:
    """Buffers sent, a sum that would be summed again refused, unused parameters without a hang, one dtype a bucket."""
    first, second = run_ranks(other_properties, 2)
    assert first == second
    assert first["scale"] == 2.0
    assert first["buckets"] >= 3
    assert "no_sync" in first["error"]
    assert first["parts"] == [[[1.0, 1.0]], [[1.0, 1.0]], [[0.0, 0.0]]]
    assert first["dtypes"] == [[torch.float64] * 2, [torch.float32] * 2]


def against_torch(world: World) -> float:
    ranks, valid = batch("gpt", 0, world.world_size, 1, torch.float32)
    x, y = ranks[world.rank][0]
    ours, theirs = make_model("gpt", torch.float32), make_model("gpt", torch.float32)
    (loss_sum(MiniDDP(ours)(x), y) / valid).backward()
    # torch's takes the mean over processes, which is the sum over their number.
    torchs = DistributedDataParallel(theirs)
    (loss_sum(torchs(x), y) / valid * world.world_size).backward()
    return largest_difference(*[{n: p.grad for n, p in m.named_parameters()} for m in (ours, theirs)])


@pytest.mark.distributed
def test_torchs_own_gives_the_same_gradients() -> None:
    """The chapter says that both are the same thing; a factor of the world size would be easy to lose."""
    assert max(run_ranks(against_torch, 2)) == 0.0


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 60))
def test_every_parameter_is_in_one_bucket_last_first(sizes: list[int], limit: int) -> None:
    """A parameter in no bucket is never summed, one in two buckets is summed twice; a bucket past the limit is late."""
    buckets = assign_buckets(sizes, limit)
    assert [i for bucket in buckets for i in bucket] == list(reversed(range(len(sizes))))
    totals = [sum(sizes[i] for i in bucket) for bucket in buckets]
    for bucket, total in zip(buckets, totals, strict=True):
        assert total <= limit or len(bucket) == 1
    for total, following in zip(totals, buckets[1:], strict=False):
        assert total + sizes[following[0]] > limit


def test_a_limit_below_one_byte_is_refused() -> None:
    """It would otherwise give every parameter its own bucket, and be slow in silence."""
    with pytest.raises(ValueError, match="bucket_bytes is 0; it must be at least 1"):
        assign_buckets([4], 0)
