"""A sliding window on top of rotary positions and grouped queries, against the Mistral of the transformers library.

Random weights; prompts longer than the window; decoding token by token across it. Mutants are famous bugs, put in on
purpose, that a check must catch.

Legend: B batch, T new positions, S key positions, C model width, H heads, G key/value heads, D head width.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from llama_peers import (
    BF16,
    CAUGHT,
    FP32,
    H,
    fed_in_chunks,
    one_by_one,
    our_config,
    our_outputs,
    our_twin,
    random_peer,
    recorded,
    their_outputs,
    token_ids,
    worst_difference,
    worst_error,
)
from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from gpt2course import GPTConfig, attention, masks, model
from gpt2course.masks import Causal, left_padded_positions
from gpt2course.rope import Rotation, angles, rotate

W, T = 8, 40
CHUNKS: dict[str, Sequence[int] | None] = {
    "whole": None,
    "from a long prompt": one_by_one(20, T),
    "from a prompt of exactly W": one_by_one(W, T),
    "from the first token": one_by_one(1, T),
    "in chunks": [20, 1, 5, 8, 6],
}
Record = Callable[[str, object], None]


def mistral(
    G: int = 2, implementation: str = "eager", dtype: torch.dtype = torch.float32, window: int = W
) -> PreTrainedModel:
    return random_peer(
        MistralForCausalLM, n_kv_head=G, implementation=implementation, dtype=dtype, sliding_window=window
    )


def error(
    peer: PreTrainedModel, config: GPTConfig, chunks: Sequence[int] | None, relative: bool = False, total: int = T
) -> float:
    calls = fed_in_chunks(peer, token_ids(total), chunks)
    return worst_error(our_twin(peer, config), calls, chunks is not None, relative)


@pytest.mark.parametrize("how", CHUNKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("G", [H, H // 2, 1])
def test_the_window_agrees(G: int, implementation: str, how: str, record_property: Record) -> None:
    """Bug: a window of W + 1, a prompt longer than the window that loses it or causality, a ring that has lost a key
    still needed or keeps one too long."""
    peer = mistral(G, implementation)
    calls = fed_in_chunks(peer, token_ids(T), CHUNKS[how])
    backends = ["auto", "reference"] if CHUNKS[how] else ["auto", "reference", "sdpa", "blocked"]
    twins = {backend: our_twin(peer, our_config(peer, attention_backend=backend)) for backend in backends}
    worst = {backend: worst_error(twin, calls, CHUNKS[how] is not None) for backend, twin in twins.items()}
    record_property("worst error", max(worst.values()))
    assert max(worst.values()) < FP32, worst


@pytest.mark.parametrize("how", ["whole", "from a long prompt"])
@pytest.mark.parametrize("window", [2, 3, T - 1, T, 2 * T])
def test_every_size_of_window_agrees(window: int, how: str, record_property: Record) -> None:
    """Bug: a narrow window, or one just as long as the text, is an edge that nobody ran."""
    peer = mistral(implementation="sdpa", window=window)
    worst = error(peer, our_config(peer), CHUNKS[how])
    record_property("worst error", worst)
    assert worst < FP32


@pytest.mark.parametrize("window", [8, 130])
def test_a_prompt_of_several_blocks_agrees(window: int, record_property: Record) -> None:
    """Bug: the blocked path is right in its first block and wrong in the next ones."""
    total = 300
    peer = mistral(implementation="sdpa", window=window)
    config = our_config(peer, attention_backend="blocked")
    worst = {
        "whole": error(peer, config, None, total=total),
        "decode": error(peer, config, one_by_one(total - 5, total), total=total),
    }
    record_property("worst error", max(worst.values()))
    assert max(worst.values()) < FP32, worst


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_their_generate_is_followed_step_by_step(implementation: str, record_property: Record) -> None:
    """Bug: our ring agrees with a loop of our own making, and not with what people call."""
    peer = mistral(implementation=implementation)
    for prompt in (3, 20):
        with recorded(peer) as calls:
            peer.generate(token_ids(prompt), max_new_tokens=20, min_new_tokens=20, do_sample=False)
        assert [call[0][0].shape[1] for call in calls] == [prompt] + 19 * [1]
        worst = worst_error(our_twin(peer, our_config(peer)), calls, with_cache=True)
        record_property(f"worst error, prompt of {prompt}", worst)
        assert worst < FP32, prompt


@pytest.mark.parametrize(("family", "window"), [(LlamaForCausalLM, None), (MistralForCausalLM, W)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_their_generate_on_a_padded_batch_is_followed(
    family: type[PreTrainedModel], window: int | None, implementation: str, record_property: Record
) -> None:
    """Bug: padding is seen, or takes up slots of a row's window. The mutant takes it for text."""
    peer = random_peer(family, n_kv_head=2, implementation=implementation, sliding_window=window)
    pos_BT = left_padded_positions(torch.tensor([20, 6]), 20)
    real_BT = pos_BT >= 0
    with recorded(peer) as calls:
        peer.generate(
            token_ids(20), attention_mask=real_BT.long(), max_new_tokens=16, min_new_tokens=16, do_sample=False
        )

    def on_text(outputs: list[Tensor]) -> list[Tensor]:
        first = peer.config.num_hidden_layers
        return [y_BTC[real_BT] for y_BTC in outputs[:first]] + outputs[first:]

    twin, wanted = our_twin(peer, our_config(peer)), on_text(their_outputs(calls))
    worst = worst_difference(on_text(our_outputs(twin, calls, with_cache=True, pos_BT=pos_BT)), wanted)
    record_property("worst error", worst)
    assert worst < FP32
    assert worst_difference(on_text(our_outputs(twin, calls, with_cache=True)), wanted, relative=True) > CAUGHT


