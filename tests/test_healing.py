"""Healing: the loop it claims to be, to the bit, and nothing lost when it is stopped.

Legend: B batch, T positions, C model width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2course import GPT, GPTConfig
from gpt2course.healing import DivergedError, heal
from gpt2course.surgery import to_gqa, to_rope

Lively = Callable[..., GPT]
CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=97)


def ids(T: int = 24, B: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


class Repeated:
    """One batch of a text with a pattern to learn, over and over."""

    def __init__(self, low: int = 10, high: int = 20) -> None:
        row_T = torch.arange(25) % (high - low) + low
        self.x_BT, self.y_BT = row_T[None, :-1].repeat(2, 1), row_T[None, 1:].repeat(2, 1)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.x_BT, self.y_BT


def test_healing_lowers_the_loss_and_keeps_the_config() -> None:
    """An optimizer without the parameters, gradients never cleared, a model left in training mode."""
    model, _ = to_gqa(GPT(CONFIG).eval(), 1)
    config = model.config
    healing = heal(model, Repeated(), 30, learning_rate=1e-2)
    assert len(healing.losses) == len(healing.gradient_norms) == 30
    assert healing.losses[-1] < 0.5 * healing.losses[0]
    with torch.no_grad():
        assert model(*Repeated().batch(0)).item() < healing.losses[0] / 2
    assert model.config is config
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert healing.n_tokens == 30 * 48
    assert "30 steps of healing, 1,440 tokens" in str(healing)
    assert "(means of 3)" in str(healing)


def test_healing_is_the_loop_written_out() -> None:
    """Gradients that pile up from step to step, no clipping, a constant rate: each learns something, more slowly."""
    healed, by_hand = GPT(CONFIG), GPT(CONFIG)
    by_hand.load_state_dict(healed.state_dict())
    found = heal(healed, Repeated(), 3, learning_rate=0.02, warmup=1, clip=0.05)
    matrices = [p for p in by_hand.parameters() if p.ndim == 2]
    vectors = [p for p in by_hand.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    norms = []
    for rate in (0.02, 0.02, 0.01):  # one step of warm-up, then 2/2 and 1/2 of the peak
        for group in optimizer.param_groups:
            group["lr"] = rate
        by_hand.zero_grad()
        by_hand(*Repeated().batch(0)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.05).item())
        optimizer.step()
    assert min(norms) > 0.05
    assert found.gradient_norms == pytest.approx(norms, rel=1e-4)
    for a, b in zip(healed.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_same_healing_gives_the_same_bits(autocast: torch.dtype | None) -> None:
    """Dropout drawn from a generator that nobody seeded; a healing that reseeds everybody else's."""
    start = GPT(replace(CONFIG, dropout=0.2))
    models = [to_rope(start)[0] for _ in range(3)]
    heal(models[0], Repeated(), 3, seed=1, autocast=autocast)
    torch.rand(5)
    state = torch.get_rng_state()
    heal(models[1], Repeated(), 3, seed=1, autocast=autocast)
    assert torch.equal(torch.get_rng_state(), state)
    heal(models[2], Repeated(), 3, seed=2, autocast=autocast)
    weights = [model.h[0].attn.c_attn.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_restricted_vocabulary_is_a_smaller_softmax() -> None:
    """Targets that point at the wrong row of the head. With every id, in any order, it is the full loss."""
    every = torch.randperm(CONFIG.vocab_size)
    start = GPT(CONFIG)
    full, shuffled, few = (to_gqa(start, 4)[0] for _ in range(3))
    losses = heal(full, Repeated(), 5).losses
    assert heal(shuffled, Repeated(), 5, vocabulary=every).losses == pytest.approx(losses, abs=1e-5)
    restricted = heal(few, Repeated(), 5, vocabulary=torch.arange(10, 20), weight_decay=0.0)
    assert restricted.losses[0] < 2.5 < losses[0]
    outside = [*range(10), *range(20, 97)]
    assert torch.equal(few.wte.weight[outside], start.wte.weight[outside])
    assert not torch.equal(few.wte.weight[10:20], start.wte.weight[10:20])


def test_targets_that_do_not_count_are_left_out_under_restriction() -> None:
    """A padding target that reads row -100, or that counts in the mean."""
    padded = Repeated()
    padded.y_BT = padded.y_BT.clone()
    padded.y_BT[1] = -100
    one = Repeated()
    one.x_BT, one.y_BT = one.x_BT[:1], one.y_BT[:1]
    start, vocabulary = GPT(CONFIG), torch.arange(10, 20)
    found = [heal(to_gqa(start, 4)[0], b, 1, vocabulary=vocabulary).losses[0] for b in (padded, one)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"vocabulary": torch.arange(11, 20)}, "token id 10 is to be predicted"),
        ({"vocabulary": torch.tensor([10, 10])}, "different ids from 0 to 96"),
        ({"vocabulary": torch.tensor([97])}, "different ids from 0 to 96"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
    ],
)
def test_healing_refuses_what_it_can_not_do(arguments: dict[str, Any], says: str) -> None:
    """A target that is silently not learned, or an index error without a name."""
    model = GPT(CONFIG)
    before = model.wte.weight.clone()
    with pytest.raises(ValueError, match=says):
        heal(model, Repeated(), **{"steps": 1, **arguments})
    assert torch.equal(model.wte.weight, before)


def test_frozen_parameters_stay() -> None:
    """An experiment that heals attention alone, and changes everything."""
    model = GPT(CONFIG)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn" in name)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    heal(model, Repeated(), 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("attn" not in name)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        heal(model, Repeated(), 2)


def test_only_matrices_decay() -> None:
    """Layer norms pulled to zero: with no gradient a matrix must shrink and a vector must not move."""
    model = GPT(CONFIG)
    with torch.no_grad():
        model.ln_f.weight.zero_()  # the hidden states are then zero, and so is every gradient but that of ln_f
        model.ln_f.bias.zero_()
    matrix, vector = model.h[0].mlp.c_fc.weight, model.h[0].ln_1.weight
    before = matrix.detach().clone()
    heal(model, Repeated(), 1, learning_rate=0.1, weight_decay=0.5)
    torch.testing.assert_close(matrix.detach(), before * 0.95)
    assert torch.equal(vector, torch.ones_like(vector))


def test_a_loss_that_is_no_number_stops_before_it_spreads() -> None:
    """NaN in every weight after an hour of training on nothing."""
    model = GPT(CONFIG)
    with torch.no_grad():
        model.h[1].mlp.c_fc.bias[3] = float("nan")
    before = model.wte.weight.clone()
    with pytest.raises(DivergedError, match=r"at step 1 of 4 the loss is nan .* learning_rate below 0\.001"):
        heal(model.eval(), Repeated(), 4)
    assert torch.equal(model.wte.weight, before)
    assert not model.training
    assert model.wte.weight.grad is None


def test_ctrl_c_keeps_what_was_learned() -> None:
    """Minutes of training thrown away by whoever has seen enough."""

    class Interrupted(Repeated):
        def batch(self, step: int) -> tuple[Tensor, Tensor]:
            if step == 2:
                raise KeyboardInterrupt
            return super().batch(step)

    start = GPT(CONFIG).eval()
    model, _ = to_gqa(start, 4)
    healing = heal(model, Interrupted(), 10)
    assert healing.interrupted
    assert len(healing.losses) == 2
    assert str(healing).endswith(", interrupted")
    assert not torch.equal(model.wte.weight, start.wte.weight)
    assert not model.training
