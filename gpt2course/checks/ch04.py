"""Chapter 04: what layer norm, GELU, the wiring of a block, its start and its parameter count must satisfy.

Legend: B batch, T positions, C model width, V vocabulary, P longest sequence.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2course.checks.base import Wrong, exercise, require, same_number, same_tensor, short
from gpt2course.config import PRESETS, GPTConfig
from gpt2course.model import GPT, INIT_STD

EPS = 1e-5


def not_one_of(got: Any, mistakes: Mapping[str, Tensor], tol: float = 1e-6) -> None:
    """Raise `Wrong` with the name of a usual mistake, if the answer is exactly what that mistake gives."""
    if not isinstance(got, Tensor):
        return
    for message, wrong in mistakes.items():
        if got.shape == wrong.shape and torch.allclose(got.double(), wrong.double(), rtol=tol, atol=tol):
            raise Wrong(message)


def normalised(x: Tensor, dims: int | tuple[int, ...], correction: int = 0) -> Tensor:
    """x less its mean, over its deviation, along some axes."""
    variance = x.var(dim=dims, keepdim=True, correction=correction)
    return (x - x.mean(dim=dims, keepdim=True)) / torch.sqrt(variance + EPS)


@exercise("04.1 Layer norm")
def layer_norm(answer: Callable[..., Any]) -> str:
    C = 4
    x_BTC = torch.randn(3, 2, C, dtype=torch.float64) * 3 + 1
    ones_C, zeros_C = torch.ones(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    got = answer(x_BTC, ones_C, zeros_C, EPS)
    centred = x_BTC - x_BTC.mean(-1, keepdim=True)
    variance = x_BTC.var(-1, keepdim=True, correction=0)
    not_one_of(
        got,
        {
            "the variance divides by C - 1; layer norm divides by C (torch: correction=0)": normalised(x_BTC, -1, 1),
            "each number is normalised over the positions T; layer norm takes the C numbers of one position "
            "(dim=-1)": normalised(x_BTC, 1),
            "each number is normalised over the batch B, which is batch norm; layer norm takes the C numbers of one "
            "position (dim=-1)": normalised(x_BTC, 0),
            "the mean is taken over the whole tensor; each position has its own (dim=-1, keepdim=True)": normalised(
                x_BTC, (0, 1, 2)
            ),
            "you divide by the variance; divide by its square root, the deviation": centred / (variance + EPS),
            "the mean is still in it; take it off before you divide": x_BTC / torch.sqrt(variance + EPS),
        },
    )
    # Loose here, so that a wrong eps, which hardly shows at this size, is told by name below.
    same_tensor(got, F.layer_norm(x_BTC, (C,), eps=EPS), "the result with weight 1 and bias 0", 1e-4)
    faint_BTC = x_BTC * 1e-3
    got = answer(faint_BTC, ones_C, zeros_C, EPS)
    faint_variance = faint_BTC.var(-1, keepdim=True, correction=0)
    faint_centred = faint_BTC - faint_BTC.mean(-1, keepdim=True)
    not_one_of(
        got,
        {
            "eps stands outside the square root; it is added to the variance: sqrt(var + eps)": faint_centred
            / (faint_variance.sqrt() + EPS),
            "eps is not used; for faint inputs it matters: sqrt(var + eps)": faint_centred / faint_variance.sqrt(),
        },
    )
    same_tensor(got, F.layer_norm(faint_BTC, (C,), eps=EPS), "the result for inputs near 0.001", 1e-9)
    same_tensor(answer(ones_C.expand(1, 2, C), ones_C, zeros_C, EPS), torch.zeros(1, 2, C), "a constant row", 1e-9)
    weight_C, bias_C = torch.randn(C, dtype=torch.float64), torch.randn(C, dtype=torch.float64)
    got = answer(x_BTC, weight_C, bias_C, EPS)
    plain = F.layer_norm(x_BTC, (C,), eps=EPS)
    not_one_of(
        got,
        {
            "weight and bias are not used; multiply by the weight, then add the bias": plain,
            "the bias is not added": plain * weight_C,
            "the weight is not used": plain + bias_C,
            "the bias is added before the weight multiplies; multiply first": (plain + bias_C) * weight_C,
        },
    )
    same_tensor(got, F.layer_norm(x_BTC, (C,), weight_C, bias_C, EPS), "the result with a weight and a bias", 1e-9)
    return "equal to torch to 1e-9, for inputs near 1, near 0.001 and for a constant row"


@exercise("04.2 GELU as GPT-2 has it")
def gelu_tanh(answer: Callable[..., Any]) -> str:
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    got = answer(x)
    root, inner = math.sqrt(2 / math.pi), 0.044715 * x**3
    not_one_of(
        got,
        {
            "this is the exact GELU, with erf; GPT-2's is the tanh form, and differs in the fourth digit": F.gelu(x),
            "this is ReLU; GELU lets small negative numbers through": F.relu(x),
            "this is the sigmoid form, x * sigmoid(1.702 x); GPT-2's is the tanh form": x * torch.sigmoid(1.702 * x),
            "this is SiLU, x * sigmoid(x); GPT-2's is the tanh form of GELU": F.silu(x),
            "the factor 0.5 is missing": x * (1 + torch.tanh(root * (x + inner))),
            "sqrt(2 / pi) must multiply the whole bracket, x + 0.044715 x^3": 0.5
            * x
            * (1 + torch.tanh(root * x + inner)),
            "the cubic term is missing: x + 0.044715 x^3": 0.5 * x * (1 + torch.tanh(root * x)),
            "the square root of 2 / pi is missing": 0.5 * x * (1 + torch.tanh(2 / math.pi * (x + inner))),
            "the 1 + in the bracket is missing": 0.5 * x * torch.tanh(root * (x + inner)),
        },
        tol=1e-9,
    )
    same_tensor(got, F.gelu(x, approximate="tanh"), "gelu", 1e-9)
    same_tensor(answer(x.view(1, 241, 1)), F.gelu(x, approximate="tanh").view(1, 241, 1), "gelu of (1, 241, 1)", 1e-9)
    return "equal to torch's tanh form to 1e-9 at 241 points from -6 to 6"


@exercise("04.3 The wiring of a block")
def pre_norm_block(answer: Callable[..., Any]) -> str:
    torch.manual_seed(4)
    C = 8
    one, two, mix, fc = (torch.randn(C, C, dtype=torch.float64) for _ in range(4))

    def ln_1(x: Tensor) -> Tensor:
        return torch.tanh(x @ one)

    def attention(x: Tensor) -> Tensor:
        return x.cumsum(dim=1) @ mix

    def ln_2(x: Tensor) -> Tensor:
        return torch.tanh(x @ two)

    def mlp(x: Tensor) -> Tensor:
        return torch.relu(x @ fc)

    x = torch.randn(2, 3, C, dtype=torch.float64)
    h = x + attention(ln_1(x))
    post = ln_1(x + attention(x))
    first = attention(ln_1(x))
    mistakes = {
        "this is post-norm: the norm stands on the stream, after the sum; GPT-2 norms what a branch reads": ln_2(
            post + mlp(post)
        ),
        "both residual additions are missing: the stream is replaced where it should be added to": mlp(ln_2(first)),
        "attention's output replaces the stream; add it: x + attention(ln_1(x))": first + mlp(ln_2(first)),
        "the MLP's output replaces the stream; add it to what attention left": mlp(ln_2(h)),
        "attention and MLP both read the old stream (in parallel); the MLP reads what attention left": h + mlp(ln_2(x)),
        "the MLP's branch is added to the old stream, so attention's part is lost": x + mlp(ln_2(h)),
        "the norms are missing: attention and MLP read the stream itself": x + attention(x) + mlp(x + attention(x)),
        "the normalised stream is carried on, not the stream: keep x and norm only what the branch reads": ln_1(x)
        + first
        + mlp(ln_2(ln_1(x) + first)),
        "ln_1 is used twice; the MLP has a norm of its own, ln_2": h + mlp(ln_1(h)),
    }
    got = answer(x, ln_1, attention, ln_2, mlp)
    not_one_of(got, mistakes)
    same_tensor(got, h + mlp(ln_2(h)), "the stream after the block", 1e-9)
    silent = answer(x, ln_1, torch.zeros_like, ln_2, torch.zeros_like)
    same_tensor(silent, x, "the stream when both branches give zero", 1e-12)
    return "two additions, two norms on the branches; with silent branches the stream passes unchanged"


@exercise("04.4 How a weight starts")
def start_std(answer: Callable[..., Any]) -> str:
    for n_layer in (12, 1, 48):
        scaled = INIT_STD / math.sqrt(2 * n_layer)
        for name in ("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"):
            got = number(answer(name, n_layer), f"the start of {name}")
            where = f"{name}, {n_layer} layers"
            require(not near(got, scaled), f"{where}: it does not write to the stream, so it is not scaled down")
            same_number(got, INIT_STD, where, 1e-9)
        for name in (f"h.{n_layer - 1}.attn.c_proj.weight", f"h.{n_layer - 1}.mlp.c_proj.weight"):
            got = number(answer(name, n_layer), f"the start of {name}")
            where = f"{name}, {n_layer} layers"
            if n_layer > 1:
                require(not near(got, INIT_STD), f"{where}: it writes to the stream, and is not scaled down")
            for wrong, message in (
                (INIT_STD / math.sqrt(n_layer), "a block writes to the stream twice, so count 2 n_layer writes"),
                (INIT_STD / (2 * n_layer), "variances add up, deviations do not: divide by the square root"),
                (INIT_STD * math.sqrt(2 * n_layer), "divide by the square root, do not multiply"),
                (INIT_STD / math.sqrt(2) / n_layer, "the root goes over 2 n_layer as a whole"),
            ):
                require(near(wrong, scaled) or not near(got, wrong), f"{where}: {short(got)}; {message}")
            same_number(got, scaled, where, 1e-9)
    return "0.02, and 0.02 / sqrt(2 n_layer) for both layers that write to the stream, for 1, 12 and 48 layers"


def number(got: Any, name: str) -> float:
    """The answer as a float, or `Wrong`."""
    require(isinstance(got, int | float | Tensor), f"{name} is {short(got)}, expected a number")
    return float(got)


def near(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-6)


@exercise("04.5 The parameter count")
def count_parameters(answer: Callable[..., Any]) -> str:
    shapes = [PRESETS["gpt2"], GPTConfig(n_layer=3, n_head=2, n_embd=10, block_size=7, vocab_size=101)]
    for config in [*shapes, PRESETS["gpt2-xl"]]:
        L, C, V, P = config.n_layer, config.n_embd, config.vocab_size, config.block_size
        with torch.device("meta"):
            want = GPT(config).num_params()
        got = answer(L, C, V, P)
        require(isinstance(got, int | float) and got == int(got), f"the count is {short(got)}, expected a whole number")
        reasons = {
            V * C: "the head is counted again; it is the token embedding, one tensor",
            -V * C: "the token embedding is missing",
            -P * C: "the position table is missing",
            -2 * C: "the last layer norm, after all blocks, is missing",
            -4 * L * C: "the two layer norms of each block are missing",
            -4 * L * C - 2 * C: "the layer norms are missing",
            -2 * L * C: "a block has two layer norms, of 2 C numbers each",
            -9 * L * C: "the biases of the linear layers are missing: 3 C + C in attention, 4 C + C in the MLP",
            -9 * L * C - (2 * L + 1) * C: "all biases are missing, those of linear layers and of layer norms",
            -(2 * L + 1) * C: "a layer norm has a weight and a bias, 2 C numbers",
            -L * (4 * C * C + C): "the MLP has two matrices: C to 4 C and back",
            -L * (C * C + C): "attention has a fourth matrix, the output projection c_proj",
            V: "the head has no bias",
            V * C + V: "the head is counted again, with a bias; it is the token embedding",
        }
        off = int(got) - want
        told = reasons.get(off, "count one block by hand first: 12 C^2 + 13 C")
        require(off == 0, f"for {L} layers of width {C} you count {int(got):,}, the model has {want:,}: {told}")
    return "124,439,808 for GPT-2 small, 1,557,611,200 for XL, and a small model of odd sizes"
