"""The exercises of chapter 03, attention, and the wrong answers that people give."""

from exercise_harness import exercise_tests


def softmax(body: str) -> str:
    return f"def stable_softmax(scores):\n    {body}"


def mask(expression: str) -> str:
    return f"def causal_mask(T):\n    import torch\n    return {expression}"


def heads(
    split: str = "x.view(B, T, n_head, D).transpose(1, 2)",
    divisor: str = "math.sqrt(D)",
    weights: str = "scores.masked_fill(~seen, -math.inf).softmax(dim=-1)",
    seen: str = "torch.ones(T, T, dtype=torch.bool).tril()",
    merge: str = "(weights @ v).transpose(1, 2).reshape(B, T, C)",
) -> str:
    return f"""
def multi_head(q_BTC, k_BTC, v_BTC, n_head):
    import math
    import torch
    B, T, C = q_BTC.shape
    D = C // n_head
    q, k, v = ({split} for x in (q_BTC, k_BTC, v_BTC))
    scores = q @ k.transpose(-2, -1) / {divisor}
    seen = {seen}
    weights = {weights}
    return {merge}
"""


def rule(seen: str, scores: str = "q_TD @ k_SD.T / math.sqrt(q_TD.shape[1])", fill: str = "-math.inf") -> str:
    return f"""
def attend_by_rule(q_TD, k_SD, v_SD, q_pos_T, k_pos_S, window=None):
    import math
    import torch
    q, k = q_pos_T[:, None], k_pos_S[None, :]
    window = 10**6 if window is None else window
    scores = ({scores}).masked_fill(~({seen}), {fill})
    return scores.softmax(dim=-1) @ v_SD
"""


MAX = "scores.amax(dim=-1, keepdim=True)"
RULE = "(k >= 0) & (k <= q) & (q - k < window)"

