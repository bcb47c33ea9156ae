"""What a run may not be is said before anything is started: every problem, with its value and its mend."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2course import PRESETS, GPTConfig
from gpt2course.train.config import SMALL, TrainConfig, parse

CPU = TrainConfig(device="cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs that know no bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: emulated)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


def test_defaults_can_be() -> None:
    """A first command that is refused."""
    assert TrainConfig().problems(1) == []
    assert [CPU.problems(n) for n in (1, 2, 3, 4)] == [[]] * 4


@pytest.mark.parametrize(
    ("changes", "world_size", "problem"),
    [
        (
            {"batch_size": 10},
            4,
            "batch_size 10 is not divisible by world_size 4 x grad_accum_steps 1 = 4; use --batch-",
        ),
        ({"grad_accum_steps": 5}, 2, "batch_size 12 is not divisible by world_size 2 x grad_accum_steps 5 = 10; use"),
        ({"grad_accum_steps": 0}, 1, "grad_accum_steps is 0; it must be at least 1"),
        ({"batch_size": 0}, 1, "batch_size is 0; it must be at least 1"),
        ({"eval_tokens": 0}, 1, "eval_tokens is 0; it must be at least 1"),
        ({"max_bad_steps": 0}, 1, "max_bad_steps is 0"),
        ({"keep_last": 0}, 1, "keep_last is 0"),
        ({"save_every": -1}, 1, "save_every is -1; it must be at least 0"),
        ({"eval_every": -1}, 1, "eval_every is -1"),
        ({"clip": -1.0}, 1, "clip is -1.0"),
        ({"clip": float("nan")}, 1, "clip is nan"),
        ({"weight_decay": -0.1}, 1, "weight_decay is -0.1"),
        ({"seed": -1}, 1, "seed is -1"),
        ({"beta1": 1.0}, 1, "beta1 is 1.0; it must lie in [0, 1)"),
        ({"beta2": -0.1}, 1, "beta2 is -0.1"),
        ({"learning_rate": 0.0}, 1, "learning rate is 0.0 at its peak; it must be a positive number"),
        ({"resume": "no/such/checkpoint"}, 1, "resume is 'no/such/checkpoint', and there is no such folder; give auto"),
        (
            {"precision": "fp16"},
            1,
            "precision is fp16, which pays on GPUs only, and the device is cpu; use bf16 or fp32",
        ),
        ({}, 0, "0 processes; give at least 1"),
    ],
)
def test_what_cannot_be_is_told(changes: dict[str, Any], world_size: int, problem: str) -> None:
    """An error an hour later, on eight machines, from the inside of torch."""
    (found,) = replace(CPU, **changes).problems(world_size)
    assert problem in found


@pytest.mark.parametrize("batch_size", range(1, 40))
def test_the_batch_size_that_is_proposed_can_be(batch_size: int) -> None:
    """A mend that is refused in its turn."""
    config = replace(CPU, batch_size=batch_size, grad_accum_steps=2)
    for found in config.problems(4):
        proposed = int(found.rpartition("--batch-size ")[2])
        assert replace(config, batch_size=proposed).problems(4) == []
        assert abs(proposed - batch_size) <= max(4, 8 - batch_size)


def test_every_problem_is_listed_at_once() -> None:
    """Five attempts for five mistakes, each after a wait in a queue."""
    config = replace(CPU, batch_size=7, steps=0, warmup_steps=0, clip=-1.0, precision="fp16")
    assert len(config.problems(2)) == 4
    with pytest.raises(
        ValueError, match=r"(?s)these options can't be:\n  - clip.*\n  - steps.*\n  - batch.*\n  - prec"
    ):
        config.check_for(2)


def test_more_processes_than_gpus(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth process on a GPU that another has filled; or eight processes on two machines of four, refused."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    config = TrainConfig(device="cuda", batch_size=8)
    assert config.problems(4) == []
    assert config.problems(8) == [
        "8 processes on a machine with 4 GPUs; start as many as there are, or use --device cpu"
    ]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert config.problems(8) == []


def test_bfloat16_where_the_gpu_has_none(gpus: None) -> None:
    """A run at a tenth of the speed, as bfloat16 is emulated."""
    assert TrainConfig(device="cuda", precision="bf16").problems(1) == [
        "precision is bf16, which Tesla T4 does not compute in; use --precision fp16"
    ]
    assert TrainConfig(device="cuda", precision="fp16").problems(1) == []


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own assertion about a build without CUDA."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = TrainConfig(device="cuda").problems(1)
    assert "torch sees no GPU here; use --device cpu" in found


def test_heads_that_do_not_divide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Three key heads for four query heads, found in the first forward pass."""
    with pytest.raises(SystemExit) as end:
        parse(TrainConfig, ["--model.n-kv-head", "3"])
    assert end.value.code == 2
    assert "n_kv_head 3 does not divide n_head 4; use one of [1, 2, 4]" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--nope", "3"], ["--steps", "many"], ["--preset", "gpt3"], ["--schedule", "step"]])
def test_unknown_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt option that nothing reads, and a run with the default in its place."""
    with pytest.raises(SystemExit) as end:
        parse(TrainConfig, words)
    assert end.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", [*PRESETS, "small"])
@pytest.mark.parametrize("equals", [False, True])
def test_preset_gives_the_model(name: str, equals: bool) -> None:
    """`--preset gpt2-xl` that trains the small model."""
    config = parse(TrainConfig, [f"--preset={name}"] if equals else ["--preset", name])
    assert config.model == PRESETS.get(name, SMALL)
    assert config.preset == name


def test_fields_of_the_model_go_before_the_preset() -> None:
    """`--preset gpt2 --model.n-layer 2` with twelve layers; or with the small model's other sizes."""
    config = parse(TrainConfig, ["--preset", "gpt2", "--model.n-layer", "2", "--model.n-head", "6"])
    assert config.model == GPTConfig(n_layer=2, n_head=6)
    assert config.model.kv_heads == 6


def test_config_is_plain_values() -> None:
    """A config.json that can't be written, as it holds a Path."""
    config = parse(TrainConfig, ["--out", "runs/mine", "--compile"])
    stored = config.to_dict()
    assert (stored["out"], stored["compile"], stored["model"]["n_layer"]) == ("runs/mine", True, 4)
    assert config.metrics_path == Path("runs/mine/metrics.jsonl")
    assert parse(TrainConfig, ["--jsonl", "log"]).metrics_path == Path("log")


def test_a_run_is_not_turned_back_in_its_own_folder(tmp_path: Path) -> None:
    """Later checkpoints would stay beside the new ones, and the next restart would go on from those."""
    path = tmp_path / "checkpoints" / "step-00000010"
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match="resume is a checkpoint of this very run; use auto, or another --out"):
        replace(CPU, out=tmp_path, resume=str(path)).check_for(1)
    replace(CPU, out=tmp_path / "other", resume=str(path)).check_for(1)
