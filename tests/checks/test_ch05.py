"""The exercises of chapter 05 refuse the mistakes that people make with published weights."""

from exercise_harness import exercise_tests

WRONG = {
    "to_linear": [
        (
            "nothing is turned",
            """
            def to_linear(name, tensor):
                return tensor
            """,
            r"stored \(in, out\)",
        ),
        (
            "every matrix is turned",
            """
            def to_linear(name, tensor):
                return tensor.t() if tensor.ndim == 2 else tensor
            """,
            r"wte.weight was turned",
        ),
        (
            "the square one is trusted to its shape",
            """
            def to_linear(name, tensor):
                turned = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
                return tensor.t() if name.endswith(turned) and tensor.shape[0] != tensor.shape[1] else tensor
            """,
            r"attn\.c_proj\.weight is square",
        ),
        (
            "reshaped instead of transposed",
            """
            def to_linear(name, tensor):
                turned = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
                return tensor.reshape(tensor.shape[::-1]) if name.endswith(turned) else tensor
            """,
            r"c_attn.weight|is square",
        ),
    ],
    "first_wrong": [
        (
            "the largest",
            """
            def first_wrong(differences, limit):
                name = max(differences, key=differences.get)
                return name if differences[name] > limit else None
            """,
            r"the largest or last",
        ),
        (
            "NaN slips through",
            """
            def first_wrong(differences, limit):
                return next((name for name, value in differences.items() if value > limit), None)
            """,
            r"h\.0 is NaN",
        ),
        (
            "always names something",
            """
            def first_wrong(differences, limit):
                return next(iter(differences))
            """,
            r"return None when all",
        ),
        (
            "not zero counts as wrong",
            """
            def first_wrong(differences, limit):
                return next((name for name, value in differences.items() if value > 0), None)
            """,
            r"nothing is off here",
        ),
    ],
    "top_p_keep": [
        (
            "drops the token that crosses",
            """
            def top_p_keep(p_V, top_p):
                import torch
                sorted_V, order_V = p_V.sort(descending=True)
                return torch.zeros_like(p_V, dtype=torch.bool).scatter(0, order_V, sorted_V.cumsum(0) <= top_p)
            """,
            r"crosses the line stays",
        ),
        (
            "in sorted order",
            """
            def top_p_keep(p_V, top_p):
                sorted_V, _ = p_V.sort(descending=True)
                return sorted_V.cumsum(0) - sorted_V < top_p
            """,
            r"sorted order",
        ),
        (
            "a threshold on the probability",
            """
            def top_p_keep(p_V, top_p):
                return p_V >= 1 - top_p
            """,
            r"alone|kept for top_p",
        ),
        (
            "probabilities instead of booleans",
            """
            def top_p_keep(p_V, top_p):
                return p_V * (p_V > 0.2)
            """,
            r"expected booleans",
        ),
        (
            "one token too many",
            """
            def top_p_keep(p_V, top_p):
                import torch
                sorted_V, order_V = p_V.sort(descending=True)
                before_V = sorted_V.cumsum(0) - 2 * sorted_V
                return torch.zeros_like(p_V, dtype=torch.bool).scatter(0, order_V, before_V < top_p)
            """,
            r"kept for top_p|more than needed|kept where",
        ),
    ],
    "kv_cache_bytes": [
        (
            "keys only",
            """
            def kv_cache_bytes(config, batch_size, positions, bytes_per_number):
                return config.n_layer * batch_size * config.kv_heads * positions * config.head_dim * bytes_per_number
            """,
            r"both keys and values",
        ),
        (
            "one layer",
            """
            def kv_cache_bytes(config, batch_size, positions, bytes_per_number):
                return 2 * batch_size * config.kv_heads * positions * config.head_dim * bytes_per_number
            """,
            r"every one of the 12 layers",
        ),
        (
            "all query heads",
            """
            def kv_cache_bytes(config, batch_size, positions, bytes_per_number):
                return 2 * config.n_layer * batch_size * positions * config.n_embd * bytes_per_number
            """,
            r"only 4 of the 12 heads",
        ),
        (
            "forgets the batch",
            """
            def kv_cache_bytes(config, batch_size, positions, bytes_per_number):
                return 2 * config.n_layer * config.kv_heads * positions * config.head_dim * bytes_per_number
            """,
            r"batch 3",
        ),
    ],
}

TestExercises = exercise_tests("05", WRONG)
