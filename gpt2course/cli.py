"""The command `gpt2course`. Heavy modules are imported by the command that needs them, so that help comes at once."""

import ast
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, UseAppendAction, arg

from gpt2course import __version__
from gpt2course.cli_measure import bench, bench_training, price_tag

Command = Callable[..., int]
Parameters = Annotated[
    UseAppendAction[tuple[tuple[str, str], ...]], arg(name="parameter", aliases=["-p"], metavar="NAME VALUE")
]
USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)


def doctor(json: bool = False) -> int:
    """Look at this machine: one line for each thing the course needs, with the mend. Exit 1 if the course cannot run.

    Args:
        json: print JSON, for programs.
    """
    from gpt2course.doctor import can_run, report, run_checks, to_json

    checks = run_checks()
    print(to_json(checks) if json else report(checks))
    return 0 if can_run(checks) else 1


def generate_command() -> Command:
    """The command `generate`; made when asked for, since its flags are the fields of a class that needs torch."""
    from gpt2course.generate import GenerateOptions

    class Sampling(GenerateOptions):
        """How to draw the next tokens."""

        def __post_init__(self) -> None:
            """Values are checked in `generate`: errors raised here would come in the words of the parser."""

    def generate(
        prompt: Positional[str],
        sampling: OmitArgPrefixes[Sampling],
        model: str = "auto",
        device: str = "cpu",
    ) -> int:
        """Continue a prompt. The text goes to stdout as it is made, all else to stderr.

        Args:
            prompt: the text to go on from.
            sampling: how to draw the tokens.
            model: "auto" (gpt2 if it is cached, else course), "course", "gpt2" … "gpt2-xl", owner/name, folder, file.
            device: where to compute: "cpu", "cuda", "mps".
        """
        from gpt2course.generate import stream
        from gpt2course.pretrained import open_model

        try:
            options = GenerateOptions(**asdict(sampling))
            gpt, sentence = open_model(model, device=device)
            print(sentence, file=sys.stderr)
            pieces = stream(gpt, prompt, options)
        except ValueError as error:
            names = [field.name for field in fields(GenerateOptions)]
            raise ValueError(
                as_flags(str(error).replace("GenerateOptions:", "these flags can't be used:"), names)
            ) from error
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return 0

    return generate


def as_flags(message: str, names: Iterable[str]) -> str:
    """An error of the package in the words of the shell: `top_k is 0` becomes `--top-k is 0`."""
    message = message.replace('context="slide"', "--context slide")
    for name in names:
        only_as_name = "" if "_" in name else "(?= is )"  # "stop" and "context" are also plain words
        message = re.sub(rf"(?<![\w-]){name}\b{only_as_name}", "--" + name.replace("_", "-"), message)
    return message


def verify(model: Positional[str] = "gpt2", device: str = "cpu") -> int:
    """Compare the published GPT-2 with recorded facts, layer by layer, and name the first thing that is off.

    Args:
        model: gpt2 (fetched if it is not cached), or a folder or file with a copy of its weights.
        device: where to compute: "cpu", "cuda", "mps".
    """
    from gpt2course.pretrained import load_checkpoint
    from gpt2course.verify import verify as compare

    found = compare(load_checkpoint(model, device=device))
    print(found)
    return 0 if found.ok else 1


def data(
    corpus: Positional[str] = "stdlib",
    out: Path | None = None,
    val_fraction: float = 0.05,
    tokens: Annotated[str, arg(aliases=["--max-tokens"], metavar="AMOUNT")] = "all",
    shard_tokens: Annotated[str, arg(metavar="AMOUNT")] = "100M",
    processes: int | None = None,
) -> int:
    """Turn a corpus into token shards, split into training and validation, and say where they are.

    Stopped or killed, it goes on where it was when the same command is given again. The shards are the same to the
    byte as if nothing had happened, and whatever the number of processes. They take 2 bytes a token, and appear under
    their name when all are whole; until then they lie beside it, in a folder whose name ends in ".part".

    Args:
        corpus: stdlib, stdlib-prose, tinyshakespeare, fineweb-edu (its sample of some 10 B tokens, streamed from the
            Hugging Face hub), hf:owner/name or hf:owner/name:config, a file, or a folder.
        out: folder for the shards; by default one in the cache.
        val_fraction: share of the documents kept for validation.
        tokens: stop after so many, such as 5k, 100M or 10B, at the end of a document.
        shard_tokens: tokens in a shard.
        processes: processes that tokenise; by default one for each core.
    """
    from gpt2course.data import prepare
    from gpt2course.data.amounts import parse_amount
    from gpt2course.data.encode import usable_cores

    limit, size = None if tokens == "all" else parse_amount(tokens), parse_amount(shard_tokens)
    processes = usable_cores() if processes is None else processes
    made = prepare(corpus, out, val_fraction=val_fraction, max_tokens=limit, shard_tokens=size, processes=processes)
    for split in ("train", "val"):
        print(f"{split}: {made.n_tokens[split]:,} tokens in {made.n_documents[split]:,} documents")
    print(made.folder)
    return 0


