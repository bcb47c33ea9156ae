"""The command line: help without torch, user errors in one line, and each command on something small."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from gpt2course import GPT, PRESETS, __version__, chapters, cli, doctor
from gpt2course.data import Prepared
from gpt2course.generate import GenerateOptions, generate
from gpt2course.pretrained import save_pretrained

COMMANDS = [
    "doctor",
    "run",
    "generate",
    "verify",
    "data",
    "export",
    "notebooks",
    "bench",
    "bench-training",
    "price-tag",
]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(GPT(PRESETS["tiny"]), tmp_path_factory.mktemp("tiny"))


def notebook(folder: Path, *cells: str) -> Path:
    """A chapter in small: a cell of parameters, and the cells given."""
    parameters = nbformat.v4.new_code_cell(
        'seed: int = 0\nrate: float = 0.5\ncheckpoint: str = "auto"\nquick: bool = False',
        metadata={"tags": ["parameters"]},
    )
    made = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "07_small.ipynb"
    nbformat.write(made, path)
    return path


def outputs(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))


@pytest.mark.parametrize(
    "words", [[], *([command] for command in COMMANDS)], ids=lambda words: " ".join(words) or "all"
)
def test_help_is_there(words: list[str], capsys: Capture) -> None:
    """A command whose help fails to build, or that is not in the list."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in (words or COMMANDS))


