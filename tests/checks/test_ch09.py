"""The exercises of chapter 09, the training loop, and the wrong answers that people give."""

from exercise_harness import exercise_tests


def rate(warm: str, after: str) -> str:
    return f"""
def rate_of_step(step, steps, peak, warmup_steps, floor):
    import math
    if step < warmup_steps:
        return {warm}
    gone = (step - warmup_steps) / max(1, steps - warmup_steps)
    return {after}
"""


WARM = "peak * (step + 1) / warmup_steps"
COSINE = "floor + (peak - floor) * (1 + math.cos(math.pi * gone)) / 2"


EARLY = COSINE.replace("gone", "(gone + 1 / (steps - warmup_steps))")


def late_cosine(begin: str, end: str) -> str:
    return rate(WARM, COSINE.replace("gone", f"min(1, (step - {begin}) / max(1, {end} - {begin}))"))


def adam(
    m: str = "m = beta1 * m + (1 - beta1) * g",
    v: str = "v = beta2 * v + (1 - beta2) * g**2",
    decay: str = "p = p - rate * decay * p",
    step: str = "p = p - rate * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)",
    back: str = "return p, m, v",
) -> str:
    lines = "\n    ".join([m, v, decay, step, back])
    return f"def adamw_step(p, g, m, v, t, rate, beta1, beta2, eps, decay):\n    {lines}"


DECAY_LAST = adam(decay="pass", back="p = p - rate * decay * p; return p, m, v")


def clip(
    norm: str = "sum(float((g**2).sum()) for g in gradients) ** 0.5",
    factor: str = "min(1.0, limit / norm) if norm else 1.0",
    back: str = "[g * factor for g in gradients], norm",
) -> str:
    return f"""
def clip_by_global_norm(gradients, limit):
    norm = {norm}
    factor = {factor}
    return {back}
"""


def accumulation(
    n: str = "max(1, sum(int((y != -100).sum()) for _, y in micro_batches))",
    part: str = "model(x, y, reduction='sum') / n",
    first: str = "pass",
    back: str = "total",
) -> str:
    return f"""
def accumulate(model, micro_batches):
    n, total, seen = {n}, 0.0, 0
    for x, y in micro_batches:
        {first}
        part = {part}
        part.backward()
        total += part.item()
    return {back}
"""


ALL_AT_ONCE = """
def accumulate(model, micro_batches):
    import torch
    loss = model(*(torch.cat(ids) for ids in zip(*micro_batches)))
    loss.backward()
    return loss.item()
"""

COUNT_SO_FAR = "seen += int((y != -100).sum())"

