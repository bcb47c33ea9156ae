"""How much memory a computation needs at its worst moment."""

import os
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that tensors held at once while `fn` ran, above what they held before.

    On the CPU every allocation and release of torch's allocator is recorded by the profiler and summed in order. This
    counts what a kernel takes for itself as well, is exact, and repeats to the byte. The resident size of the process
    would not do: it moves in pages, keeps what was freed, and a peak below an earlier one cannot be seen. On CUDA the
    caching allocator's own peak is read.

    What `fn` returns is released at once; tensors it leaves behind, such as `.grad`, count while they are there. The
    profiler makes `fn` slower, so measure time apart from memory.

    Args:
        fn: takes nothing; its result is thrown away.
        device: where `fn` computes.

    Returns:
        bytes, at least 0.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"device is {device}; memory can be measured on cpu and cuda")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler's own log lines stand among a chapter's outputs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        fn()
    if prof.profiler is None or prof.profiler.kineto_results is None:
        raise RuntimeError("the profiler gave no result; is another profiler running?")
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(changes, initial=0))
