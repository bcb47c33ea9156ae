"""A small chapter made here, with all that a chapter has."""

from pathlib import Path
from typing import Any

import nbformat

HINTS = "\n".join(f"<details><summary>Hint {n}</summary>\n\nThink.\n\n</details>" for n in (1, 2, 3))
FIGURE = """
from gpt2course.viz import show
from gpt2course.viz.style import new_figure
figure, ax = new_figure(width=2, height=2)
ax.plot([0, seed])
show(figure, "A line.")
""".strip()
WIDGET = """
import ipywidgets
from gpt2course.viz.widget import Explorer
def draw(n):
    return figure
Explorer(draw, alt="A line to move.", n=ipywidgets.IntSlider(0, 0, 3))
""".strip()
NOISE = """
import sys
print("a warning", file=sys.stderr)
print("a result")
""".strip()
ANSWER = """
def {name}(x):
    \"\"\"Twice x.\"\"\"
    if x:
        ### BEGIN SOLUTION
        y = 2 * x
        return y
        ### END SOLUTION
    return 0
""".strip()


def markdown(text: str) -> Any:
    return nbformat.v4.new_markdown_cell(text)


def code(source: str, *tags: str) -> Any:
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def make_chapter(folder: Path) -> Path:
    """A chapter with all that a chapter has: cells 0 to 7, then an exercise, hints and check from 8, 11 and 14."""
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "dot.png").write_bytes(b"png")
    cells = [
        markdown("# 04 · Sample\n\nSee [the picture](images/dot.png) and [below](#Part-one)."),
        code('seed: int = 0  # a seed\nrate: float = 0.5\ncheckpoint: str = "auto"', "parameters"),
        markdown("## Part one\n\n```python\n# not a heading\n```\n\n### A detail"),
        code(FIGURE),
        code(WIDGET),
        code(NOISE),
        code("class ch99:\n    twice = again = thrice = staticmethod(lambda answer: print('✓', answer(2)))"),
        markdown("## Exercises"),
    ]
    for name in ("twice", "again", "thrice"):
        cells += [
            code(ANSWER.format(name=name), "exercise"),
            markdown(HINTS),
            code(f"ch99.{name}({name})", "check"),
        ]
    path = folder / "04_sample.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path
