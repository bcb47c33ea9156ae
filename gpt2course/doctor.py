"""What this machine can do, and what to mend: one line for each thing the course needs."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "fail"]
SIGNS = {"ok": "✓   ", "warn": "note", "fail": "FAIL"}
PYTHON_RANGE = (3, 11), (3, 14)
TORCH_MINIMUM = (2, 11)
DISK_ENOUGH, DISK_LEAST = 2.0, 0.2
RAM_ENOUGH = 4.0
INSTALL_AGAIN = "restore what was shipped: git checkout gpt2course/assets, or install gpt2course again"
INSTALL = "run ./scripts/lab.sh again, or: pip install -e '.[lab]' -c constraints.txt"


@dataclass(frozen=True)
class Check:
    """What one look at the machine found."""

    name: str
    status: Status
    """"ok", "warn" (the course runs, with something missing) or "fail" (it cannot run)"""
    detail: str
    mend: str = ""
    """what to do about it; empty if there is nothing to do"""


def gib(n_bytes: float) -> str:
    """Bytes as text in GiB."""
    return f"{n_bytes / 2**30:.1f} GiB"


def check_python() -> Check:
    lowest, above = PYTHON_RANGE
    detail = platform.python_version()
    if not lowest <= sys.version_info[:2] < above:
        return Check("Python", "fail", detail, "use Python 3.11, 3.12 or 3.13: delete .venv and run ./scripts/lab.sh")
    return Check("Python", "ok", detail)


def check_system() -> Check:
    name = f"{platform.system()} {platform.release().partition('-')[0]}, {platform.machine()}"
    if sys.platform == "win32":
        mend = "use WSL (wsl --install): launching several processes with torchrun does not work on Windows itself"
        return Check("System", "warn", f"{name}; chapters on one process run here", mend)
    if sys.platform == "darwin":
        lacks = "no NCCL (several processes use gloo), and processes are not ended with a kernel that is killed"
        if platform.machine() == "x86_64":
            mend = "use Linux, or a Mac with Apple silicon: torch 2.2 was the last with a wheel for Intel Macs"
            return Check("System", "warn", f"{name}; on macOS there is {lacks}, and no wheel of this torch", mend)
        return Check("System", "ok", f"{name}; on macOS there is {lacks}")
    return Check("System", "ok", name + (" (WSL)" if "microsoft" in platform.release().lower() else ""))


def check_torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", "fail", f"cannot be imported: {error}", INSTALL)
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or (int(found[1]), int(found[2])) < TORCH_MINIMUM:
        least = ".".join(map(str, TORCH_MINIMUM))
        return Check("torch", "fail", f"{torch.__version__}; the course needs {least} or newer", INSTALL)
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return Check("torch", "ok", f"{torch.__version__}, {build}")


def check_devices() -> Check:
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Check("Devices", "ok", "CPU, " + ", ".join(f"{p.name} ({gib(p.total_memory)})" for p in found))
    if torch.backends.mps.is_available():
        return Check("Devices", "ok", f"CPU, Apple GPU ({gib(torch.mps.recommended_max_memory())} for it)")
    if shutil.which("nvidia-smi") and sys.platform != "darwin":
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch does not see it"
        mend = f"install torch {torch.__version__.split('+')[0]} for your CUDA version, and see that nvidia-smi works"
        return Check("Devices", "warn", f"CPU only: there seems to be an NVIDIA GPU, but {why}", mend)
    return Check("Devices", "ok", "CPU only, which is enough for every chapter")


def check_cores() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if usable < 2:
        return Check("Cores", "warn", "1; what runs several processes will be slow", "use a machine with 2 or more")
    return Check("Cores", "ok", str(usable))


def check_memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{gib(memory.available)} free of {gib(memory.total)}"
    if memory.available < RAM_ENOUGH * 2**30:
        return Check("Memory", "warn", detail, f"close other programs; GPT-2 is at ease with {RAM_ENOUGH:.0f} GiB free")
    return Check("Memory", "ok", detail)


def check_cache() -> Check:
    from gpt2course.data.corpora import cache_dir

    elsewhere = "set GPT2COURSE_CACHE to a folder you may write, with room in it"
    try:
        folder = cache_dir()
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"written by the doctor")
            file.flush()
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return Check("Cache", "fail", f"cannot be written: {error}", elsewhere)
    detail = f"writable, {free:.1f} GiB free"
    if free < DISK_LEAST:
        return Check("Cache", "fail", f"{detail}; at least {DISK_LEAST} GiB are needed", elsewhere)
    if free < DISK_ENOUGH:
        return Check("Cache", "warn", f"{detail}; the GPT-2 weights take 0.5 GiB", elsewhere)
    return Check("Cache", "ok", detail)


def check_kernel() -> Check:
    try:
        from jupyter_client.kernelspec import KernelSpecManager
    except ImportError as error:
        return Check("Kernel", "fail", f"Jupyter is not installed: {error}", INSTALL)
    specs = KernelSpecManager().get_all_specs()
    register = (
        "with the course's Python: python -m ipykernel install --sys-prefix --name gpt2course --display-name gpt2course"
    )
    if "gpt2course" in specs:
        python = specs["gpt2course"]["spec"]["argv"][0]
        if shutil.which(python) is None:
            return Check("Kernel", "fail", f"gpt2course starts {python}, which is not there", register)
        if Path(python).parent != Path(sys.executable).parent:
            return Check("Kernel", "warn", f"gpt2course starts another Python: {python}", register)
        return Check("Kernel", "ok", "gpt2course is registered, and starts this Python")
    if "python3" in specs:
        return Check("Kernel", "warn", "gpt2course is not registered; chapters run in the kernel python3", register)
    return Check("Kernel", "fail", "neither gpt2course nor python3 is registered", register)


def check_vocabulary() -> Check:
    from gpt2course import tokenizer

    try:
        tokenizer.vocabulary_bytes()
    except Exception as error:  # a damaged file can fail in the decompressor, too
        return Check("Vocabulary", "fail", f"{tokenizer.VOCABULARY_FILE.name} is damaged: {error}", INSTALL_AGAIN)
    return Check("Vocabulary", "ok", f"GPT-2's, SHA-256 {tokenizer.VOCAB_BPE_SHA256[:12]}…")


def check_course_checkpoint() -> Check:
    from gpt2course.pretrained import COURSE

    try:
        lines = [line.split() for line in (COURSE / "SHA256SUMS").read_text().splitlines() if line.strip()]
        expected = {name.removeprefix("*"): digest for digest, name in lines}
        found = {name: hashlib.sha256((COURSE / name).read_bytes()).hexdigest() for name in expected}
    except (OSError, ValueError) as error:
        return Check("Course checkpoint", "fail", f"is not complete: {error}", INSTALL_AGAIN)
    if "model.safetensors" not in expected:
        return Check("Course checkpoint", "fail", "SHA256SUMS does not list model.safetensors", INSTALL_AGAIN)
    if damaged := sorted(name for name in expected if found[name] != expected[name]):
        return Check("Course checkpoint", "fail", f"damaged: {', '.join(damaged)}", INSTALL_AGAIN)
    return Check("Course checkpoint", "ok", f"SHA-256 {found['model.safetensors'][:12]}…")


def all_reduce(backend: str, world_size: int, timeout: float = 30.0) -> str:
    """Run a real all-reduce in `world_size` new processes. Returns what went wrong, or "" if the sum came out right."""
    from gpt2course.launch import child_environment

    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        command = [sys.executable, "-m", "gpt2course.allreduce_probe", backend]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(world_size), store],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=child_environment() | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        problem = ""
        for rank, process in enumerate(ranks):
            try:
                _, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                problem = problem or f"no answer from rank {rank} after {timeout:.0f} s"
                process.kill()
                process.communicate()
                continue
            if process.returncode:
                last = errors.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
                problem = problem or f"rank {rank}: {last[-1]}"
        return problem


def check_gloo() -> Check:
    problem = all_reduce("gloo", 2)
    if not problem:
        return Check("gloo", "ok", "all-reduce of two processes came out right")
    import torch.distributed  # only now: this check runs while torch is being imported

    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        return Check("gloo", "warn", "this torch is built without it", "install torch from its usual wheels")
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    mend = f"chapters on one process still run; try: export GLOO_SOCKET_IFNAME={loopback}"
    return Check("gloo", "warn", f"all-reduce of two processes failed: {problem}", mend)


def check_nccl() -> Check:
    import torch.distributed

    if not torch.cuda.is_available():
        return Check("NCCL", "ok", "not needed without an NVIDIA GPU")
    if not torch.distributed.is_nccl_available():
        return Check("NCCL", "warn", "this torch is built without it", "training on several GPUs needs Linux and NCCL")
    world_size = min(2, torch.cuda.device_count())
    what = f"all-reduce over {world_size} GPU{'s' if world_size > 1 else ''}"
    if problem := all_reduce("nccl", world_size):
        return Check("NCCL", "warn", f"{what} failed: {problem}", "run it again with NCCL_DEBUG=INFO to see why")
    return Check("NCCL", "ok", f"{what} came out right")


def check_gpt2_weights() -> Check:
    from gpt2course import hub

    without = "nothing to do: chapters use the course checkpoint instead"
    if hub.is_cached("gpt2"):
        return Check("GPT-2 weights", "ok", "cached")
    endpoint = hub.endpoint()
    if hub.offline_by_choice():
        return Check("GPT-2 weights", "warn", "not cached, and HF_HUB_OFFLINE is set", without)
    if hub.reachable(timeout=2.0):
        return Check("GPT-2 weights", "ok", f"not cached yet; {endpoint} answers, so they can be fetched (0.5 GiB)")
    return Check("GPT-2 weights", "warn", f"neither cached nor reachable at {endpoint}", without)


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_system,
    check_torch,
    check_devices,
    check_cores,
    check_memory,
    check_cache,
    check_kernel,
    check_vocabulary,
    check_course_checkpoint,
    check_gloo,
    check_nccl,
    check_gpt2_weights,
)


def _look(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        return Check(name, "warn", f"could not be looked at: {type(error).__name__}: {error}")


def run_checks() -> list[Check]:
    """Look at everything, the slow things at the same time. Takes a few seconds and never raises.

    The text of a check that is "ok" holds no path, so that chapter 00 can keep it among its outputs.
    """
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        # gloo takes longest, since its two processes import torch as well: they do so while this one does.
        early = {check: pool.submit(_look, check) for check in CHECKS if check is check_gloo}
        # torch once, before the other threads: its modules import each other, which threads could trip over.
        with contextlib.suppress(ImportError, OSError):
            import torch.distributed  # noqa: F401
        looks = [early.get(check) or pool.submit(_look, check) for check in CHECKS]
        return [look.result() for look in looks]


def can_run(checks: Sequence[Check]) -> bool:
    """Whether nothing failed."""
    return all(check.status != "fail" for check in checks)


def report(checks: Sequence[Check]) -> str:
    """One line for each check, the mend below it where there is one, and a verdict."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{SIGNS[check.status]} {check.name:<{width}}  {check.detail}")
        if check.mend:
            lines.append(f"{'':>{width + 7}}-> {check.mend}")
    lines.append(
        "The course can run here."
        if can_run(checks)
        else "The course cannot run here yet: mend what is marked FAIL, then run `gpt2course doctor` again."
    )
    return "\n".join(lines)


def to_json(checks: Sequence[Check]) -> str:
    """The same for programs: {"can_run": bool, "checks": [{"name", "status", "detail", "mend"}, …]}."""
    return json.dumps({"can_run": can_run(checks), "checks": [asdict(check) for check in checks]}, indent=2)
