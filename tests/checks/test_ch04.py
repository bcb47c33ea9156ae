"""Chapter 04's exercises: the solution passes, the stub and the usual mistakes are told what is wrong."""

from exercise_harness import exercise_tests

NORM = """
def layer_norm(x, w, b, eps):
    import torch
    return {}
"""
GELU = """
def gelu_tanh(x):
    import math, torch
    import torch.nn.functional as F
    return {}
"""
BLOCK = """
def pre_norm_block(x, ln_1, attention, ln_2, mlp):
    {}
    return {}
"""
START = """
def start_std(name, n_layer):
    import math
    return {}
"""
COUNT = """
def count_parameters(n_layer, n_embd, vocab_size, block_size):
    L, C, V, P = n_layer, n_embd, vocab_size, block_size
    return {}
"""
CENTRED = "(x - x.mean(-1, keepdim=True))"
VAR = "x.var(-1, keepdim=True, correction=0)"


def norm(expression: str) -> str:
    return NORM.format(expression)


def along(dim: str) -> str:
    """Layer norm over other axes than the last."""
    mean, var = f"x.mean({dim}, keepdim=True)", f"x.var({dim}, keepdim=True, correction=0)"
    return norm(f"(x - {mean}) / torch.sqrt({var} + eps) * w + b")


