"""The doctor: what it says of a good machine, of a broken one, and that it always says it."""

import hashlib
import http.server
import json
import lzma
import re
import shutil
import socket
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gpt2course import cli, doctor, hub, pretrained, tokenizer
from gpt2course.doctor import Check

Patch = pytest.MonkeyPatch


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def checks() -> list[Check]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", closed_port())
        patch.setattr(hub, "is_cached", lambda name: False)
        return doctor.run_checks()


@pytest.mark.distributed
def test_this_machine_can_run_the_course(checks: list[Check]) -> None:
    """A doctor that calls a healthy machine ill."""
    assert not [check for check in checks if check.status == "fail"]
    assert len({check.name for check in checks}) == len(doctor.CHECKS)


@pytest.mark.distributed
def test_weights_out_of_reach_are_only_a_note(checks: list[Check]) -> None:
    """The course runs without them; a failure here would lock out everyone without a network."""
    (weights,) = (check for check in checks if check.name == "GPT-2 weights")
    assert weights.status == "warn"
    assert "course checkpoint" in weights.mend


@pytest.mark.distributed
def test_good_news_holds_no_path(checks: list[Check]) -> None:
    """Chapter 00 keeps the report among its outputs, where a path of one machine must not be."""
    good = [check for check in checks if check.status == "ok"]
    assert len(good) > 5
    assert not [check for check in good if re.search(r"(?<!\w)/\w|[A-Z]:\\", check.detail) or check.mend]


def vocabulary_not_compressed(patch: Patch, tmp_path: Path) -> None:
    (tmp_path / "vocabulary").write_bytes(b"not xz at all")
    patch.setattr(tokenizer, "VOCABULARY_FILE", tmp_path / "vocabulary")


def vocabulary_changed(patch: Patch, tmp_path: Path) -> None:
    changed = tokenizer.vocabulary_bytes().replace(b"\xc4\xa0 t\n", b"\xc4\xa0 u\n")
    assert changed != tokenizer.vocabulary_bytes()
    (tmp_path / "vocabulary").write_bytes(lzma.compress(changed))
    patch.setattr(tokenizer, "VOCABULARY_FILE", tmp_path / "vocabulary")


