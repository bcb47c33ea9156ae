"""What a committed chapter must be, told without running it: fresh, in order, readable, and whole."""

import ast
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpt2course.chapters.notebook import (
    WIDGET_VIEW,
    Cell,
    Notebook,
    code_sha256,
    exercises,
    find,
    function_name,
    parameters_of,
    read,
    tags,
)

MAX_KB = 400
MAX_LINES = 12
MAX_SECONDS = 120
LEAST_EXERCISES = 3


def check(names: Sequence[str] = (), folder: Path | None = None) -> list[str]:
    """Every problem of the chapters, each as "03_attention: what is wrong"; an empty list is a pass.

    Args:
        names: numbers ("03"), stems or paths; none means all chapters.
        folder: where the chapters are; by default `notebooks/`.
    """
    found = []
    for path in find(list(names), folder):
        notebook = read(path)
        problems = output_problems(notebook, path.stat().st_size)
        problems += freshness_problems(notebook) + text_problems(notebook, path.parent) + code_problems(notebook, path)
        found += [f"{path.stem}: {problem}" for problem in problems]
    return found


def freshness_problems(notebook: Notebook) -> list[str]:
    """Outputs that another version of the code made, or that a reader's session left out of order."""
    stamp = notebook["metadata"].get("gpt2course", {})
    mend = "run `gpt2course notebooks refresh`"
    problems = []
    try:
        if stamp.get("code_sha256") != code_sha256(notebook):
            was = (
                "has never been refreshed" if "code_sha256" not in stamp else "has changed since its outputs were made"
            )
            problems.append(f"the code {was}; {mend}")
    except (ValueError, SyntaxError) as error:
        problems.append(str(error))
    if stamp.get("seconds", 0) > MAX_SECONDS:
        problems.append(f"took {stamp['seconds']} s to run, the limit is {MAX_SECONDS}")
    in_order = 0
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        in_order += 1
        if (count := cell["execution_count"]) != in_order:
            was = f"was run as number {count}, not {in_order}" if count else "was never run"
            problems.append(f"cell {i} {was}: the cells were not run once each from top to bottom; {mend}")
            break
    return problems


def output_problems(notebook: Notebook, size: int) -> list[str]:
    """Outputs that may not be kept: errors, pictures without words, paths of one machine, too many bytes."""
    problems = []
    if size > MAX_KB * 1024:
        problems.append(f"{size / 1024:.0f} KB, the limit is {MAX_KB}; draw fewer or smaller figures")
    if "widgets" in notebook["metadata"]:
        problems.append("holds widget state, which pages load scripts from the network for")
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            problems += [f"cell {i}: {problem}" for problem in cell_output_problems(cell)]
    return problems


def cell_output_problems(cell: Cell) -> list[str]:
    """What is wrong with the outputs of one cell."""
    problems = []
    if not cell["outputs"] and "check" in tags(cell):
        problems.append("a check without its output")
    for out in cell["outputs"]:
        data = out.get("data", {})
        if out["output_type"] == "error" and "raises-exception" not in tags(cell):
            problems.append(f"failed with {out['ename']}: {out['evalue']}")
        if out.get("name") == "stderr":
            problems.append("keeps what was written to stderr")
        if "image/png" in data and not out.get("metadata", {}).get("image/png", {}).get("alt"):
            problems.append("a figure without alt text; use gpt2course.viz.show(figure, alt)")
        if "image/svg+xml" in data or "application/javascript" in data:
            problems.append("an SVG or a script as output; show a PNG")
        if WIDGET_VIEW in data:
            problems.append("a widget that only shows with a kernel; use gpt2course.viz.widget.Explorer")
        problems += text_output_problems(out)
    return problems


