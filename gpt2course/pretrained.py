"""GPT-2 checkpoints in the Hugging Face layout, in and out. safetensors and JSON only: neither can run code."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt2course import hub
from gpt2course.config import PRESETS, GPTConfig
from gpt2course.hf_format import (
    HEAD,
    MAPPING,
    PREFIX,
    check_keys,
    config_from_hf,
    config_from_shapes,
    config_to_hf,
    expand,
)
from gpt2course.hub import CONFIG, PUBLISHED, WEIGHTS, CheckpointError, CorruptFileError
from gpt2course.model import GPT

__all__ = ["MAPPING", "CheckpointError", "course_checkpoint", "load_checkpoint", "open_model", "save_pretrained"]

COURSE = Path(__file__).parent / "assets" / "course"
# Fields that leave every tensor as it is; another n_head only cuts the same width into other heads.
CHANGEABLE = ("n_head", "dropout", "attention_backend", "window", "window_pattern", "sinks", "layer_norm_eps")


def locate(source: str | Path) -> tuple[Path | None, Path]:
    """The config.json (None if there is none) and the weights of what `load_checkpoint` takes, fetched where needed."""
    name = str(source)
    if name == "course":
        source = course_checkpoint()
    elif name in PUBLISHED:
        return hub.fetch(name)
    path = Path(source)
    if not name:  # Path("") is the current folder, which an empty name does not ask for
        raise FileNotFoundError(f"the checkpoint's name is empty; give {', '.join(PUBLISHED)}, course, or a path")
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is not a .safetensors file; pickles (.bin, .pt) can run code and are refused"
            )
        config = path.parent / CONFIG
        return (config if config.is_file() else None), path
    if isinstance(source, str) and hub.looks_like_repo(name):
        return hub.fetch(name)
    raise FileNotFoundError(
        f"{name} is no file or folder here; give one, or course, {', '.join(PUBLISHED)}, or a repository's owner/name"
    )


def _in_folder(folder: Path) -> tuple[Path, Path]:
    weights, config = folder / WEIGHTS, folder / CONFIG
    if not weights.is_file():
        if (folder / f"{WEIGHTS}.index.json").is_file():
            raise CheckpointError(f"{folder} is split into shards; save it again as one {WEIGHTS} (max_shard_size)")
        if (folder / "pytorch_model.bin").is_file():
            raise CheckpointError(
                f"{folder} has pytorch_model.bin only; a pickle can run any code when it is opened, so it is refused. "
                f"Load it where you trust it and save it as {WEIGHTS}"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}")
    if not config.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; to load the bare weights, name the file {weights}")
    return config, weights


def read_config(path: Path) -> GPTConfig:
    """Our config of a config.json on disk."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is not JSON ({error}); fetch or save it again") from error
    if not isinstance(values, dict):
        raise CorruptFileError(f"{path} holds no JSON object; fetch or save it again")
    return config_from_hf(values)