WRONG = {
    "layer_norm": [
        ("unbiased variance", norm(f"{CENTRED} / torch.sqrt(x.var(-1, keepdim=True) + eps) * w + b"), r"C - 1"),
        ("eps outside the root", norm(f"{CENTRED} / (({VAR}).sqrt() + eps) * w + b"), r"outside the square root"),
        ("no eps", norm(f"{CENTRED} / ({VAR}).sqrt() * w + b"), r"eps is not used"),
        ("over positions", along("1"), r"over the positions"),
        ("over the batch", along("0"), r"batch norm"),
        ("over everything", along("(0, 1, 2)"), r"whole tensor"),
        ("variance for deviation", norm(f"{CENTRED} / ({VAR} + eps) * w + b"), r"divide by the variance"),
        ("mean left in", norm(f"x / torch.sqrt({VAR} + eps) * w + b"), r"mean is still in it"),
        ("no weight or bias", norm(f"{CENTRED} / torch.sqrt({VAR} + eps)"), r"weight and bias are not used"),
        ("no bias", norm(f"{CENTRED} / torch.sqrt({VAR} + eps) * w"), r"bias is not added"),
        ("no weight", norm(f"{CENTRED} / torch.sqrt({VAR} + eps) + b"), r"weight is not used"),
        ("bias first", norm(f"({CENTRED} / torch.sqrt({VAR} + eps) + b) * w"), r"multiply first"),
        ("mean not kept", norm("(x - x.mean(-1)) / x.std(-1)"), r"RuntimeError"),
        ("a number", norm("0.5"), r"float, expected a tensor"),
    ],
    "gelu_tanh": [
        ("exact", GELU.format("F.gelu(x)"), r"exact GELU"),
        ("relu", GELU.format("F.relu(x)"), r"ReLU"),
        ("sigmoid form", GELU.format("x * torch.sigmoid(1.702 * x)"), r"sigmoid form"),
        ("silu", GELU.format("F.silu(x)"), r"SiLU"),
        (
            "no half",
            GELU.format("x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))"),
            r"0\.5 is missing",
        ),
        (
            "bracket",
            GELU.format("0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x + 0.044715 * x**3))"),
            r"whole bracket",
        ),
        ("no cubic term", GELU.format("0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x))"), r"cubic term"),
        ("no root", GELU.format("0.5 * x * (1 + torch.tanh(2 / math.pi * (x + 0.044715 * x**3)))"), r"square root of"),
        (
            "square",
            GELU.format("0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**2)))"),
            r"gelu\[",
        ),
        ("flat", GELU.format("F.gelu(x, approximate='tanh').flatten()"), r"has shape"),
    ],
    "pre_norm_block": [
        ("post-norm", BLOCK.format("x = ln_1(x + attention(x))", "ln_2(x + mlp(x))"), r"post-norm"),
        ("no residual", BLOCK.format("x = attention(ln_1(x))", "mlp(ln_2(x))"), r"both residual"),
        (
            "no first residual",
            BLOCK.format("x = attention(ln_1(x))", "x + mlp(ln_2(x))"),
            r"attention's output replaces",
        ),
        ("no second residual", BLOCK.format("x = x + attention(ln_1(x))", "mlp(ln_2(x))"), r"MLP's output replaces"),
        ("parallel", BLOCK.format("a = attention(ln_1(x))", "x + a + mlp(ln_2(x))"), r"in parallel"),
        ("old stream", BLOCK.format("h = x + attention(ln_1(x))", "x + mlp(ln_2(h))"), r"old stream"),
        ("no norms", BLOCK.format("x = x + attention(x)", "x + mlp(x)"), r"norms are missing"),
        ("normed stream", BLOCK.format("x = ln_1(x); x = x + attention(x); x = ln_2(x)", "x + mlp(x)"), r"stream"),
        (
            "norm carried on",
            BLOCK.format("n = ln_1(x); h = n + attention(n)", "h + mlp(ln_2(h))"),
            r"normalised stream is carried on",
        ),
        ("one norm twice", BLOCK.format("x = x + attention(ln_1(x))", "x + mlp(ln_1(x))"), r"ln_1 is used twice"),
    ],
    "start_std": [
        ("one write a block", START.format("0.02 / math.sqrt(n_layer) if 'c_proj' in name else 0.02"), r"twice"),
        ("no root", START.format("0.02 / (2 * n_layer) if 'c_proj' in name else 0.02"), r"square root"),
        ("multiplied", START.format("0.02 * math.sqrt(2 * n_layer) if 'c_proj' in name else 0.02"), r"do not multiply"),
        (
            "root of two only",
            START.format("0.02 / math.sqrt(2) / n_layer if 'c_proj' in name else 0.02"),
            r"as a whole",
        ),
        ("never", START.format("0.02"), r"not scaled down"),
        ("always", START.format("0.02 / math.sqrt(2 * n_layer)"), r"wte\.weight.*does not write"),
        (
            "attention only",
            START.format("0.02 / math.sqrt(2 * n_layer) if 'attn.c_proj' in name else 0.02"),
            r"mlp\.c_proj\.weight.*not scaled down",
        ),
        (
            "all of attention",
            START.format("0.02 / math.sqrt(2 * n_layer) if 'c_proj' in name or 'attn' in name else 0.02"),
            r"c_attn\.weight.*does not write",
        ),
        ("a string", START.format("'0.02'"), r"expected a number"),
    ],
    "count_parameters": [
        ("tied head twice", COUNT.format("(2 * V + P) * C + L * (12 * C**2 + 13 * C) + 2 * C"), r"counted again"),
        ("no biases in linear layers", COUNT.format("(V + P) * C + L * (12 * C**2 + 4 * C) + 2 * C"), r"biases of the"),
        ("no biases", COUNT.format("(V + P) * C + L * (12 * C**2 + 2 * C) + C"), r"all biases"),
        ("no last norm", COUNT.format("(V + P) * C + L * (12 * C**2 + 13 * C)"), r"last layer norm"),
        ("no norms", COUNT.format("(V + P) * C + L * (12 * C**2 + 9 * C)"), r"layer norms are missing"),
        ("one norm a block", COUNT.format("(V + P) * C + L * (12 * C**2 + 11 * C) + 2 * C"), r"two layer norms"),
        ("norms without bias", COUNT.format("(V + P) * C + L * (12 * C**2 + 11 * C) + C"), r"a weight and a bias"),
        ("no positions", COUNT.format("V * C + L * (12 * C**2 + 13 * C) + 2 * C"), r"position table"),
        ("no tokens", COUNT.format("P * C + L * (12 * C**2 + 13 * C) + 2 * C"), r"token embedding is missing"),
        ("half an MLP", COUNT.format("(V + P) * C + L * (8 * C**2 + 12 * C) + 2 * C"), r"two matrices"),
        ("no output projection", COUNT.format("(V + P) * C + L * (11 * C**2 + 12 * C) + 2 * C"), r"fourth matrix"),
        ("gpt2 by heart", COUNT.format("124439808"), r"3 layers of width 10"),
        ("in millions", COUNT.format("124.4"), r"whole number"),
    ],
}
TestExercises = exercise_tests("04", WRONG)
