"""Legend: B batch, T positions, C model width, V vocabulary."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gpt2course import GPT, PRESETS, GPTConfig
from gpt2course.loss import IGNORE
from gpt2course.masks import left_padded_positions
from gpt2course.model import GELU

Lively = Callable[..., GPT]


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_the_published_sizes(name: str, count: int) -> None:
    """Bug: a bias too few, or the head counted beside the embedding it shares."""
    with torch.device("meta"):
        model = GPT(PRESETS[name])
    assert model.num_params() == count


def test_without_bias_there_is_none() -> None:
    """Bug: bias=False reaches the linear layers and not the layer norms."""
    assert not [name for name, _ in GPT(WIDE.with_(bias=False)).named_parameters() if "bias" in name]


def assert_is_gpt2_init(model: GPT) -> None:
    scaled = 0.02 / math.sqrt(2 * model.config.n_layer)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".ln_" in name or name.startswith("ln_"):
            assert (p == 1).all(), name
        else:
            std = scaled if name.endswith("c_proj.weight") else 0.02
            n = p.numel()
            assert abs(p.std().item() / std - 1) < 5 / math.sqrt(2 * n), name  # five standard errors
            assert abs(p.mean().item()) < 5 * std / math.sqrt(n), name


WIDE = GPTConfig(n_layer=4, n_head=4, n_embd=64, block_size=64, vocab_size=500)


def test_init_is_gpt2s() -> None:
    """Bug: residual projections not scaled, biases not zero, torch's own default left somewhere."""
    assert_is_gpt2_init(GPT(WIDE))


@pytest.mark.parametrize("suffix", ["h.2.attn.c_proj.weight", "h.0.mlp.c_proj.weight", "h.3.mlp.c_fc.weight", "bias"])
def test_the_init_check_catches_a_wrong_scale(suffix: str) -> None:
    """Bug: bands so wide that an unscaled projection passes."""
    model = GPT(WIDE)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(suffix):
                p.add_(0.001) if name.endswith("bias") else p.mul_(1.2)
    with pytest.raises(AssertionError):
        assert_is_gpt2_init(model)


def test_init_on_meta_and_after_to_empty() -> None:
    """Bug: `to_empty` unties head and embedding; the head keeps what was in memory, and training moves only one."""
    with torch.device("meta"):
        model = GPT(WIDE)
    model.init_weights()
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    assert model.lm_head.weight is not model.wte.weight
    for p in model.parameters():
        nn.init.constant_(p, math.nan)
    model.init_weights()
    assert model.lm_head.weight is model.wte.weight
    assert_is_gpt2_init(model)
    assert model.num_params() == GPT(WIDE).num_params()


