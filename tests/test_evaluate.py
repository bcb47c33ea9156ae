"""Legend: B windows, T positions, V vocabulary."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2course import GPT, GPTConfig
from gpt2course.evaluate import evaluate_loss, evaluating

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=31)
Lively = Callable[..., GPT]


def by_loop(model: GPT, tokens: list[int], T: int) -> float:
    """Token by token: the context of a prediction begins at its window's start."""
    total = 0.0
    for target in range(1, len(tokens)):
        start = (target - 1) // T * T
        logits_V = model(torch.tensor([tokens[start:target]]))[0, -1]
        total -= logits_V.log_softmax(dim=-1)[tokens[target]].item()
    return total / (len(tokens) - 1)


@given(n=st.integers(2, 40), T=st.integers(1, 8), batch_size=st.integers(1, 5))
@torch.no_grad()
def test_evaluation_is_the_plain_loop(lively: Lively, n: int, T: int, batch_size: int) -> None:
    """Bug: the last window is dropped, a token at a border is predicted twice or never, a mean of unequal means."""
    model = lively(CONFIG)
    tokens = torch.randint(0, 31, (n,), generator=torch.Generator().manual_seed(n))
    found = evaluate_loss(model, tokens, block_size=T, batch_size=batch_size)
    assert found.n_tokens == n - 1
    assert abs(found.loss - by_loop(model, tokens.tolist(), T)) < 1e-10
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_all_kinds_of_tokens_and_a_memmap(lively: Lively, tmp_path: Path) -> None:
    """Bug: uint16 wraps around, or a read-only memory map is refused."""
    model = lively(CONFIG)
    ids = np.random.default_rng(0).integers(0, 31, 100).astype(np.uint16)
    ids.tofile(tmp_path / "ids")
    memmap = np.memmap(tmp_path / "ids", dtype="<u2", mode="r")
    results = {evaluate_loss(model, kind) for kind in (ids, memmap, torch.from_numpy(ids.astype(np.int64)))}
    assert len(results) == 1


def test_max_tokens_predicts_the_first_ones(lively: Lively) -> None:
    """Bug: off by one: n tokens read are n - 1 predicted."""
    model = lively(CONFIG)
    ids = torch.randint(0, 31, (100,))
    assert evaluate_loss(model, ids, max_tokens=20) == evaluate_loss(model, ids[:21])
    assert evaluate_loss(model, ids, max_tokens=1000) == evaluate_loss(model, ids)


def test_bits_per_byte() -> None:
    """Bug: nats for bits, or bits per token."""
    model = GPT(CONFIG).eval()
    ids = torch.randint(0, 31, (41,))
    found = evaluate_loss(model, ids, n_bytes=160)
    assert found.bits_per_byte == pytest.approx(found.loss * 40 / math.log(2) / 160)
    assert evaluate_loss(model, ids).bits_per_byte is None
    with pytest.raises(ValueError, match="max_tokens 9 cuts them"):
        evaluate_loss(model, ids, n_bytes=160, max_tokens=9)


def test_dropout_is_off_and_every_module_keeps_its_mode() -> None:
    """Bug: a noisy validation loss; or training goes on without dropout after the first evaluation."""
    model = GPT(CONFIG.with_(dropout=0.5)).train()
    model.h[0].mlp.eval()
    ids = torch.randint(0, 31, (40,))
    assert evaluate_loss(model, ids) == evaluate_loss(model, ids)
    assert model.training
    assert not model.h[0].mlp.training

    def interrupted() -> None:
        with evaluating(model):
            assert not model.training
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.training
    assert not model.h[0].mlp.dropout.training


def test_longer_than_block_size_only_with_rotary_positions(lively: Lively) -> None:
    """Bug: how a model does past its training length can't be measured, or is measured in shorter windows."""
    tokens = torch.randint(0, 31, (41,))
    with pytest.raises(ValueError, match="block_size is 20; it must lie between 1 and the model's 8"):
        evaluate_loss(lively(CONFIG), tokens, block_size=20)
    model = lively(CONFIG.with_(pos="rope", n_embd=16, window=3, sinks=1))
    with torch.no_grad():
        assert abs(evaluate_loss(model, tokens, block_size=20).loss - by_loop(model, tokens.tolist(), 20)) < 1e-10
    assert evaluate_loss(model, tokens, block_size=20).loss != evaluate_loss(model, tokens).loss


def test_all_bad_arguments_are_listed() -> None:
    """Bug: a window longer than the model's fails later; one problem at a time."""
    model = GPT(CONFIG)
    with pytest.raises(ValueError, match="at least 2 tokens") as error:
        evaluate_loss(model, torch.tensor([1]), block_size=9, batch_size=0, max_tokens=0, n_bytes=0)
    assert len(str(error.value).splitlines()) == 6
    with pytest.raises(ValueError, match=r"ids run from 3 to 31 .* go from 0 to 30"):
        evaluate_loss(model, torch.tensor([3, 31, 4]))
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        evaluate_loss(model, torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("tokens", [np.array([1.0, 2.7, 3.0]), torch.tensor([1.0, 2.7]), torch.tensor([True, False])])
def test_tokens_that_are_no_whole_numbers_are_refused(tokens: np.ndarray | torch.Tensor) -> None:
    """Bug: 2.7 is read as token 2, so that probabilities or embeddings given by mistake have a loss."""
    with pytest.raises(ValueError, match=r"tokens are of type .*; token ids are whole numbers"):
        evaluate_loss(GPT(CONFIG), tokens)
