"""The chapters' machinery, on a small chapter made here: what it refuses, what it keeps, what it takes out."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from gpt2course import chapters
from gpt2course.chapters.notebook import read, stub_of, write

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


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sample chapter, run once."""
    folder = tmp_path_factory.mktemp("chapters") / "notebooks"
    make_chapter(folder)
    chapters.refresh(["04"], folder)
    return folder


@pytest.fixture
def folder(refreshed: Path, tmp_path: Path) -> Path:
    """A copy of it, to spoil."""
    shutil.copytree(refreshed, tmp_path / "notebooks")
    return tmp_path / "notebooks"


def test_a_refreshed_chapter_passes(folder: Path) -> None:
    """A check that nothing satisfies."""
    assert chapters.check(folder=folder) == []


def test_refresh_keeps_what_lasts(folder: Path) -> None:
    """Widget state, stderr, timings and names of one machine in a committed notebook."""
    notebook = read(folder / "04_sample.ipynb")
    assert notebook["metadata"].keys() == {"gpt2course", "kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["gpt2course"].keys() == {"code_sha256", "executed_on", "seconds"}
    text = json.dumps([cell["outputs"] for cell in chapters.notebook.code_cells(notebook)])
    for gone in ("widget-view", "a warning", "iopub"):
        assert gone not in text, gone
    widget = notebook["cells"][4]["outputs"][0]
    assert widget["data"].keys() == {"image/png", "text/plain"}
    assert widget["metadata"]["image/png"]["alt"] == "A line to move."


def test_refresh_twice_changes_nothing_but_the_time(folder: Path) -> None:
    """Figures or ids that differ on each run, so that every refresh is a change of every chapter."""
    path = folder / "04_sample.ipynb"
    before = read(path)
    chapters.refresh(folder=folder)
    after = read(path)
    before["metadata"]["gpt2course"].pop("seconds")
    after["metadata"]["gpt2course"].pop("seconds")
    assert after == before


def test_html_shows_pictures_and_their_words(folder: Path) -> None:
    """A page without a kernel that shows an empty place, or loads a widget script from the network."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_filename(str(folder / "04_sample.ipynb"))
    assert "<summary>Figure in words</summary><p>A line.</p>" in page
    assert "<summary>Figure in words</summary><p>A line to move.</p>" in page
    assert len(re.findall(r"<img[^>]* src=\"data:image/png;base64,", page)) == 2
    assert "html-manager" not in page


def change_code(nb: dict) -> None:
    nb["cells"][3]["source"] += "\n# changed"


def change_parameter(nb: dict) -> None:
    nb["cells"][1]["source"] = nb["cells"][1]["source"].replace("0.5", "0.25")


def change_order(nb: dict) -> None:
    nb["cells"][3]["execution_count"], nb["cells"][4]["execution_count"] = 3, 2


def drop_output(nb: dict) -> None:
    nb["cells"][10]["outputs"] = []


def drop_stamp(nb: dict) -> None:
    del nb["metadata"]["gpt2course"]


def add_error(nb: dict) -> None:
    error = {"output_type": "error", "ename": "KeyError", "evalue": "'x'", "traceback": []}
    nb["cells"][5]["outputs"].append(error)


def drop_alt(nb: dict) -> None:
    nb["cells"][3]["outputs"][0]["metadata"] = {}


def add_home(nb: dict) -> None:
    nb["cells"][5]["outputs"][0]["text"] = f"saved {Path.home()}/model.bin"


def add_address(nb: dict) -> None:
    nb["cells"][5]["outputs"][0]["text"] = "<function f at 0x7f0012345678>"


def add_weight(nb: dict) -> None:
    nb["cells"][5]["outputs"][0]["text"] = "0123456789" * 45_000


def add_widget_state(nb: dict) -> None:
    nb["metadata"]["widgets"] = {}


def add_bare_widget(nb: dict) -> None:
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": "VBox()"}
    nb["cells"][5]["outputs"] = [{"output_type": "display_data", "data": view, "metadata": {}}]


def skip_heading(nb: dict) -> None:
    nb["cells"][2]["source"] = "#### Deep"


def second_title(nb: dict) -> None:
    nb["cells"][7]["source"] = "# Another title"


def break_link(nb: dict) -> None:
    nb["cells"][0]["source"] += " [next](05_gone.ipynb)"


def break_anchor(nb: dict) -> None:
    nb["cells"][0]["source"] += " [there](#Part-nine)"


def picture_without_words(nb: dict) -> None:
    nb["cells"][0]["source"] += "\n\n![](images/dot.png)"


def long_cell(nb: dict) -> None:
    nb["cells"][6]["source"] = "\n".join(f"x{i} = {i}" for i in range(13))


def lean_on_answer(nb: dict) -> None:
    nb["cells"].append({**copy.deepcopy(nb["cells"][6]), "id": "leans", "source": "print(twice(4))"})


def two_hints(nb: dict) -> None:
    nb["cells"][9]["source"] = nb["cells"][9]["source"].replace("<details>", "", 1)


def no_check(nb: dict) -> None:
    nb["cells"][10]["metadata"] = {}


def two_exercises(nb: dict) -> None:
    del nb["cells"][14:17]


def no_markers(nb: dict) -> None:
    nb["cells"][8]["source"] = nb["cells"][8]["source"].replace("### END SOLUTION", "")


def computed_parameter(nb: dict) -> None:
    nb["cells"][1]["source"] += "\nwidth: int = 4 * seed"


def bare_parameter(nb: dict) -> None:
    nb["cells"][1]["source"] += "\nwidth = 4"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change_code, "has changed since its outputs were made; run `gpt2course notebooks refresh`"),
        (change_parameter, "has changed since"),
        (drop_stamp, "has never been refreshed"),
        (change_order, "not run once each from top to bottom"),
        (drop_output, "cell 10: a check without its output"),
        (add_error, "cell 5: failed with KeyError: 'x'"),
        (drop_alt, "cell 3: a figure without alt text"),
        (add_home, "cell 5: the output shows a path of this machine"),
        (add_address, "cell 5: the output shows a memory address"),
        (add_weight, "KB, the limit is 400"),
        (add_widget_state, "widget state"),
        (add_bare_widget, "cell 5: a widget that only shows with a kernel"),
        (skip_heading, "cell 2: the heading 'Deep' skips a level"),
        (second_title, "one heading of level 1"),
        (break_link, "cell 0: a broken link to 05_gone.ipynb"),
        (break_anchor, "cell 0: a link to #Part-nine"),
        (picture_without_words, "cell 0: a picture without alt text"),
        (long_cell, "cell 6: 13 lines of code, the limit is 12"),
        (lean_on_answer, "uses twice, an exercise, and fails in the student edition"),
        (two_hints, "cell 8: the cell after an exercise holds its three hints"),
        (no_check, "cell 8: the second cell after an exercise is tagged check"),
        (two_exercises, "2 exercises, a chapter has at least 3"),
        (no_markers, "cell 8: an exercise needs one line `### BEGIN SOLUTION`"),
        (computed_parameter, "parameter width is not a literal"),
        (bare_parameter, "line 4 of the parameters cell is not `name: type = literal`"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_check_refuses(folder: Path, spoil: Callable[[dict], None], message: str) -> None:
    """Each fault that a committed chapter may not have, one at a time."""
    path = folder / "04_sample.ipynb"
    notebook = read(path)
    spoil(notebook)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert any(message in problem for problem in chapters.check(folder=folder)), chapters.check(folder=folder)


def test_a_cell_may_use_its_own_name(folder: Path) -> None:
    """A variable that happens to be called like an exercise, refused though the student edition runs."""
    path = folder / "04_sample.ipynb"
    notebook = read(path)
    notebook["cells"].append({**copy.deepcopy(notebook["cells"][6]), "id": "own", "source": "twice = 8\nprint(twice)"})
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert not any("uses twice" in problem for problem in chapters.check(folder=folder))


def test_prose_may_change_without_a_refresh(folder: Path) -> None:
    """A hash over the prose, which would ask for a new run after each mended word."""
    path = folder / "04_sample.ipynb"
    notebook = read(path)
    notebook["cells"][2]["source"] += "\n\nA better sentence."
    write(notebook, path)
    assert chapters.check(folder=folder) == []


def test_failed_refresh_leaves_the_file(folder: Path) -> None:
    """Half-run outputs, or a traceback, written over good ones."""
    path = folder / "04_sample.ipynb"
    notebook = read(path)
    notebook["cells"][5]["source"] = "1 / 0"
    write(notebook, path)
    before = path.read_bytes()
    with pytest.raises(chapters.ChapterError, match=r"(?s)04_sample: did not run to its end.*ZeroDivisionError"):
        chapters.refresh(folder=folder)
    assert path.read_bytes() == before


def test_student_edition_has_no_solutions(folder: Path, tmp_path: Path) -> None:
    """A student edition that shows the answer, in a cell or in an output, or that changed anything else."""
    chapters.student(tmp_path / "student", folder=folder)
    teacher, made = read(folder / "04_sample.ipynb"), read(tmp_path / "student" / "04_sample.ipynb")
    assert "SOLUTION" not in json.dumps(made)
    assert "2 * x" not in json.dumps(made)
    assert (tmp_path / "student" / "images" / "dot.png").exists()
    for old, new in zip(teacher["cells"], made["cells"], strict=True):
        tagged = set(old["metadata"].get("tags", []))
        if "exercise" not in tagged:
            assert new["source"] == old["source"]
        if tagged & {"exercise", "check"}:
            assert new["outputs"] == []
        elif old["cell_type"] == "code":
            assert new["outputs"] == old["outputs"]


def test_stub_stands_at_the_solution_s_indentation() -> None:
    """A stub that is a syntax error, or that swallows what follows the solution."""
    namespace: dict[str, Any] = {}
    exec(stub_of(ANSWER.format(name="twice")), namespace)
    assert namespace["twice"](0) == 0
    with pytest.raises(NotImplementedError, match="write your answer here"):
        namespace["twice"](1)


def test_student_edition_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    """A learner's evening of answers, lost to a second run of the command."""
    chapters.student(tmp_path / "student", folder=folder)
    with pytest.raises(FileExistsError, match="perhaps with answers"):
        chapters.student(tmp_path / "student", folder=folder)
    with pytest.raises(ValueError, match="give another folder"):
        chapters.student(folder, folder=folder, overwrite=True)


def test_prepare_injects_parameters(folder: Path, tmp_path: Path) -> None:
    """Parameters that do not arrive; a hash that papermill's own cell changes."""
    (made,) = chapters.prepare(tmp_path / "build", {"04": {"seed": 3, "rate": 1}}, folder=folder)
    notebook = read(made)
    assert any("seed = 3" in cell["source"] and "rate = 1" in cell["source"] for cell in notebook["cells"])
    assert chapters.code_sha256(notebook) == chapters.code_sha256(read(folder / "04_sample.ipynb"))
    assert (tmp_path / "build" / "images" / "dot.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"04": {"sede": 1}}, "04_sample has no parameter sede; it has seed, rate, checkpoint"),
        ({"04": {"rate": "1e-3"}}, "rate is '1e-3', str, and its default 0.5 is float"),
        ({"04": {"seed": True}}, "seed is True, bool, and its default 0 is int"),
        ({"40": {"seed": 1}}, "chapter 40, which does not exist"),
    ],
)
def test_prepare_refuses_what_papermill_only_warns_of(
    folder: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    """A misspelt parameter: papermill warns, runs the default, and exits 0."""
    with pytest.raises(ValueError, match=message):
        chapters.prepare(tmp_path / "build", changes, folder=folder)


def test_unknown_chapter_is_named(folder: Path) -> None:
    """`refresh 40` that does nothing and says nothing."""
    with pytest.raises(FileNotFoundError, match="no chapter 40; there are 04_sample"):
        chapters.find(["40"], folder)


def test_a_folder_without_chapters_is_not_a_pass(tmp_path: Path) -> None:
    """`check` in an installed copy, which has no notebooks, says that every chapter is fresh."""
    with pytest.raises(FileNotFoundError, match="no chapters in"):
        chapters.check(folder=tmp_path)


def test_student_edition_does_not_lie_among_the_chapters(folder: Path) -> None:
    """A second edition copies the first one's pictures into itself, as student/student/img."""
    with pytest.raises(ValueError, match="lies among them"):
        chapters.student(folder / "student", folder=folder)
