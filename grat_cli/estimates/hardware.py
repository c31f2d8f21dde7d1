"""Devices to plan for: GPUs by the data of their makers, and what is present here. Imports no torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from grat_cli.errors import BadInput, choices
from grat_cli.estimates.peak_rates import peak_tflops

_GIB = 2**30
# Sets of abilities of x86 CPUs, as Linux calls them, each of which is enough for oneDNN to convolve in 16 bits.
_HALVES: Mapping[str, tuple[frozenset[str], ...]] = {
    "bfloat16": (frozenset({"avx512vl", "avx512bw", "avx512dq"}), frozenset({"avx_ne_convert"})),
    "float16": (frozenset({"avx512_fp16"}), frozenset({"avx_ne_convert"})),
}


@dataclass(frozen=True)
class Device:
    """Something to run on.

    Attributes:
        name: as it is typed.
        title: as its maker calls it.
        memory: bytes; of a present device what is free.
        kind: of device.
        bandwidth: of its memory, bytes per second; None where unknown.
        tensor_rate: floating-point operations per second of its tensor cores in bf16, dense; likewise.
        link: bytes per second from main memory to the device, one way; likewise.
        nvlink: bytes per second to other GPUs of the machine, one way; None for one that reaches them by `link`.
        power: watts that the board takes at most; None where unknown.
        present: whether it is in this machine.
    """

    name: str
    title: str
    memory: int
    kind: Literal["cuda", "cpu"] = "cuda"
    bandwidth: float | None = None
    tensor_rate: float | None = None
    link: float | None = None
    nvlink: float | None = None
    power: float | None = None
    present: bool = False

    @property
    def peers(self) -> tuple[str, float] | None:
        """By what it reaches other GPUs of its machine, and bytes per second one way; None where unknown."""
        if self.nvlink is not None:
            return "NVLink", self.nvlink
        return None if self.link is None else ("PCIe", self.link)

    def with_overhead(self, tensors: float) -> float:
        """Bytes that a run takes of this device, whose tensors take so many.

        A CUDA context with its libraries takes about 0.6 GiB, and torch's allocator rounds and splits its blocks; on a
        CPU, Python with torch, diffusers and transformers takes about 0.75 GiB.
        """
        return tensors + 0.75 * _GIB if self.kind == "cpu" else 1.03 * tensors + 0.6 * _GIB


def _gpu(
    name: str, title: str, gigabytes: int, bandwidth: float, link: float, power: float, nvlink: float | None = None
) -> Device:
    rate = peak_tflops(title, "bfloat16")
    assert rate is not None, title
    return Device(name, title, gigabytes * _GIB, "cuda", bandwidth, rate * 1e12, link, nvlink, power)


# NVIDIA's data sheets: H200 and H100 Tensor Core GPU, A100 Tensor Core GPU, DGX B200, L40S, L4, A10, RTX A6000 and
# RTX 6000 Ada; for GeForce cards the whitepapers of the GA102, Ada and Blackwell architectures. Gigabytes are binary,
# as stated but where nvidia-smi shows less (B200, H200; L40S and A10 with error correction). Links: PCIe x16, half of
# the stated sum of both ways: 64 GB/s of generation 5, 32 GB/s of generation 4. NVLink likewise: 1.8 TB/s in generation
# 5, 900 GB/s in 4, 600 GB/s in 3; bridges, which join two cards, are not counted. Power is the most that a board takes.
# Tensor rates are in `peak_rates`.
_GEN5, _GEN4 = 64e9, 32e9
_NVLINK5, _NVLINK4, _NVLINK3 = 900e9, 450e9, 300e9
GPUS: Mapping[str, Device] = {
    device.name: device
    for device in (
        _gpu("b200", "B200", 179, 8.0e12, _GEN5, 1000, _NVLINK5),
        _gpu("h200", "H200", 140, 4.8e12, _GEN5, 700, _NVLINK4),
        _gpu("h100", "H100", 80, 3.35e12, _GEN5, 700, _NVLINK4),
        _gpu("h100-pcie", "H100 PCIe", 80, 2.0e12, _GEN5, 350),
        _gpu("a100-80", "A100", 80, 2.039e12, _GEN4, 400, _NVLINK3),
        _gpu("a100-40", "A100", 40, 1.555e12, _GEN4, 400, _NVLINK3),
        _gpu("l40s", "L40S", 45, 0.864e12, _GEN4, 350),
        _gpu("a6000", "RTX A6000", 48, 0.768e12, _GEN4, 300),
        _gpu("6000-ada", "RTX 6000 Ada Generation", 48, 0.96e12, _GEN4, 300),
        _gpu("5090", "GeForce RTX 5090", 32, 1.792e12, _GEN5, 575),
        _gpu("4090", "GeForce RTX 4090", 24, 1.008e12, _GEN4, 450),
        _gpu("3090", "GeForce RTX 3090", 24, 0.936e12, _GEN4, 350),
        _gpu("l4", "L4", 24, 0.3e12, _GEN4, 72),
        _gpu("a10", "A10", 22, 0.6e12, _GEN4, 150),
    )
}


# What is left of a link's rate for what is sent: NCCL's protocol leaves 370 of 450 GB/s of NVLink 4, as its author says
# (NVIDIA/nccl-tests #212). Taken for PCIe as well.
LINK_SHARE = 370 / 450


def device_named(name: str) -> Device:
    """The device of a name: one of `GPUS`, or `cpu` for this machine's.

    Raises:
        BadInput: if there is none, with the nearest name.
    """
    wanted = name.lower().removeprefix("nvidia-").removeprefix("rtx-").removeprefix("rtx")
    if wanted == "cpu":
        return present_cpu()
    if wanted not in GPUS:
        raise BadInput(f"--gpu {name}: {choices(wanted, (*GPUS, 'cpu'))}")
    return GPUS[wanted]


def present_gpu() -> Device | None:
    """The first NVIDIA GPU of this machine with what is free of its memory, as nvidia-smi says; None for none."""
    query = ("nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits")
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        title, _, free = said.splitlines()[0].rpartition(",")
        return cuda_device(title.strip(), int(free) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def cuda_device(title: str, free_bytes: int) -> Device:
    """A present GPU by the name that its driver gives it."""
    rate = peak_tflops(title, "bfloat16")
    kin = [gpu for gpu in GPUS.values() if rate and gpu.tensor_rate == rate * 1e12]
    # Of cards at one rate the one whose name it is; of those, which differ in memory, the smallest that has as much.
    named = [gpu for gpu in kin if gpu.title in title and gpu.memory >= free_bytes]
    base = min(named, key=lambda gpu: (-len(gpu.title), gpu.memory), default=Device(title, title, 0))
    return replace(base, title=title, memory=free_bytes, present=True)


def present_cpu() -> Device:
    """This machine's CPU with the main memory that is free."""
    return Device("cpu", "this CPU", free_main_memory(), "cpu", present=True)


def free_main_memory() -> int:
    """Bytes of main memory that a new process may take, within the limit of a container."""
    free = _available_bytes()
    group = Path("/sys/fs/cgroup")  # of a container, or of a user's session
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


@cache
def has_convolutions(dtype: str) -> bool:
    """Whether oneDNN has convolutions of a dtype for this CPU; True where its abilities are not told.

    torch asks for the same before it hands them over (aten/src/ATen/native/mkldnn/Utils.h).
    """
    if dtype not in _HALVES:
        return True
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return True
    abilities = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)
    return abilities is None or any(needed <= abilities for needed in _HALVES[dtype])


def _available_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    # Elsewhere: all of it.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
