"""How well does a model predict a text?

Legend: B windows, T positions.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gpt2course.model import GPT


@dataclass(frozen=True)
class Evaluation:
    """The loss over a text, and the same number in its other dresses."""

    loss: float
    """mean -ln p(token | the tokens before it), in nats per token"""
    perplexity: float
    """exp(loss): as unsure as a choice between so many equally likely tokens"""
    bits_per_byte: float | None
    """total loss / ln 2 / bytes of text; comparable between vocabularies, as the loss per token is not"""
    n_tokens: int
    """tokens predicted"""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for a while. Every module gets its own mode back, also after Ctrl-C."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.inference_mode()
def evaluate_loss(
    model: GPT,
    tokens: np.ndarray | Tensor,
    block_size: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    n_bytes: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Mean next-token loss over a text, cut into windows that do not overlap.

    Window i reads tokens i T to i T + T - 1 and predicts each one's successor, so every token but the very first is
    predicted exactly once, the last, shorter window included. A window's first predictions see little context, so a
    smaller `block_size` gives a higher loss, and two losses compare only at the same one.

    Args:
        model: on any device; dropout is off meanwhile.
        tokens: (N,) token ids, such as a uint16 memmap, N >= 2. Only a batch at a time is read.
        block_size: T, the window in tokens; defaults to the model's. Longer only with rotary positions.
        batch_size: windows at a time; changes speed and memory, not the result.
        max_tokens: predict at most so many tokens, from the start.
        n_bytes: length in bytes of the text the predicted tokens stand for; asks for bits per byte.
        progress: show a progress bar.

    Raises:
        ValueError: for arguments or token ids out of range.
    """
    tokens = tokens if isinstance(tokens, Tensor) else np.asarray(tokens)
    T = model.config.block_size if block_size is None else block_size
    problems = []
    if not _is_integer(tokens.dtype):
        problems.append(f"tokens are of type {tokens.dtype}; token ids are whole numbers, such as int64 or uint16")
    if tokens.ndim != 1 or len(tokens) < 2:
        problems.append(f"tokens has shape {tuple(tokens.shape)}; it must be one row of at least 2 tokens")
    if T < 1 or (model.config.block_size < T and model.config.pos == "learned"):
        problems.append(f"block_size is {T}; it must lie between 1 and the model's {model.config.block_size}")
    if batch_size < 1:
        problems.append(f"batch_size is {batch_size}; it must be at least 1")
    if max_tokens is not None and max_tokens < 1:
        problems.append(f"max_tokens is {max_tokens}; it must be at least 1, or None for all")
    if n_bytes is not None and n_bytes < 1:
        problems.append(f"n_bytes is {n_bytes}; it must be at least 1")
    if n_bytes is not None and max_tokens is not None and max_tokens < len(tokens) - 1:
        problems.append(
            f"n_bytes is for all {len(tokens)} tokens, but max_tokens {max_tokens} cuts them; cut both before"
        )
    if problems:
        raise ValueError("evaluate_loss:\n" + "\n".join(f"  - {problem}" for problem in problems))

    n = len(tokens) - 1 if max_tokens is None else min(max_tokens, len(tokens) - 1)
    total = 0.0
    with evaluating(model), tqdm(total=n, unit="token", unit_scale=True, disable=not progress) as bar:
        for start, stop in _spans(n, T, batch_size):
            piece = tokens[start : stop + 1]
            ids = torch.from_numpy(np.asarray(piece.cpu() if isinstance(piece, Tensor) else piece).astype(np.int64))
            low, high = int(ids.min()), int(ids.max())
            if not 0 <= low <= high < model.config.vocab_size:
                raise ValueError(
                    f"token ids run from {low} to {high} between places {start} and {stop}; this model's go from 0 to "
                    f"{model.config.vocab_size - 1}; were they made with another tokenizer?"
                )
            width = min(T, stop - start)
            ids = ids.to(model.wte.weight.device)
            loss = model(ids[:-1].view(-1, width), ids[1:].view(-1, width), reduction="sum")
            total += loss.item()
            bar.update(stop - start)
    mean = total / n
    bits = None if n_bytes is None else total / math.log(2) / n_bytes
    return Evaluation(mean, math.exp(mean) if mean < 700 else math.inf, bits, n)


def _is_integer(dtype: torch.dtype | np.dtype) -> bool:
    if isinstance(dtype, torch.dtype):
        return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return np.issubdtype(dtype, np.integer)


def _spans(n: int, T: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Cut 0 … n into batches of whole windows of T, then the rest."""
    whole = n // T * T
    for start in range(0, whole, T * batch_size):
        yield start, min(start + T * batch_size, whole)
    if whole < n:
        yield whole, n
