import dataclasses
import json

import pytest

from gpt2course import PRESETS, GPTConfig


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
    with pytest.raises(ValueError, match="no field rope_scaling"):
        GPTConfig.from_dict(GPTConfig().to_dict() | {"rope_scaling": 2.0})
