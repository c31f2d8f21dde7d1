"""Which weights wait in main memory while a pipeline runs on a GPU, by diffusers' and accelerate's own hooks.

| kind | on the device at once | moved per step |
| --- | --- | --- |
| none | all parts | nothing |
| model | one part | nothing |
| group | two blocks of a part, the autoencoder; one block computes while the next arrives | each part once |
| sequential | one layer | each layer at every call: again for each chunk of tokens |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, choices

if TYPE_CHECKING:
    import torch

KINDS = ("none", "model", "group", "sequential")  # fastest first
OFFLOADS = (*KINDS, "auto")


def require_offload(kind: str, device: torch.device) -> None:
    """Raises BadInput unless weights can be offloaded like that from a device."""
    if kind not in OFFLOADS:
        raise BadInput(f"unknown offload {kind!r}: {choices(kind, OFFLOADS)}")
    if kind not in ("none", "auto") and device.type == "cpu":
        raise BadInput("--offload moves parts of the model off a GPU, and the run is on the CPU: leave it out")


def choose_offload(needed_bytes: Mapping[str, float], free_bytes: int) -> tuple[str, str]:
    """The fastest kind of offload that fits, and why.

    Args:
        needed_bytes: what a run needs on the device with each kind.
        free_bytes: what the device has.
    """
    for kind in KINDS:
        if needed_bytes[kind] <= free_bytes:
            reason = f"needs about {_gigabytes(needed_bytes[kind])} of {_gigabytes(free_bytes)} that are free"
            before = KINDS[: KINDS.index(kind)]
            if before:
                reason += "; " + ", ".join(f"{other} {_gigabytes(needed_bytes[other])}" for other in before)
            return kind, reason
    least = min(KINDS, key=lambda kind: needed_bytes[kind])
    needed = _gigabytes(needed_bytes[least])
    return least, f"needs least, about {needed}, which is more than the {_gigabytes(free_bytes)} that are free"


def offload(pipe: Any, kind: str, device: torch.device) -> None:
    """Puts a pipeline on a device, or has its weights wait in main memory.

    Args:
        pipe: a pipeline on the CPU.
        kind: one of `KINDS`.
        device: where it runs.
    """
    if kind == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif kind == "group":
        # Only CUDA has streams on which the next block arrives while one computes. An autoencoder's `decode` goes past
        # the hooks of its `forward`, which bring what is in no block; it is small, and stays on the device.
        pipe.enable_group_offload(
            onload_device=device,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
            exclude_modules=["vae"],
        )
    else:
        pipe.to(device)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
