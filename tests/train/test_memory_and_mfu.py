"""What a process holds, and how well it uses a GPU."""

from collections.abc import Iterator

import psutil
import pytest
import torch

from gpt2course import GPT, GPTConfig
from gpt2course.flops import training_flops
from gpt2course.train.metrics import mfu, peak_bytes, tensor_memory
from gpt2course.train.peaks import peak_flops
from gpt2course.train.world import World


def test_memory_counts_each_piece_once() -> None:
    """Bugs: a tied weight twice; a bucket once for every gradient that is a view of it; step counters forgotten."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=11))
    optimizer = torch.optim.AdamW(model.parameters())
    size = 4 * model.num_params()
    assert tensor_memory(model, optimizer) == {"parameters": size, "gradients": 0, "optimizer": 0}
    bucket = torch.zeros(model.num_params())
    start = 0
    for p in model.parameters():
        p.grad = bucket[start : start + p.numel()].view_as(p)
        start += p.numel()
    optimizer.step()
    n = len(list(model.parameters()))
    assert tensor_memory(model, optimizer) == {"parameters": size, "gradients": size, "optimizer": 2 * size + 4 * n}
    assert tensor_memory(model.to("meta"), torch.optim.AdamW([torch.zeros(1)]))["parameters"] == 0


def test_the_peak_is_in_bytes() -> None:
    """Bug: Linux counts the peak in KiB and macOS in bytes; taken alike, it is off by a factor of 1,024."""
    now = psutil.Process().memory_info().rss
    assert now / 2 < peak_bytes(torch.device("cpu")) < 100 * now


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "fp32", 67.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "fp16", 121.0),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H200 NVL", "bf16", None),
        ("NVIDIA A10", "bf16", 125.0),
        ("Tesla T4", "fp16", 65.0),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
        ("NVIDIA GeForce RTX 3090", "fp32", 35.6),
        ("NVIDIA GeForce RTX 3090 Ti", "fp32", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", None),
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA H100 64GB HBM2", "bf16", None),
        ("NVIDIA GeForce GT 1030", "fp32", None),
    ],
)
def test_peaks_are_dense_and_of_the_right_chip(name: str, precision: str, tera: float | None) -> None:
    """Bugs: the sparse number of a data sheet, twice the truth; A100 found in A1000, L4 in L40S; a slice as a whole."""
    assert peak_flops(name, precision) == (None if tera is None else tera * 1e12)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_mfu_by_hand(monkeypatch: pytest.MonkeyPatch, tf32: None) -> None:
    """Bugs: one GPU's peak for all of them; FLOPs of a sequence for those of a token; a window that costs as if it were
    not there; float32 measured against a peak that its products, which are TF32, can beat."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    world = World(0, 8, 0, torch.device("cuda", 0))
    config = GPTConfig()
    # 6 FLOPs a token and weight of a matrix, and 12 H D a pair of query and key of each layer, 512.5 pairs a token
    flops = 6 * (12 * 12 * 768**2 + 768 * 50257) + 12 * 12 * 768 * 512.5
    share = mfu(config, 1e6, 1024, world, "bf16")
    assert share == pytest.approx(flops * 1e6 / (8 * 312e12))
    assert mfu(config, 1e6, 1024, world, "fp32") == pytest.approx(flops * 1e6 / (8 * 156e12))
    windowed = config.with_(window=128)
    assert mfu(windowed, 1e6, 1024, world, "bf16") == pytest.approx(
        training_flops(windowed, 1024) / training_flops(config, 1024) * share
    )
    assert mfu(config, 1e6, 1024, World(), "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Something New")
    assert mfu(config, 1e6, 1024, world, "bf16") is None
