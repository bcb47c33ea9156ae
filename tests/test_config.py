import dataclasses
import json
import math
from typing import Any

import pytest

from gpt2course import PRESETS, GPTConfig
from gpt2course.config import RopeScaling


def test_all_problems_are_listed_at_once() -> None:
    """Bug: the check stops at the first problem, and the user mends a config in five rounds."""
    with pytest.raises(ValueError, match="GPTConfig") as error:
        GPTConfig(n_layer=0, n_embd=770, n_kv_head=5, window=0, dropout=1.0, pos="sine", layer_norm_eps=0.0)
    lines = str(error.value).splitlines()[1:]
    for field in (
        "n_layer 0",
        "n_embd 770",
        "n_kv_head 5",
        "window 0",
        "dropout 1.0",
        "pos 'sine'",
        "layer_norm_eps 0",
    ):
        name, value = field.split()
        assert any(line.startswith(f"  - {name}") and value in line for line in lines), (field, lines)
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 0),
        ("n_layer", 1.5),
        ("n_layer", True),
        ("n_head", -1),
        ("n_kv_head", 24),
        ("n_embd", 100),
        ("block_size", 0),
        ("vocab_size", "50257"),
        ("window", 0),
        ("window", 2.0),
        ("pos", "alibi"),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", float("nan")),
        ("dropout", None),
        ("bias", "no"),
        ("layer_norm_eps", 0.0),
        ("layer_norm_eps", None),
        ("attention_backend", "flash"),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    """Bug: a bad size passes and fails later, inside torch, with a message about shapes."""
    with pytest.raises(ValueError, match=rf"- {field} (is )?{value!r}"):
        GPTConfig(**{field: value})


def test_the_error_says_how_to_mend() -> None:
    """Bug: "must be divisible" leaves the user to find a number that is."""
    with pytest.raises(ValueError, match="try n_embd 12"):
        GPTConfig(n_head=4, n_embd=10)
    with pytest.raises(ValueError, match=r"use one of \[1, 2, 3, 6\]"):
        GPTConfig(n_head=6, n_embd=12, n_kv_head=4)


def test_no_window_and_no_kv_heads_have_their_meaning() -> None:
    """Bug: None reaches the arithmetic of heads."""
    assert GPTConfig(n_head=6, n_embd=12).n_kv_head == 6
    assert GPTConfig(n_head=6, n_embd=12, n_kv_head=2).kv_heads == 2
    assert GPTConfig().window is None
    assert GPTConfig(n_head=6, n_embd=12).head_dim == 2


def test_with_validates_and_leaves_the_original() -> None:
    """Bug: a changed copy skips the check, or the change reaches the preset that everybody shares."""
    base = GPTConfig()
    assert base.with_(window=256).window == 256
    assert base.window is None
    with pytest.raises(ValueError, match="window is 0"):
        base.with_(window=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.n_layer = 3  # type: ignore[misc]


def test_with_n_head_takes_the_kv_heads_along_only_where_they_followed() -> None:
    """Bug: with_(n_head=8) of a plain model leaves 12 key/value heads behind and fails, or drops a chosen number."""
    assert GPTConfig(n_head=12).with_(n_head=8).n_kv_head == 8
    assert GPTConfig(n_head=12, n_kv_head=4).with_(n_head=8).n_kv_head == 4
    assert GPTConfig(n_head=12).with_(n_head=8, n_kv_head=2).n_kv_head == 2


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name: str) -> None:
    """Bug: a config comes back from a checkpoint's JSON changed."""
    config = PRESETS[name].with_(window=7, n_kv_head=1, dropout=0.1, bias=False)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_is_named() -> None:
    """Bug: a field of a newer version is dropped in silence, and the model computes something else."""
    with pytest.raises(ValueError, match="no field alibi_slopes"):
        GPTConfig.from_dict(GPTConfig().to_dict() | {"alibi_slopes": 2.0})


