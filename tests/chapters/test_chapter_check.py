"""What `check` refuses in a chapter, one fault at a time, and what it lets be."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2course import chapters
from gpt2course.chapters.notebook import read, write


def test_a_refreshed_chapter_passes(folder: Path) -> None:
    """A check that nothing satisfies."""
    assert chapters.check(folder=folder) == []


def change_code(nb: dict) -> None:
    nb["cells"][3]["source"] += "\n# changed"


def change_parameter(nb: dict) -> None:
    nb["cells"][1]["source"] = nb["cells"][1]["source"].replace("0.5", "0.25")


def change_order(nb: dict) -> None:
    nb["cells"][3]["execution_count"], nb["cells"][4]["execution_count"] = 3, 2


def never_run(nb: dict) -> None:
    nb["cells"][5]["execution_count"] = None


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
        (change_order, "cell 3 was run as number 3, not 2: the cells were not run once each from top to bottom"),
        (never_run, "cell 5 was never run"),
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


def test_a_folder_without_chapters_is_not_a_pass(tmp_path: Path) -> None:
    """`check` in an installed copy, which has no notebooks, says that every chapter is fresh."""
    with pytest.raises(FileNotFoundError, match="no chapters in"):
        chapters.check(folder=tmp_path)
