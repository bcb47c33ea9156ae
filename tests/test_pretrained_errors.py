"""Every way to get a checkpoint wrong: refused by name where it can be seen, and failing the parity where it can't."""

import json
from collections.abc import Callable
from pathlib import Path

import peers
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from gpt2course.pretrained import CheckpointError, load_checkpoint

LIMIT = 1e-4


@pytest.fixture(scope="module")
def peer() -> GPT2LMHeadModel:
    return peers.random_peer(n_layer=3)


@pytest.fixture(scope="module")
def folder(peer: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peers.write_folder(tmp_path_factory.mktemp("good"), peer)


Mutation = Callable[[dict[str, Tensor]], None]


def drop_key(tensors: dict[str, Tensor]) -> None:
    del tensors["h.1.ln_2.bias"]


def extra_key(tensors: dict[str, Tensor]) -> None:
    tensors["h.3.ln_1.weight"] = torch.ones(16)


def untied_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["wte.weight"] + 0.01


def linear_layout(tensors: dict[str, Tensor]) -> None:
    tensors["h.0.mlp.c_fc.weight"] = tensors["h.0.mlp.c_fc.weight"].t().contiguous()


def twice(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.wte.weight"] = tensors["wte.weight"] + 1


@pytest.mark.parametrize(
    ("mutate", "named"),
    [
        (drop_key, r"missing: h\.1\.ln_2\.bias"),
        (extra_key, r"unexpected: h\.3\.ln_1\.weight"),
        (untied_head, "untied head"),
        (linear_layout, r"h\.0\.mlp\.c_fc\.weight is \(64, 16\), the config says \(16, 64\)"),
        (twice, "twice, with and without the prefix"),
    ],
)
def test_wrong_tensors_are_refused_by_name(mutate: Mutation, named: str, peer: GPT2LMHeadModel, tmp_path: Path) -> None:
    """A file that is not the model its config says, loaded as far as it goes, the rest left random."""
    tensors = peers.tensors_of(peer)
    mutate(tensors)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(peers.write_folder(tmp_path, peer, tensors))


def test_both_differences_are_listed_in_one_error(peer: GPT2LMHeadModel, tmp_path: Path) -> None:
    """A renamed tensor told as "missing" only, so that the reader never sees the name it really has."""
    tensors = peers.tensors_of(peer)
    tensors["h.0.ln_1.gamma"] = tensors.pop("h.0.ln_1.weight")
    with pytest.raises(CheckpointError, match=r"missing: h\.0\.ln_1\.weight\n  unexpected: h\.0\.ln_1\.gamma"):
        load_checkpoint(peers.write_folder(tmp_path, peer, tensors))


def missed_square_transpose(tensors: dict[str, Tensor]) -> None:
    tensors["h.1.attn.c_proj.weight"] = tensors["h.1.attn.c_proj.weight"].t().contiguous()


def swapped_blocks(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("h.0.")]:
        other = name.replace("h.0.", "h.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


@pytest.mark.parametrize("mutate", [missed_square_transpose, swapped_blocks])
def test_mistakes_that_fit_every_shape_fail_the_parity(mutate: Mutation, peer: GPT2LMHeadModel, tmp_path: Path) -> None:
    """If the parity check let these pass, it could not find them in the real mapping either."""
    tensors = peers.tensors_of(peer)
    mutate(tensors)
    ours = load_checkpoint(peers.write_folder(tmp_path, peer, tensors))
    assert peers.logit_error(ours, peer, peers.token_ids(peer)) > 100 * LIMIT


def test_a_wrong_number_of_heads_fails_the_parity(folder: Path, peer: GPT2LMHeadModel) -> None:
    """n_head leaves no trace in any shape: 2 heads of 8 load where 4 of 4 belong."""
    ours = load_checkpoint(folder, n_head=2)
    assert ours.config.kv_heads == 2
    assert peers.logit_error(ours, peer, peers.token_ids(peer)) > 100 * LIMIT


def test_the_exact_gelu_fails_the_parity(folder: Path, peer: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """nanoGPT's exact GELU on GPT-2's tanh weights: close enough to look right, and off in every logit."""
    ours = load_checkpoint(folder)
    for block in ours.h:
        monkeypatch.setattr(block.mlp, "act", torch.nn.GELU())
    assert peers.logit_error(ours, peer, peers.token_ids(peer)) > LIMIT


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'"),
        ({"n_inner": 32}, "n_inner is 32"),
    ],
)
def test_a_config_that_asks_for_another_model_is_refused(
    settings: dict[str, object], named: str, peer: GPT2LMHeadModel, tmp_path: Path
) -> None:
    """A setting that is read past: the model loads, and computes something else."""
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(peers.write_folder(tmp_path, peer, **settings))


def test_a_config_names_all_that_is_missing(peer: GPT2LMHeadModel, tmp_path: Path) -> None:
    """One missing field told at a time, or filled with GPT-2 small's in silence."""
    peers.write_folder(tmp_path, peer)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 16}))
    with pytest.raises(CheckpointError, match=r"(?s)n_layer is missing.*n_head is missing"):
        load_checkpoint(tmp_path)


def test_pickles_are_refused_without_being_opened(peer: GPT2LMHeadModel, tmp_path: Path) -> None:
    """A pytorch_model.bin that runs its author's code on the reader's machine."""
    peers.write_folder(tmp_path, peer)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle can run any code"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file"):
        load_checkpoint(tmp_path / "pytorch_model.bin")


def test_what_is_not_there_is_said_with_the_ways_to_say_it(tmp_path: Path, peer: GPT2LMHeadModel) -> None:
    """A mistyped path that goes to the network, or an error from deep inside a library."""
    with pytest.raises(FileNotFoundError, match=r"no file or folder here.*gpt2-medium"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_checkpoint(tmp_path)
    peers.write_folder(tmp_path, peer)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_cut_off_file_is_refused(cut: int, peer: GPT2LMHeadModel, tmp_path: Path) -> None:
    """Half a copy of a checkpoint that loads as far as it goes."""
    weights = peers.write_folder(tmp_path, peer) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="fetch or save it again"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("device", ["no-such-device", "cuda:99"])
def test_a_device_that_is_not_there_is_told_before_anything_is_fetched(device: str) -> None:
    """Bug: half a gigabyte is downloaded, and then a traceback about CUDA."""
    with pytest.raises(ValueError, match=f"device {device} can't be used here"):
        load_checkpoint("no/such-repository", device=device)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"[]", "no JSON object"),
        (b"\xff", "not JSON"),
        (b'{"n_layer": 3, "n_embd": 16, "vocab_size": 50, "n_head": 4}', "n_positions is missing"),
        (b'{"n_layer": 3, "n_embd": 16, "vocab_size": 50, "n_positions": 8, "n_head": 0}', "n_head is 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_named(folder: Path, tmp_path: Path, content: bytes, named: str) -> None:
    """Bug: an AttributeError or a plain ValueError, which a caller who catches CheckpointError does not expect."""
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(tmp_path)


def test_an_empty_name_is_not_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that was never set, and the model that happens to lie in the current folder."""
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError, match="the checkpoint's name is empty; give gpt2,"):
        load_checkpoint("")
    load_checkpoint(".")
