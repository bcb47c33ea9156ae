"""The commands of `gpt2course` that measure: bench, bench-training, price-tag."""

import inspect
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from gpt2course.prices import FILE, Settings


def bench(
    what: Positional[Literal["attention"]],
    quick: bool = False,
    out: Path = Path("build/bench"),
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int | None = None,
    repeats: int = 9,
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384),
    contexts: tuple[int, ...] = (1024, 4096, 16384),
    window: int = 256,
) -> int:
    """Measure on this machine what a window and shared key heads are worth, in training and in decoding.

    Variants take turns, so compare within a run only. Medians and quartiles are shown, and how they stand to what was
    hoped for; a target that is missed is no error. It takes several minutes and a quiet machine: torch's threads spin
    while they wait for each other, and one other busy program can make the window eight times slower. If it can't be
    quiet, set OMP_WAIT_POLICY=passive, and they sleep; on a quiet one that costs a fifth of the window's speed in
    training, and more than half of MQA's in decoding.

    Args:
        what: attention is what can be measured.
        quick: a miniature in seconds, to see that it runs; its times say nothing. Sizes and repeats are its own.
        out: folder of attention.json, with every single time, and attention.png.
        device: cpu, or cuda, where windows are computed by flex attention.
        dtype: of all numbers.
        threads: of the CPU; by default as many as torch takes.
        repeats: how often each is measured; the more, the narrower the quartiles.
        lengths: positions in training, forward and backward, with a window and without; at least three.
        contexts: positions in the cache when a token is decoded; each more than 4 x repeats + 1.
        window: keys that a query sees in the windowed variants.
    """
    flags = {name: value for name, value in locals().items() if name not in ("what", "out")}
    from gpt2course.bench.attention import run as measure
    from gpt2course.bench.attention import save
    from gpt2course.bench.report import command_line
    from gpt2course.bench.summary import summary

    defaults = {name: parameter.default for name, parameter in inspect.signature(bench).parameters.items()}
    report = measure(**flags, command=command_line(flags, defaults))
    print(summary(report))
    print(*save(report, out), sep="\n")
    return 0


def bench_training(out: Path = Path("build/bench"), steps: int = 30, starts: int = 3, quick: bool = False) -> int:
    """Measure what the training loop costs beyond its arithmetic, and what DDP and FSDP cost on this machine's cores.

    The small model that the scripts train by default, on the CPU. It takes some five minutes, and a quiet machine.

    Args:
        out: folder of training_loop.json, with every single time.
        steps: counted in each start of a script.
        starts: of each script, in turns.
        quick: a miniature, to see that it runs; its times say nothing.
    """
    from gpt2course.bench.loop import run as measure
    from gpt2course.bench.loop import save

    report = measure(steps, starts, quick=quick)
    print(report)
    print(save(report, out))
    return 0


def price_tag(
    settings: OmitArgPrefixes[Settings],
    out: Path = Path("build", "price_tag"),
    resume: bool = False,
    speed_only: bool = False,
) -> int:
    """What each retrofit costs a trained model: perplexity before, right after and healed; cache bytes; decoding speed.

    Args:
        settings: what to measure on.
        out: folder of the table (JSON, a row as soon as it is done) and the figure.
        resume: keep the rows that are there already.
        speed_only: only measure the speeds of the rows that are there again.
    """
    from gpt2course.price_tag import campaign, remeasure

    if speed_only:
        made = remeasure(settings.model, out, settings.device)
    else:
        made = campaign(settings, out, resume)
    print(made)
    print(f"{out / FILE} and {(out / FILE).with_suffix('.png')}")
    return 0
