"""Legend: B batch, T queries, S keys, C model width, H query heads, G key/value heads, D head width."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2course import GPT, GPTConfig
from gpt2course.attention import Attention, attend, attend_reference, attention_weights, choose
from gpt2course.masks import Causal, left_padded_positions, visible

BACKENDS = ("reference", "sdpa")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def qkv(B: int, T: int, S: int, H: int, G: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, D)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return q, k, v


def value_and_gradients(
    inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor | Causal | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y_BHTD = attend(*inputs, mask, backend)
    pull = torch.linspace(-1.0, 1.0, y_BHTD.numel(), dtype=y_BHTD.dtype).view(y_BHTD.shape)
    grad_q, grad_k, grad_v = torch.autograd.grad((y_BHTD * pull).sum(), inputs)
    return y_BHTD.detach(), grad_q, grad_k, grad_v


def by_loop(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BTS: Tensor) -> Tensor:
    """The definition, one query at a time: nothing here is broadcast, so nothing can be broadcast wrongly."""
    B, H, T, D = q_BHTD.shape
    group = H // k_BGSD.shape[1]
    out = torch.zeros_like(q_BHTD)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = [s for s in range(k_BGSD.shape[2]) if mask_BTS[b, t, s]]
                scores = [float(q_BHTD[b, h, t] @ k_BGSD[b, h // group, s]) / math.sqrt(D) for s in seen]
                total = sum(math.exp(score) for score in scores)
                for s, score in zip(seen, scores, strict=True):
                    out[b, h, t] += math.exp(score) / total * v_BGSD[b, h // group, s]
    return out


def assert_is_the_definition(backend: str) -> None:
    q, k, v = (x.detach() for x in qkv(2, 4, 5, 4, 2, 3, torch.float64))
    mask_BTS = torch.rand(2, 4, 5) < 0.6
    error = (attend(q, k, v, mask_BTS[:, None], backend) - by_loop(q, k, v, mask_BTS)).abs().max()
    assert error < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_its_definition(backend: str) -> None:
    """Bug: scores not scaled, softmax over the wrong axis, heads read by the wrong keys."""
    assert_is_the_definition(backend)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 40])
@pytest.mark.parametrize("G", [4, 2, 1])
def test_the_fused_path_equals_the_hand_written_one(
    G: int, window: int | None, padded: bool, dtype: torch.dtype
) -> None:
    """Bug: the fused kernel is called with another mask, scale or head order than the chapter's attention."""
    T = 9
    inputs = qkv(3, T, T, 4, G, 8, dtype)
    pos_BT = left_padded_positions(torch.tensor([T, 5, 1]) if padded else torch.tensor([T, T, T]), T)
    mask = visible(pos_BT, pos_BT, window)[:, None]
    by_hand, fused = (value_and_gradients(inputs, mask, backend) for backend in BACKENDS)
    for name, a, b in zip(("out", "grad q", "grad k", "grad v"), by_hand, fused, strict=True):
        assert (a - b).abs().max() < TOLERANCE[dtype], name
        assert torch.isfinite(a).all(), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mask", [Causal(), Causal(3), Causal(9), Causal(3, 2)], ids=str)
@pytest.mark.parametrize("G", [4, 2, 1])
def test_a_mask_that_is_only_named_is_the_mask(G: int, mask: Causal, dtype: torch.dtype) -> None:
    """Bug: `Causal` is one mask on one path and another on the next, such as a kernel's own that is not asked for."""
    T = 9
    inputs = qkv(2, T, T, 4, G, 8, dtype)
    wanted = value_and_gradients(inputs, mask.mask(T), "reference")
    for backend in (*BACKENDS, "auto"):
        for a, b in zip(value_and_gradients(inputs, mask, backend), wanted, strict=True):
            assert (a - b).abs().max() < TOLERANCE[dtype], backend


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("G", [4, 2, 1])
def test_no_mask_hides_nothing(G: int, T: int, dtype: torch.dtype) -> None:
    """Bug: no mask means causal on one path, and a decoded token, alone with its past, sees the first key only."""
    inputs = qkv(2, T, 7, 4, G, 8, dtype)
    wanted = value_and_gradients(inputs, torch.ones(T, 7, dtype=torch.bool), "reference")
    for backend in (*BACKENDS, "auto"):
        for a, b in zip(value_and_gradients(inputs, None, backend), wanted, strict=True):
            assert (a - b).abs().max() < TOLERANCE[dtype], backend


