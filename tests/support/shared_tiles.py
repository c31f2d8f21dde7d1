"""What ranks decode that share tiles; by one rank alone as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import tiny_flux
import tiny_flux2
import tiny_hunyuan
import tiny_hunyuan15
import tiny_qwen
import tiny_wan
import torch
from torch.distributed import ProcessGroup

from grat_cli.errors import NumericalFailure
from grat_cli.families import FAMILIES
from grat_cli.families.shared_decoding import tiles_over_ranks


class Case(NamedTuple):
    """Latents that are decoded in tiles.

    Attributes:
        make: the autoencoder.
        shape: of latents.
        family: that decodes them; None for the autoencoder itself, in tiles of its own.
        tile: side in pixels.
        apart: by how many calls of the decoder ranks may differ: those of a tile, for each time that tiles are shared.
        dtype: of the autoencoder.
    """

    make: Callable[[], Any]
    shape: tuple[int, ...]
    family: str | None
    tile: int = 0
    apart: int = 1
    dtype: torch.dtype = torch.float32


def _tiled(autoencoder: Any, **changes: Any) -> Any:
    autoencoder.enable_tiling()
    for name, value in changes.items():
        assert hasattr(autoencoder, name)
        setattr(autoencoder, name, value)
    return autoencoder


CASES = {
    "flux": Case(tiny_flux.autoencoder_of_distributions, (1, 4, 40, 23), "flux", 64),
    "flux of convolutions": Case(tiny_flux.autoencoder, (1, 4, 40, 23), "flux", 80),
    "flux2": Case(tiny_flux2.autoencoder, (1, 4, 40, 71), "flux2", 64),
    "qwen": Case(tiny_qwen.autoencoder, (1, 4, 9, 14), "qwen", 64),
    # In two windows of frames.
    "hunyuan": Case(lambda: tiny_hunyuan.pipeline().vae, (1, 4, 5, 9, 5), "hunyuan", 48, apart=2),
    "hunyuan15": Case(lambda: tiny_hunyuan15.pipeline().vae, (1, 4, 2, 7, 5), "hunyuan15", 64),
    # A frame at a time.
    "wan": Case(tiny_wan.autoencoder, (1, 4, 3, 9, 7), "wan", 48, apart=3),
    "wan of patches": Case(lambda: tiny_wan.autoencoder(coarse=True), (1, 4, 2, 5, 7), "wan", 64, apart=2),
    "AutoencoderKL": Case(
        lambda: _tiled(tiny_flux.autoencoder_of_distributions(), tile_sample_min_size=32, tile_latent_min_size=8),
        (1, 4, 20, 11),
        None,
    ),
    # Of two tiles.
    "AutoencoderKLFlux2": Case(
        lambda: _tiled(tiny_flux2.autoencoder(), tile_sample_min_size=16, tile_latent_min_size=8), (1, 4, 4, 9), None
    ),
    "AutoencoderKLQwenImage": Case(
        lambda: _tiled(tiny_qwen.autoencoder(), tile_sample_min_width=64, tile_sample_stride_width=48),
        (1, 4, 1, 5, 14),
        None,
    ),
    "half precision": Case(
        lambda: _tiled(tiny_flux.autoencoder_of_distributions(), tile_sample_min_size=32, tile_latent_min_size=8),
        (1, 4, 7, 11),
        None,
        dtype=torch.bfloat16,
    ),
    "whole": Case(tiny_wan.autoencoder, (1, 4, 2, 3, 2), "wan"),
}


class Decoded(NamedTuple):
    """Pixels, how often the decoder was called, and methods that an autoencoder has of its own afterwards."""

    pixels: torch.Tensor
    calls: int
    own: list[str]


def decoded(ranks: ProcessGroup | None, names: Sequence[str]) -> dict[str, Decoded]:
    """Of each case."""
    made = {}
    for name in names:
        case = CASES[name]
        autoencoder = case.make().to(case.dtype)
        latents = torch.randn(case.shape, generator=torch.Generator().manual_seed(3)).to(case.dtype)
        calls: list[int] = []
        convolutions = (torch.nn.Conv2d, torch.nn.Conv3d)
        first = next(module for module in autoencoder.decoder.modules() if isinstance(module, convolutions))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if case.family is None:
            with torch.no_grad(), tiles_over_ranks(autoencoder, ranks):
                pixels = autoencoder.decode(latents).sample
        else:
            pipe = SimpleNamespace(
                vae=autoencoder,
                vae_scale_factor=2 ** (len(autoencoder.config.get("block_out_channels", range(4))) - 1),
                _execution_device=torch.device("cpu"),
                maybe_free_model_hooks=lambda: None,
            )
            pixels = FAMILIES[case.family].decode(pipe, latents, case.tile or None, ranks)
        own = [name for part in (autoencoder, autoencoder.decoder) for name in vars(part) if callable(vars(part)[name])]
        made[name] = Decoded(pixels, len(calls), own)
    return made


def _told_of_nan(ranks: ProcessGroup) -> str:
    """What a rank says of latents with NaN in one tile."""
    latents = torch.zeros(1, 4, 40, 23)
    latents[..., 0, 0] = torch.nan
    try:
        FAMILIES["flux"].decode(tiny_flux.pipeline(), latents, 80, ranks)
    except NumericalFailure as failure:
        return str(failure)
    return ""


def decoded_and_told(ranks: ProcessGroup, names: Sequence[str]) -> tuple[dict[str, Decoded], str]:
    """Both, of one group of processes."""
    return decoded(ranks, names), _told_of_nan(ranks)
