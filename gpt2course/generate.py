"""Sampling: from logits to a token, from tokens to text.

Legend: B batch, T positions, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index

import tiktoken
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gpt2course.detokenize import TextWriter
from gpt2course.evaluate import evaluating
from gpt2course.kv_cache import KVCache
from gpt2course.masks import left_padded_positions
from gpt2course.model import GPT
from gpt2course.tokenizer import get_tokenizer

CONTEXTS = ("error", "slide")
SMALLEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class GenerateOptions:
    """How to draw the next tokens.

    The filters act in this order: temperature, then top-k, then top-p.

    Raises:
        ValueError: naming every problem at once, each with the value, the limit and the mend.
    """

    max_new_tokens: int = 100
    """draw at most so many tokens"""
    temperature: float = 1.0
    """logits are divided by it; below 1 bolder, above 1 wilder, 0 always takes the likeliest token (greedy)"""
    top_k: int | None = None
    """keep the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833)"""
    top_p: float | None = None
    """keep the fewest tokens whose probabilities reach p (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751)"""
    stop: tuple[str, ...] = ()
    """end as soon as one of these appears in the new text; it is cut off"""
    stop_at_eot: bool = True
    """end at the tokenizer's end-of-text token"""
    seed: int | None = None
    """row i of a batch draws with seed + i; None is different every time"""
    context: str = "error"
    """past block_size: "error" refuses before it starts, unless positions are rotary, which have no end; "slide"
    forgets the oldest tokens"""
    use_cache: bool = True
    """keep keys and values instead of computing the whole context for every token"""
    progress: bool = False
    """show a progress bar"""

    def __post_init__(self) -> None:
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        if problems := self._problems():
            raise ValueError("GenerateOptions:\n" + "\n".join(f"  - {problem}" for problem in problems))

    def _problems(self) -> list[str]:
        found = []
        for name in ("max_new_tokens", "top_k"):
            value = getattr(self, name)
            if not (_whole(value) and value >= 1) and not (name == "top_k" and value is None):
                found.append(f"{name} is {value!r}; it must be a whole number of at least 1")
        t = self.temperature
        if not _real(t) or not 0.0 <= t < math.inf:
            found.append(f"temperature is {t!r}; it must be 0 (greedy) or a positive number")
        elif 0.0 < t < SMALLEST_TEMPERATURE:
            found.append(f"temperature is {t!r}; below {SMALLEST_TEMPERATURE} logits overflow, use 0 for greedy")
        if self.top_p is not None and (not _real(self.top_p) or not 0.0 < self.top_p <= 1.0):
            found.append(f"top_p is {self.top_p!r}; it must lie in (0, 1], or be None")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            found.append(f"stop is {self.stop!r}; it must be a tuple of non-empty strings, such as ('\\n\\n',)")
        if self.seed is not None and not (_whole(self.seed) and 0 <= self.seed < 2**63):
            found.append(f"seed is {self.seed!r}; it must be a whole number in [0, 2**63), or None")
        if self.context not in CONTEXTS:
            found.append(f"context is {self.context!r}; it must be one of {', '.join(CONTEXTS)}")
        return found


@dataclass(frozen=True)
class Completion:
    """What one prompt was continued with."""

    text: str
    """the new text, without the prompt, the stop sequence or the end-of-text token"""
    token_ids: list[int]
    """every token drawn, those of a stop sequence and the end-of-text token included"""
    reason: str
    """why it ended: "length", "stop" or "eot" """


