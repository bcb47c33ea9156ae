"""The hand-made sharding against one process, on real processes, and the mistakes that must not pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2course.distributed import mini_fsdp
from gpt2course.distributed.mini_fsdp import MiniFSDP, Shard, global_norm
from gpt2course.train.comm import Traffic
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


def train(
    world: World, name: str, accumulate: int, dtype: torch.dtype, no_sync: bool = True, true_norm: bool = True
) -> dict[str, Tensor]:
    model = make_model(name, dtype, seed=world.rank)
    fsdp = MiniFSDP(model, model.units())
    shards = fsdp.parameters()
    optimizer = torch.optim.AdamW(shards, lr=1e-2)
    for step in range(10):
        ranks, valid = batch(name, step, world.world_size, accumulate, dtype)
        optimizer.zero_grad()
        for i, (x, y) in enumerate(ranks[world.rank]):
            with fsdp.no_sync() if no_sync and i < accumulate - 1 else nullcontext():
                (loss_sum(fsdp(x), y) / valid).backward()
        norm = global_norm(shards) if true_norm else float(sum(p.grad.square().sum() for p in shards)) ** 0.5
        for p in shards:
            p.grad.mul_(clip_scale(norm))
        optimizer.step()
    return fsdp.full_state_dict()


@pytest.mark.distributed
def test_two_ranks_are_one_process_bit_for_bit() -> None:
    """A part of a parameter on the wrong rank, padding in the sum, or stale weights in backward show here."""
    for found in run_ranks(differences, 2, train, torch.float32, (1, 3)):
        assert found == dict.fromkeys(found, 0.0)


@pytest.mark.distributed
def test_four_ranks_are_one_process_but_for_the_order_of_sums() -> None:
    """Four summands have many orders. In float32 the weights of ten steps then differ by up to 4e-6, as a small mistake
    might; in float64 by 7e-15, so that any real mistake stands out."""
    for found in run_ranks(differences, 4, train, torch.float64, (3,)):
        assert max(found.values()) < 1e-12, found


def without_no_sync(world: World) -> float:
    return largest_difference(
        train(world, "odd", 3, torch.float64, no_sync=False), train_alone("odd", 2, 3, torch.float64).state_dict()
    )


@pytest.mark.distributed
def test_reducing_every_micro_batch_adds_up_as_well() -> None:
    """`no_sync` is about traffic only: shards hold sums, so a second reduce must add to them and not replace them."""
    assert max(run_ranks(without_no_sync, 2)) < 1e-12


@contextmanager
def mistake(name: str) -> Iterator[None]:
    true_reduce, true_unit = Shard.reduce, mini_fsdp.Unit.before_backward

    def reduce_for_the_neighbour(shard: Shard) -> None:
        before, after = shard.shard.grad, dist.get_world_size() - dist.get_rank() - 1
        true_reduce(shard)
        if shard.shard.grad is not before:
            parts = [torch.empty_like(shard.shard.grad) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, shard.shard.grad)
            shard.shard.grad = parts[after]

    def no_regather(unit: mini_fsdp.Unit) -> None:
        everyone, mini_fsdp.all_gather = mini_fsdp.all_gather, lambda full, *args, **kwargs: full.zero_()
        true_unit(unit)
        mini_fsdp.all_gather = everyone

    def keeps_only_the_last_micro_batch(shard: Shard) -> None:
        before = shard.shard.grad
        shard.shard.grad = None
        true_reduce(shard)
        if shard.shard.grad is None:
            shard.shard.grad = before

    try:
        if name == "wrong rank":
            Shard.reduce = reduce_for_the_neighbour
        elif name == "no regather":
            mini_fsdp.Unit.before_backward = no_regather
        elif name == "last only":
            Shard.reduce = keeps_only_the_last_micro_batch
        yield
    finally:
        Shard.reduce, mini_fsdp.Unit.before_backward = true_reduce, true_unit


def wrong(world: World) -> dict[str, float]:
    alone = train_alone("odd", world.world_size, 3, torch.float64).state_dict()
    found = {"local norm": largest_difference(train(world, "odd", 3, torch.float64, true_norm=False), alone)}
    for name in ("wrong rank", "no regather", "last only"):
        with mistake(name):
            found[name] = largest_difference(train(world, "odd", 3, torch.float64, no_sync=name != "last only"), alone)
    with mistake("none"):
        found["none"] = largest_difference(train(world, "odd", 3, torch.float64), alone)
    return found


@pytest.mark.distributed
def test_the_mistakes_are_seen() -> None:
    """What the equality above is for: a comparison that these pass proves nothing."""
    for found in run_ranks(wrong, 2):
        assert found.pop("none") < 1e-12
        assert min(found.values()) > 1e-3, found


def memory(world: World) -> dict[str, Any]:
    """Bytes of storage at each moment, and what was sent."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)), nn.Linear(64, 3))
    whole = sum(p.numel() * 4 for p in model.parameters())
    fsdp = MiniFSDP(model, list(model)[:4])

    def full() -> int:
        return sum(s.full.untyped_storage().nbytes() for unit in fsdp.units for s in unit.shards)

    during: list[int] = []
    for layer in list(model)[:4]:
        layer.register_forward_hook(lambda *_: during.append(full()))
        layer.register_full_backward_hook(lambda *_: during.append(full()))
    found: dict[str, Any] = {"whole": whole, "before": full()}
    with Traffic() as traffic:
        loss = fsdp(torch.ones(2, 64, requires_grad=True)).sum()
        found["between"] = full()
        loss.backward()
    found |= {"after": full(), "during": during, "calls": dict(traffic.calls)}
    found["sent"] = traffic.ring_bytes()
    found["shards"] = sum(p.untyped_storage().nbytes() for p in fsdp.parameters())
    found["gradients"] = sum(p.grad.untyped_storage().nbytes() for p in fsdp.parameters())
    found["empty"] = [tuple(p.shape) for p in model.parameters()]
    found["views"] = sum(p.grad is not None for p in model.parameters())
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_memory_is_given_back(world_size: int) -> None:
    """Views that keep the storage alive would make all of this a data parallel with more traffic."""
    for found in run_ranks(memory, world_size):
        assert (found["before"], found["between"], found["after"]) == (0, 0, 0)
        for kind in ("shards", "gradients"):
            assert found["whole"] / world_size <= found[kind] <= found["whole"] / world_size + 5 * 4 * world_size
        layer, root = (64 * 64 + 64) * 4, (64 * 3 + 3) * 4
        assert max(found["during"]) <= 2 * layer + root + 4 * world_size
        assert found["empty"] == [(0,)] * 10
        assert found["views"] == 0
        # Each of the five units once before forward, once before backward, and one reduce each.
        assert found["calls"] == {"all_gather": 10, "reduce_scatter": 5}
        assert found["sent"] == pytest.approx(3 * (world_size - 1) / world_size * found["whole"], rel=0.002)


