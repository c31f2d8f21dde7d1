"""Small LoRAs in the layouts in which they are spread, with random halves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RANK = 4
Tensors = dict[str, torch.Tensor]


def halves(width: int, out: int, seed: int, rank: int = RANK, strength: float = 0.3) -> tuple[torch.Tensor, ...]:
    """Down `[rank, width]` and up `[out, rank]`."""
    drawn = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, width, generator=drawn) * strength,
        torch.randn(out, rank, generator=drawn) * strength,
    )


def layers_of(module: Any, *words: str) -> dict[str, tuple[int, int]]:
    """Widths of the linear layers of a module whose names hold one of the words; without any, of all."""
    return {
        name: (layer.in_features, layer.out_features)
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and (not words or any(word in name for word in words))
    }


def diffusers_layout(
    layers: Mapping[str, tuple[int, int]], *, part: str = "transformer", seed: int = 0, **how: Any
) -> Tensors:
    """As diffusers saves them: `transformer.NAME.lora_A.weight`."""
    made: Tensors = {}
    for number, (name, widths) in enumerate(layers.items()):
        down, up = halves(*widths, seed=1000 * seed + number, **how)
        made |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    return made


def other_layout(
    layers: Mapping[str, tuple[int, int]],
    prefix: str,
    names: Sequence[str] = ("lora_down", "lora_up"),
    *,
    alpha: float | None = None,
    seed: int = 0,
) -> Tensors:
    """As others save them: `lora_unet_NAME.lora_down.weight` with an alpha, `diffusion_model.NAME.lora_A.weight`."""
    made: Tensors = {}
    for number, (name, widths) in enumerate(layers.items()):
        for half, tensor in zip(names, halves(*widths, seed=1000 * seed + number), strict=True):
            made[f"{prefix}{name}.{half}.weight"] = tensor
        if alpha is not None:
            made[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    return made


def write(path: Path, tensors: Tensors, adapter: Mapping[str, Any] | None = None) -> Path:
    """A file of them; with the configuration of an adapter, as peft saves it."""
    about = {"format": "pt"} | ({} if adapter is None else {"lora_adapter_metadata": json.dumps(adapter)})
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, about)
    return path