ROPE = GPTConfig(n_layer=6, n_head=4, n_embd=32, block_size=64, vocab_size=97, pos="rope")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1.0}, "rope_theta is 1.0; it must be greater than 1"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_fraction": 0.0}, r"rope_fraction is 0.0; it must lie in \(0, 1\]"),
        ({"rope_fraction": 1.5}, "rope_fraction is 1.5"),
        ({"rope_fraction": 0.4}, "rope_fraction 0.4 of head_dim 8 are 3 numbers; .* an even number of at least 2"),
        ({"rope_fraction": 0.1}, "are 0 numbers"),
        ({"n_embd": 20}, "rope_fraction 1.0 of head_dim 5 are 5 numbers"),
        ({"rope_layout": "mixed"}, "rope_layout is 'mixed'; it must be one of half, interleaved"),
        ({"rope_scaling": 2.0}, "rope_scaling is 2.0; it must be a RopeScaling, or None"),
        ({"rope_scaling": RopeScaling("linear", 2.0), "pos": "learned"}, "scaling needs pos 'rope'"),
        ({"window_pattern": "SSSL"}, "window_pattern is 'SSSL' without a window; give window as well"),
        ({"window": 4, "window_pattern": ""}, "window_pattern is ''; it must be made of S"),
        ({"window": 4, "window_pattern": "sl"}, "window_pattern is 'sl'"),
        ({"window": 4, "window_pattern": None}, "window_pattern is None"),
        ({"sinks": 2}, "sinks is 2 without a window, where every key is visible"),
        ({"window": 4, "sinks": -1}, "sinks is -1; it must be a whole number of at least 0"),
        ({"window": 4, "sinks": True}, "sinks is True"),
        ({"attention_backend": "blocked"}, "'blocked' skips what a window hides, and there is no window"),
        ({"attention_backend": "flex"}, "'flex' skips"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_together_are_refused(changes: dict[str, Any], message: str) -> None:
    """Bug: an option that does nothing in silence, or a size that fails later, deep inside torch."""
    with pytest.raises(ValueError, match=message):
        ROPE.with_(**changes)


def test_all_problems_of_a_scaling_are_listed_at_once() -> None:
    """Bug: "must be positive", once for each try."""
    with pytest.raises(ValueError, match="RopeScaling") as error:
        RopeScaling("long", 0.5, 0, low_freq_factor=4.0, beta_slow=-1.0, attention_factor=0.0)
    for line in ("kind is 'long'", "factor is 0.5", "original_block_size is 0", "low_freq_factor is 4.0 and high_freq"):
        assert f"- {line}" in str(error.value)
    assert len(str(error.value).splitlines()) == 7


@pytest.mark.parametrize("factor", [0, -2.0, math.nan, math.inf, "2", True])
def test_a_factor_that_is_none_is_refused(factor: Any) -> None:
    """Bug: a factor that shortens, or that is no number, turns every angle into nonsense."""
    with pytest.raises(ValueError, match=r"factor is .* it must be at least 1"):
        RopeScaling("linear", factor)


def test_a_scaling_takes_the_length_of_training_from_the_config() -> None:
    """Bug: yarn and llama3 without the trained length, or with that of another model."""
    scaled = ROPE.with_(rope_scaling=RopeScaling("yarn", 4.0))
    assert scaled.rope_scaling == RopeScaling("yarn", 4.0, 64)
    given = ROPE.with_(rope_scaling=RopeScaling("yarn", 4.0, 8192))
    assert given.rope_scaling == RopeScaling("yarn", 4.0, 8192)
    assert GPTConfig.from_dict(json.loads(json.dumps(scaled.to_dict()))) == scaled


@pytest.mark.parametrize(
    ("window", "pattern", "wanted"),
    [
        (None, "S", [None] * 6),
        (4, "S", [4] * 6),
        (4, "L", [None] * 6),
        (4, "SL", [4, None, 4, None, 4, None]),
        (4, "SSSL", [4, 4, 4, None, 4, 4]),
        (4, "LSSSSSSS", [None, 4, 4, 4, 4, 4]),
    ],
)
def test_the_pattern_repeats_over_the_layers(window: int | None, pattern: str, wanted: list[int | None]) -> None:
    """Bug: the pattern is stretched over the layers, starts at 1, or L and S change places."""
    config = ROPE.with_(window=window, window_pattern=pattern)
    assert [config.layer_window(layer) for layer in range(6)] == wanted


@pytest.mark.parametrize(("fraction", "R"), [(1.0, 8), (0.5, 4), (0.25, 2), (0.75, 6)])
def test_the_share_of_a_head_that_is_turned(fraction: float, R: int) -> None:
    """Bug: the share is taken of the model's width, or rounded to an odd number."""
    assert ROPE.with_(rope_fraction=fraction).rotary_dim == R


def test_a_fraction_that_is_exact_is_not_rounded_down() -> None:
    """Bug: 88 x (30 / 88) is 29.999999999999996 in floating point, int() makes it 29, and the model is refused."""
    assert GPTConfig(n_head=1, n_embd=88, pos="rope", rope_fraction=30 / 88).rotary_dim == 30
