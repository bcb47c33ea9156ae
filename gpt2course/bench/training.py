"""What attention with a window costs in training, beside full causal attention: time and memory by length.

Legend: B batch, T positions, H query heads, D head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gpt2course.attention import attend, choose
from gpt2course.bench.timing import Spread, interleaved, ratio
from gpt2course.flops import attention_flops
from gpt2course.masks import Causal
from gpt2course.memory import peak_bytes

PASSES = 3  # a backward pass costs two forward ones


@dataclass(frozen=True)
class Length:
    """Forward and backward pass of attention proper over T positions, with a window and without."""

    T: int
    path: str
    """the way the window was computed: "blocked", "flex" or, where the window hides nothing, "sdpa" """
    full_seconds: list[float]
    window_seconds: list[float]
    full_peak_bytes: int
    window_peak_bytes: int
    full_flops: int
    window_flops: int

    @property
    def ratio(self) -> Spread:
        """Time with the window over time without, round by round."""
        return ratio(self.window_seconds, self.full_seconds)


def measure_length(
    T: int, window: int, n_head: int, head_dim: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> Length:
    """Time and peak memory of `attend` at one length, batch 1, queries, keys and values as a model lays them out."""

    def random() -> Tensor:
        return torch.randn(1, T, n_head, head_dim, device=device, dtype=dtype).transpose(1, 2)

    q_BHTD, k_BHTD, v_BHTD = (random().requires_grad_() for _ in range(3))
    grad_BHTD = random()

    def forward_and_backward(mask: Causal) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(q_BHTD, k_BHTD, v_BHTD, mask), (q_BHTD, k_BHTD, v_BHTD), grad_BHTD)

    full, windowed = forward_and_backward(Causal()), forward_and_backward(Causal(window))
    seconds = interleaved({"full": full, "window": windowed}, repeats, device)
    return Length(
        T,
        choose(q_BHTD, Causal(window)),
        seconds["full"],
        seconds["window"],
        peak_bytes(full, device),
        peak_bytes(windowed, device),
        PASSES * attention_flops(n_head, head_dim, T),
        PASSES * attention_flops(n_head, head_dim, T, window),
    )


def measure_lengths(
    lengths: Sequence[int],
    window: int,
    n_head: int,
    head_dim: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Length]:
    """`measure_length` for each length, with a progress bar whose steps are as long as full attention takes."""
    found = []
    with tqdm(total=sum(T * T for T in lengths), desc="training", unit="pair", unit_scale=True, leave=False) as bar:
        for T in lengths:
            found.append(measure_length(T, window, n_head, head_dim, repeats, device, dtype))
            bar.update(T * T)
    return found
