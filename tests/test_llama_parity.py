"""Rotary positions and grouped queries against the Llama of the transformers library, on random weights.

Each check has its mutants: famous bugs, put in on purpose, that it must catch.

Legend: B batch, T new positions, S key positions, H heads, G key/value heads, D head width.
"""

from collections.abc import Callable
from dataclasses import replace

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
from transformers import CohereForCausalLM, LlamaForCausalLM, PreTrainedModel, StableLmForCausalLM

from gpt2course import GPTConfig, attention, model
from gpt2course.config import RopeScaling
from gpt2course.rope import Rotation, angles, rotate

T, PROMPT = 40, 11
SHORT = 16
"""length of training in the scaled cases, so that T goes well past it"""
SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 4.0, SHORT),
    "yarn": RopeScaling("yarn", 4.0, SHORT, beta_fast=2.0, beta_slow=0.5),
    "yarn, own factor": RopeScaling("yarn", 8.0, SHORT, beta_fast=2.0, beta_slow=0.1, attention_factor=0.8),
    "llama3": RopeScaling("llama3", 8.0, SHORT, low_freq_factor=0.5, high_freq_factor=2.0),
}
CHUNKS = {"whole": None, "decode": one_by_one(PROMPT, T), "chunks": [PROMPT, 1, 7, 13, 8]}
Record = Callable[[str, object], None]


