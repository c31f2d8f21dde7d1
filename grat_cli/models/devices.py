"""Devices: which one, in which dtype, what it is called, how much memory was used, and waiting for it."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from grat_cli.errors import BadInput, choices

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
_MOST_THREADS_PER_CORE = 32
DEVICE_KINDS = ("auto", "cpu", "cuda", "mps")


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is the first of CUDA, MPS and CPU that is present.

    Raises:
        BadInput: if there is no such device here.
    """
    import torch

    kind, _, number = name.partition(":")
    if kind not in DEVICE_KINDS or (number and not number.isdecimal()):
        raise BadInput(f"unknown device {name!r}: {choices(kind, DEVICE_KINDS)}, or one of several as in cuda:1")
    if kind == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise BadInput("no CUDA device is present, or torch was built without CUDA: use --device cpu")
        if number and int(number) >= torch.cuda.device_count():
            raise BadInput(
                f"there is no device {name}: this machine has {torch.cuda.device_count()}, counted from cuda:0"
            )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise BadInput("no MPS device is present: use --device cpu")
    return torch.device(name)


def device_of_worker(name: str, local_rank: int | None) -> str:
    """The name of the device of one of several workers on a machine, which take turns at its CUDA devices.

    Args:
        name: as typed; one with a number, or of another kind, stays.
        local_rank: of the worker, from 0; None where nobody says.
    """
    if local_rank is None or name not in ("auto", "cuda"):
        return name
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{local_rank % count}" if count > 1 else name


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; `auto` is bfloat16 on CUDA (float16 before Ampere), float16 on MPS and float32 on CPU.

    Raises:
        BadInput: if the name is unknown.
    """
    import torch

    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.float16 if device.type == "mps" else torch.float32
    if name not in DTYPES:
        raise BadInput(f"unknown dtype {name!r}: {choices(name, ('auto', *DTYPES))}")
    return getattr(torch, name)


def device_name(device: torch.device) -> str:
    """What the device is called, for reports."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpu_information = Path("/proc/cpuinfo")
    if cpu_information.exists():
        for line in cpu_information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_threads(device: torch.device) -> int | None:
    """Threads that torch computes with on a CPU; None for other devices."""
    import torch

    return torch.get_num_threads() if device.type == "cpu" else None


def can_compute_on(threads: int) -> bool:
    """Whether so many CPU threads, which a file may ask for, are no more than a machine like this one bears."""
    return threads <= _MOST_THREADS_PER_CORE * (os.cpu_count() or 1)


def wait_for(device: torch.device) -> None:
    """Returns when the device has finished what was issued to it."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def forget_peak_memory(device: torch.device) -> None:
    """Starts a new measurement of peak memory, where device and system can do that."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        # proc(5), /proc/pid/clear_refs: 5 resets the peak of resident memory. Some containers forbid it.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Peak memory in bytes, and what was measured: what torch allocated on a CUDA device, else this process's own."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device), "allocated on the device"
    if sys.platform == "win32":
        return 0, "not measured on Windows"
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident memory of the process"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU and MPS allocators raise plain RuntimeErrors.
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "backend out of memory")
    )