class Wrapped:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Hides(nn.Linear):
    """Returns its tensor inside an object that nobody can look into."""

    def forward(self, x: Tensor) -> Wrapped:
        return Wrapped(super().forward(x))


def other_properties(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model = make_model("odd", torch.float32, seed=world.rank)
    model.scale.fill_(world.rank + 2.0)
    blocks = model.units()
    fsdp = MiniFSDP(model, blocks)
    found["scale"] = model.scale.item()
    sizes = [sum(sum(shard.sizes) for shard in unit.shards) for unit in fsdp.units]
    found["sizes"] = sizes
    with torch.no_grad():
        x = torch.ones(2, 7)
        out = fsdp(x)
    plain = make_model("odd", torch.float32, seed=1)
    plain.load_state_dict(fsdp.full_state_dict())
    found["loads"] = torch.equal(plain(x), out)
    found["tied"] = plain.second.weight is plain.first.weight

    # Activation checkpointing runs a unit's forward inside backward, after which its weights are still needed.
    found["checkpointed"] = []
    torch.manual_seed(3)
    x = torch.randn(2, 3, requires_grad=True)
    for sharded in (False, True):
        torch.manual_seed(5)
        again = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))
        if sharded:
            MiniFSDP(again, list(again))
        h = x
        for layer in again:
            h = checkpoint(layer, h, use_reentrant=False)
        h.sum().backward()
        found["checkpointed"].append(x.grad.clone())
        x.grad = None

    for name, units in (("nested", [plain.tied, plain.tied[0]]), ("foreign", [nn.Linear(2, 2)]), ("root", [plain])):
        try:
            MiniFSDP(plain, units)
        except ValueError as error:
            found[name] = str(error)
    try:
        MiniFSDP(nn.Sequential(Hides(2, 2)), [])(torch.ones(1, 2))
    except TypeError as error:
        found["hidden"] = str(error)
    return found


@pytest.mark.distributed
def test_what_else_it_promises() -> None:
    """What two units share in the root and once; state that loads elsewhere; checkpointed layers; refusals."""
    for found in run_ranks(other_properties, 2):
        assert found["scale"] == 2.0
        # root: enter, the shared weight, leave; then tied once, mixed, and the two biases.
        assert found["sizes"] == [7 * 11 + 11 + 11 * 11 + 11 * 3 + 3, 11 * 11 + 22, 2 * 99 + 20, 11, 11]
        assert found["loads"]
        assert found["tied"]
        assert torch.equal(*found["checkpointed"])
        assert "returned a Wrapped in which no tensor is found" in found["hidden"]
        for name in ("nested", "foreign", "root"):
            assert "do not overlap" in found[name]


def the_norm(world: World) -> float:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 0.0]) if world.rank == 0 else torch.tensor([0.0, 4.0])
    return global_norm([p, nn.Parameter(torch.zeros(1))])


@pytest.mark.distributed
def test_the_norm_is_of_all_shards() -> None:
    """The local norms are 3 and 4; only together they are 5."""
    assert run_ranks(the_norm, 2) == [5.0, 5.0]
