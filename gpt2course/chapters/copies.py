"""Copies of the chapters: with other parameters, for a run; without solutions, for a student."""

import ast
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2course.chapters.notebook import NOTEBOOKS, Cell, code_cells, find, read, stub_of, tags, write


def checked_parameters(path: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes, if the chapter has parameters of those names and types.

    papermill itself only warns of an unknown name, and reads YAML's `1e-3` as a string.

    Raises:
        ValueError: naming the unknown ones and those there are, or a value of another type than the default.
    """
    import papermill

    known = papermill.inspect_notebook(str(path))
    if unknown := sorted(changes.keys() - known.keys()):
        raise ValueError(f"{path.stem} has no parameter {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    for name, value in changes.items():
        default = ast.literal_eval(known[name]["default"])
        fits = type(value) is type(default) or (isinstance(default, float) and type(value) is int) or default is None
        if not fits:
            kinds = f"{type(value).__name__}, and its default {default!r} is {type(default).__name__}"
            raise ValueError(f"{path.stem}: {name} is {value!r}, {kinds}")
    return dict(changes)


def prepare(
    out: Path | str, parameters: Mapping[str, Mapping[str, Any]], names: Sequence[str] = (), folder: Path | None = None
) -> list[Path]:
    """Copies of the chapters with their parameters injected, ready to run; nothing is executed.

    Args:
        out: folder for the copies and for the files beside the chapters.
        parameters: changes by chapter number ("03"), then by name.
        names, folder: as in `refresh`.

    Raises:
        ValueError: for a parameter, or a chapter in `parameters`, that does not exist.
    """
    import papermill

    folder, out = folder or NOTEBOOKS, Path(out)
    paths = find(list(names), folder)
    if strangers := sorted(parameters.keys() - {path.stem[:2] for path in find(folder=folder)}):
        raise ValueError(f"parameters are given for chapter {', '.join(strangers)}, which does not exist")
    checked = {path: checked_parameters(path, parameters.get(path.stem[:2], {})) for path in paths}
    copy_beside(folder, out)
    for path, changes in checked.items():
        papermill.execute_notebook(
            str(path), str(out / path.name), parameters=changes, prepare_only=True, progress_bar=False, log_output=False
        )
    return [out / path.name for path in paths]


def copy_beside(folder: Path, out: Path) -> None:
    """Copy what lies beside the chapters (pictures) to `out`, which is made; no notebooks, no hidden files."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and path.suffix != ".ipynb" and not any(part.startswith(".") for part in inside.parts):
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / inside)


def student(
    out: Path | str, names: Sequence[str] = (), folder: Path | None = None, overwrite: bool = False
) -> list[Path]:
    """The student edition: solutions taken out, outputs of exercises and checks cleared, all else as it is.

    Raises:
        FileExistsError: if a chapter is there already, since it may hold somebody's answers, unless `overwrite`.
    """
    folder, out = folder or NOTEBOOKS, Path(out)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} holds the chapters themselves, or lies among them; give another folder")
    paths = find(list(names), folder)
    present = [path.name for path in paths if (out / path.name).exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"{out} has {', '.join(present)} already, perhaps with answers in it; give another folder"
        )
    copy_beside(folder, out)
    for path in paths:
        notebook = read(path)
        for cell in code_cells(notebook):
            if "exercise" in tags(cell):
                cell["source"] = stub_of(cell["source"])
            if {"exercise", "check"} & set(tags(cell)):
                clear(cell)
        notebook["metadata"]["gpt2course"] = {"edition": "student"}
        write(notebook, out / path.name)
    return [out / path.name for path in paths]


def clear(cell: Cell) -> None:
    """Take a code cell's outputs out."""
    cell["outputs"], cell["execution_count"] = [], None
