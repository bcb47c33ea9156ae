"""What is no whole checkpoint of this run is refused, with an error that says which, before a weight is touched."""

import io
import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata

from gpt2course.train import checkpoint_io
from gpt2course.train.checkpoint import CheckpointError, Checkpoints, export, load, load_model, newest
from gpt2course.train.checkpoint_io import Records
from tests.train.checkpoint_runs import CONFIG, Run, flip, same, saved


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("single"))[1]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of kind "sharded", written by one process."""
    run = Run()
    run.step()
    folder = tmp_path_factory.mktemp("sharded")
    checkpoint_io.write_sharded(folder, run.full())
    finish(folder)
    return folder


def finish(folder: Path) -> None:
    """Write a state.json that vouches for what lies in a folder of shards."""
    meta = {"step": 1, "tokens": 18, "model": CONFIG.to_dict(), "val_loss": None}
    files = checkpoint_io.seal_mine(folder, "sharded", 0)
    checkpoint_io.write_state(folder, {"kind": "sharded", "adam_step": 1, "meta": meta, "files": files})


def change_state(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | changes))

    return change


def truncate(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-9])


def to_hugging_face(path: Path) -> None:
    export(path, path)
    (path / "state.json").unlink()


BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "unfinished",
        lambda path: (path / "state.json").unlink(),
        r"was not finished: it has no state\.json; move it aw",
    ),
    ("gone", shutil.rmtree, r"is not there; give the folder of a checkpoint"),
    ("a file", lambda path: (shutil.rmtree(path), path.write_text("x")), r"is a file; give the folder"),
    ("Hugging Face", to_hugging_face, r"is a Hugging Face folder.*gpt2course\.pretrained\.load_checkpoint"),
    ("not JSON", truncate("state.json"), r"state\.json is damaged \("),
    ("no object", lambda path: (path / "state.json").write_text("[]"), r"state\.json is damaged"),
    ("not text", lambda path: (path / "state.json").write_bytes(b"\xff\xfe"), r"state\.json is damaged"),
    ("another's", change_state(format="lightning"), r"has the format 'lightning', not 'gpt2course-training'"),
    ("newer", change_state(version=2), r"has version 2 of the format, and this program reads 1"),
    ("edited", change_state(adam_step=7), r"state\.json is damaged, or was changed by hand"),
    ("file missing", lambda path: (path / "optimizer.safetensors").unlink(), r"optimizer\.safetensors is missing"),
    ("cut off", truncate("model.safetensors"), r"model\.safetensors has [\d,]+ bytes, not [\d,]+; move it away"),
    ("flipped", lambda path: flip(path / "model.safetensors", -9), r"damaged: model\.safetensors has another SHA-256"),
]


@pytest.mark.parametrize(("change", "text"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_what_is_broken_is_refused_and_named(
    single: Path, tmp_path: Path, change: Callable[[Path], Any], text: str
) -> None:
    """Bugs: a model half of an old and half of a new state; an error that leaves the reader guessing."""
    path = tmp_path / "step-00000001"
    shutil.copytree(single, path)
    change(path)
    run = Run(seed=1)
    run.step()
    before = run.full()
    for refuse in (lambda: load(path, run.module, run.optimizer), lambda: load_model(path)):
        with pytest.raises(CheckpointError, match=text) as caught:
            refuse()
        assert str(path) in str(caught.value)
    assert same(run.full(), before)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_one_flipped_bit_anywhere_is_noticed(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Bug: a part of a file, or a whole one, that no checksum covers."""
    source, pick = request.getfixturevalue(kind), random.Random(0)
    for file in sorted(source.iterdir()):
        for _ in range(4):
            path = tmp_path / f"{file.name}-{pick.random()}"
            shutil.copytree(source, path)
            flip(path / file.name, pick.randrange(file.stat().st_size))
            if file.name == "state.json" and same_json(path / file.name, file):
                continue
            with pytest.raises(CheckpointError, match=re.escape(file.name)):
                load_model(path)


def same_json(one: Path, other: Path) -> bool:
    """Whether a change of spaces alone has left the meaning."""
    try:
        return bool(json.loads(one.read_bytes()) == json.loads(other.read_bytes()))
    except ValueError:
        return False


def test_another_model_is_refused_with_what_differs(single: Path) -> None:
    """Bugs: a shape error in the middle of loading; heads cut differently, which no shape shows; a change of dropout
    that stops a run."""
    for changes, text in (
        ({"n_embd": 12, "n_layer": 1}, r"another model: n_layer 2 there, 1 here; n_embd 10 there, 12 here\. "),
        ({"n_head": 1}, r"n_head 2 there, 1 here"),
        ({"window": 4}, r"window None there, 4 here"),
    ):
        run = Run(config=CONFIG.with_(**changes), seed=1)
        before = run.full()
        with pytest.raises(CheckpointError, match=text):
            load(single, run.module, run.optimizer)
        assert same(run.full(), before)
    run = Run(config=CONFIG.with_(dropout=0.5, attention_backend="reference"), seed=1)
    load(single, run.module, run.optimizer)


def test_another_precision_is_refused(single: Path) -> None:
    """Bug: float32 weights rounded to bfloat16 on the way in, so that the resumed run is another one."""
    run = Run(seed=1)
    run.module.bfloat16()
    with pytest.raises(CheckpointError, match=r"torch\.float32 \(97, 10\) there, torch\.bfloat16 \(97, 10\) here"):
        load(single, run.module)


