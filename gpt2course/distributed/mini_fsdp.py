"""Fully sharded by hand: each process keeps 1/N of every parameter, and borrows the rest while it is needed.

The plan of ZeRO stage 3 (Rajbhandari et al. 2020, arXiv:1910.02054) and of PyTorch's FSDP (Zhao et al. 2023,
arXiv:2304.11277, section 3): all-gather a unit's parameters before its forward and again before its backward, free
them after each, and reduce-scatter its gradients, so that each process gets the sum of its own part.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

# torch 2.13's names, and those before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shard:
    """Parameters of one dtype that are stored, gathered and freed as one flat vector, 1/N of it on each process.

    Attributes:
        shard: this process's part, (ceil(n / N),), what the optimizer sees. Zeros pad the end of the last one.
        full: the whole vector; its memory is there only between `gather` and `free`.
        params: what the module computes with: views of `full`, and empty tensors while that is freed.
    """

    def __init__(self, params: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self.params, self.group = params, group
        self.shapes, self.sizes = [p.shape for p in params], [p.numel() for p in params]
        world_size, rank = dist.get_world_size(group), dist.get_rank(group)
        self.padding = -sum(self.sizes) % world_size
        self.full = self.flatten([p.detach() for p in params])
        dist.broadcast(self.full, group=group, group_src=0)
        own = self.full.chunk(world_size)[rank].clone()
        self.shard = nn.Parameter(own, requires_grad=params[0].requires_grad)
        self.n_bytes = self.full.untyped_storage().nbytes()
        self.free()

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors] + [tensors[0].new_zeros(self.padding)])

    @property
    def gathered(self) -> bool:
        return self.full.untyped_storage().nbytes() > 0

    def gather(self) -> None:
        """Collect the parts of all processes. What autograd has saved of the views becomes readable again, too."""
        if self.gathered:
            return
        self.full.untyped_storage().resize_(self.n_bytes)
        all_gather(self.full, self.shard.detach(), group=self.group)
        # `.data` hides the writing from autograd, which would otherwise say that a saved tensor was changed.
        views = self.full.data[: sum(self.sizes)].split(self.sizes)
        for p, view, shape in zip(self.params, views, self.shapes, strict=True):
            p.data = view.view(shape)

    def free(self) -> None:
        """Give the memory back, though autograd and the module hold views of it."""
        for p in self.params:
            p.data = self.full.new_empty(0)
        self.full.untyped_storage().resize_(0)

    def reduce(self) -> None:
        """Add the sum over all processes of the full gradients to `shard.grad`, each process its own part."""
        if all(p.grad is None for p in self.params):
            return
        grads = [
            self.full.new_zeros(shape) if p.grad is None else p.grad
            for p, shape in zip(self.params, self.shapes, strict=True)
        ]
        own = torch.empty_like(self.shard)
        reduce_scatter(own, self.flatten(grads), group=self.group)
        self.shard.grad = own if self.shard.grad is None else self.shard.grad + own
        for p in self.params:
            p.grad = None


class Unit:
    """A module whose parameters come and go together: hooks around its forward, and around its backward."""

    def __init__(self, module: nn.Module, params: Iterable[nn.Parameter], owner: "MiniFSDP") -> None:
        kinds: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
        for p in params:
            kinds.setdefault((p.dtype, p.requires_grad), []).append(p)
        self.shards = [Shard(same, owner.group) for same in kinds.values()]
        self.owner = owner
        self.in_backward = False
        module.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        module.register_forward_hook(self.after_forward)

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.gather()
        # When the gradients of all inputs are known, nothing in this unit is left to compute. Its own gradients are
        # no such sign: behind the last one there may be frozen layers, whose weights are still to be used. Nor are
        # leaves: autograd may fill in their gradients before those of the unit's parameters, which are leaves too.
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.grad_fn is not None]
        if inputs and torch.is_grad_enabled():
            register_multi_grad_hook(inputs, lambda grads: self.after_backward())

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.in_backward:  # where activation checkpointing runs forward once more, backward follows at once
            self.free()
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if not tensors:
            raise TypeError(
                f"{type(module).__name__} returned a {type(output).__name__} in which no tensor is found; "
                "a unit must return tensors, or lists, tuples or dicts of them"
            )
        outputs = [x for x in tensors if x.requires_grad]
        if outputs:
            register_multi_grad_hook(outputs, lambda grad: self.before_backward(), mode="any")

    def before_backward(self) -> None:
        self.owner.queue_finish()
        self.in_backward = True
        self.gather()

    def after_backward(self) -> None:
        self.in_backward = False
        self.free()
        if self.owner.synced:
            for shard in self.shards:
                shard.reduce()

    def gather(self) -> None:
        for shard in self.shards:
            shard.gather()

    def free(self) -> None:
        for shard in self.shards:
            shard.free()


class MiniFSDP:
    """Shards any module: call it like the module, run backward, and step an optimizer made from `parameters()`.

    Gradients are summed over processes, not averaged: divide each loss by what it should be a mean over, which is the
    number of tokens of the whole batch on all processes. With several micro-batches a step the sums add up; `no_sync`
    sends less, and in exchange keeps whole gradients.

    All processes must run the same units in the same order. The parameters of a unit share one flat vector (one for
    each dtype, and another for the frozen), so the optimizer treats them alike; those of them that no backward has
    touched count as zero.

    Args:
        module: the model, whole, on every process; the parameters of rank 0 count. Afterwards a parameter is an empty
            tensor whenever its unit is not at work.
        units: the submodules to shard one by one, such as the blocks. What is left, and what two units share, is the
            root unit, there during the whole forward and the whole backward.
        group: the processes; by default all.

    Raises:
        ValueError: if one unit lies inside another, or is not in the module.
        TypeError: in forward, if a unit hides its tensors in something else than lists, tuples and dicts: nobody could
            tell when its backward begins.
    """

    def __init__(self, module: nn.Module, units: Iterable[nn.Module], group: dist.ProcessGroup | None = None) -> None:
        self.module, self.group = module, group
        self.synced = True
        self.finish_queued = False
        units = list(units)
        names = {f"{name}.": part for name, part in module.named_modules(remove_duplicate=False) if part in units}
        clash = [name for name in names if any(name != other and name.startswith(other) for other in names)]
        if clash or set(names.values()) != set(units) or "." in names:
            raise ValueError(
                f"{len(units)} units, at {sorted(names)} in the module, inside each other: {clash}; "
                "give submodules of the module that do not overlap, such as its blocks"
            )
        for buffer in module.buffers():
            dist.broadcast(buffer, group=group, group_src=0)

        users: dict[nn.Parameter, set[nn.Module]] = {p: set() for p in module.parameters()}
        for name, p in module.named_parameters(remove_duplicate=False):
            users[p].add(next((unit for start, unit in names.items() if name.startswith(start)), module))
        home = {p: next(iter(found)) if len(found) == 1 else module for p, found in users.items()}
        self.units = [Unit(part, [p for p in home if home[p] is part], self) for part in [module, *units]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        return self.module(*args, **kwargs)

    def parameters(self) -> list[nn.Parameter]:
        """This process's flat shards, what the optimizer steps; without the frozen ones."""
        return [shard.shard for unit in self.units for shard in unit.shards if shard.shard.requires_grad]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, a backward adds to whole gradients on this process; the next one outside sends the total."""
        before, self.synced = self.synced, False
        try:
            yield
        finally:
            self.synced = before

    def queue_finish(self) -> None:
        if not self.finish_queued:
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
            self.finish_queued = True

    def finish(self) -> None:
        """At the end of backward: the units whose inputs have no gradient, the root and often the first."""
        self.finish_queued = False
        for unit in reversed(self.units):
            unit.after_backward()

    def full_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer, whole, on every process, by the module's own names; copies."""
        for unit in self.units:
            unit.gather()
        state = {name: value.clone() for name, value in self.module.state_dict().items()}
        for unit in self.units:
            unit.free()
        return state


@torch.no_grad()
def global_norm(shards: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> float:
    """Euclidean norm of all gradients of all processes; every process gets the same number.

    The norm of one process's shards is only a part of it, and clipping by that would scale each part differently.
    """
    total = torch.zeros((), dtype=torch.float64)
    for p in shards:
        if p.grad is not None:
            total += p.grad.double().square().sum().cpu()
    dist.all_reduce(total, group=group)
    return float(total.sqrt())
