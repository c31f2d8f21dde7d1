"""Which kernels have passed their tests on which GPUs: `make gpu` says so, and a row is added here by hand."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch


class Proof(NamedTuple):
    """A run of all tests of a kernel.

    Attributes:
        kernel: by name.
        architecture: such as `sm_90`, or `gfx942`.
        triton: version without its patch level; another one compiles another kernel.
        torch: version.
        gpu: as its driver calls it.
        date: of the run.
    """

    kernel: str
    architecture: str
    triton: str
    torch: str
    gpu: str
    date: str


PROOFS: tuple[Proof, ...] = ()


def is_proven(kernel: str, device: torch.device) -> bool:
    """Whether a kernel has passed on a GPU of this architecture, with this Triton."""
    here = architecture(device), _triton()
    return any(proof.kernel == kernel and (proof.architecture, proof.triton) == here for proof in PROOFS)


def architecture(device: torch.device) -> str | None:
    """The name of a device's architecture, such as `sm_90`; None for what is no GPU of CUDA or ROCm."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache(maxsize=1)
def _triton() -> str | None:
    try:
        return ".".join(version("triton").split(".")[:2])
    except PackageNotFoundError:
        return None
