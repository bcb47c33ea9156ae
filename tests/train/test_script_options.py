"""The three scripts' command lines: all options named and described, and none that torchrun takes for its own."""

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from torch.distributed.run import get_args_parser

from gpt2course import GPTConfig
from gpt2course.train.config import parse

SCRIPTS = ("train_single_gpu", "train_ddp", "train_fsdp")
FOLDER = Path(__file__).parents[2] / "scripts"
UNLISTED = {"model", "model.rope-scaling"}
"""a group of options, and one that is None or a whole class, for which a command line has no short way"""


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, FOLDER / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module  # tyro reads the descriptions of options from the source of the class
    spec.loader.exec_module(module)
    return module


def options_in(text: str) -> dict[str, str]:
    """The options of a help text, each with its description."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        rest = line.strip("│ ")
        if begin := re.match(r"│? {1,2}(?:-h, )?--(\w[\w.-]+)(?: (?:\{.*\}\|?)?[A-Z]*)?(.*)", line):
            name, rest = begin.groups()
        if name:
            found[name] = f"{found.get(name, '')} {rest.strip('│ ')}"
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_and_describes_every_option(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that only those find who read the source."""
    config = load(script).Config
    with pytest.raises(SystemExit) as end:
        parse(config, ["--help"])
    assert end.value.code == 0
    options = options_in(capsys.readouterr().out)
    wanted = {field.name.replace("_", "-") for field in fields(config)}
    wanted |= {f"model.{field.name.replace('_', '-')}" for field in fields(GPTConfig)}
    shown = {re.sub(r"(^|\.)no-", r"\1", name) for name in options} - {"help"}
    assert shown == wanted - UNLISTED
    for name, text in options.items():
        words = re.sub(r"\(default:.*", "", text).split()
        assert len(words) >= 3, f"--{name} is described by {text!r}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_option_is_short_for_one_of_torchrun(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--log`, which torchrun finds ambiguous although it stands behind the script's name."""
    with pytest.raises(SystemExit):
        parse(load(script).Config, ["--help"])
    options = options_in(capsys.readouterr().out)
    assert len(options) > 30
    of_torchrun = [name for action in get_args_parser()._actions for name in action.option_strings]
    for name in options:
        if name != "help":
            assert not [other for other in of_torchrun if other.startswith(f"--{name}")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short(script: str) -> None:
    """Three programs that drift apart, where the differences should be visible at a glance."""
    lines = (FOLDER / f"{script}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