MASK_SHAPES = [(1, 7), (1, 1, 7), (4, 1, 7), (3, 1, 1, 7), (1, 4, 1, 7), (3, 4, 1, 7)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("G", [4, 2, 1])
def test_one_query_with_any_mask(G: int, shape: tuple[int, ...]) -> None:
    """Bug: decoding folds the heads of a group into one, and a mask of its own for each head is lost or refused."""
    inputs = qkv(3, 1, 7, 4, G, 8, torch.float64)
    mask = torch.rand(shape) < 0.6
    for a, b in zip(*(value_and_gradients(inputs, mask, backend) for backend in BACKENDS), strict=True):
        assert (a - b).abs().max() < 1e-12


@given(data=st.data())
def test_any_shape_and_any_mask(data: st.DataObject) -> None:
    """Bug: the two paths part at a shape nobody thought of, or where rows see nothing."""
    B, T, S = (data.draw(st.integers(1, n)) for n in (3, 6, 7))
    G, group, D = (data.draw(st.integers(1, n)) for n in (3, 3, 9))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    inputs = qkv(B, T, S, G * group, G, D, torch.float64)
    mask_B1TS = torch.rand(B, 1, T, S) < data.draw(st.sampled_from([0.0, 0.2, 0.8, 1.0]))
    by_hand, fused = (value_and_gradients(inputs, mask_B1TS, backend) for backend in BACKENDS)
    blind_BT = ~mask_B1TS[:, 0].any(dim=-1)
    for a, b in zip(by_hand, fused, strict=True):
        assert (a - b).abs().max() < 1e-12
    for out, grad_q in (by_hand[:2], fused[:2]):
        assert (out.transpose(1, 2)[blind_BT] == 0).all()
        assert (grad_q.transpose(1, 2)[blind_BT] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 3, 300])
def test_a_query_that_sees_nothing_gives_zero(backend: str, dtype: torch.dtype, T: int) -> None:
    """Bug: softmax over a row of -inf is NaN, and through the keys of the next layer NaN reaches every token.

    Length 300 is more than one tile of the fused kernel. The gradients are scaled up: 0/0 hides behind small ones.
    """
    inputs = qkv(2, T, T, 4, 2, 8, dtype)
    mask = visible(torch.arange(T), torch.arange(T)).repeat(2, 1, 1, 1)
    mask[0, :, 0] = False
    mask[1] = False
    y_BHTD = attend(*inputs, mask, backend)
    grads = torch.autograd.grad((y_BHTD * 1e4).sum(), inputs)
    assert (y_BHTD[0, :, 0] == 0).all()
    assert (y_BHTD[1] == 0).all()
    assert (grads[0][0, :, 0] == 0).all()
    assert all((grad[1] == 0).all() and torch.isfinite(grad).all() for grad in grads)


def test_weights_sum_to_one_or_zero() -> None:
    """Bug: hidden keys keep a little weight (a mask of -1e4 for -inf), or the clamped sum changes a visible row."""
    q, k, _ = qkv(1, 5, 5, 2, 2, 4, torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[2] = False
    weights = attention_weights(q * 1e3, k, mask)
    assert (weights.masked_select(~mask) == 0).all()
    sums = weights.sum(dim=-1)
    assert (sums - torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])).abs().max() < 1e-12


@given(shift=st.floats(-500, 500))
def test_softmax_does_not_care_about_a_shift(shift: float) -> None:
    """Bug: exp overflows for large scores, as the naive softmax does."""
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64).view(1, 1, 3, 1)
    assert (attention_weights(q, k + shift, None) - attention_weights(q, k, None)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 3])
def test_gradient_is_zero_outside_what_a_query_sees(backend: str, window: int | None) -> None:
    """Bug: a future token, or one outside the window, leaks into a prediction by ever so little."""
    T = 6
    q, k, v = qkv(1, T, T, 2, 1, 4, torch.float64)
    mask = visible(torch.arange(T), torch.arange(T), window)
    y_BHTD = attend(q, k, v, mask, backend)
    for t in range(T):
        grad_k, grad_v = torch.autograd.grad(y_BHTD[:, :, t].pow(2).sum(), (k, v), retain_graph=True)
        reached = grad_v[0, 0].abs().sum(dim=-1) > 0
        assert torch.equal(reached, mask[t])
        assert (grad_k[0, 0][~mask[t]] == 0).all()


