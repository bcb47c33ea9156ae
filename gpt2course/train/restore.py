"""A run's tensors by name, and bringing a model and its optimizer back to them, checked first. Used by `checkpoint`."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gpt2course.config import GPTConfig
from gpt2course.hub import CheckpointError
from gpt2course.model import GPT
from gpt2course.pretrained import save_pretrained
from gpt2course.train import checkpoint_io as io
from gpt2course.train.world import World

# Fields of GPTConfig that change no weight and not what the weights mean.
FREE = ("dropout", "attention_backend")
WRAPPERS = re.compile(r"\b(_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
AVERAGES = ("exp_avg", "exp_avg_sq")
NAME = re.compile(r"step-(\d{8,})")
FAILURES = (Exception, dcp.CheckpointException)  # the latter is no Exception
ALONE = World()
T = TypeVar("T")


# The tensors of a run


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by the name it has in a bare GPT."""
    assert not list(module.named_buffers()), "buffers are not saved, and a GPT has none"
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # after an evaluation the root group still holds whole, plain parameters
    return {WRAPPERS.sub("", name): parameter for name, parameter in module.named_parameters()}


def _bare(module: nn.Module) -> nn.Module:
    """What a wrapper wraps: DistributedDataParallel, torch.compile."""
    for attribute in ("module", "_orig_mod"):
        module = getattr(module, attribute, module)
    return module


def _trained(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, nn.Parameter]:
    if optimizer is None:
        return {}
    ids = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    found = {name: p for name, p in _parameters(module).items() if id(p) in ids}
    assert len(found) == len(ids), "the optimizer trains parameters that are not the module's"
    return found