def check_device(device: torch.device | str) -> None:
    """Raise ValueError unless torch can compute there; before a download, not after it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA fails in an assert
        why = str(error).splitlines()[0]
        raise ValueError(f"device {device} can't be used here ({why}); use cpu, or ask `gpt2course doctor`") from error


def load_checkpoint(
    source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **changes: Any
) -> GPT:
    """The model of a checkpoint, in eval mode.

    Args:
        source: gpt2, gpt2-medium, gpt2-large or gpt2-xl, each pinned to one commit; owner/name of any GPT-2 repository;
            "course"; a folder with config.json and model.safetensors; or a .safetensors file, with config.json beside
            it or not. What comes from the hub is hashed on every load: gpt2 and gpt2-xl against SHA-256 sums kept in
            `hub.PUBLISHED`, all others against the sum that the hub stated when the file was fetched. A folder or a
            file of yours is not hashed; its tensors must be exactly those of its config.
        device, dtype: where the weights go and as what.
        changes: config fields that leave the weights as they are: n_head, dropout, attention_backend, window,
            window_pattern, sinks, layer_norm_eps.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        HubUnreachableError: if the weights are not cached and the network can't give them.
        CheckpointError: if it is not a GPT-2, or its tensors are not exactly those of its config.
        ValueError: for a device that is not there, or a change that is not one of these.
    """
    check_device(device)
    if wrong := sorted(changes.keys() - set(CHANGEABLE)):
        raise ValueError(f"{', '.join(wrong)} can't be changed while loading; only {', '.join(CHANGEABLE)} can")
    config_path, weights = locate(source)
    try:
        with safe_open(weights, framework="pt") as file:
            keys = list(file.keys())
            names = {key.removeprefix(PREFIX): key for key in keys}
            if len(names) < len(keys):
                raise CheckpointError(f"{weights} holds some tensors twice, with and without the prefix {PREFIX}")
            shapes = {name: tuple(file.get_slice(key).get_shape()) for name, key in names.items()}
            if config_path is None:
                config = config_from_shapes(shapes, changes.get("n_head"))
            else:
                config = read_config(config_path)
            if str(source) in PUBLISHED and config != PRESETS[str(source)]:
                raise CheckpointError(f"{config_path} is not the config of {source}; delete it and load again")
            return _build(config.with_(**changes), shapes, lambda name: file.get_tensor(names[name]), device, dtype)
    except SafetensorError as error:
        raise CorruptFileError(f"{weights} can't be read as safetensors ({error}); fetch or save it again") from error


def _build(
    config: GPTConfig,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
) -> GPT:
    """A model whose tensors are read one at a time into a skeleton that has no memory of its own."""
    with torch.device("meta"):
        model = GPT(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rows = [row for row in expand(config.n_layer) if row.ours in wanted]
    check_keys(rows, wanted, shapes)
    state = {}
    for row in rows:
        tensor = read(row.theirs)
        # Copied, so that the model never lives in the mapped file, which somebody may write over.
        state[row.ours] = torch.empty(wanted[row.ours], device=device, dtype=dtype)
        state[row.ours].copy_(tensor.t() if row.transpose else tensor)
    if HEAD in shapes and not torch.equal(read(HEAD).to(device, dtype), state["wte.weight"]):
        raise CheckpointError(f"untied head: {HEAD} differs from wte.weight, but GPT-2 has one tensor for both")
    state[HEAD] = state["wte.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    assert model.lm_head.weight is model.wte.weight
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model.eval()


def save_pretrained(model: GPT, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained`, and `load_checkpoint`, can load.

    Both files are written beside and renamed. Over an older checkpoint the old config.json goes first and the new one
    comes last, so a folder with a config never holds another model's weights. Other files in the folder stay.

    Args:
        model: a plain GPT-2: all heads, no window, with biases.
        folder: made if it is not there.
        dtype: precision on disk; by default that of the model.

    Raises:
        CheckpointError: if the model can't be said in the GPT-2 format.
    """
    folder = Path(folder)
    dtype = dtype or model.wte.weight.dtype
    settings = config_to_hf(model.config, dtype)
    parameters = dict(model.named_parameters())
    state = {}
    for row in expand(model.config.n_layer):
        tensor = parameters[row.ours].detach()
        state[PREFIX + row.theirs] = (tensor.t() if row.transpose else tensor).to("cpu", dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as beside:
        new_weights, new_config = Path(beside) / WEIGHTS, Path(beside) / CONFIG
        save_file(state, new_weights, metadata={"format": "pt"})
        new_config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        # safetensors makes files that only their owner may read; the weights are as open as any other file of ours.
        new_weights.chmod(new_config.stat().st_mode)
        for path in (new_weights, new_config):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        (folder / CONFIG).unlink(missing_ok=True)
        new_weights.replace(folder / WEIGHTS)
        new_config.replace(folder / CONFIG)
    return folder


def course_checkpoint() -> Path:
    """The folder of the small checkpoint that comes with the course.

    Raises:
        FileNotFoundError: if the package was installed without it.
    """
    if not (COURSE / WEIGHTS).is_file():
        raise FileNotFoundError(f"{COURSE} has no {WEIGHTS}; install gpt2course again")
    return COURSE


def open_model(checkpoint: str | Path = "auto", device: torch.device | str = "cpu") -> tuple[GPT, str]:
    """The model a chapter works with, in eval mode, and one sentence that says which it is.

    Args:
        checkpoint: "auto" is the published GPT-2 if it lies in the local cache, else the course checkpoint, and never
            a download. Or anything that `load_checkpoint` takes, which may download.
        device: where the weights go.
    """
    if checkpoint == "auto":
        checkpoint = "gpt2" if hub.is_cached("gpt2") else "course"
    model = load_checkpoint(checkpoint, device=device)
    size = f"{model.num_params():,} parameters"
    if checkpoint == "course":
        return model, f"The course checkpoint: a small GPT-2 trained on Python's standard library, {size}."
    if str(checkpoint) in PUBLISHED:
        return model, f"The published {checkpoint} checkpoint, {size}."
    return model, f"The checkpoint {checkpoint}, {size}."
