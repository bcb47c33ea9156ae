"""Rotary position embedding: queries and keys are turned by angles that grow with their position.

Su et al. 2021, "RoFormer", arXiv:2104.09864. A head's first R numbers are R/2 pairs; pair i turns by theta^(-2i/R)
radians a position. The score of a query and a key then depends on their positions only through the distance.

Legend: B batch, T positions, H heads (of queries or of keys), D head width, R how many of the D numbers are turned.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2course.config import LAYOUTS, GPTConfig, RopeScaling


@dataclass(frozen=True)
class Rotation:
    """The turn of every pair at every position.

    Attributes:
        cos, sin: (…, T, R/2), multiplied by YaRN's attention factor if there is one.
        layout: "half" or "interleaved", see `rotate`.
    """

    cos: Tensor
    sin: Tensor
    layout: str


def inverse_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | str | None = None
) -> Tensor:
    """(R/2,) float32: radians by which each pair turns from one position to the next, fastest first.

    Without scaling theta^(-2i/R) (Su et al. 2021, section 3.2.2). With it, for a text `factor` times longer:

    - linear: all of them divided by the factor, as if positions lay closer (Chen et al. 2023, arXiv:2306.15595).
    - ntk: theta multiplied by factor^(R/(R-2)), so that the fastest pair stays and the slowest is slowed by exactly the
      factor ("NTK-aware", Peng et al. 2023, arXiv:2309.00071, section 3.1).
    - yarn: a pair that turns more than beta_fast times within the trained length stays, one that turns less than
      beta_slow times is slowed by the factor, between them a straight line (same paper). The line runs
      over the pair's number, between limits rounded outwards, as in the authors' code and in transformers; in the
      paper it runs over the number of turns.
    - llama3: the same idea with the line over the number of turns, from low_freq_factor to high_freq_factor
      (Grattafiori et al. 2024, arXiv:2407.21783, and Meta's code of Llama 3.1).

    Always computed in float32, and never kept in a buffer: `model.to(bfloat16)` would round them by up to one part in
    512, and over a distance of 8,000 the fast pairs would be off by several radians.

    Args:
        rotary_dim: R, even.
        theta: base of the frequencies.
        scaling: with `original_block_size` set, as GPTConfig sets it.
        device: where they are wanted.

    Raises:
        ValueError: if R is not an even number of at least 2, or yarn or llama3 lack their original_block_size.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim is {rotary_dim}; pairs are turned, so it must be an even number of at least 2")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    slowed = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slowed
    if scaling.kind == "ntk":
        # A single pair has frequency 1 whatever theta is, and the exponent R/(R-2) does not exist.
        power = rotary_dim / (rotary_dim - 2) if rotary_dim > 2 else 0.0
        return 1.0 / (theta * scaling.factor**power) ** exponents
    if scaling.original_block_size is None:
        raise ValueError(f"{scaling.kind} scaling needs original_block_size, the length of training in tokens")
    if scaling.kind == "yarn":
        stays = 1.0 - _yarn_ramp(rotary_dim, theta, scaling, scaling.original_block_size).to(device)
    else:
        turns = scaling.original_block_size * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        stays = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return stays * frequencies + (1.0 - stays) * slowed


def _yarn_ramp(rotary_dim: int, theta: float, scaling: RopeScaling, length: int) -> Tensor:
    """(R/2,): 0 for pairs fast enough to stay, 1 for pairs to be slowed by the whole factor."""

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), rotary_dim - 1)
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float32)
    return ((pairs - first) / max(last - first, 0.001)).clamp(0.0, 1.0)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by: 1, but for yarn 0.1 ln(factor) + 1 (Peng et al. 2023, eq. 22), or as given.

    Both queries and keys carry it, so scores are multiplied by its square.
    """
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.attention_factor is None else scaling.attention_factor


def angles(pos: Tensor, config: GPTConfig, dtype: torch.dtype = torch.float32) -> Rotation:
    """The rotation at some positions; made once a pass, for all layers.

    Args:
        pos: (…, T) absolute positions; -1 on padding, which nobody looks at, turns as 0 does.
        config: its rope fields.
        dtype: of the model. cos and sin are float32 at least: bfloat16 cannot even tell position 8,000 from 8,016.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    frequencies = inverse_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling, pos.device)
    turned = pos.clamp(min=0)[..., None].to(dtype) * frequencies.to(dtype)
    factor = attention_factor(config.rope_scaling)
    return Rotation(turned.cos() * factor, turned.sin() * factor, config.rope_layout)


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor, layout: str = "half") -> Tensor:
    """Turn each pair (a, b) to (a cos - b sin, a sin + b cos); numbers after the first R stay (Su et al. 2021, eq. 34).

    Args:
        x_BHTD: (B, H, T, D) queries or keys; any dtype, the turn itself is done in that of cos and sin.
        cos, sin: (T, R/2), or (B, 1, T, R/2) where rows have positions of their own.
        layout: "half" pairs number i with i + R/2, as Hugging Face does; "interleaved" 2i with 2i + 1, as the paper and
            Llama's GGUF files do. Weights made for one are wrong in the other: see `permutation`.

    Returns:
        (B, H, T, D) in the dtype of x.

    Raises:
        ValueError: for another layout.
    """
    _check_layout(layout)
    R = 2 * cos.shape[-1]
    turned, rest = x_BHTD[..., :R], x_BHTD[..., R:]
    if layout == "half":
        a, b = turned[..., : R // 2], turned[..., R // 2 :]
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
    pair = a * cos - b * sin, a * sin + b * cos
    out = torch.cat(pair, dim=-1) if layout == "half" else torch.stack(pair, dim=-1).flatten(-2)
    return torch.cat([out.to(x_BHTD.dtype), rest], dim=-1)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")


def permutation(rotary_dim: int) -> Tensor:
    """(R,) indices p with which `x[..., p]` is the interleaved order of an x in half-split order.

    `x[..., p.argsort()]` goes back.
    """
    return torch.arange(rotary_dim).view(2, -1).t().flatten()


def change_layout(weight: Tensor, head_dim: int, rotary_dim: int, to: str) -> Tensor:
    """A query or key projection made for one layout, with its outputs reordered for the other.

    Args:
        weight: (n x head_dim, C) weight, or (n x head_dim,) bias, of n heads.
        head_dim, rotary_dim: D and R.
        to: "interleaved" or "half".

    Raises:
        ValueError: for another layout.
    """
    _check_layout(to)
    order = permutation(rotary_dim) if to == "interleaved" else permutation(rotary_dim).argsort()
    order = torch.cat([order, torch.arange(rotary_dim, head_dim)]).to(weight.device)
    return weight.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)
