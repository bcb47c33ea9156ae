"""Checks of chapter 08, the sliding window. Each usual mistake is tried first, so that the message can name it.

Legend: T query positions, S key positions, W window.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpt2course.checks.base import Wrong, exercise, require, same_number, same_tensor
from gpt2course.flops import visible_pairs
from gpt2course.masks import visible


@exercise("08.1 The rule with a window and sinks")
def window_mask(answer: Callable[[Tensor, Tensor, int, int], Tensor]) -> str:
    """The learner's `window_mask(q_pos_T, k_pos_S, window, sinks)`."""
    pos = torch.arange(9)
    q, k = pos[:, None], pos[None, :]
    for window, sinks in ((3, 0), (1, 0), (3, 2)):
        want = visible(pos, pos, window, sinks)
        got = answer(pos, pos, window, sinks)
        name = f"the mask for window = {window}, sinks = {sinks}"
        if isinstance(got, Tensor) and got.dtype == torch.bool and got.shape == want.shape:
            explain_mask(got, want, q, k, window, sinks)
        same_tensor(got, want, name)
    # A chunk of three queries over a ring of window 4: the keys lie out of order, and two slots are empty.
    q_pos, k_pos = torch.tensor([3, 4, 5]), torch.tensor([0, 1, 2, -1, -1, 3, 4, 5])
    got = answer(q_pos, k_pos, 3, 1)
    if isinstance(got, Tensor) and got.dtype == torch.bool and got.shape == (3, 8):
        require(
            not got[:, 3:5].any(),
            "an empty slot (position -1) is visible: -1 is smaller than the number of sinks, so ask for k >= 0 as well",
        )
    same_tensor(got, visible(q_pos, k_pos, 3, 1), "for queries at 3, 4, 5 over a cache with empty slots the mask")
    return "right with and without sinks, for window 1, and over a cache with empty slots"


def explain_mask(got: Tensor, want: Tensor, q: Tensor, k: Tensor, window: int, sinks: int) -> None:
    """Say which part of the rule is wrong, with the first cell that shows it."""
    if torch.equal(got, want):
        return
    label = f"window = {window}, sinks = {sinks}"
    for row, column in torch.nonzero(got & (k > q)).tolist()[:1]:
        why = "; a sink in the future is still the future" if sinks and column < sinks else ""
        raise Wrong(f"{label}: row {row}, column {column}: the query at position {row} sees the future{why}")
    if not sinks:
        for off, seen in ((1, window + 1), (-1, window - 1)):
            if torch.equal(got, visible(q[:, 0], k[0], window + off) & (k <= q)):
                raise Wrong(
                    f"{label}: a query sees {seen} keys; the window counts the query's own key, so q - k < window"
                )
        require(not torch.equal(got, k <= q), f"{label}: the window is ignored, every query sees all of its past")
        return
    near = visible(q[:, 0], k[0], window)
    require(not torch.equal(got, near), f"{label}: the sinks are ignored; keys below {sinks} stay visible")
    if torch.equal(got, near | ((k <= sinks) & (k <= q))):
        raise Wrong(f"{label}: {sinks + 1} keys are kept; the sinks are positions 0 to {sinks - 1}, so k < sinks")
    if torch.equal(got, near & (k < sinks)):
        raise Wrong(f"{label}: a key must be near AND a sink here; one of the two is enough")


@exercise("08.2 How many pairs")
def count_pairs(answer: Callable[[int, int, int], int]) -> str:
    """The learner's `count_pairs(T, window, sinks)`."""
    T, W = 10, 3
    got = answer(T, W, 0)
    slips = {
        T * (T + 1) // 2: "the whole triangle: the window is ignored",
        T * W: "window keys for every query, but the first queries have fewer behind them: query t has only t + 1",
        sum(
            min(t, W) for t in range(T)
        ): "query t gets min(t, window) keys, but it sees itself too: min(t + 1, window)",
        sum(min(t + 1, W + 1) for t in range(T)): "a late query gets window + 1 keys; the window counts its own key",
        sum(
            min(t + 1, W - 1) for t in range(T)
        ): "a late query gets window - 1 keys; the window counts its own key once",
    }
    if got != visible_pairs(T, W) and got in slips:
        raise Wrong(f"T = 10, window 3: you say {got}, that is {slips[got]}")
    same_number(got, visible_pairs(T, W), "the number of pairs for T = 10, window 3")
    same_number(answer(5, 8, 0), 15, "the number of pairs for T = 5 and a window of 8, longer than the text,")
    got, want = answer(T, W, 2), visible_pairs(T, W, 2)
    slips = {
        visible_pairs(T, W): "the same as without sinks",
        visible_pairs(T, W)
        + 2 * T: "two more for every query; while a sink is still in the window it is counted twice",
        visible_pairs(T, W)
        + 2 * (T - W): "two more for every query past the window; the first of those has only one sink "
        "that has left its window, the other is counted twice",
    }
    if got != want and got in slips:
        raise Wrong(f"T = 10, window 3, 2 sinks: you say {got}, that is {slips[got]}")
    same_number(got, want, "the number of pairs for T = 10, window 3, 2 sinks")
    for T, W, sinks in ((1, 1, 0), (64, 16, 4), (64, 3, 7), (20, 20, 3), (21, 20, 3)):
        same_number(
            answer(T, W, sinks),
            visible_pairs(T, W, sinks),
            f"the number of pairs for T = {T}, window {W}, {sinks} sinks",
        )
    return "equal to the sum of the mask, with and without sinks, also for a window longer than the text"


