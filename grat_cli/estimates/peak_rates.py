"""Peak rates of GPUs, as their makers state them: dense tensor-core TFLOP/s in bf16 and fp16, without sparsity."""

from __future__ import annotations

import re
from collections.abc import Mapping

# From the makers' data sheets, whose headline figures for tensor cores are often with 2:4 sparsity: those are halved
# here. GeForce figures are with fp32 accumulation. A name matches whole words; the longest match counts.
_TENSOR_TFLOPS: Mapping[str, float] = {
    "A10": 125.0,
    "A100": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "A800": 312.0,
    "B200": 2250.0,
    "GeForce RTX 3090": 71.0,
    "GeForce RTX 4090": 165.2,
    "GeForce RTX 5090": 209.5,
    "GH200": 989.4,
    "H100": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H20": 148.0,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "H800": 989.4,
    "Instinct MI300X": 1307.4,
    "Instinct MI325X": 1307.4,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.1,
    "RTX 6000 Ada Generation": 364.2,
    "RTX A6000": 154.8,
}
# Parts of a GPU and slower variants that carry the name of a listed one.
_OTHER_DEVICES = re.compile(r"\b(MIG|Laptop|Max-Q|D)\b")


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Peak TFLOP/s of a GPU by the name that torch gives it; None for other dtypes, unlisted GPUs and CPUs."""
    if dtype not in ("bfloat16", "float16") or _OTHER_DEVICES.search(device_name):
        return None
    matches = [name for name in _TENSOR_TFLOPS if re.search(rf"(?<![\w-]){re.escape(name)}(?!\w)", device_name)]
    return _TENSOR_TFLOPS[max(matches, key=len)] if matches else None
