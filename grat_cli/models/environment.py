"""What this machine offers: versions, devices, and what each attention backend can run here."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "numpy",
    "pillow",
    "imageio-ffmpeg",
    "torchao",
    "bitsandbytes",
    "gguf",
)


def versions() -> dict[str, str | None]:
    """Versions of Python, grat and the packages that results depend on; None where one is not installed."""
    return {
        "python": platform.python_version(),
        "grat": _version("grat-cli"),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Device:
    """A device that torch can compute on.

    Attributes:
        name: how `--device` takes it, such as `cuda:0`.
        model: what the hardware calls itself.
        detail: compute capability, or the threads that torch uses.
        memory_bytes: memory of the device, None where the system does not say.
        dtype: what `--dtype auto` stands for in attention benchmarks and checks here.
    """

    name: str
    model: str
    detail: str
    memory_bytes: int | None
    dtype: str


def devices() -> list[Device]:
    """The devices of this machine, best first. Loads torch."""
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            detail = f"compute capability {properties.major}.{properties.minor}"
            found.append(Device(f"cuda:{index}", properties.name, detail, properties.total_memory, "bfloat16"))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU", platform.mac_ver()[0], None, "bfloat16"))
    found.append(Device("cpu", _processor(), f"{torch.get_num_threads()} threads", _main_memory_bytes(), "float32"))
    return found


def backends(device: Device) -> list[dict[str, Any]]:
    """Per backend: its name, whether it can run Flux's attention on the device, and the reason. Loads torch."""
    import torch

    from grat_kernels import Backend, can_run

    dtype: torch.dtype = getattr(torch, device.dtype)
    answers = {backend.value: can_run(backend, device.name, dtype) for backend in Backend}
    return [{"name": name, "able": answer.able, "reason": answer.reason} for name, answer in answers.items()]


def ffmpeg() -> str | None:
    """Path of the ffmpeg program that videos are written with, None where there is none."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return None


def describe() -> dict[str, Any]:
    """Everything that `grat env` shows."""
    found = devices()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions(),
        "devices": [asdict(device) for device in found],
        "backends_on": found[0].name,
        "dtype": found[0].dtype,
        "backends": backends(found[0]),
        "ffmpeg": ffmpeg(),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if sys.platform == "linux" and information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _main_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
