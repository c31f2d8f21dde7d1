"""Latents of a finished video, kept so that they can be decoded again: `NAME.latents.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput
from grat_cli.files.tensors import read_tensors, write_tensors

if TYPE_CHECKING:
    import torch

SCHEMA = "grat.latents/1"


@dataclass(frozen=True)
class LatentsFile:
    """What a latents file holds.

    Attributes:
        latents: float32 on the CPU, `[1, channels, latent frames, latent rows, latent columns]`, as the pipeline
            returns them with `output_type="latent"`.
        about: the request or report that was saved with them; its `schema` is that of latents files.
    """

    latents: torch.Tensor
    about: dict[str, Any]


def save_latents(path: Path, latents: torch.Tensor, about: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Writes latents of one video bit for bit, whole or not at all.

    Args:
        path: the file.
        latents: `[1, C, T, H, W]`, float32, or bfloat16 or float16, which float32 holds exactly.
        about: JSON data: the request or report; `schema` is set here.
        overwrite: whether files that this process has not written may be replaced.

    Raises:
        CannotWrite: if it cannot be written.
        ValueError: if the latents have another shape or dtype.
    """
    import torch

    if latents.ndim != 5 or latents.shape[0] != 1:
        raise ValueError(f"expected latents [1, C, T, H, W], got {list(latents.shape)}")
    if latents.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"expected latents that float32 holds exactly, got {latents.dtype}")
    write_tensors(path, {"latents": latents.float()}, {**about, "schema": SCHEMA}, overwrite=overwrite)


def load_latents(path: Path) -> LatentsFile:
    """What `save_latents` wrote.

    Raises:
        BadInput: if there is no such file, or it is another kind of file, of another version, or damaged.
    """
    import torch

    tensors, about = read_tensors(path, SCHEMA, "a latents file")
    latents = tensors.get("latents")
    if latents is None or latents.dtype != torch.float32 or latents.ndim != 5 or latents.shape[0] != 1:
        raise BadInput(f"{path} is damaged: it has no float32 latents [1, C, T, H, W]")
    return LatentsFile(latents, about)
