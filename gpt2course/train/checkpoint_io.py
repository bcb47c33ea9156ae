"""What lies in a checkpoint's folder, written and read. Knows nothing of models, optimizers or when to save.

    state.json                                  written last: a folder without it was not finished
    model.safetensors, optimizer.safetensors    kind "single": whole tensors
    .metadata, __0_0.distcp, __1_0.distcp, …    kind "sharded": torch.distributed.checkpoint, one file a process

Nothing in it can run code. safetensors and JSON hold data only, the .distcp files are read with `weights_only=True`,
and .metadata, which is a pickle, by an unpickler that makes the plain records of a checkpoint and nothing else.
"""

import hashlib
import json
import os
import pathlib
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gpt2course.hub import CheckpointError, file_sha256

FORMAT, VERSION = "gpt2course-training", 1
STATE = "state.json"
MEND = "move it away, and the run goes on from the one before"
METADATA = ".metadata"
KINDS = ("single", "sharded")
GROUPS = ("model", "optimizer")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# All that the .metadata of tensors consists of. Paths come back as text-like ones that can't touch a disk.
RECORDS = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
Entries = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""shape and dtype of each tensor by name"""


def _memory_format(kind: Any, name: str) -> Any:
    """In the place of getattr, by which some versions of Python (3.11.2 is one) pickle a member of an enum."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it asks for an attribute of {kind!r}, which no checkpoint of tensors needs")
    return _MEM_FORMAT_ENCODING[name]


class Records(pickle.Unpickler):
    """Reads a .metadata; a name that is not in `RECORDS` ends the reading before anything of it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if module in ("pathlib", "pathlib._local") and name in PATHS:
            return pathlib.PurePosixPath
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of tensors needs")


class CheckedReader(dcp.FileSystemReader):
    """torch's reader of a folder, given a .metadata that was read by `Records`, so that it never unpickles one."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._checked = read_metadata(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checked


def read_metadata(path: Path) -> Metadata:
    """The .metadata of a sharded checkpoint, which may name tensors only, in files of this folder.

    Raises:
        CheckpointError: if it can't be read, or asks for anything else.
    """
    try:
        with (path / METADATA).open("rb") as file:
            metadata = Records(file).load()
        entries = metadata.state_dict_metadata.values()
        files = {info.relative_path for info in metadata.storage_data.values()}
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path / METADATA} is damaged, or not from here: {_first_line(error)}") from error
    # Other entries than tensors are unpickled by torch without a limit.
    if not all(isinstance(entry, TensorStorageMetadata) for entry in entries) or any(map(_outside, files)):
        raise CheckpointError(f"{path / METADATA} asks for more than tensors in its folder; it is not from here")
    return metadata


def _outside(name: Any) -> bool:
    return not isinstance(name, str) or Path(name).name != name


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def reason(error: BaseException) -> str:
    """Why a save or a load failed, in one line."""
    if isinstance(error, dcp.CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"process {rank}: {reason(cause)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _first_line(error)


# Writing


def sync(path: Path) -> None:
    """Have the disk take what was written to a file, or a folder's list of names, before anything is built on it."""
    if path.is_dir() and os.name == "nt":
        return  # Windows can't, and needn't
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file that is now on the disk."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def kind_of(tensors: dict[str, Tensor]) -> str:
    """How these tensors are stored: "sharded" where a process has only its part of them, else "single"."""
    return "sharded" if any(isinstance(tensor, DTensor) for tensor in tensors.values()) else "single"


def write_single(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Whole tensors into one safetensors file for the model and one for the optimizer, if it has any."""
    for group in GROUPS:
        mine = {name: t.cpu().contiguous() for name, t in tensors.items() if name.startswith(f"{group}.")}
        if mine:
            path = folder / f"{group}.safetensors"
            save_file(mine, path)
            path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner may read


def write_sharded(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Each process its shards, all at once; returns, or raises on every process, when all have."""
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), process_group=group)


