"""Surgery: exact where it claims to be exact, honest where it is not, and the given model stays as it was.

Legend: B batch, T positions, C model width, H query heads, G key/value heads, D head width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2course import GPT, GPTConfig
from gpt2course.config import RopeScaling
from gpt2course.kv_cache import cache_bytes
from gpt2course.surgery import KVCost, to_gqa, to_rope, to_window

Lively = Callable[..., GPT]
CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=97)


def ids(T: int = 24, B: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def logits(model: GPT, idx_BT: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids() if idx_BT is None else idx_BT)


def equal_heads(model: GPT, group: int) -> GPT:
    """The model with every key/value head of a group replaced by the group's first."""
    H, D = model.config.n_head, model.config.head_dim
    with torch.no_grad():
        for block in model.h:
            for tensor in (block.attn.c_attn.weight, block.attn.c_attn.bias):
                for first_row in (H * D, 2 * H * D):
                    heads = tensor[first_row : first_row + H * D].unflatten(0, (H // group, group, D))
                    heads.copy_(heads[:, :1].clone().expand_as(heads))
    return model


def by_loop(model: GPT, G: int, method: str) -> dict[str, Tensor]:
    """Grouped c_attn weights and biases of plain multi-head attention, one head at a time."""
    H, D = model.config.n_head, model.config.head_dim
    made = {}
    for layer, block in enumerate(model.h):
        for kind in ("weight", "bias"):
            tensor = getattr(block.attn.c_attn, kind).detach()
            rows = [tensor[: H * D]]
            for part in (1, 2):
                for g in range(G):
                    members = [h for h in range(H) if h // (H // G) == g]
                    heads = [tensor[(part * H + h) * D : (part * H + h + 1) * D] for h in members]
                    rows.append(sum(heads) / len(heads) if method == "mean" else heads[0])
            made[f"h.{layer}.attn.c_attn.{kind}"] = torch.cat(rows)
    return made


@pytest.mark.parametrize("method", ["mean", "first"])
def test_as_many_heads_as_before_is_the_identity(lively: Lively, method: str) -> None:
    """A pooling that mixes heads, or rounds, when there is nothing to pool."""
    model = lively(CONFIG)
    new, report = to_gqa(model, 4, method)
    assert torch.equal(logits(new), logits(model))
    assert report.before == report.after


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("G", [2, 1])
def test_pooling_equal_heads_is_exact(lively: Lively, method: str, G: int) -> None:
    """Grouping by stride instead of side by side, key rows mistaken for value rows, biases left behind."""
    model = equal_heads(lively(CONFIG), group=4 // G)
    new, _ = to_gqa(model, G, method)
    assert new.config.kv_heads == G
    assert (logits(new) - logits(model)).abs().max() < 1e-12


def test_grouping_by_stride_would_be_seen(lively: Lively) -> None:
    """The mutant: heads 0 and 2 in one group. On equal neighbours it must not be exact, or the test above is blind."""
    model = equal_heads(lively(CONFIG), group=2)
    new, _ = to_gqa(model, 2)
    H, D = 4, CONFIG.head_dim
    with torch.no_grad():
        for old_block, block in zip(model.h, new.h, strict=True):
            for kind in ("weight", "bias"):
                q, *kv = getattr(old_block.attn.c_attn, kind).split(H * D)
                pooled = [part.unflatten(0, (2, 2, D)).mean(0).flatten(0, 1) for part in kv]
                getattr(block.attn.c_attn, kind).copy_(torch.cat([q, *pooled]))
    assert (logits(new) - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("G", [2, 1])
def test_pooling_is_the_loop_over_heads(lively: Lively, method: str, G: int) -> None:
    """A mean over the wrong axis; "first" that takes the last; anything but c_attn touched."""
    model = lively(CONFIG)
    new, _ = to_gqa(model, G, method)
    wanted, state = by_loop(model, G, method), new.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], wanted.get(name, tensor), rtol=0, atol=1e-14)


def test_pooling_twice_is_pooling_once(lively: Lively) -> None:
    """A model with grouped heads split as if it had all of them."""
    model = lively(CONFIG)
    twice, _ = to_gqa(to_gqa(model, 2)[0], 1)
    assert (logits(twice) - logits(to_gqa(model, 1)[0])).abs().max() < 1e-12


@pytest.mark.parametrize("window", [32, 100])
def test_a_window_as_long_as_the_text_hides_nothing(lively: Lively, window: int) -> None:
    """W against W + 1, or weights that changed on the way."""
    model = lively(CONFIG)
    new, report = to_window(model, window)
    assert (logits(new, ids(32)) - logits(model, ids(32))).abs().max() < 1e-12
    assert "within it the window hides nothing" in str(report)


def test_a_window_hides_what_lies_further_back(lively: Lively) -> None:
    """A config that is changed where no layer looks. Two layers of 4 keys see 7 tokens; a sink is always seen."""
    model = lively(CONFIG)
    a_BT = ids(24, B=1)
    b_BT = a_BT.clone()
    b_BT[0, 10] = (b_BT[0, 10] + 1) % CONFIG.vocab_size
    new, report = to_window(model, 4)
    change_T = (logits(new, a_BT) - logits(new, b_BT)).abs().amax((0, 2))
    assert (change_T > 0).nonzero().flatten().tolist() == list(range(10, 17))
    assert "2 x 3 = 6 tokens" in str(report)
    c_BT = a_BT.clone()
    c_BT[0, 0] = (c_BT[0, 0] + 1) % CONFIG.vocab_size
    sunk, _ = to_window(model, 4, sinks=1)
    assert ((logits(sunk, a_BT) - logits(sunk, c_BT)).abs().amax((0, 2)) > 0).all()


def test_softmax_does_not_see_the_row_added_to_all_embeddings(lively: Lively) -> None:
    """A head that changes with its tied embedding. For the same hidden states the probabilities must be the same."""
    model = lively(CONFIG)
    new, report = to_rope(model)
    mean_C = model.wpe.weight.mean(0)
    assert torch.allclose(new.wte.weight, model.wte.weight + mean_C, rtol=0, atol=1e-14)
    assert new.lm_head.weight is new.wte.weight
    h_BTC = model.hidden(ids())
    old_BTV, new_BTV = model.lm_head(h_BTC), new.lm_head(h_BTC)
    shift_BTV = new_BTV - old_BTV
    assert shift_BTV.abs().max() > 0.01
    assert (shift_BTV - shift_BTV[..., :1]).abs().max() < 1e-12
    assert (new_BTV.softmax(-1) - old_BTV.softmax(-1)).abs().max() < 1e-12
    assert f"length {mean_C.norm().item():.3g}" in str(report)


def test_a_table_of_equal_rows_can_be_left_out(lively: Lively) -> None:
    """The average position vector lost. Where no row differs and nothing turns, surgery must change no probability."""
    model = lively(CONFIG)
    with torch.no_grad():
        model.wpe.weight.copy_(model.wpe.weight[:1].clone().expand_as(model.wpe.weight))
    new, report = to_rope(model, theta=1e300, fraction=0.25)  # one pair a head, whose frequency is 1 whatever theta is
    assert "0% of its sum of squares" in str(report)
    with torch.no_grad():  # and that pair is made blind: no key has it
        for old_block, block in zip(model.h, new.h, strict=True):
            for attention in (old_block.attn, block.attn):
                for tensor in (attention.c_attn.weight, attention.c_attn.bias):
                    tensor[32:64].unflatten(0, (4, 8))[:, :2] = 0
    assert (logits(new).softmax(-1) - logits(model).softmax(-1)).abs().max() < 1e-12


def test_rope_goes_past_the_table(lively: Lively) -> None:
    """A model with rotary positions in its config that still asks a table."""
    new, report = to_rope(lively(CONFIG), theta=500.0, scaling=RopeScaling("linear", 2.0))
    assert "wpe.weight" not in dict(new.named_parameters())
    assert torch.isfinite(logits(new, ids(50))).all()
    assert new.config.rope_theta == 500.0
    assert new.config.rope_scaling == RopeScaling("linear", 2.0, 32)
    assert report.parameters_before - report.parameters_after == 32 * 32


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_operations_compose_in_any_order(lively: Lively, order: tuple[int, ...]) -> None:
    """An operation that undoes another's config or weights."""
    operations: list[Callable[[GPT], Any]] = [
        lambda m: to_gqa(m, 2),
        lambda m: to_rope(m),
        lambda m: to_window(m, 8, sinks=2, pattern="SL"),
    ]
    model = lively(CONFIG)
    expected, new = model, model
    for operation in operations:
        expected, _ = operation(expected)
    for i in order:
        new, _ = operations[i](new)
    assert (
        new.config == expected.config == CONFIG.with_(n_kv_head=2, pos="rope", window=8, sinks=2, window_pattern="SL")
    )
    assert torch.equal(logits(new), logits(expected))


@pytest.mark.parametrize(
    "operation",
    [lambda m: to_gqa(m, 1), lambda m: to_gqa(m, 4), lambda m: to_window(m, 3), lambda m: to_rope(m)],
    ids=["mqa", "same", "window", "rope"],
)
def test_the_given_model_is_left_as_it_was(lively: Lively, operation: Callable[[GPT], Any]) -> None:
    """A copy that shares memory: healing one model would train the other."""
    model = lively(CONFIG, torch.float32).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_before = torch.get_rng_state()
    new, _ = operation(model)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert new.training
    assert all(p.requires_grad for p in new.parameters())
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.fill_(7.0)
    assert model.config == CONFIG
    assert before.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert {p.dtype for p in new.parameters()} == {torch.float32}
    assert new.lm_head.weight is new.wte.weight


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: to_gqa(m, 3), r"n_kv_head 3 does not divide the 4 key/value heads .* use one of \[1, 2, 4\]"),
        (lambda m: to_gqa(m, 8), "n_kv_head 8 does not divide"),
        (lambda m: to_gqa(m, 0), "n_kv_head 0"),
        (lambda m: to_gqa(m, True), "n_kv_head True"),
        (lambda m: to_gqa(to_gqa(m, 1)[0], 2), r"the 1 key/value heads that the model has; use one of \[1\]"),
        (lambda m: to_gqa(m, 2, "median"), "method is 'median'; it must be mean or first"),
        (lambda m: to_window(m, 0), "window is 0"),
        (lambda m: to_window(m, 4, sinks=-1), "sinks is -1"),
        (lambda m: to_window(m, 4, pattern="LL"), "'LL' gives none of the 2 layers a window"),
        (lambda m: to_window(m, 4, pattern="short"), "window_pattern is 'short'"),
        (lambda m: to_rope(to_rope(m)[0]), "rotary positions already"),
        (lambda m: to_rope(m, fraction=0.1), "rope_fraction 0.1"),
    ],
)
def test_impossible_surgery_says_why(lively: Lively, call: Callable[[GPT], Any], says: str) -> None:
    """A shape error from deep inside torch, or a model that is silently something else."""
    with pytest.raises(ValueError, match=says):
        call(lively(CONFIG))


def test_the_report_has_the_cost_by_the_formula(lively: Lively) -> None:
    """Bytes that leave out the values, the dtype, the sinks or the layers that stay long."""
    model = lively(CONFIG, torch.float32)
    _, report = to_gqa(model, 2)
    assert str(report) == (
        "4 key/value heads -> 2: the mean of each group of 2; 4 query heads as before\n"
        "config       n_kv_head 4 -> 2\n"
        f"parameters   {model.num_params():,} -> {model.num_params() - 2 * 2 * 16 * 33:,}\n"
        "KV cache     512 bytes a token -> 256 bytes a token"
    )
    new, report = to_window(model, 8, sinks=2, pattern="SL")
    assert report.kv_after == KVCost(per_token=256, fixed=256 * 10)
    assert "window of 8 keys in 1 of 2 layers, 2 sinks" in str(report)
    assert "KV cache     512 bytes a token -> 2,560 bytes + 256 bytes a token" in str(report)
    for context in (1, 8, 77):
        assert cache_bytes(new.config, capacity=context) == 2560 + 256 * context
    assert KVCost.of(to_window(model, 8)[0].config, 2) == KVCost(0, 2 * 128 * 8)
