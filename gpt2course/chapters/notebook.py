"""What is in a chapter's file: its cells, its exercises, its parameters, and a hash that tells when it is stale."""

import ast
import hashlib
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
STUB = 'raise NotImplementedError("write your answer here")'

Cell = dict[str, Any]
Notebook = dict[str, Any]


@dataclass(frozen=True)
class Exercise:
    """One exercise of a chapter, as found in its notebook."""

    name: str
    """the function that the learner writes"""
    solution_source: str
    stub_source: str
    check_source: str
    cell: int
    """index of the exercise's cell in the notebook"""


def find(names: list[str] | tuple[str, ...] = (), folder: Path | None = None) -> list[Path]:
    """The chapters' files in order; all of them, or those whose number, stem or path is named.

    Raises:
        FileNotFoundError: for a name that fits no chapter, or if there are no chapters at all.
    """
    folder = folder or NOTEBOOKS
    every = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise FileNotFoundError(f"no chapters in {folder}; they come with a clone of the repository, not with pip")
    if not names:
        return every
    chosen = []
    for name in names:
        fitting = [p for p in every if name in (p.stem, p.stem[:2], p.name) or Path(name).resolve() == p.resolve()]
        if not fitting:
            raise FileNotFoundError(f"no chapter {name}; there are {', '.join(p.stem for p in every)}")
        chosen += fitting
    return chosen


def read(path: Path) -> Notebook:
    """The notebook as plain dicts, each source as one string."""
    notebook: Notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def write(notebook: Notebook, path: Path) -> None:
    """Write the notebook the way Jupyter does: sources and texts as lists of lines, one space of indent."""
    import nbformat

    text = nbformat.writes(nbformat.from_dict(notebook), version=nbformat.NO_CONVERT)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def tags(cell: Cell) -> list[str]:
    """The tags of a cell."""
    found: list[str] = cell.get("metadata", {}).get("tags", [])
    return found


def code_cells(notebook: Notebook) -> list[Cell]:
    """The code cells, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def parameters_of(notebook: Notebook) -> dict[str, str]:
    """The parameters that a run may change, by name, each as the source of its default.

    Raises:
        ValueError: unless there is exactly one cell tagged `parameters`, with annotated literals only.
    """
    found = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} cells are tagged parameters; there must be one")
    values = {}
    for node in ast.parse(found[0]["source"]).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            raise ValueError(f"line {node.lineno} of the parameters cell is not `name: type = literal`")
        try:
            ast.literal_eval(node.value)
        except ValueError:
            raise ValueError(f"parameter {node.target.id} is not a literal; compute it in the next cell") from None
        values[node.target.id] = ast.unparse(node.value)
    return values


def code_sha256(notebook: Notebook) -> str:
    """Hash of the code cells' sources and the parameters' defaults; prose and outputs do not count.

    A cell that papermill injected (tag `injected-parameters`) is left out, so that a run with other parameters still
    shows which code it ran.
    """
    sources = [cell["source"].strip() for cell in code_cells(notebook) if "injected-parameters" not in tags(cell)]
    content = json.dumps([sources, parameters_of(notebook)], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def function_name(source: str) -> str:
    """The name of the one function that an exercise defines.

    Raises:
        ValueError: if it defines none, or more than one.
    """
    names = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    if len(names) != 1:
        raise ValueError(f"an exercise defines one function at the top level of its cell, this one {names or 'none'}")
    return names[0]


def stub_of(source: str) -> str:
    """The exercise with its solution taken out, and a line that raises NotImplementedError in its place.

    Raises:
        ValueError: unless there is exactly one pair of marker lines.
    """
    pattern = re.compile(rf"^([ \t]*){BEGIN}[^\n]*\n.*?^[ \t]*{END}[^\n]*$", re.MULTILINE | re.DOTALL)
    if source.count(BEGIN) != 1 or source.count(END) != 1 or not pattern.search(source):
        raise ValueError(f"an exercise needs one line `{BEGIN}` and, after it, one line `{END}`")
    return pattern.sub(lambda match: textwrap.indent(STUB, match[1]), source)


def exercises(path: Path | str) -> list[Exercise]:
    """The exercises of a notebook, in order, each with its check.

    Raises:
        ValueError: naming the cell, if an exercise is not followed by its hints and its check.
    """
    notebook = read(Path(path))
    cells = notebook["cells"]
    found = []
    for i, cell in enumerate(cells):
        if "exercise" not in tags(cell):
            continue
        try:
            hints, check = [*cells[i + 1 : i + 3], None, None][:2]
            if hints is None or hints["cell_type"] != "markdown" or hints["source"].count("<details>") != 3:
                raise ValueError("the cell after an exercise holds its three hints, each in <details>")
            if check is None or "check" not in tags(check):
                raise ValueError("the second cell after an exercise is tagged check")
            name = function_name(cell["source"])
            if not re.search(rf"\bch\d\d\.\w+\(.*\b{name}\b", check["source"]):
                raise ValueError(f"the check of {name} does not call chNN.…({name})")
            found.append(Exercise(name, cell["source"], stub_of(cell["source"]), check["source"], i))
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{Path(path).name}, cell {i}: {error}") from error
    return found