def filter_logits(logits_BV: Tensor, options: GenerateOptions) -> Tensor:
    """Apply temperature, top-k and top-p, in this order, as transformers does.

    Args:
        logits_BV: (B, V) logits of the next token.
        options: at temperature 0 only the likeliest token stays, the first of them on a tie.

    Returns:
        (B, V) float32 (float64 stays float64) logits with -inf where a token may not be drawn; never all of a row.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if options.temperature == 0:
        best_B1 = logits_BV.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits_BV, -math.inf).scatter(1, best_B1, logits_BV.gather(1, best_B1))
    logits_BV = logits_BV / options.temperature
    if options.top_k is not None and options.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(options.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    if options.top_p is not None and options.top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        p_BV = sorted_BV.softmax(dim=-1)
        # The probability BEFORE a token decides, so the token that reaches p is kept. Before the first it is 0.
        drop_BV = p_BV.cumsum(dim=-1) - p_BV >= options.top_p
        logits_BV = logits_BV.masked_fill(drop_BV.scatter(1, order_BV, drop_BV), -math.inf)
    return logits_BV


def sample(logits_BV: Tensor, options: GenerateOptions, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Draw one token a row from the filtered logits.

    Args:
        logits_BV: (B, V) logits of the next token.
        options: the filters.
        generators: one CPU generator a row, so that a row's draw depends on nothing but its own logits; None draws from
            torch's global generator.

    Returns:
        (B,) int64 token ids, on the device of the logits.
    """
    if options.temperature == 0:
        return logits_BV.argmax(dim=-1)
    # Drawn on the CPU: a seed then means the same draws on every device.
    p_BV = filter_logits(logits_BV, options).softmax(dim=-1).cpu()
    if generators is None:
        drawn_B = torch.multinomial(p_BV, 1)[:, 0]
    else:
        rows = zip(p_BV, generators, strict=True)
        drawn_B = torch.cat([torch.multinomial(p_V, 1, generator=generator) for p_V, generator in rows])
    return drawn_B.to(logits_BV.device)


def generate(
    model: GPT,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    options: GenerateOptions | None = None,
    tokenizer: tiktoken.Encoding | None = None,
) -> list[Completion]:
    """Continue one prompt or a batch of prompts of unequal length.

    A row's completion depends on its prompt, its seed and the options, not on its neighbours.

    Args:
        model: on any device, in any dtype, in training or evaluation mode (dropout is off meanwhile).
        prompts: a text, a list of texts, or a list of lists of token ids.
        options: defaults to `GenerateOptions()`.
        tokenizer: defaults to GPT-2's.

    Returns:
        one Completion a prompt, in order.

    Raises:
        ValueError: for an empty prompt, a token id outside the vocabulary, or more tokens than a learned position table
            has rows.
    """
    options, tokenizer = options or GenerateOptions(), tokenizer or get_tokenizer()
    texts: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = [_encode(prompt, tokenizer, model.config.vocab_size, f"prompt {i}") for i, prompt in enumerate(texts)]
    if not rows:
        raise ValueError("there are 0 prompts; give at least one")
    decoder = _Decoder(model, rows, options, tokenizer.n_vocab)
    writers = [TextWriter(tokenizer, options.stop, options.stop_at_eot) for _ in rows]
    with tqdm(total=options.max_new_tokens, unit="token", disable=not options.progress) as bar:
        for _ in range(options.max_new_tokens):
            for writer, token in zip(writers, decoder.step(), strict=True):
                if writer.reason is None:
                    writer.push(token)
            bar.update()
            if all(writer.reason for writer in writers):
                break
    for writer in writers:
        writer.finish()
    return [Completion(writer.text, writer.token_ids, writer.reason or "length") for writer in writers]


def stream(
    model: GPT,
    prompt: str | Sequence[int],
    options: GenerateOptions | None = None,
    tokenizer: tiktoken.Encoding | None = None,
) -> Iterator[str]:
    """Yield the completion of one prompt piece by piece; joined, the pieces are `generate`'s text.

    A piece is held back while its bytes end inside a character, or while it could be the start of a stop sequence.

    Args and raises: as in `generate`; bad arguments raise here, before the first piece is asked for.
    """
    options, tokenizer = options or GenerateOptions(), tokenizer or get_tokenizer()
    rows = [_encode(prompt, tokenizer, model.config.vocab_size, "the prompt")]
    decoder = _Decoder(model, rows, options, tokenizer.n_vocab)
    writer = TextWriter(tokenizer, options.stop, options.stop_at_eot)

    def pieces() -> Iterator[str]:
        steps = range(options.max_new_tokens)
        for _ in tqdm(steps, unit="token", disable=not options.progress):
            if piece := writer.push(decoder.step()[0]):
                yield piece
            if writer.reason:
                break
        if piece := writer.finish():
            yield piece

    return pieces()


