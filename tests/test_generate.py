"""Legend: B batch, T positions, V vocabulary."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peers import random_peer
from torch import Tensor

from gpt2course import GPT, GPTConfig
from gpt2course.generate import Completion, GenerateOptions, generate, sample, stream
from gpt2course.kv_cache import KVCache
from gpt2course.pretrained import load_checkpoint
from gpt2course.tokenizer import get_tokenizer

CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=16, block_size=16, vocab_size=97)
PROMPTS = [[5, 9, 2, 44], [7], [30, 31, 32, 33, 34, 35, 36], [1, 2]]
Lively = Callable[..., GPT]


@pytest.fixture(scope="module")
def model(lively: Lively) -> GPT:
    return lively(CONFIG)


def options(**changes: Any) -> GenerateOptions:
    return GenerateOptions(**{"max_new_tokens": 8, "seed": 3, "stop_at_eot": False, **changes})


def greedy_by_hand(model: GPT, prompt: list[int], n: int) -> list[int]:
    row = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_the_argmax_over_and_over(model: GPT, use_cache: bool) -> None:
    """Bug: the first token is drawn from the wrong place of the prompt, or a token is fed twice."""
    found = generate(model, PROMPTS, options(temperature=0, use_cache=use_cache))
    assert [c.token_ids for c in found] == [greedy_by_hand(model, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(c.token_ids) for c in found}) == len(PROMPTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("G", "window"), [(4, None), (2, 3)])
def test_a_batch_is_each_row_alone(lively: Lively, dtype: torch.dtype, G: int, window: int | None) -> None:
    """Bug: padding changes a row's logits, or one row's draws move another's random numbers."""
    model = lively(CONFIG.with_(n_kv_head=G, window=window), dtype)
    together = generate(model, PROMPTS, options(temperature=0.9))
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], options(temperature=0.9, seed=3 + i)) == [together[i]]


def test_a_row_that_has_ended_stays_as_it_was(model: GPT) -> None:
    """Bug: rows of a batch go on growing, or lose their reason, until the last row ends."""
    free = generate(model, PROMPTS, options())
    o = {"stop": (free[0].text[2],)}
    together = generate(model, PROMPTS, options(**o))
    assert together[0].reason == "stop"
    assert {"stop", "length"} == {c.reason for c in together}
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], options(seed=3 + i, **o)) == [together[i]]


