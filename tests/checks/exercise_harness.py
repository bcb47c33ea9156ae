"""The tests that every chapter's exercises get. A test file lists the wrong answers and makes its class here:

    from exercise_harness import exercise_tests

    WRONG = {
        "causal_mask": [
            ("off by one", '''
    def causal_mask(T):
        import torch
        return torch.ones(T, T).tril(1).bool()
    ''', r"sees the future"),
            …
        ],
    }
    TestExercises = exercise_tests("03", WRONG)

A wrong answer is the source of the whole function (with its imports), its regex is searched in the check's message.
"""

import importlib
import re
import textwrap
from typing import Any

import pytest

from gpt2course import chapters
from gpt2course.checks.base import Wrong

LEAST_WRONG_ANSWERS = 3
# A message that only says that something is wrong helps nobody; it must have more to it than that.
LEAST_WORDS = 4

WrongAnswers = dict[str, list[tuple[str, str, str]]]


def run_check(number: str, exercise: chapters.Exercise, source: str) -> None:
    """Define the answer in an empty namespace, as a fresh kernel has it, then run the notebook's own check on it."""
    namespace: dict[str, Any] = {"__name__": "learner"}
    exec(compile(textwrap.dedent(source).strip() + "\n", f"<{exercise.name}>", "exec"), namespace)
    namespace[f"ch{number}"] = importlib.import_module(f"gpt2course.checks.ch{number}")
    exec(compile(exercise.check_source, "<check>", "exec"), namespace)


def exercise_tests(number: str, wrong: WrongAnswers) -> type:
    """A test class for the chapter with this number ("03") and these wrong answers by function name."""
    (path,) = chapters.find([number])
    found = chapters.exercises(path)
    by_name = {exercise.name: exercise for exercise in found}
    cases = [
        pytest.param(name, source, message, id=f"{name}-{what.replace(' ', '-')}")
        for name, answers in wrong.items()
        for what, source, message in answers
    ]

    class TestExercises:
        def test_each_exercise_has_wrong_answers(self) -> None:
            """An exercise whose check lets mistakes pass, because nobody tried any."""
            assert len(found) >= 3, f"chapter {number} has {len(found)} exercises, it needs three"
            assert wrong.keys() == by_name.keys()
            few = {name: len(answers) for name, answers in wrong.items() if len(answers) < LEAST_WRONG_ANSWERS}
            assert not few, f"fewer than {LEAST_WRONG_ANSWERS} wrong answers: {few}"

        @pytest.mark.parametrize("name", by_name)
        def test_solution_passes(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
            """A check that refuses the right answer, or a solution that leans on another cell's imports."""
            run_check(number, by_name[name], by_name[name].solution_source)
            printed = capsys.readouterr().out
            assert re.match(rf"✓ {number}\.\d+ .+: .+", printed), printed

        @pytest.mark.parametrize("name", by_name)
        def test_stub_fails(self, name: str) -> None:
            """A check that passes before the learner has written anything."""
            with pytest.raises(Wrong, match=rf"^{number}\.\d+ .*not written yet"):
                run_check(number, by_name[name], by_name[name].stub_source)

        @pytest.mark.parametrize(("name", "source", "message"), cases)
        def test_wrong_answer_is_told_what_is_wrong(self, name: str, source: str, message: str) -> None:
            """A usual mistake that passes, or is refused without a word on what is wrong."""
            with pytest.raises(Wrong) as caught:
                run_check(number, by_name[name], source)
            said = str(caught.value).partition(": ")[2]
            assert re.search(message, said), said
            assert len(said.split()) >= LEAST_WORDS, f"too little to go on: {said!r}"
            assert not said.startswith("not written yet"), "this wrong answer was never run"

    return TestExercises
