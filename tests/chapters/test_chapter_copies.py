"""What a refresh keeps of a chapter, and what the copies of it hold."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sample_chapter import ANSWER

from gpt2course import chapters
from gpt2course.chapters.notebook import read, stub_of, write


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


def test_student_edition_does_not_lie_among_the_chapters(folder: Path) -> None:
    """A second edition copies the first one's pictures into itself, as student/student/img."""
    with pytest.raises(ValueError, match="lies among them"):
        chapters.student(folder / "student", folder=folder)
