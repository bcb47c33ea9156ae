"""The chapters as files: run them, see that their outputs are fresh, find their exercises, make the student edition."""

from gpt2course.chapters.check import check
from gpt2course.chapters.copies import prepare, student
from gpt2course.chapters.notebook import NOTEBOOKS, Exercise, code_sha256, exercises, find, parameters_of, read
from gpt2course.chapters.run import ChapterError, refresh

__all__ = [
    "NOTEBOOKS",
    "ChapterError",
    "Exercise",
    "check",
    "code_sha256",
    "exercises",
    "find",
    "parameters_of",
    "prepare",
    "read",
    "refresh",
    "student",
]