def test_grouped_queries_with_a_key_head_each_are_plain_attention(lively: Callable[..., GPT]) -> None:
    """Bug: G == H takes another path than plain multi-head attention; or GQA is not MHA with shared keys."""
    config = GPTConfig(n_layer=1, n_head=4, n_embd=16, block_size=8, vocab_size=11)
    x_BTC = torch.randn(2, 7, 16, dtype=torch.float64)
    plain, same = (lively(c).h[0].attn for c in (config, config.with_(n_kv_head=4)))
    assert torch.equal(plain(x_BTC), same(x_BTC))

    shared = lively(config.with_(n_kv_head=2)).h[0].attn
    spread = Attention(config, 0).double()
    D, G = config.head_dim, 2
    with torch.no_grad():
        for ours, theirs in zip(spread.c_attn.parameters(), shared.c_attn.parameters(), strict=True):
            q, k, v = theirs.split([4 * D, G * D, G * D])
            k, v = (p.view(G, D, *p.shape[1:]).repeat_interleave(2, dim=0).flatten(0, 1) for p in (k, v))
            ours.copy_(torch.cat([q, k, v]))
        spread.c_proj.load_state_dict(shared.c_proj.state_dict())
    assert (spread(x_BTC) - shared(x_BTC)).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_window_of_the_module(backend: str, lively: Callable[..., GPT]) -> None:
    """Bug: window W behaves as W + 1; a window that covers everything changes something."""
    config = GPTConfig(n_layer=2, n_head=4, n_embd=16, block_size=12, vocab_size=11, attention_backend=backend)
    idx_BT = torch.randint(0, 11, (2, 9))
    full, *windows = (lively(config.with_(window=w))(idx_BT) for w in (None, 3, 4, 8, 9, 10, 100))
    worst = [(full - logits).abs().max().item() for logits in windows]
    assert min(worst[:3]) > 1e-3  # 3, 4 and 8 keys hide something of 9
    assert max(worst[3:]) < 1e-12
    assert (windows[0] - windows[1]).abs().max() > 1e-3
    assert (windows[0][:, :3] - full[:, :3]).abs().max() < 1e-12  # the first W queries lose nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_mean_and_only_works_in_training(backend: str) -> None:
    """Bug: weights are dropped but not scaled up, or dropped in evaluation too."""
    q = torch.zeros(1, 8, 1, 4)
    k, v = torch.zeros(1, 8, 4000, 4), torch.ones(1, 8, 4000, 4)
    mask = torch.ones(1, 4000, dtype=torch.bool)
    y_BHTD = attend(q, k, v, mask, backend, dropout=0.25)
    # Each of 8 heads keeps a share of 4,000 keys: the spread of its mean is sqrt(p / (1 - p) / 4000) = 0.009.
    assert y_BHTD.std(dim=1).max() > 1e-3
    assert (y_BHTD - 1.0).abs().max() < 0.05

    module = Attention(GPTConfig(n_layer=1, n_head=2, n_embd=8, dropout=0.5, attention_backend=backend), 0)
    x_BTC = torch.randn(1, 6, 8)
    assert not torch.equal(module(x_BTC), module(x_BTC))
    module.eval()
    assert torch.equal(module(x_BTC), module(x_BTC))


def test_errors_name_the_mend() -> None:
    """Bug: decoding with a causal mask is silently aligned to the wrong corner; a misspelt backend runs another."""
    q, k, v = qkv(1, 2, 5, 2, 2, 4, torch.float32)
    for backend in (*BACKENDS, "auto", "blocked"):
        with pytest.raises(ValueError, match="as many queries as keys, not 2 and 5"):
            attend(q, k, v, Causal(), backend)
    with pytest.raises(ValueError, match="'flash' is unknown; use one of auto, reference, sdpa, blocked, flex"):
        attend(q, k, v, torch.ones(2, 5, dtype=torch.bool), "flash")


@pytest.mark.parametrize(
    ("mask", "T", "path"),
    [
        (None, 9, "sdpa"),
        (torch.ones(9, 9, dtype=torch.bool), 9, "sdpa"),
        (Causal(), 9, "sdpa"),
        (Causal(9), 9, "sdpa"),
        (Causal(8), 9, "blocked"),
        (Causal(3, 2), 9, "blocked"),
        (Causal(3), 3, "sdpa"),
    ],
    ids=["none", "tensor", "causal", "W=T", "W<T", "sinks", "short"],
)
def test_one_place_chooses_the_path(mask: Tensor | Causal | None, T: int, path: str) -> None:
    """Bug: a window trains at the price of full attention, or the blocked path is taken where it skips nothing."""
    q_BHTD = torch.zeros(1, 2, T, 4)
    assert choose(q_BHTD, mask) == path
    assert choose(q_BHTD, mask, "blocked") == path
    assert choose(q_BHTD, mask, "sdpa") == "sdpa"
    assert choose(q_BHTD, mask, "reference") == "reference"


def test_the_hand_written_path_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: both backends run the fused kernel, and comparing them proves nothing."""
    called = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **kw: called.append("fused") or fused(*a, **kw)
    )
    monkeypatch.setattr(
        "gpt2course.attention.attend_reference", lambda *a: called.append("hand") or attend_reference(*a)
    )
    inputs = qkv(1, 3, 3, 2, 2, 4, torch.float32)
    for backend in ("reference", "sdpa", "auto"):
        attend(*inputs, Causal(), backend)
    assert called == ["hand", "fused", "fused"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex attention can be used here")
def test_a_path_that_is_not_to_be_had_says_why() -> None:
    """Bug: flex is asked for on a CPU, and another path is taken in silence, or torch fails deep inside."""
    inputs = qkv(1, 6, 6, 2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=r"'flex' can't be used here: .*no backward pass on cpu.*use auto or blocked"):
        attend(*inputs, Causal(3), "flex")
    with pytest.raises(ValueError, match="window is 0"):
        Causal(0)
