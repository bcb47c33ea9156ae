"""What a GPT-2 checkpoint in the Hugging Face layout looks like: names, transposes, config.json. Opens no files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpt2course.config import PRESETS, GPTConfig
from gpt2course.hub import CONFIG, PUBLISHED, CheckpointError
from gpt2course.tokenizer import EOT

PREFIX = "transformer."
HEAD = "lm_head.weight"
IGNORED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


@dataclass(frozen=True)
class Row:
    """One line of the mapping table; `{i}` stands for the number of the block."""

    ours: str
    theirs: str
    transpose: bool = False


# GPT-2 was written with Conv1D, which stores (in, out); nn.Linear stores (out, in). attn.c_proj is square: there a
# missed transpose fits without any error, and only the logits show it.
MAPPING: tuple[Row, ...] = (
    Row("wte.weight", "wte.weight"),
    Row("wpe.weight", "wpe.weight"),
    Row("h.{i}.ln_1.weight", "h.{i}.ln_1.weight"),
    Row("h.{i}.ln_1.bias", "h.{i}.ln_1.bias"),
    Row("h.{i}.attn.c_attn.weight", "h.{i}.attn.c_attn.weight", transpose=True),
    Row("h.{i}.attn.c_attn.bias", "h.{i}.attn.c_attn.bias"),
    Row("h.{i}.attn.c_proj.weight", "h.{i}.attn.c_proj.weight", transpose=True),
    Row("h.{i}.attn.c_proj.bias", "h.{i}.attn.c_proj.bias"),
    Row("h.{i}.ln_2.weight", "h.{i}.ln_2.weight"),
    Row("h.{i}.ln_2.bias", "h.{i}.ln_2.bias"),
    Row("h.{i}.mlp.c_fc.weight", "h.{i}.mlp.c_fc.weight", transpose=True),
    Row("h.{i}.mlp.c_fc.bias", "h.{i}.mlp.c_fc.bias"),
    Row("h.{i}.mlp.c_proj.weight", "h.{i}.mlp.c_proj.weight", transpose=True),
    Row("h.{i}.mlp.c_proj.bias", "h.{i}.mlp.c_proj.bias"),
    Row("ln_f.weight", "ln_f.weight"),
    Row("ln_f.bias", "ln_f.bias"),
)


def expand(n_layer: int) -> Iterator[Row]:
    """The mapping table with every block written out, in checkpoint order."""
    for row in MAPPING:
        for i in range(n_layer) if "{i}" in row.ours else (0,):
            yield Row(row.ours.format(i=i), row.theirs.format(i=i), row.transpose)


def config_from_hf(values: dict[str, Any]) -> GPTConfig:
    """Our config of a Hugging Face GPT-2 config.json. Dropout becomes 0, until `load_checkpoint` is told otherwise.

    Raises:
        CheckpointError: naming every setting that is missing, or that asks for a model this package does not compute.
    """
    problems = []
    required = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }
    for key, wanted in required.items():
        if values.get(key, wanted) != wanted:
            problems.append(f"{key} is {values[key]!r}; this package computes GPT-2 with {key} = {wanted!r}")
    names = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "vocab_size": "vocab_size"}
    names["block_size"] = "n_ctx" if "n_ctx" in values and "n_positions" not in values else "n_positions"
    problems += [f"{theirs} is missing" for theirs in names.values() if theirs not in values]
    width = values.get("n_embd")
    if isinstance(width, int) and values.get("n_inner") not in (None, 4 * width):
        problems.append(f"n_inner is {values['n_inner']}; GPT-2's MLP is 4 x n_embd = {4 * width} wide")
    if problems:
        raise CheckpointError(f"{CONFIG} can't be used:\n" + "\n".join(f"  - {problem}" for problem in problems))
    sizes = {ours: values[theirs] for ours, theirs in names.items()}
    try:
        return GPTConfig(**sizes, layer_norm_eps=values.get("layer_norm_epsilon", 1e-5))
    except ValueError as error:
        raise CheckpointError(f"{CONFIG} can't be used: {error}") from error


def config_to_hf(config: GPTConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The config.json with which transformers builds the same model.

    Raises:
        CheckpointError: if the model is not a GPT-2: fewer key/value heads, a window, no biases, other positions.
    """
    plain = {"n_kv_head": config.n_head, "window": None, "bias": True, "pos": "learned"}
    odd = [f"{name} = {getattr(config, name)!r}" for name, want in plain.items() if getattr(config, name) != want]
    if odd:
        raise CheckpointError(
            f"the GPT-2 format has no room for {', '.join(odd)}: transformers would load another model in silence"
        )
    eot = EOT if config.vocab_size > EOT else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def config_from_shapes(shapes: dict[str, tuple[int, ...]], n_head: int | None) -> GPTConfig:
    """The config of a bare weights file, from its shapes (names without prefix).

    The number of heads leaves no trace in the shapes. It is known for the four published sizes, and else asked for.

    Raises:
        CheckpointError: if the embeddings are missing, or n_head is neither given nor that of a published size.
    """
    if not {"wte.weight", "wpe.weight"} <= shapes.keys():
        raise CheckpointError(f"no {CONFIG} beside the file, and no wte.weight and wpe.weight in it: this is no GPT-2")
    (vocab_size, n_embd), block_size = shapes["wte.weight"], shapes["wpe.weight"][0]
    n_layer = len({m[1] for name in shapes if (m := re.match(r"h\.(\d+)\.", name))})
    by_size = {(PRESETS[name].n_layer, PRESETS[name].n_embd): PRESETS[name].n_head for name in PUBLISHED}
    heads = n_head or by_size.get((n_layer, n_embd))
    if heads is None:
        raise CheckpointError(
            f"no {CONFIG} beside the file, and the shapes ({n_layer} layers, width {n_embd}) can't tell the number of "
            "heads; pass n_head=…, since a wrong one loads without error and computes something else"
        )
    return GPTConfig(n_layer=n_layer, n_head=heads, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size)


def check_keys(rows: list[Row], wanted: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError, naming every missing, unexpected and misshapen tensor, unless file and model agree.

    Args:
        rows: the expanded mapping table of the model.
        wanted: shapes of the model's parameters, by our names.
        shapes: shapes in the file, by its names without prefix.
    """
    theirs = {row.theirs: row for row in rows}
    given = {name for name in shapes if not IGNORED.fullmatch(name)} - {HEAD}
    missing, unexpected = sorted(theirs.keys() - given), sorted(given - theirs.keys())
    misshapen = []
    for name in sorted(theirs.keys() & given):
        want = wanted[theirs[name].ours]
        want = want[::-1] if theirs[name].transpose else want
        if shapes[name] != want:
            misshapen.append(f"{name} is {shapes[name]}, the config says {want}")
    lines = [
        f"  {what}: {', '.join(found)}" for what, found in (("missing", missing), ("unexpected", unexpected)) if found
    ]
    lines += [f"  shape: {text}" for text in misshapen]
    if lines:
        raise CheckpointError("the file is not this model:\n" + "\n".join(lines))
