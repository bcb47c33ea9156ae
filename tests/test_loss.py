"""Legend: N tokens, C model width, V vocabulary."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2course import GPT, GPTConfig
from gpt2course.loss import IGNORE, chunked_cross_entropy, plain_cross_entropy
from gpt2course.memory import peak_bytes

MEMORY_LIMIT = 0.35


def problem(N: int, C: int, V: int, dtype: torch.dtype, ignored: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    h_NC = torch.randn(N, C, dtype=dtype, requires_grad=True)
    head_VC = (0.5 * torch.randn(V, C, dtype=dtype)).requires_grad_()
    targets_N = torch.randint(0, V, (N,)).masked_fill(torch.rand(N) < ignored, IGNORE)
    return h_NC, head_VC, targets_N


def errors(h_NC: Tensor, head_VC: Tensor, targets_N: Tensor, chunk: int) -> list[float]:
    """Differences of the mean loss and of both its gradients between the chunked and the plain loss."""
    n = max(1, int((targets_N != IGNORE).sum()))
    results = []
    for loss in (plain_cross_entropy(h_NC, head_VC, targets_N), chunked_cross_entropy(h_NC, head_VC, targets_N, chunk)):
        results.append((loss.detach() / n, *torch.autograd.grad(loss / n, (h_NC, head_VC))))
    return [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]


@given(
    N=st.integers(1, 23),
    V=st.integers(1, 19),
    chunk=st.integers(1, 30),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_chunked_is_plain_in_float64(N: int, V: int, chunk: int, ignored: float, seed: int) -> None:
    """Bug: the last, shorter chunk is dropped or counted twice; ignored tokens get a gradient."""
    torch.manual_seed(seed)
    assert max(errors(*problem(N, 7, V, torch.float64, ignored), chunk)) < 1e-12


@pytest.mark.parametrize("chunk", [1, 64, 100, 300, 1000])
def test_chunked_is_plain_in_float32(chunk: int) -> None:
    """Bug: equal only as long as the sums are short."""
    assert max(errors(*problem(300, 32, 1000, torch.float32, ignored=0.2), chunk)) < 1e-5


def test_plain_is_minus_log_p() -> None:
    """Bug: the reference itself is wrong: a mean for a sum, a target off by one."""
    h_NC, head_VC, targets_N = problem(5, 3, 7, torch.float64)
    targets_N[2] = IGNORE
    p_NV = (h_NC @ head_VC.T).softmax(dim=-1)
    by_hand = sum(-p_NV[n, targets_N[n]].log() for n in (0, 1, 3, 4))
    assert abs(plain_cross_entropy(h_NC, head_VC, targets_N) - by_hand) < 1e-12


def test_all_ignored_is_zero_not_nan() -> None:
    """Bug: 0/0. One batch of padding turns every weight into NaN at the next step."""
    h_NC, head_VC, targets_N = problem(6, 4, 9, torch.float32, ignored=1.0)
    loss = chunked_cross_entropy(h_NC, head_VC, targets_N, chunk=4)
    loss.backward()
    assert loss == 0
    assert (h_NC.grad == 0).all()
    assert (head_VC.grad == 0).all()

    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=11))
    mean = model(torch.zeros(2, 4, dtype=torch.long), torch.full((2, 4), IGNORE))
    mean.backward()
    assert mean == 0
    assert all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("target", [-1, 9, 50257])
def test_a_target_outside_the_vocabulary_is_an_error(target: int) -> None:
    """Bug: a wrong id is silently taken for padding."""
    h_NC, head_VC, targets_N = problem(6, 4, 9, torch.float32)
    targets_N[3] = target
    for loss in (plain_cross_entropy, chunked_cross_entropy):
        with pytest.raises((IndexError, RuntimeError)):
            loss(h_NC, head_VC, targets_N)
    with pytest.raises(ValueError, match="chunk is 0"):
        chunked_cross_entropy(h_NC, head_VC, targets_N, chunk=0)


def test_large_logits_do_not_overflow() -> None:
    """Bug: exp of a logit, without the largest taken off."""
    h_NC, head_VC, targets_N = problem(6, 4, 9, torch.float32)
    scaled = (h_NC * 1e4).detach().requires_grad_()
    loss = chunked_cross_entropy(scaled, head_VC, targets_N)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scaled.grad).all()


def test_bfloat16_autocast_is_as_near_as_plain_under_autocast() -> None:
    """Bug: a custom function ignores autocast and runs in float32, or adds up the head's gradient in bfloat16."""
    h_NC, head_VC, targets_N = problem(512, 32, 1000, torch.float32)
    exact = torch.autograd.grad(plain_cross_entropy(h_NC, head_VC, targets_N) / 512, (h_NC, head_VC))
    found = []
    for fn in (plain_cross_entropy, lambda *args: chunked_cross_entropy(*args, chunk=16)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = fn(h_NC, head_VC, targets_N) / 512
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, (h_NC, head_VC))
        assert all(grad.dtype == torch.float32 for grad in grads)
        wrong = [((a - b).norm() / b.norm()).item() for a, b in zip(grads, exact, strict=True)]
        found.append((loss.item(), *wrong))
    plain, chunked = found
    assert abs(plain[0] - chunked[0]) < 1e-2
    for a, b in zip(plain[1:], chunked[1:], strict=True):
        assert 1e-4 < b < 1.2 * a + 1e-3  # not float32, and no worse than the plain loss's rounding


