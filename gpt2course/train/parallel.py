"""One function a strategy: the same GPT for one process, for DDP, and for FSDP.

Each applies, in this order: compile, activation checkpointing, shard. What differs between the strategies is all in
here; the loop does not know which one it drives. Gradients are SUMMED over the processes, never averaged: each
micro-batch's loss is divided by the number of valid tokens of the whole global batch, so the sum is the gradient of
the mean over all tokens, however unevenly the tokens lie on the processes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gpt2course.loss import IGNORE
from gpt2course.model import GPT
from gpt2course.train.comm import SumState, summing_hook
from gpt2course.train.config import TrainConfig
from gpt2course.train.world import World, own_generators

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Strategy:
    """What the loop needs to know of a model that is trained by one process or many."""

    name: str
    """single, ddp, fsdp or hsdp"""
    world: World
    model: nn.Module
    """what is called: model(x_BT, y_BT, reduction="sum")"""
    module: nn.Module
    """the GPT itself, whose parameters the optimizer gets; under FSDP they are DTensors, each process with its shard"""
    accumulate: Callable[[bool], AbstractContextManager[object]]
    """to be entered before the forward pass of a micro-batch; given False, its gradients stay on this process"""
    autocast: Callable[[], AbstractContextManager[object]]
    """to be entered around a forward pass"""
    sums: SumState | None = None
    """DDP: when its buckets were sent"""


def seeded(config: TrainConfig, device: torch.device) -> GPT:
    """The weights that a run starts from: those of its seed, whatever the strategy and the number of processes."""
    with own_generators(device):
        torch.manual_seed(config.seed)
        return GPT(config.model).to(device)


def prepare(model: GPT, config: TrainConfig) -> None:
    """Compile and activation checkpointing, block by block and in place. Sharding comes after both.

    In this order: torch's `checkpoint` runs what it is in front of uncompiled, unless it was compiled before.
    """
    for block in model.h:
        if config.compile:
            block.forward = torch.compile(block.forward)
        if config.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _check_joined(name: str) -> None:
    if not torch.distributed.is_initialized():
        raise ValueError(
            f"{name} needs processes that torchrun started; use ./scripts/launch_{name}.sh, with --nproc 1 for one"
        )


def _autocast(config: TrainConfig, world: World) -> Callable[[], AbstractContextManager[object]]:
    if config.precision == "fp32":
        return nullcontext
    return partial(torch.autocast, world.device.type, dtype=DTYPES[config.precision])


def single(config: TrainConfig, world: World) -> Strategy:
    """One process, one device."""
    model = seeded(config, world.device)
    prepare(model, config)
    return Strategy("single", world, model, model, lambda last: nullcontext(), _autocast(config, world))


def ddp(config: TrainConfig, world: World, bucket_mb: float = 25.0) -> Strategy:
    """DistributedDataParallel: every process has all of the model; gradients are summed in buckets during backward.

    Args:
        config, world: the run.
        bucket_mb: MiB of gradients that travel together; small ones start earlier, large ones have less overhead.

    Raises:
        ValueError: if this process has not joined any others, not even as the only one.
    """
    _check_joined("ddp")
    model = seeded(config, world.device)
    prepare(model, config)
    devices = [world.device] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=devices, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True)
    sums = SumState()
    wrapped.register_comm_hook(sums, summing_hook)
    settle_buckets(wrapped, config, world)
    sums.last_started = None

    def accumulate(last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else wrapped.no_sync()

    return Strategy("ddp", world, wrapped, model, accumulate, _autocast(config, world), sums)


def settle_buckets(wrapped: DistributedDataParallel, config: TrainConfig, world: World) -> None:
    """Have DDP order its buckets for good, by a pass in which nothing is to be predicted.

    DDP sorts gradients into other buckets after its first backward pass, by when they were ready. The last bit of a
    sum of three depends on where in a bucket it lies. So the first step after a restart would not be the step that an
    undisturbed run takes, in which the buckets had been sorted long ago.
    """
    rows = max(1, config.batch_size // (world.world_size * config.grad_accum_steps))  # as in a step, for torch.compile
    x_bT = torch.zeros(rows, config.model.block_size, dtype=torch.int64, device=world.device)
    y_bT = torch.full_like(x_bT, IGNORE)
    with own_generators(world.device), _autocast(config, world)():
        wrapped(x_bT, y_bT, reduction="sum").backward()
        wrapped.zero_grad()
        with wrapped.no_sync():
            wrapped(x_bT, y_bT, reduction="sum")  # the sorting is done at the start of a second forward pass


def fsdp(
    config: TrainConfig,
    world: World,
    *,
    reshard_after_forward: bool = True,
    replicas: int = 1,
    cpu_offload: bool = False,
) -> Strategy:
    """Fully sharded (Rajbhandari et al. 2020, arXiv:1910.02054, stage 3; torch's `fully_shard`): each process keeps
    1/N of parameters, gradients and averages, and gathers a block's parameters when the block is computed.

    Each block is a group; all else, the tied embedding and head with the final norm, is the root group: a tied weight
    must not lie in two groups. Nothing is made at full size on a device: the model is sharded on the meta device, and
    then rank 0's weights, made from the seed, are broadcast shard by shard. (The same seed on each process would give
    every shard the same numbers, and another model at each world size.)

    Args:
        config, world: the run.
        reshard_after_forward: free a gathered block after its forward pass, and gather it again for its backward;
            False keeps it, for a third less traffic and the memory of the whole model.
        replicas: HSDP: so many copies of the sharded model, each sharded over world_size / replicas processes.
        cpu_offload: keep shards and averages in the memory of the CPU.

    Raises:
        ValueError: if world_size is not divisible by replicas, or this process has not joined any others.
    """
    _check_joined("fsdp")
    mesh = make_mesh(world, replicas)
    with torch.device("meta"):
        model = GPT(config.model)
    prepare(model, config)
    low = DTYPES[config.precision] if config.precision != "fp32" else None
    # Products in low precision; gradients travel in float32. The loss, an output of the root alone, is float32 anyway.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if cpu_offload else OffloadPolicy()
    for group in [*model.h, model]:
        fully_shard(
            group, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy, offload_policy=offload
        )
        assert isinstance(group, FSDPModule)
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)  # a factor of 1 alone asks for an operation that gloo lacks
    model.to_empty(device="cpu" if cpu_offload else world.device)
    model.tie_weights()  # to_empty gave head and embedding a tensor each
    full = seeded(config, torch.device("cpu")).state_dict() if world.first else {}
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    assert model.lm_head.weight is model.wte.weight

    def accumulate(last: bool) -> AbstractContextManager[object]:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        return nullcontext()

    return Strategy("fsdp" if replicas == 1 else "hsdp", world, model, model, accumulate, nullcontext)


def make_mesh(world: World, replicas: int) -> DeviceMesh:
    """The processes in a row, or for HSDP in `replicas` rows, each of which holds the model once."""
    if replicas < 1 or world.world_size % replicas:
        raise ValueError(f"world_size {world.world_size} is not divisible by replicas {replicas}; use a divisor of it")
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("shard",))
    shape = (replicas, world.world_size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
