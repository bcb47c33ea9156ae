"""Data parallel by hand: every process holds the whole model, computes its own rows, and the gradients are summed.

The pieces that torch's DistributedDataParallel is made of (Li et al. 2020, arXiv:2006.15704, section 3.2): a hook on
every gradient, buckets in the order in which gradients come, and an all-reduce that runs while backward goes on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MIB = 2**20


def assign_buckets(sizes: Sequence[int], bucket_bytes: int) -> list[list[int]]:
    """Which parameters travel together: the last come first, and a bucket closes before it would pass its limit.

    Backward makes gradients from the last layer to the first, so this is about the order in which they are ready. A
    parameter larger than the limit has a bucket of its own.

    Args:
        sizes: bytes of each parameter, in the model's order.
        bucket_bytes: the limit.

    Returns:
        indices into sizes, bucket by bucket.

    Raises:
        ValueError: for a limit below one byte.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; it must be at least 1")
    buckets: list[list[int]] = []
    room = 0
    for i in reversed(range(len(sizes))):
        if not buckets or sizes[i] > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(i)
        room -= sizes[i]
    return buckets


@dataclass
class Bucket:
    """Gradients that travel in one all-reduce."""

    params: list[nn.Parameter]
    ready: int = 0
    """of how many of them this backward has made the gradient"""
    flat: Tensor | None = None
    """their gradients end to end; after the all-reduce each `.grad` is a view of it"""
    work: dist.Work | None = None
    """the all-reduce that is under way"""
    version: int = 0
    """torch's count of the writes to `flat`, as it was when the sums arrived"""

    def holds_sums(self) -> bool:
        """Whether `.grad` is what the last all-reduce gave, neither set to None since nor written to."""
        grad = self.params[0].grad
        flat = self.flat
        return grad is not None and flat is not None and grad._base is flat and flat._version == self.version


class MiniDDP:
    """Wraps any module: call it like the module, run backward, and `.grad` holds the sum over all processes.

    The sum is ready when `backward()` returns; there is nothing to call. It is a sum and no mean, so divide each
    loss by what it should be a mean over, which is the number of tokens of the whole batch on all processes. What no
    backward has touched counts as zero, so that processes may use different parts of a model.

    With several micro-batches a step, run all but the last in `no_sync()`.

    Each process must run a backward that reaches the model, or the others wait for it. Unlike torch's, this sends the
    module's buffers (batch norm's statistics) once, at the start, and not with every forward.

    Args:
        module: the model, whole, on every process. Parameters and buffers are overwritten by those of rank 0.
        bucket_bytes: a bucket closes before it would grow past this.
        group: the processes; by default all.

    Raises:
        ValueError: for bucket_bytes below 1.
    """

    def __init__(self, module: nn.Module, bucket_bytes: int = 25 * MIB, group: dist.ProcessGroup | None = None) -> None:
        self.module, self.group = module, group
        self.synced = True
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), group=group, group_src=0)

        params = [p for p in module.parameters() if p.requires_grad]
        self.buckets = [
            Bucket([params[i] for i in ids if params[i].dtype == dtype])
            for ids in assign_buckets([p.numel() * p.element_size() for p in params], bucket_bytes)
            for dtype in dict.fromkeys(params[i].dtype for i in ids)
        ]
        self.bucket_of = {p: bucket for bucket in self.buckets for p in bucket.params}
        self.next = 0  # the first bucket that is not on its way yet
        self.finish_queued = False
        for p in params:
            p.register_post_accumulate_grad_hook(self.on_gradient)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward.

        Raises:
            RuntimeError: if gradients hold a sum over all processes already: summing them once more would count that
                as many times as there are processes.
        """
        if torch.is_grad_enabled() and any(bucket.holds_sums() for bucket in self.buckets):
            raise RuntimeError(
                "the gradients are summed over all processes already, and one more backward would sum that sum; "
                "call optimizer.zero_grad() first, or run all micro-batches but the last in no_sync()"
            )
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, a backward adds to `.grad` on this process alone; the next one outside sends the total."""
        before, self.synced = self.synced, False
        try:
            yield
        finally:
            self.synced = before

    def on_gradient(self, p: nn.Parameter) -> None:
        """Autograd calls this as soon as p.grad is complete; the layers below are still to come."""
        if not self.synced:
            return
        if not self.finish_queued:
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
            self.finish_queued = True
        self.bucket_of[p].ready += 1
        # In the list's order, on every process alike: an all-reduce meets whatever the others send next.
        while self.next < len(self.buckets) and self.buckets[self.next].ready == len(self.buckets[self.next].params):
            self.send(self.buckets[self.next])
            self.next += 1

    def send(self, bucket: Bucket) -> None:
        """Start a bucket's all-reduce and don't wait for it."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.params]
        bucket.flat = torch.cat([grad.reshape(-1) for grad in grads])
        bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)

    def finish(self) -> None:
        """At the end of backward: send what never filled up, and wait for all."""
        for bucket in self.buckets[self.next :]:
            self.send(bucket)
        for bucket in self.buckets:
            self.receive(bucket)
        self.next, self.finish_queued = 0, False

    def receive(self, bucket: Bucket) -> None:
        """Wait for a bucket's all-reduce and make `.grad` its sums."""
        assert bucket.work is not None
        assert bucket.flat is not None
        bucket.work.wait()
        for p, total in zip(bucket.params, bucket.flat.split([p.numel() for p in bucket.params]), strict=True):
            p.grad = total.view_as(p)
        bucket.ready, bucket.work, bucket.version = 0, None, bucket.flat._version
