"""The exercises of chapter 07 refuse the mistakes that people make with shared heads."""

from exercise_harness import exercise_tests

WRONG = {
    "key_head_of": [
        (
            "dealt out in turn",
            """
            def key_head_of(h, n_head, n_kv_head):
                return h % n_kv_head
            """,
            r"`repeat`",
        ),
        (
            "G taken for the group's size",
            """
            def key_head_of(h, n_head, n_kv_head):
                return h // n_kv_head
            """,
            r"the number of key heads",
        ),
        (
            "a fraction",
            """
            def key_head_of(h, n_head, n_kv_head):
                return h / (n_head / n_kv_head)
            """,
            r"a float .*whole number; use //",
        ),
        (
            "counted from one",
            """
            def key_head_of(h, n_head, n_kv_head):
                return h // (n_head // n_kv_head) + 1
            """,
            r"numbers 0 to 3",
        ),
        (
            "every query head its own",
            """
            def key_head_of(h, n_head, n_kv_head):
                return h
            """,
            r"numbers 0 to 3",
        ),
        (
            "backwards",
            """
            def key_head_of(h, n_head, n_kv_head):
                return n_kv_head - 1 - h // (n_head // n_kv_head)
            """,
            r"query head 0 reads key head 0",
        ),
    ],
    "expand_heads": [
        (
            "repeat",
            """
            def expand_heads(k_BGSD, n_head):
                return k_BGSD.repeat(1, n_head // k_BGSD.shape[1], 1, 1)
            """,
            r"order of `repeat`",
        ),
        (
            "the new axis before the heads",
            """
            def expand_heads(k_BGSD, n_head):
                B, G, S, D = k_BGSD.shape
                return k_BGSD[:, None].expand(B, n_head // G, G, S, D).reshape(B, n_head, S, D)
            """,
            r"order of `repeat`",
        ),
        (
            "n_head taken for the number of copies",
            """
            def expand_heads(k_BGSD, n_head):
                return k_BGSD.repeat_interleave(n_head, dim=1)
            """,
            r"each of 4 is wanted 3 times",
        ),
        (
            "copies the positions",
            """
            def expand_heads(k_BGSD, n_head):
                return k_BGSD.repeat_interleave(n_head // k_BGSD.shape[1], dim=2)
            """,
            r"from 4 key heads for 12: shape",
        ),
        (
            "copies of positions, reshaped until the shape fits",
            """
            def expand_heads(k_BGSD, n_head):
                B, G, S, D = k_BGSD.shape
                return k_BGSD.repeat_interleave(n_head // G, dim=2).reshape(B, n_head, S, D)
            """,
            r"keys for 12 query heads over 4",
        ),
        (
            "positions turned round",
            """
            def expand_heads(k_BGSD, n_head):
                return k_BGSD.repeat_interleave(n_head // k_BGSD.shape[1], dim=1).flip(2)
            """,
            r"positions have changed places",
        ),
        (
            "nothing copied",
            """
            def expand_heads(k_BGSD, n_head):
                return k_BGSD
            """,
            r"shape \(2, 4, 5, 3\), expected \(2, 12, 5, 3\)",
        ),
    ],
    "longest_context": [
        (
            "keys only",
            """
            def longest_context(config, memory_bytes, bytes_per_number, texts):
                a_token = config.n_layer * config.n_kv_head * config.head_dim * bytes_per_number
                return memory_bytes // (a_token * texts)
            """,
            r"a key and a value",
        ),
        (
            "all query heads",
            """
            def longest_context(config, memory_bytes, bytes_per_number, texts):
                a_token = 2 * config.n_layer * config.n_head * config.head_dim * bytes_per_number
                return memory_bytes // (a_token * texts)
            """,
            r"you count all 32",
        ),
        (
            "the group's size",
            """
            def longest_context(config, memory_bytes, bytes_per_number, texts):
                readers = config.n_head // config.n_kv_head
                a_token = 2 * config.n_layer * readers * config.head_dim * bytes_per_number
                return memory_bytes // (a_token * texts)
            """,
            r"not how many query heads share one",
        ),
        (
            "one layer",
            """
            def longest_context(config, memory_bytes, bytes_per_number, texts):
                a_token = 2 * config.n_kv_head * config.head_dim * bytes_per_number
                return memory_bytes // (a_token * texts)
            """,
            r"every layer",
        ),
        (
            "the width of the model",
            """
            def longest_context(config, memory_bytes, bytes_per_number, texts):
                a_token = 2 * config.n_layer * config.n_kv_head * config.n_embd * bytes_per_number
                return memory_bytes // (a_token * texts)
            """,
            r"not n_embd",
        ),
        (
            "numbers for bytes",
            """
            def longest_context(config, memory_bytes, bytes_per_number, texts):
                a_token = 2 * config.n_layer * config.n_kv_head * config.head_dim
                return memory_bytes // (a_token * texts)
            """,
            r"each number takes 4 bytes",
        ),
        (
            "one text",
            """
            def longest_context(config, memory_bytes, bytes_per_number, texts):
                a_token = 2 * config.n_layer * config.n_kv_head * config.head_dim * bytes_per_number
                return memory_bytes // a_token
            """,
            r"every text has a cache of its own",
        ),
        (
            "rounded up",
            """
            def longest_context(config, memory_bytes, bytes_per_number, texts):
                a_token = 2 * config.n_layer * config.n_kv_head * config.head_dim * bytes_per_number
                return -(-memory_bytes // (a_token * texts))
            """,
            r"round down",
        ),
        (
            "a fraction of a token",
            """
            def longest_context(config, memory_bytes, bytes_per_number, texts):
                a_token = 2 * config.n_layer * config.n_kv_head * config.head_dim * bytes_per_number
                return memory_bytes / (a_token * texts)
            """,
            r"a float .*whole number of tokens",
        ),
    ],
    "mean_pool": [
        (
            "heads that lie apart",
            """
            def mean_pool(rows, n_head, n_kv_head):
                groups = rows.unflatten(0, (n_head // n_kv_head, n_kv_head, rows.shape[0] // n_head))
                return groups.mean(dim=0).flatten(0, 1)
            """,
            r"weight of 12 heads to 4: you average heads that lie apart",
        ),
        (
            "rows inside a head",
            """
            def mean_pool(rows, n_head, n_kv_head):
                groups = rows.unflatten(0, (-1, n_head // n_kv_head))
                return groups.mean(dim=1)
            """,
            r"neighbouring rows inside a head",
        ),
        (
            "the sum",
            """
            def mean_pool(rows, n_head, n_kv_head):
                groups = rows.unflatten(0, (n_kv_head, n_head // n_kv_head, rows.shape[0] // n_head))
                return groups.sum(dim=1).flatten(0, 1)
            """,
            r"divide by their number",
        ),
        (
            "the first head",
            """
            def mean_pool(rows, n_head, n_kv_head):
                groups = rows.unflatten(0, (n_kv_head, n_head // n_kv_head, rows.shape[0] // n_head))
                return groups[:, 0].flatten(0, 1)
            """,
            r"the first head of each group",
        ),
        (
            "over the wrong axis",
            """
            def mean_pool(rows, n_head, n_kv_head):
                groups = rows.unflatten(0, (n_kv_head, n_head // n_kv_head, rows.shape[0] // n_head))
                return groups.mean(dim=2).flatten(0, 1)
            """,
            r"to \(12, 5\), expected \(12, 5\)|weight of 12 heads to 4",
        ),
        (
            "forgets the bias",
            """
            def mean_pool(rows, n_head, n_kv_head):
                D, C = rows.shape[0] // n_head, rows.shape[1]
                return rows.reshape(n_kv_head, n_head // n_kv_head, D, C).mean(1).reshape(n_kv_head * D, C)
            """,
            r"not a bias of shape \(36,\)",
        ),
        (
            "leaves the groups apart",
            """
            def mean_pool(rows, n_head, n_kv_head):
                return rows.unflatten(0, (n_kv_head, n_head // n_kv_head, rows.shape[0] // n_head)).mean(dim=1)
            """,
            r"to \(4, 3, 5\), expected \(12, 5\)",
        ),
        (
            "one head for the whole layer",
            """
            def mean_pool(rows, n_head, n_kv_head):
                return rows.unflatten(0, (n_head, -1)).mean(dim=0)
            """,
            r"to \(3, 5\), expected \(12, 5\)",
        ),
    ],
}

TestExercises = exercise_tests("07", WRONG)