def vocabulary_missing(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(tokenizer, "VOCABULARY_FILE", tmp_path / "nowhere")


def checkpoint(patch: Patch, tmp_path: Path, sums: str | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    if sums is not None:
        (tmp_path / "SHA256SUMS").write_text(sums)
    patch.setattr(pretrained, "COURSE", tmp_path)


def checkpoint_changed(patch: Patch, tmp_path: Path) -> None:
    checkpoint(patch, tmp_path, f"{hashlib.sha256(b'other weights').hexdigest()}  model.safetensors\n")


def checkpoint_without_sums(patch: Patch, tmp_path: Path) -> None:
    checkpoint(patch, tmp_path, None)


def checkpoint_with_garbled_sums(patch: Patch, tmp_path: Path) -> None:
    checkpoint(patch, tmp_path, "model.safetensors\n")


def checkpoint_not_listed(patch: Patch, tmp_path: Path) -> None:
    checkpoint(patch, tmp_path, "")


def cache_not_writable(patch: Patch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    patch.setenv("GPT2COURSE_CACHE", str(tmp_path / "file" / "cache"))


def disk_full(patch: Patch, tmp_path: Path) -> None:
    patch.setenv("GPT2COURSE_CACHE", str(tmp_path))
    usage = namedtuple("usage", "total used free")
    patch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**40, 2**20))


def no_kernel(patch: Patch, tmp_path: Path) -> None:
    patch.setattr("jupyter_client.kernelspec.KernelSpecManager.get_all_specs", lambda self: {})


def dead_kernel(patch: Patch, tmp_path: Path) -> None:
    spec = {"gpt2course": {"resource_dir": "", "spec": {"argv": [str(tmp_path / "gone/bin/python")]}}}
    patch.setattr("jupyter_client.kernelspec.KernelSpecManager.get_all_specs", lambda self: spec)


def old_python(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(doctor, "PYTHON_RANGE", ((3, 90), (3, 99)))


def new_python(patch: Patch, tmp_path: Path) -> None:
    patch.setattr(doctor, "PYTHON_RANGE", ((3, 1), (3, 9)))


def old_torch(patch: Patch, tmp_path: Path) -> None:
    patch.setattr("torch.__version__", "2.9.1+cpu")


def no_torch(patch: Patch, tmp_path: Path) -> None:
    patch.setitem(__import__("sys").modules, "torch", None)


FAILURES: list[tuple[Callable[[Patch, Path], None], Callable[[], Check], str]] = [
    (vocabulary_not_compressed, doctor.check_vocabulary, "git checkout"),
    (vocabulary_changed, doctor.check_vocabulary, "git checkout"),
    (vocabulary_missing, doctor.check_vocabulary, "git checkout"),
    (checkpoint_changed, doctor.check_course_checkpoint, "git checkout"),
    (checkpoint_without_sums, doctor.check_course_checkpoint, "git checkout"),
    (checkpoint_with_garbled_sums, doctor.check_course_checkpoint, "git checkout"),
    (checkpoint_not_listed, doctor.check_course_checkpoint, "git checkout"),
    (cache_not_writable, doctor.check_cache, "GPT2COURSE_CACHE"),
    (disk_full, doctor.check_cache, "GPT2COURSE_CACHE"),
    (no_kernel, doctor.check_kernel, "ipykernel install"),
    (dead_kernel, doctor.check_kernel, "ipykernel install"),
    (old_python, doctor.check_python, "lab.sh"),
    (new_python, doctor.check_python, "lab.sh"),
    (old_torch, doctor.check_torch, "lab.sh"),
    (no_torch, doctor.check_torch, "lab.sh"),
]


@pytest.mark.parametrize(("break_it", "check", "mend"), FAILURES, ids=[case[0].__name__ for case in FAILURES])
def test_what_the_course_needs_fails_with_exit_1_and_the_mend(
    break_it: Callable[[Patch, Path], None],
    check: Callable[[], Check],
    mend: str,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A broken machine that is called fine, or called broken without a word on what to do."""
    monkeypatch.setattr(doctor, "CHECKS", (check,))
    break_it(monkeypatch, tmp_path)
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("FAIL ")
    assert mend in shown
    assert "cannot run here yet" in shown


def test_whole_checkpoint_is_told_from_a_damaged_one(tmp_path: Path, monkeypatch: Patch) -> None:
    """The counterpart of the failures above: the same files with the right hash pass."""
    checkpoint(monkeypatch, tmp_path, f"{hashlib.sha256(b'weights').hexdigest()} *model.safetensors\n")
    assert doctor.check_course_checkpoint().status == "ok"


def test_little_room_is_a_note(tmp_path: Path, monkeypatch: Patch) -> None:
    """Half a GiB of weights does not fit, but the course does."""
    monkeypatch.setenv("GPT2COURSE_CACHE", str(tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**39, 2**30))
    assert doctor.check_cache().status == "warn"


def test_a_kernel_of_another_python_is_a_note(monkeypatch: Patch) -> None:
    """The kernel of an older clone, which imports the older clone's package."""
    sh = shutil.which("sh")
    assert sh
    spec = {"gpt2course": {"resource_dir": "", "spec": {"argv": [sh]}}}
    monkeypatch.setattr("jupyter_client.kernelspec.KernelSpecManager.get_all_specs", lambda self: spec)
    found = doctor.check_kernel()
    assert found.status == "warn"
    assert "another Python" in found.detail


@pytest.mark.parametrize(("system", "says"), [("win32", "WSL"), ("darwin", "NCCL")])
def test_systems_say_what_cannot_work_there(system: str, says: str, monkeypatch: Patch) -> None:
    """A reader on Windows or macOS who finds out in chapter 11."""
    monkeypatch.setattr("sys.platform", system)
    found = doctor.check_system()
    assert says in found.detail + found.mend
    assert found.status != "fail"


@pytest.mark.parametrize(("machine", "status"), [("x86_64", "warn"), ("arm64", "ok")])
def test_an_intel_mac_is_told_that_torch_has_no_wheel_for_it(machine: str, status: str, monkeypatch: Patch) -> None:
    """An install that fails with "no matching distribution", on a machine that nothing is said to be wrong with."""
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: machine)
    found = doctor.check_system()
    assert found.status == status
    assert ("Intel" in found.mend) is (machine == "x86_64")


def test_a_check_that_breaks_is_a_note_and_the_others_go_on(monkeypatch: Patch) -> None:
    """One odd driver that keeps the doctor from saying anything at all."""

    def check_odd_driver() -> Check:
        raise RuntimeError("driver says no")

    monkeypatch.setattr(doctor, "CHECKS", (check_odd_driver, doctor.check_python))
    odd, python = doctor.run_checks()
    assert (odd.name, odd.status) == ("odd driver", "warn")
    assert "driver says no" in odd.detail
    assert python.status == "ok"


def test_report_has_one_line_a_check_and_the_mend_below() -> None:
    """A mend that is found, but never shown."""
    text = doctor.report([Check("One", "ok", "fine"), Check("Other thing", "warn", "not so", "do this")])
    one, other, mend, verdict = text.splitlines()
    assert one.split() == ["✓", "One", "fine"]
    assert other.split()[:3] == ["note", "Other", "thing"]
    assert mend.strip() == "-> do this"
    assert verdict == "The course can run here."


def test_json_says_the_same(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that reads "can_run" and gets text."""
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python, lambda: Check("Cache", "fail", "full", "make room")))
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["can_run"] is False
    assert found["checks"][1] == {"name": "Cache", "status": "fail", "detail": "full", "mend": "make room"}


@pytest.mark.distributed
def test_all_reduce_is_a_real_one() -> None:
    """A check that passes whatever the processes do: here they ask for a backend that does not exist."""
    assert doctor.all_reduce("gloo", 2, timeout=120) == ""
    assert "carrier-pigeon" in doctor.all_reduce("carrier-pigeon", 1, timeout=120).lower()


@pytest.mark.distributed
def test_all_reduce_that_hangs_is_ended_and_leaves_no_process() -> None:
    """A firewall that swallows packets would hang the doctor, and with it `lab.sh`, for ever."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    assert "no answer" in doctor.all_reduce("gloo", 2, timeout=0.05)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_gloo_that_fails_is_a_note_with_a_mend(monkeypatch: Patch) -> None:
    """The chapters on one process run all the same."""
    monkeypatch.setattr(doctor, "all_reduce", lambda backend, world_size: "rank 1: connection refused")
    found = doctor.check_gloo()
    assert found.status == "warn"
    assert "connection refused" in found.detail
    assert "GLOO_SOCKET_IFNAME" in found.mend


def test_a_torch_without_gloo_is_told_from_a_gloo_that_fails(monkeypatch: Patch) -> None:
    """A mend about network interfaces for a torch that has no gloo to send anything with."""
    monkeypatch.setattr(doctor, "all_reduce", lambda backend, world_size: "rank 0: no such backend")
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    found = doctor.check_gloo()
    assert (found.status, found.detail) == ("warn", "this torch is built without it")


class Answering(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[tuple[type[Answering], str]]:
    handler = type("Handler", (Answering,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


@pytest.mark.parametrize(("status", "answers"), [(200, True), (403, True), (503, False)])
def test_hub_answers(server: tuple[type[Answering], str], status: int, answers: bool, monkeypatch: Patch) -> None:
    """A mirror that refuses HEAD with 403 is there; one that is down with 503 is not."""
    handler, address = server
    handler.status = status
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert hub.reachable() is answers


def test_hub_that_never_answers_costs_no_more_than_the_limit(monkeypatch: Patch) -> None:
    """A firewall that accepts and says nothing would hold up every start."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert not hub.reachable(timeout=0.2)
        assert time.monotonic() - started < 5


def test_a_name_that_is_looked_up_for_ever_costs_no_more_than_the_limit(monkeypatch: Patch) -> None:
    """A dead name server holds up a load for a minute: the time limit of a connection does not count for the name."""
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: released.wait(60) and [])
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    started = time.monotonic()
    assert not hub.reachable(timeout=0.2)
    assert time.monotonic() - started < 5
    released.set()


def test_cached_weights_need_no_connection(monkeypatch: Patch) -> None:
    """A start without network that waits for the hub although the weights are here."""
    monkeypatch.setattr(hub, "is_cached", lambda name: name == "gpt2")
    monkeypatch.setattr(hub, "reachable", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert doctor.check_gpt2_weights() == Check("GPT-2 weights", "ok", "cached")


def test_weights_within_reach_are_good_news(server: tuple[type[Answering], str], monkeypatch: Patch) -> None:
    """`HF_ENDPOINT` names the mirror to ask, and the mirror is the one that is shown."""
    monkeypatch.setattr(hub, "is_cached", lambda name: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", server[1])
    found = doctor.check_gpt2_weights()
    assert found.status == "ok"
    assert server[1] in found.detail
