"""The price tag: every number is what it says, nothing done is lost, and the record fits its checkpoint."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gpt2course import GPT, PRESETS, GPTConfig, cli, price_tag
from gpt2course.data import Document, prepare
from gpt2course.evaluate import evaluate_loss
from gpt2course.healing import Healing
from gpt2course.kv_cache import cache_bytes
from gpt2course.pretrained import load_checkpoint, save_pretrained
from gpt2course.prices import FILE, Prices, Row, Settings, Speed, load, number, recorded
from gpt2course.surgery import to_gqa, to_window
from gpt2course.tokenizer import get_tokenizer

CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=16, block_size=32)
NAMES = [
    "unchanged",
    "GQA-2, mean",
    "GQA-2, first",
    "MQA, mean",
    "MQA, first",
    "window 8",
    "window 8 + 4 sinks",
    "window 4, SSL",
    "RoPE",
    "RoPE + GQA-2 + window 8",
]


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(price_tag, "BLOCKS", {1: 1, 3: 1})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A tiny model with lively weights, and a small folder of text, both somewhere under tmp_path."""
    model = GPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    save_pretrained(model, tmp_path / "tiny")
    words = ["tokens", "are", "cut", "from", "text", "def", "return", "self", "\n"]
    draw = random.Random(0)
    (tmp_path / "texts").mkdir()
    for n in range(40):
        (tmp_path / "texts" / f"{n}.txt").write_text(" ".join(draw.choices(words, k=200)))
    return Settings(
        model=str(tmp_path / "tiny"),
        corpus=str(tmp_path / "texts"),
        steps=2,
        batch_size=2,
        tokens=100,
        learning_rate=0.01,
        precision="float32",
    )


def timeless(made: Prices) -> Prices:
    """Without what differs from run to run."""
    return replace(made, rows=tuple(replace(row, seconds_a_step=0.0, speeds=()) for row in made.rows))


