"""Random GPT-2 models of the transformers library, small, to compare with: the same numbers by somebody else's code."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2course import GPT
from gpt2course.hf_format import expand

HEAD_WIDTH = 4
SCALED_SIZES = {"gpt2": (2, 12), "gpt2-medium": (3, 16), "gpt2-large": (3, 20), "gpt2-xl": (4, 25)}
"""layers and heads; the heads are those of the published size, the rest is small"""


def random_peer(
    n_layer: int = 2,
    n_head: int = 4,
    n_embd: int = 16,
    block_size: int = 24,
    vocab_size: int = 97,
    seed: int = 0,
    std: float = 0.2,
    **settings: Any,
) -> GPT2LMHeadModel:
    """A transformers GPT-2 in eval mode whose every parameter is random, biases and layer norms too.

    The default start of GPT-2 (0.02, zero biases) would leave attention nearly uniform, and forgive wrong heads.
    """
    eot = min(vocab_size - 1, 50256)
    config = GPT2Config(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=block_size,
        vocab_size=vocab_size,
        bos_token_id=eot,
        eos_token_id=eot,
        **settings,
    )
    peer = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, std, generator=generator)
    return peer


def scaled_peer(name: str, seed: int = 0) -> GPT2LMHeadModel:
    """A random model with the published size's number of heads, and few, narrow layers."""
    n_layer, n_head = SCALED_SIZES[name]
    return random_peer(n_layer, n_head, n_head * HEAD_WIDTH, seed=seed)


def tensors_of(peer: GPT2LMHeadModel, prefix: str = "") -> dict[str, Tensor]:
    """The peer's tensors as a checkpoint holds them: named as published, or with the prefix `transformer.`; no head."""
    return {prefix + name: p.detach().clone() for name, p in peer.transformer.named_parameters()}


def write_folder(
    folder: Path, peer: GPT2LMHeadModel, tensors: dict[str, Tensor] | None = None, **settings: Any
) -> Path:
    """Write a checkpoint folder by hand: the peer's tensors or others, its config.json with some settings changed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(peer.config.to_json_string(use_diff=False)) | settings
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(peer) if tensors is None else tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def token_ids(peer: GPT2LMHeadModel, rows: int = 2, length: int | None = None, seed: int = 1) -> Tensor:
    """Random token ids (rows, length); as long as the position table by default."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, length or peer.config.n_positions)
    return torch.randint(peer.config.vocab_size, shape, generator=generator)


@torch.no_grad()
def logit_error(ours: GPT, peer: GPT2LMHeadModel, idx_BT: Tensor) -> float:
    """Largest absolute difference of any logit."""
    return float((ours(idx_BT) - peer(idx_BT).logits).abs().max())


def gradient_errors(ours: GPT, peer: GPT2LMHeadModel, idx_BT: Tensor, targets_BT: Tensor) -> dict[str, float]:
    """Largest absolute difference of the gradient of each tensor, by our name, the transposed ones turned back."""
    ours.zero_grad()
    ours(idx_BT, targets_BT).backward()
    peer.zero_grad()
    F.cross_entropy(peer(idx_BT).logits.flatten(0, 1), targets_BT.flatten()).backward()
    our_grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    their_grads = {name: parameter.grad for name, parameter in peer.transformer.named_parameters()}
    errors = {}
    for row in expand(ours.config.n_layer):
        theirs = their_grads.pop(row.theirs)
        theirs = theirs.t() if row.transpose else theirs
        errors[row.ours] = float((our_grads.pop(row.ours) - theirs).abs().max())
    assert not our_grads, f"our gradients that no row of the table names: {sorted(our_grads)}"
    assert not their_grads, f"their gradients that no row of the table names: {sorted(their_grads)}"
    return errors
