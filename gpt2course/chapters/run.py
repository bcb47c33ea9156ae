"""Run the chapters in place, to refresh their outputs."""

import os
import platform
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from gpt2course.chapters.notebook import (
    WIDGET_VIEW,
    Notebook,
    code_cells,
    code_sha256,
    find,
    parameters_of,
    read,
    write,
)
from gpt2course.launch import child_environment

CELL_TIMEOUT = 600
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3"}
KEPT_CELL_METADATA = ("tags", "jupyter", "slideshow")


class ChapterError(RuntimeError):
    """A chapter that did not run, or whose outputs may not be kept; the text says which cell and why."""


def machine() -> str:
    """What the outputs were made on, without a name that could tell whose machine it was."""
    import torch

    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores, {accelerator}, {platform.system()} {platform.machine()}, {versions}"


def refresh(names: Sequence[str] = (), folder: Path | None = None) -> dict[str, float]:
    """Run chapters top to bottom in a fresh kernel, and keep their outputs with the hash that says they are fresh.

    A chapter that fails, or whose outputs may not be kept, is left as it was.

    Args:
        names: numbers ("03"), stems or paths; none means all chapters.
        folder: where the chapters are; by default `notebooks/`.

    Returns:
        Seconds by chapter.

    Raises:
        ChapterError: after all were tried, naming every chapter that failed.
    """
    took, failed = {}, []
    for path in find(list(names), folder):
        try:
            took[path.stem] = refresh_one(path)
            size = path.stat().st_size / 1024
            print(f"{path.stem}: {took[path.stem]:.1f} s, {size:.0f} KB")
        except ChapterError as error:
            failed.append(f"{path.stem}: {error}")
    if failed:
        raise ChapterError("\n".join(failed))
    return took


def refresh_one(path: Path) -> float:
    """Run one chapter in place; seconds taken. Raises ChapterError, and then leaves the file as it was."""
    from gpt2course.chapters.check import output_problems

    notebook = read(path)
    parameters_of(notebook)
    executed, seconds = execute(notebook, path.parent, path.stem)
    noise = normalise(executed)
    executed["metadata"]["gpt2course"] = {
        "code_sha256": code_sha256(executed),
        "executed_on": machine(),
        "seconds": round(seconds, 1),
    }
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / path.name
        write(executed, trial)
        if problems := output_problems(read(trial), trial.stat().st_size):
            raise ChapterError("; ".join(problems))
    write(executed, path)
    if noise:
        print(f"{path.stem}: not kept, from stderr: {noise[:200]!r}")
    return seconds


def execute(notebook: Notebook, folder: Path, title: str) -> tuple[Notebook, float]:
    """The notebook run top to bottom in a fresh `python3` kernel in `folder`, and the seconds it took."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    node = nbformat.from_dict(notebook)
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    with tqdm(total=len(code_cells(node)), desc=title, unit="cell", leave=False) as bar:
        client = NotebookClient(
            node,
            timeout=CELL_TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            coalesce_streams=True,
            shutdown_kernel="immediate",
            on_cell_complete=lambda cell, cell_index: bar.update(cell.cell_type == "code"),
        )
        started = time.perf_counter()
        try:
            client.execute(env=child_environment())
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise ChapterError(f"did not run to its end:\n{error}") from error
    return notebook_of(node), time.perf_counter() - started


def notebook_of(node: Any) -> Notebook:
    """Plain dicts from nbformat's own, with texts as one string."""
    import json

    import nbformat

    plain: Notebook = json.loads(nbformat.writes(node, version=nbformat.NO_CONVERT, split_lines=False))
    return plain


def normalise(notebook: Notebook) -> str:
    """Take out, in place, what changes from run to run or is dead without a kernel. Returns the stderr taken out."""
    notebook["metadata"] = {"kernelspec": dict(KERNELSPEC), "language_info": dict(LANGUAGE)}
    noise = []
    for cell in notebook["cells"]:
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key in KEPT_CELL_METADATA}
        if cell["cell_type"] != "code":
            continue
        noise += [out["text"] for out in cell["outputs"] if out.get("name") == "stderr"]
        cell["outputs"] = [out for out in cell["outputs"] if out.get("name") != "stderr"]
        for out in cell["outputs"]:
            if isinstance(out.get("data"), dict) and "image/png" in out["data"]:
                out["data"].pop(WIDGET_VIEW, None)
    return re.sub(r"\s+", " ", "".join(noise)).strip()
