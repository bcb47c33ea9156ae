"""A run that was stopped goes on as if nothing had happened: to the bit; with other processes, on the same curve."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2course import GPT
from gpt2course.data import prepare
from gpt2course.train import RunData, World, load_data, loop, metrics
from gpt2course.train.checkpoint import load, tensors
from gpt2course.train.optim import make_optimizer
from tests.distributed.made_runs import TINY, Case, MadeText, strategy_of
from tests.distributed.ranks import run_ranks
from tests.distributed.resume_runs import MUTANTS, STEPS, Leg, Part, run_legs, settings

pytestmark = pytest.mark.distributed

HALF = STEPS // 2
LOSS, WEIGHTS = 2e-6, 5e-5  # as in test_one_curve
KINDS: dict[str, dict[str, Any]] = {
    "dropout": {"options": (("save_every", 3), ("keep_last", 9))},
    "uneven, accumulated": {"grad_accum_steps": 3, "uneven": True},
    "bf16": {"options": (("precision", "bf16"),)},
    "async": {"options": (("async_save", True), ("save_every", 3), ("keep_last", 9))},
}
LOST = [mutant for mutant in MUTANTS if mutant]


def three(name: str, strategy: str, **how: Any) -> list[Leg]:
    """An undisturbed run, and one in two halves."""
    return [
        Leg(f"{name}-whole", strategy, **how),
        Leg(f"{name}-parts", strategy, until=HALF, **how),
        Leg(f"{name}-parts", strategy, **how),
    ]


def chain(run: str, *links: str, ends: tuple[int | None, ...]) -> list[Leg]:
    """One run, its legs on different strategies, without dropout: its masks depend on the number of processes."""
    return [
        Leg(run, strategy, end, grad_accum_steps=3, uneven=True, dropout=0.0)
        for strategy, end in zip(links, ends, strict=True)
    ]


ON_TWO = [
    leg for name in ("ddp", "fsdp") for kind, how in KINDS.items() for leg in three(f"{name}-{kind}", name, **how)
]
ON_TWO += [leg for mutant in LOST for leg in three(f"ddp-{mutant}", "ddp", mutant=mutant)]
ALONE = [leg for kind, how in KINDS.items() for leg in three(f"single-{kind}", "single", **how)]
ALONE += [leg for mutant in LOST for leg in three(f"single-{mutant}", "single", mutant=mutant)]
ON_THREE = [leg for name in ("ddp", "fsdp") for leg in three(f"{name}-three", name, grad_accum_steps=2)]
CHAINS = {
    "fsdp 4, fsdp 2, single": chain("a", "fsdp", "fsdp", "single", ends=(7, 14, None)),
    "fsdp 2, ddp 2, single": chain("b", "fsdp", "ddp", "single", ends=(7, 14, None)),
    "single, fsdp 3": chain("c", "single", "fsdp", ends=(9, None)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[Part]]:
    """The runs of one process, by folder."""
    return by_run(ALONE, run_legs(World(), ALONE, folder))


@pytest.fixture(scope="module")
def on_two(folder: Path) -> list[dict[str, list[Part]]]:
    """The runs of two processes, by rank."""
    return [by_run(ON_TWO, parts) for parts in run_ranks(run_legs, 2, ON_TWO, folder, timeout=280)]


@pytest.fixture(scope="module")
def chains(folder: Path) -> tuple[dict[str, list[Part]], list[dict[str, list[Part]]]]:
    """The parts of the runs whose processes change, by run, each as its first process saw it; and the runs of three
    processes, by rank, which share a launch with them.
    """
    (a4, a2, a1), (b2, b2ddp, b1), (c1, c3) = CHAINS.values()
    done = run_ranks(run_legs, 4, [a4], folder, timeout=280)[0]
    done += run_ranks(run_legs, 2, [a2, b2, b2ddp], folder, timeout=280)[0]
    done += run_legs(World(), [a1, b1, c1], folder)
    on_three = run_ranks(run_legs, 3, [c3, *ON_THREE], folder, timeout=280)
    done.append(on_three[0][0])
    return by_run([a4, a2, b2, b2ddp, a1, b1, c1, c3], done), [by_run(ON_THREE, parts[1:]) for parts in on_three]


def by_run(legs: list[Leg], parts: list[Part]) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for leg, part in zip(legs, parts, strict=True):
        found.setdefault(leg.run, []).append(part)
    return found


def differences(whole: Part, parts: list[Part]) -> list[str]:
    """What is not bit for bit the same in an undisturbed run and in one of several parts."""
    rows = [row for part in parts for row in part.rows]
    assert len(rows) == len(whole.rows) == STEPS
    found = [
        f"{key} of step {a['step']}: {a.get(key)}, {b.get(key)}"
        for a, b in zip(whole.rows, rows, strict=True)
        for key in a.keys() | b.keys()
        if a.get(key) != b.get(key)
    ]
    assert whole.state.keys() == parts[-1].state.keys()
    return found + [name for name, t in whole.state.items() if not torch.equal(t, parts[-1].state[name])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_a_stopped_run_goes_on_to_the_bit(strategy: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Every row of the log, held-out losses too, and every weight and average of Adam's are the undisturbed run's."""
    ranks = [request.getfixturevalue("alone")] if strategy == "single" else request.getfixturevalue("on_two")
    for runs in ranks:
        (whole,), (first, second) = runs[f"{strategy}-{kind}-whole"], runs[f"{strategy}-{kind}-parts"]
        assert (first.first_step, len(first.rows), first.stopped, first.checkpoint) == (
            0,
            HALF,
            "SIGTERM",
            "step-00000010",
        )
        assert (second.first_step, second.stopped, second.checkpoint) == (HALF, "", "step-00000020")
        assert differences(whole, [first, second]) == []
        assert [row["step"] for row in whole.rows if "val_loss" in row] == [5, 10, 15, 20]
        assert not torch.equal(whole.state["model.wte.weight"], first.state["model.wte.weight"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_three_processes_go_on_to_the_bit(strategy: str, chains: tuple[Any, list[dict[str, list[Part]]]]) -> None:
    """The sum of three numbers depends on their order, that of two does not: DDP has other buckets in its first step,
    which after a start is another step than in the undisturbed run.
    """
    for runs in chains[1]:
        (whole,), parts = runs[f"{strategy}-three-whole"], runs[f"{strategy}-three-parts"]
        assert differences(whole, parts) == []


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_what_is_saved_while_training_goes_on_is_what_was(
    strategy: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    """A save in the background that did not copy holds weights of several steps, and loads without a complaint."""
    request.getfixturevalue("alone" if strategy == "single" else "on_two")
    for step in (3, 6, 9, 12, 15, 18, 20):
        states = []
        for kind in ("dropout", "async"):
            model = GPT(TINY)
            optimizer = make_optimizer(model.parameters())
            load(folder / f"{strategy}-{kind}-whole" / "checkpoints" / f"step-{step:08d}", model, optimizer)
            states.append(tensors(model, optimizer))
        assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


@pytest.mark.parametrize("mutant", LOST)
@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_what_a_resume_can_lose_is_seen(strategy: str, mutant: str, request: pytest.FixtureRequest) -> None:
    """A proof that a bug passes proves nothing. The first half is the same; the second must not be."""
    for runs in [request.getfixturevalue("alone")] if strategy == "single" else request.getfixturevalue("on_two"):
        (whole,), parts = runs[f"{strategy}-{mutant}-whole"], runs[f"{strategy}-{mutant}-parts"]
        found = differences(whole, parts)
        assert any(text.startswith("loss of step") for text in found)
        assert "loss of step 10" not in "".join(found)
        assert "model.wte.weight" in found
        assert curve_difference(whole, parts) > 10 * LOSS


def curve_difference(whole: Part, parts: list[Part]) -> float:
    """The largest of the loss, at any step."""
    losses = [row["loss"] for part in parts for row in part.rows]
    return max(abs(row["loss"] - loss) for row, loss in zip(whole.rows, losses, strict=True))


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_goes_on_with_other_processes_on_one_curve(
    name: str, chains: tuple[dict[str, list[Part]], Any], tmp_path: Path, worst: Callable[[str, float], None]
) -> None:
    """A shard that lands on the wrong process, or an average that stays behind, bends the curve at the change."""
    legs = CHAINS[name]
    whole = run_legs(World(), [replace(legs[0], strategy="single", until=None)], tmp_path)[0]
    parts = chains[0][legs[0].run]
    assert [part.first_step for part in parts] == [0, *(leg.until for leg in legs[:-1])]
    loss = curve_difference(whole, parts)
    weight = max((whole.state[key] - t).abs().max().item() for key, t in parts[-1].state.items())
    worst(f"loss a step, single against {name} (fp32)", loss)
    worst(f"weights and averages after {STEPS} steps, single against {name} (fp32)", weight)
    assert loss <= LOSS
    assert weight <= WEIGHTS


# Refusals and the log, in one process: they depend on nothing else


def go(out: Path, fingerprint: str = "made", stop: Callable[[dict[str, Any]], None] | None = None, **how: Any) -> Any:
    """Train in one process."""
    config = settings(out, **how)
    return loop.train(
        config, strategy_of(Case("single"), config, World()), RunData(MadeText(), None, fingerprint), on_step=stop
    )


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is done."""
    out = tmp_path_factory.mktemp("used")
    go(out, steps=6)
    return out


def test_never_is_refused_in_a_used_folder(used: Path) -> None:
    """A second run that writes its checkpoints among those of the first destroys one of the two."""
    with pytest.raises(
        ValueError, match=r"holds a run, saved at step-00000006; choose another --out, or --resume auto"
    ):
        go(used, resume="never")


def test_never_does_not_refuse_torchruns_own_restart(used: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart repeats the command, and finds the folder used by the attempt before it."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert go(used, resume="never").first_step == 6


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, ["seed: 0 in the checkpoint, 1 now"]),
        ({"batch_size": 24}, ["batch_size: 12 in the checkpoint, 24 now"]),
        ({"fingerprint": "other"}, ["data: made in the checkpoint, other now"]),
        ({"seed": 1, "batch_size": 24}, ["seed: 0", "batch_size: 12"]),
    ],
)
def test_another_runs_batches_are_refused_with_the_difference(
    changes: dict[str, Any], named: list[str], used: Path
) -> None:
    """Going on with other batches would replay some and skip others, and no curve would show it."""
    with pytest.raises(ValueError, match="is of a run on other batches") as caught:
        go(used, **{"steps": 6, **changes})
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert len(lines) == len(named)
    assert all(line.startswith(f"  - {name}") for line, name in zip(lines, named, strict=True))


def test_the_fingerprint_is_of_the_text_alone(tmp_path: Path) -> None:
    """Another seed was told as another seed and another text, and one looked for a corpus that had not changed."""

    def fingerprint(folder: Path, **changes: Any) -> str:
        return load_data(settings(tmp_path, corpus=str(folder), **changes), World()).fingerprint

    made = []
    for word in ("one", "two"):
        text = tmp_path / f"{word}.txt"
        text.write_text("\n".join(f"{word} {i}" for i in range(99)))
        made.append(prepare(text, tmp_path / word, val_fraction=0.3, progress=False).folder)
    assert fingerprint(made[0]) == fingerprint(made[0], seed=1, batch_size=24)
    assert fingerprint(made[0]) != fingerprint(made[1])


def test_rows_past_the_restored_step_are_dropped(tmp_path: Path) -> None:
    """A killed run has logged steps that its newest checkpoint does not know; they come again, and once is enough."""
    whole = go(tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 7:
            raise Killed

    with pytest.raises(Killed):
        go(tmp_path / "run", save_every=4, stop=kill)
    log = tmp_path / "run" / "metrics.jsonl"
    assert [row["step"] for row in metrics.read(log)] == [1, 2, 3, 4, 5, 6, 7]
    with log.open("a") as file:
        file.write('{"schema": 1, "step": 8, "lo')  # as a kill leaves it
    result = go(tmp_path / "run", save_every=4)
    assert result.first_step == 4
    rows = metrics.read(log)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == whole.losses
    assert [row["step"] for row in metrics.read(metrics.rank_path(log, 0))] == list(range(1, STEPS + 1))


def test_resume_takes_the_path_of_a_checkpoint(tmp_path: Path) -> None:
    """A run may branch off from an earlier one, in a folder of its own."""
    first = go(tmp_path / "first", save_every=4, keep_last=9)
    path = tmp_path / "first" / "checkpoints" / "step-00000008"
    branch = go(tmp_path / "branch", resume=str(path))
    assert branch.first_step == 8
    assert branch.losses == first.losses[8:]
    # torchrun's restart repeats the command: what the branch has done since must not be thrown away.
    again = go(tmp_path / "branch", resume=str(path))
    assert again.first_step == branch.first_step + len(branch.losses)
    with pytest.raises(ValueError, match=r"holds a run, saved at step-000000\d\d, which did not begin at"):
        go(tmp_path / "first", resume=str(tmp_path / "branch" / "checkpoints" / path.name))
