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

# Of what all tokens take, `[tokens, C]`: measured by tracking allocations of a Flux of real widths, one block of each
# kind, in chunks, with stock attention.
_TENSORS_OF_TOKENS = 13.2
# Tensors of all pixels of a tile of 1024x1024 in 256 channels that an autoencoder holds at once.
_TILE_BYTES = 3 * 1024**2 * 256


def require_offload(kind: str, device: torch.device) -> None:
    """Raises BadInput unless weights can be offloaded like that from a device."""
    if kind not in OFFLOADS:
        raise BadInput(f"unknown offload {kind!r}: {choices(kind, OFFLOADS)}")
    if kind not in ("none", "auto") and device.type == "cpu":
        raise BadInput("--offload moves parts of the model off a GPU, and the run is on the CPU: leave it out")


def choose_offload(needed_bytes: Mapping[str, int], free_bytes: int) -> tuple[str, str]:
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


def resolve_offload(kind: str, pipe: Any, device: torch.device, tokens: int) -> tuple[str, str]:
    """What a kind stands for, and why.

    Args:
        kind: one of `OFFLOADS`.
        pipe: a pipeline, still on the CPU.
        device: where it is to run.
        tokens: image tokens of its calls, the most that there are.
    """
    if kind != "auto":
        return kind, "chosen by name"
    if device.type != "cuda":
        return "none", f"the run is on {device.type}"
    import torch

    return choose_offload(needed_bytes(pipe, tokens), torch.cuda.mem_get_info(device)[0])


def needed_bytes(pipe: Any, tokens: int) -> dict[str, int]:
    """What a run needs on the device with each kind of offload: weights as they are, activations by rule of thumb.

    Args:
        pipe: a pipeline.
        tokens: image tokens of its calls.
    """
    import torch

    parts: dict[str, Any] = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    transformer = parts["transformer"]
    element = torch.empty((), dtype=transformer.dtype).element_size()
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    working = {name: 0 for name in parts} | {
        "transformer": int(_TENSORS_OF_TOKENS * tokens * width * element),
        "vae": _TILE_BYTES * torch.empty((), dtype=parts["vae"].dtype).element_size(),
    }
    weights = {name: _bytes(part) for name, part in parts.items()}
    groups = {name: _bytes(part) if name == "vae" else _group_bytes(part) for name, part in parts.items()}
    layers = {name: max(map(_own_bytes, part.modules())) for name, part in parts.items()}
    return {
        "none": sum(weights.values()) + max(working.values()),
        "model": max(weights[name] + working[name] for name in parts),
        "group": groups["vae"] + max(working[name] + (groups[name] if name != "vae" else 0) for name in parts),
        "sequential": max(layers[name] + working[name] for name in parts),
    }


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


def _own_bytes(module: Any) -> int:
    """Of the weights that a module holds itself."""
    return sum(weight.numel() * weight.element_size() for weight in module.parameters(recurse=False))


def _bytes(module: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def _group_bytes(part: Any) -> int:
    """Of a part in groups of one block: two blocks, and all that is in none (diffusers' block_level offloading)."""
    import torch

    lists = [module for module in part.modules() if isinstance(module, torch.nn.ModuleList)]
    inner = {id(nested) for outer in lists for nested in outer.modules() if nested is not outer}
    blocks = sorted(_bytes(block) for outer in lists if id(outer) not in inner for block in outer)
    return _bytes(part) - sum(blocks) + sum(blocks[-2:])


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
