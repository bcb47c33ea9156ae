"""Traps of real runs: a changed precision, another folder, options that cancel each other, one machine of several."""

import dataclasses
import json
import math
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from gpt2course.loss import chunked_cross_entropy, plain_cross_entropy
from gpt2course.train import RunData, World, command, ddp, fsdp, loop, parallel, single, train
from gpt2course.train.metrics import MetricsLog
from gpt2course.train.step import LossScale
from tests.distributed.made_runs import TINY, MadeText
from tests.distributed.ranks import run_ranks
from tests.train.test_step import config_for, run


def test_a_run_that_goes_on_in_another_precision_gets_that_ones_loss_scale(tmp_path: Path) -> None:
    """Bug: a float32 run went on in float16 with its factor of 1, and small gradients vanished without a word."""
    run(config_for(tmp_path, steps=2))
    with mock.patch.object(loop, "compute_gradients", side_effect=loop.compute_gradients) as computed:
        run(config_for(tmp_path, steps=3, precision="fp16"))
    assert computed.call_args.args[4] == LossScale.for_precision("fp16").factor > 1


def test_every_start_stores_its_config_with_the_run(tmp_path: Path) -> None:
    """Bugs: no config.json where a run began at another's checkpoint; the options of an earlier start."""
    run(config_for(tmp_path / "a", steps=2))
    run(config_for(tmp_path / "b", steps=3, resume=str(tmp_path / "a/checkpoints/step-00000002")))
    run(config_for(tmp_path / "a", steps=4))
    stored = [json.loads((tmp_path / name / "config.json").read_text())["steps"] for name in "ab"]
    assert stored == [4, 3]


def test_the_memory_of_the_averages_is_told_although_the_first_step_was_skipped(tmp_path: Path) -> None:
    """Bug: measured once, in a first step that float16 had to skip, the optimizer held 0 bytes for the whole run."""
    with mock.patch.object(loop, "global_norm", side_effect=[math.inf, 1.0, 1.0]):
        config = config_for(tmp_path, steps=3)
        rows = train(config, single(config, World()), RunData(MadeText())).rows
    held = [row["memory"]["optimizer"] for row in rows]
    assert held[0] == 0
    assert held[1] == held[2] > 2 * rows[0]["memory"]["parameters"]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_are_compiled_also_with_activation_checkpointing(tmp_path: Path, checkpointed: bool) -> None:
    """Bug: torch's `checkpoint` turns the compiler off for all that it calls, so --compile did nothing."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiler = torch.compile
    changes = {"steps": 2, "checkpoint_activations": checkpointed}
    plain, _ = run(config_for(tmp_path / "a", **changes))
    with (
        mock.patch.object(torch, "compile", lambda function: compiler(function, backend=backend)),
        mock.patch.object(parallel, "checkpoint", side_effect=parallel.checkpoint) as checkpoint,
    ):
        compiled, _ = run(config_for(tmp_path / "b", compile=True, **changes))
    assert graphs
    assert checkpoint.called == checkpointed
    assert max(abs(a - b) for a, b in zip(plain, compiled, strict=True)) < 2e-6


def test_the_heads_gradient_of_many_tokens_is_summed_in_float32() -> None:
    """Bug: with a bfloat16 head, as FSDP gathers it, each chunk's gradient was added in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    h_NC, head_VC = torch.randn(8192, 16, generator=draw), 0.05 * torch.randn(97, 16, generator=draw)
    targets_N = (torch.rand(8192, generator=draw) ** 3 * 97).long()

    def gradient(loss: object, dtype: torch.dtype) -> torch.Tensor:
        weight_VC = head_VC.bfloat16().to(dtype).requires_grad_()
        loss(h_NC.bfloat16().to(dtype), weight_VC, targets_N).backward()  # type: ignore[operator]
        assert weight_VC.grad is not None
        assert weight_VC.grad.dtype == dtype
        return weight_VC.grad.double()

    exact = gradient(plain_cross_entropy, torch.float64)
    error = (gradient(chunked_cross_entropy, torch.bfloat16) - exact).norm() / exact.norm()
    assert error < 0.006  # rounding the result once costs 0.0017 (2**-9 over the root of 3, at most)


@pytest.mark.parametrize(("local_rank", "says"), [("0", "no such corpus\n"), ("1", "")])
def test_each_machine_says_what_it_lacks(
    local_rank: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: only process 0 of all said why; a folder missing on the second machine ended the run without a word."""
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as ended:
        command._refuse("no such corpus")
    assert (ended.value.code, capsys.readouterr().err) == (2, says)


@pytest.mark.parametrize("strategy", [ddp, fsdp])
def test_a_strategy_for_many_started_alone_says_how_to_start_it(strategy: object, tmp_path: Path) -> None:
    """Bug: `python scripts/train_ddp.py` ended in torch's words about a default process group."""
    with pytest.raises(ValueError, match=r"processes that torchrun started.*launch_(ddp|fsdp)\.sh, with --nproc 1"):
        strategy(config_for(tmp_path, model=TINY), World())  # type: ignore[operator]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_told_by_the_name_of_the_log(tmp_path: Path) -> None:
    """Bug: a run of many files and folders ended with "No space left on device", and nothing more."""
    with MetricsLog(tmp_path / "metrics.jsonl", World()) as log, Path("/dev/full").open("ab", buffering=0) as full:
        log._files[0].close()
        log._files[0] = full
        with pytest.raises(OSError, match=r"/dev/full: No space left on device; the disk may be full, free some"):
            log.write({"step": 1})


@pytest.mark.filterwarnings("error:.*fork_rng")
def test_the_first_weights_leave_the_generators_of_other_gpus_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: on a machine of several GPUs each process kept the states of all, and torch warned of it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", pytest.fail)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    assert parallel.seeded(config_for(tmp_path), torch.device("cpu")).training


def _restart_of_one_machine(world: World, out: Path) -> int:
    """As where the second of two machines had a failure: torchrun counts it there alone."""
    config = config_for(out, steps=4, resume="never")
    train(dataclasses.replace(config, steps=2), ddp(config, world), RunData(MadeText()))
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(world.rank)
    return train(config, ddp(config, world), RunData(MadeText())).first_step


@pytest.mark.distributed
def test_a_restart_that_one_machine_counts_is_one_for_all(tmp_path: Path) -> None:
    """Bug: on the other machines `--resume never` refused its own run, at every restart."""
    assert run_ranks(_restart_of_one_machine, 2, tmp_path) == [2, 2]
