"""The parts of scripts/train_course_checkpoint.py that can be wrong without a loss that shows it."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gpt2course import GPT, GPTConfig

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_course_checkpoint.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_resumed_run_forgets_what_came_after_the_last_saved_weights(script: ModuleType, tmp_path: Path) -> None:
    """Rows of a loss that the resumed weights never had, and steps that are counted twice."""
    rows = [{"step": 10}, {"step": 20, "val_loss": 5.0}, {"step": 30}, {"step": 40, "val_loss": 4.0}, {"step": 50}]
    log = tmp_path / "train_log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script.last_saved(tmp_path) == rows[:4]
    log.write_text(json.dumps(rows[0]) + "\n")
    assert script.last_saved(tmp_path) == []


def test_only_tokens_never_seen_are_moved(script: ModuleType) -> None:
    """Trained embeddings overwritten, or the mean taken over the common tokens."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=6))
    before_VC = model.wte.weight.detach().clone()
    script.place_unseen(model, torch.tensor([0, 1, 2, 3, 0, 900]))
    rare_C = (before_VC[1] + before_VC[2]) / 2
    seen, unseen = [1, 2, 3, 5], [0, 4]
    assert torch.equal(model.wte.weight[seen], before_VC[seen])
    assert torch.allclose(model.wte.weight[unseen], before_VC[unseen] + rare_C)
    assert model.lm_head.weight is model.wte.weight
