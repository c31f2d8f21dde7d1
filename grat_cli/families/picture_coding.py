"""Pixels to latents and back in tiles, so that memory is bounded by a tile and not by the picture.

Tiles of one size are spread evenly over the picture. An `AutoencoderTiny` is made of convolutions alone: tiles that
overlap by its receptive field, and of which only the middle is used, give what the whole picture would. An
`AutoencoderKL` has group norms and an attention that see all of the picture; there, tiles fade into one another.

The tiling inside diffusers 0.42.1 keeps all tiles until the last one is done, ends rows with slivers whose group norms
have little to go by, and takes 8 pixels per latent for granted in `AutoencoderTiny`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Literal

from grat_cli.errors import BadInput, NumericalFailure, steadier
from grat_cli.families.shared_decoding import decoded_over_ranks

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch.distributed import ProcessGroup

TILE = 1024  # side in pixels, the sample size of Flux's autoencoder, which its group norms were trained at
_TILE_UNIT = 16  # pixels; sides of tiles are typed in multiples of it
# Share of a tile of an AutoencoderKL that fades into the next. Across a hard cut pixels change up to 2.9 times as much
# as across the lines around it, across the fade of a quarter 1.13 times, and in the untiled picture 1.18 times (random
# weights of 4 levels, 768x768 pixels in tiles of 256).
_OVERLAP = 1 / 4


def decode(
    pipe: Any,
    latents: torch.Tensor,
    tile: int | None = None,
    pixels_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ranks: ProcessGroup | None = None,
) -> torch.Tensor:
    """Pixels of latents.

    Args:
        pipe: a pipeline of pictures.
        latents: `[1, C, h, w]`, unpacked, scaled as the pipeline denoises them.
        tile: side in pixels of what is decoded at once, 1024 by default. Pictures of no larger area are decoded whole.
        pixels_of: what an autoencoder makes of a tile of latents in its dtype; None for those of Flux.
        ranks: that share the tiles, and have the same latents; None for this one alone.

    Returns:
        `[1, 3, H, W]` from about -1 to 1, in fp32 on the CPU.

    Raises:
        NumericalFailure: if there are NaN or infinite pixels.
        BadInput: if the tile is too small for the autoencoder.
    """
    import torch

    device = pipe._execution_device

    def pixels_by_factor(window: torch.Tensor) -> torch.Tensor:
        scaled = window / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return pipe.vae.decode(scaled, return_dict=False)[0]

    def finite(pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.float().cpu()
        if not pixels.isfinite().all():
            raise NumericalFailure(f"the picture has NaN after decoding: {steadier(pipe.vae.dtype, 'another --seed')}")
        return pixels

    scale = pipe.vae_scale_factor
    rows, columns = latents.shape[2:]
    tiling = _tiling(pipe.vae, "decoder", tile, scale)
    if rows * columns <= tiling.side**2:
        tiling = _WHOLE
    places = list(product(pieces(rows, tiling), pieces(columns, tiling)))

    def decode_tile(number: int) -> torch.Tensor:
        window = _window(latents, places[number], 1)
        return (pixels_of or pixels_by_factor)(window.to(device, pipe.vae.dtype))

    pixels = torch.zeros(1, 3, rows * scale, columns * scale)
    with torch.no_grad():
        if ranks is None or len(places) == 1:
            tiles = map(decode_tile, range(len(places)))
        else:
            like = latents.new_empty(0, 0, 0, 0, device=device, dtype=pipe.vae.dtype)
            tiles = decoded_over_ranks(len(places), decode_tile, like, ranks)
        # Every rank looks at all tiles, so that all end where one has NaN.
        _add_tiles(pixels, map(finite, tiles), places, scale)
    pipe.maybe_free_model_hooks()
    return pixels


def encode(
    pipe: Any,
    picture: torch.Tensor | Image.Image,
    tile: int | None = None,
    latents_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
    channels: int | None = None,
) -> torch.Tensor:
    """Latents of a picture; of an autoencoder that gives a distribution, its mean.

    Args:
        pipe: a pipeline of pictures.
        picture: a picture, or pixels `[1, 3, H, W]` from -1 to 1; sides in multiples of the pixels per latent.
        tile: side in pixels of what is encoded at once, as for `decode`.
        latents_of: scaled latents of a tile of pixels in the autoencoder's dtype; None for autoencoders of Flux.
        channels: of the latents; None for what the autoencoder's configuration says.

    Returns:
        `[1, C, h, w]`, scaled as the pipeline denoises them, in the autoencoder's dtype, where the pipeline runs.

    Raises:
        BadInput: if the tile is too small for the autoencoder.
    """
    import torch

    config, device, dtype = pipe.vae.config, pipe._execution_device, pipe.vae.dtype
    pixels = picture if isinstance(picture, torch.Tensor) else pipe.image_processor.preprocess(picture)

    def latents_by_factor(window: torch.Tensor) -> torch.Tensor:
        encoded = pipe.vae.encode(window)
        raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (raw - config.shift_factor) * config.scaling_factor

    def encode_tile(place: tuple[Piece, Piece]) -> torch.Tensor:
        return (latents_of or latents_by_factor)(_window(pixels, place, scale).to(device, dtype))

    scale = pipe.vae_scale_factor
    rows, columns = (side // scale for side in pixels.shape[2:])
    tiling = _tiling(pipe.vae, "encoder", tile, scale)
    if rows * columns <= tiling.side**2:
        tiling = _WHOLE
    latents = torch.zeros(1, channels or config.latent_channels, rows, columns, device=device, dtype=dtype)
    with torch.no_grad():
        places = list(product(pieces(rows, tiling), pieces(columns, tiling)))
        _add_tiles(latents, map(encode_tile, places), places, 1)
    pipe.maybe_free_model_hooks()
    return latents


@dataclass(frozen=True)
class Tiling:
    """How an axis is cut; in latents.

    Attributes:
        side: of a tile.
        overlap: what a tile shares with the next at least.
        blend: how much of that fades from one to the other; in the middle of what they share.
    """

    side: int
    overlap: int
    blend: int


_WHOLE = Tiling(side=2**62, overlap=0, blend=0)


@dataclass(frozen=True)
class Piece:
    """A tile on one axis, in latents.

    Attributes:
        start: where the tile begins.
        stop: where it ends.
        first: where what is used of it begins.
        last: where that ends.
        fade_in: latents after `first` over which it comes up.
        fade_out: latents before `last` over which it goes down.
    """

    start: int
    stop: int
    first: int
    last: int
    fade_in: int
    fade_out: int


def pieces(length: int, tiling: Tiling) -> list[Piece]:
    """Tiles over an axis of `length` latents: of one size, spread evenly, of weights that add up to 1 everywhere."""
    side, blend = tiling.side, tiling.blend
    if length <= side:
        return [Piece(0, length, 0, length, 0, 0)]
    count = math.ceil((length - tiling.overlap) / (side - tiling.overlap))
    starts = [index * (length - side) // (count - 1) for index in range(count)]
    # What a tile shares with the one before it is blended in its middle.
    blends = [(start + before + side - blend) // 2 for before, start in pairwise(starts)]
    firsts, lasts = [0, *blends], [*(first + blend for first in blends), length]
    return [
        Piece(start, start + side, first, last, blend if index else 0, blend if index < count - 1 else 0)
        for index, (start, first, last) in enumerate(zip(starts, firsts, lasts, strict=True))
    ]


def receptive_field(vae: Any, part: Literal["encoder", "decoder"]) -> int:
    """How many latents beyond its own place a result of an `AutoencoderTiny` depends on, in one direction.

    Everything else in its layers acts on each place alone.
    """
    import torch

    reach, scale = 0.0, 1.0  # scale: places of the layer at hand per place of the input, along an axis
    for module in getattr(vae, part).modules():
        if isinstance(module, torch.nn.Conv2d):
            reach += (module.kernel_size[0] // 2) / scale
            scale /= module.stride[0]
        elif isinstance(module, torch.nn.Upsample):
            # Nearest pixels are copied; the other modes reach at most as far as the cubic one, by two.
            reach += 0 if module.mode == "nearest" else 2 / scale
            scale *= float(module.scale_factor)  # pyright: ignore[reportArgumentType]
    # The encoder was measured in pixels, and its scale has become latents per pixel.
    return math.ceil(reach * scale if part == "encoder" else reach)


def _tiling(vae: Any, part: Literal["encoder", "decoder"], tile: int | None, scale: int) -> Tiling:
    """Tiles for an autoencoder of `scale` pixels per latent.

    Raises:
        BadInput: if a tile has no middle that could be used.
    """
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    side = (TILE if tile is None else tile) // scale
    if isinstance(vae, AutoencoderTiny):
        overlap, blend = 2 * receptive_field(vae, part), 0
    else:
        overlap = blend = int(side * _OVERLAP)
    smallest = max(overlap + 1, 8)
    if side < smallest:
        least = -(-smallest * scale // _TILE_UNIT) * _TILE_UNIT
        raise BadInput(f"tiles of {tile} pixels are too small for this autoencoder: use {least} or more")
    return Tiling(side, overlap, blend)


def _window(source: torch.Tensor, place: tuple[Piece, Piece], scale: int) -> torch.Tensor:
    """A tile of `[1, channels, rows, columns]`, of so many places per latent, before it is coded."""
    tall, wide = (slice(piece.start * scale, piece.stop * scale) for piece in place)
    return source[:, :, tall, wide]


def _add_tiles(
    target: torch.Tensor, tiles: Iterable[torch.Tensor], places: Sequence[tuple[Piece, Piece]], scale: int
) -> None:
    """Adds what was made of each tile.

    Args:
        target: zeros, `[1, channels, rows, columns]`.
        tiles: where `target` is, in its dtype.
        places: of each, on both axes.
        scale: of `target`, in places per latent.
    """
    for made, (row, column) in zip(tiles, places, strict=True):
        (tall, tall_in_target), (wide, wide_in_target) = _used(row, scale), _used(column, scale)
        used = made[:, :, tall, wide]
        used = used * _weights(row, scale, used)[:, None] * _weights(column, scale, used)
        target[:, :, tall_in_target, wide_in_target] += used


def _used(piece: Piece, scale: int) -> tuple[slice, slice]:
    """What is used of a tile along an axis: counted within the tile, and within the picture."""
    inner = slice((piece.first - piece.start) * scale, (piece.last - piece.start) * scale)
    return inner, slice(piece.first * scale, piece.last * scale)


def _weights(piece: Piece, scale: int, like: torch.Tensor) -> torch.Tensor:
    """Weights along what is used of a tile, in the dtype and on the device of `like`."""
    import torch

    def ramp(length: int) -> torch.Tensor:
        return (torch.arange(length, dtype=torch.float32) + 0.5) / length

    weights = torch.ones((piece.last - piece.first) * scale)
    if piece.fade_in:
        weights[: piece.fade_in * scale] = ramp(piece.fade_in * scale)
    if piece.fade_out:
        weights[-piece.fade_out * scale :] = 1 - ramp(piece.fade_out * scale)
    return weights.to(like)