def next_logits(model: GPT, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Tensor:
    """(steps, B, V) logits that every draw of one run of `generate` was made from."""
    seen: list[Tensor] = []

    def spy(logits_BV: Tensor, *args: Any) -> Tensor:
        assert logits_BV.is_inference()
        seen.append(logits_BV.clone())
        return sample(logits_BV, *args)

    with monkeypatch.context() as patch:
        patch.setattr("gpt2course.generate.sample", spy)
        generate(model, prompts, options(temperature=0, **changes))
    return torch.stack(seen)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_padding_changes_no_logit_of_any_step(
    lively: Lively, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    """Bug: a difference too small to change the token today."""
    model = lively(CONFIG, dtype)
    together = next_logits(model, PROMPTS, monkeypatch)
    for i, prompt in enumerate(PROMPTS):
        alone = next_logits(model, [prompt], monkeypatch)
        assert (together[:, i] - alone[:, 0]).abs().max() < tolerance


def test_padding_at_the_positions_of_tokens_is_caught(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: left padding without positions: short rows see the padding and sit too far to the right."""
    wanted = greedy_by_hand(model, PROMPTS[1], 8)
    assert generate(model, PROMPTS, options(temperature=0))[1].token_ids == wanted
    monkeypatch.setattr(
        "gpt2course.generate.left_padded_positions", lambda lengths, T: torch.arange(T).expand(len(lengths), T)
    )
    assert generate(model, PROMPTS, options(temperature=0, use_cache=False))[1].token_ids != wanted


@pytest.mark.parametrize("context", ["error", "slide"])
def test_the_cache_changes_nothing(model: GPT, context: str) -> None:
    """Bug: text with the cache differs from text without."""
    n = 9 if context == "error" else 60
    with_cache, without = (
        generate(model, PROMPTS, options(context=context, max_new_tokens=n, use_cache=use)) for use in (True, False)
    )
    assert with_cache == without


def test_the_cache_is_used(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: use_cache is accepted, and every token computes the whole context."""
    widths: list[int] = []
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, *rest: widths.append(idx.shape[1]) or hidden(self, idx, *rest))
    generate(model, PROMPTS, options(max_new_tokens=4))
    generate(model, PROMPTS, options(max_new_tokens=4, use_cache=False))
    assert widths == [7, 1, 1, 1, 7, 8, 9, 10]


def test_greedy_equals_transformers(tmp_path: Path) -> None:
    """Bug: right by our own loop, and wrong by everybody else's."""
    peer = random_peer(vocab_size=97)
    peer.save_pretrained(tmp_path)
    model = load_checkpoint(tmp_path)
    for prompt in PROMPTS:
        theirs = peer.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert generate(model, [prompt], options(temperature=0, max_new_tokens=12))[0].token_ids == (
            theirs[0, len(prompt) :].tolist()
        )


def test_a_seed_repeats_and_rows_differ(model: GPT) -> None:
    """Bug: a seed that is ignored, that moves torch's global generator, or that gives every row the same draws."""
    before = torch.get_rng_state()
    same = [[3, 4]] * 4
    first, second = (generate(model, same, options(max_new_tokens=12)) for _ in range(2))
    assert first == second
    assert len({tuple(c.token_ids) for c in first}) == 4
    assert generate(model, same, options(seed=50, max_new_tokens=12)) != first
    unseeded = [generate(model, same, options(seed=None, max_new_tokens=12)) for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    assert torch.equal(before, torch.get_rng_state())


class Script(GPT):
    """A model whose likeliest next token follows a given text, whatever the prompt."""

    def __init__(self, tokens: list[int], prompt_length: int) -> None:
        super().__init__(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=64))
        self.tokens, self.prompt_length = tokens, prompt_length

    def hidden(self, idx_BT: Tensor, pos_BT: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        if cache is not None:
            cache.length += idx_BT.shape[1]
        place = (idx_BT.shape[1] if cache is None else cache.length) - self.prompt_length
        self.lm_head.weight.zero_()[self.tokens[place]] = 1.0
        return torch.ones(*idx_BT.shape, 2)


@pytest.mark.parametrize("use_cache", [True, False])
def test_streaming_is_generate(use_cache: bool) -> None:
    """Bug: streamed text differs from generated text at emoji, at a stop sequence or at the end."""
    tokens = get_tokenizer().encode_ordinary("naïve 😀 text\n\nUser: no")
    scripted = Script(tokens, prompt_length=2)
    for stop, text, reason in [
        ((), "naïve 😀 text\n\nUser: no", "length"),
        (("\n\nUser:",), "naïve 😀 text", "stop"),
        (("😀",), "naïve ", "stop"),
    ]:
        o = options(max_new_tokens=len(tokens), temperature=0, stop=stop, use_cache=use_cache)
        with torch.inference_mode():
            (done,) = generate(scripted, "Hello there", o)
            pieces = list(stream(scripted, "Hello there", o))
        assert (done.text, done.reason) == (text, reason)
        assert "".join(pieces) == text
        assert all(pieces)
        assert len(pieces) > 1 or text == "naïve "


def test_end_of_text_token_stops() -> None:
    """Bug: the model goes on into another document; or <|endoftext|> is part of the text."""
    tokens = [*get_tokenizer().encode_ordinary("the end"), 50256, 50, 51]
    with torch.inference_mode():
        (done,) = generate(Script(tokens, 1), [[11]], GenerateOptions(max_new_tokens=5, temperature=0))
        (on,) = generate(Script(tokens, 1), [[11]], options(max_new_tokens=5, temperature=0))
    assert done == Completion("the end", tokens[:3], "eot")
    assert on.reason == "length"
    assert len(on.token_ids) == 5


def test_a_stream_shows_text_before_the_end(model: GPT) -> None:
    """Bug: a "stream" that computes everything first."""
    steps: list[int] = []
    counter = model.ln_f.register_forward_hook(lambda *_: steps.append(1))
    pieces: Iterator[str] = stream(model, [5, 9], options(max_new_tokens=10))
    assert steps == []
    next(pieces)
    assert 1 <= len(steps) < 10
    counter.remove()


def test_past_block_size_is_an_error_with_two_mends(model: GPT) -> None:
    """Bug: hours of generation, then an index error; or a limit one token too early."""
    assert len(generate(model, [PROMPTS[0]], options(max_new_tokens=13))[0].token_ids) == 13  # 4 + 13 - 1 = 16
    with pytest.raises(
        ValueError, match=r"17 positions .* 4 tokens.* 14 new .* block_size is 16: .*no row.*shorten .* slide"
    ):
        generate(model, [PROMPTS[0]], options(max_new_tokens=14))
    with pytest.raises(ValueError, match="17 positions"):
        stream(model, PROMPTS[0], options(max_new_tokens=14))


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_sliding_context_keeps_the_last_tokens(model: GPT, use_cache: bool) -> None:
    """Bug: after a slide the old keys stay at their old positions, or the context is cut at the wrong end."""
    (found,) = generate(
        model, [PROMPTS[2]], options(temperature=0, max_new_tokens=40, context="slide", use_cache=use_cache)
    )
    row = list(PROMPTS[2])
    for token in found.token_ids:
        with torch.no_grad():
            assert token == model(torch.tensor([row]))[0, -1].argmax()
        row.append(token)
        row = row[-12:] if len(row) > 16 else row
    assert len(found.token_ids) == 40


def test_a_long_prompt_slides_and_rows_slide_alone(model: GPT) -> None:
    """Bug: a slide of the longest row moves the others."""
    prompts = [list(range(50)), [3], list(range(14))]
    together = generate(model, prompts, options(context="slide", max_new_tokens=30))
    for i, prompt in enumerate(prompts):
        assert generate(model, [prompt], options(context="slide", max_new_tokens=30, seed=3 + i)) == [together[i]]
    tail = generate(model, [list(range(38, 50))], options(context="slide", max_new_tokens=30))
    assert tail == together[:1]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", r"prompt 0 is empty; .* such as end-of-text: \[50256\]"),
        (["a", ""], "prompt 1 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ([], "0 prompts"),
        ([[1], [97]], "prompt 1 has token id 97; this model's ids go from 0 to 96"),
        ([[-1]], "prompt 0 has token id -1"),
        ([1, 2, 3], "prompt 0 is 1, not a text or a list of token ids"),
    ],
)
def test_bad_prompts_are_named(model: GPT, prompts: Any, message: str) -> None:
    """Bug: an empty prompt fails deep inside, an id out of range as "index out of range in self"."""
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, options())


def test_a_text_is_not_a_way_to_end_the_text() -> None:
    """Bug: somebody else's text that contains "<|endoftext|>" is taken for the token."""
    model = GPT(CONFIG.with_(vocab_size=50257))
    fed: list[Tensor] = []
    model.wte.register_forward_pre_hook(lambda _module, args: fed.append(args[0]))
    generate(model, "a<|endoftext|>", options(max_new_tokens=1))
    assert fed[0].shape == (1, 8)
    assert 50256 not in fed[0]


def test_ids_that_stand_for_nothing_are_never_drawn(lively: Lively) -> None:
    """Bug: a head padded to 50,304 rows draws an id that the tokenizer does not know."""
    model = lively(CONFIG.with_(vocab_size=300))
    tokenizer: Any = SimpleNamespace(n_vocab=257, eot_token=256, decode_single_token_bytes=lambda token: b"x")
    found = generate(model, [[1]] * 8, options(max_new_tokens=10, temperature=5.0), tokenizer)
    assert max(max(c.token_ids) for c in found) < 257


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_dtype_without_gradients(lively: Lively, dtype: torch.dtype) -> None:
    """Bug: a cache in float32 under a bfloat16 model; a graph that grows with every token."""
    model = lively(CONFIG, dtype)
    assert len(generate(model, PROMPTS, options(top_k=5, top_p=0.9))[2].token_ids) == 8
    assert all(p.grad is None for p in model.parameters())


def test_interrupting_leaves_nothing_broken(lively: Lively, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: after Ctrl-C or a dropped stream the model stays in evaluation mode, or autograd stays off."""
    model = lively(CONFIG.with_(dropout=0.1)).train()
    wanted = generate(model, PROMPTS, options())
    assert model.training
    pieces = stream(model, PROMPTS[0], options())
    next(pieces)
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    del pieces

    calls = []

    def interrupt(*_args: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.ln_f.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, options())
    hook.remove()
    assert model.training
    assert not torch.is_inference_mode_enabled()
    assert generate(model, PROMPTS, options()) == wanted
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()


def test_a_progress_bar_only_where_asked(model: GPT, capfd: pytest.CaptureFixture[str]) -> None:
    """Bug: bars in every cell's output."""
    generate(model, PROMPTS, options())
    list(stream(model, PROMPTS[0], options()))
    assert capfd.readouterr() == ("", "")
    generate(model, PROMPTS, options(progress=True))
    assert "token" in capfd.readouterr().err


@pytest.mark.parametrize("prompts", [[1, 2], [[1.5]], [["7"]], torch.tensor([1, 2])])
def test_what_is_no_text_and_no_ids_is_refused(model: GPT, prompts: Any) -> None:
    """Bug: token 1.5 read as token 1, the text "7" as token 7, or a traceback about an integer that is not iterable."""
    with pytest.raises(ValueError, match="not a text or a list of token ids"):
        generate(model, prompts)