def test_every_number_is_what_it_says(settings: Settings, tmp_path: Path) -> None:
    """A perplexity of the wrong model or text, a cache by another formula, a path of this machine in the record."""
    made = price_tag.campaign(settings, tmp_path / "out", progress=False)
    assert load(tmp_path / "out" / FILE) == made
    assert (tmp_path / "out" / "price_tag.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [FILE, "price_tag.png"]
    assert str(tmp_path) not in made.to_json()

    rows = {row.name: row for row in made.rows}
    assert list(rows) == NAMES
    model = load_checkpoint(settings.model)
    ids = prepare(settings.corpus).stream("val").read(0, 101)
    before = evaluate_loss(model, ids).perplexity
    assert made.perplexity == rows["unchanged"].perplexity_after == before
    assert rows["unchanged"].perplexity_healed != before
    for name, changed in (("MQA, first", to_gqa(model, 1, "first")[0]), ("window 8", to_window(model, 8)[0])):
        assert rows[name].perplexity_after == evaluate_loss(changed, ids).perplexity
        assert rows[name].kv_bytes(32) == cache_bytes(changed.config)
        assert rows[name].parameters == changed.num_params()
    for row in made.rows:
        assert len(row.training_losses) == 2
        assert [speed.batch_size for speed in row.speeds] == [1, 3]
        assert all(speed.ratio_low <= speed.ratio <= speed.ratio_high for speed in row.speeds)
    assert "learned positions -> rotary" in rows[NAMES[-1]].done
    assert "4 key/value heads -> 2: the mean" in rows[NAMES[-1]].done
    assert "window of 8 keys" in rows[NAMES[-1]].done
    assert all(name in str(made) for name in NAMES)


def test_nothing_done_is_lost(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the third row takes the first two along; --resume makes them again, or mixes other settings in."""
    whole = price_tag.campaign(settings, tmp_path / "whole", progress=False)
    heal, calls = price_tag.heal, []

    def third_is_stopped(*given: Any, **named: Any) -> Healing:
        calls.append(1)
        healing = heal(*given, **named)
        return replace(healing, interrupted=len(calls) == 3)

    monkeypatch.setattr(price_tag, "heal", third_is_stopped)
    with pytest.raises(KeyboardInterrupt):
        price_tag.campaign(settings, tmp_path / "out", progress=False)
    assert "2 rows are kept in" in capsys.readouterr().err
    assert [row.name for row in load(tmp_path / "out" / FILE).rows] == NAMES[:2]

    with pytest.raises(ValueError, match="is there already; go on with it by --resume"):
        price_tag.campaign(settings, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"made with steps 2, not 3; seed 0, not 1; choose"):
        price_tag.campaign(replace(settings, steps=3, seed=1), tmp_path / "out", resume=True, progress=False)
    resumed = price_tag.campaign(settings, tmp_path / "out", resume=True, progress=False)
    assert len(calls) == 3 + 8
    assert timeless(resumed) == timeless(whole)

    save_pretrained(GPT(CONFIG), Path(settings.model))
    with pytest.raises(ValueError, match="another model's weights"):
        price_tag.campaign(settings, tmp_path / "out", resume=True, progress=False)


def test_speed_only_touches_nothing_else(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexities of an untrained surgery written over healed ones, or speeds that are kept from the busy machine."""
    made = price_tag.campaign(settings, tmp_path, progress=False)
    monkeypatch.setattr(price_tag, "BLOCKS", {2: 2})
    again = price_tag.remeasure(settings.model, tmp_path, progress=False)
    assert again == load(tmp_path / FILE)
    assert replace(timeless(again), rows=()) == replace(made, rows=())
    assert timeless(again) == timeless(made)
    assert [[speed.batch_size for speed in row.speeds] for row in again.rows] == [[2]] * len(NAMES)
    save_pretrained(GPT(CONFIG), Path(settings.model))
    with pytest.raises(ValueError, match="was made with another model"):
        price_tag.remeasure(settings.model, tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match="price-tag --out"):
        price_tag.remeasure(settings.model, tmp_path / "nowhere", progress=False)


def test_the_command_makes_the_table(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag that does not arrive, or a command in the record that does not make the record again."""
    some = dict(list(price_tag.retrofits(CONFIG).items())[:2])
    monkeypatch.setattr(price_tag, "retrofits", lambda config: some)
    words = settings.command.split()[1:]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    made = load(tmp_path / FILE)
    assert made.settings == replace(settings, model="tiny", corpus="texts")
    assert made.command == made.settings.command
    shown = capsys.readouterr().out
    assert "GQA-2, mean" in shown
    assert "Healed: 2 steps of 64 tokens" in shown
    assert cli.main(["price-tag", "--speed-only", "--model", settings.model, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--out", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["price-tag", "--steps", "0", "--tokens", "-1", "--learning-rate", "2"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("steps is 0", "tokens is -1", "learning_rate is 2.0"))


def test_the_command_says_what_is_not_the_default() -> None:
    """A record made with flags that its command leaves out."""
    assert Settings(steps=7).command == "gpt2course price-tag --steps 7"
    other = Settings(model="gpt2", learning_rate=0.1, full_vocabulary=True)
    assert other.command == "gpt2course price-tag --model gpt2 --steps 200 --learning-rate 0.1 --full-vocabulary"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, NAMES),
        (
            PRESETS["gpt2"],
            [
                "unchanged",
                "GQA-4, mean",
                "MQA, first",
                "window 256",
                "window 128, 4 long first",
                "RoPE + GQA-4 + window 256",
            ],
        ),
        (PRESETS["gpt2-xl"], ["GQA-5, first", "window 128, SSL"]),
        (CONFIG.with_(n_kv_head=2), ["MQA, mean", "RoPE + MQA + window 8"]),
        (CONFIG.with_(n_kv_head=1), ["RoPE + MQA + window 8"]),
        (CONFIG.with_(pos="rope"), ["GQA-2, mean", "window 8"]),
        (CONFIG.with_(block_size=2), ["window 1", "window 1, SSL"]),
    ],
)
def test_retrofits_fit_the_model(config: GPTConfig, expected: list[str]) -> None:
    """Three groups for four heads, rotary positions twice, or a window of nothing."""
    found = price_tag.retrofits(config)
    assert set(expected) <= set(found)
    assert next(iter(found)) == "unchanged"
    assert any(name.startswith("RoPE") for name in found) == (config.pos == "learned")
    assert any(name.startswith("GQA") for name in found) == (config.kv_heads > 2)
    if config.n_embd < 100:
        for operations in found.values():
            price_tag.operated(GPT(config.with_(vocab_size=11)), operations)


def test_held_out_text_is_ordinary_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexities of one large file of documentation, or of text that was trained on."""
    names = [f"{folder}{n}.py" for folder in ("", "json/", "encodings/", "pydoc_data/") for n in range(40)]
    documents = [Document(name, f"name = {name!r}\n") for name in names]
    monkeypatch.setattr(price_tag, "documents", lambda corpus: iter(documents))
    ids, text = price_tag.held_out_text("stdlib", SimpleNamespace(val_fraction=0.3), 10**9)  # type: ignore[arg-type]
    shown = get_tokenizer().decode(ids.tolist())
    found = {line.split("'")[1] for line in shown.split("<|endoftext|>") if line}
    assert found == {n for n in names[:80] if price_tag.split_of(n, 0.3) == "val"}
    assert f"first {len(ids) - 1:,} tokens of the held-out ordinary modules" in text
    short, _ = price_tag.held_out_text("stdlib", SimpleNamespace(val_fraction=0.3), 20)  # type: ignore[arg-type]
    assert np.array_equal(short, ids[:21])


def test_a_slower_model_has_a_ratio_below_one() -> None:
    """Old over new turned round, or both sides timing the same model."""
    small = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=50)).eval()
    large = GPT(GPTConfig(n_layer=16, n_head=2, n_embd=32, block_size=32, vocab_size=50)).eval()
    speed = price_tag.decode_speed(small, large, batch_size=1, blocks=5)
    assert speed.ratio < 0.5
    assert speed.tokens_per_second < 0.5 * speed.unchanged_tokens_per_second
    assert speed.blocks == 5


@pytest.mark.parametrize("window", [None, 8])
def test_the_last_tokens_of_the_context_are_timed(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed at an empty cache, where no retrofit pays, or with the prompt's pass in the time."""
    model = GPT(CONFIG.with_(vocab_size=50, window=window)).eval()
    passes = []
    hidden = model.hidden

    def watched(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        passes.append((tuple(ids.shape), cache.length))
        return hidden(ids, cache=cache)

    monkeypatch.setattr(model, "hidden", watched)
    with torch.inference_mode():
        assert price_tag.block_seconds(model, 3) > 0
    assert passes == [((3, 1), past) for past in range(15, 32)]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    """A KeyError for whoever opens another version's file."""
    path = tmp_path / FILE
    for text in ("", "[]", "{}", '{"schema": 2}', json.dumps({"schema": 1, "rows": [{"speeds": []}]})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"price_tag\.json: this is no price tag"):
            load(path)


def test_numbers_have_the_digits_that_tell_them_apart() -> None:
    """11.43 and 11.38 both printed as 11.4."""
    assert [number(x) for x in (6.614, 43.06, 999.94, 1789.6)] == ["6.61", "43.06", "999.9", "1,790"]


def test_a_row_made_again_keeps_its_place() -> None:
    """A table with a row twice, or one that a later retrofit joins at the wrong end."""
    speed = Speed(1, 10.0, 10.0, 1.0, 0.9, 1.1, 3, 1, "here")
    row = Row("a", "nothing", 1, 4, 0, 2.0, 2.0, (1.0,), 0.1, "here", (speed,))
    made = Prices("", "", "", Settings(), "", "", "", 2.0, 32)
    made = made.with_row(row).with_row(replace(row, name="b")).with_row(replace(row, kv_fixed=7))
    assert [(r.name, r.kv_fixed) for r in made.rows] == [("a", 7), ("b", 0)]
    assert made.rows[0].kv_bytes(10) == 47
    made = made.with_row(replace(row, name="old")).with_row(replace(row, name="new"))
    assert [r.name for r in made.in_order(["new", "b", "a", "c"]).rows] == ["new", "b", "a", "old"]


def test_the_record_is_of_the_course_checkpoint() -> None:
    """Prices that were made on other weights, or by another list of retrofits, than the course has now."""
    made, model = recorded(), load_checkpoint("course")
    assert made.weights == price_tag.weights_sha256(model)
    assert made.command == made.settings.command
    how = price_tag.retrofits(model.config)
    assert [row.name for row in made.rows] == list(how)
    for row in made.rows:
        changed, done = price_tag.operated(model, how[row.name])
        assert (row.done, row.parameters) == (done, changed.num_params())
        assert row.kv_bytes(512) == cache_bytes(changed.config, capacity=512)
        assert len(row.training_losses) == made.settings.steps
        assert row.speeds
    assert made.rows[0].perplexity_after == made.perplexity
