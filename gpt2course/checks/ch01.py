"""Chapter 01: pairs, merges, encoding by rank, inputs and targets, rows by rank.

Legend: B rows of the global batch, T positions, N windows.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gpt2course.checks.base import Wrong, exercise, require, same_tensor, same_value, short
from gpt2course.tokenizer import get_tokenizer, ranks_from_merges, vocabulary_bytes

Words = dict[tuple[str, ...], int]

# The example of Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword Units".
SENNRICH: Words = {tuple("low"): 5, tuple("lower"): 2, tuple("newest"): 6, tuple("widest"): 3}


def asked_pair(best_pair: Callable[..., Any], words: Words, why: str, want: tuple[str, str]) -> None:
    """Require this pair for these words; `why` says what a wrong one has probably missed."""
    got = best_pair(words)
    if got == "".join(want):
        raise Wrong(f"{short(got)} is the two tokens glued together; return the pair itself, {want}")
    if not isinstance(got, tuple) or len(got) != 2 or not all(isinstance(token, str) for token in got):
        raise Wrong(f"the answer is {short(got)}; return one pair of tokens, such as {want}, and nothing else")
    require(got == want, f"for {words} you gave {got}, expected {want}: {why}")


@exercise("01.1 The most frequent pair")
def best_pair(answer: Callable[..., Any]) -> str:
    """`best_pair(words) -> (left, right)`; words are tuples of tokens with their counts."""
    asked_pair(answer, {("a", "b"): 1}, "a word of two tokens has one pair", ("a", "b"))
    asked_pair(
        answer, {tuple("xy"): 1, tuple("xyz"): 1, tuple("pq"): 9}, "a word seen 9 times counts 9 times", ("p", "q")
    )
    crossing: Words = {("a",): 6, ("b", "c"): 2}
    asked_pair(answer, crossing, "a pair lies inside one word; it never runs from a word into the next", ("b", "c"))
    twice: Words = {("b", "a", "n", "a", "n"): 2, ("u", "p"): 3}
    asked_pair(answer, twice, "a pair that stands twice in a word counts twice", ("a", "n"))
    asked_pair(answer, {("th", "e"): 3, ("h", "e"): 2}, "'th' is one token here, not two letters", ("th", "e"))
    asked_pair(answer, SENNRICH, "('e', 's') and ('s', 't') both occur 9 times, and the first met wins", ("e", "s"))
    return "counts weigh, words do not touch, and the first of equals wins"


@exercise("01.2 One merge")
def merge(answer: Callable[..., Any]) -> str:
    """`merge(ids, pair, new_id) -> list of ids`."""

    def asked(ids: list[int], pair: tuple[int, int], want: list[int], why: str) -> None:
        got = answer(ids, pair, 256)
        if isinstance(got, list) and got != want:
            raise Wrong(f"merge({ids}, {pair}, 256) gave {short(got)}, expected {want}: {why}")
        same_value(got, want, f"merge({ids}, {pair}, 256)")

    asked([7, 1, 2, 9], (1, 2), [7, 256, 9], "1 followed by 2 becomes 256, all else stays")
    asked([1, 2, 5, 1, 2], (1, 2), [256, 5, 256], "every place where the pair stands is merged, the last one too")
    asked([5, 1], (1, 2), [5, 1], "the last token has no neighbour on its right, and it stays")
    asked([2, 1], (1, 2), [2, 1], "the order counts: 2 followed by 1 is another pair")
    asked([97, 97, 97], (97, 97), [256, 97], "a token is used once; go from left to right and step over both")
    asked([97] * 4, (97, 97), [256, 256], "after a merge, go on behind BOTH tokens of the pair")
    asked([], (1, 2), [], "no tokens, nothing to merge")
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 100, (200,), generator=generator).tolist()
    want = [ord(letter) for letter in "".join(map(chr, letters)).replace("ab", chr(256))]
    asked(letters, (97, 98), want, "some of 200 random tokens are merged wrongly")
    return "each pair once, from left to right, also in 'aaa'"


def merged_by(piece: bytes, ranks: dict[bytes, int], choose: Callable[[list[int | None]], int | None]) -> list[int]:
    """Merge neighbours until `choose`, given the rank of each neighbouring pair (None: no merge), names no place."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while (at := choose([ranks.get(left + right) for left, right in pairwise(parts)])) is not None:
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def places(found: list[int | None]) -> list[tuple[int, int]]:
    """(rank, place) of the pairs that can be merged."""
    return [(rank, i) for i, rank in enumerate(found) if rank is not None]


