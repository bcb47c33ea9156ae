"""How much arithmetic attention and the whole model cost, counted by what a query really sees.

One multiplication and one addition are 2 FLOPs. Softmax, norms and biases are left out, as is usual (Kaplan et al.
2020, arXiv:2001.08361, section 2.1); a backward pass costs twice its forward pass.
"""

from gpt2course.config import GPTConfig


def visible_pairs(T: int, window: int | None = None, sinks: int = 0) -> int:
    """Pairs of a query and a key it sees in causal attention over T positions: about T²/2, or T x window.

    Query t sees min(t + 1, window + sinks) keys: its window, and as many sinks as lie before that.
    """
    most = T if window is None else min(T, window + sinks)
    return most * (most + 1) // 2 + (T - most) * most


def attention_flops(n_head: int, head_dim: int, T: int, window: int | None = None, sinks: int = 0) -> int:
    """FLOPs of one forward pass of attention proper: in each head 2 D for a score and 2 D for a weighted value."""
    return 4 * n_head * head_dim * visible_pairs(T, window, sinks)


def forward_flops(config: GPTConfig, T: int) -> int:
    """FLOPs of one forward pass over T tokens: 2 for each token and each weight of a matrix, plus attention."""
    C, D, H, G = config.n_embd, config.head_dim, config.n_head, config.kv_heads
    matrices = config.n_layer * (C * (H + 2 * G) * D + C * C + 8 * C * C) + C * config.vocab_size
    attention = sum(
        attention_flops(H, D, T, config.layer_window(layer), config.sinks) for layer in range(config.n_layer)
    )
    return 2 * matrices * T + attention


def training_flops(config: GPTConfig, T: int) -> int:
    """FLOPs of a forward and a backward pass over T tokens: three forward passes."""
    return 3 * forward_flops(config, T)
