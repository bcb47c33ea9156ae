"""Usual mistakes in the exercises of chapter 00, and what each is told; its hidden bug; the times on its map."""

import re

import pytest
from exercise_harness import WrongAnswers, exercise_tests

from gpt2course import chapters
from gpt2course.checks import ch00

WRONG: WrongAnswers = {
    "likeliest": [
        (
            "logits instead of ids",
            "def likeliest(logits_V, k):\n    return logits_V.topk(k).values",
            r"you return logits, \[2.0, 1.5, 1.0\]; the ids are their places",
        ),
        (
            "smallest first",
            "def likeliest(logits_V, k):\n    return logits_V.argsort()[-k:]",
            r"\[3, 4, 1\] are the right ones in the wrong order",
        ),
        (
            "the unlikeliest",
            "def likeliest(logits_V, k):\n    return logits_V.argsort()[:k]",
            r"\[2, 0, 3\] have the smallest logits",
        ),
        (
            "k forgotten",
            "def likeliest(logits_V, k):\n    return logits_V.argsort(descending=True)",
            r"ids has shape \(5,\), expected \(3,\)",
        ),
        (
            "only the best",
            "def likeliest(logits_V, k):\n    return int(logits_V.argmax())",
            r"ids is an int, expected a tensor of shape \(3,\)",
        ),
        (
            "in order of id",
            "def likeliest(logits_V, k):\n    return logits_V.topk(k).indices.sort().values",
            r"ids\[1\] is 3, expected 4",
        ),
        (
            "learnt by heart",
            "def likeliest(logits_V, k):\n    import torch\n    return torch.tensor([1, 4, 3])",
            r"ids of 1,000 random logits has shape \(3,\), expected \(5,\)",
        ),
    ],
    "probabilities": [
        (
            "multiplied",
            "def probabilities(logits_V, temperature):\n    return (logits_V * temperature).softmax(0)",
            "a temperature below 1 must sharpen the choice; yours flattens it",
        ),
        (
            "divided after the softmax",
            "def probabilities(logits_V, temperature):\n    return logits_V.softmax(0) / temperature",
            r"at temperature 0.5 they sum to 2.000; divide the logits, not the result",
        ),
        (
            "not normalised",
            "def probabilities(logits_V, temperature):\n    return (logits_V / temperature).exp()",
            r"probabilities at temperature 1\[0\] is 7.38906, expected 0.665241",
        ),
        (
            "overflows",
            "def probabilities(logits_V, temperature):\n"
            "    e_V = (logits_V / temperature).exp()\n    return e_V / e_V.sum()",
            r"exp\(1000\) is infinite; take the largest logit off",
        ),
        (
            "temperature forgotten",
            "def probabilities(logits_V, temperature):\n    return logits_V.softmax(0)",
            r"probabilities at temperature 0.5\[0\] is 0.665241, expected 0.866813",
        ),
        (
            "log of them",
            "def probabilities(logits_V, temperature):\n    return (logits_V / temperature).log_softmax(0)",
            r"probabilities at temperature 1\[0\] is -0.40",
        ),
    ],
    "training_days": [
        (
            "forward only",
            "def training_days(n_params, n_tokens, flops_per_second):\n"
            "    return 2 * n_params * n_tokens / flops_per_second / 86400",
            "2 operations for each parameter and token are the forward pass alone",
        ),
        (
            "seconds",
            "def training_days(n_params, n_tokens, flops_per_second):\n"
            "    return 6 * n_params * n_tokens / flops_per_second",
            "that is in seconds",
        ),
        (
            "hours",
            "def training_days(n_params, n_tokens, flops_per_second):\n"
            "    return 6 * n_params * n_tokens / flops_per_second / 3600",
            "that is in hours",
        ),
        (
            "one operation",
            "def training_days(n_params, n_tokens, flops_per_second):\n"
            "    return n_params * n_tokens / flops_per_second / 86400",
            "a sixth of it",
        ),
        (
            "speed upside down",
            "def training_days(n_params, n_tokens, flops_per_second):\n"
            "    return flops_per_second / (6 * n_params * n_tokens) / 86400",
            r"days for GPT-2 on 10 billion tokens at 100 TFLOP/s is .*, expected 0.864165",
        ),
    ],
}

TestExercises = exercise_tests("00", WRONG)

(CHAPTER,) = chapters.find(["00"])
MAP_ROWS = re.findall(
    r"^\| \[\d\d .+$", "\n".join(c["source"] for c in chapters.read(CHAPTER)["cells"]), flags=re.MULTILINE
)


def test_the_lab_keeps_its_bug() -> None:
    """A tidy hand that mends the bug which the reader is to find."""
    asked = {}

    def top_next(text: str, **how: int) -> list[tuple[str, float]]:
        asked[text] = how
        return [("x", 1.0)]

    assert ch00.somebodys_reader(top_next)("for i in") == [("x", 1.0)]
    assert asked == {"for i in": {"row": 0, "k": 5}}


def test_the_map_has_every_other_chapter() -> None:
    """A chapter that the first page does not lead to."""
    links = [re.search(r"\(([^)]+)\)", row) for row in MAP_ROWS]
    assert [link[1] for link in links if link] == [path.name for path in chapters.find()[1:]]


@pytest.mark.parametrize("row", MAP_ROWS)
def test_the_map_gives_a_chapter_the_time_that_it_gives_itself(row: str) -> None:
    """A reader who sets an evening aside for what takes three."""
    found = re.search(r"\(([^)]+)\).*\| (\d+) min \|$", row)
    assert found, row
    first_cell = chapters.read(CHAPTER.with_name(found[1]))["cells"][0]["source"]
    assert re.search(rf"\b{found[2]} minutes", first_cell) or re.search(
        rf"\b{found[2]} with the exercises", first_cell
    ), f"{found[1]} does not say {found[2]}"