def test_help_imports_no_torch() -> None:
    """Seconds of waiting for a screen of text."""
    code = """
import sys
from gpt2course.cli import main
try:
    main(["--help"])
except SystemExit:
    print(sorted({"torch", "numpy", "matplotlib", "papermill"} & sys.modules.keys()))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.stdout.splitlines()[-1] == "[]"


def test_module_is_the_command() -> None:
    """`python -m gpt2course`, which lab.sh uses, passing the exit code on."""
    shown = subprocess.run(
        [sys.executable, "-m", "gpt2course", "data", "no such corpus"], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 2
    assert shown.stderr.startswith("gpt2course: ")
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["verify", "./nowhere"], "nowhere"),
        (["generate", "Hello", "--model", "./nowhere"], "nowhere"),
        (["data", "./nowhere"], "nowhere"),
        (["run", "98"], "98"),
        (["notebooks", "check", "98"], "98"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_user_errors_are_one_line(words: list[str], says: str, capsys: Capture) -> None:
    """A traceback of forty lines for a misspelt name."""
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("gpt2course: ")
    assert says in shown
    assert len(shown.strip().splitlines()) == 1


def test_ctrl_c_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A traceback for somebody who only wanted it to stop."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run_checks", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.strip() == "stopped"


@pytest.mark.parametrize("words", [["generate", "import", "--model", "course", "--max-new-tokens", "5"], ["--help"]])
def test_a_reader_that_has_enough_is_no_error(words: list[str]) -> None:
    """`gpt2course generate … | head` that ends with "[Errno 32] Broken pipe"."""
    command = [sys.executable, "-m", "gpt2course", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert "roken" not in said
    assert "Errno" not in said


def test_generate_prints_the_prompt_and_what_the_package_generates(checkpoint: Path, capsys: Capture) -> None:
    """Flags that do not reach the sampler."""
    words = [
        "generate",
        "Once upon",
        "--model",
        str(checkpoint),
        "--max-new-tokens",
        "7",
        "--seed",
        "3",
        "--top-k",
        "5",
    ]
    assert cli.main(words) == 0
    from gpt2course.pretrained import load_checkpoint

    options = GenerateOptions(max_new_tokens=7, seed=3, top_k=5)
    (expected,) = generate(load_checkpoint(checkpoint), "Once upon", options)
    assert capsys.readouterr().out == f"Once upon{expected.text}\n"


def test_generate_refuses_bad_sampling(checkpoint: Path, capsys: Capture) -> None:
    """A temperature below zero turns the distribution upside down."""
    assert cli.main(["generate", "Hello", "--model", str(checkpoint), "--temperature", "-1", "--top-k", "0"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    head, *problems = shown.err.splitlines()
    assert head == "gpt2course: these flags can't be used:"
    assert [problem[: problem.index(";")] for problem in problems] == ["  - --top-k is 0", "  - --temperature is -1.0"]


def test_generate_refuses_before_it_prints(checkpoint: Path, capsys: Capture) -> None:
    """Half an answer, and then an error about block_size, with a mend that is Python and not a flag."""
    assert cli.main(["generate", "Hello", "--model", str(checkpoint), "--max-new-tokens", "65"]) == 2
    shown = capsys.readouterr()
    assert "block_size" in shown.err
    assert "--max-new-tokens, or let the context slide with --context slide" in shown.err
    assert shown.out == ""


def test_version_is_that_of_the_package(capsys: Capture) -> None:
    """A report of a bug that cannot say in which version."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpt2course {__version__}\n"


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_verify_passes_the_verdict_on(
    ok: bool, code: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A script that goes on after weights that are off."""

    class Found:
        def __init__(self) -> None:
            self.ok = ok

        def __str__(self) -> str:
            return "the verdict"

    monkeypatch.setattr("gpt2course.verify.verify", lambda model: Found())
    assert cli.main(["verify", str(checkpoint)]) == code
    assert capsys.readouterr().out == "the verdict\n"


def test_data_says_where_the_shards_are(tmp_path: Path, capsys: Capture) -> None:
    """Tokens prepared somewhere, and no way to find them."""
    (tmp_path / "text").write_text("one line of text\n" * 400)
    words = ["data", str(tmp_path / "text"), "--out", str(tmp_path / "shards"), "--val-fraction", "0.5"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert Path(shown[-1]) == tmp_path / "shards"
    made = Prepared.open(Path(shown[-1]))
    assert made.n_tokens["val"] == pytest.approx(made.n_tokens["train"], rel=0.1)


def test_data_takes_amounts_with_suffixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """`--tokens 10B` that is refused, or that means 10 tokens."""
    (tmp_path / "text").write_text("one line of text\n" * 4000)
    for name in ("--tokens", "--max-tokens"):
        words = ["data", str(tmp_path / "text"), "--out", str(tmp_path / name), name, "1.5k", "--shard-tokens", "5k"]
        assert cli.main(words) == 0
        made = Prepared.open(tmp_path / name)
        assert made.max_tokens == 1500
        assert [len(part) for part in made.stream("train").parts][:-1] == [5000] * (made.n_tokens["train"] // 5000)
    assert cli.main(["data", "stdlib", "--tokens", "10X"]) == 2
    assert "'10X' is no amount; write a whole number, or one with a suffix" in capsys.readouterr().err


def test_parameters_are_read_as_their_defaults_are(tmp_path: Path) -> None:
    """A seed that arrives as the text "1", a checkpoint called 123 that arrives as a number, 1e-3 as text."""
    words = [("seed", "1"), ("rate", "1e-3"), ("checkpoint", "123"), ("quick", "true"), ("strange", "word")]
    expected: dict[str, Any] = {"seed": 1, "rate": 1e-3, "checkpoint": "123", "quick": True, "strange": "word"}
    assert cli.typed(notebook(tmp_path), words) == expected


@pytest.mark.chapters
def test_run_keeps_the_result_and_leaves_the_chapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A parameter that does not arrive, or a chapter that is overwritten by its own run."""
    monkeypatch.chdir(tmp_path)
    chapter = notebook(tmp_path, "import os; print(seed, checkpoint, os.path.basename(os.getcwd()))")
    before = chapter.read_bytes()
    assert cli.main(["run", str(chapter), "-p", "seed", "41", "-p", "checkpoint", "course"]) == 0
    assert outputs(tmp_path / "build" / "07_small.ipynb") == f"41 course {tmp_path.name}\n"
    assert chapter.read_bytes() == before
    assert "07_small.ipynb" in capsys.readouterr().out


@pytest.mark.chapters
def test_run_of_a_chapter_that_fails_says_where(tmp_path: Path, capsys: Capture) -> None:
    """Exit 0, or a page of escape codes, for a cell that failed."""
    chapter = notebook(tmp_path, "assert seed == 41, 'the seed is another'")
    assert cli.main(["run", str(chapter), "--out", str(tmp_path / "out.ipynb")]) == 1
    shown = capsys.readouterr().err
    assert "AssertionError: the seed is another" in shown
    assert "out.ipynb" in shown
    assert "Traceback" not in shown
    assert (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [(["steps", "5"], "seed"), (["seed", "many"], "seed is 'many'")],
    ids=["unknown name", "wrong type"],
)
def test_run_refuses_parameters_that_do_not_fit(words: list[str], says: str, tmp_path: Path, capsys: Capture) -> None:
    """papermill runs the whole chapter with its defaults, and only warns."""
    chapter = notebook(tmp_path)
    assert cli.main(["run", str(chapter), "-p", *words, "--out", str(tmp_path / "out.ipynb")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out.ipynb").exists()


def test_run_refuses_to_overwrite_the_chapter(tmp_path: Path, capsys: Capture) -> None:
    """`--out` with the chapter's own name would replace its text by a run's."""
    chapter = notebook(tmp_path)
    assert cli.main(["run", str(chapter), "--out", str(chapter)]) == 2
    assert "--out" in capsys.readouterr().err


def test_notebooks_check_passes_the_verdict_on(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Stale outputs in a green CI."""
    monkeypatch.setattr(chapters, "check", lambda names: [f"{name}: stale" for name in names])
    assert cli.main(["notebooks", "check", "03", "05"]) == 1
    assert capsys.readouterr().out == "03: stale\n05: stale\n"
    assert cli.main(["notebooks", "check"]) == 0


def test_notebooks_refresh_that_fails_is_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A refresh that failed, and a commit of what it left."""

    def fails(names: tuple[str, ...]) -> None:
        raise chapters.ChapterError(f"{names[0]}: did not run to its end")

    monkeypatch.setattr(chapters, "refresh", fails)
    assert cli.main(["notebooks", "refresh", "03"]) == 1
    assert "03: did not run" in capsys.readouterr().err


def test_a_terminal_without_check_marks_is_no_error(tmp_path: Path) -> None:
    """Bug: in a locale that is not UTF-8 the doctor dies of its own check mark."""
    command = [sys.executable, "-m", "gpt2course", "notebooks", "check", "✓"]
    ended = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=60)
    assert ended.returncode == 2
    assert b"no chapter ?;" in ended.stderr