def llama(G: int = 2, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return random_peer(LlamaForCausalLM, n_kv_head=G, implementation=implementation, dtype=dtype)


def error(peer: PreTrainedModel, config: GPTConfig, how: str, relative: bool = False) -> float:
    calls = fed_in_chunks(peer, token_ids(T), CHUNKS[how])
    return worst_error(our_twin(peer, config), calls, CHUNKS[how] is not None, relative)


@pytest.mark.parametrize("how", CHUNKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("G", [H, H // 2, 1])
def test_every_number_of_kv_heads_agrees(G: int, implementation: str, how: str, record_property: Record) -> None:
    """Bug: query heads read the wrong key head, or decoding goes on at a position that the prompt did not end at."""
    peer = llama(G, implementation)
    calls = fed_in_chunks(peer, token_ids(T), CHUNKS[how])
    twins = {
        (backend, bias): our_twin(peer, our_config(peer, attention_backend=backend, bias=bias))
        for backend, bias in (("reference", True), ("auto", False))
    }
    worst = {name: worst_error(twin, calls, CHUNKS[how] is not None) for name, twin in twins.items()}
    record_property("worst error", max(worst.values()))
    assert max(worst.values()) < FP32, worst


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
def test_every_theta_and_scaling_agrees(theta: float, scaling: str, record_property: Record) -> None:
    """Bug: a base or a scaled frequency that is slightly off, which no test within our own code could tell."""
    ours = SCALINGS[scaling]
    peer = random_peer(LlamaForCausalLM, theta, ours, n_kv_head=2, implementation="sdpa")
    worst = {how: error(peer, our_config(peer, ours), how) for how in ("whole", "decode")}
    record_property("worst error", max(worst.values()))
    assert max(worst.values()) < FP32, worst


def test_scaling_is_told_from_no_scaling() -> None:
    """Bug: the grid above passes because scaling does nothing at these lengths."""
    for name, scaling in SCALINGS.items():
        if scaling is not None:
            peer = random_peer(LlamaForCausalLM, 10000.0, scaling, n_kv_head=2)
            assert error(peer, our_config(peer), "whole", relative=True) > CAUGHT, name
            assert error(peer, our_config(peer, replace(scaling, factor=1.5)), "whole", relative=True) > 0.01, name


def test_their_generate_is_followed_step_by_step(record_property: Record) -> None:
    """Bug: our cache agrees with a loop of our own making, and not with what people call."""
    peer = llama(G=2, implementation="sdpa")
    with recorded(peer) as calls:
        peer.generate(token_ids(PROMPT), max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert [call[0][0].shape[1] for call in calls] == [PROMPT] + 19 * [1]
    worst = worst_error(our_twin(peer, our_config(peer)), calls, with_cache=True)
    record_property("worst error", worst)
    assert worst < FP32


@pytest.mark.parametrize("how", CHUNKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bfloat16_agrees_as_far_as_it_can(implementation: str, how: str, record_property: Record) -> None:
    """Bug: a step that ought to be float32 is done in bfloat16, or the dtypes do not fit together at all."""
    peer = llama(2, implementation, torch.bfloat16)
    worst = error(peer, our_config(peer), how, relative=True)
    record_property("worst error, as a share", worst)
    assert worst < BF16
    assert error(peer, our_config(peer, rope_layout="interleaved"), how, relative=True) > CAUGHT


def test_bfloat16_is_no_further_from_the_truth_than_theirs(record_property: Record) -> None:
    """Bug: the looser limit hides that ours loses more than it must. The truth is the same pass in float64."""
    peer = llama(2, "sdpa", torch.bfloat16)
    calls = fed_in_chunks(peer, token_ids(T), CHUNKS["decode"])
    ours = our_outputs(our_twin(peer, our_config(peer)), calls, with_cache=True)
    truth = our_outputs(our_twin(peer, our_config(peer)).double(), calls, with_cache=True)
    found = {"ours": worst_difference(ours, truth, True), "theirs": worst_difference(their_outputs(calls), truth, True)}
    record_property("ours from the truth", found["ours"])
    record_property("theirs from the truth", found["theirs"])
    assert 0 < found["ours"] < 1.25 * found["theirs"], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("start", "step"), [(8000, 1), (0, 200)])
def test_far_positions_agree(dtype: torch.dtype, start: int, step: int, record_property: Record) -> None:
    """Bug: far positions, or great distances, are turned by angles that have lost their last digits."""
    pos_BT = (start + step * torch.arange(T)).expand(2, T)
    peer = llama(2, "sdpa", dtype)
    calls = fed_in_chunks(peer, token_ids(T), pos_BT=pos_BT)
    found = our_outputs(our_twin(peer, our_config(peer)), calls, with_cache=False, pos_BT=pos_BT)
    worst = worst_difference(found, their_outputs(calls), relative=dtype == torch.bfloat16)
    record_property(f"worst error, {dtype}", worst)
    assert worst < (BF16 if dtype == torch.bfloat16 else FP32)


def test_frequencies_rounded_to_bfloat16_are_caught() -> None:
    """Mutant: frequencies in a buffer that `.to(bfloat16)` rounds; the peer's own does, unless it is spared (`cast`).

    Every distance is then measured a little wrongly, the more the greater it is. So the texts have wide gaps.
    """
    pos_BT = (200 * torch.arange(T)).expand(2, T)
    peer = llama(2, "sdpa").to(torch.bfloat16)
    calls = fed_in_chunks(peer, token_ids(T), pos_BT=pos_BT)
    found = our_outputs(our_twin(peer, our_config(peer)), calls, with_cache=False, pos_BT=pos_BT)
    assert worst_difference(found, their_outputs(calls), relative=True) > CAUGHT


def test_interleaved_for_half_is_caught() -> None:
    """Mutant: Llama's weights read in the other layout: shapes agree, texts look almost right."""
    peer = llama()
    for how in CHUNKS:
        assert error(peer, our_config(peer, rope_layout="interleaved"), how, relative=True) > CAUGHT, how


def test_repeat_for_repeat_interleave_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: query head h reads key head h mod G. With G = 1 or G = H it is no bug, and must pass."""
    real = attention.attend

    def mutant(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *rest: object) -> Tensor:
        times = q_BHTD.shape[1] // k_BGSD.shape[1]
        return real(q_BHTD, k_BGSD.repeat(1, times, 1, 1), v_BGSD.repeat(1, times, 1, 1), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "attend", mutant)
    found = {G: error(llama(G), our_config(llama(G)), "decode", relative=True) for G in (1, 2, H)}
    assert found[2] > CAUGHT, found
    assert max(found[1], found[H]) < FP32, found


def test_positions_restarted_in_decode_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: each pass turns its queries and keys as if it began the text. A pass without a cache hides it."""
    monkeypatch.setattr(model, "angles", lambda pos, *rest: angles(pos - pos[..., :1], *rest))
    peer = llama()
    assert error(peer, our_config(peer), "whole") < FP32
    assert error(peer, our_config(peer), "decode", relative=True) > CAUGHT
    assert error(peer, our_config(peer), "chunks", relative=True) > CAUGHT


@pytest.mark.parametrize("offset", [0, 1])
def test_keys_turned_at_read_with_a_wrong_offset_are_caught(monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    """Mutant: keys are cached unturned, and turned when read, all by one place too many."""
    peer = llama()
    config = our_config(peer)
    real = attention.attend

    def only_queries(self: attention.Attention, x_BTC: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        q_BHTD, k_BGTD, v_BGTD = self.qkv(x_BTC)
        return rotate(q_BHTD, rotation.cos, rotation.sin, rotation.layout), k_BGTD, v_BGTD

    def turned_at_read(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *rest: object) -> Tensor:
        late = angles(torch.arange(k_BGSD.shape[2]) + offset, config)
        return real(q_BHTD, rotate(k_BGSD, late.cos, late.sin, late.layout), v_BGSD, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention.Attention, "rotated_qkv", only_queries)
    monkeypatch.setattr(attention, "attend", turned_at_read)
    found = error(peer, config, "decode", relative=True)
    assert found > CAUGHT if offset else found < FP32, found


@pytest.mark.parametrize("how", ["whole", "decode"])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_partly_turned_heads_agree_with_stablelm(fraction: float, how: str, record_property: Record) -> None:
    """Bug: with rope_fraction the pairs, or the frequencies, are still those of the whole head."""
    settings = {"fraction": fraction, "use_qkv_bias": True}
    peer = random_peer(StableLmForCausalLM, n_kv_head=2, **settings)
    worst = error(peer, our_config(peer), how)
    record_property("worst error", worst)
    assert worst < FP32
    assert error(peer, our_config(peer, rope_fraction=1.0), how, relative=True) > CAUGHT


@pytest.mark.parametrize("how", ["whole", "decode"])
def test_the_interleaved_layout_agrees_with_cohere(how: str, record_property: Record) -> None:
    """Bug: our "interleaved" is a layout that nobody else has."""
    peer = random_peer(CohereForCausalLM, n_kv_head=2)
    worst = error(peer, our_config(peer, rope_layout="interleaved"), how)
    record_property("worst error", worst)
    assert worst < FP32
    assert error(peer, our_config(peer), how, relative=True) > CAUGHT
