"""Heads x positions x window x sinks x pattern of layers: each variant must be the same function however it is run.

Legend: B batch, T positions, C model width, V vocabulary.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from variants import (
    BASE,
    CHUNKINGS,
    FEW,
    VARIANTS,
    T,
    assert_cache_changes_nothing,
    assert_is_plain_attention_with_copied_keys,
    assert_only_distance_counts,
    assert_sees_what_it_should,
    in_chunks,
    name_of,
    shift_error,
    token_ids,
)

from gpt2course import GPT, GPTConfig
from gpt2course.config import RopeScaling
from gpt2course.masks import left_padded_positions

Lively = Callable[..., GPT]
Worst = Callable[[str, float], None]
every_variant = pytest.mark.parametrize("config", VARIANTS, ids=name_of)
windowed_too = pytest.mark.parametrize("config", FEW, ids=name_of)


@every_variant
def test_the_cache_changes_no_logit(lively: Lively, worst: Worst, config: GPTConfig) -> None:
    """Bug: a prefill longer than the window, a chunk over its border, padding or a decoded token gives other logits."""
    model = lively(config)
    for i, chunks in enumerate(CHUNKINGS):
        worst("cache, float64", assert_cache_changes_nothing(model, chunks))
        worst("cache, float64", assert_cache_changes_nothing(model, chunks, lengths=(T, 5), given=i % 2 == 0))


@windowed_too
def test_in_float32_too(lively: Lively, worst: Worst, config: GPTConfig) -> None:
    """Bug: exact in float64 only: a dtype that is mixed, a rotation in half precision."""
    model = lively(config, torch.float32)
    for chunks in CHUNKINGS:
        for lengths in (None, (T, 5)):
            worst("cache, float32", assert_cache_changes_nothing(model, chunks, lengths))


@st.composite
def configs(draw: st.DrawFn) -> GPTConfig:
    """Any model at all, small."""
    G, group, D = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6, 8]))
    window = draw(st.none() | st.integers(1, 14))
    scaling = st.builds(
        RopeScaling, st.sampled_from(["linear", "ntk", "yarn", "llama3"]), st.floats(1, 8), st.integers(4, 64)
    )
    rope = {
        "rope_theta": draw(st.floats(2, 1e4)),
        "rope_fraction": draw(st.integers(1, D // 2)) * 2 / D,
        "rope_layout": draw(st.sampled_from(["half", "interleaved"])),
        "rope_scaling": draw(st.none() | scaling),
    }
    pos = draw(st.sampled_from(["learned", "rope"]))
    return GPTConfig(
        n_layer=draw(st.integers(1, 4)),
        n_head=G * group,
        n_kv_head=G,
        n_embd=G * group * D,
        block_size=16,
        vocab_size=31,
        pos=pos,
        window=window,
        window_pattern=draw(st.text("SL", min_size=1, max_size=4)) if window else "S",
        sinks=draw(st.integers(0, 5)) if window else 0,
        bias=draw(st.booleans()),
        attention_backend=draw(st.sampled_from(["auto", "reference", "sdpa", *(["blocked"] if window else [])])),
        **(rope if pos == "rope" else {}),
    )


@st.composite
def compositions(draw: st.DrawFn) -> list[int]:
    """Any number of tokens up to 16, cut in any way."""
    total = draw(st.integers(1, 16))
    cuts = draw(st.sets(st.integers(1, max(1, total - 1)))) if total > 1 else set()
    return [b - a for a, b in pairwise([0, *sorted(cuts), total])]


@settings(max_examples=150)
@given(config=configs(), chunks=compositions(), data=st.data())
def test_any_model_any_chunks_any_padding(
    lively: Lively, worst: Worst, config: GPTConfig, chunks: list[int], data: st.DataObject
) -> None:
    """Bug: two options that nobody tried together."""
    rows = st.lists(st.integers(1, sum(chunks)), min_size=1, max_size=3)
    lengths, given_positions = data.draw(st.none() | rows), data.draw(st.booleans())
    worst("cache, anything", assert_cache_changes_nothing(lively(config), chunks, lengths, given_positions))


@every_variant
def test_each_query_sees_what_it_should_by_gradient(lively: Lively, config: GPTConfig) -> None:
    """Bug: a future token, or one beyond the window, leaks into a prediction by ever so little, or a sink is lost."""
    for backend in ("reference", "sdpa", "auto"):
        assert_sees_what_it_should(lively(config.with_(attention_backend=backend)))


@pytest.mark.parametrize("pos", ["learned", "rope"])
@pytest.mark.parametrize(("n_layer", "window"), [(1, 4), (2, 3), (3, 3), (4, 2), (3, 1)])
def test_layers_of_windows_reach_further(lively: Lively, n_layer: int, window: int, pos: str) -> None:
    """Bug: the chapter's formula: L layers of W keys let the last query depend on L (W - 1) + 1 tokens."""
    model = lively(BASE.with_(n_layer=n_layer, window=window, pos=pos))
    inputs: list[Tensor] = []
    model.drop.register_forward_hook(lambda _module, _args, out: inputs.append(out))
    logits_BTV = model(token_ids(model.config, 1))
    (grad_BTC,) = torch.autograd.grad(logits_BTV[0, -1].pow(2).sum(), inputs[0])
    reach = n_layer * (window - 1) + 1
    assert reach < T
    assert grad_BTC[0].abs().sum(dim=-1).gt(0).tolist() == [False] * (T - reach) + [True] * reach


