"""What a run takes, reckoned before it is run: memory, and time. Arithmetic on the shapes; nothing is measured."""

from dataclasses import dataclass
from typing import Literal

import torch

from gpt2course.config import GPTConfig
from gpt2course.flops import training_flops
from gpt2course.model import GPT

Strategy = Literal["single", "ddp", "fsdp"]
Precision = Literal["fp32", "bf16", "fp16"]
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on the process that has most, without activations, which depend on the batch."""

    parameters: int
    """float32 weights: all of them, or under FSDP this process's shards"""
    gradients: int
    """float32, as many as weights"""
    optimizer: int
    """AdamW's two averages, float32 each"""
    gathered: int = 0
    """FSDP: whole weights that are there for a while, in the precision of the products"""

    @property
    def kept(self) -> int:
        """What is there all the time: 16 bytes for each weight, or shard of one."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """With what is gathered."""
        return self.kept + self.gathered


def memory_bytes(
    config: GPTConfig, world_size: int = 1, strategy: Strategy = "single", precision: Precision = "fp32"
) -> Memory:
    """Memory of parameters, gradients and AdamW's averages on one process.

    Weights, gradients and averages are float32 in every precision, as in `gpt2course.train`: 4 + 4 + 8 = 16 bytes for
    each weight, as many as the half-precision training of Rajbhandari et al. 2020 takes (arXiv:1910.02054, section 3).
    A process alone holds all of that, and so does each process under DDP. FSDP cuts each tensor along its first
    dimension, and rank 0, whose share is reckoned here, gets ceil(rows / world_size) rows: 1/N, and a little more of
    tensors that N does not divide.

    Gathered at worst, while resharding after the forward pass: the root group (embeddings, final norm and tied head)
    and two blocks, the one that is computed and the one that is fetched meanwhile. Accumulation of several
    micro-batches adds the gradients at full size, which stay whole until the last one. Left out: activations, the
    logits, what autocast casts, communication buffers, and what torch takes for itself.

    Args:
        config: shape of the model.
        world_size: number of processes; for HSDP those that share one copy.
        strategy: single, ddp or fsdp.
        precision: of matrix products.

    Raises:
        ValueError: for a strategy or precision that is none of these, or a world_size below 1, or above 1 for "single".
    """
    if strategy not in ("single", "ddp", "fsdp") or precision not in WIDTH:
        raise ValueError(
            f"strategy {strategy!r}, precision {precision!r}; they must be of single, ddp, fsdp and of fp32, bf16, fp16"
        )
    if world_size < 1 or (strategy == "single" and world_size > 1):
        raise ValueError(f"world_size is {world_size} with strategy {strategy}; single takes 1, the others at least 1")
    with torch.device("meta"):
        model = GPT(config)
    shards = world_size if strategy == "fsdp" else 1
    weights = sum(-(-p.shape[0] // shards) * p[0].numel() for p in model.parameters())
    gathered = 0
    if strategy == "fsdp":
        block = sum(p.numel() for p in model.h[0].parameters())
        root = model.num_params() - config.n_layer * block
        gathered = WIDTH[precision] * (root + min(2, config.n_layer) * block)
    return Memory(4 * weights, 4 * weights, 8 * weights, gathered)


def run_time(config: GPTConfig, tokens: float, devices: int, peak_flops: float, mfu: float) -> float:
    """Seconds that training on so many tokens takes, in rows of block_size: FLOPs over the FLOP/s that are reached.

    Args:
        config: shape of the model; a row's attention is counted by what each query sees.
        tokens: how many to train on, all epochs together.
        devices: GPUs.
        peak_flops: FLOP/s of one at best, from its data sheet (`gpt2course.train.peaks`).
        mfu: the share of the peak that the run reaches, its model FLOPs utilisation (Chowdhery et al. 2022,
            arXiv:2204.02311, appendix B). It can't be known before: measure it in a short run.

    Raises:
        ValueError: for an mfu outside (0, 1], or another number that is not positive.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu is {mfu}; it is a share of the peak, above 0 and at most 1")
    if not (tokens > 0 and devices >= 1 and peak_flops > 0):
        raise ValueError(f"tokens {tokens}, devices {devices}, peak_flops {peak_flops}: each must be above 0")
    flops = tokens / config.block_size * training_flops(config, config.block_size)
    return flops / (devices * peak_flops * mfu)
