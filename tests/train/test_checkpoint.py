"""Checkpoints of one process: what is saved comes back bit for bit, and which of them stay."""

import math
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gpt2course.pretrained import load_checkpoint
from gpt2course.train import checkpoint_io
from gpt2course.train.checkpoint import CheckpointError, Checkpoints, best, export, load, load_model, newest, tensors
from tests.train.checkpoint_runs import CONFIG, Run, flip, same, saved

NOTHING_STEPPED = Run().full().keys()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file can grow past so many bytes: the system refuses the write as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Bugs: averages or AdamW's count forgotten, so that the first steps after a resume are others."""
    run, path = saved(tmp_path, steps=3)
    again = Run(seed=1)
    again.step()
    meta = load(path, again.module, again.optimizer)
    assert meta == {"step": 3, "tokens": 54, "model": CONFIG.to_dict(), "val_loss": None}
    for one in (run, again):
        torch.manual_seed(7)
        one.step()
        one.step()
    assert same(run.full(), again.full())
    assert again.module.lm_head.weight is again.module.wte.weight
    ids = torch.arange(11)[None]
    assert torch.equal(load_model(path)(ids), load_model(path)(ids))


def test_a_run_that_has_not_stepped_is_a_checkpoint_too(tmp_path: Path) -> None:
    """Bugs: averages of zero and a count of 0 saved as if they were a state; a stale state kept when such is loaded."""
    run, path = saved(tmp_path, steps=0)
    again = Run(seed=1)
    again.step()
    load(path, again.module, again.optimizer)
    assert same(run.full(), again.full())
    assert again.full().keys() == NOTHING_STEPPED
    assert not again.optimizer.state


def test_every_tensor_has_one_name_whatever_the_wrapper() -> None:
    """Bugs: the tied head saved twice; a checkpoint of a compiled model that the plain one can't load."""
    run = Run()
    run.step()
    found = tensors(run.module, run.optimizer)
    for attribute in ("module", "_orig_mod"):  # of DistributedDataParallel, of torch.compile
        wrapper = torch.nn.Module()
        wrapper.register_module(attribute, run.module)
        assert tensors(wrapper, run.optimizer).keys() == found.keys()
    plain = {name for name, _ in run.module.named_parameters()}
    assert "lm_head.weight" not in plain
    assert found.keys() == {f"model.{name}" for name in plain} | {
        f"optimizer.{name}.{key}" for name in plain for key in ("exp_avg", "exp_avg_sq")
    }


def test_frozen_parameters_have_no_averages_and_a_run_that_trains_others_is_refused(tmp_path: Path) -> None:
    """Bug: a run that unfreezes a layer silently starts with another layer's missing averages."""
    run = Run()
    run.module.wpe.requires_grad_(False)
    run.optimizer = torch.optim.AdamW(p for p in run.module.parameters() if p.requires_grad)
    run.step()
    run.save(Checkpoints(tmp_path), 1)
    assert "optimizer.wpe.weight.exp_avg" not in run.full()
    other = Run(seed=1)
    with pytest.raises(CheckpointError, match=r"only in the run: optimizer\.wpe\.weight\.exp_avg, optimizer\.wpe"):
        load(tmp_path / "step-00000001", other.module, other.optimizer)
    load(tmp_path / "step-00000001", other.module)
    assert torch.equal(other.module.wpe.weight, run.module.wpe.weight)


def test_only_adamw_with_one_count_can_be_saved(tmp_path: Path) -> None:
    """Bug: a momentum, or the counts of parameters that missed some steps, quietly lost."""
    run = Run()
    run.optimizer = torch.optim.SGD(run.module.parameters(), lr=0.1, momentum=0.9)
    run.step()
    with pytest.raises(ValueError, match="only AdamW's state can be saved"):
        run.save(Checkpoints(tmp_path), 1)
    run = Run()
    run.step()
    run.optimizer.state[run.module.wte.weight]["step"] += 1
    with pytest.raises(ValueError, match="AdamW has taken 1 to 2 steps"):
        run.save(Checkpoints(tmp_path), 1)


