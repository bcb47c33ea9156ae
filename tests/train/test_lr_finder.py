"""The range test: right about a problem whose limit is known, and without a trace on the model."""

import math

import pytest
import torch
from torch import Tensor, nn

from gpt2course import GPT, GPTConfig
from gpt2course.train.lr_finder import find_learning_rate, suggest

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=50, dropout=0.1)


class Pattern:
    """The same batch with something to learn in it, at every step."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        row_BT = (torch.arange(34) % 7).view(2, 17)
        return row_BT[:, :-1], row_BT[:, 1:]


class Bowl(nn.Module):
    """A loss of |w|, which AdamW walks down by one rate a step: it turns where the sum of the rates reaches w."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[start]]))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        self.calls += 1
        return self.w.abs().sum()


def test_the_model_comes_back_as_it_was() -> None:
    """A run that starts from weights that the test has ruined, in evaluation mode, or with old gradients."""
    model = GPT(CONFIG).train()
    model.h[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    found = find_learning_rate(model, Pattern(), steps=30)
    assert len(set(found.losses)) > 10
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.wte.weight
    assert model.training
    assert not model.h[0].training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_rates_rise_by_one_factor_from_lowest_to_highest() -> None:
    """A last rate that is missed; rates in a straight line, nearly all of them at the top end."""
    found = find_learning_rate(GPT(CONFIG), Pattern(), lowest=1e-5, highest=1e-3, steps=21)
    assert found.rates[0] == 1e-5
    assert found.rates[-1] == pytest.approx(1e-3)
    factors = [b / a for a, b in zip(found.rates, found.rates[1:], strict=False)]
    assert factors == pytest.approx([10**0.1] * 20)
    assert found.losses[0] == found.smooth[0]


def test_the_suggestion_is_a_tenth_of_where_the_loss_turns() -> None:
    """A suggestion at the edge of the cliff, or one that comes from the last rate."""
    bowl = Bowl(1.0)
    found = find_learning_rate(bowl, Pattern(), lowest=1e-3, highest=10.0, steps=81, weight_decay=0.0, smoothing=0.0)
    low = found.losses.index(min(found.losses))
    assert 0.05 < found.rates[low] < 0.3
    assert found.suggestion == pytest.approx(found.rates[low] / 10)
    assert len(found.rates) < 81
    assert found.losses[-1] > 1.5 * min(found.losses)
    assert "times its lowest" in str(found)
    assert f"try a peak of {found.suggestion:.1e}" in str(found)
    assert bowl.calls.item() == 0


def test_a_flat_valley_is_entered_from_its_steep_side() -> None:
    """A tenth of the lowest rate of a valley two decades wide, which lies high on its other side."""
    rates = [10.0**n for n in (-5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5)]
    smooth = [5.0, 4.9, 4.5, 3.2, 3.0, 3.01, 3.0, 2.99, 2.98, 6.0]
    assert suggest(rates, smooth) == 1e-4
    assert suggest(rates, [5.0, 4.9, 4.8, 4.7, 4.6, 4.5, 4.4, 3.0, 9.0, math.nan]) == pytest.approx(10**-2.5)
    assert suggest(rates[:3], [1.0, 2.0, 3.0]) is suggest(rates[:3], [3.0, 2.0, 1.0]) is None


def test_without_a_turn_there_is_no_suggestion() -> None:
    """A number made up from a curve that has no minimum."""
    falling = find_learning_rate(Bowl(1e3), Pattern(), lowest=1e-3, highest=1e-1, steps=20, weight_decay=0.0)
    assert falling.suggestion is None
    assert "still falling: end higher; no suggestion" in str(falling)
    rising = find_learning_rate(Bowl(1e-4), Pattern(), lowest=1e-2, highest=1.0, steps=20, weight_decay=0.0)
    assert rising.suggestion is None
    assert "never fell below its start: begin lower" in str(rising)


def test_a_loss_that_is_no_number_ends_the_test() -> None:
    """NaN in the running mean for the rest of the test, and a suggestion drawn from it."""
    model = GPT(CONFIG)
    with torch.no_grad():
        model.h[0].mlp.c_fc.bias[0] = float("nan")
    found = find_learning_rate(model, Pattern(), steps=30)
    assert len(found.losses) == 1
    assert math.isnan(found.losses[0])
    assert found.suggestion is None
    assert "the loss was nan" in found.why


def test_ctrl_c_restores_the_weights() -> None:
    """Whoever stops the test early keeps a model that was trained at rates nobody would choose."""

    class Interrupted(Pattern):
        def batch(self, step: int) -> tuple[Tensor, Tensor]:
            if step == 3:
                raise KeyboardInterrupt
            return super().batch(step)

    model = GPT(CONFIG)
    before = model.wte.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        find_learning_rate(model, Interrupted())
    assert torch.equal(model.wte.weight, before)


@pytest.mark.parametrize(
    ("lowest", "highest", "steps"), [(0.0, 1.0, 10), (1.0, 0.1, 10), (1e-5, math.inf, 10), (1e-5, 1.0, 1)]
)
def test_a_range_that_is_none_is_refused(lowest: float, highest: float, steps: int) -> None:
    """A division by zero in the middle of the test."""
    with pytest.raises(ValueError, match=f"lowest {lowest} must be above 0 and below highest {highest}, steps {steps}"):
        find_learning_rate(GPT(CONFIG), Pattern(), lowest=lowest, highest=highest, steps=steps)