def run(chapter: Positional[str], parameter: Parameters = (), out: Path | None = None) -> int:
    """Run a chapter from top to bottom with papermill, without opening it, and keep the result in a new notebook.

    Args:
        chapter: its number, such as 03, or a notebook file.
        parameter: a parameter's name and its new value, such as -p seed 1; may be repeated.
        out: the notebook to write; by default build/NAME.ipynb.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from gpt2course.chapters import find
    from gpt2course.chapters.copies import checked_parameters
    from gpt2course.launch import child_environment

    source = Path(chapter) if Path(chapter).is_file() else find([chapter.zfill(2)])[0]
    target = out or Path("build", source.name)
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the chapter itself; choose another file with --out")
    changes = checked_parameters(source, typed(source, parameter))
    target.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(child_environment())
    started = time.perf_counter()
    try:
        # "immediate": a kernel that is asked politely to end now and then keeps papermill waiting for seconds.
        papermill.execute_notebook(
            str(source), str(target), changes, cwd=str(source.parent), shutdown_kernel="immediate"
        )
    except PapermillExecutionError as error:
        print(f"{source.name}, cell {error.exec_count}: {error.ename}: {error.evalue}", file=sys.stderr)
        print(f"the notebook up to there is {target}", file=sys.stderr)
        return 1
    print(f"{target} ({time.perf_counter() - started:.1f} s)")
    return 0


def typed(path: Path, values: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The words given on the command line as values: text where the chapter's default is text, else Python literals."""
    import papermill

    known = papermill.inspect_notebook(str(path))
    found: dict[str, Any] = {}
    for name, word in values:
        is_text = name in known and isinstance(ast.literal_eval(known[name]["default"]), str)
        found[name] = word if is_text else literal(word)
    return found


def literal(word: str) -> Any:
    """A number, true, false, none or list as Python says or JSON does; any other word is itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None", "null": "None"}.get(word, word))
    except (ValueError, SyntaxError):
        return word


def export(checkpoint: Positional[Path], out: Positional[Path]) -> int:
    """Write the model of a training checkpoint as a Hugging Face folder, which `generate --model` takes as well.

    Args:
        checkpoint: such as runs/single/checkpoints/step-00000100, of any strategy and number of processes.
        out: the folder to make. GPT-2's format has no room for RoPE, grouped heads or windows: such a model is refused.
    """
    from gpt2course.train.checkpoint import export as write

    print(write(checkpoint, out))
    return 0


def notebooks(
    action: Positional[Literal["refresh", "check", "student"]],
    names: Positional[tuple[str, ...]] = (),
    out: Path = Path("student"),
) -> int:
    """Care for the chapters: refresh their outputs, check them without running, or make the student edition.

    Args:
        action: run in place; list what may not be committed, exit 1 if anything; write copies without solutions.
        names: chapters by number, such as 03; all by default.
        out: folder of the student edition.
    """
    from gpt2course import chapters

    if action == "refresh":
        try:
            chapters.refresh(names)
        except chapters.ChapterError as error:
            print(error, file=sys.stderr)
            return 1
    elif action == "student":
        for path in chapters.student(out, names):
            print(path)
    elif problems := chapters.check(names):
        print("\n".join(problems))
        return 1
    else:
        print("every chapter is fresh and whole")
    return 0


def generate_help() -> int:
    """Continue a prompt. The text goes to stdout as it is made, all else to stderr."""
    raise AssertionError("stands for `generate` in the list of commands only")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 1 if a check failed, 2 for a mistake of the user, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a pipe that is not UTF-8 gets ? for ✓, not an error
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(f"gpt2course {__version__}")
        return 0
    commands: dict[str, Command] = {
        "doctor": doctor,
        "run": run,
        "generate": generate_command() if words[:1] == ["generate"] else generate_help,
        "verify": verify,
        "data": data,
        "export": export,
        "notebooks": notebooks,
        "bench": bench,
        "bench-training": bench_training,
        "price-tag": price_tag,
    }
    try:
        try:
            code: int = tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="gpt2course",
                description="Build GPT-2 from tokens to the published weights, and train it: the course's command "
                "line. --version prints the version.",
                args=words,
                config=(FlagCreatePairsOff,),
            )
        finally:  # also after --help, which ends in SystemExit
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` say, has enough; the interpreter's own last flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        print(f"gpt2course: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