@every_variant
@torch.no_grad()
def test_a_padded_batch_is_each_row_alone(lively: Lively, worst: Worst, config: GPTConfig) -> None:
    """Bug: padding is seen, moves the tokens after it to other positions, or is taken for a sink."""
    model, lengths = lively(config), (T, 5, 1, 9)
    idx_BT = token_ids(config, len(lengths))
    pos_BT = left_padded_positions(torch.tensor(lengths), T)
    logits_BTV = model(idx_BT, pos_BT=pos_BT)
    for row, n in enumerate(lengths):
        alone = model(idx_BT[row : row + 1, T - n :])[0]
        error = float((logits_BTV[row, T - n :] - alone).abs().max())
        assert error < 1e-12
        worst("left padding", error)
    assert torch.isfinite(logits_BTV).all()


def loss_and_gradients(model: GPT, idx_BT: Tensor, pos_BT: Tensor | None) -> list[Tensor]:
    loss = model(idx_BT[:, :-1], idx_BT[:, 1:], pos_BT=pos_BT)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize(
    ("config", "lengths"),
    [(c, None) for c in VARIANTS] + [(c, (19, 6)) for c in FEW],
    ids=lambda x: name_of(x) if isinstance(x, GPTConfig) else None,
)
def test_all_backends_agree(lively: Lively, worst: Worst, config: GPTConfig, lengths: tuple[int, int] | None) -> None:
    """Bug: a fast path with another band, without its sinks, or right forward and wrong backward."""
    width = 19  # longer than the short windows and no multiple of any
    idx_BT = token_ids(config, 2, width + 1)
    pos_BT = None if lengths is None else left_padded_positions(torch.tensor(lengths), width)
    wanted = loss_and_gradients(lively(config.with_(attention_backend="reference")), idx_BT, pos_BT)
    for backend in ("sdpa", "auto", *(["blocked"] if config.window else [])):
        found = loss_and_gradients(lively(config.with_(attention_backend=backend)), idx_BT, pos_BT)
        error = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
        assert error < 1e-12, backend
        worst("backends, loss and gradients", error)


@every_variant
def test_grouped_queries_are_plain_attention_with_copied_keys(lively: Lively, worst: Worst, config: GPTConfig) -> None:
    """Bug: query heads read another group's keys; with one key head for each, or one for all, another path is taken."""
    worst("grouped queries as plain attention", assert_is_plain_attention_with_copied_keys(lively(config)))


