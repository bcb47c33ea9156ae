"""flex attention: its rule, its cached mask, and when it can't be used. Speed and gradients need CUDA."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from gpt2course import flex
from gpt2course.attention import attend_reference
from gpt2course.masks import Causal

MASKS = [Causal(), Causal(1), Causal(3), Causal(3, 2), Causal(40, 5)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("mask", MASKS)
def test_it_asks_the_one_rule(mask: Causal) -> None:
    """Bug: flex attention is given a rule of its own that is off by one, or knows no sinks."""
    pos_T = torch.arange(12)
    none = torch.zeros((), dtype=torch.long)
    seen = flex.rule(mask)(none, none, pos_T[:, None], pos_T[None, :])
    assert torch.equal(seen, mask.mask(12))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("G", [4, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_values_are_those_of_the_rule(mask: Causal, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the block mask drops a block that holds a visible pair, or heads read other keys. Not compiled here."""
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    q, k, v = (torch.randn(2, n, 300, 16) for n in (4, G, G))
    error = flex.flex_window(q, k, v, mask) - attend_reference(q, k, v, mask.mask(300))
    assert error.abs().max() < 1e-5


def test_the_block_mask_is_made_once() -> None:
    """Bug: the mask is made again in every layer and step, and costs more than the attention."""
    mask = flex.block_mask(Causal(16), 300, CPU)
    assert flex.block_mask(Causal(16), 300, CPU) is mask
    assert flex.block_mask(Causal(16), 301, CPU) is not mask
    assert flex.block_mask(Causal(17), 300, CPU) is not mask


def test_blocks_nobody_sees_are_left_out() -> None:
    """Bug: flex attention visits every block, and a window is no cheaper than full attention."""
    counts = [int(flex.block_mask(Causal(128), T, CPU).kv_num_blocks.sum()) for T in (1024, 2048, 4096)]
    assert counts == [2 * T // 128 - 1 for T in (1024, 2048, 4096)]


def test_a_mask_from_evaluation_serves_training() -> None:
    """Bug: the mask is first made under inference_mode, is kept, and the backward pass of training refuses it."""
    with torch.inference_mode():
        mask = flex.block_mask(Causal(19), 200, CPU)
    assert not mask.kv_num_blocks.is_inference()


@pytest.mark.parametrize(
    ("device", "dtype", "dropout", "head_dim", "reason"),
    [
        ("cpu", torch.float32, 0.0, 64, "no backward pass on cpu"),
        ("mps", torch.float32, 0.0, 64, "no backward pass on mps"),
        ("cuda", torch.float32, 0.1, 64, "dropout is 0.1"),
        ("cuda", torch.float64, 0.0, 64, "float64"),
        ("cuda", torch.float32, 0.0, 8, "at least 16 wide, and these are 8"),
    ],
)
def test_why_not(device: str, dtype: torch.dtype, dropout: float, head_dim: int, reason: str) -> None:
    """Bug: a kernel fails deep inside the compiler where a sentence would have done."""
    assert reason in (flex.why_not(device, dtype, dropout, head_dim) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_why_not_has_no_reason_on_cuda(dtype: torch.dtype) -> None:
    """Bug: the fast path is never taken."""
    assert flex.why_not("cuda:0", dtype, 0.0, 64) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention trains on CUDA only, and there is none here")
@pytest.mark.parametrize("mask", MASKS[1:])
def test_on_cuda_values_and_gradients_are_those_of_the_rule(mask: Causal) -> None:
    """Bug: the compiled kernel, or its backward pass, is wrong at a length that is no multiple of its blocks."""
    inputs = [torch.randn(2, n, 300, 64, device="cuda", requires_grad=True) for n in (4, 2, 2)]
    results = []
    for y_BHTD in (flex.flex_window(*inputs, mask), attend_reference(*inputs, mask.mask(300, "cuda"))):
        results.append((y_BHTD, *torch.autograd.grad(y_BHTD.pow(2).sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()  # float32 products run in TF32 there
