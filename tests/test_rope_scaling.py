"""Frequencies and how they are scaled, against formulas worked out pair by pair, their properties, and transformers.

Legend: R how many numbers of a head are turned; i the number of a pair, 0 the fastest.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_peers import rope_parameters
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpt2course import GPTConfig
from gpt2course.config import SCALINGS, RopeScaling
from gpt2course.rope import angles, attention_factor, inverse_frequencies

R, LENGTH = 64, 2048
EXACT = 1e-6
"""relative: a float32 power of a large base is rounded to about 3e-7"""
FACTORS = st.floats(1.0, 64.0)
THETAS = st.sampled_from([100.0, 10000.0, 500000.0])
KINDS = pytest.mark.parametrize("kind", SCALINGS)


def turns(i: float, theta: float, length: int = LENGTH, width: int = R) -> float:
    """How many times pair i turns within the length."""
    return length * theta ** (-2 * i / width) / (2 * math.pi)


def linear(i: int, theta: float, factor: float) -> float:
    return theta ** (-2 * i / R) / factor


def ntk(i: int, theta: float, factor: float) -> float:
    """The base that slows the last pair by the factor, found from that wish alone."""
    last = R // 2 - 1
    base = (factor * theta ** (2 * last / R)) ** (R / (2 * last))
    return base ** (-2 * i / R)


def yarn(i: int, theta: float, factor: float, fast: float = 32.0, slow: float = 1.0) -> float:
    """The limits are found by halving: where does a pair turn just so often?"""

    def pair_that_turns(times: float) -> float:
        low, high = -1000.0, 1000.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if turns(middle, theta) > times else (low, middle)
        return low

    first, last = max(math.floor(pair_that_turns(fast)), 0), math.ceil(pair_that_turns(slow))
    slowed = min(max((i - first) / (last - first), 0.0), 1.0)
    return theta ** (-2 * i / R) * ((1 - slowed) + slowed / factor)


def llama3(i: int, theta: float, factor: float, low: float = 1.0, high: float = 4.0) -> float:
    """By wavelengths, as Meta's code has it."""
    frequency = theta ** (-2 * i / R)
    wavelength = 2 * math.pi / frequency
    if wavelength < LENGTH / high:
        return frequency
    if wavelength > LENGTH / low:
        return frequency / factor
    smooth = (LENGTH / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


FORMULAS: dict[str, Callable[[int, float, float], float]] = {
    "linear": linear,
    "ntk": ntk,
    "yarn": yarn,
    "llama3": llama3,
}


def scaled(kind: str, theta: float, factor: float, width: int = R) -> Tensor:
    return inverse_frequencies(width, theta, RopeScaling(kind, factor, LENGTH))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() / wanted.double() - 1).abs().max())


@given(theta=st.floats(2.0, 1e7), width=st.sampled_from([2, 4, 16, 80, 128]))
def test_without_scaling_frequencies_are_powers_of_theta(theta: float, width: int) -> None:
    """Bug: exponents over R/2 instead of R, or frequencies of another dtype."""
    found = inverse_frequencies(width, theta)
    assert found.dtype == torch.float32
    wanted = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    assert relative_error(found, wanted) < EXACT


def test_frequencies_are_float32_whatever_the_default_is() -> None:
    """Bug: under a default dtype of bfloat16, as loaders of large models set it, frequencies are bfloat16."""
    wanted = inverse_frequencies(R, 10000.0, RopeScaling("yarn", 4.0, LENGTH))
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found = inverse_frequencies(R, 10000.0, RopeScaling("yarn", 4.0, LENGTH))
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted), dtype


