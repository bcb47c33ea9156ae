"""Chapter 01's exercises: the usual mistakes, each told in words."""

from exercise_harness import exercise_tests

WRONG = {
    "best_pair": [
        (
            "counts ignored",
            """
            def best_pair(words):
                from collections import Counter
                return max((c := Counter(p for w in words for p in zip(w, w[1:]))), key=c.get)
            """,
            "a word seen 9 times counts 9 times",
        ),
        (
            "pairs across words",
            """
            def best_pair(words):
                from collections import Counter
                tokens = [token for word, times in words.items() for _ in range(times) for token in word]
                counts = Counter(zip(tokens, tokens[1:]))
                return max(counts, key=counts.get)
            """,
            "never runs from a word into the next",
        ),
        (
            "once a word",
            """
            def best_pair(words):
                counts = {}
                for word, times in words.items():
                    for pair in dict.fromkeys(zip(word, word[1:])):
                        counts[pair] = counts.get(pair, 0) + times
                return max(counts, key=counts.get)
            """,
            "twice in a word counts twice",
        ),
        (
            "letters instead of tokens",
            """
            def best_pair(words):
                counts = {}
                for word, times in words.items():
                    text = "".join(word)
                    for pair in zip(text, text[1:]):
                        counts[pair] = counts.get(pair, 0) + times
                return max(counts, key=counts.get)
            """,
            "'th' is one token here, not two letters",
        ),
        (
            "last of equals",
            """
            def best_pair(words):
                counts = {}
                for word, times in words.items():
                    for pair in zip(word, word[1:]):
                        counts[pair] = counts.get(pair, 0) + times
                return max(counts, key=lambda pair: (counts[pair], pair))
            """,
            "both occur 9 times, and the first met wins",
        ),
        (
            "pair with its count",
            """
            def best_pair(words):
                from collections import Counter
                return Counter(p for w in words for p in zip(w, w[1:])).most_common(1)[0]
            """,
            "return one pair of tokens",
        ),
        ("glued", "def best_pair(words):\n    return 'ab'", "glued together; return the pair itself"),
    ],
    "merge": [
        (
            "overlapping pairs",
            """
            def merge(ids, pair, new_id):
                out, i = [], 0
                while i < len(ids):
                    if tuple(ids[i : i + 2]) == pair:
                        out.append(new_id)
                        i += 1 if tuple(ids[i + 1 : i + 3]) == pair else 2
                    else:
                        out.append(ids[i])
                        i += 1
                return out
            """,
            "a token is used once",
        ),
        (
            "right to left",
            """
            def merge(ids, pair, new_id):
                out, i = [], len(ids)
                while i > 0:
                    if tuple(ids[max(i - 2, 0) : i]) == pair:
                        out.insert(0, new_id)
                        i -= 2
                    else:
                        out.insert(0, ids[i - 1])
                        i -= 1
                return out
            """,
            r"merge\(\[97, 97, 97\].*gave \[97, 256\], expected \[256, 97\].*from left to right",
        ),
        (
            "last token lost",
            """
            def merge(ids, pair, new_id):
                out, i = [], 0
                while i < len(ids) - 1:
                    if (ids[i], ids[i + 1]) == pair:
                        out.append(new_id)
                        i += 2
                    else:
                        out.append(ids[i])
                        i += 1
                return out
            """,
            "expected .7, 256, 9.",
        ),
        (
            "first pair only",
            """
            def merge(ids, pair, new_id):
                for i in range(len(ids) - 1):
                    if (ids[i], ids[i + 1]) == pair:
                        return ids[:i] + [new_id] + ids[i + 2 :]
                return ids
            """,
            "every place where the pair stands",
        ),
        (
            "steps over one",
            """
            def merge(ids, pair, new_id):
                out = []
                for i in range(len(ids)):
                    out.append(new_id if tuple(ids[i : i + 2]) == pair else ids[i])
                return out
            """,
            r"gave \[7, 256, 2, 9\], expected \[7, 256, 9\]",
        ),
        (
            "past the end",
            """
            def merge(ids, pair, new_id):
                out, i = [], 0
                while i < len(ids):
                    if ids[i] == pair[0] and ids[i + 1] == pair[1]:
                        out.append(new_id)
                        i += 2
                    else:
                        out.append(ids[i])
                        i += 1
                return out
            """,
            "your function raised IndexError",
        ),
        (
            "either order",
            """
            def merge(ids, pair, new_id):
                out, i = [], 0
                while i < len(ids):
                    if sorted(ids[i : i + 2]) == sorted(pair):
                        out.append(new_id)
                        i += 2
                    else:
                        out.append(ids[i])
                        i += 1
                return out
            """,
            "the order counts",
        ),
    ],
    "encode_by_rank": [
        (
            "longest match",
            """
            def encode_by_rank(piece, ranks):
                ids = []
                while piece:
                    n = next(n for n in range(len(piece), 0, -1) if piece[:n] in ranks)
                    ids.append(ranks[piece[:n]])
                    piece = piece[n:]
                return ids
            """,
            "you took the longest token from the left",
        ),
        (
            "first that fits",
            """
            def encode_by_rank(piece, ranks):
                parts = [piece[i : i + 1] for i in range(len(piece))]
                while True:
                    at = next((i for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks), None)
                    if at is None:
                        return [ranks[part] for part in parts]
                    parts[at : at + 2] = [parts[at] + parts[at + 1]]
            """,
            "you merged the first pair from the left",
        ),
        (
            "highest rank",
            """
            def encode_by_rank(piece, ranks):
                parts = [piece[i : i + 1] for i in range(len(piece))]
                while True:
                    found = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
                    if not found:
                        return [ranks[part] for part in parts]
                    i = max(found)[1]
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
            """,
            "HIGHEST rank",
        ),
        (
            "one merge only",
            """
            def encode_by_rank(piece, ranks):
                parts = [piece[i : i + 1] for i in range(len(piece))]
                found = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
                if found:
                    i = min(found)[1]
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
                return [ranks[part] for part in parts]
            """,
            r"ids of b'abc'",
        ),
        (
            "bytes only",
            "def encode_by_rank(piece, ranks):\n    return [ranks[bytes([b])] for b in piece]",
            "no two tokens were merged",
        ),
        (
            "tokens instead of ids",
            "def encode_by_rank(piece, ranks):\n    return [piece] if piece in ranks else [piece[:2], piece[2:]]",
            "these are the tokens; return their ids",
        ),
    ],
    "inputs_and_targets": [
        (
            "targets are inputs",
            """
            def inputs_and_targets(tokens, block_size):
                N = (len(tokens) - 1) // block_size
                x = tokens[: N * block_size].view(N, block_size)
                return x, x
            """,
            "targets equal inputs",
        ),
        (
            "shifted the wrong way",
            """
            def inputs_and_targets(tokens, block_size):
                N = (len(tokens) - 1) // block_size
                x = tokens[: N * block_size].view(N, block_size)
                y = tokens[1 : N * block_size + 1].view(N, block_size)
                return y, x
            """,
            "the token BEFORE each input",
        ),
        (
            "windows that do not overlap",
            """
            def inputs_and_targets(tokens, block_size):
                T = block_size
                N = len(tokens) // (T + 1)
                rows = tokens[: N * (T + 1)].view(N, T + 1)
                return rows[:, :-1], rows[:, 1:]
            """,
            "token 105 is never a target",
        ),
        (
            "a window at every token",
            """
            def inputs_and_targets(tokens, block_size):
                rows = tokens.unfold(0, block_size + 1, 1)
                return rows[:, :-1], rows[:, 1:]
            """,
            "a window starts at every token",
        ),
        (
            "one window too many",
            """
            def inputs_and_targets(tokens, block_size):
                import torch
                N = -(-len(tokens) // block_size)
                padded = torch.cat([tokens, tokens.new_zeros(N * block_size + 1 - len(tokens))])
                return padded[:-1].view(N, block_size), padded[1:].view(N, block_size)
            """,
            r"inputs has shape \(4, 4\), expected \(3, 4\)",
        ),
        (
            "one long row",
            "def inputs_and_targets(tokens, block_size):\n    return tokens[:-1], tokens[1:]",
            "expected one row a window",
        ),
    ],
    "rows_of_rank": [
        (
            "same rows on each rank",
            "def rows_of_rank(batch_size, rank, world_size):\n    return list(range(batch_size // world_size))",
            "ranks 0 and 1 read the same rows",
        ),
        (
            "rest dropped",
            """
            def rows_of_rank(batch_size, rank, world_size):
                n = batch_size // world_size
                return list(range(rank * n, (rank + 1) * n))
            """,
            "nobody reads row 8, 9",
        ),
        (
            "interleaved",
            "def rows_of_rank(batch_size, rank, world_size):\n    return list(range(rank, batch_size, world_size))",
            "rows that follow one another",
        ),
        (
            "rest to the last rank",
            """
            def rows_of_rank(batch_size, rank, world_size):
                n = batch_size // world_size
                return list(range(rank * n, batch_size if rank == world_size - 1 else (rank + 1) * n))
            """,
            r"the ranks have \[2, 2, 2, 4\] rows",
        ),
        (
            "rounded up past the end",
            """
            def rows_of_rank(batch_size, rank, world_size):
                n = -(-batch_size // world_size)
                return list(range(rank * n, (rank + 1) * n))
            """,
            "there is no row",
        ),
        (
            "rounded up",
            """
            def rows_of_rank(batch_size, rank, world_size):
                n = -(-batch_size // world_size)
                return list(range(rank * n, min((rank + 1) * n, batch_size)))
            """,
            r"the ranks have \[3, 3, 3, 1\] rows",
        ),
        (
            "overlap by one",
            """
            def rows_of_rank(batch_size, rank, world_size):
                begin, end = batch_size * rank // world_size, batch_size * (rank + 1) // world_size
                return list(range(begin, min(end + 1, batch_size)))
            """,
            "some row is read twice",
        ),
        (
            "how many instead of which",
            "def rows_of_rank(batch_size, rank, world_size):\n    return batch_size // world_size",
            "return a list of row numbers",
        ),
    ],
}

TestExercises = exercise_tests("01", WRONG)
