"""What happens to one process is decided for all: a signal, a loss that is not finite, held-out text that runs out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gpt2course.train.heldout import held_out_loss
from gpt2course.train.parallel import Strategy
from gpt2course.train.world import World
from tests.distributed.agreement_runs import (
    AT,
    HELD_OUT,
    TOO_LARGE,
    WINDOWS,
    Counting,
    Scene,
    Seen,
    all_at_three,
    held_out,
    one_window_at_a_time,
    run_scene,
)
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

N = 3
SHARDED = ("ddp", "fsdp")
SCENES = {
    **{f"{name}, {how}": Scene(name, how) for name in SHARDED for how in ("gradient", "loss")},
    **{f"{name}, signal": Scene(name, signal_at=AT) for name in SHARDED},
    **{f"{name}, for good": Scene(name, "loss", 99, options=(("max_bad_steps", 3),)) for name in SHARDED},
    **{
        f"{name}, for good, async": Scene(
            name, "gradient", 99, options=(("max_bad_steps", 3), ("async_save", True), ("save_every", 2))
        )
        for name in SHARDED
    },
    **{f"{name}, bug": Scene(name, "loss", each_for_itself=True) for name in SHARDED},
}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes saw, by rank."""
    return run_ranks(all_at_three, N, list(SCENES.values()), tmp_path_factory.mktemp("runs"), timeout=280)


def seen(three: list[dict[str, Any]], name: str) -> list[Seen]:
    """One scene, by rank."""
    return [rank["scenes"][list(SCENES).index(name)] for rank in three]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def problems_of_a_skip(ranks: list[Seen]) -> list[str]:
    """Whether all processes skipped step `AT` and no other, and went on."""
    found = []
    for rank, process in enumerate(ranks):
        moved = [not same(a, b) for a, b in zip(process.before, process.before[1:], strict=False)]
        if moved != [step != AT for step in range(len(moved))]:
            found.append(f"rank {rank} moved its weights in {[step for step, one in enumerate(moved) if one]}")
        if [row["skipped"] for row in process.rows] != [0] * AT + [1] * (12 - AT):
            found.append(f"rank {rank} counted {[row['skipped'] for row in process.rows]}")
    return found


@pytest.mark.parametrize("how", ["gradient", "loss"])
@pytest.mark.parametrize("name", SHARDED)
def test_a_bad_step_of_one_process_is_skipped_by_all(name: str, how: str, three: list[dict[str, Any]]) -> None:
    """A process that skips alone has other weights from then on (DDP), or other shards than their rest (FSDP)."""
    ranks = seen(three, f"{name}, {how}")
    assert problems_of_a_skip(ranks) == []
    for process in ranks:
        losses = torch.tensor([row["loss"] for row in process.rows])
        assert losses.isfinite().tolist() == [step != AT for step in range(12)]
        assert process.checkpoint == "step-00000012"
        assert torch.equal(process.saved_weight, process.whole_weight[1])
        assert torch.tensor(process.rows[AT]["grad_norm"]).isfinite() == (how == "loss")


@pytest.mark.parametrize("name", SHARDED)
def test_a_process_that_skips_alone_is_seen(name: str, three: list[dict[str, Any]]) -> None:
    """The bug that the agreement prevents, switched on."""
    found = problems_of_a_skip(seen(three, f"{name}, bug"))
    assert [text.split(" moved")[0] for text in found if "moved" in text] == ["rank 0", "rank 2"]


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("how", ["for good", "for good, async"])
def test_many_bad_steps_in_a_row_end_the_run_everywhere(name: str, how: str, three: list[dict[str, Any]]) -> None:
    """With a checkpoint that says why, loads, and holds the last good weights; also while another save is going on."""
    for process in seen(three, f"{name}, {how}"):
        reason = f"loss or gradient not finite in 3 steps in a row, up to step {AT + 3}"
        assert process.error.startswith(reason)
        assert "Use a learning_rate below 0.003" in process.error
        assert process.reason == reason
        assert process.checkpoint == f"step-{AT + 3:08d}"
        assert len(process.rows) == AT + 3
        assert same(process.before[AT], process.before[-1])
        assert not same(process.before[AT - 1], process.before[AT])
        assert torch.equal(process.saved_weight, process.whole_weight[1])
        assert not torch.equal(process.saved_weight, process.whole_weight[0])


