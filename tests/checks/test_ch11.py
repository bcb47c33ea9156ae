"""The exercises of chapter 11, data parallel, and the wrong answers that people give."""

from exercise_harness import exercise_tests


def mean(body: str) -> str:
    return f"def global_mean(means, counts):\n    return {body}"


SUM = "sum(m * n for m, n in zip(means, counts))"
VALID = "sum(m * n for m, n in zip(means, counts) if n)"


def step(chunk: str = "(rank - step) % N", to: str = "(rank + 1) % N", test: str = "<") -> str:
    return f"""
def ring_step(parts_NNC, step):
    N, after = len(parts_NNC), parts_NNC.clone()
    for rank in range(N):
        chunk, to = {chunk}, {to}
        arrived = parts_NNC[rank, chunk]
        after[to, chunk] = parts_NNC[to, chunk] + arrived if step {test} N - 1 else arrived
    return after
"""


def buckets(
    order: str = "reversed(range(len(sizes)))",
    full: str = "current and room < sizes[i]",
    end: str = "if current:",
    item: str = "i",
    last: str = "",
) -> str:
    return f"""
def fill_buckets(sizes, limit):
    found, current, room = [], [], limit
    for i in {order}:
        if {full}:
            found.append(current)
            current, room = [], limit
        current.append({item})
        room -= sizes[i]
    {end}
        found.append(current{last})
    return found
"""


FIRST_FIT = """
def fill_buckets(sizes, limit):
    found = []
    for i in reversed(range(len(sizes))):
        for bucket in found:
            if sum(sizes[j] for j in bucket) + sizes[i] <= limit:
                bucket.append(i)
                break
        else:
            found.append([i])
    return found
"""


WRONG = {
    "global_mean": [
        ("mean of means", mean("sum(means) / len(means)"), "10 tokens count as much as the other 30"),
        ("sum", mean(SUM), "the sum over all tokens; divide"),
        ("over processes", mean(f"{SUM} / len(means)"), "divide it by that of tokens, 40"),
        (
            "the other's weight",
            mean("sum(m * n for m, n in zip(means, counts[::-1])) / sum(counts)"),
            "weighted by the other's",
        ),
        ("nan", mean(f"{SUM} / max(1, sum(counts))"), "0 \\* nan is nan"),
        ("division by zero", mean(f"{VALID} / sum(counts)"), "no token anywhere .*ZeroDivisionError"),
        (
            "skips one token",
            mean("sum(m * n for m, n in zip(means, counts) if n > 1) / max(1, sum(counts))"),
            "of four",
        ),
        ("nothing", "def global_mean(means, counts):\n    pass", "None .* expected a number"),
    ],
    "ring_step": [
        ("plus", step(chunk="(rank + step) % N"), r"number r - step \(mod N\)"),
        ("own chunk", step(chunk="rank"), "sends the chunk of its own number"),
        ("backwards", step(to="(rank - 1) % N"), "go to the rank before"),
        ("always adds", step(test="< 100 +"), "a complete sum replaces"),
        (
            "one chunk further in round two",
            step(chunk="(rank - step + (step >= N - 1)) % N"),
            "the rule for the chunk is the same in both rounds",
        ),
        ("never adds", step(test="< -100 +"), "overwritten; in the first"),
        ("one step too long", step(test="<="), "a complete sum replaces"),
        ("nothing", "def ring_step(parts_NNC, step):\n    return parts_NNC", "nothing has changed"),
        ("a list", "def ring_step(parts_NNC, step):\n    return list(parts_NNC)", "a list, expected a tensor"),
        ("zeros", "def ring_step(parts_NNC, step):\n    return parts_NNC * 0", "rank 0, chunk 0 holds"),
    ],
    "fill_buckets": [
        ("first first", buckets(order="range(len(sizes))"), "go from the end"),
        ("the last is lost", buckets(end="if False:"), "in no bucket"),
        ("closed too late", buckets(full="current and room <= 0"), "over the limit"),
        ("closed too early", buckets(full="current and room <= sizes[i]"), "would still fit"),
        ("an empty bucket", buckets(full="room < sizes[i]"), "a bucket is empty"),
        (
            "one each",
            "def fill_buckets(sizes, limit):\n    return [[i] for i in reversed(range(len(sizes)))]",
            "still fit",
        ),
        ("sizes", buckets(item="sizes[i]"), "these are sizes; give indices"),
        ("one index twice", "def fill_buckets(sizes, limit):\n    return [[0, 0, 1, 2, 3]]", "is in two buckets"),
        (
            "ascending inside",
            buckets(end="found = [b[::-1] for b in found]\n    if current:", last="[::-1]"),
            "also within",
        ),
        ("first that fits", FIRST_FIT, "parameter 1 went into .*A bucket once left stays closed"),
        ("empty at the end", buckets(end="if True:"), "a bucket is empty"),
        ("by size", buckets(order="sorted(range(len(sizes)), key=lambda i: sizes[i])"), "go from the (end|last)"),
        ("a flat list", "def fill_buckets(sizes, limit):\n    return [0, 1]", "list of lists"),
    ],
}

TestExercises = exercise_tests("11", WRONG)
