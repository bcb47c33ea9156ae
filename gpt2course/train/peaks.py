"""Peak arithmetic of GPUs, the 100 % of a model FLOPs utilisation.

Dense products, as NVIDIA's data sheets and whitepapers give them: half of what they print where a footnote says "with
sparsity". float16 and bfloat16 with sums in float32, which on GeForce cards is half of their rate with sums in float16.
"""

import re

import torch

# Words that a device's name must have, and its TFLOP/s. The first line whose words are all there counts.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # H200 data sheet
    ("H200", {"fp32": 67.0, "tf32": 494.5, "bf16": 989.5, "fp16": 989.5}),
    # H100 data sheet; H100 PCIe in its first edition
    ("H100 PCIe", {"fp32": 51.0, "tf32": 378.0, "bf16": 756.5, "fp16": 756.5}),
    ("H100 HBM3", {"fp32": 67.0, "tf32": 494.5, "bf16": 989.5, "fp16": 989.5}),
    # A100 data sheet: the same for SXM and PCIe, 40 and 80 GB
    ("A100", {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}),
    # data sheets of A40, A30, A10
    ("A40", {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7}),
    ("A30", {"fp32": 10.3, "tf32": 82.0, "bf16": 165.0, "fp16": 165.0}),
    ("A10", {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0, "fp16": 125.0}),
    # data sheets of L40S, L40, L4
    ("L40S", {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0, "fp16": 362.0}),
    ("L40", {"fp32": 90.5, "tf32": 90.5, "bf16": 181.0, "fp16": 181.0}),
    ("L4", {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0}),
    # T4 and V100 data sheets; both know neither TF32 nor bfloat16
    ("T4", {"fp32": 8.1, "fp16": 65.0}),
    ("V100S PCIE", {"fp32": 16.4, "fp16": 130.0}),
    ("V100 PCIE", {"fp32": 14.0, "fp16": 112.0}),
    ("V100 SXM2", {"fp32": 15.7, "fp16": 125.0}),
    # whitepapers of the GA102 (Ampere) and of the Ada GPU architecture
    ("RTX 3090", {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0}),
    ("RTX 4090", {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2}),
)
OTHER_CHIPS = {"MIG", "LAPTOP", "NVL", "TI", "D", "SUPER"}
"""words that make of a known name another chip, or a slice of one"""


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s at best; None for a device or a precision that is not in the table.

    Args:
        device_name: as `torch.cuda.get_device_name` says it, such as "NVIDIA A100-SXM4-80GB".
        precision: fp32, tf32, bf16 or fp16.
    """
    words = set(re.split(r"[\s-]+", device_name.upper()))
    if words & OTHER_CHIPS:
        return None
    for name, peaks in PEAKS:
        if set(name.upper().split()) <= words:
            tera = peaks.get(precision)
            return None if tera is None else tera * 1e12
    return None


def products_precision(precision: str) -> str:
    """In what a matrix product is computed: float32 products are TF32 where torch has been told that they may be."""
    return "tf32" if precision == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32" else precision