def test_a_checkpoint_of_a_newer_config_is_refused(single: Path, tmp_path: Path) -> None:
    """Bug: a field that this version does not know is dropped, and the model computes something else."""
    path = tmp_path / "step-00000001"
    shutil.copytree(single, path)
    state = json.loads((path / "state.json").read_text())
    del state["digest"]
    state["meta"]["model"]["n_expert"] = 8
    checkpoint_io.write_state(path, state)
    with pytest.raises(
        CheckpointError, match=r"names no model that this version can build: GPTConfig has no field n_exp"
    ):
        load_model(path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched-by-a-pickle"),)


def with_metadata(source: Path, target: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of a sharded checkpoint with another .metadata, for which its state.json vouches."""
    shutil.copytree(source, target)
    metadata = pickle.loads((target / ".metadata").read_bytes())
    (target / ".metadata").write_bytes(change(metadata))
    finish(target)
    return target


def as_bytes_entry(metadata: Any) -> bytes:
    metadata.state_dict_metadata["model.wte.weight"] = BytesStorageMetadata()
    return pickle.dumps(metadata)


def as_if_harmless(metadata: Any) -> bytes:
    # An entry that torch would unpickle without a limit, told by a name that the unpickler does allow.
    metadata.state_dict_metadata["model.wte.weight"] = metadata.storage_meta
    return pickle.dumps(metadata)


def with_file_outside(metadata: Any) -> bytes:
    for info in metadata.storage_data.values():
        info.relative_path = "../../secret"
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda metadata: pickle.dumps(Evil()), r"it asks for (pathlib|builtins)\."),
        (lambda metadata: pickle.dumps([metadata, eval]), r"it asks for builtins\.eval"),
        (lambda metadata: b"cos\nsystem\n(S'touch touched-by-a-pickle'\ntR.", r"it asks for os\.system"),
        (lambda metadata: b"\x80\x04\x95", r"is damaged, or not from here"),
        (lambda metadata: pickle.dumps(metadata)[:-20], r"is damaged, or not from here"),
        (lambda metadata: b"", r"is damaged, or not from here"),
        (lambda metadata: pickle.dumps(7), r"is damaged, or not from here"),
        (as_bytes_entry, r"BytesStorageMetadata"),
        (as_if_harmless, r"asks for more than tensors in its folder"),
        (with_file_outside, r"asks for more than tensors in its folder"),
    ],
)
def test_a_metadata_file_can_run_no_code(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], bytes], text: str
) -> None:
    """Bugs: torch reads .metadata as a pickle without a limit, and entries that are no tensors too: opening a
    checkpoint from somebody else would run their code. A truncated one: an error from deep inside pickle."""
    monkeypatch.chdir(tmp_path)
    path = with_metadata(sharded, tmp_path / "step-00000001", change)
    run = Run(seed=1)
    for refuse in (lambda: load(path, run.module, run.optimizer), lambda: load_model(path)):
        with pytest.raises(CheckpointError, match=text):
            refuse()
    assert not Path("touched-by-a-pickle").exists()


class ByAttribute:
    """Pickled as getattr(kind, name)."""

    def __init__(self, kind: Any, name: str) -> None:
        self.parts = kind, name

    def __reduce__(self) -> Any:
        return getattr, self.parts


def test_members_of_the_memory_format_may_be_written_as_attributes() -> None:
    """Bug: Python 3.11.2 pickles an enum's member by getattr, and every sharded checkpoint was refused there."""
    written = pickle.dumps(ByAttribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"))
    assert Records(io.BytesIO(written)).load() is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


@pytest.mark.parametrize(("kind", "name"), [(_MEM_FORMAT_ENCODING, "__subclasses__"), (torch.Size, "__init__")])
def test_no_other_attribute_is_given(kind: Any, name: str) -> None:
    """getattr itself, let through for that, would reach every function there is."""
    with pytest.raises((KeyError, pickle.UnpicklingError)):
        Records(io.BytesIO(pickle.dumps(ByAttribute(kind, name)))).load()


def test_a_sharded_checkpoint_needs_no_processes(sharded: Path) -> None:
    """Bug: the refusals above pass because nothing of kind "sharded" can be loaded."""
    wanted = Run()
    wanted.step()
    run = Run(seed=1)
    load(sharded, run.module, run.optimizer)
    assert same(run.full(), wanted.full())


def test_the_newest_whole_checkpoint_is_found_past_broken_ones(single: Path, tmp_path: Path) -> None:
    """Bugs: a run that can't go on as its last save was cut short; one that goes back silently; a folder that is no
    checkpoint taken for one."""
    for step in range(1, 6):
        shutil.copytree(single, tmp_path / f"step-{step:08d}")
    shutil.copytree(single, tmp_path / "tmp-step-00000009")
    shutil.copytree(single, tmp_path / "step-7")
    (tmp_path / "step-00000005" / "state.json").unlink()
    (tmp_path / "step-00000004" / "model.safetensors").unlink()
    truncate("optimizer.safetensors")(tmp_path / "step-00000003")
    with pytest.warns(UserWarning, match=r"skipped: .*step-0000000") as warned:
        assert newest(tmp_path) == tmp_path / "step-00000002"
    assert [str(w.message).split("step-")[1][:8] for w in warned] == ["00000005", "00000004", "00000003"]
    shutil.rmtree(tmp_path / "tmp-step-00000009")
    with pytest.warns(UserWarning, match="skipped"):
        assert Checkpoints(tmp_path).newest() == tmp_path / "step-00000002"


def test_both_kinds_know_the_same_dtypes() -> None:
    """Bug: a model of a dtype that one kind of checkpoint can hold and the other refuses."""
    assert {getattr(torch, name) for name in checkpoint_io.RECORDS["torch"] - {"Size"}} == set(
        checkpoint_io.DTYPES.values()
    )
