"""The blocked window path: equal to the one rule, and work and memory that grow with T.

Legend: B batch, T positions, H query heads, G key/value heads, D head width.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2course import GPT, GPTConfig, blocked
from gpt2course.attention import attend_reference
from gpt2course.blocked import block_size, blocked_attention
from gpt2course.masks import Causal
from gpt2course.memory import peak_bytes

Inputs = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]


def qkv(B: int, T: int, H: int, G: int, D: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Queries, keys and values as a model makes them: position before head in memory."""
    q, k, v = (torch.randn(B, T, n, D, dtype=dtype).transpose(1, 2).requires_grad_() for n in (H, G, G))
    return q, k, v


def by_the_rule(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    return attend_reference(q, k, v, Causal(window, sinks).mask(q.shape[2]))


def worst_difference(ours: Attention, inputs: Inputs, window: int, sinks: int) -> float:
    """Largest difference from the rule, of the values and of the gradients of queries, keys and values."""
    results = []
    for attention in (ours, by_the_rule):
        y_BHTD = attention(*inputs, window, sinks)
        pull = torch.linspace(-1.0, 1.0, y_BHTD.numel(), dtype=y_BHTD.dtype).view(y_BHTD.shape)
        results.append((y_BHTD, *torch.autograd.grad((y_BHTD * pull).sum(), inputs)))
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("G", [4, 2, 1])
@pytest.mark.parametrize("sinks", [0, 1, 5, 70])
@pytest.mark.parametrize("window", [1, 3, 64, 130])
def test_it_is_the_rule(window: int, sinks: int, G: int) -> None:
    """Bug: W + 1 keys, a block's edge, a sink lost behind the window or counted twice, heads that read other keys.

    The lengths stand around the end of the whole part and of the blocks after it.
    """
    whole, block = window + sinks, block_size(window)
    for T in {1, whole, whole + 1, whole + block - 1, whole + block, whole + 2 * block + 7}:
        assert worst_difference(blocked_attention, qkv(2, T, 4, G, 4), window, sinks) < 1e-12, T


@given(data=st.data())
def test_any_length_window_and_sinks(data: st.DataObject) -> None:
    """Bug: right at the sizes someone thought of."""
    B, G, group, D = (data.draw(st.integers(1, n)) for n in (2, 2, 3, 5))
    T, window, sinks = (data.draw(st.integers(low, high)) for low, high in ((1, 400), (1, 200), (0, 80)))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    assert worst_difference(blocked_attention, qkv(B, T, G * group, G, D), window, sinks) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Bug: the mask has another dtype than the queries, which the fused kernel refuses; or the result changes dtype."""
    inputs = qkv(1, 200, 4, 2, 8, dtype)
    y_BHTD = blocked_attention(*inputs, 16, 2)
    wanted = by_the_rule(*(x.double() for x in inputs), 16, 2)
    assert y_BHTD.dtype == dtype
    assert (y_BHTD - wanted).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]


def test_heads_first_in_memory_are_as_good() -> None:
    """Bug: the path counts on the strides of a model's projections."""
    inputs = tuple(x.detach().contiguous().requires_grad_() for x in qkv(2, 150, 4, 2, 4))
    assert worst_difference(blocked_attention, inputs, 16, 3) < 1e-12  # type: ignore[arg-type]


def test_evaluation_before_training() -> None:
    """Bug: a mask first made under inference_mode is kept, and training with it fails."""
    inputs = qkv(1, 150, 2, 1, 4)
    with torch.inference_mode():
        blocked_attention(*inputs, 16)
    assert worst_difference(blocked_attention, inputs, 16, 0) < 1e-12


def test_a_graph_can_be_used_twice() -> None:
    """Bug: the gradient that the excerpts share is added to again in a second backward pass."""
    inputs = qkv(1, 300, 2, 1, 4)
    y_BHTD = blocked_attention(*inputs, 16, 2)
    first, second = (torch.autograd.grad(y_BHTD.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_what_needs_a_gradient_gets_one() -> None:
    """Bug: frozen keys, as in a fine-tuning of queries alone, break the chain of excerpts."""
    q, k, v = qkv(1, 200, 2, 2, 4)
    y_BHTD = blocked_attention(q, k.detach(), v, 16, 1)
    wanted = torch.autograd.grad(by_the_rule(q, k, v, 16, 1).sum(), (q, v))
    for ours, theirs in zip(torch.autograd.grad(y_BHTD.sum(), (q, v)), wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


def test_dropout_drops_and_keeps_the_mean() -> None:
    """Bug: dropout is lost on this path, or on its first or its later blocks only."""
    q, k, _ = qkv(1, 1200, 8, 8, 4, torch.float32)
    y_BHTD = blocked_attention(q, k, torch.ones_like(k), 200, 4, dropout=0.25)
    parts = y_BHTD[:, :, :200], y_BHTD[:, :, 210:]
    assert all(part.std() > 1e-3 for part in parts)
    assert all((part.mean() - 1.0).abs() < 0.02 for part in parts)


def window_off_by_one(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    return blocked_attention(q, k, v, window + 1, sinks)


def sinks_forgotten(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    return blocked_attention(q, k, v, window, 0)


def sinks_counted_twice(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    keys, values = torch.cat([k[:, :, :sinks], k], dim=2), torch.cat([v[:, :, :sinks], v], dim=2)
    mask = Causal(window, sinks).mask(q.shape[2])
    return attend_reference(q, keys, values, torch.cat([mask[:, :sinks], mask], dim=1))


def blocks_that_do_not_look_back(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    pieces = [x.split(window, dim=2) for x in (q, k, v)]
    outputs = [F.scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in zip(*pieces, strict=True)]
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize(
    "mutant", [window_off_by_one, sinks_forgotten, sinks_counted_twice, blocks_that_do_not_look_back]
)
def test_the_usual_slips_are_caught(mutant: Attention) -> None:
    """Bug: a comparison that passes whatever the path does."""
    assert worst_difference(mutant, qkv(1, 90, 2, 1, 4), 8, 3) > 1e-3


def test_a_gradient_lost_between_excerpts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the comparison looks at values only, and an excerpt that hands on no gradient passes."""

    def forgetful(ctx: object, grad_excerpt: Tensor, grad_x: Tensor) -> tuple[Tensor, None, None]:
        return grad_x, None, None

    monkeypatch.setattr(blocked._Excerpt, "backward", staticmethod(forgetful))
    assert worst_difference(blocked_attention, qkv(1, 90, 2, 1, 4), 8, 0) > 1e-3


def test_work_grows_with_T(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: it computes what the window hides. The pairs given to the kernel are counted, not seconds."""
    fused, pairs = F.scaled_dot_product_attention, []

    def counted(q: Tensor, k: Tensor, *args: object, **kwargs: object) -> Tensor:
        pairs.append(q.shape[2] * k.shape[2])
        return fused(q, k, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    window, sinks = 256, 4
    block, whole = block_size(window), window + sinks
    for n in (1, 10, 40):
        pairs.clear()
        blocked_attention(*qkv(1, whole + n * block, 2, 1, 8), window, sinks)
        assert sum(pairs) == whole**2 + n * block * (whole + block)


def memory(T: int) -> int:
    inputs = qkv(1, T, 2, 1, 8, torch.float32)
    grad_BHTD = torch.ones(1, 2, T, 8)
    return peak_bytes(lambda: torch.autograd.grad(blocked_attention(*inputs, 64), inputs, grad_BHTD))


def test_memory_grows_with_T() -> None:
    """Bug: each block's slice of the keys gets a gradient as long as the whole text, and all are alive at once."""
    memory(64 + 64)  # the first call of a kernel takes something for good
    small, middle, large = (memory(64 + n * 64) for n in (40, 70, 100))
    assert large - middle == middle - small
    assert large < 6 * 4 * 2 * 8 * (
        64 + 100 * 64
    )  # six times the queries: a few whole tensors, and none for each block


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradients() -> None:
    """Bug: a gradient changed in place, which torch.compile can't trace, so that a model with a window can't train."""
    config = GPTConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=32, block_size=16, vocab_size=11, pos="rope")
    model = GPT(config.with_(window=8, sinks=2)).double()
    idx_BT = torch.randint(0, 11, (2, 150))
    wanted = torch.autograd.grad(model(idx_BT, idx_BT), list(model.parameters()))
    found = torch.autograd.grad(torch.compile(model, backend="aot_eager")(idx_BT, idx_BT), list(model.parameters()))
    assert max((a - b).abs().max() for a, b in zip(wanted, found, strict=True)) < 1e-12