def adam_step(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """How many steps AdamW has taken, 0 before the first.

    Raises:
        ValueError: for another optimizer, or if it has stepped some parameters more often than others.
    """
    steps = set()
    for parameter in _trained(module, optimizer).values():
        state = optimizer.state.get(parameter, {})
        if state and set(state) != {"step", *AVERAGES}:
            raise ValueError(f"only AdamW's state can be saved (step, exp_avg, exp_avg_sq), not {sorted(state)}")
        steps.add(int(state["step"]) if state else 0)
    if len(steps) > 1:
        raise ValueError(
            f"AdamW has taken {min(steps)} to {max(steps)} steps, by parameter; a checkpoint has one number for all"
        )
    return steps.pop()


def tensors(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Everything of a run that is a tensor, by name, sharing memory with it.

    Args:
        module: a GPT, wrapped or sharded; the tied head is there once, as `model.wte.weight`.
        optimizer: its AdamW; one that has taken no step has no tensors.

    Returns:
        `model.<parameter>` for each parameter, `optimizer.<parameter>.exp_avg` and `.exp_avg_sq` for each trained
        one. Under FSDP they are DTensors.
    """
    found = {f"model.{name}": parameter.detach() for name, parameter in _parameters(module).items()}
    if optimizer is not None and adam_step(module, optimizer):
        for name, parameter in _trained(module, optimizer).items():
            found |= {f"optimizer.{name}.{key}": optimizer.state[parameter][key] for key in AVERAGES}
    return found


def _give_state(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make AdamW's state where it is missing, as its first step would, and set its count; step 0 takes it away."""
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for parameter in (p for p in group["params"] if p.requires_grad):
            if not step:
                optimizer.state.pop(parameter, None)
                continue
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
                state |= {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in AVERAGES}
            state["step"].fill_(step)


# Finding


def complete(folder: Path) -> Iterator[tuple[int, Path, dict[str, Any]]]:
    """Step, path and state.json of every checkpoint that is there whole, the highest step first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    for step, path in sorted(found, reverse=True):
        try:
            state = io.read_state(path)
            io.check_sizes(path, state)
        except CheckpointError as error:
            warnings.warn(f"skipped: {error}", stacklevel=3)
            continue
        yield step, path, state


def newest(folder: str | Path) -> Path | None:
    """The complete checkpoint with the highest step in a folder, or None. Skips others with a warning.

    It looks at names and sizes only; `load` reads every byte before it uses one.
    """
    return next((path for _, path, _ in complete(Path(folder))), None)


def best(folder: str | Path) -> Path | None:
    """The complete checkpoint with the lowest validation loss, the earliest of equals; None if none has one."""
    return lowest(complete(Path(folder)))


def lowest(found: Iterable[tuple[int, Path, dict[str, Any]]]) -> Path | None:
    """`best` of what `complete` found."""
    losses = [(loss, step, path) for step, path, state in found if (loss := state["meta"]["val_loss"]) is not None]
    return min(losses)[2] if losses else None


# Loading


def together(world: World, what: Callable[[], T], context: str = "") -> T:
    """Do something on all processes; if it fails on one, raise the same CheckpointError on each."""
    result, failure, problem = None, None, None
    try:
        result = what()
    except FAILURES as error:
        failure = error
        problem = str(error) if isinstance(error, CheckpointError) else f"{context}: {io.reason(error)}"
    problems = [found for found in world.gather(problem) if found]
    if problems:
        raise CheckpointError(problems[0]) from failure
    return result  # type: ignore[return-value]


def _saved_config(path: Path, meta: dict[str, Any]) -> GPTConfig:
    try:
        return GPTConfig.from_dict(meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} names no model that this version can build: {io.reason(error)}") from error


def _check_model(path: Path, meta: dict[str, Any], module: nn.Module) -> None:
    model = _bare(module)
    if not isinstance(model, GPT):
        return
    saved = _saved_config(path, meta)
    differences = [
        f"{f.name} {getattr(saved, f.name)!r} there, {getattr(model.config, f.name)!r} here"
        for f in fields(GPTConfig)
        if f.name not in FREE and getattr(saved, f.name) != getattr(model.config, f.name)
    ]
    if differences:
        raise CheckpointError(
            f"{path} is of another model: {'; '.join(differences)}. Train that model, or start in another folder"
        )


def _check_entries(path: Path, found: io.Entries, wanted: io.Entries) -> None:
    problems = [
        f"only {where}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for where, names in (
            ("in the checkpoint", sorted(found.keys() - wanted.keys())),
            ("in the run", sorted(wanted.keys() - found.keys())),
        )
        if names
    ]
    problems += [
        f"{name} is {found[name][1]} {found[name][0]} there, {wanted[name][1]} {wanted[name][0]} here"
        for name in sorted(found.keys() & wanted.keys())
        if found[name] != wanted[name]
    ]
    if problems:
        raise CheckpointError(f"{path} has other tensors than this run: {'; '.join(problems)}")


def _wanted(module: nn.Module, optimizer: torch.optim.Optimizer | None, step: int) -> io.Entries:
    wanted = {f"model.{name}": (tuple(p.shape), p.dtype) for name, p in _parameters(module).items()}
    for name, p in _trained(module, optimizer).items() if step else ():
        wanted |= {f"optimizer.{name}.{key}": (tuple(p.shape), p.dtype) for key in AVERAGES}
    return wanted


def load(
    path: str | Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None, world: World = ALONE
) -> dict[str, Any]:
    """Bring a model and its optimizer to the state of a checkpoint, in place. All processes call it together.

    Everything is checked first, every byte against its SHA-256; what is refused leaves the model as it was. Any
    checkpoint goes into any strategy and any number of processes: each takes the parts that it holds.

    Args:
        path: folder of one checkpoint.
        module: the model, already sharded or wrapped; dropout and attention_backend may differ from those saved.
        optimizer: its AdamW; None loads the weights alone.
        world: the processes that load.

    Returns:
        what was given to `save` as meta, with `val_loss` (None if there was none).

    Raises:
        CheckpointError: on every process, naming path, reason and mend: a folder that was not finished, is damaged, of
            another format, version or model.
    """
    path = Path(path)
    state = _checked(path, world)
    _fill(path, state, module, optimizer, world)
    return dict(state["meta"])


def _checked(path: Path, world: World) -> dict[str, Any]:
    """The state.json of a checkpoint, all of whose files are there with the bytes they were written with."""

    def check() -> dict[str, Any]:
        state = io.read_state(path)
        io.check_sizes(path, state)
        io.check_sums(path, state, sorted(state["files"])[world.rank :: world.world_size])
        return state

    return together(world, check, f"could not read {path}")


def _fill(
    path: Path, state: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer | None, world: World
) -> None:
    def compare() -> None:
        _check_model(path, state["meta"], module)
        found = io.stored(path, state)
        if optimizer is None:
            found = {name: entry for name, entry in found.items() if name.startswith("model.")}
        _check_entries(path, found, _wanted(module, optimizer, state["adam_step"]))

    together(world, compare, f"could not read {path}")
    if optimizer is not None:
        _give_state(optimizer, state["adam_step"])
    targets = tensors(module, optimizer)
    together(world, lambda: io.read_into(path, state, targets), f"could not read {path}, the model is half loaded")
    model = _bare(module)
    assert not isinstance(model, GPT) or model.lm_head.weight is model.wte.weight


def load_model(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """The model of any checkpoint, in eval mode, by this process alone. Raises CheckpointError as `load` does."""
    path = Path(path)
    state = _checked(path, ALONE)
    dtype = io.stored(path, state)["model.wte.weight"][1]
    model = GPT(_saved_config(path, state["meta"])).to(device, dtype)
    _fill(path, state, model, None, ALONE)
    return model.eval()


def export(path: str | Path, out: str | Path) -> Path:
    """Write the model of a checkpoint as a Hugging Face folder; see `gpt2course.pretrained.save_pretrained`."""
    return save_pretrained(load_model(path), out)
