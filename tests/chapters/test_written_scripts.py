"""The training scripts are written by the chapters that explain them; the committed files are copies."""

import ast
from pathlib import Path

import pytest

from gpt2course.chapters.notebook import code_cells, find, read

ROOT = Path(__file__).parents[2]
WRITTEN = {"09": "train_single_gpu.py", "11": "train_ddp.py", "12": "train_fsdp.py"}
MOST_LINES = 80


@pytest.mark.parametrize(("chapter", "name"), WRITTEN.items())
def test_the_cell_is_the_source_and_the_file_its_copy(chapter: str, name: str) -> None:
    """A script that was mended in one place only would teach one thing and run another."""
    cells = [cell["source"] for cell in code_cells(read(find([chapter])[0]))]
    bodies = [
        text.split("\n", 1)[1] for text in cells if text.startswith("%%writefile") and name in text.split("\n")[0]
    ]
    assert len(bodies) == 1, f"chapter {chapter} writes {name} {len(bodies)} times"
    assert bodies[0].rstrip("\n") == (ROOT / "scripts" / name).read_text().rstrip("\n")


@pytest.mark.parametrize("name", WRITTEN.values())
def test_each_script_is_short(name: str) -> None:
    """What does not fit on a page is not read."""
    assert len((ROOT / "scripts" / name).read_text().splitlines()) < MOST_LINES


def test_the_scripts_differ_in_their_strategy_only() -> None:
    """One loop, three strategies: main() loads, builds and trains, in the same words but one."""
    bodies = []
    for name in WRITTEN.values():
        tree = ast.parse((ROOT / "scripts" / name).read_text())
        main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        bodies.append([ast.unparse(line) for line in main.body[1:]])
    assert {len(body) for body in bodies} == {3}
    assert {(body[0], body[2]) for body in bodies} == {
        ("data = load_data(config, world)", "train(config, strategy, data)")
    }
    assert len({body[1] for body in bodies}) == 3