WRONG = {
    "stable_softmax": [
        ("overflow", softmax("e = scores.exp(); return e / e.sum(-1, keepdim=True)"), "1000 give NaN"),
        (
            "one maximum",
            softmax("e = (scores - scores.max()).exp(); return e / e.sum(-1, keepdim=True)"),
            "own maximum",
        ),
        ("over the batch", softmax("return scores.softmax(dim=0)"), "over axis 0"),
        ("over the queries", softmax("return scores.softmax(dim=1)"), "over axis 1"),
        ("one sum", softmax("e = (scores - scores.max()).exp(); return e / e.sum()"), "whole tensor"),
        ("no sum", softmax(f"return (scores - {MAX}).exp()"), "not divided by their sum"),
        ("sum without keepdim", softmax("e = scores.exp(); return e / e.sum(-1)[:, None, :]"), "keepdim=True"),
        (
            "the mean instead of the maximum",
            softmax("e = (scores - scores.mean(-1, keepdim=True)).exp(); return e / e.sum(-1, keepdim=True)"),
            "give NaN",
        ),
        (
            "clamped scores",
            softmax("e = scores.clamp(max=80).exp(); return e / e.sum(-1, keepdim=True)"),
            r"1000, 999, 0 the result\[0, 0\] is 0.5",
        ),
        (
            "small weights cut off",
            softmax(f"return (scores - {MAX}).clamp(min=-5).softmax(-1)"),
            r"1000, 999, 0 the result\[0, 0\] is 0.727",
        ),
        (
            "hidden keys counted as zero",
            softmax(f"return (scores - {MAX}).nan_to_num(neginf=0).softmax(-1)"),
            r"hidden key the result\[0, 0\]",
        ),
        ("no gradient", softmax("return scores.detach().softmax(-1).requires_grad_()"), "gradient is missing"),
    ],
    "causal_mask": [
        ("sees one more", mask("torch.ones(T, T).tril(1).bool()"), "row 0, column 1: .* sees the future"),
        ("does not see itself", mask("torch.ones(T, T).tril(-1).bool()"), "row 0, column 0: .* does not see itself"),
        ("transposed", mask("torch.ones(T, T).triu().bool()"), "upper triangle"),
        ("inverted", mask("torch.ones(T, T).triu(1).bool()"), "wrong way round"),
        ("numbers", mask("torch.ones(T, T).tril()"), "dtype torch.float32.*torch.bool"),
        ("minus infinity", mask("torch.full((T, T), -float('inf')).triu(1)"), "dtype torch.float32"),
        ("no mask", mask("torch.ones(T, T, dtype=torch.bool)"), "row 0, column 1: .* sees the future"),
        ("a list", mask("[[k <= q for k in range(T)] for q in range(T)]"), "a list, expected a tensor"),
        ("only for four", mask("torch.ones(4, 4, dtype=torch.bool).tril()"), r"T = 1 has shape \(4, 4\)"),
        ("a window of four", mask("torch.ones(T, T).tril().triu(-3).bool()"), r"T = 9\[4, 0\] is False"),
    ],
    "multi_head": [
        ("no scaling", heads(divisor="1"), "not scaled"),
        ("scaled by D", heads(divisor="D"), "divided by D instead of by its root"),
        ("scaled by the whole width", heads(divisor="math.sqrt(C)"), "√C"),
        ("softmax over the queries", heads(weights="scores.masked_fill(~seen, -math.inf).softmax(-2)"), "dim=-2"),
        (
            "softmax over the heads",
            heads(weights="scores.masked_fill(~seen, -math.inf).softmax(1).nan_to_num()"),
            "dim=1",
        ),
        ("no mask", heads(weights="scores.softmax(-1)"), "no causal mask"),
        ("mask after softmax", heads(weights="scores.softmax(-1) * seen"), "comes after the softmax"),
        ("mask with 0", heads(weights="scores.masked_fill(~seen, 0).softmax(-1)"), r"exp\(0\) is 1"),
        ("sees one more", heads(seen="torch.ones(T, T).tril(1).bool()"), "off by one: each query sees one position"),
        (
            "does not see itself",
            heads(
                seen="torch.ones(T, T).tril(-1).bool()",
                weights="scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()",
            ),
            "no query sees itself",
        ),
        ("view for transpose", heads(split="x.view(B, n_head, T, D)"), "view.* cuts across positions"),
        (
            "view both ways",
            heads("x.view(B, n_head, T, D)", merge="(weights @ v).reshape(B, T, C)"),
            "split and in the merge",
        ),
        ("merge by view alone", heads(merge="(weights @ v).reshape(B, T, C)"), "merged in the wrong order"),
        ("every third column", heads(split="x.view(B, T, D, n_head).permute(0, 3, 1, 2)"), "every n_head-th column"),
        ("one head", heads().replace("    D = C", "    n_head = 1\n    D = C"), "is .* expected"),
        ("first head only", heads(merge="(weights @ v)[:, 0]"), r"shape \(2, 5, 4\), expected \(2, 5, 12\)"),
        (
            "a view of a transposed tensor",
            heads(merge="(weights @ v).transpose(1, 2).view(B, T, C)"),
            "your function raised",
        ),
        (
            "small leak",
            heads(weights="scores.masked_fill(~seen, -5.0).softmax(-1)"),
            "a query sees the future",
        ),
        (
            "weights that do not sum to one",
            heads(weights="scores.masked_fill(~seen, -math.inf).softmax(-1) * 0.9"),
            "do not sum to one",
        ),
        (
            "no gradient",
            heads(merge="(weights @ v).transpose(1, 2).reshape(B, T, C).detach() * 1.5"),
            "no gradient",
        ),
    ],
    "attend_by_rule": [
        ("one key too many", rule("(k >= 0) & (k <= q) & (q - k <= window)"), "lets a query see 3 keys"),
        ("one key too few", rule("(k >= 0) & (k <= q) & (q - k < max(window - 1, 1))"), "lets a query see 1 keys"),
        ("no window", rule("(k >= 0) & (k <= q)"), "window is ignored"),
        ("empty slots read", rule("(k <= q) & (q - k < window)"), "empty slot"),
        (
            "window both ways",
            rule("(k >= 0) & ((k <= q) | (window < 9)) & ((q - k).abs() < window)"),
            "into the future",
        ),
        ("no causality", rule("(k >= 0) & (q - k < window)"), "every key is read"),
        ("not itself", rule("(k >= 0) & (k < q) & (q - k < window)"), "does not see itself"),
        ("not scaled", rule(RULE, scores="q_TD @ k_SD.T"), "not scaled"),
        ("hidden by 0", rule(RULE, fill="0.0"), r"result without a window\[0, 0\] is"),
        (
            "slots for positions",
            rule("(torch.arange(6) <= torch.arange(3)[:, None]) & (q - q < window)"),
            "slots are compared",
        ),
    ],
}

TestExercises = exercise_tests("03", WRONG)
