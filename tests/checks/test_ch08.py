"""The exercises of chapter 08, the sliding window, and the wrong answers that people give."""

from exercise_harness import exercise_tests


def mask(rule: str) -> str:
    return f"""
def window_mask(q_pos_T, k_pos_S, window, sinks):
    import torch
    q, k = q_pos_T[:, None], k_pos_S[None, :]
    return {rule}
"""


def pairs(each: str) -> str:
    return f"def count_pairs(T, window, sinks):\n    return sum({each} for t in range(T))"


def slot(expression: str) -> str:
    return f"def ring_slot(position, window, sinks):\n    return {expression}"


def far(body: str) -> str:
    return f"def reach(T, n_layer, window, pattern):\n    return {body}"


NEAR = "min(t + 1, window)"
SEES_ALL = "'L' in (pattern * n_layer)[:n_layer]"

WRONG = {
    "window_mask": [
        ("window plus one", mask("(k >= 0) & (k <= q) & ((q - k <= window) | (k < sinks))"), "a query sees 4 keys"),
        ("window minus one", mask("(k >= 0) & (k <= q) & ((q - k < window - 1) | (k < sinks))"), "a query sees 2 keys"),
        ("future", mask("(k >= 0) & ((q - k < window) | (k < sinks))"), "row 0, column 1: .* sees the future"),
        (
            "a sink before its time",
            mask("(k >= 0) & (((k <= q) & (q - k < window)) | (k < sinks))"),
            "a sink in the future is still the future",
        ),
        ("empty slots as sinks", mask("(k <= q) & ((q - k < window) | (k < sinks))"), "empty slot .* is visible"),
        ("no sinks", mask("(k >= 0) & (k <= q) & (q - k < window)"), "the sinks are ignored"),
        (
            "one sink more",
            mask("(k >= 0) & (k <= q) & ((q - k < window) | ((k <= sinks) & (sinks > 0)))"),
            "3 keys are",
        ),
        (
            "both at once",
            mask("(k >= 0) & (k <= q) & (q - k < window) & ((k < sinks) | (sinks == 0))"),
            "near AND a sink",
        ),
        ("no window", mask("(k >= 0) & (k <= q)"), "the window is ignored"),
        (
            "places for positions",
            mask("torch.ones(len(q), k.shape[1]).tril().bool() & ((q - k < window) | (k < sinks))"),
            "cache with empty slots|empty slot",
        ),
        ("numbers", mask("((k >= 0) & (k <= q) & ((q - k < window) | (k < sinks))).float()"), "dtype torch.float32"),
    ],
    "count_pairs": [
        ("the whole triangle", pairs("t + 1"), "the window is ignored"),
        ("a rectangle", pairs("window"), "the first queries have fewer"),
        ("not itself", pairs("min(t, window)"), r"sees itself too: min\(t \+ 1, window\)"),
        ("window plus one", pairs("min(t + 1, window + 1)"), "gets window \\+ 1 keys"),
        ("window minus one", pairs("min(t + 1, window - 1)"), "gets window - 1 keys"),
        ("no sinks", pairs(NEAR), "the same as without sinks"),
        ("sinks always", pairs(f"{NEAR} + sinks"), "counted twice"),
        ("all sinks at once", pairs(f"{NEAR} + (sinks if t >= window else 0)"), "only one sink that has left"),
        ("no number", "def count_pairs(T, window, sinks):\n    return None", r"None .* expected a number"),
    ],
    "reach": [
        ("windows side by side", far("min(T, n_layer * window)"), "adds only window - 1"),
        ("without itself", far("min(T, n_layer * (window - 1))"), "the last position itself counts"),
        ("one layer", far("min(T, window)"), "a single layer"),
        ("to the power", far("min(T, window ** n_layer)"), "overlap"),
        ("itself once too few", far("min(T, n_layer * (window - 1) + (n_layer == 1))"), "6 times 7; the last position"),
        ("all", far("window if n_layer == 1 else T"), "no layer here sees it whole"),
        ("longer than the text", far("n_layer * (window - 1) + 1"), "only 20 positions"),
        ("pattern ignored", far("min(T, n_layer * (window - 1) + 1)"), "fourth layer sees everything"),
        (
            "pattern not repeated over layers",
            far("T if 'L' in pattern else min(T, n_layer * (window - 1) + 1)"),
            "never get to the L",
        ),
        (
            "a full layer as nothing",
            far(f"T - 1 if {SEES_ALL} else min(T, n_layer * (window - 1) + 1)"),
            "pattern SSSL is 999",
        ),
    ],
    "ring_slot": [
        ("one slot more", slot("position % (window + 1)"), "as if the ring had 9 slots"),
        ("no sinks", slot("position % window"), "overwrites a sink"),
        ("one large ring", slot("position % (window + sinks)"), "overwrites a sink"),
        (
            "smaller ring",
            slot("position if position < sinks else sinks + (position - sinks) % (window - sinks)"),
            "still in the window",
        ),
        (
            "counted from 0",
            slot("position if position < sinks else sinks + position % window"),
            "leaves slot 2 empty",
        ),
        (
            "past the end",
            slot("position if position < sinks else sinks + (position - sinks) % (window + sinks)"),
            "there are 8",
        ),
        ("never round", slot("position"), "the slot of position 19 in a ring of 8 is 19"),
        ("no sink slots", slot("(position - sinks) % window"), "goes to slot|overwrites a sink"),
    ],
}

TestExercises = exercise_tests("08", WRONG)