def test_a_run_that_diverged_does_not_diverge_anew_at_each_start(tmp_path: Path) -> None:
    """torchrun starts it again; each time it would take max_bad_steps more, and log and save them."""
    (first, again, mended) = (
        run_scene(World(), Scene("single", poison, 99, options=(("max_bad_steps", 3),), begin=begin), tmp_path)
        for poison, begin in (("loss", AT), ("loss", 0), ("", 0))
    )
    assert [len(one.rows) for one in (first, again, mended)] == [AT + 3, 1, 3]
    assert again.error.startswith(f"loss or gradient not finite in 4 steps in a row, up to step {AT + 4}")
    assert torch.equal(again.saved_weight, first.saved_weight)
    assert mended.checkpoint == "step-00000012"
    assert [row["skipped"] for row in mended.rows] == [4, 4, 4]
    assert not torch.equal(mended.saved_weight, first.saved_weight)


@pytest.mark.parametrize("name", SHARDED)
def test_a_signal_to_one_process_stops_all_at_one_step(name: str, three: list[dict[str, Any]]) -> None:
    """A process that left its loop alone would keep the others waiting in the next sum; all must say why they ended."""
    for process in seen(three, f"{name}, signal"):
        assert process.stopped == "SIGTERM"
        assert len(process.rows) == AT + 1
        assert process.checkpoint == f"step-{AT + 1:08d}"
        assert torch.equal(process.saved_weight, process.whole_weight[1])


@pytest.mark.parametrize("name", SHARDED)
def test_a_loss_scale_that_overflows_is_halved_until_it_fits(name: str, three: list[dict[str, Any]]) -> None:
    """float16 on a CPU, for the logic: the steps that overflow are skipped; a resume knows the scale."""
    for rank in three:
        whole, parts, meta = rank["overflow"][name]
        keys = ("loss", "grad_norm", "lr", "skipped", "tokens", "val_loss")
        assert [[row.get(key) for key in keys if row.get(key) == row.get(key)] for row in whole] == [
            [row.get(key) for key in keys if row.get(key) == row.get(key)] for row in parts
        ]
        skipped = whole[-1]["skipped"]
        assert 1 <= skipped <= 20
        assert [row["skipped"] for row in whole] == [*range(1, skipped + 1), *[skipped] * (24 - skipped)]
        assert meta["loss_scale"]["factor"] == TOO_LARGE / 2**skipped
        assert meta["loss_scale"]["good_steps"] == 24 - skipped
        assert whole[-1]["loss"] < whole[0]["loss"]


@pytest.mark.parametrize("name", SHARDED)
def test_held_out_text_that_does_not_divide_evenly(
    name: str, three: list[dict[str, Any]], worst: Callable[[str, float], None]
) -> None:
    """Seven windows on three processes: nobody waits for ever, and no window counts twice."""
    expected = held_out(World(), "single")
    assert len(set(expected)) == len(WINDOWS)
    for rank in three:
        found = rank["held out"][name]
        assert found == three[0]["held out"][name]
        difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        worst(f"held-out loss, single against {name} on {N} processes", difference)
        assert difference <= 1e-6


def forward_passes(evaluate: Callable[..., float], n_windows: int) -> list[int]:
    """How many each of three processes makes."""
    counts = []
    for rank in range(N):
        model, world = Counting(), World(rank, N, rank)
        strategy = Strategy("fsdp", world, model, model, mock.Mock(), mock.MagicMock())
        with mock.patch.object(World, "sum", lambda self, *values: list(values)):
            evaluate(strategy, HELD_OUT, 16, 16 * n_windows, rows=1)
        counts.append(model.count)
    return counts


@pytest.mark.parametrize("n_windows", WINDOWS)
def test_every_process_makes_as_many_forward_passes(n_windows: int) -> None:
    """Under FSDP a forward pass is a collective: one more on one process is a dead-lock."""
    assert forward_passes(held_out_loss, n_windows) == [-(-n_windows // N)] * N
    assert len(set(forward_passes(one_window_at_a_time, n_windows))) > 1
