"""The log of a run and its clock."""

import json
import math
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2course import GPT, GPTConfig
from gpt2course.train.comm import SumState, Traffic, Waiting, WireMeter
from gpt2course.train.metrics import PHASES, MetricsLog, PhaseClock, rank_path, read
from gpt2course.train.world import World

ALONE = World()
CPU = torch.device("cpu")


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "seconds": {"total": 0.1}, "memory": {"peak": 7}, **more}


def steps(path: Path) -> list[int]:
    return [r["step"] for r in read(path)]


def written(path: Path, last: int, first: int = 1, resume_step: int | None = None) -> bytes:
    with MetricsLog(path, ALONE, resume_step) as log:
        for step in range(first, last + 1):
            log.write(row(step))
    return path.read_bytes()


# ---- the log


@given(last=st.integers(0, 8), resume=st.integers(0, 10), cut=st.integers(0, 400), data=st.data())
def test_resume_drops_exactly_the_rows_past_its_step(
    tmp_path_factory: pytest.TempPathFactory, last: int, resume: int, cut: int, data: st.DataObject
) -> None:
    """Bugs: a step twice in the log after a restart; a new row glued to half of an old one; a good row lost."""
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    whole = written(path, last)
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    before = steps(path)
    assert before == list(range(1, len(before) + 1))
    written(path, resume + 2, resume + 1, resume)
    assert steps(path) == [*(step for step in before if step <= resume), resume + 1, resume + 2]
    assert not list(path.parent.glob("*.new"))


def test_a_cut_at_any_byte_loses_the_last_row_only(tmp_path: Path) -> None:
    """Bug: half a row, left by a kill, makes the whole log unreadable; or half a number is read as a number."""
    path = tmp_path / "metrics.jsonl"
    whole = written(path, 3)
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert len(read(path)) == sum(end <= length for end in ends)  # a row is whole before its end of line


def test_reading_while_writing_sees_whole_rows(tmp_path: Path) -> None:
    """Bug: rows that reach the file in pieces, or late, because they wait in a buffer."""
    path = tmp_path / "metrics.jsonl"
    counts = []
    with MetricsLog(path, ALONE) as log:
        writer = threading.Thread(target=lambda: [log.write(row(step)) for step in range(1, 401)])
        writer.start()
        while writer.is_alive():
            seen = steps(path)
            assert seen == list(range(1, len(seen) + 1))
            counts.append(len(seen))
        log.write(row(401))
        assert len(read(path)) == 401
    assert len(set(counts)) > 1


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    """Bug: a run that diverges writes NaN, which is no JSON, and every strict reader stops at that line."""
    path = tmp_path / "metrics.jsonl"
    bad = {"loss": math.nan, "grad_norm": math.inf, "seconds": {"total": -math.inf}, "mfu": None}
    with MetricsLog(path, ALONE) as log:
        log.write({"step": 1, **bad})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert next(iter(raw)) == "schema"
    assert raw["schema"] == 1
    (found,) = read(path)
    assert math.isnan(found["loss"])
    assert (found["grad_norm"], found["seconds"]["total"], found["mfu"]) == (math.inf, -math.inf, None)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    """Bug: a log of another version is plotted as if it meant the same, or a damaged one is cut without a word."""
    path = tmp_path / "metrics.jsonl"
    whole = written(path, 3).decode()
    path.write_text(whole.replace('"schema": 1, "step": 2', '"schema": 2, "step": 2'))
    for attempt in (lambda: read(path), lambda: MetricsLog(path, ALONE, 2)):
        with pytest.raises(ValueError, match=r"line 2: schema is 2, .* reads 1; use the version"):
            attempt()
    path.write_text(whole.replace('"step": 2', "st\0p: 2"))
    with pytest.raises(ValueError, match=r"line 2: .* is no row of a log; remove"):
        read(path)
    path.write_text("[1]\n" + whole)
    with pytest.raises(ValueError, match="line 1: schema is None"):
        read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "other.jsonl")


def test_each_process_has_its_small_file(tmp_path: Path) -> None:
    """Bugs: ranks that write into one file; files of ranks that are no more, with rows that never were."""
    path = tmp_path / "new folder" / "metrics.jsonl"

    def run(world_size: int, first: int, last: int, resume: int | None) -> None:
        logs = [MetricsLog(path, World(rank, world_size), resume) for rank in range(world_size)]
        for step in range(first, last + 1):
            for rank, log in enumerate(logs):
                log.write(row(step, seconds={"total": rank}))
        for log in logs:
            log.close()

    run(3, 1, 4, None)
    assert [r["seconds"]["total"] for r in read(rank_path(path, 2))] == [2] * 4
    assert set(read(rank_path(path, 1))[0]) == {"schema", "step", "seconds", "memory"}
    assert read(path)[0]["loss"] == 1.0
    run(2, 3, 5, 2)
    assert [steps(rank_path(path, rank)) for rank in range(3)] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2]]
    run(1, 1, 1, None)
    assert [steps(file) for file in sorted(path.parent.iterdir())] == [[1], [], [], [1]]


