"""The trace of a forward pass: every layer's result, in order, unchanged by being looked at."""

from collections.abc import Callable
from pathlib import Path

import peers
import pytest
import torch

from gpt2course import GPT, GPTConfig
from gpt2course.masks import left_padded_positions
from gpt2course.pretrained import load_checkpoint
from gpt2course.trace import differences, trace

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=12, vocab_size=17)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def test_the_names_come_in_the_order_of_computation(model: GPT) -> None:
    """A microscope that names the first wrong layer by dictionary order, not by what was computed first."""
    attention = ["ln_1", "attn.c_attn", "attn.weights", "attn.c_proj", "attn"]
    mlp = ["ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj", "mlp"]
    blocks = [f"h.{i}.{name}".removesuffix(".") for i in range(2) for name in [*attention, *mlp, ""]]
    assert list(trace(model, torch.zeros(1, 3, dtype=torch.long))) == ["wte", "wpe", *blocks, "ln_f", "lm_head"]


def test_the_residual_stream_adds_up(model: GPT) -> None:
    """A name that holds another layer's result."""
    found = trace(model, torch.randint(17, (2, 5)))
    start = found["wte"] + found["wpe"]
    torch.testing.assert_close(found["h.0.ln_1"], model.h[0].ln_1(start))
    torch.testing.assert_close(found["h.0"], start + found["h.0.attn"] + found["h.0.mlp"])
    torch.testing.assert_close(found["h.1"], found["h.0"] + found["h.1.attn"] + found["h.1.mlp"])


def test_without_a_position_table_there_is_no_such_name() -> None:
    """A trace that fails, or names a table, where positions are turned."""
    found = trace(GPT(CONFIG.with_(pos="rope")), torch.zeros(1, 3, dtype=torch.long))
    assert list(found)[:2] == ["wte", "h.0.ln_1"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_head": 1},
        {"window": 2},
        {"pos": "rope"},
        {"pos": "rope", "n_kv_head": 1, "rope_layout": "interleaved"},
        {"pos": "rope", "window": 2, "sinks": 1, "window_pattern": "SL"},
    ],
    ids=str,
)
def test_the_attention_weights_are_those_that_were_used(
    lively: Callable[..., GPT], changes: dict[str, int | str]
) -> None:
    """Weights drawn in a chapter that are not the model's own: another mask, other heads, keys that were not turned."""
    model = lively(CONFIG.with_(**changes), torch.float32)
    idx_BT = torch.randint(17, (3, 6))
    found = trace(model, idx_BT)
    for i, block in enumerate(model.h):
        _, _, v_BGTD = block.attn.qkv(found[f"h.{i}.ln_1"])
        v_BHTD = v_BGTD.repeat_interleave(2 // v_BGTD.shape[1], dim=1)
        y_BTC = (found[f"h.{i}.attn.weights"] @ v_BHTD).transpose(1, 2).reshape(3, 6, 8)
        torch.testing.assert_close(block.attn.c_proj(y_BTC), found[f"h.{i}.attn"])


def test_left_padding_is_seen_in_the_weights(model: GPT) -> None:
    """Padding drawn as if it were attended to."""
    pos_BT = left_padded_positions(torch.tensor([2, 4]), 4)
    weights_BHTS = trace(model, torch.randint(17, (2, 4)), pos_BT)["h.1.attn.weights"]
    assert torch.equal(weights_BHTS[0, :, :, :2], torch.zeros(2, 4, 2))
    torch.testing.assert_close(weights_BHTS[0, :, 2:].sum(-1), torch.ones(2, 2))


def test_attention_weights_equal_transformers(tmp_path: Path) -> None:
    """Our own recomputation could repeat our own mistake; this one is somebody else's."""
    peer = peers.random_peer(attn_implementation="eager")
    model = load_checkpoint(peers.write_folder(tmp_path, peer))
    idx_BT = peers.token_ids(peer)
    with torch.no_grad():
        theirs = peer(idx_BT, output_attentions=True).attentions
    found = trace(model, idx_BT)
    for i, weights_BHTS in enumerate(theirs):
        torch.testing.assert_close(found[f"h.{i}.attn.weights"], weights_BHTS, atol=1e-5, rtol=0)


def test_looking_changes_nothing(model: GPT) -> None:
    """A trace that leaves hooks behind, drops at random, or leaves a training model in eval mode."""
    model = GPT(CONFIG.with_(dropout=0.5)).train()
    idx_BT = torch.randint(17, (1, 5))
    first, second = trace(model, idx_BT), trace(model, idx_BT)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert set(differences(first, second).values()) == {0.0}
    assert torch.equal(model.eval()(idx_BT), first["lm_head"])


def test_hooks_are_removed_when_the_model_fails(model: GPT) -> None:
    """One bad prompt, and the model is slow and full of hooks for the rest of the session."""
    with pytest.raises(ValueError, match="block_size"):
        trace(model, torch.zeros(1, 13, dtype=torch.long))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_first_difference_is_where_the_weight_was_changed(model: GPT) -> None:
    """A parity microscope that blames a layer before, or after, the one with the wrong tensor."""
    idx_BT = torch.randint(17, (2, 5))
    good = trace(model, idx_BT)
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight += 0.1
    errors = differences(trace(model, idx_BT), good)
    assert next(name for name, error in errors.items() if error > 0) == "h.1.mlp.c_fc"
    with pytest.raises(ValueError, match=r"only one of the two.*h\.1"):
        differences(good, trace(GPT(CONFIG.with_(n_layer=1)), idx_BT))


def test_a_block_in_training_mode_stays_so(model: GPT) -> None:
    """Bug: looking puts every part into the mode of the whole."""
    model.eval()
    model.h[0].train()
    trace(model, torch.tensor([[1, 2]]))
    assert [block.training for block in model.h] == [True] + [False] * (len(model.h) - 1)