def test_an_async_save_holds_the_state_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a thread that reads the weights while they change; a checkpoint seen before commit; one that waits for
    nothing at the end of a run; two saves at once."""
    run, gate = Run(), hold(monkeypatch)
    checkpoints = Checkpoints(tmp_path, async_save=True)
    assert not checkpoints.ready()
    assert checkpoints.commit() is None
    wanted = []
    for step in (1, 2):
        run.step()
        wanted.append(run.full())
        gate.clear()
        run.save(checkpoints, step)
        run.step()
        assert not checkpoints.ready()
        assert newest(tmp_path) == (tmp_path / "step-00000001" if step == 2 else None)
        gate.set()
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    for step in (1, 2):
        again = Run(seed=1)
        load(tmp_path / f"step-{step:08d}", again.module, again.optimizer)
        assert same(again.full(), wanted[step - 1])


def hold(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until this event is set, no writer begins."""
    gate, write = threading.Event(), checkpoint_io.write_single

    def held(folder: Path, found: dict[str, torch.Tensor]) -> None:
        assert gate.wait(60)
        write(folder, found)

    monkeypatch.setattr(checkpoint_io, "write_single", held)
    return gate


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    """Bugs: the best deleted; a loss that is not a number taken for the lowest; a delete that takes the new one."""
    run = Run()
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    seen = []
    for step, loss in enumerate([3.0, math.nan, 2.0, None, 2.5, 2.2, math.inf, 1.0, 1.5], start=1):
        run.save(checkpoints, step, loss)
        assert checkpoints.newest() == tmp_path / f"step-{step:08d}"
        seen.append(([int(name[5:]) for name in names(tmp_path)], int(str(best(tmp_path))[-8:])))
    assert seen == [
        ([1], 1),
        ([1, 2], 1),
        ([2, 3], 3),
        ([3, 4], 3),
        ([3, 4, 5], 3),
        ([3, 5, 6], 3),
        ([3, 6, 7], 3),
        ([7, 8], 8),
        ([8, 9], 8),
    ]


def test_without_a_validation_loss_there_is_no_best(tmp_path: Path) -> None:
    """Bug: None compared with a number."""
    saved(tmp_path)
    assert best(tmp_path) is None
    assert newest(tmp_path / "empty") is None


def test_a_step_is_saved_once_and_one_of_another_run_is_replaced(tmp_path: Path) -> None:
    """Bugs: the save at the end of a run writes the last one again; a run that went back to an earlier checkpoint,
    since this one was damaged, keeps the damaged one."""
    run, path = saved(tmp_path, steps=2)
    checkpoints = Checkpoints(tmp_path)
    load(path, run.module, run.optimizer)
    before = (path / "state.json").stat().st_ino
    checkpoints.load(path, run.module, run.optimizer)
    run.save(checkpoints, 2)
    assert (path / "state.json").stat().st_ino == before
    flip(path / "model.safetensors", -1)
    run.step()
    run.save(Checkpoints(tmp_path), 2)
    again = Run(seed=1)
    load(path, again.module, again.optimizer)
    assert same(again.full(), run.full())
    assert names(tmp_path) == [path.name]


def test_a_save_leaves_the_checkpoints_of_later_steps_alone(tmp_path: Path) -> None:
    """Bug: a run that starts again in the folder of a longer one deletes that one's checkpoints, or its own."""
    for step in (1, 8, 9):
        Run().save(Checkpoints(tmp_path, keep_last=9), step)
    run = Run()
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step in (2, 3):
        run.save(checkpoints, step)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 8, 9)]


def test_what_a_killed_run_left_is_cleaned_up(tmp_path: Path) -> None:
    """Bugs: half-written folders pile up until the disk is full; a save that was complete but for its name is lost."""
    _, path = saved(tmp_path, steps=1)
    for name in ("tmp-step-00000002", "old-step-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    Checkpoints(tmp_path)
    assert names(tmp_path) == [path.name]
    path.rename(tmp_path / "tmp-step-00000001")
    Checkpoints(tmp_path)
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_is_told_and_earlier_checkpoints_stay(tmp_path: Path, async_save: bool) -> None:
    """Bugs: a half-written checkpoint left under its name or beside; the earlier one gone; a thread's error lost."""
    run, path = saved(tmp_path, steps=1)
    before = run.full()
    run.step()
    checkpoints = Checkpoints(tmp_path, async_save=async_save)

    def save() -> None:
        run.save(checkpoints, 2)
        checkpoints.commit()

    full = r"could not save .*step-00000002: .*File too large.*; make room"
    with small_disk(20_000), pytest.raises(CheckpointError, match=full):
        save()
    assert names(tmp_path) == [path.name]
    again = Run(seed=1)
    load(path, again.module, again.optimizer)
    assert same(again.full(), before)
    run.save(checkpoints, 2)
    checkpoints.wait()
    assert newest(tmp_path) == tmp_path / "step-00000002"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Bug: a traceback of mkdir instead of the path, the reason and the mend."""
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"checkpoints/step-00000001: .*choose a folder you may write"):
        Run().save(Checkpoints(tmp_path / "checkpoints"), 1)
    with pytest.raises(ValueError, match="keep_last is 0; it must be at least 1"):
        Checkpoints(tmp_path, keep_last=0)


def test_an_exported_model_has_the_same_logits(tmp_path: Path) -> None:
    """Bug: an export of other weights than those of the checkpoint."""
    run, path = saved(tmp_path / "run", steps=2)
    ids = torch.arange(11)[None]
    with torch.no_grad():
        wanted = run.module.eval()(ids)
        assert torch.equal(load_checkpoint(export(path, tmp_path / "hf"))(ids), wanted)
        assert torch.equal(load_model(path)(ids), wanted)


def test_files_can_be_read_by_whom_the_folder_can(tmp_path: Path) -> None:
    """Bug: weights that only their owner may read, as safetensors makes them."""
    _, path = saved(tmp_path)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {path.stat().st_mode & 0o666}
    assert checkpoint_io.read_state(path)["kind"] == "single"
