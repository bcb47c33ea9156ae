"""Legend: B batch, V vocabulary."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gpt2course.generate import GenerateOptions, filter_logits, sample


def by_transformers(logits_BV: Tensor, o: GenerateOptions) -> Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(o.temperature))])
    if o.top_k is not None:
        warpers.append(TopKLogitsWarper(o.top_k))
    if o.top_p is not None:
        warpers.append(TopPLogitsWarper(o.top_p))
    return warpers(torch.zeros(len(logits_BV), 1, dtype=torch.long), logits_BV)


@given(
    V=st.integers(1, 60),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.8]),
    top_k=st.none() | st.integers(1, 70),
    top_p=st.none() | st.sampled_from([1e-4, 0.1, 0.5, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_filters_equal_transformers(
    V: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    """Bug: another order of the filters, a nucleus without the token that reaches p, k larger than V."""
    logits_BV = 3 * torch.randn(4, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    o = GenerateOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = filter_logits(logits_BV, o)
    assert torch.equal(ours, by_transformers(logits_BV.clone(), o))
    assert torch.isfinite(ours).any(dim=-1).all()


def test_temperature_after_the_filters_is_caught() -> None:
    """Bug: a nucleus of the unscaled probabilities: at temperature 2 it is smaller than asked for."""
    logits_BV = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    right = filter_logits(logits_BV, GenerateOptions(temperature=2.0, top_p=0.8))
    wrong = filter_logits(logits_BV, GenerateOptions(temperature=1.0, top_p=0.8)) / 2.0
    assert torch.isfinite(right).sum() == 3
    assert torch.isfinite(wrong).sum() == 2


def test_the_nucleus_by_hand() -> None:
    """Bug: off by one token at the edge of the nucleus."""
    p_V = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64)
    for top_p, kept in [(0.4, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [1, 2, 3]), (0.95, [0, 1, 2, 3])]:
        found = filter_logits(p_V.log()[None], GenerateOptions(top_p=top_p))
        assert torch.isfinite(found[0]).nonzero()[:, 0].tolist() == kept, top_p


def test_half_precision_logits_are_filtered_in_float32() -> None:
    """Bug: a cumulative sum in bfloat16 stops growing long before p."""
    logits_BV = torch.zeros(1, 5000, dtype=torch.bfloat16)
    kept = torch.isfinite(filter_logits(logits_BV, GenerateOptions(top_p=0.9))).sum().item()
    assert abs(kept - 4500) <= 1


def test_temperature_zero_is_the_limit() -> None:
    """Bug: division by zero; or greedy draws between equal logits."""
    logits_BV = torch.tensor([[1.0, 4.0, 2.0], [5.0, 5.0, 0.0]])
    assert sample(logits_BV, GenerateOptions(temperature=0)).tolist() == [1, 0]
    assert torch.isfinite(filter_logits(logits_BV, GenerateOptions(temperature=0))).tolist() == [
        [False, True, False],
        [True, False, False],
    ]
    cold = filter_logits(logits_BV, GenerateOptions(temperature=1e-6)).softmax(dim=-1)
    assert cold[0].tolist() == [0.0, 1.0, 0.0]


def test_draws_have_the_right_frequencies() -> None:
    """Bug: probabilities drawn from are not the filtered ones."""
    p_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 4000
    drawn = sample(p_V.log().expand(n, -1), GenerateOptions(top_k=3))
    wanted = torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
    spread = (wanted * (1 - wanted) / n).sqrt()
    assert ((drawn.bincount(minlength=4) / n - wanted).abs() <= 5 * spread).all()


def test_all_bad_options_are_listed() -> None:
    """Bug: top_k=0 or a negative temperature is used as if it meant something."""
    with pytest.raises(ValueError, match="GenerateOptions") as error:
        GenerateOptions(
            max_new_tokens=0, temperature=-1, top_k=0, top_p=1.5, stop=("",), seed=-1, context="drop"
        )  # fmt: skip
    lines = str(error.value).splitlines()[1:]
    names = ["max_new_tokens", "top_k", "temperature", "top_p", "stop", "seed", "context"]
    assert [line.split()[1] for line in lines] == names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-9),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("top_k", 2.0),
        ("max_new_tokens", True),
        ("stop", "END"),
        ("stop", (3,)),
        ("seed", 1.5),
    ],
)
def test_a_bad_option_is_refused_by_name(name: str, value: object) -> None:
    """Bug: NaN passes every comparison; a string of stops is taken letter by letter."""
    with pytest.raises(ValueError, match=f"- {name} is "):
        GenerateOptions(**{name: value})
