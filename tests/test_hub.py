"""Downloads against a stand-in for the hub on the loopback: slow, broken off, stalled, damaged, absent."""

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peers
import pytest
from hub_server import (
    Hub,
    Send,
    folder_as_repo,
    send_damaged,
    send_half_and_break,
    send_half_and_stall,
    send_slowly,
    serve,
)
from transformers import GPT2LMHeadModel

from gpt2course import hub as hub_module
from gpt2course.hub import CheckpointError, CorruptFileError, HubUnreachableError, Published, check_extents
from gpt2course.pretrained import load_checkpoint

REPO = "somebody/small-gpt2"
WEIGHTS = "model.safetensors"
CHUNK = 4096
ENVIRONMENT = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}


@pytest.fixture(scope="module")
def peer() -> GPT2LMHeadModel:
    return peers.random_peer(vocab_size=5000)


@pytest.fixture
def repo_files(peer: GPT2LMHeadModel, tmp_path: Path) -> dict[str, bytes]:
    return folder_as_repo(REPO, peers.write_folder(tmp_path / "upstream", peer))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def served(repo_files: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, with this process's client pointed at it and at an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    # What had come of the piece that was under way is asked for again; by default a piece is 10 MB.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", CHUNK)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with serve(repo_files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes one second of silence for a dead line, instead of ten."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1.0)


def size_of(hub: Hub) -> int:
    return len(hub.files[f"{REPO}/{WEIGHTS}"])


def test_a_download_is_loaded_and_the_second_load_needs_no_network(served: Hub, peer: GPT2LMHeadModel) -> None:
    """A cache that is filled and never used: half a gigabyte at every start."""
    ours = load_checkpoint(REPO)
    assert peers.logit_error(ours, peer, peers.token_ids(peer)) < 1e-4
    assert hub_module.is_cached(REPO)
    assert served.gets(WEIGHTS) == [None]
    load_checkpoint(REPO)
    assert served.gets(WEIGHTS) == [None]


@pytest.mark.usefixtures("impatient")
def test_a_slow_download_is_waited_for(served: Hub) -> None:
    """A time limit on the whole download instead of on silence: thin lines could never finish."""
    served.plan = [send_slowly]
    load_checkpoint(REPO)
    assert served.gets(WEIGHTS) == [None]
    assert served.sent == size_of(served)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("trouble", [send_half_and_break, send_half_and_stall])
def test_a_download_broken_off_goes_on_where_it_broke(trouble: Send, served: Hub, peer: GPT2LMHeadModel) -> None:
    """A download that starts again from nothing, or that keeps half a file."""
    served.plan = [trouble]
    ours = load_checkpoint(REPO)
    assert peers.logit_error(ours, peer, peers.token_ids(peer)) < 1e-4
    kept = size_of(served) // 2 // CHUNK * CHUNK
    assert kept > 0
    assert served.gets(WEIGHTS) == [None, f"bytes={kept}-"]
    assert served.sent == size_of(served) // 2 + size_of(served) - kept


def test_a_damaged_download_is_refused_and_the_next_try_works(served: Hub, cache: Path) -> None:
    """One wrong byte of the promised length: it would load, and it would stay in the cache for ever."""
    served.plan = [send_damaged]
    with pytest.raises(CorruptFileError, match=r"damaged.*deleted from the cache: run this again"):
        load_checkpoint(REPO)
    assert not hub_module.is_cached(REPO)
    assert not list(cache.rglob("*.incomplete"))
    load_checkpoint(REPO)
    assert served.gets(WEIGHTS) == [None, None]


def test_a_file_damaged_in_the_cache_is_found(served: Hub, cache: Path) -> None:
    """A disk that lost a byte after the download was checked."""
    load_checkpoint(REPO)
    (blob,) = (path for path in cache.rglob("blobs/*") if path.stat().st_size == size_of(served))
    with blob.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x00")
    with pytest.raises(CorruptFileError):
        load_checkpoint(REPO)


def test_a_pinned_file_must_have_the_pinned_hash_whatever_the_hub_says(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror that serves other weights, with a record that agrees with them."""
    good = hashlib.sha256(served.files[f"{REPO}/{WEIGHTS}"]).hexdigest()
    monkeypatch.setitem(hub_module.PUBLISHED, "pinned", Published(REPO, "0123456789abcdef" * 2 + "01234567", good))
    hub_module.fetch("pinned")
    monkeypatch.setitem(hub_module.PUBLISHED, "pinned", Published(REPO, "main", "0" * 64))
    with pytest.raises(CorruptFileError, match=r"expected 000000000000…"):
        hub_module.fetch("pinned")


def test_what_the_hub_does_not_have_is_said(served: Hub) -> None:
    """A stack trace with "404 Client Error" for a mistyped name, or for a repository of pickles."""
    with pytest.raises(CheckpointError, match="no public repository nobody/nothing"):
        load_checkpoint("nobody/nothing")
    del served.files[f"{REPO}/{WEIGHTS}"]
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors.*unpickling can run any code"):
        load_checkpoint(REPO)


def test_no_network_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner on a train who sees a stack trace instead of the way to go on."""
    with serve({}) as gone:
        endpoint = gone.endpoint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(HubUnreachableError, match=r"Check the network, or set HF_ENDPOINT.*open_model\(\"course\"\)"):
        load_checkpoint("gpt2")


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission denied")])
def test_a_full_disk_is_not_called_a_bad_network(
    number: int, says: str, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner with a full disk who is told to check the network."""

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OSError, match=rf"could not store config\.json .*{says}.*HF_HOME") as found:
        load_checkpoint(REPO)
    assert found.value.errno == number
    assert not isinstance(found.value, HubUnreachableError)


def test_a_wish_to_stay_offline_is_kept(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE set, and the network asked all the same."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError):
        load_checkpoint(REPO)
    assert served.requests == []


def test_the_environment_variables_work_in_a_fresh_process(
    repo_files: dict[str, bytes], cache: Path, tmp_path: Path
) -> None:
    """HF_ENDPOINT and HF_HOME read too early or too late to have any effect for a user."""
    program = f"from gpt2course.hub import fetch; print(fetch('{REPO}')[1])"
    with serve(repo_files) as hub:
        environment = os.environ | ENVIRONMENT | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache)}
        environment["TQDM_POSITION"] = "-1"  # shows the bar although stderr is no terminal
        environment.pop("HF_HUB_CACHE", None)
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(cache / "hub")
    assert WEIGHTS in done.stderr, "no progress bar was shown"
    asked = {filename for _, filename, _ in hub.requests}
    assert asked == {"config.json", WEIGHTS}, "the client asked for something else"


def safetensors_bytes(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not a safetensors file"),
        (b"<html>please log in to this network</html>", "not a safetensors file"),
        (safetensors_bytes(b"not json", b""), "header can't be read"),
        (safetensors_bytes(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"abc"), "its header says"),
        (safetensors_bytes(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', b"abcde"), "its header says"),
    ],
)
def test_the_extents_must_be_those_of_the_header(content: bytes, named: str, tmp_path: Path) -> None:
    """A login page saved as weights, a file cut off, a file with something behind it."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=named):
        check_extents(path)


def test_deleting_follows_every_link(tmp_path: Path) -> None:
    """A bad blob that stays behind its deleted name, so that the retry finds it again."""
    store, blob, name = tmp_path / "store", tmp_path / "blob", tmp_path / "name"
    store.write_bytes(b"bad")
    blob.symlink_to(store)
    name.symlink_to("blob")
    hub_module.delete_cached(name)
    assert not list(tmp_path.iterdir())
