"""`gpt2course bench attention`: what windows and shared key heads are worth, on the machine at hand."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from gpt2course.bench.decoding import measure_decoding, variants
from gpt2course.bench.report import FILE, SCHEMA, Report, memory_line, time_line
from gpt2course.bench.summary import targets
from gpt2course.bench.training import measure_lengths
from gpt2course.chapters.run import machine
from gpt2course.config import PRESETS, GPTConfig
from gpt2course.pretrained import check_device
from gpt2course.viz.bench import attention_figure

N_KV_HEAD = 4
TOKENS = 4  # decoded for each repeat: a token is quick, and its time scatters
LENGTHS, CONTEXTS = (1024, 2048, 4096, 8192, 16384), (1024, 4096, 16384)
QUICK_SHAPE = GPTConfig(n_layer=2, n_head=12, n_embd=96, vocab_size=256, block_size=64, pos="rope")


def run(
    lengths: Sequence[int] = LENGTHS,
    contexts: Sequence[int] = CONTEXTS,
    window: int = 256,
    repeats: int = 9,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    quick: bool = False,
    command: str = "gpt2course bench attention",
) -> Report:
    """Measure. Training: attention proper of GPT-2 small. Decoding: the whole of GPT-2 small with rotary positions.

    Args:
        lengths: T for training, in tokens; at least three, for the fit.
        contexts: positions in the cache for decoding.
        window: keys that a query sees in the windowed variants.
        repeats: how often each is measured; in decoding, how many times `TOKENS` tokens.
        device, dtype: where and in which numbers.
        threads: of the CPU; by default as many as torch takes.
        quick: a miniature, to see that it runs; its times say nothing.
        command: kept in the report.

    Raises:
        ValueError: for fewer than three lengths, a context too short for the tokens to decode, a window below 1, or a
            device that is not there.
    """
    if quick:
        lengths, contexts, window, repeats = (64, 128, 256), (16, 32), 8, 3
    check_device(device)
    if len(set(lengths)) < 3 or min(lengths) < 1:
        raise ValueError(f"lengths are {list(lengths)}; a line needs three different ones, each at least 1")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    shape = QUICK_SHAPE if quick else PRESETS["gpt2"].with_(pos="rope")
    variants(shape, N_KV_HEAD, window)  # refuses a window that is none, before anything is measured
    tokens = TOKENS * repeats
    if repeats < 1 or min(contexts, default=0) <= tokens + 1:
        raise ValueError(
            f"repeats is {repeats} and contexts are {list(contexts)}; repeats must be at least 1, "
            f"and every context more than the {tokens + 1} tokens that are decoded in it"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    place, numbers = torch.device(device), getattr(torch, dtype)
    training = measure_lengths(sorted(set(lengths)), window, shape.n_head, shape.head_dim, repeats, place, numbers)
    decoding, sharing = measure_decoding(shape, N_KV_HEAD, window, sorted(set(contexts)), tokens, place, numbers)
    return Report(
        command=command,
        machine=machine(),
        torch=torch.__version__,
        device=device,
        dtype=dtype,
        threads=torch.get_num_threads(),
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY", "not set"),
        window=window,
        n_head=shape.n_head,
        head_dim=shape.head_dim,
        decode_config=shape.to_dict(),
        training=training,
        decoding=decoding,
        sharing=sharing,
    )


def save(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write attention.json and attention.png into a folder, made if need be; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, picture = folder / FILE, (folder / FILE).with_suffix(".png")
    record = {"schema": SCHEMA} | asdict(report)
    record["summary"] = {
        "training_ratio": {p.T: asdict(p.ratio) for p in report.training},
        "tokens_per_second": {f"{d.variant} {d.context}": asdict(d.tokens_per_second) for d in report.decoding},
        "window_seconds_by_T": asdict(time_line(report)),
        "window_peak_bytes_by_T": asdict(memory_line(report)),
        "targets": [asdict(target) for target in targets(report)],
    }
    data.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    attention_figure(report).savefig(picture, metadata={"Software": None})
    return data, picture
