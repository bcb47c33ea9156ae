"""`gpt2course bench attention` on a miniature: what is written, what is counted, what is said. Never how fast."""

import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from gpt2course import cli
from gpt2course.bench import attention, decoding
from gpt2course.bench.decoding import MHA, MQA, RING, Decoding, filled, measure_sharing, variants
from gpt2course.bench.report import Report, command_line, load, memory_line, recorded
from gpt2course.bench.summary import summary, targets
from gpt2course.bench.training import Length, measure_length
from gpt2course.config import PRESETS, GPTConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report() -> Report:
    return attention.run(quick=True)


def made_up(report: Report, slowed: float = 1.0) -> Report:
    """The report of a machine that does as hoped; `slowed` makes GQA's times longer."""
    lengths = [
        Length(T, "blocked", [T * T / 1e9] * 3, [T * 0.9e-6] * 3, 4 * T, 5 * T, T * T, T)
        for T in (1024, 2048, 4096, 8192)
    ]
    costs = {MHA: (0.02, 4e-6), "GQA-4": (0.018 * slowed, 2e-6 * slowed), MQA: (0.017, 1e-6), RING: (0.02, 0.0)}
    cells = [
        Decoding(name, context, [fixed + each * context] * 3, 1000)
        for name, (fixed, each) in costs.items()
        for context in (1024, 4096, 16384)
    ]
    return replace(report, training=lengths, decoding=cells)


def test_the_report_is_whole_and_comes_back(report: Report, tmp_path: Path) -> None:
    """Bug: a field that is no JSON, a report that can't be read again, a picture that is none."""
    data, picture = attention.save(report, tmp_path / "new" / "folder")
    assert load(data) == report
    record = json.loads(data.read_text(encoding="utf-8"))
    assert record["schema"] == 1
    assert {"command", "machine", "torch", "threads", "omp_wait_policy", "training", "decoding"} <= record.keys()
    assert len(record["training"]) == 3
    assert {row["variant"] for row in record["decoding"]} == {MHA, "GQA-4", MQA, RING}
    assert all(len(row["seconds"]) == 12 for row in record["decoding"])
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 500


def test_the_report_does_not_name_the_machine_or_its_owner(report: Report, tmp_path: Path) -> None:
    """Bug: a host name or a home folder is published with the figures."""
    text = attention.save(report, tmp_path)[0].read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    for private in (str(Path.home()), platform.node()):
        assert len(private) < 5 or private not in text  # "/" and "cpu" stand in every report


def test_another_schema_is_refused(report: Report, tmp_path: Path) -> None:
    """Bug: an old file is read as if its fields meant the same."""
    data, _ = attention.save(report, tmp_path)
    data.write_text(data.read_text(encoding="utf-8").replace('"schema": 1', '"schema": 0'), encoding="utf-8")
    with pytest.raises(ValueError, match="not a report of schema 1"):
        load(data)