def test_gradients_are_made_only_where_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: evaluation pays for gradients, since `needs_input_grad` is true of weights under no_grad as well."""
    h_NC, head_VC, targets_N = problem(6, 4, 9, torch.float32)
    made: list[torch.Size] = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x: made.append(x.shape) or zeros_like(x))
    with torch.no_grad():
        assert not chunked_cross_entropy(h_NC, head_VC, targets_N).requires_grad
    with torch.inference_mode():
        chunked_cross_entropy(h_NC, head_VC, targets_N)
    chunked_cross_entropy(h_NC.detach(), head_VC.detach(), targets_N)
    assert made == []
    loss = chunked_cross_entropy(h_NC, head_VC.detach(), targets_N)  # a frozen head
    assert made == [h_NC.shape]
    wanted = torch.autograd.grad(plain_cross_entropy(h_NC, head_VC.detach(), targets_N), h_NC)[0]
    assert (torch.autograd.grad(loss, h_NC)[0] - wanted).abs().max() < 1e-5


def test_backward_twice_gives_the_same_and_a_second_derivative_is_refused() -> None:
    """Bug: scaling the kept gradient in place makes a second backward wrong; a second derivative is silently zero."""
    h_NC, head_VC, targets_N = problem(6, 4, 9, torch.float64)
    loss = chunked_cross_entropy(h_NC, head_VC, targets_N) * 3.0
    first = torch.autograd.grad(loss, (h_NC, head_VC), retain_graph=True)
    second = torch.autograd.grad(loss, (h_NC, head_VC), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative; use plain_cross_entropy"):
        torch.autograd.grad(loss, h_NC, create_graph=True)


def test_the_model_never_holds_all_logits() -> None:
    """Bug: the loss path of the model makes (B, T, V) after all."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=1024, vocab_size=5000))
    idx_BT = torch.randint(0, 5000, (2, 1024))
    all_logits = idx_BT.numel() * 5000 * 4
    assert peak_bytes(lambda: model(idx_BT, idx_BT).backward()) < all_logits
    assert peak_bytes(lambda: F.cross_entropy(model(idx_BT).flatten(0, 1), idx_BT.flatten())) > all_logits


def test_peak_bytes_is_exact() -> None:
    """Bug: the measuring rod itself: frees not seen, or the end counted in place of the peak."""

    def up_and_down() -> Tensor:
        a = torch.empty(1000, 1000)
        b = torch.empty(500, 1000)
        del a
        return torch.empty(700, 1000) if b.numel() else b

    assert peak_bytes(up_and_down) == 4 * 1_500_000
    assert peak_bytes(lambda: None) == 0
    with pytest.raises(ValueError, match="meta"):
        peak_bytes(up_and_down, "meta")


MEASURE = """
import torch
from gpt2course.loss import {fn} as loss
from gpt2course.memory import peak_bytes
torch.set_num_threads(1)
h_NC = torch.randn(2048, 768, requires_grad=True)
head_VC = (0.02 * torch.randn(50257, 768)).requires_grad_()  # wilder logits give denormal numbers, 15 times slower
targets_N = torch.randint(0, 50257, (2048,))
print(peak_bytes(lambda: loss(h_NC, head_VC, targets_N).backward()))
"""


@pytest.mark.slow
def test_peak_memory_at_full_size() -> None:
    """Bug: a loss in chunks that keeps every chunk's logits for the backward pass.

    A process each, at GPT-2's vocabulary and width and 2,048 tokens in float32, forward and backward; bytes of torch's
    allocator at their peak, which repeat exactly.
    """
    peaks = {}
    for fn in ("plain_cross_entropy", "chunked_cross_entropy"):
        script = [sys.executable, "-c", MEASURE.format(fn=fn)]
        peaks[fn] = int(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    ratio = peaks["chunked_cross_entropy"] / peaks["plain_cross_entropy"]
    assert peaks["plain_cross_entropy"] > 2 * 2048 * 50257 * 4  # the rod sees logits and their gradient
    assert ratio < MEMORY_LIMIT, f"{ratio:.3f} of the plain loss's memory"


@pytest.mark.parametrize("shape", [(5,), (1,), (6, 1)])
def test_targets_of_another_length_are_refused(shape: tuple[int, ...]) -> None:
    """Bug: one target broadcast over a chunk of hidden states: a loss without meaning, and no error."""
    h_NC, head_VC, _ = problem(6, 4, 9, torch.float32)
    with pytest.raises(ValueError, match="6 hidden states need"):
        chunked_cross_entropy(h_NC, head_VC, torch.zeros(shape, dtype=torch.long))