def text_output_problems(out: Cell) -> list[str]:
    """Places and addresses that are true on one machine only."""
    pieces = [out.get("text", ""), *out.get("traceback", [])]
    pieces += [value for mime, value in out.get("data", {}).items() if mime.startswith("text/")]
    text = "\n".join("".join(piece) for piece in pieces)
    problems = []
    places = {str(Path.home()), tempfile.gettempdir(), str(Path(__file__).parents[2])} - {"/"}
    elsewhere = [place for place in places if re.search(rf"{re.escape(place)}(?![\w-])", text)]
    elsewhere += re.findall(r"(?<![\w.])/(?:home|Users|root|tmp)/\S*", text)
    if elsewhere:
        problems.append(f"the output shows a path of this machine, {elsewhere[0]}; print its name or a relative path")
    if address := re.search(r"\bat 0x[0-9a-f]{6,}", text):
        problems.append(f"the output shows a memory address ({address[0]}), which differs on each run")
    return problems


def text_problems(notebook: Notebook, folder: Path) -> list[str]:
    """Headings, links and pictures of the prose."""
    headings: list[tuple[int, str]] = []
    links: list[tuple[int, str]] = []
    problems = []
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "markdown":
            continue
        prose = re.sub(r"^(```|~~~).*?^\1|`[^`\n]*`", "", cell["source"], flags=re.MULTILINE | re.DOTALL)
        for hashes, title in re.findall(r"^(#{1,6}) +(.+?) *$", prose, flags=re.MULTILINE):
            if headings and len(hashes) > headings[-1][0] + 1:
                problems.append(f"cell {i}: the heading {title!r} skips a level")
            headings.append((len(hashes), title))
        links += [(i, target) for target in re.findall(r"\]\(<?([^)\s>]+)", prose)]
        links += [(i, target) for target in re.findall(r"(?:href|src)=[\"']([^\"']+)", prose)]
        if re.search(r"!\[\s*\]\(", prose) or any("alt=" not in tag for tag in re.findall(r"<img[^>]*>", prose)):
            problems.append(f"cell {i}: a picture without alt text")
    if [level for level, _ in headings].count(1) != 1 or headings[0][0] != 1:
        problems.append("needs one heading of level 1, the chapter's title, and it comes first")
    anchors = {title.replace(" ", "-") for _, title in headings}
    for i, target in links:
        file, _, anchor = target.partition("#")
        if re.match(r"(?:https?:|mailto:|attachment:|data:)", target):
            continue
        if file and not (folder / file).exists():
            problems.append(f"cell {i}: a broken link to {target}")
        if not file and anchor not in anchors:
            problems.append(f"cell {i}: a link to #{anchor}, and no such heading")
    return problems


def code_problems(notebook: Notebook, path: Path) -> list[str]:
    """Cells too long to read at once, exercises that are not whole, cells that lean on an exercise's answer."""
    problems = []
    answers: set[str] = set()
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        lines = [line for line in cell["source"].splitlines() if line.strip() and not line.strip().startswith("#")]
        if "exercise" in tags(cell):
            answers |= names_defined(cell["source"])
            continue
        if len(lines) > MAX_LINES and not cell["source"].startswith("%%writefile"):  # a script is read as a whole
            problems.append(f"cell {i}: {len(lines)} lines of code, the limit is {MAX_LINES}")
        used, made = names_used_and_made(cell["source"])
        answers -= made
        if "check" not in tags(cell) and (leaning := sorted(used & answers)):
            problems.append(f"cell {i}: uses {', '.join(leaning)}, an exercise, and fails in the student edition")
    try:
        if (count := len(exercises(path))) < LEAST_EXERCISES:
            problems.append(f"{count} exercises, a chapter has at least {LEAST_EXERCISES}")
        parameters_of(notebook)
    except (ValueError, SyntaxError) as error:
        problems.append(str(error))
    return problems


def names_defined(source: str) -> set[str]:
    """The function of an exercise; nothing if the cell cannot be read (told elsewhere)."""
    try:
        return {function_name(source)}
    except (ValueError, SyntaxError):
        return set()


def names_used_and_made(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell reads, and those it defines itself. IPython's own lines (`%`, `!`) are passed over."""
    plain = "\n".join("pass" if line.lstrip()[:1] in ("%", "!") else line for line in source.splitlines())
    try:
        nodes = list(ast.walk(ast.parse(plain)))
    except SyntaxError:
        return set(), set()
    names = [node for node in nodes if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    made |= {(alias.asname or alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return used, made
