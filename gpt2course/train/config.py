"""Every choice of a training run: one frozen dataclass, from which the command lines of the three scripts are made."""

import copy
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro

from gpt2course.config import PRESETS, GPTConfig
from gpt2course.data.corpora import documents
from gpt2course.train.optim import Schedule, schedule_problems
from gpt2course.train.world import choose_device

Config = TypeVar("Config", bound="TrainConfig")

SMALL = GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=128)


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults train a small model on the Python standard library's source, on any machine."""

    preset: Literal["small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "tiny"] = "small"
    """sizes of the model; small has 4 layers of width 128. Each --model.* option changes one field of it"""
    model: GPTConfig = field(default_factory=lambda: SMALL)
    """the architecture, field by field"""
    corpus: str = "stdlib"
    """what to train on: a folder of shards from `gpt2course data`, or, if it is small, a corpus that it knows"""
    out: Path = Path("runs/small")
    """folder of the run: config.json, metrics.jsonl, checkpoints/"""
    batch_size: int = 12
    """rows of block_size tokens in the GLOBAL batch of one step, over all processes and micro-batches"""
    grad_accum_steps: int = 1
    """micro-batches that each process cuts its rows into; more of them take less memory and give the same step"""
    steps: int = 100
    """optimizer steps in all"""
    learning_rate: float = 1e-3
    """the peak, reached after the warm-up"""
    schedule: Schedule = "cosine"
    """after the warm-up: a cosine; warmup-stable-decay (flat, then down); or a line down to zero"""
    warmup_steps: int = 10
    """steps of linear warm-up; a run of fewer steps never reaches the peak"""
    decay_fraction: float = 0.2
    """wsd: the share of all steps in which the rate comes down"""
    final_fraction: float = 0.1
    """cosine, wsd: the rate at the end, as a share of the peak"""
    weight_decay: float = 0.1
    """AdamW's, on matrices only"""
    beta1: float = 0.9
    """AdamW's average of gradients"""
    beta2: float = 0.95
    """AdamW's average of squared gradients"""
    clip: float = 1.0
    """largest norm of the gradient of all parameters together; 0 clips nothing"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """what products are computed in; weights and their averages stay float32. fp16 scales its loss"""
    compile: bool = False
    """compile each block with torch.compile; pays on GPUs and in long runs"""
    checkpoint_activations: bool = False
    """keep only each block's input in the forward pass and compute the rest again: less memory, a third more work"""
    seed: int = 0
    """of the weights, the order of the data, and dropout"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes a GPU where there is one"""
    resume: str = "auto"
    """auto goes on from the newest checkpoint in --out if there is one; never starts anew, in an empty folder; or the
    path of a checkpoint of another run to begin from, if --out has none yet (started again, it goes on from its own)"""
    save_every: int = 50
    """steps between checkpoints; 0 saves at the end only"""
    keep_last: int = 2
    """so many checkpoints are kept, and the one with the best held-out loss"""
    async_save: bool = False
    """write checkpoints while training goes on"""
    eval_every: int = 50
    """steps between held-out losses; 0 evaluates at the end only"""
    eval_tokens: int = 16384
    """tokens of the held-out text to evaluate on"""
    max_bad_steps: int = 10
    """stop, with a checkpoint, after so many steps in a row whose loss or gradient is not finite"""
    tensorboard: bool = False
    """also write TensorBoard events, to --out/tensorboard"""
    jsonl: Path | None = None
    """the log, a line a step; by default --out/metrics.jsonl"""
    check: int | None = None
    """check these options for so many processes, print the config, and end; nothing is started or written"""

    def problems(self, world_size: int) -> list[str]:
        """What can't be in a run of so many processes on this machine, each with the value and the mend."""
        found = self._number_problems()
        micro = world_size * self.grad_accum_steps
        if world_size < 1:
            found.append(f"{world_size} processes; give at least 1")
        elif self.grad_accum_steps >= 1 and self.batch_size % micro:
            near = max(1, round(self.batch_size / micro)) * micro
            found.append(
                f"batch_size {self.batch_size} is not divisible by world_size {world_size} x grad_accum_steps "
                f"{self.grad_accum_steps} = {micro}; use --batch-size {near}"
            )
        if self.resume not in ("auto", "never") and not Path(self.resume).is_dir():
            found.append(f"resume is {self.resume!r}, and there is no such folder; give auto, never, or a checkpoint")
        elif Path(self.resume).resolve().parent == (self.out / "checkpoints").resolve():
            found.append("resume is a checkpoint of this very run; use auto, or another --out to go back to it")
        if not (Path(self.corpus) / "meta.json").is_file():
            try:
                documents(self.corpus)
            except ValueError as error:
                found.append(f"corpus: {error}")
        return found + self._device_problems(world_size)

    def _number_problems(self) -> list[str]:
        found = []
        for name in ("batch_size", "grad_accum_steps", "eval_tokens", "max_bad_steps", "keep_last"):
            if getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("save_every", "eval_every", "weight_decay", "clip", "seed"):
            if not getattr(self, name) >= 0:
                found.append(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        found += schedule_problems(
            self.steps, self.learning_rate, self.schedule, self.warmup_steps, self.decay_fraction, self.final_fraction
        )
        return found

    def _device_problems(self, world_size: int) -> list[str]:
        try:
            device = choose_device(self.device)
        except ValueError as error:
            return [str(error)]
        found = []
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("NPROC_PER_NODE", world_size)))
        if device.type == "cuda" and here > torch.cuda.device_count():
            found.append(
                f"{here} processes on a machine with {torch.cuda.device_count()} GPUs; start as many as there are, or "
                "use --device cpu"
            )
        if device.type == "mps" and world_size > 1:
            found.append(f"device mps trains in one process, not {world_size}; use --device cpu")
        if self.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
            name = torch.cuda.get_device_name()
            found.append(f"precision is bf16, which {name} does not compute in; use --precision fp16")
        if self.precision == "fp16" and device.type != "cuda":
            found.append(
                f"precision is fp16, which pays on GPUs only, and the device is {device.type}; use bf16 or fp32"
            )
        return found

    def check_for(self, world_size: int) -> None:
        """Raise ValueError with every problem at once."""
        if found := self.problems(world_size):
            raise ValueError(refusal(found))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }

    def __str__(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @property
    def metrics_path(self) -> Path:
        """Where the log goes."""
        return self.jsonl or self.out / "metrics.jsonl"


def refusal(problems: Sequence[str]) -> str:
    """What to say of options that can't be: every problem on a line of its own."""
    return "\n".join(["these options can't be:", *(f"  - {problem}" for problem in problems)])


def parse(config: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """The config that a command line asks for: the preset's model, then each field that is named.

    Raises:
        SystemExit: after --help, or for an option that does not exist, with the mend on stderr.
        ValueError: for a model that can't be.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    named = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "--preset"), None)
    named = next((word.partition("=")[2] for word in words if word.startswith("--preset=")), named)
    model = copy.copy(PRESETS.get(named or "", SMALL))
    # None, which the config replaced by n_head: else another --model.n-head would need --model.n-kv-head as well.
    object.__setattr__(model, "n_kv_head", None)
    return tyro.cli(
        config,
        args=words,
        default=config(model=model),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed),
    )