class _Decoder:
    """Draws the next token of every row, over and over.

    Rows of unequal length are padded on the left, so that every row's next token is at the end. Padding has position
    -1, which no query may see, and a row's first token has position 0: no logit changes.
    """

    def __init__(self, model: GPT, rows: list[list[int]], options: GenerateOptions, n_vocab: int) -> None:
        block = model.config.block_size
        # The last token drawn is never fed, hence the 1.
        needed = max(map(len, rows)) + options.max_new_tokens - 1
        if options.context == "error" and needed > block:
            if model.config.pos == "learned":
                raise ValueError(
                    f"{needed} positions are needed (the longest prompt has {max(map(len, rows))} tokens, then "
                    f"{options.max_new_tokens} new ones), but block_size is {block}: the learned table has no row for "
                    'more; shorten the prompt or max_new_tokens, or let the context slide with context="slide"'
                )
            block = needed  # rotary positions have no table that ends
        self.model, self.options, self.n_vocab = model, options, n_vocab
        self.device = model.wte.weight.device
        # At a slide a quarter of the context is forgotten at once, not one token. Learned positions belong to the place
        # in the context, so a slide moves every token to a new position and all keys and values must be computed again.
        # One token a slide would do that for every token drawn; a quarter does it once in block_size / 4 tokens.
        self.block, self.keep = block, block - block // 4
        self.contexts = [self._slid(row) for row in rows]
        self.cache: KVCache | None = None
        seed = torch.Generator().seed() % 2**62 if options.seed is None else options.seed
        self.generators = [torch.Generator().manual_seed((seed + i) % 2**63) for i in range(len(rows))]

    def _slid(self, row: list[int]) -> list[int]:
        return row[-self.keep :] if len(row) > self.block else list(row)

    @torch.inference_mode()
    def step(self) -> list[int]:
        with evaluating(self.model):
            logits_BV = self._next_logits()
        if logits_BV.shape[1] > self.n_vocab:  # a head padded to a round size has ids that stand for nothing
            logits_BV[:, self.n_vocab :] = -math.inf
        drawn = sample(logits_BV, self.options, self.generators).tolist()
        for i, token in enumerate(drawn):
            self.contexts[i].append(token)
            if len(self.contexts[i]) > self.block:
                self.contexts[i] = self._slid(self.contexts[i])
                self.cache = None
        return drawn

    def _next_logits(self) -> Tensor:
        pos_BT: Tensor | None = None
        if self.cache is not None:
            idx_BT = self._tensor([row[-1:] for row in self.contexts])
        else:
            lengths = [len(row) for row in self.contexts]
            T = max(lengths)
            idx_BT = self._tensor([[0] * (T - len(row)) + row for row in self.contexts])
            # Without padding the model's own positions are right, and the fused kernel needs no mask.
            padded = min(lengths) < T
            pos_BT = left_padded_positions(self._tensor(lengths), T) if padded else None
            if self.options.use_cache:
                capacity = min(self.block, T + self.options.max_new_tokens)
                dtype = self.model.wte.weight.dtype
                self.cache = KVCache(self.model.config, len(lengths), capacity, self.device, dtype)
        h_BTC = self.model.hidden(idx_BT, pos_BT, self.cache)
        logits_BV: Tensor = self.model.lm_head(h_BTC[:, -1])
        return logits_BV

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _encode(prompt: str | Iterable[int], tokenizer: tiktoken.Encoding, vocab_size: int, name: str) -> list[int]:
    try:
        # index() refuses what int() would round or read: 1.5, "7".
        tokens = tokenizer.encode_ordinary(prompt) if isinstance(prompt, str) else [index(token) for token in prompt]
    except TypeError:
        raise ValueError(
            f"{name} is {prompt!r}, not a text or a list of token ids; put one list of ids into a list"
        ) from None
    if not tokens:
        raise ValueError(
            f"{name} is empty; the model needs one token to start from, such as end-of-text: [{tokenizer.eot_token}]"
        )
    if outside := [token for token in tokens if not 0 <= token < vocab_size]:
        raise ValueError(f"{name} has token id {outside[0]}; this model's ids go from 0 to {vocab_size - 1}")
    return tokens


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
