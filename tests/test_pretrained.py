"""Checkpoints in and out, held equal to the transformers library on random models, and every way to get one wrong."""

import re
from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gpt2course import GPT, PRESETS, GPTConfig
from gpt2course import pretrained as pretrained_module
from gpt2course.hf_format import MAPPING, expand
from gpt2course.pretrained import CheckpointError, load_checkpoint, open_model, save_pretrained

LIMIT = 1e-4


@pytest.fixture(scope="module")
def peer() -> GPT2LMHeadModel:
    return peers.random_peer(n_layer=3)


@pytest.fixture(scope="module")
def folder(peer: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peers.write_folder(tmp_path_factory.mktemp("good"), peer)


@pytest.mark.parametrize("name", peers.SCALED_SIZES)
def test_logits_and_all_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    """A size whose heads are cut otherwise, or a tensor that is read but not used as transformers uses it."""
    peer = peers.scaled_peer(name)
    peer.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.n_head == PRESETS[name].n_head
    idx_BT, targets_BT = peers.token_ids(peer), peers.token_ids(peer, seed=2)
    logit_error = peers.logit_error(ours, peer, idx_BT)
    errors = peers.gradient_errors(ours, peer, idx_BT, targets_BT)
    worst = max(errors, key=lambda tensor: errors[tensor])
    print(f"\n{name}: logits {logit_error:.1e}, worst gradient {errors[worst]:.1e} ({worst}, {len(errors)} tensors)")
    assert logit_error < LIMIT
    assert errors[worst] < LIMIT


@pytest.mark.slow
def test_the_full_124m_shape_equals_transformers(tmp_path: Path) -> None:
    """A mistake that needs the real sizes: 12 heads of 64, 1024 positions, 50,257 tokens."""
    torch.manual_seed(0)
    peer = GPT2LMHeadModel(GPT2Config()).eval()
    peer.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    assert ours.num_params() == 124_439_808
    idx_BT, targets_BT = peers.token_ids(peer, rows=1, length=16), peers.token_ids(peer, rows=1, length=16, seed=2)
    logit_error = peers.logit_error(ours, peer, idx_BT)
    errors = peers.gradient_errors(ours, peer, idx_BT, targets_BT)
    print(f"\n124M: logits {logit_error:.1e}, worst gradient {max(errors.values()):.1e}")
    assert logit_error < LIMIT
    assert max(errors.values()) < LIMIT


@pytest.mark.parametrize("name", peers.SCALED_SIZES)
def test_the_table_names_every_parameter_of_every_published_size_once(name: str) -> None:
    """A tensor that the mapping table forgot: it would keep its random start."""
    with torch.device("meta"):
        model = GPT(PRESETS[name])
    ours = [row.ours for row in expand(PRESETS[name].n_layer)]
    assert sorted(ours) == sorted(parameter for parameter, _ in model.named_parameters())
    assert sum(row.transpose for row in MAPPING) == 4


def test_export_is_loaded_by_transformers_with_equal_logits(
    folder: Path, peer: GPT2LMHeadModel, tmp_path: Path
) -> None:
    """An export that only we can read, or that transformers completes with random tensors in silence."""
    saved = save_pretrained(load_checkpoint(folder), tmp_path / "new" / "folder")
    again, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    idx_BT = peers.token_ids(peer)
    with torch.no_grad():
        assert torch.equal(again(idx_BT).logits, peer(idx_BT).logits)


def test_a_fresh_model_survives_the_round_trip_bit_for_bit(tmp_path: Path) -> None:
    """A transpose done on one way only, or a config field lost in config.json."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=9, vocab_size=11, layer_norm_eps=1e-6)
    model = GPT(config)
    back = load_checkpoint(save_pretrained(model, tmp_path))
    assert back.config == config
    assert back.lm_head.weight is back.wte.weight
    for (name, before), (_, after) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(before, after), name


def test_half_precision_on_disk_is_half_the_size_and_loads_as_float32(folder: Path, tmp_path: Path) -> None:
    """A course checkpoint that fills the repository, or a model that computes in float16 unasked."""
    model = load_checkpoint(folder)
    save_pretrained(model, tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16
    back = load_checkpoint(tmp_path)
    assert back.wte.weight.dtype == torch.float32
    assert torch.equal(back.wte.weight, model.wte.weight.half().float())


def test_saving_over_an_older_checkpoint_keeps_other_files_and_leaves_no_litter(folder: Path, tmp_path: Path) -> None:
    """A save that wipes the folder it is given (logs, a README), or leaves its temporary files."""
    (tmp_path / "log.json").write_text("[]")
    save_pretrained(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=5)), tmp_path)
    model = load_checkpoint(folder)
    save_pretrained(model, tmp_path)
    assert load_checkpoint(tmp_path).config == model.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "log.json", "model.safetensors"]


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle of a save that destroys the only good checkpoint."""
    old = load_checkpoint(folder)
    save_pretrained(old, tmp_path)

    def full_disk(_state: dict[str, Tensor], path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(GPT(old.config), tmp_path)
    assert torch.equal(load_checkpoint(tmp_path).wte.weight, old.wte.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_save_cut_off_between_its_files_never_mixes_two_checkpoints(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights under the old config: with another n_head they would load, and compute something else."""
    model = load_checkpoint(folder)
    save_pretrained(model, tmp_path)
    rename = Path.replace

    def cut_off_at_config(source: Path, target: Path) -> Path:
        if target.name == "config.json":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", cut_off_at_config)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(GPT(model.config.with_(n_head=2)), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"n_kv_head": 1}, "n_kv_head = 1"), ({"window": 4}, "window = 4"), ({"bias": False}, "bias")],
)
def test_a_model_that_is_no_gpt2_is_not_exported(changes: dict[str, int], named: str, tmp_path: Path) -> None:
    """An export that drops the window or the shared heads: transformers would load another model in silence."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=5, **changes))
    with pytest.raises(CheckpointError, match=re.escape(named)):
        save_pretrained(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_with_and_without_the_prefix_load_alike(prefix: str, peer: GPT2LMHeadModel, tmp_path: Path) -> None:
    """The published files have no prefix, those transformers writes have one; both are out there."""
    ours = load_checkpoint(peers.write_folder(tmp_path, peer, peers.tensors_of(peer, prefix)))
    assert peers.logit_error(ours, peer, peers.token_ids(peer)) < LIMIT


def test_only_the_two_mask_buffers_are_ignored(peer: GPT2LMHeadModel, tmp_path: Path) -> None:
    """The published files carry the causal mask as a tensor; refusing it would refuse GPT-2 itself."""
    tensors = peers.tensors_of(peer)
    for i in range(peer.config.n_layer):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    ours = load_checkpoint(peers.write_folder(tmp_path, peer, tensors))
    assert peers.logit_error(ours, peer, peers.token_ids(peer)) < LIMIT
    tensors["h.0.mlp.bias"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"unexpected: h\.0\.mlp\.bias"):
        load_checkpoint(peers.write_folder(tmp_path, peer, tensors))


def test_a_stored_head_is_accepted_if_it_is_the_embedding(peer: GPT2LMHeadModel, tmp_path: Path) -> None:
    """Some files store the tied tensor twice; that is no error, and the loaded model must still be tied."""
    tensors = peers.tensors_of(peer, "transformer.") | {"lm_head.weight": peer.lm_head.weight.detach().clone()}
    ours = load_checkpoint(peers.write_folder(tmp_path, peer, tensors))
    assert ours.lm_head.weight is ours.wte.weight
    assert len({parameter.data_ptr() for parameter in ours.parameters()}) == len(peers.tensors_of(peer))


def test_settings_that_leave_the_weights_alone_can_be_changed_and_others_not(folder: Path) -> None:
    """A change of shape that is taken and then fails far away, or a typo that is ignored."""
    model = load_checkpoint(folder, dropout=0.1, window=4, attention_backend="reference")
    assert (model.config.dropout, model.config.window, model.config.attention_backend) == (0.1, 4, "reference")
    assert model.h[0].mlp.dropout.p == 0.1
    assert not model.training
    for wrong in ({"n_layer": 2}, {"drop_out": 0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} can't be changed while loading"):
            load_checkpoint(folder, **wrong)


def test_a_loaded_model_does_not_live_in_the_file(peer: GPT2LMHeadModel, tmp_path: Path) -> None:
    """Weights mapped from the file: writing over the file would change, or crash, a model in use."""
    ours = load_checkpoint(peers.write_folder(tmp_path, peer))
    size = (tmp_path / "model.safetensors").stat().st_size
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * size)
    assert peers.logit_error(ours, peer, peers.token_ids(peer)) < LIMIT


def test_a_bare_file_needs_its_heads_told_unless_the_size_is_published(
    peer: GPT2LMHeadModel, folder: Path, tmp_path: Path
) -> None:
    """A guessed number of heads: it loads without any error, and the text is nonsense."""
    bare = tmp_path / "bare.safetensors"
    save_file(peers.tensors_of(peer), bare)
    with pytest.raises(CheckpointError, match=r"3 layers, width 16.*pass n_head"):
        load_checkpoint(bare)
    assert peers.logit_error(load_checkpoint(bare, n_head=4), peer, peers.token_ids(peer)) < LIMIT
    beside = load_checkpoint(folder / "model.safetensors")
    assert beside.config.n_head == 4


def test_the_heads_of_a_published_size_are_known(tmp_path: Path) -> None:
    """12 layers of width 768 are GPT-2 small, whatever the file is called."""
    shapes = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)} | {f"h.{i}.ln_1.bias": (768,) for i in range(12)}
    assert pretrained_module.config_from_shapes(shapes, None) == PRESETS["gpt2"]


def test_auto_takes_the_published_weights_from_the_cache_and_never_fetches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chapter that starts a download of half a gigabyte because the learner pressed Run All."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained_module, "COURSE", folder)
    monkeypatch.setattr(pretrained_module.hub, "fetch", lambda name: pytest.fail(f"fetched {name}"))
    model, sentence = open_model("auto")
    assert sentence.startswith("The course checkpoint")
    assert f"{model.num_params():,}" in sentence
    assert not model.training

    monkeypatch.setattr(pretrained_module.hub, "is_cached", lambda name: name == "gpt2")
    monkeypatch.setattr(
        pretrained_module.hub, "fetch", lambda name: (folder / "config.json", folder / "model.safetensors")
    )
    with pytest.raises(CheckpointError, match="is not the config of gpt2"):
        open_model("auto")


def test_a_missing_course_checkpoint_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without its data that fails with a stack trace out of safetensors."""
    monkeypatch.setattr(pretrained_module, "COURSE", tmp_path)
    with pytest.raises(FileNotFoundError, match="install gpt2course again"):
        load_checkpoint("course")


def test_weights_may_be_read_by_whoever_may_read_the_config(tmp_path: Path) -> None:
    """safetensors makes files for their owner alone: a checkpoint saved for a group can't be loaded by it."""
    folder = save_pretrained(GPT(PRESETS["tiny"]), tmp_path)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