def test_training_keeps_the_tie() -> None:
    """Bug: an optimizer step moves the embedding and not the head."""
    model = GPT(WIDE)
    idx_BT = torch.randint(0, 500, (2, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model.wte.weight.detach().clone()
    model(idx_BT, idx_BT).backward()
    optimizer.step()
    assert model.lm_head.weight is model.wte.weight
    assert not torch.equal(before, model.wte.weight)


def test_an_untrained_model_knows_nothing() -> None:
    """Bug: a first loss far from ln V: unscaled init, a softmax over the wrong axis, targets off by one."""
    model = GPT(PRESETS["tiny"]).eval()
    idx_BT = torch.randint(0, 50257, (8, 33))
    with torch.no_grad():
        loss = model(idx_BT[:, :-1], idx_BT[:, 1:])
    assert abs(loss.item() - math.log(50257)) < 0.05


X = torch.linspace(-6, 6, 1001, dtype=torch.float64)


def _formula(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_gelu_is_the_tanh_formula() -> None:
    """Bug: the exact GELU, which looks the same and gives other logits on the published weights."""
    assert (GELU()(X) - _formula(X)).abs().max() < 1e-15
    assert (F.gelu(X) - _formula(X)).abs().max() > 1e-4  # so the line above tells them apart


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 999))
@pytest.mark.parametrize(("G", "window"), [(4, None), (2, 3)])
def test_left_padding_changes_no_logit(
    lively: Lively, G: int, window: int | None, lengths: list[int], seed: int
) -> None:
    """Bug: padding is seen, or shifts the positions of the tokens after it."""
    model = lively(GPTConfig(n_layer=2, n_head=4, n_kv_head=G, n_embd=16, block_size=9, vocab_size=31, window=window))
    generator = torch.Generator().manual_seed(seed)
    T = max(lengths)
    idx_BT = torch.randint(0, 31, (len(lengths), T), generator=generator)
    with torch.no_grad():
        logits_BTV = model(idx_BT, pos_BT=left_padded_positions(torch.tensor(lengths), T))
        for row, n in enumerate(lengths):
            alone = model(idx_BT[row : row + 1, T - n :])
            assert (logits_BTV[row, T - n :] - alone[0]).abs().max() < 1e-12
    assert torch.isfinite(logits_BTV).all()


def test_padding_gives_no_gradient_that_is_not_a_number(lively: Lively) -> None:
    """Bug: rows that see nothing are masked forward and NaN backward."""
    model = lively(GPTConfig(n_layer=2, n_head=4, n_embd=16, block_size=9, vocab_size=31), torch.float32)
    idx_BT = torch.randint(0, 31, (2, 9))
    targets_BT = idx_BT.clone()
    targets_BT[1, :6] = IGNORE
    model(idx_BT, targets_BT, pos_BT=left_padded_positions(torch.tensor([9, 3]), 9)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_loss_is_the_mean_over_valid_tokens(lively: Lively) -> None:
    """Bug: a mean over all positions, ignored ones included; a sum that is a mean."""
    model = lively(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=9, vocab_size=31))
    idx_BT, targets_BT = torch.randint(0, 31, (2, 9)), torch.randint(0, 31, (2, 9))
    targets_BT[0, :5] = IGNORE
    logits_BTV = model(idx_BT)
    wanted = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    assert abs(model(idx_BT, targets_BT, reduction="sum") - wanted) < 1e-12
    assert abs(model(idx_BT, targets_BT) - wanted / 13) < 1e-12
    with pytest.raises(ValueError, match="reduction is 'none'; it must be mean or sum"):
        model(idx_BT, targets_BT, reduction="none")


def test_the_loss_does_not_alter_the_gradients_of_the_model(lively: Lively) -> None:
    """Bug: the shared embedding gets the head's gradient or the input's, not their sum."""
    model = lively(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=9, vocab_size=31))
    idx_BT, targets_BT = torch.randint(0, 31, (2, 9)), torch.randint(0, 31, (2, 9))
    ours = torch.autograd.grad(model(idx_BT, targets_BT), list(model.parameters()))
    plain = F.cross_entropy(model(idx_BT).flatten(0, 1), targets_BT.flatten())
    for a, b in zip(ours, torch.autograd.grad(plain, list(model.parameters())), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_dropout_works_in_training_only() -> None:
    """Bug: evaluation is random; or dropout 0.1 never happens."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=9, vocab_size=31, dropout=0.3))
    idx_BT = torch.randint(0, 31, (2, 9))
    assert not torch.equal(model(idx_BT), model(idx_BT))
    model.eval()
    assert torch.equal(model(idx_BT), model(idx_BT))
    # the embedding, what attention writes and what the MLP writes; the attention weights drop inside `attend`
    used: list[float] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, _args, _out: used.append(module.p))
    model(idx_BT)
    assert used == [0.3] * 3


def test_bfloat16_autocast_is_near(lively: Lively) -> None:
    """Bug: a module that breaks or returns nonsense under autocast."""
    model = GPT(WIDE).eval()
    idx_BT = torch.randint(0, 500, (2, 16))
    exact = model(idx_BT, idx_BT).item()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(idx_BT, idx_BT)
    assert low.dtype == torch.float32
    assert abs(low.item() - exact) < 0.01


def test_position_errors(small: GPTConfig) -> None:
    """Bug: a sequence longer than the table fails inside torch with "index out of range"."""
    model = GPT(small)
    with pytest.raises(ValueError, match=r"33 positions, but .* table has block_size 32 rows .*; shorten .*pos='rope'"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="41 positions, but"):
        model(torch.zeros(1, 2, dtype=torch.long), pos_BT=torch.tensor([[39, 40]]))
    with pytest.raises(ValueError, match=r"\(1, 3\) and token ids \(1, 2\) differ"):
        model(torch.zeros(1, 2, dtype=torch.long), pos_BT=torch.arange(3)[None])


def test_rotary_positions_have_no_end(small: GPTConfig) -> None:
    """Bug: block_size, without a table only the length of training, is taken for a limit; or the angles are stored."""
    model = GPT(small.with_(pos="rope"))
    assert not [name for name, _ in model.named_parameters() if "wpe" in name]
    assert not list(model.buffers())
    assert model(torch.zeros(1, 100, dtype=torch.long)).shape == (1, 100, 97)
    assert model(torch.zeros(1, 2, dtype=torch.long), pos_BT=torch.tensor([[39_999, 40_000]])).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 4), (4, 2), (2, 3)])
def test_targets_of_another_shape_are_refused(lively: Lively, shape: tuple[int, int]) -> None:
    """Bug: targets that are cut short, or transposed, give a loss without meaning, and no error."""
    with pytest.raises(ValueError, match=r"differ in shape"):
        lively(WIDE, torch.float32)(torch.zeros(2, 4, dtype=torch.long), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("token", [97, -1])
def test_a_token_id_outside_the_vocabulary_is_named(small: GPTConfig, token: int) -> None:
    """torch's "index out of range in self", which names neither the id nor the limit nor the tensor."""
    with pytest.raises(ValueError, match=rf"token id {token} is outside .* from 0 to 96; encode the text with"):
        GPT(small)(torch.tensor([[3, token]]))
