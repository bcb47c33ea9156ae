"""The rotation itself: turns, layouts, distances and precision. Frequencies and scaling are in test_rope_scaling.py.

Legend: B batch, T positions, C model width, H heads, G key/value heads, D head width, R how many of the D numbers turn.
"""

import cmath
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2course import GPT, GPTConfig, model
from gpt2course.attention import CAUSAL, attend
from gpt2course.config import LAYOUTS
from gpt2course.kv_cache import KVCache
from gpt2course.rope import Rotation, angles, change_layout, permutation, rotate

THETA = 10000.0
BASE = GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, block_size=64, vocab_size=97, pos="rope")
Lively = Callable[..., GPT]
Angles = Callable[..., Rotation]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(x_BHTD: Tensor, pos_T: Tensor, config: GPTConfig) -> Tensor:
    rotation = angles(pos_T, config, x_BHTD.dtype)
    return rotate(x_BHTD, rotation.cos, rotation.sin, rotation.layout)


def config_for(D: int, **changes: object) -> GPTConfig:
    return GPTConfig(n_head=1, n_embd=D, pos="rope", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_pair_is_a_complex_number_that_turns(layout: str, fraction: float) -> None:
    """Bug: a wrong sign, a wrong partner, or a frequency given to another pair than its own."""
    B, H, D = 2, 3, 12
    R, positions = int(D * fraction), [0, 1, 7, 500]
    x_BHTD = random(B, H, len(positions), D)
    wanted = x_BHTD.clone()
    for b in range(B):
        for h in range(H):
            for t, pos in enumerate(positions):
                for i in range(R // 2):
                    first, second = (i, i + R // 2) if layout == "half" else (2 * i, 2 * i + 1)
                    z = complex(x_BHTD[b, h, t, first], x_BHTD[b, h, t, second])
                    z *= cmath.exp(1j * pos * THETA ** (-2 * i / R))
                    wanted[b, h, t, first], wanted[b, h, t, second] = z.real, z.imag
    config = config_for(D, rope_layout=layout, rope_fraction=fraction)
    found = turned(x_BHTD, torch.tensor(positions), config)
    # The frequencies are float32: at position 500 an angle may be off by 500 x 2^-23, a number of 4 by four times that.
    assert float((found - wanted).abs().max()) < 4 * 500 * 2**-23
    assert torch.equal(found[..., R:], x_BHTD[..., R:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_turn_is_exact_for_given_angles(layout: str) -> None:
    """Bug: a small error of the turn hides behind that of the frequencies."""
    angle_TP, x_BHTD = random(5, 3), random(2, 2, 5, 8, seed=1)
    found = rotate(x_BHTD, angle_TP.cos(), angle_TP.sin(), layout)
    for i in range(3):
        first, second = (i, i + 3) if layout == "half" else (2 * i, 2 * i + 1)
        for t in range(5):
            c, s = math.cos(angle_TP[t, i]), math.sin(angle_TP[t, i])
            matrix = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
            wanted = x_BHTD[..., t, [first, second]] @ matrix.T
            assert float((found[..., t, [first, second]] - wanted).abs().max()) < 1e-14


@pytest.mark.parametrize("layout", LAYOUTS)
@given(q_pos=st.integers(0, 20_000), k_pos=st.integers(0, 20_000), shift=st.integers(0, 100_000))
def test_scores_depend_only_on_the_distance(layout: str, q_pos: int, k_pos: int, shift: int) -> None:
    """Bug: only queries are turned, or queries and keys in opposite senses: the score then changes with the shift."""
    config = config_for(16, rope_layout=layout, rope_fraction=0.75)
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)

    def score(at: int) -> float:
        q_turned, k_turned = (turned(x, torch.tensor([p + at]), config) for x, p in ((q, q_pos), (k, k_pos)))
        return float((q_turned * k_turned).sum())

    assert score(shift) == pytest.approx(score(0), abs=1e-9)


def test_scores_do_depend_on_the_distance() -> None:
    """Bug: the test above passes because nothing is turned, or because it takes no notice of a turn that is wrong."""
    config = config_for(16)
    q, k = random(1, 1, 1, 16), random(1, 1, 64, 16, seed=1)[:, :, :1].expand(1, 1, 64, 16)
    here_T = (turned(q, torch.tensor([63]), config) * turned(k, torch.arange(64), config)).sum(-1)
    assert float(here_T.std()) > 0.5
    only_keys = [float((q * turned(k[:, :, :1], torch.tensor([5 + s]), config)).sum()) for s in (0, 100)]
    assert abs(only_keys[0] - only_keys[1]) > 1e-3


@given(pos=st.integers(0, 1_000_000), fraction=st.sampled_from([0.25, 0.5, 1.0]), layout=st.sampled_from(LAYOUTS))
def test_norms_are_kept_and_position_0_changes_nothing(pos: int, fraction: float, layout: str) -> None:
    """Bug: a turn that stretches, or positions that are counted from 1."""
    config = config_for(16, rope_layout=layout, rope_fraction=fraction)
    x = random(2, 3, 1, 16)
    assert torch.allclose(turned(x, torch.tensor([pos]), config).norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    assert torch.equal(turned(x, torch.tensor([0]), config), x)
    assert torch.equal(turned(x, torch.tensor([-1]), config), x)


def test_rows_may_have_positions_of_their_own() -> None:
    """Bug: in a ragged batch all rows are turned by the positions of the first."""
    config, x = config_for(8), random(2, 3, 4, 8)
    pos_BT = torch.tensor([[0, 1, 2, 3], [-1, -1, 0, 1]])
    found = turned(x, pos_BT[:, None], config)
    for row in (0, 1):
        assert torch.equal(found[row], turned(x[row], pos_BT[row], config))


def test_permutation_turns_one_layout_into_the_other() -> None:
    """Bug: the permutation is its own opposite: for R = 4 it is, for R = 8 no longer."""
    assert permutation(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    p = permutation(12)
    x, angle_TP = random(2, 3, 5, 12), random(5, 6, seed=1)
    cos, sin = angle_TP.cos(), angle_TP.sin()
    assert torch.equal(rotate(x[..., p], cos, sin, "interleaved"), rotate(x, cos, sin, "half")[..., p])
    assert not torch.allclose(rotate(x[..., p.argsort()], cos, sin, "interleaved"), rotate(x, cos, sin)[..., p])
    assert torch.equal(x[..., p][..., p.argsort()], x)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_projections_in_the_other_layout_give_the_same_scores(lively: Lively, fraction: float) -> None:
    """Bug: heads are mixed when weights are reordered, the numbers that do not turn move too, or biases stay behind."""
    config = BASE.with_(rope_fraction=fraction, n_kv_head=4)
    half = lively(config)
    other = lively(config.with_(rope_layout="interleaved"))
    other.load_state_dict(half.state_dict())
    idx_BT = torch.arange(40).view(2, 20)
    with torch.no_grad():
        wanted, mixed_up = half(idx_BT), other(idx_BT)
        for block in other.h:
            for tensor in (block.attn.c_attn.weight, block.attn.c_attn.bias):
                q, k, v = tensor.chunk(3)
                q, k = (change_layout(x, config.head_dim, config.rotary_dim, "interleaved") for x in (q, k))
                back = change_layout(q, config.head_dim, config.rotary_dim, "half")
                assert torch.equal(back, tensor.chunk(3)[0])
                tensor.copy_(torch.cat([q, k, v]))
        assert float((other(idx_BT) - wanted).abs().max()) < 1e-12
    assert float((mixed_up - wanted).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_angles_are_float32_whatever_the_model_is(dtype: torch.dtype) -> None:
    """Bug: positions, frequencies or cos and sin take the dtype of the model."""
    pos_T = torch.arange(7990, 8010)
    found, wanted, fine = (angles(pos_T, BASE, d) for d in (dtype, torch.float32, torch.float64))
    assert found.cos.dtype == found.sin.dtype == torch.float32
    assert torch.equal(found.cos, wanted.cos)
    assert torch.equal(found.sin, wanted.sin)
    assert fine.cos.dtype == torch.float64
    # The same float32 frequencies, so that only the product is rounded: by 8,000 x 2^-24.
    assert float((found.cos - fine.cos).abs().max()) < 8010 * 2**-24 + 2**-23


ROUNDING = 8016 * 2.0**-23
"""radians: frequency and product, each rounded to 24 bits"""


def angle_error(gpt: GPT) -> float:
    """The largest error of an angle, in radians, of what a model's blocks are given at positions around 8,000."""
    pos_BT = torch.arange(7984, 8016)[None]
    given_: list[Rotation] = []
    hook = gpt.h[-1].register_forward_pre_hook(lambda _, args: given_.append(args[2]))
    with torch.no_grad():
        gpt.hidden(torch.zeros_like(pos_BT), pos_BT)
    hook.remove()
    R = gpt.config.rotary_dim
    frequencies = THETA ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    wanted = torch.polar(torch.ones(1, dtype=torch.float64), pos_BT[0, :, None] * frequencies)
    found = torch.complex(given_[0].cos.double(), given_[0].sin.double()).reshape(wanted.shape)
    return float((found / wanted).angle().abs().max())


def cast_angles(pos: Tensor, config: GPTConfig, dtype: torch.dtype) -> Rotation:
    """Mutant: right until the end, then cos and sin are cast to the dtype of the model."""
    fine = angles(pos, config, dtype)
    return Rotation(fine.cos.to(dtype), fine.sin.to(dtype), fine.layout)


def coarse_angles(pos: Tensor, config: GPTConfig, dtype: torch.dtype) -> Rotation:
    """Mutant: the whole computation in the dtype of the model."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.rotary_dim, 2, dtype=dtype) / config.rotary_dim)
    angle = pos[..., None].to(dtype) * frequencies
    return Rotation(angle.cos(), angle.sin(), config.rope_layout)


def buffered_angles(pos: Tensor, config: GPTConfig, dtype: torch.dtype) -> Rotation:
    """Mutant: the frequencies were in a buffer when the model was cast."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.rotary_dim, 2) / config.rotary_dim)
    angle = pos[..., None] * frequencies.to(dtype).float()
    return Rotation(angle.cos(), angle.sin(), config.rope_layout)


@pytest.mark.parametrize(("mutant", "least"), [(cast_angles, 2e-3), (coarse_angles, 1.0), (buffered_angles, 1.0)])
def test_a_bfloat16_model_turns_by_the_right_angles_at_position_8000(
    monkeypatch: pytest.MonkeyPatch, mutant: Angles, least: float
) -> None:
    """Bug: cos and sin in bfloat16, which cannot tell position 8,000 from 8,016. The mutants do."""
    gpt = GPT(BASE).to(torch.bfloat16)
    assert angle_error(gpt) < ROUNDING
    assert angle_error(GPT(BASE).double()) < ROUNDING
    monkeypatch.setattr(model, "angles", mutant)
    assert angle_error(gpt) > max(least, 2 * ROUNDING)


@pytest.mark.parametrize("mutant", [None, coarse_angles])
def test_a_bfloat16_model_says_the_same_at_position_8000(
    lively: Lively, monkeypatch: pytest.MonkeyPatch, mutant: Angles | None
) -> None:
    """Bug: only short texts work in bfloat16. Rotary logits do not change when all positions move by 8,000."""
    gpt = lively(BASE.with_(n_layer=1), torch.bfloat16)
    if mutant is not None:
        monkeypatch.setattr(model, "angles", mutant)
    idx_BT = torch.randint(97, (2, 48))
    pos_BT = torch.arange(48).expand(2, 48)
    with torch.no_grad():
        near, far = gpt.hidden(idx_BT, pos_BT).float(), gpt.hidden(idx_BT, pos_BT + 8000).float()
    moved = float((near - far).abs().mean() / near.abs().mean())
    assert moved < 0.01 if mutant is None else moved > 0.04, moved


def test_decoding_goes_on_where_the_past_ends(lively: Lively, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: each decoded token is turned as position 0. The mutant does that, and must be caught."""
    gpt = lively(BASE)
    idx_BT = torch.randint(97, (1, 20))

    def decoded() -> Tensor:
        cache = KVCache(BASE, 1, 20, dtype=torch.float64)
        with torch.no_grad():
            return torch.cat([gpt(piece, cache=cache) for piece in idx_BT.split([5, 1, 4, *10 * [1]], dim=1)], dim=1)

    with torch.no_grad():
        whole = gpt(idx_BT)
    assert float((decoded() - whole).abs().max()) < 1e-12
    monkeypatch.setattr(model, "angles", lambda pos, *rest: angles(pos - pos[..., :1], *rest))
    assert float((decoded() - whole).abs().max()) > 0.1


def test_attention_over_turned_keys_moves_with_the_text() -> None:
    """Bug: the turn is right pair by pair, and attention over several heads and groups is not."""
    config, pos_T = config_for(8), torch.arange(12)
    q, k, v = random(2, 4, 12, 8), random(2, 2, 12, 8, seed=1), random(2, 2, 12, 8, seed=2)
    here, there = (
        attend(turned(q, pos_T + at, config), turned(k, pos_T + at, config), v, CAUSAL, "reference") for at in (0, 777)
    )
    assert float((here - there).abs().max()) < 1e-11
    assert float((here - attend(q, k, v, CAUSAL, "reference")).abs().max()) > 0.1


def test_an_unknown_layout_is_refused() -> None:
    """Bug: `rotate(…, "Half")` is taken for interleaved, in silence."""
    x, angle = random(1, 1, 2, 4), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="layout is 'Half'; it must be one of half, interleaved"):
        rotate(x, angle.cos(), angle.sin(), "Half")
    with pytest.raises(ValueError, match="layout is 'gguf'; it must be one of half, interleaved"):
        change_layout(torch.zeros(4, 4), 4, 4, "gguf")