@pytest.mark.parametrize("window", [None, 1, 3, T, T + 5])
@torch.no_grad()
def test_plain_attention_is_torchs_own(lively: Lively, worst: Worst, window: int | None) -> None:
    """Bug: right by our own other path, and wrong by torch.nn.MultiheadAttention."""
    config = BASE.with_(n_layer=1, window=window)
    model = lively(config)
    ours = model.h[0].attn
    theirs = nn.MultiheadAttention(config.n_embd, config.n_head, batch_first=True, dtype=torch.float64).eval()
    state = {"in_proj_weight": ours.c_attn.weight, "in_proj_bias": ours.c_attn.bias}
    theirs.load_state_dict(state | {f"out_proj.{name}": p for name, p in ours.c_proj.named_parameters()})
    hidden_TT = ~torch.ones(T, T, dtype=torch.bool).tril()
    if window is not None:
        hidden_TT |= torch.ones(T, T, dtype=torch.bool).tril(-window)
    seen: list[tuple[Tensor, Tensor]] = []
    ours.register_forward_hook(lambda _module, args, out: seen.append((args[0], out)))
    model(token_ids(config, 2))
    x_BTC, y_BTC = seen[0]
    error = float((theirs(x_BTC, x_BTC, x_BTC, attn_mask=hidden_TT, need_weights=False)[0] - y_BTC).abs().max())
    assert error < 1e-12
    worst("torch.nn.MultiheadAttention", error)


@pytest.mark.parametrize("pos", ["learned", "rope"])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("G", [4, 2, 1])
@torch.no_grad()
def test_a_window_as_long_as_the_text_is_no_window(lively: Lively, worst: Worst, G: int, sinks: int, pos: str) -> None:
    """Bug: window >= T differs from full attention: off by one at W = T, or a ring that loses the first key."""
    config = BASE.with_(n_kv_head=G, pos=pos)
    idx_BT = token_ids(config, 2)
    full = lively(config)(idx_BT)
    assert (lively(config.with_(window=T - 1))(idx_BT) - full).abs().max() > 1e-6
    for window in (T, T + 1, 10 * T):
        model = lively(config.with_(window=window, sinks=sinks))
        for logits_BTV in (model(idx_BT), in_chunks(model, idx_BT, [5, 6, 1])):
            error = float((logits_BTV - full).abs().max())
            assert error < 1e-12
            worst("window >= T against full", error)


@pytest.mark.parametrize("config", [c for c in VARIANTS if c.pos == "rope" and not c.sinks], ids=name_of)
def test_with_rotary_positions_only_distance_counts(lively: Lively, worst: Worst, config: GPTConfig) -> None:
    """Bug: values are turned too, queries and keys by unlike angles, or a ring that looks for position 0."""
    model = lively(config)
    for shift in (1, 7, 1000):
        worst("RoPE, positions shifted", assert_only_distance_counts(model, shift))
        worst("RoPE, positions shifted, cache", assert_cache_changes_nothing(model, [5, 1, 6], shift=shift))


def test_learned_positions_are_places(lively: Lively) -> None:
    """Bug: a check of distances that nothing can fail."""
    assert shift_error(lively(BASE), 1) > 1e-3
    assert shift_error(lively(BASE.with_(pos="rope", window=3, sinks=2)), 3) > 1e-6  # the sinks are places as well


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10.0},
        {"rope_fraction": 0.5},
        {"rope_layout": "interleaved"},
        {"rope_scaling": RopeScaling("linear", 4.0)},
        {"rope_scaling": RopeScaling("ntk", 4.0)},
        {"rope_scaling": RopeScaling("yarn", 4.0, attention_factor=1.0)},
        {"rope_scaling": RopeScaling("yarn", 1.0, attention_factor=1.3)},
        {"rope_scaling": RopeScaling("llama3", 4.0)},
        {"window": T - 1},
        {"window": T - 2, "sinks": 1},
        {"window": T - 1, "window_pattern": "LS"},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_option_reaches_the_arithmetic(lively: Lively, changes: dict[str, object]) -> None:
    """Bug: an option that is checked, stored, and never read."""
    config = BASE.with_(pos="rope")
    changed = config.with_(**changes)
    idx_BT = token_ids(config, 1)
    model, other = lively(config), lively(changed)
    assert (model(idx_BT) - other(idx_BT)).abs().max() > 1e-6