def test_ratios_are_of_one_run(report: Report) -> None:
    """Bug: times of different rounds are compared, or the ratio is turned round."""
    for p in report.training:
        shares = sorted(w / f for w, f in zip(p.window_seconds, p.full_seconds, strict=True))
        assert p.ratio.median == pytest.approx(shares[len(shares) // 2])


def test_cache_bytes_are_the_formula(report: Report) -> None:
    """Bug: bytes of buffers that are not the cache, or of a cache with room for more than the context."""
    layers, heads, D = 2, 12, 8
    for d in report.decoding:
        G = {MHA: heads, "GQA-4": 4, MQA: 1, RING: heads}[d.variant]
        slots = 8 if d.variant == RING else d.context
        assert d.cache_bytes == 2 * 4 * layers * G * D * slots


@pytest.mark.parametrize("name", [MHA, MQA, RING])
def test_a_filled_cache_leaves_room_for_the_tokens_to_decode(name: str) -> None:
    """Bug: a context of 1,024 that is measured at 10 positions, or overflows at the last token."""
    config = variants(attention.QUICK_SHAPE, 4, 8)[name]
    cache = filled(config, 32, 5, CPU, torch.float32)
    assert cache.length == 27
    assert cache.key_positions(1).max() == 26
    assert all((k[:, :, : min(8, cache.length)].abs().sum(dim=-1) > 0).all() for k in cache.k)


def test_a_cache_of_another_size_than_the_formula_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the table says that bytes equal the formula, and nobody looked."""
    monkeypatch.setattr(decoding, "cache_bytes", lambda *_: 1)
    with pytest.raises(RuntimeError, match="bytes, not 1"):
        filled(attention.QUICK_SHAPE, 32, 5, CPU, torch.float32)


def test_the_ways_to_share_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the slow ways are slow since they compute something else."""
    outputs: dict[str, torch.Tensor] = {}
    config = variants(attention.QUICK_SHAPE, 4, 8)
    plain, grouped = (filled(config[name], 32, 1, CPU, torch.float32) for name in (MHA, "GQA-4"))

    def each_once(cases, repeats, device):  # type: ignore[no-untyped-def]
        for name, case in cases.items():
            seen: list[torch.Tensor] = []
            attention_of = case.args[0]
            case.func(lambda q, k, v, f=attention_of, seen=seen: seen.append(f(q, k, v)), case.args[1])
            outputs[name] = torch.stack(seen)
        return {name: [1.0] for name in cases}

    monkeypatch.setattr(decoding, "interleaved", each_once)
    ways = [sharing.way for sharing in measure_sharing(12, plain, grouped, 1, CPU)]
    first, *others = (outputs[way] for way in ways if way != MHA)
    assert len(others) == 2
    assert all((first - other).abs().max() < 1e-6 for other in others)


def test_work_and_memory_of_a_window_grow_with_T() -> None:
    """Bug: the figures are of full attention. Both are counted, not timed."""
    rows = [measure_length(T, 128, 2, 8, 1, CPU, torch.float32) for T in (4096, 6144, 8192)]
    assert [row.path for row in rows] == ["blocked"] * 3
    work, memory = ([getattr(row, name) for row in rows] for name in ("window_flops", "window_peak_bytes"))
    assert work[2] - work[1] == work[1] - work[0]
    assert memory[2] - memory[1] == memory[1] - memory[0]
    full = [row.full_flops for row in rows]
    assert full[2] - full[1] > 1.3 * (full[1] - full[0])


def test_targets_that_are_met_and_missed(report: Report) -> None:
    """Bug: every verdict is "met" whatever came out, or a miss is hidden."""
    good = made_up(report)
    assert [t.verdict for t in targets(good)] == ["met"] * 8
    assert memory_line(good).slope == pytest.approx(5.0)

    slow_window = replace(
        good, training=[replace(p, window_seconds=[s**2 * 1e3 for s in p.window_seconds]) for p in good.training]
    )
    assert [t.verdict for t in targets(slow_window)][:3] == ["met", "missed", "missed"]
    slow_gqa = targets(made_up(report, slowed=1.5))
    assert [t.verdict for t in slow_gqa][5:] == ["met", "missed", "met"]
    rising = replace(
        good, decoding=[replace(d, variant={MHA: RING, RING: MHA}.get(d.variant, d.variant)) for d in good.decoding]
    )
    assert targets(rising)[5].verdict == "missed"


def test_a_miniature_is_no_verdict(report: Report) -> None:
    """Bug: "met" or "missed" printed for sizes nobody asked about."""
    said = [t.verdict for t in targets(report)]
    assert said == [*["not measured"] * 4, "met", *["not measured"] * 3]


def test_the_summary_shows_every_figure(report: Report) -> None:
    """Bug: a table that leaves out a variant, a length or a verdict."""
    text = summary(made_up(report))
    for word in ("1,024", "8,192", "16,384", MHA, "GQA-4", MQA, RING, "R²", "blocked", "met: ", "ns a position"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 130


def test_the_command_that_is_recorded() -> None:
    """Bug: the record can't be made again, since the flags that made it are lost."""
    defaults = {"quick": False, "repeats": 9, "lengths": (1, 2), "device": "cpu"}
    assert command_line(defaults, defaults) == "gpt2course bench attention"
    flags = {"quick": True, "repeats": 3, "lengths": (4, 5), "device": "cpu"}
    assert command_line(flags, defaults) == "gpt2course bench attention --quick --repeats 3 --lengths 4 5"


def test_the_default_is_gpt2_small_with_rotary_positions() -> None:
    """Bug: figures of another shape than the text says."""
    shapes = variants(PRESETS["gpt2"].with_(pos="rope"), 4, 256)
    assert {(s.n_layer, s.n_head, s.head_dim, s.vocab_size) for s in shapes.values()} == {(12, 12, 64, 50257)}
    assert [s.kv_heads for s in shapes.values()] == [12, 4, 1, 12]
    assert isinstance(shapes[RING], GPTConfig)
    assert shapes[RING].window == 256


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lengths": (64, 128)}, "lengths are .*three different"),
        ({"contexts": (37,), "repeats": 9}, "more than the 37 tokens"),
        ({"contexts": ()}, "contexts are"),
        ({"repeats": 0}, "repeats is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: dict[str, object], said: str) -> None:
    """Bug: minutes of measuring before an error, or an error deep in the cache."""
    with pytest.raises(ValueError, match=said):
        attention.run(**flags)  # type: ignore[arg-type]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the flags do not reach the benchmark, or a missed target is an error of the user."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert cli.main(["bench", "attention", "--quick", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Decoding: 2 layers" in shown
    made = load(tmp_path / "attention.json")
    assert made.command == "gpt2course bench attention --quick"
    assert made.omp_wait_policy == "passive"
    assert cli.main(["bench", "attention", "--lengths", "64", "--out", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"window": -5}, "window is -5"),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"lengths": (0, 1, 2)}, "each at least 1"),
        ({"device": "cuda:99"}, "can't be used here"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(flags: dict, message: str) -> None:
    """Bug: minutes of measuring, and then a traceback."""
    with pytest.raises(ValueError, match=message):
        attention.run(**flags)


def test_the_record_that_comes_with_the_course_meets_its_targets() -> None:
    """Bug: a record of a quick run, or of a version that was slower, is shown in chapter 08."""
    report = recorded()
    assert report.command == "gpt2course bench attention"
    assert [target.hope for target in targets(report) if not target.met] == []