WRONG = {
    "rate_of_step": [
        ("first step at zero", rate("peak * step / warmup_steps", COSINE), "step 0 has rate 0 and is wasted"),
        ("peak not reached", rate("peak * (step + 1) / (warmup_steps + 1)", COSINE), "rate of step 0 is 0.0909"),
        ("no floor", rate(WARM, "peak * (1 + math.cos(math.pi * gone)) / 2"), "the cosine ends at 0"),
        ("floor on top", rate(WARM, "floor + peak * (1 + math.cos(math.pi * gone)) / 2"), "only peak - floor long"),
        (
            "cosine over all steps",
            rate(WARM, "floor + (peak - floor) * (1 + math.cos(math.pi * step / steps)) / 2"),
            "it begins after the warm-up",
        ),
        ("a line", rate(WARM, "peak + (floor - peak) * gone"), "a quarter of the way"),
        (
            "upwards",
            rate(WARM, "floor + (peak - floor) * (1 - math.cos(math.pi * gone)) / 2"),
            "the cosine goes up",
        ),
        ("ends one step early", late_cosine("warmup_steps", "steps - 1"), "it belongs to step `steps`"),
        ("begins one step early", late_cosine("(warmup_steps - 1)", "steps"), "begins in step warmup_steps - 1"),
        ("begins early, in length as well", rate(WARM, EARLY), "begins in step warmup_steps - 1"),
        ("not halved", rate(WARM, COSINE.replace(" / 2", "")), "halve it"),
        (
            "divides by the warm-up",
            rate(WARM, f"min(1, (step + 1) / warmup_steps) * ({COSINE})"),
            "divides by zero",
        ),
        ("nothing", "def rate_of_step(step, steps, peak, warmup_steps, floor):\n    return None", "return"),
    ],
    "adamw_step": [
        ("not corrected", adam(step="p = p - rate * m / (v.sqrt() + eps)"), "the first step is not corrected"),
        ("uphill", adam(step="p = p + rate * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)"), "uphill"),
        (
            "decay through the gradient",
            adam(m="g = g + decay * p; m = beta1 * m + (1 - beta1) * g", decay="pass"),
            "L2",
        ),
        ("decay without the rate", adam(decay="p = p - decay * p"), "half of p is gone"),
        ("no decay", adam(decay="pass"), r"the new p\[0\] is 1"),
        ("means swapped", adam(m="m = (1 - beta1) * m + beta1 * g"), "after the first step m"),
        ("not squared", adam(v="v = beta2 * v + (1 - beta2) * g.abs()"), "after the first step v"),
        (
            "no root",
            adam(step="p = p - rate * (m / (1 - beta1**t)) / (v / (1 - beta2**t) + eps)"),
            "against its gradient's sign",
        ),
        (
            "eps under the root",
            adam(step="p = p - rate * (m / (1 - beta1**t)) / (v / (1 - beta2**t) + eps).sqrt()"),
            "in step 1 eps is added under the root",
        ),
        (
            "eps before the correction",
            adam(step="p = p - rate * (m / (1 - beta1**t)) * (1 - beta2**t) ** 0.5 / (v.sqrt() + eps)"),
            "in step 1 eps is added before the correction of v",
        ),
        ("decay after the step", DECAY_LAST, "in step 1 the decay comes after the step"),
        (
            "corrections swapped",
            adam(step="p = p - rate * (m / (1 - beta2**t)) / ((v / (1 - beta1**t)).sqrt() + eps)"),
            "in step 1 the corrections are swapped",
        ),
        (
            "t is 1 for ever",
            adam(m="t = 1; m = beta1 * m + (1 - beta1) * g"),
            "in step 2 the correction is that of the",
        ),
        ("corrected m kept", adam(back="return p, m / (1 - beta1**t), v"), "m is returned corrected"),
        ("corrected v kept", adam(back="return p, m, v / (1 - beta2**t)"), "v is returned corrected"),
        ("weights only", adam(back="return p"), "should return three tensors"),
    ],
    "clip_by_global_norm": [
        (
            "each by its own",
            clip(back="[g * min(1.0, limit / float(g.norm())) for g in gradients], norm"),
            "its own norm",
        ),
        ("sum of norms", clip(norm="sum(float(g.norm()) for g in gradients)"), "the sum of the three norms"),
        ("largest norm", clip(norm="max(float(g.norm()) for g in gradients)"), "the largest of the three"),
        ("no root", clip(norm="sum(float((g**2).sum()) for g in gradients)"), "without the root"),
        ("norm after", clip(back="[g * factor for g in gradients], norm * factor"), "return the one from before"),
        ("always to the limit", clip(factor="limit / norm if norm else 1.0"), "made LONGER"),
        ("zero over zero", clip(factor="min(1.0, limit / norm)"), "divides by it"),
        (
            "nan",
            clip(
                norm="sum((g**2).sum() for g in gradients) ** 0.5",
                factor="(limit / norm).clamp(max=1) if norm else norm / norm",
            ),
            "NaN",
        ),
        (
            "number by number",
            clip(back="[g.clamp(-limit, limit) for g in gradients], norm"),
            "each number is clipped by itself",
        ),
        ("swapped", clip(back="norm, [g * factor for g in gradients]"), "returns the list second"),
        (
            "tuple of tensors",
            clip(back="tuple(g * factor for g in gradients), norm"),
            "is a tuple; it should be a list of tensors",
        ),
        ("list only", clip(back="[g * factor for g in gradients]"), "a list of tensors and the norm before"),
    ],
    "accumulate": [
        ("mean of means", accumulation(n="len(micro_batches)", part="model(x, y) / n"), "the mean of the three means"),
        ("sum of means", accumulation(part="model(x, y)"), "the sum of the three means"),
        ("not divided", accumulation(part="model(x, y, reduction='sum')"), "divided by nothing"),
        ("padding counts", accumulation(n="sum(y.numel() for _, y in micro_batches)"), "those of -100 too"),
        ("by micro-batches", accumulation(n="len(micro_batches)"), "divided by the number of micro-batches only"),
        (
            "divided twice",
            accumulation(part="model(x, y, reduction='sum') / n / len(micro_batches)"),
            "micro-batches again",
        ),
        ("cleared in between", accumulation(first="model.zero_grad()"), "cleared in between"),
        (
            "counted so far",
            accumulation(first=COUNT_SO_FAR, part="model(x, y, reduction='sum') / seen"),
            "the tokens counted so far",
        ),
        (
            "by the first micro-batch",
            accumulation(n="int((micro_batches[0][1] != -100).sum())"),
            "in the first micro-batch only",
        ),
        (
            "by the last micro-batch",
            accumulation(n="int((micro_batches[-1][1] != -100).sum())"),
            "in the last micro-batch only",
        ),
        (
            "one backward for all",
            accumulation()
            .replace("part.backward()", "seen = seen + part")
            .replace("    return", "    seen.backward()\n    return"),
            "a second forward comes before the first backward",
        ),
        ("all rows at once", ALL_AT_ONCE, "6 rows go through the model at once"),
        (
            "cleared at the end",
            accumulation().replace("    return", "    model.zero_grad()\n    return"),
            "cleared at the end",
        ),
        (
            "loss divided again",
            accumulation(back="total / len(micro_batches)"),
            "divided by the number of micro-batches",
        ),
        ("loss summed", accumulation(back="total * n"), "not a mean but a sum"),
        ("no backward", accumulation().replace("part.backward()", "pass"), "there is no gradient"),
        ("no loss", accumulation(back="None"), r"return"),
        ("last loss", accumulation(back="part.item()"), "the mean loss over all tokens"),
        (
            "nothing to predict",
            accumulation(n="sum(int((y != -100).sum()) for _, y in micro_batches)"),
            "NaN|divides by zero",
        ),
        (
            "a tensor",
            accumulation().replace("total += part.item()", "total = total + part"),
            "keeps the graph in memory",
        ),
        (
            "clears what was there",
            accumulation().replace("    for x, y", "    model.zero_grad()\n    for x, y", 1),
            "the gradient that was there before is lost",
        ),
    ],
}

TestExercises = exercise_tests("09", WRONG)
