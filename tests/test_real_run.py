"""The README's section on a real run: its commands parse, and its figures are those that the package reckons."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from gpt2course import PRESETS, cli
from gpt2course.data import Prepared
from gpt2course.plan import memory_bytes, run_time
from gpt2course.train import TrainConfig, parse
from gpt2course.train.peaks import peak_flops

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("## A real run\n")[2].partition("\n## ")[0]
COMMANDS = [shlex.split(line) for line in re.findall(r"^    (\S.*)$", SECTION.replace("\\\n", " "), re.MULTILINE)]
GPT2 = PRESETS["gpt2"]


def config_of(script: str, words: list[str]) -> TrainConfig:
    """What a script makes of its command line."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module  # tyro reads the descriptions of options from the source of the class
    spec.loader.exec_module(module)
    config: TrainConfig = parse(module.Config, words)
    return config


def test_commands_are_these() -> None:
    """A section that the tests below no longer find anything in."""
    assert [words[0] for words in COMMANDS] == ["gpt2course", "./scripts/launch_fsdp.sh", "python"]


def test_data_command_is_passed_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--tokens 10B` that no longer is an option, or means another number."""
    asked = {}

    def prepare(corpus: str, folder: Path, **options: object) -> Prepared:
        asked.update(corpus=corpus, folder=folder, **options)
        two = {"train": 1, "val": 1}
        return Prepared(folder, corpus, 0.005, None, two, two, two, "")

    monkeypatch.setattr("gpt2course.data.prepare", prepare)
    assert cli.main(COMMANDS[0][1:]) == 0
    assert asked["corpus"] == "fineweb-edu"
    assert asked["max_tokens"] == 10**10
    assert asked["val_fraction"] == 0.005
    assert capsys.readouterr().out.splitlines()[-1] == str(asked["folder"]) == "shards/fineweb-edu"


@pytest.mark.parametrize(
    ("number", "script", "world_sizes"), [(1, "train_fsdp", [8, 4, 2]), (2, "train_single_gpu", [1])]
)
def test_training_commands_parse(
    number: int, script: str, world_sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that was renamed, or a batch that eight GPUs can't share."""
    shards = tmp_path / COMMANDS[0][-1]  # as the first command would have left them
    shards.mkdir(parents=True)
    (shards / "meta.json").touch()
    monkeypatch.chdir(tmp_path)
    words = COMMANDS[number][2:] if script == "train_single_gpu" else COMMANDS[number][1:]
    config = config_of(script, words)
    assert [config.problems(world_size) for world_size in world_sizes] == [[]] * len(world_sizes)
    assert config.model == GPT2
    assert str(config.corpus) == COMMANDS[0][-1]
    assert config.batch_size * GPT2.block_size * config.steps == pytest.approx(9.8e9, rel=0.005)


def test_both_training_commands_are_one_run() -> None:
    """Two commands said to do the same, of which one has another rate."""
    fsdp, single = config_of("train_fsdp", COMMANDS[1][1:]), config_of("train_single_gpu", COMMANDS[2][2:])
    same = {key: value for key, value in fsdp.to_dict().items() if single.to_dict().get(key, value) != value}
    assert same == {"grad_accum_steps": 4}


def test_figures_are_reckoned() -> None:
    """A table of times from another model, or from before a change of the arithmetic."""
    for gpu, name in (("A100", "NVIDIA A100-SXM4-80GB"), ("H100 SXM", "NVIDIA H100 80GB HBM3")):
        peak = peak_flops(name, "bf16")
        assert peak is not None
        hours = {n: [run_time(GPT2, 10e9, n, peak, mfu) / 3600 for mfu in (0.45, 0.35)] for n in (1, 8)}
        cells = " | ".join(f"{low:.1f} to {high:.1f} h" for low, high in hours.values())
        assert f"| {gpu}, {peak / 1e12:g} TFLOP/s | {cells} |" in SECTION
    xl, text = PRESETS["gpt2-xl"], " ".join(SECTION.split())
    assert f"{run_time(GPT2, 10e9, 1, 1, 1):.1e} FLOPs".replace("e+", "e") in text
    assert f"GPT-2 needs {memory_bytes(GPT2).kept / 1e9:.1f} GB" in text
    assert f"it is {memory_bytes(xl).kept / 1e9:.1f} GB, of which FSDP on eight GPUs keeps" in text
    assert f"keeps {memory_bytes(xl, 8, 'fsdp').kept / 1e9:.1f} GB on each" in text
    saved = memory_bytes(GPT2).parameters + memory_bytes(GPT2).optimizer
    assert f"A checkpoint is {saved / 1e9:.1f} GB" in text