def longest_match(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The longest token that fits, again and again from the left: what BPE does NOT do."""
    ids = []
    while piece:
        length = next(n for n in range(len(piece), 0, -1) if piece[:n] in ranks)
        ids.append(ranks[piece[:length]])
        piece = piece[length:]
    return ids


USUAL_MISTAKES: dict[str, Callable[[bytes, dict[bytes, int]], list[int]]] = {
    "you took the longest token from the left; BPE merges neighbours, lowest rank first": longest_match,
    "you merged the first pair from the left that can be merged; the one of the LOWEST rank goes first": lambda p, r: (
        merged_by(p, r, lambda found: min((i for _, i in places(found)), default=None))
    ),
    "you merged the pair of the HIGHEST rank first; the one learned first has the lowest": lambda p, r: merged_by(
        p, r, lambda found: max(places(found), default=(0, None))[1]
    ),
    "no two tokens were merged": lambda p, r: [r[p[i : i + 1]] for i in range(len(p))],
}


@exercise("01.3 Encode by rank")
def encode_by_rank(answer: Callable[..., Any]) -> str:
    """`encode_by_rank(piece, ranks) -> list of ids`."""
    small = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"ab": 4, b"abc": 5}
    gpt2 = ranks_from_merges(vocabulary_bytes())
    public = get_tokenizer()
    pieces = [
        "a",
        " asynchronously",
        " undetermined",
        " subprocess",
        " operands",
        "unhappiness",
        "mississippi",
        "aaaaaaa",
    ]
    pieces += [" naïveté", "中文", " antidisestablishmentarianism"]
    cases = [(b"abc", small, [5]), (b"abab", small, [4, 4]), (b"cab", small, [2, 4])]
    cases += [(piece.encode(), gpt2, public.encode_ordinary(piece)) for piece in pieces]
    for piece, ranks, want in cases:
        got = answer(piece, ranks)
        if got == want:
            continue
        if isinstance(got, list) and got and all(isinstance(token, bytes) for token in got):
            raise Wrong(f"for {piece!r} you gave {short(got)}: these are the tokens; return their ids, ranks[token]")
        for mistake, wrong_way in USUAL_MISTAKES.items():
            if got == wrong_way(piece, ranks):
                raise Wrong(f"for {piece!r} you gave {short(got)}, expected {want}: {mistake}")
        same_value(got, want, f"ids of {piece!r}")
    return f"equal to tiktoken on {len(pieces)} pieces, lowest rank first"


@exercise("01.4 Inputs and targets")
def inputs_and_targets(answer: Callable[..., Any]) -> str:
    """`inputs_and_targets(tokens, block_size) -> (inputs_NT, targets_NT)`."""
    for length, T in ((13, 4), (15, 4), (9, 8), (7, 1)):
        tokens = torch.arange(100, 100 + length)
        N = (length - 1) // T
        want_x = tokens[: N * T].view(N, T)
        got = answer(tokens, T)
        require(
            isinstance(got, tuple | list) and len(got) == 2, f"return two tensors, inputs and targets, not {short(got)}"
        )
        x_NT, y_NT = got
        place = f"{length} tokens, block_size {T}"
        if isinstance(x_NT, Tensor) and isinstance(y_NT, Tensor) and x_NT.shape == y_NT.shape:
            explain_shift(x_NT, y_NT, N, T, place)
        same_tensor(x_NT, want_x, f"{place}: inputs")
        same_tensor(y_NT, want_x + 1, f"{place}: targets")
    return "each target is the token that follows its input, and no token is a target twice"


def explain_shift(x_NT: Tensor, y_NT: Tensor, N: int, T: int, place: str) -> None:
    """Name the usual mistakes. The tokens count up by one, so that a target must be its input plus one."""
    require(x_NT.ndim == 2, f"{place}: inputs have shape {tuple(x_NT.shape)}, expected one row a window, ({N}, {T})")
    require(
        not torch.equal(x_NT, y_NT),
        f"{place}: targets equal inputs; the model would be asked for the token that it was just given",
    )
    require(
        not torch.equal(x_NT - 1, y_NT),
        f"{place}: targets are the token BEFORE each input; the model would be asked for the past",
    )
    starts = x_NT[:, 0].tolist()
    if len(starts) > N and starts == list(range(100, 100 + len(starts))):
        raise Wrong(
            f"{place}: a window starts at every token; it starts at every {T}th, so that none is a target twice"
        )
    if T > 1 and starts == list(range(100, 100 + len(starts) * (T + 1), T + 1)) and len(starts) > 1:
        lost = 100 + T + 1
        raise Wrong(
            f"{place}: windows of T + 1 tokens that do not overlap; token {lost} is never a target, "
            "so let each window start at the last token of the one before"
        )


@exercise("01.5 The rows of a rank")
def rows_of_rank(answer: Callable[..., Any]) -> str:
    """`rows_of_rank(batch_size, rank, world_size) -> list of row numbers`."""
    for B, world_size in ((8, 1), (8, 2), (12, 3), (10, 4), (7, 3), (3, 5)):
        rows = [answer(B, rank, world_size) for rank in range(world_size)]
        for rank, of_rank in enumerate(rows):
            if not isinstance(of_rank, list | range) or not all(type(row) is int for row in of_rank):
                raise Wrong(f"rank {rank} of {world_size}: return a list of row numbers, not {short(of_rank)}")
        told = f"batch_size {B} on {world_size} ranks gives {short([list(of_rank) for of_rank in rows], 90)}"
        every = [row for of_rank in rows for row in of_rank]
        if 1 < world_size < B and list(rows[0]) == list(rows[1]):
            raise Wrong(f"{told}: ranks 0 and 1 read the same rows, so the second computes nothing new")
        missing, strange = sorted(set(range(B)) - set(every)), sorted(set(every) - set(range(B)))
        require(not strange, f"{told}: there is no row {short(strange)}; rows run from 0 to {B - 1}")
        require(len(set(every)) == len(every), f"{told}: some row is read twice")
        require(not missing, f"{told}: nobody reads row {', '.join(map(str, missing))}")
        require(every == list(range(B)), f"{told}: each rank takes rows that follow one another, rank 0 the first ones")
        lengths = [len(of_rank) for of_rank in rows]
        require(
            max(lengths) - min(lengths) <= 1,
            f"{told}: the ranks have {lengths} rows; let them differ by one at most, since all wait for the longest",
        )
    return "every row is read once, whatever the number of ranks"