@pytest.mark.parametrize("how", CHUNKS)
def test_windowed_and_full_layers_mixed_agree_with_qwen2(how: str, record_property: Record) -> None:
    """Bug: the pattern starts with the wrong kind of layer, or both kinds share one mask."""
    kinds = ["sliding_attention", "full_attention"]
    settings = {"use_sliding_window": True, "sliding_window": W, "layer_types": kinds, "implementation": "sdpa"}
    peer = random_peer(Qwen2ForCausalLM, n_kv_head=2, **settings)
    worst = error(peer, our_config(peer, window_pattern="SL"), CHUNKS[how])
    record_property("worst error", worst)
    assert worst < FP32
    assert error(peer, our_config(peer, window_pattern="LS"), CHUNKS[how], relative=True) > CAUGHT


@pytest.mark.parametrize("how", CHUNKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bfloat16_agrees_as_far_as_it_can(implementation: str, how: str, record_property: Record) -> None:
    """Bug: the ring or the blocked path is right in float32 only."""
    peer = mistral(2, implementation, torch.bfloat16)
    worst = error(peer, our_config(peer), CHUNKS[how], relative=True)
    record_property("worst error, as a share", worst)
    assert worst < BF16
    assert error(peer, our_config(peer, window=W + 1), CHUNKS[how], relative=True) > CAUGHT


@pytest.mark.parametrize("how", CHUNKS)
@pytest.mark.parametrize("window", [W - 1, W + 1, None])
def test_another_window_is_caught(window: int | None, how: str) -> None:
    """Mutants: W + 1 as FlashAttention's `left=W` counts, W - 1 as if the query's own key came on top, and a cache that
    is never trimmed and no mask either."""
    peer = mistral()
    assert error(peer, our_config(peer, window=window), CHUNKS[how], relative=True) > CAUGHT


def test_a_prompt_without_its_window_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the prompt is read with plain causal attention, the window begins with the first new token."""
    monkeypatch.setattr(model, "Causal", lambda window=None, sinks=0: Causal())
    peer = mistral()
    assert error(peer, our_config(peer), CHUNKS["from a prompt of exactly W"]) < FP32
    assert error(peer, our_config(peer), CHUNKS["from a long prompt"], relative=True) > CAUGHT


def test_a_prompt_that_loses_causality_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: beyond the window the mask says how far back a query sees, and forgets that it must not see ahead."""
    real = masks.visible

    def mutant(q_pos: Tensor, k_pos: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
        seen = real(q_pos, k_pos, window, sinks)
        if window is None or k_pos.shape[-1] <= window:
            return seen
        return seen | (k_pos[..., None, :] > q_pos[..., :, None])

    monkeypatch.setattr(masks, "visible", mutant)
    peer = mistral()
    config = our_config(peer, attention_backend="reference")
    assert error(peer, config, CHUNKS["from a prompt of exactly W"]) < FP32
    assert error(peer, config, CHUNKS["from a long prompt"], relative=True) > CAUGHT


def test_positions_restarted_in_decode_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: each pass turns its queries and keys as if it began the text."""
    monkeypatch.setattr(model, "angles", lambda pos, *rest: angles(pos - pos[..., :1], *rest))
    peer = mistral()
    assert error(peer, our_config(peer), None) < FP32
    assert error(peer, our_config(peer), CHUNKS["from a long prompt"], relative=True) > CAUGHT


def test_keys_turned_by_their_slot_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: keys lie unturned in the ring, and are turned when read as if slot 0 held position 0.

    As long as the ring has not come round that is right, which is why short tests do not find it.
    """
    peer = mistral()
    config = our_config(peer, attention_backend="reference")
    real = attention.attend

    def only_queries(self: attention.Attention, x_BTC: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        q_BHTD, k_BGTD, v_BGTD = self.qkv(x_BTC)
        return rotate(q_BHTD, rotation.cos, rotation.sin, rotation.layout), k_BGTD, v_BGTD

    def turned_at_read(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *rest: object) -> Tensor:
        turn = angles(torch.arange(k_BGSD.shape[2]), config)
        return real(q_BHTD, rotate(k_BGSD, turn.cos, turn.sin, turn.layout), v_BGSD, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention.Attention, "rotated_qkv", only_queries)
    monkeypatch.setattr(attention, "attend", turned_at_read)
    assert error(peer, config, None) < FP32
    assert error(peer, config, one_by_one(3, W), total=W) < FP32
    assert error(peer, config, CHUNKS["from a long prompt"], relative=True) > CAUGHT