@exercise("08.3 How far back")
def reach(answer: Callable[[int, int, int, str], int]) -> str:
    """The learner's `reach(T, n_layer, window, pattern)`."""

    def right(T: int, n_layer: int, window: int, pattern: str) -> int:
        kinds = [pattern[layer % len(pattern)] for layer in range(n_layer)]
        return T if "L" in kinds else min(T, n_layer * (window - 1) + 1)

    got = answer(10**6, 1, 8, "S")
    require(got != 7, "one layer with window 8: you say 7, the others it sees; the last position itself counts as well")
    same_number(got, 8, "the reach of one layer with window 8")
    got = answer(10**6, 6, 8, "S")
    slips = {
        48: "6 times 8; each layer adds only window - 1 positions, since its own position is counted already",
        42: "6 times 7; the last position itself counts as well",
        8: "the window of a single layer; the layer below has looked back from each of those positions already",
        8**6: "8 to the power of 6; the windows of neighbours overlap, so each layer adds window - 1 positions",
        10**6: "all of the text; no layer here sees it whole",
    }
    if got in slips:
        raise Wrong(f"6 layers with window 8: you say {got}, that is {slips[got]}")
    same_number(got, 43, "the reach of 6 layers with window 8")
    same_number(answer(20, 6, 8, "S"), 20, "the reach in a text of only 20 positions")
    got = answer(1000, 6, 8, "SSSL")
    require(
        got != 43,
        "with SSSL you still say 43; the fourth layer sees everything below it, so the last position reaches "
        "all of the text",
    )
    same_number(got, 1000, "the reach of 6 layers with the pattern SSSL")
    got = answer(1000, 3, 8, "SSSL")
    require(got != 1000, "3 layers never get to the L of SSSL: the pattern is repeated, not squeezed in")
    for case in (
        (1000, 3, 8, "SSSL"),
        (1000, 5, 4, "S"),
        (1000, 4, 1, "S"),
        (50, 2, 8, "LS"),
        (500, 9, 8, "SSSSSSSSSL"),
    ):
        T, n_layer, window, pattern = case
        same_number(answer(*case), right(*case), f"the reach for T = {T}, {n_layer} layers, window {window}, {pattern}")
    return "L (W - 1) + 1, never more than the text, and all of it as soon as one layer is full"


@exercise("08.4 The slot of a position")
def ring_slot(answer: Callable[[int, int, int], int]) -> str:
    """The learner's `ring_slot(position, window, sinks)`."""
    for position, want in ((0, 0), (7, 7), (19, 3), (8, 0)):
        got = answer(position, 8, 0)
        if got != want and got == position % 9:
            raise Wrong(f"position {position}, window 8: you say slot {got}, as if the ring had 9 slots; it has 8")
        same_number(got, want, f"the slot of position {position} in a ring of 8")
    window, sinks = 6, 2
    slots = [answer(position, window, sinks) for position in range(40)]
    wants = [p if p < sinks else sinks + (p - sinks) % window for p in range(40)]
    if slots != wants:
        explain_slots(slots, window, sinks)
    for position, (slot, want) in enumerate(zip(slots, wants, strict=True)):
        same_number(slot, want, f"the slot of position {position} in a ring of {window} with {sinks} sinks")
    for window, sinks in ((1, 0), (1, 3), (4, 4)):
        want = sinks + (30 - sinks) % window
        same_number(answer(30, window, sinks), want, f"the slot of position 30 with window {window} and {sinks} sinks")
    return "the sinks keep their slots for ever, the others go round, without sinks and with 1 to 4"


def explain_slots(slots: list[int], window: int, sinks: int) -> None:
    """Say what would happen to a cache with these slots."""
    label = f"window {window}, {sinks} sinks"
    for position, slot in enumerate(slots):
        if not 0 <= slot < window + sinks:
            raise Wrong(f"{label}: position {position} goes to slot {slot}; there are {window + sinks}, from 0 on")
        if position >= sinks and slot < sinks:
            raise Wrong(
                f"{label}: position {position} goes to slot {slot} and overwrites a sink, which must stay for ever; "
                f"the ring has only the slots from {sinks} on"
            )
        recent = range(max(sinks, position - window + 1), position)
        if clash := [p for p in recent if slots[p] == slot]:
            raise Wrong(
                f"{label}: position {position} overwrites position {clash[0]}, only {position - clash[0]} back and "
                f"still in the window; the ring has {window} slots beside the sinks', so take mod {window}"
            )
    if slots[sinks] != sinks:
        raise Wrong(
            f"{label}: position {sinks} goes to slot {slots[sinks]} and leaves slot {sinks} empty; nothing is lost by "
            "it, but count from the first position after the sinks, so that the slots fill up in order"
        )
