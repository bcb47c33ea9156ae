"""The small model that the course ships: whole, light, quick to open, and good enough to learn from."""

import hashlib
import json
import socket
import time

import pytest
import torch
from safetensors import safe_open

from gpt2course.data import documents
from gpt2course.data.prepare import split_of
from gpt2course.evaluate import evaluate_loss
from gpt2course.generate import GenerateOptions, generate
from gpt2course.model import GPT
from gpt2course.pretrained import course_checkpoint, open_model
from gpt2course.tokenizer import VOCAB_SIZE, get_tokenizer


@pytest.fixture(scope="module")
def model() -> GPT:
    return open_model("course")[0]


def test_files_are_whole_and_light() -> None:
    """A checkpoint that was trained again and not hashed again, or that makes every clone heavy."""
    folder = course_checkpoint()
    data = (folder / "model.safetensors").read_bytes()
    assert len(data) <= 16e6
    assert hashlib.sha256(data).hexdigest() == (folder / "SHA256SUMS").read_text().split()[0]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_opens_at_once_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first cell that waits, or that asks a hub for a file that lies beside it."""
    monkeypatch.setattr(socket, "socket", None)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        open_model("course")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0


def test_predicts_held_out_python(model: GPT) -> None:
    """A log that claims a loss the shipped weights do not have, on documents they were not trained on."""
    claimed = json.loads((course_checkpoint() / "summary.json").read_text())["val_loss"]
    text = "".join(d.text for d in documents("stdlib") if split_of(d.name, 0.05) == "val")
    ids = torch.tensor(get_tokenizer().encode_ordinary(text[:400_000]))
    places = torch.arange(8)[:, None] * (len(ids) // 8) + torch.arange(513)
    losses = [evaluate_loss(model, ids[row]).loss for row in places]
    mean = sum(losses) / len(losses)
    # Another Python has another library, and eight windows are a sample of the whole.
    assert abs(mean - claimed) < 0.8, (mean, claimed)
    shuffled = ids[places[0]][torch.randperm(513, generator=torch.Generator().manual_seed(0))]
    assert evaluate_loss(model, shuffled).loss > mean + 2, "order must matter, or the model knows only frequencies"


def test_samples_look_like_python(model: GPT) -> None:
    """Weights that load and write soup: tokens that never occur in Python, or text without its words and its shape."""
    prompts = ["import os\n", "class Reader:\n    def __init__(self", "def main(", "    for name in"]
    options = GenerateOptions(max_new_tokens=80, temperature=0.7, top_p=0.95, seed=0, stop_at_eot=False)
    texts = [prompt + done.text for prompt, done in zip(prompts, generate(model, prompts, options), strict=True)]
    words = ("self", "def ", "return", "import", "if ", "for ", " = ", "None", "#", '"""')
    assert (
        sum(any(word in text[len(prompt) :] for word in words) for prompt, text in zip(prompts, texts, strict=True))
        >= 3
    )
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    indented = [line for line in lines if line.startswith("    ")]
    assert len(indented) > len(lines) / 4, texts


def test_unseen_tokens_are_unlikely(model: GPT) -> None:
    """A third of the vocabulary occurs in the corpus; tokens that never did must not take part of every prediction."""
    rare = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    for document in documents("stdlib"):
        rare[torch.tensor(get_tokenizer().encode_ordinary(document.text), dtype=torch.long)] = False
    ids = torch.tensor([get_tokenizer().encode_ordinary("def read(self, size=-1):\n    if size < 0:\n        return")])
    with torch.no_grad():
        p_TV = model(ids)[0].softmax(-1)
    assert float(p_TV[:, rare].sum(-1).mean()) < 0.1