def seal_mine(folder: Path, kind: str, rank: int) -> dict[str, Any]:
    """Size and SHA-256 of the files that this process wrote."""
    if kind == "single":
        names = [f"{group}.safetensors" for group in GROUPS] if rank == 0 else []
    else:
        names = [path.name for path in folder.glob(f"__{rank}_*.distcp")] + [METADATA] * (rank == 0)
    return {name: seal(folder / name) for name in sorted(names) if (folder / name).exists()}


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """state.json, the last file of a checkpoint, with a digest of itself."""
    state = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **state}))  # as it will be read again
    path = folder / STATE
    path.write_text(json.dumps({**state, "digest": _digest(state)}, indent=1) + "\n", encoding="utf-8")
    sync(path)
    sync(folder)


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# Reading


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint.

    Raises:
        CheckpointError: if there is none, which says what the folder is instead, or if it is not a whole one of ours.
    """
    file = path / STATE
    if not path.is_dir():
        found = "is a file" if path.exists() else "is not there"
        raise CheckpointError(f"{path} {found}; give the folder of a checkpoint, such as checkpoints/step-00000020")
    if not file.is_file():
        if (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} is a Hugging Face folder, which has weights and no state of a training run; "
                "load it with gpt2course.pretrained.load_checkpoint"
            )
        raise CheckpointError(f"{path} was not finished: it has no {STATE}; {MEND}")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        named, version = state.get("format"), state.get("version")
    except (ValueError, AttributeError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({_first_line(error)}); {MEND}") from error
    if named != FORMAT:
        raise CheckpointError(f"{file} has the format {named!r}, not {FORMAT!r}: another program wrote {path}")
    if version != VERSION:
        raise CheckpointError(
            f"{path} has version {version!r} of the format, and this program reads {VERSION}; "
            "load it with the version of gpt2course that wrote it"
        )
    if _digest({key: value for key, value in state.items() if key != "digest"}) != state.get("digest"):
        raise CheckpointError(f"{file} is damaged, or was changed by hand: its digest is of another text; {MEND}")
    return state


def check_sizes(path: Path, state: dict[str, Any]) -> None:
    """Raise CheckpointError unless every file of the checkpoint is there, as long as it was."""
    for name, entry in state["files"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing; {MEND}")
        if (found := (path / name).stat().st_size) != entry["bytes"]:
            raise CheckpointError(f"{path} is damaged: {name} has {found:,} bytes, not {entry['bytes']:,}; {MEND}")


def check_sums(path: Path, state: dict[str, Any], names: Iterable[str]) -> None:
    """Raise CheckpointError unless these files have the SHA-256 they were written with."""
    for name in names:
        if file_sha256(path / name) != state["files"][name]["sha256"]:
            raise CheckpointError(f"{path} is damaged: {name} has another SHA-256 than when it was written; {MEND}")


def stored(path: Path, state: dict[str, Any]) -> Entries:
    """Shape and dtype of every tensor in a checkpoint, read from the files' headers."""
    if state["kind"] == "sharded":
        entries = read_metadata(path).state_dict_metadata.items()
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in entries
            if isinstance(entry, TensorStorageMetadata)
        }
    found: Entries = {}
    try:
        for name in state["files"]:
            with safe_open(path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a handle, not a dict
                    piece = file.get_slice(key)
                    found[key] = tuple(piece.get_shape()), DTYPES[piece.get_dtype()]
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path / name} can't be read as safetensors ({_first_line(error)})") from error
    return found


@torch.no_grad()
def read_into(path: Path, state: dict[str, Any], targets: dict[str, Tensor]) -> None:
    """Fill the targets, whole tensors or this process's shards, in place. Each process reads for itself.

    Args:
        path, state: of a checkpoint that was checked.
        targets: by name; of those of a DTensor only the local part is read.
    """
    if state["kind"] == "sharded":
        with warnings.catch_warnings():  # it warns of what no_dist asks for
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(dict(targets), storage_reader=CheckedReader(path), no_dist=True)
        return
    for group in GROUPS:
        mine = {name: target for name, target in targets.items() if name.startswith(f"{group}.")}
        if not mine:
            continue
        with safe_open(path / f"{group}.safetensors", framework="pt") as file:
            for name, target in mine.items():
                if not isinstance(target, DTensor):
                    target.copy_(file.get_tensor(name))
                elif (local := target.to_local()).numel():
                    shape, offset = compute_local_shape_and_global_offset(
                        target.shape, target.device_mesh, target.placements
                    )
                    rows = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
                    local.copy_(file.get_slice(name)[rows])