@KINDS
@given(theta=THETAS, factor=FACTORS)
def test_scaling_is_its_formula(kind: str, theta: float, factor: float) -> None:
    """Bug: a ramp the wrong way round, a factor where its inverse belongs, an exponent off by two."""
    wanted = torch.tensor([FORMULAS[kind](i, theta, factor) for i in range(R // 2)], dtype=torch.float64)
    assert relative_error(scaled(kind, theta, factor), wanted) < 2 * EXACT


@given(theta=THETAS, factor=st.integers(2, 32), step=st.integers(1, 200))
def test_linear_moves_positions_closer(theta: float, factor: int, step: int) -> None:
    """Bug: position p at factor f is not position p / f."""
    plain = GPTConfig(n_head=1, n_embd=R, pos="rope", rope_theta=theta)
    stretched = plain.with_(rope_scaling=RopeScaling("linear", float(factor)))
    near = angles(torch.tensor([step]), plain, torch.float64)
    far = angles(torch.tensor([step * factor]), stretched, torch.float64)
    assert float((near.cos - far.cos).abs().max()) < step * 2**-23
    assert float((near.sin - far.sin).abs().max()) < step * 2**-23


@given(theta=THETAS, factor=FACTORS)
def test_ntk_spares_the_fastest_and_slows_the_slowest_by_the_factor(theta: float, factor: float) -> None:
    """Bug: the base is multiplied by the factor itself, and the slowest pair is slowed by less."""
    slowing = inverse_frequencies(R, theta).double() / scaled("ntk", theta, factor).double()
    assert slowing[0] == 1.0
    assert float(slowing[-1]) == pytest.approx(factor, rel=2 * EXACT)
    assert bool((slowing.diff() >= -EXACT * factor).all())


@pytest.mark.parametrize(("kind", "often", "seldom"), [("yarn", 32.0, 1.0), ("llama3", 4.0, 1.0)])
@given(theta=st.sampled_from([10000.0, 500000.0]), factor=st.floats(1.5, 64.0))
def test_fast_pairs_stay_and_slow_pairs_are_slowed(
    kind: str, often: float, seldom: float, theta: float, factor: float
) -> None:
    """Bug: the pairs that tell near positions apart are touched, or those that never came round are not."""
    plain, found = inverse_frequencies(R, theta), scaled(kind, theta, factor)
    counts = [turns(i, theta) for i in range(R // 2)]
    assert counts[0] > often
    assert counts[-1] < seldom
    for i, count in enumerate(counts):
        if count > often * (1 + EXACT):
            assert found[i] == plain[i], i
        elif count < seldom * (1 - EXACT):
            assert found[i] == plain[i] / factor, i
    slowing = plain.double() / found.double()
    assert bool((slowing.diff() >= -EXACT * factor).all())
    assert bool(((slowing > 1.01) & (slowing < 0.99 * factor)).any()), "no pair lies between"


@given(factor=FACTORS)
def test_only_yarn_sharpens_attention(factor: float) -> None:
    """Bug: the factor is taken once too often, on another kind, or on the numbers of cos and not of sin."""
    for kind in SCALINGS:
        scaling = RopeScaling(kind, factor, LENGTH)
        wanted = 0.1 * math.log(factor) + 1 if kind == "yarn" else 1.0
        assert attention_factor(scaling) == pytest.approx(wanted, rel=1e-12)
        config = GPTConfig(n_head=1, n_embd=R, pos="rope", rope_scaling=scaling)
        rotation = angles(torch.arange(50), config, torch.float64)
        square = rotation.cos**2 + rotation.sin**2
        assert float((square - wanted**2).abs().max()) < 1e-12
    assert attention_factor(None) == 1.0
    assert attention_factor(RopeScaling("yarn", 4.0, LENGTH, attention_factor=0.7)) == 0.7
    assert attention_factor(RopeScaling("linear", 4.0, LENGTH, attention_factor=0.7)) == 1.0


@KINDS
def test_factor_1_is_no_scaling(kind: str) -> None:
    """Bug: switching a scaling on and not using it changes a trained model."""
    for theta in (100.0, 10000.0):
        assert relative_error(scaled(kind, theta, 1.0), inverse_frequencies(R, theta)) < 2**-23
    assert attention_factor(RopeScaling(kind, 1.0, LENGTH)) == 1.0


@KINDS
def test_a_single_pair_can_be_scaled(kind: str) -> None:
    """Bug: NTK's exponent R / (R - 2) divides by zero where only two numbers turn."""
    wanted = 0.25 if kind == "linear" else 1.0
    assert scaled(kind, 10000.0, 4.0, width=2).tolist() == [wanted]


@pytest.mark.parametrize("length", [1, 6, 16, 128])
def test_short_trained_lengths_leave_finite_frequencies(length: int) -> None:
    """Bug: with a length that no pair turns beta_fast times in, YaRN's limits meet, and the ramp is 0/0."""
    for kind in SCALINGS:
        for width in (2, 8, 32):
            found = inverse_frequencies(width, 10000.0, RopeScaling(kind, 4.0, length))
            plain = inverse_frequencies(width, 10000.0)
            assert bool(((found >= plain / 4 * (1 - EXACT)) & (found <= plain * (1 + EXACT))).all()), (kind, width)


THEIRS = [
    RopeScaling("linear", 4.0, 256),
    RopeScaling("yarn", 4.0, 256),
    RopeScaling("yarn", 40.0, 512, beta_fast=16.0, beta_slow=2.0),
    RopeScaling("yarn", 2.0, 256, attention_factor=1.2),
    RopeScaling("llama3", 8.0, 256),
    RopeScaling("llama3", 32.0, 128, low_freq_factor=2.0, high_freq_factor=3.0),
]


@pytest.mark.parametrize("scaling", THEIRS, ids=lambda s: f"{s.kind} {s.factor}")
@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_transformers_computes_the_same_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling, record_property: Callable[[str, object], None]
) -> None:
    """Bug: a formula read from a paper, and not as the weights that people have were made with it."""
    words = rope_parameters(theta, scaling)
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=8192, rope_parameters=words
    )
    wanted, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config)
    error = relative_error(inverse_frequencies(head_dim, theta, scaling), wanted)
    record_property("relative error", error)
    assert error < EXACT
    assert attention_factor(scaling) == pytest.approx(factor, rel=1e-12)
    other = replace(scaling, factor=scaling.factor * 1.01)
    assert relative_error(inverse_frequencies(head_dim, theta, other), wanted) > 100 * EXACT


def test_impossible_widths_and_missing_lengths_are_refused() -> None:
    """Bug: an odd width loses a number in silence; a missing length becomes a TypeError deep in a formula."""
    for width in (-2, 0, 3):
        with pytest.raises(ValueError, match=f"rotary_dim is {width}; .* an even number of at least 2"):
            inverse_frequencies(width, 10000.0)
    for kind in ("yarn", "llama3"):
        with pytest.raises(ValueError, match=f"{kind} scaling needs original_block_size, the length of training"):
            inverse_frequencies(8, 10000.0, RopeScaling(kind, 2.0))
    assert torch.isfinite(inverse_frequencies(8, 10000.0, RopeScaling("ntk", 2.0))).all()


def test_all_problems_of_a_scaling_are_listed_at_once() -> None:
    """Bug: the check stops at the first problem."""
    with pytest.raises(ValueError, match="RopeScaling") as error:
        RopeScaling("dynamic", 0.5, 0, low_freq_factor=4.0, beta_fast=-1.0, attention_factor=0.0)
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  - kind is 'dynamic'; it must be one of linear, ntk, yarn, llama3",
        "  - factor is 0.5; it must be at least 1",
        "  - original_block_size is 0; it must be a whole number of at least 1",
        "  - low_freq_factor is 4.0 and high_freq_factor 4.0; they must be positive, the first smaller",
        "  - beta_slow is 1.0 and beta_fast -1.0; they must be positive, the first smaller",
        "  - attention_factor is 0.0; it must be greater than 0, or None",
    ]


@pytest.mark.parametrize("factor", [float("nan"), math.inf, -2.0, "4", True, None])
def test_a_factor_that_is_no_number_is_refused(factor: object) -> None:
    """Bug: a factor read from JSON as a string, or NaN, which no comparison refuses, reaches the frequencies."""
    with pytest.raises(ValueError, match=r"factor is .*; it must be at least 1"):
        RopeScaling("linear", factor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rope_theta": 1.0}, r"rope_theta is 1\.0; it must be greater than 1, such as 10000\.0"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"rope_layout": "gguf"}, "rope_layout is 'gguf'; it must be one of half, interleaved"),
        ({"rope_fraction": 0.0}, r"rope_fraction is 0\.0; it must lie in \(0, 1\]"),
        ({"rope_fraction": 1.5}, r"rope_fraction is 1\.5"),
        ({"rope_fraction": 0.1}, r"rope_fraction 0\.1 of head_dim 8 are 0 numbers; .* even number of at least 2"),
        ({"rope_fraction": 0.4}, r"rope_fraction 0\.4 of head_dim 8 are 3 numbers"),
        ({"n_head": 32}, r"rope_fraction 1\.0 of head_dim 1 are 1 numbers"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be a RopeScaling, or None"),
        ({"rope_scaling": {"kind": "linear"}}, "rope_scaling is {'kind': 'linear'}; it must be a RopeScaling"),
        ({"pos": "learned", "rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling is set and pos is 'learned'"),
        ({"block_size": 0, "rope_scaling": RopeScaling("linear", 2.0)}, "GPTConfig:\n  - block_size is 0"),
    ],
)
def test_impossible_rotary_settings_are_refused(changes: dict[str, Any], problem: str) -> None:
    """Bug: a bad setting fails later, inside torch, or in silence turns nothing."""
    with pytest.raises(ValueError, match=problem):
        GPTConfig(**{"n_head": 4, "n_embd": 32, "pos": "rope", **changes})


@KINDS
def test_a_scaled_config_survives_json(kind: str) -> None:
    """Bug: scaling comes back from a checkpoint as a dict, or as the default."""
    config = GPTConfig(pos="rope", rope_scaling=RopeScaling(kind, 3.0, 77, 2.0, 5.0, 3.0, 16.0, 1.5))
    back = GPTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert isinstance(back.rope_scaling, RopeScaling)


def test_an_unknown_field_of_a_scaling_is_named() -> None:
    """Bug: a scaling of a newer version ends in a TypeError about arguments, or the field is dropped in silence."""
    values = GPTConfig(pos="rope", rope_scaling=RopeScaling("yarn", 4.0)).to_dict()
    values["rope_scaling"]["truncate"] = False
    with pytest.raises(ValueError, match=r"no field rope_scaling\.truncate; written by a newer version"):
        GPTConfig.from_dict(values)


def test_the_trained_length_is_the_block_size_until_that_grows() -> None:
    """Bug: a longer block_size moves the trained length along, and the scaling then scales by the wrong turns."""
    config = GPTConfig(pos="rope", block_size=512, rope_scaling=RopeScaling("yarn", 4.0))
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 512)
    assert config.with_(block_size=2048).rope_scaling == RopeScaling("yarn", 4.0, 512)
    assert GPTConfig(pos="rope", rope_scaling=RopeScaling("yarn", 4.0, 99)).rope_scaling == RopeScaling("yarn", 4.0, 99)