def test_a_row_cut_short_is_an_error(tmp_path: Path) -> None:
    """Bug: a full disk takes half a row, and the run goes on with a log that can't be read."""

    class Full:
        name = "metrics.jsonl"

        def write(self, line: bytes) -> int:
            return len(line) // 2

    log = MetricsLog(tmp_path / "metrics.jsonl", ALONE)
    log.close()
    log._files = [Full(), Full()]  # type: ignore[list-item]
    with pytest.raises(OSError, match="cut short; the disk may be full"):
        log.write(row(1))


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an ImportError of a package that nobody asked for, or a wish for it that fails after an hour of training."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        MetricsLog(tmp_path / "metrics.jsonl", ALONE, None, tmp_path / "board")
    MetricsLog(tmp_path / "metrics.jsonl", World(1, 2), None, tmp_path / "board").close()  # only rank 0 writes it

    seen: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            seen.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            seen.append("closed")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with MetricsLog(tmp_path / "metrics.jsonl", ALONE, 4, tmp_path / "board") as log:
        log.write({"step": 5, "loss": 2.5, "mfu": None, "seconds": {"total": 0.5}})
    assert seen == [(str(tmp_path / "board"), 5), ("loss", 2.5, 5), ("seconds/total", 0.5, 5), "closed"]


# ---- the clock


def busy(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_phases_add_up_and_waiting_is_taken_off_its_own() -> None:
    """Bugs: phases that overlap or leave time out; waiting counted as backward as well, or once for each of two calls
    that wait within each other; waiting before the step counted as the step's."""
    waiting = Waiting(World(0, 2), SumState())
    clock = PhaseClock(CPU, waiting)
    assert waiting.sums is not None
    with waiting.measured():
        busy(0.005)
    clock.start()
    busy(0.01)
    clock.mark("data")
    busy(0.02)
    clock.mark("forward")
    busy(0.01)
    with waiting.measured(), waiting.measured():
        busy(0.03)
    clock.mark("backward")
    busy(0.01)
    waiting.sums.last_started = time.perf_counter()
    busy(0.02)
    clock.mark("backward")
    seconds = clock.finish()
    total = seconds.pop("total")
    assert tuple(seconds) == PHASES
    assert sum(seconds.values()) == pytest.approx(total, abs=1e-9)
    expected = {"data": 0.01, "forward": 0.02, "backward": 0.02, "communication": 0.05, "optimizer": 0.0, "other": 0.0}
    for phase, least in expected.items():
        assert least <= seconds[phase] + 1e-9, f"{phase}: {seconds}"  # what is too much in one lacks in another
    assert waiting.take() == 0.0


def test_waiting_of_another_thread_does_not_count() -> None:
    """Bug: a checkpoint written in the background makes training look as if it waited, by more than a step takes."""
    waiting = Waiting(World(0, 2))

    def background() -> None:
        with waiting.measured():
            busy(0.01)

    with waiting:
        thread = threading.Thread(target=background)
        thread.start()
        thread.join()
    assert waiting.take() == 0.0


def test_a_process_alone_waits_for_nobody_and_cuda_cannot_tell() -> None:
    """Bug: a 0 that means "not measured", read as "no communication"."""
    cuda = torch.device("cuda", 0)
    assert Waiting(World()).take() == 0.0
    assert Waiting(World(device=cuda)).take() == 0.0
    assert Waiting(World(0, 2, 0, cuda)).take() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_the_clock_measures_the_gpu() -> None:
    """Bug: a clock of the CPU, which sees how fast work is queued: forward takes nothing, and the last phase all."""
    device = torch.device("cuda")
    clock = PhaseClock(device, Waiting(World(0, 2, 0, device)))
    a = torch.randn(4096, 4096, device=device)
    for _ in range(2):
        clock.start()
        for _ in range(20):
            a @ a
        clock.mark("forward")
        seconds = clock.finish()
    assert seconds["communication"] is None
    assert seconds["forward"] > 0.8 * seconds["total"]


def test_a_step_that_is_counted_is_compiled_as_well() -> None:
    """Bug: torch.compile leaves for good what it first meets under a dispatch mode, so counting the first step of a
    run would turn compiling off without a word."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    norm = torch.nn.LayerNorm(4)
    mlp = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=8)).h[0].mlp
    mlp.compile(backend=backend)
    with Traffic():
        mlp(norm(torch.ones(2, 4)))
    mlp(norm(torch.ones(2, 4)))
    torch._dynamo.reset()
    assert compiled


def test_the_wire_meter_reads_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: the column of received packets instead of sent bytes; another interface; a crash on macOS."""
    table = tmp_path / "dev"
    monkeypatch.setattr(WireMeter, "TABLE", table)
    assert WireMeter().take() is None
    text = "Inter-|\n face |bytes\n  eth0: 9 9 9 9 9 9 9 9 9 9\n    lo:{0} 2 0 0 0 0 0 0 {1} 2 0\n"
    table.write_text(text.format(5, 1000))
    meter = WireMeter()
    table.write_text(text.format(6, 1750))
    assert meter.take() == 750
    assert meter.take() == 0
    assert WireMeter("wlan0").take() is None
