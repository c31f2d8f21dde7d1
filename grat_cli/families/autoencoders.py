"""Autoencoders of diffusers that families share: operations and memory of coding, from shapes alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

# Side in pixels of the tiles that large pictures are decoded in; `picture_coding` makes them.
PICTURE_TILE = 1024
# Sides in pixels, and frames of latents and how many of them are new, of the tiles that AutoencoderKLHunyuanVideo
# decodes: tiles overlap, and each window of frames but the first decodes one more than it keeps.
VIDEO_TILE, VIDEO_WINDOW, VIDEO_WINDOW_STEP = 256, 5, 3
# torch convolves fp32 on a CPU by way of columns, 27 numbers for each of a kernel of 3x3x3, where channels x frames x
# rows are no more than this, and else by oneDNN (ConvParams::use_mkldnn, aten/src/ATen/native/Convolution.cpp). 16 bits
# go by oneDNN, or where that has none for the CPU, by way of columns.
_SMALL_CONVOLUTION = 20_480


@dataclass(frozen=True)
class Pixels:
    """Size of what comes out, in pixels and frames."""

    width: int
    height: int
    frames: int = 1

    @classmethod
    def of(cls, size: Any) -> Pixels:
        """Of a `Resolution` or `VideoSize`."""
        return cls(size.width, size.height, size.frames or 1)

    @property
    def count(self) -> int:
        """Numbers in three channels."""
        return 3 * self.width * self.height * self.frames


@dataclass(frozen=True)
class Coding:
    """How an autoencoder runs.

    Attributes:
        element: bytes of an activation.
        on_cpu: whether it runs on the CPU.
        tile: side in pixels of the tiles that are decoded one by one; None for the default.
        has_convolutions: whether oneDNN has some of the dtype for the CPU; without, all go by way of columns.
    """

    element: int
    on_cpu: bool = False
    tile: int | None = None
    has_convolutions: bool = True

    def by_columns(self, inputs: int, frames: int, rows: int) -> bool:
        """Whether a convolution by 3x3x3 of so many channels, frames and rows goes by way of columns."""
        small = self.element == 4 and inputs * (frames + 2) * (rows + 2) <= _SMALL_CONVOLUTION
        return self.on_cpu and (small or not self.has_convolutions)


class Sample(NamedTuple):
    """Work of an autoencoder's own kind, to measure a rate by: floating-point operations, a call, how often."""

    flop: float
    run: Callable[[], Any]
    repeats: int


@dataclass(frozen=True)
class AutoencoderShape(ABC):
    """An autoencoder.

    Attributes:
        channels: of its levels, finest first.
        layers: residual blocks of each of the decoder's levels, finest first.
        latent_channels: of the latents.
        parameters: all weights.
    """

    channels: tuple[int, ...]
    layers: tuple[int, ...]
    latent_channels: int
    parameters: int

    @classmethod
    def of(cls, config: Mapping[str, Any], parameters: int) -> Self:
        """From a configuration of diffusers, and a number of weights."""
        channels = tuple(int(count) for count in config["block_out_channels"])
        layers = (int(config["layers_per_block"]) + 1,) * len(channels)
        return cls(channels, layers, int(config["latent_channels"]), parameters)

    @property
    def scale(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.channels) - 1)

    @abstractmethod
    def decode_flop(self, size: Pixels, tile: int | None = None) -> float:
        """Floating-point operations of decoding; of convolutions alone, which are nearly all of it."""

    def encode_flop(self, size: Pixels, tile: int | None = None) -> float:
        """Likewise of encoding; 0 where nothing is encoded."""
        return 0.0

    @abstractmethod
    def decode_moments(self, size: Pixels, coding: Coding) -> dict[str, float]:
        """Bytes besides weights at the moments of decoding that may be its peak."""

    def encode_moments(self, size: Pixels, coding: Coding) -> dict[str, float]:
        """Likewise of encoding a picture; nothing where none is encoded."""
        return {"encoder": 0.0}

    @abstractmethod
    def sample(self, device: torch.device, dtype: torch.dtype) -> Sample:
        """Convolutions as when decoding, on a few latents."""

    def _rising(self) -> Iterator[tuple[int, int, int, int]]:
        """Levels of the decoder: number, blocks, channels of the level before, and its own."""
        previous = self.channels[-1]
        for level, (channels, blocks) in enumerate(zip(reversed(self.channels), reversed(self.layers), strict=True)):
            yield level, blocks, previous, channels
            previous = channels


class PictureAutoencoder(AutoencoderShape):
    """What autoencoders of pictures have in common.

    Attributes:
        tile: side in pixels of what is coded at once, where nothing else is asked for.
    """

    tile: ClassVar[int] = PICTURE_TILE

    @abstractmethod
    def _decoder_peak(self, places: int) -> float:
        """Bytes at the peak of the decoder, where a channel of latents has so many."""

    @abstractmethod
    def _first_level(self, plane: float) -> float:
        """Bytes at the peak of the encoder besides its input: its first level is the largest."""

    def decode_moments(self, size: Pixels, coding: Coding) -> dict[str, float]:
        high, wide = self._coded_at_once(size, coding)
        of_tile = self._decoder_peak((high // self.scale) * (wide // self.scale) * coding.element)
        # Pixels are collected in main memory in fp32.
        collected = size.count * 4 if coding.on_cpu else 0
        return {"decoder": of_tile + 2 * self._latents(size, coding) + collected}

    def encode_moments(self, size: Pixels, coding: Coding) -> dict[str, float]:
        high, wide = self._coded_at_once(size, coding)
        plane = high * wide * coding.element * self.channels[0]
        of_tile = 3 * high * wide * coding.element + self._first_level(plane)
        pixels = size.count * 4 if coding.on_cpu else 0
        return {"encoder": of_tile + self._latents(size, coding) + pixels}

    def _coded_at_once(self, size: Pixels, coding: Coding) -> tuple[int, int]:
        """Height and width in pixels."""
        tile = coding.tile or self.tile
        return (tile, tile) if size.width * size.height > tile**2 else (size.height, size.width)

    def _latents(self, size: Pixels, coding: Coding) -> int:
        return size.width * size.height // self.scale**2 * self.latent_channels * coding.element

    def sample(self, device: torch.device, dtype: torch.dtype) -> Sample:
        """A convolution with its activation, of 32 channels as at the finest level of a small decoder."""
        import torch
        from torch.nn import functional

        channels, side = 32, 256 if device.type == "cpu" else 1024
        planes = torch.randn(1, channels, side, side, device=device, dtype=dtype)
        kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype) / (3 * channels**0.5)
        flop = 2.0 * 9 * channels**2 * side**2
        return Sample(flop, lambda: functional.relu(functional.conv2d(planes, kernel, padding=1)), 3)


class KlAutoencoder(PictureAutoencoder):
    """`AutoencoderKL`."""

    def decode_flop(self, size: Pixels, tile: int | None = None) -> float:
        places = _pixels_in_tiles(size, tile) / self.scale**2
        total = 5 * self.channels[-1] ** 2 * places  # the middle
        for level, blocks, previous, channels in self._rising():
            at = places * 4**level
            total += (previous + (2 * blocks - 1) * channels) * channels * at
            if level + 1 < len(self.channels):
                total += 4 * channels**2 * at
        return 2 * 9 * total

    def encode_flop(self, size: Pixels, tile: int | None = None) -> float:
        """The encoder has a block less at each level."""
        pixels = _pixels_in_tiles(size, tile)
        previous, total = self.channels[0], 0.0
        for level, (channels, layers) in enumerate(zip(self.channels, self.layers, strict=True)):
            at = pixels / 4**level
            total += (previous + (2 * (layers - 1) - 1) * channels) * channels * at
            if level + 1 < len(self.channels):
                total += channels**2 * at / 4
            previous = channels
        return 2 * 9 * (total + 5 * previous**2 * pixels / self.scale**2)  # with the middle

    def _decoder_peak(self, places: int) -> float:
        peak = 0.0
        for level, _, previous, channels in self._rising():
            place = places * 4**level
            first, plane = previous * place, channels * place  # a level's input is held until it ends
            peak = max(peak, first + _residual_block(first, plane), first + plane + _residual_block(plane, plane))
            if level + 1 < len(self.channels):
                up = 4 * plane
                peak = max(peak, first + plane + up + _convolution(up, up))
        return peak

    def _first_level(self, plane: float) -> float:
        return 2 * plane + _residual_block(plane, plane)


class TinyAutoencoder(PictureAutoencoder):
    """`AutoencoderTiny`."""

    @classmethod
    def of(cls, config: Mapping[str, Any], parameters: int) -> Self:
        # Its decoder's lists begin with the coarsest level.
        channels = tuple(int(count) for count in reversed(config["decoder_block_out_channels"]))
        layers = tuple(int(count) for count in reversed(config["num_decoder_blocks"]))
        return cls(channels, layers, int(config["latent_channels"]), parameters)

    def decode_flop(self, size: Pixels, tile: int | None = None) -> float:
        places, total = size.width * size.height / self.scale**2, 0.0
        for level, blocks, _, channels in self._rising():
            # A convolution without a change of channels closes a level.
            total += (3 * blocks + 1) * channels**2 * (places * 4**level)
        return 2 * 9 * total

    def encode_flop(self, size: Pixels, tile: int | None = None) -> float:
        total = 0.0
        for level, (channels, layers) in enumerate(zip(self.channels, self.layers, strict=True)):
            at = size.width * size.height / 4**level
            total += 3 * layers * channels**2 * at
            if level + 1 < len(self.channels):
                total += channels**2 * at / 4
        return 2 * 9 * total

    def _decoder_peak(self, places: int) -> float:
        peak = 0.0
        for level, _, _, channels in self._rising():
            plane = places * 4**level * channels
            # A block's input, what its first layers made, and a convolution.
            peak = max(peak, 2 * plane + _convolution(plane, plane))
            if level + 1 < len(self.channels):
                peak = max(peak, 4 * plane + _convolution(4 * plane, 4 * plane))
        return peak

    def _first_level(self, plane: float) -> float:
        return 2 * plane + _convolution(plane, plane)


class HunyuanVideoAutoencoder(AutoencoderShape):
    """`AutoencoderKLHunyuanVideo`, which decodes in overlapping tiles, a few frames at a time."""

    def decode_flop(self, size: Pixels, tile: int | None = None) -> float:
        windows, high, wide = self._parts(size, tile)
        return sum(self._flop(frames, rows, columns) for frames in windows for rows in high for columns in wide)

    def _flop(self, frames: int, rows: int, columns: int) -> float:
        """Of latents of a size, decoded whole."""
        # Two operations per weight of a kernel of 3x3x3. In the middle two residual blocks, of two convolutions each.
        total = 4.0 * frames * rows * columns * self.channels[-1] ** 2
        for level, blocks, previous, channels in self._rising():
            total += frames * rows * columns * (previous + (2 * blocks - 1) * channels) * channels
            if level < 3:
                frames, rows, columns = _doubled(level, frames, rows, columns)
                total += frames * rows * columns * channels**2
        return 2 * 27 * (total + frames * rows * columns * self.channels[0] * 3)

    def decode_moments(self, size: Pixels, coding: Coding) -> dict[str, float]:
        windows, high, wide = self._parts(size, coding.tile)
        latent_frames, rows, columns = (size.frames - 1) // 4 + 1, size.height // self.scale, size.width // self.scale
        frame = 3 * size.height * size.width * coding.element
        overlapping = sum(high) * sum(wide) / (rows * columns)

        # Tiles are kept until a window is whole, windows until the video is; both overlap.
        held = 2.0 * latent_frames * rows * columns * self.latent_channels * coding.element
        decoding = 0.0
        for frames in windows:
            of_tile = max(self._decoder_peak(frames, h, w, coding) for h in set(high) for w in set(wide))
            decoded = frame * (4 * frames - 3)
            in_tiles = decoded * overlapping if len(high) * len(wide) > 1 else 0
            decoding = max(decoding, held + in_tiles + of_tile, held + in_tiles + decoded)
            held += decoded
        return {"decoder": decoding, "joining of windows": held + frame * size.frames * (len(windows) > 1)}

    def _parts(self, size: Pixels, tile: int | None) -> tuple[list[int], list[int], list[int]]:
        """Latents of the overlapping parts along time, height and width."""
        tile = tile or VIDEO_TILE
        latent_frames = (size.frames - 1) // 4 + 1
        windows, high, wide = [latent_frames], [size.height // self.scale], [size.width // self.scale]
        if latent_frames > VIDEO_WINDOW - 1:
            windows = _parts(latent_frames, VIDEO_WINDOW, VIDEO_WINDOW_STEP)
        if max(size.height, size.width) > tile:
            step = max(1, tile * 3 // 4 // self.scale)
            high, wide = (_parts(side, tile // self.scale, step) for side in (high[0], wide[0]))
        return windows, high, wide

    def _decoder_peak(self, frames: int, rows: int, columns: int, coding: Coding) -> float:
        """Bytes at the peak of the decoder, on latents of a size."""
        element = coding.element

        def convolution(inputs: int, outputs: int) -> float:
            return convolved(inputs, outputs, (frames, rows, columns), coding)

        def residual_block(inputs: int, outputs: int) -> float:
            plane = frames * rows * columns * element
            return max(
                2 * inputs * plane,
                inputs * plane + convolution(inputs, outputs),
                outputs * plane + convolution(outputs, outputs),
                (3 if inputs == outputs else 4) * outputs * plane,
            )

        peak = 0.0
        for level, _, previous, channels in self._rising():
            places = frames * rows * columns * element
            first, plane = previous * places, channels * places  # a level's input is held until it ends
            own = first + plane + residual_block(channels, channels)
            peak = max(peak, first + residual_block(previous, channels), own)
            if level < 3:
                frames, rows, columns = _doubled(level, frames, rows, columns)
                up = channels * frames * rows * columns * element
                later = up * (frames - 1) / frames  # of all frames but the first, which is joined
                peak = max(peak, first + plane + later + up + convolution(channels, channels))
        return peak

    def sample(self, device: torch.device, dtype: torch.dtype) -> Sample:
        """The decoder with random weights."""
        import torch
        from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoDecoder3D

        side = 32
        while side > 4 and self._flop(3, side, side) > (4e10 if device.type == "cpu" else 1e13):
            side //= 2
        with torch.device("meta"):
            decoder = HunyuanVideoDecoder3D(
                in_channels=self.channels[-1],
                block_out_channels=self.channels,
                layers_per_block=self.layers[0] - 1,
                norm_num_groups=1,
                mid_block_add_attention=False,
            )
        decoder = decoder.to_empty(device=device).to(dtype)
        for weight in decoder.parameters():
            weight.fill_(0.01)  # memory as it was found may hold numbers that a CPU is slow with
        latents = torch.randn(1, self.channels[-1], 3, side, side, device=device, dtype=dtype)
        # Large enough on a CPU that neither its first call nor a pause of the machine weighs much.
        return Sample(self._flop(3, side, side), lambda: decoder(latents), 0 if device.type == "cpu" else 2)


@dataclass(frozen=True)
class WanAutoencoder(AutoencoderShape):
    """`AutoencoderKLWan`, which decodes a frame of latents at a time, and keeps what its convolutions saw of the last.

    Attributes:
        patch: pixels per side that it treats as channels of one.
        residual: whether its levels have shortcuts, as that of Wan 2.2 5B has.
        encoder_channels: of the encoder's levels, finest first.
    """

    patch: int = 1
    residual: bool = False
    encoder_channels: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], parameters: int) -> Self:
        base = int(config.get("decoder_base_dim") or config["base_dim"])
        channels = tuple(base * int(factor) for factor in config["dim_mult"])
        layers = (int(config["num_res_blocks"]) + 1,) * len(channels)
        patch, residual = int(config.get("patch_size") or 1), bool(config.get("is_residual"))
        encoder = tuple(int(config["base_dim"]) * int(factor) for factor in config["dim_mult"])
        return cls(channels, layers, int(config["z_dim"]), parameters, patch, residual, encoder)

    @property
    def scale(self) -> int:
        return 2 ** (len(self.channels) - 1) * self.patch

    def decode_flop(self, size: Pixels, tile: int | None = None) -> float:
        frames = (size.frames - 1) // 4 + 1
        return sum(
            self._flop(1, rows, columns, grows=False) + (frames - 1) * self._flop(1, rows, columns)
            for rows, columns in self._tiles(size, tile)
        )

    def decode_moments(self, size: Pixels, coding: Coding) -> dict[str, float]:
        frames = (size.frames - 1) // 4 + 1
        video = float(size.count * coding.element)
        latents = video / size.count * self.latent_channels * frames * self._places(size)
        tiles = self._tiles(size, coding.tile)
        in_tiles = sum(rows * columns for rows, columns in tiles) / self._places(size)
        largest = max(tiles, key=lambda tile: tile[0] * tile[1])
        grows = frames > 1
        decoding = self._decoder_peak(*largest, coding, grows)
        if len(tiles) > 1:
            # Tiles are kept until all are decoded, and blended; then whole rows of them, and the video.
            return {
                "decoder": 2 * latents + video * in_tiles + decoding,
                "joining of tiles": 2 * latents + video * (in_tiles + 2),
            }
        # Each frame's pixels are joined to those before, which copies them; then they are clipped.
        return {
            "decoder": 2 * latents + video * (frames - 1) / frames + decoding,
            "joining of frames": 2 * latents + 2 * video + self._caches(*largest, coding, grows),
        }

    def encode_flop(self, size: Pixels, tile: int | None = None) -> float:
        """Of a first frame and what follows it, which is empty; where latents are coarse, of the frame alone."""
        later = 0 if self.residual else (size.frames - 1) // 4
        rows, columns = size.height // self.patch, size.width // self.patch
        return self._encoder_flop(1, rows, columns) + later * self._encoder_flop(4, rows, columns)

    def _encoder_flop(self, frames: int, rows: int, columns: int) -> float:
        """Of so many frames: the first, or four that follow others."""
        before, later, total = self.encoder_channels[0], frames > 1, 0.0
        total += 27.0 * frames * rows * columns * 3 * self.patch**2 * before
        for level, (channels, layers) in enumerate(zip(self.encoder_channels, self.layers, strict=True)):
            places = frames * rows * columns
            total += 27 * places * (before + (2 * (layers - 1) - 1) * channels) * channels
            total += places * before * channels * (before != channels)
            before = channels
            if level + 1 < len(self.encoder_channels):
                rows, columns = rows // 2, columns // 2
                total += 9 * frames * rows * columns * channels**2
                if later and level > 0:
                    frames //= 2
                    total += 3 * frames * rows * columns * channels**2
        places, latents = frames * rows * columns, 2 * self.latent_channels
        total += 4 * 27 * places * before**2 + 4 * places * before**2 + 2 * places * rows * columns * before
        return 2 * (total + 27 * places * before * latents + places * latents**2)

    def encode_moments(self, size: Pixels, coding: Coding) -> dict[str, float]:
        """Of the same, at its first level, which is the largest; the pixels are given."""
        frames = 1 if self.residual else min(size.frames, 4)
        grows = not self.residual and size.frames > 1
        rows, columns = size.height // self.patch, size.width // self.patch
        channels, element = self.encoder_channels[0], coding.element
        plane = channels * frames * rows * columns * element
        given = 3 * (1 if self.residual else size.frames) * size.height * size.width * element
        # What convolutions have kept: two frames of each level's.
        kept, of_level = 0.0, rows * columns * element * (2 if grows else 1)
        for number, (own, layers) in enumerate(zip(self.encoder_channels, self.layers, strict=True)):
            kept += own * (2 * (layers - 1) + (number > 0)) * of_level / 4**number
        # Of a residual block its input, and what its second convolution takes; levels with shortcuts copy their input.
        convolution = _streamed_convolution(channels, channels, (frames, rows, columns), coding, grows)
        return {"encoder": given + kept + plane * (2 + self.residual) + convolution}

    def sample(self, device: torch.device, dtype: torch.dtype) -> Sample:
        """The decoder with random weights, on one frame."""
        import torch
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

        side = 64
        while side > 4 and self._flop(1, side, side, grows=False) > (4e10 if device.type == "cpu" else 1e13):
            side //= 2
        factors: Any = [channels // self.channels[0] for channels in self.channels]
        with torch.device("meta"):
            decoder = WanDecoder3d(
                dim=self.channels[0],
                z_dim=self.latent_channels,
                dim_mult=factors,
                num_res_blocks=self.layers[0] - 1,
                out_channels=3 * self.patch**2,
                temperal_upsample=[True, True, False],
                is_residual=False,
            )
        decoder = decoder.to_empty(device=device).to(dtype)
        for weight in decoder.parameters():
            weight.fill_(0.01)  # memory as it was found may hold numbers that a CPU is slow with
        latents = torch.randn(1, self.latent_channels, 1, side, side, device=device, dtype=dtype)
        flop = replace(self, residual=False)._flop(1, side, side, grows=False)
        return Sample(flop, lambda: decoder(latents), 0 if device.type == "cpu" else 2)

    def _places(self, size: Pixels) -> int:
        """Latents of a frame."""
        return size.width * size.height // self.scale**2

    def _tiles(self, size: Pixels, tile: int | None) -> list[tuple[int, int]]:
        """Rows and columns of latents that are decoded at once."""
        high, wide = [size.height // self.scale], [size.width // self.scale]
        if tile is not None and max(size.height, size.width) > tile:
            step = max(1, tile * 3 // 4 // self.scale)
            high, wide = (_parts(side, tile // self.scale, step) for side in (high[0], wide[0]))
        return [(rows, columns) for rows in high for columns in wide]

    def _levels(self, grows: bool) -> Iterator[tuple[int, int, int, int, bool]]:
        """Levels of the decoder: residual blocks, channels in, own, those after doubling, and whether time doubles."""
        before = self.channels[-1]
        for level, blocks, _, channels in self._rising():
            last = level + 1 == len(self.channels)
            after = channels if self.residual or last else channels // 2
            yield blocks, before, channels, after, grows and level < 2
            before = after

    def _flop(self, frames: int, rows: int, columns: int, grows: bool = True) -> float:
        """Of so many frames of latents, decoded at once; where time grows they are not the first."""
        middle, places = self.channels[-1], frames * rows * columns
        total = 27.0 * places * self.latent_channels * middle + places * self.latent_channels**2
        total += 4 * 27 * places * middle**2 + 4 * places * middle**2 + 2 * places * rows * columns * middle
        for number, (blocks, before, channels, after, doubles) in enumerate(self._levels(grows)):
            total += 27 * places * (before + (2 * blocks - 1) * channels) * channels
            total += places * before * channels * (before != channels)
            if number + 1 < len(self.channels):
                if doubles:
                    total += 3 * places * channels * 2 * channels
                    places *= 2
                places *= 4
                total += 9 * places * channels * after
        return 2 * (total + 27 * places * self.channels[0] * 3 * self.patch**2)

    def _convolutions(self, rows: int, columns: int, grows: bool) -> Iterator[tuple[int, int]]:
        """Of each convolution over time its channels, and places of a frame."""
        places = rows * columns
        yield self.latent_channels, places
        yield from [(self.channels[-1], places)] * 4
        for number, (blocks, before, channels, _, doubles) in enumerate(self._levels(grows)):
            yield before, places
            yield from [(channels, places)] * (2 * blocks - 1)
            if doubles:
                yield channels, places
            places *= 4 if number + 1 < len(self.channels) else 1
        yield self.channels[0], places

    def _caches(self, rows: int, columns: int, coding: Coding, grows: bool) -> float:
        """Bytes of the last two frames that convolutions over time have seen."""
        kept = 2 if grows else 1
        return sum(
            kept * channels * places * coding.element for channels, places in self._convolutions(rows, columns, grows)
        )

    def _decoder_peak(self, rows: int, columns: int, coding: Coding, grows: bool) -> float:
        """Bytes at the peak of the decoder on a frame of latents, but the first where there are more."""
        element, frames = coding.element, 1

        def convolution(inputs: int, outputs: int) -> float:
            return _streamed_convolution(inputs, outputs, (frames, rows, columns), coding, grows)

        def residual_block(inputs: int, outputs: int) -> float:
            """Besides its input: its shortcut, its norm, which takes three times its result, and convolutions."""
            plane = frames * rows * columns * element
            shortcut = outputs * plane if inputs != outputs else 0.0
            return shortcut + max(
                3 * inputs * plane,
                inputs * plane + convolution(inputs, outputs),
                3 * outputs * plane + outputs * plane,
                outputs * plane + convolution(outputs, outputs),
            )

        peak = 0.0
        caches = self._caches(rows, columns, coding, grows)
        for number, (blocks, before, channels, after, doubles) in enumerate(self._levels(grows)):
            plane = frames * rows * columns * element
            copied = before * plane if self.residual else 0.0
            peak = max(peak, copied + before * plane + residual_block(before, channels))
            # The input of a level is held until its first block ends.
            if blocks > 1:
                peak = max(peak, copied + channels * plane + residual_block(channels, channels))
            if number + 1 < len(self.channels):
                if doubles:
                    frames *= 2
                rows, columns = 2 * rows, 2 * columns
                larger = frames * rows * columns * element
                peak = max(peak, copied + channels * plane + (channels + 2 * after) * larger)
        return caches + peak


class QwenImageAutoencoder(PictureAutoencoder):
    """`AutoencoderKLQwenImage`, of videos, on pictures of one frame.

    Its convolutions are causal: before the frame they see two of zeros, and each keeps its input for frames that never
    come.
    """

    # Larger than the pictures that the model was trained on, which are decoded whole as in stock diffusers.
    tile = 1536

    @classmethod
    def of(cls, config: Mapping[str, Any], parameters: int) -> Self:
        """See `AutoencoderShape`, as for all below."""
        channels = tuple(int(config["base_dim"]) * int(times) for times in config["dim_mult"])
        layers = (int(config["num_res_blocks"]) + 1,) * len(channels)
        return cls(channels, layers, int(config["z_dim"]), parameters)

    def decode_flop(self, size: Pixels, tile: int | None = None) -> float:
        places = _pixels_in_tiles(size, tile or self.tile) / self.scale**2
        top = self.channels[-1]
        total = (27 * self.latent_channels * top + (4 * 27 + 4) * top**2) * places
        for level, blocks, previous, channels in self._rising_in_halves():
            at = places * 4**level
            total += (27 * (previous + (2 * blocks - 1) * channels) + previous * (previous != channels)) * channels * at
            if level + 1 < len(self.channels):
                total += 4 * 9 * channels * (channels // 2) * at
        return 2 * (total + 27 * self.channels[0] * 3 * places * self.scale**2)

    def encode_flop(self, size: Pixels, tile: int | None = None) -> float:
        """The encoder has a block less at each level."""
        pixels = _pixels_in_tiles(size, tile or self.tile)
        previous, total = self.channels[0], 27 * 3 * self.channels[0] * pixels
        for level, (channels, layers) in enumerate(zip(self.channels, self.layers, strict=True)):
            at = pixels / 4**level
            blocks = layers - 1
            total += (27 * (previous + (2 * blocks - 1) * channels) + previous * (previous != channels)) * channels * at
            if level + 1 < len(self.channels):
                total += 9 * channels**2 * at / 4
            previous = channels
        middle = (4 * 27 + 4) * previous**2 + 27 * previous * 2 * self.latent_channels
        return 2 * (total + middle * pixels / self.scale**2)

    def _rising_in_halves(self) -> Iterator[tuple[int, int, int, int]]:
        """As `_rising`: what goes on to a finer level has half of its channels."""
        for level, blocks, previous, channels in self._rising():
            yield level, blocks, previous // 2 if level else previous, channels

    def _decoder_peak(self, places: int) -> float:
        top = self.channels[-1] * places
        kept, peak = (self.latent_channels * places + 4 * top), 0.0
        for level, blocks, previous, channels in self._rising_in_halves():
            place = places * 4**level
            first, plane = previous * place, channels * place  # a level's input is held until it ends
            for block in range(blocks):
                inputs = plane if block else first
                peak = max(peak, kept + first + _causal_block(inputs, plane))
                kept += inputs + plane
            if level + 1 < len(self.channels):
                # In four times as many places: the nearest pixels, and of half the channels a convolution.
                peak = max(peak, kept + first + plane + 4 * plane + _convolution(4 * plane, 2 * plane))
        return max(peak, kept + 2 * plane + _causal_convolution(plane, 3 * plane / self.channels[0]))

    def _first_level(self, plane: float) -> float:
        kept, peak = 3 * plane / self.channels[0], 0.0
        for _ in range(self.layers[0] - 1):
            peak = max(peak, kept + plane + _causal_block(plane, plane))
            kept += 2 * plane
        return peak


_CLASSES: Mapping[str, type[AutoencoderShape]] = {
    "AutoencoderKL": KlAutoencoder,
    "AutoencoderKLFlux2": KlAutoencoder,
    "AutoencoderTiny": TinyAutoencoder,
    "AutoencoderKLHunyuanVideo": HunyuanVideoAutoencoder,
    "AutoencoderKLWan": WanAutoencoder,
    "AutoencoderKLQwenImage": QwenImageAutoencoder,
}


def autoencoder_shape(config: Mapping[str, Any], parameters: int = 0) -> AutoencoderShape:
    """The shape of an autoencoder of diffusers.

    Args:
        config: its configuration.
        parameters: how many weights it has; 0 where that does not matter.

    Raises:
        KeyError: if its class is not known here, or a field is missing.
    """
    return _CLASSES[config["_class_name"]].of(config, parameters)


def _streamed_convolution(
    inputs: int, outputs: int, places: tuple[int, int, int], coding: Coding, grows: bool
) -> float:
    """What a convolution over time takes besides its input: what it keeps of it, joins with what it had, and pads.

    Args:
        inputs: channels.
        outputs: likewise.
        places: frames, rows and columns.
        coding: how the autoencoder runs.
        grows: whether there were frames before.
    """
    frames, rows, columns = places
    plane = frames * rows * columns * coding.element
    frame = inputs * rows * columns * coding.element
    kept, joined = min(2, frames + grows) * frame, (frames + 2 * grows) * frame
    padded = inputs * (frames + 2) * (rows + 2) * (columns + 2) * coding.element
    if coding.by_columns(inputs, frames, rows):
        return kept + padded + max(joined, (27 * inputs + outputs) * plane)
    return kept + padded + max(joined, padded + outputs * plane, 2 * outputs * plane)


def _doubled(level: int, frames: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Eight pixels per latent come of three levels; time is doubled at the last two of them."""
    return (2 * frames - 1 if level > 0 else frames), 2 * rows, 2 * columns


def _parts(whole: int, size: int, step: int) -> list[int]:
    """Lengths of the overlapping parts of something."""
    return [min(size, whole - start) for start in range(0, whole, step)]


def _pixels_in_tiles(size: Pixels, tile: int | None) -> float:
    """Pixels that convolutions see, those that tiles have in common more than once."""
    pixels = float(size.width * size.height)
    # A quarter of each tile is its neighbours'.
    return pixels * (4 / 3) ** 2 if pixels > (tile or PICTURE_TILE) ** 2 else pixels


def convolved(inputs: int, outputs: int, places: tuple[int, int, int], coding: Coding) -> float:
    """Bytes that a convolution of frames, rows and columns by 3x3x3 takes besides its input, which is padded first.

    Args:
        inputs: channels that it takes.
        outputs: channels that it makes.
        places: frames, rows and columns.
        coding: how it runs.
    """
    frames, rows, columns = places
    plane = frames * rows * columns * coding.element
    padded = inputs * (frames + 2) * (rows + 2) * (columns + 2) * coding.element
    if coding.by_columns(inputs, frames, rows):
        return padded + (27 * inputs + outputs) * plane
    return padded + max(padded + outputs * plane, 2 * outputs * plane)


def _convolution(inputs: float, outputs: float) -> float:
    """What a convolution takes besides its input: it, its output, and both once more in the kernel's own layout.

    oneDNN frees the input's copy before the plain output is made. cuDNN's kernels for 16-bit tensors want another
    layout as well, and copy in their workspace.
    """
    return max(inputs + outputs, 2 * outputs)


def _causal_convolution(inputs: float, outputs: float) -> float:
    """What a convolution over three frames, of which two are zeros, takes besides its input of one frame."""
    return 3 * inputs + max(3 * inputs + outputs, 2 * outputs)


def _causal_block(inputs: float, outputs: float) -> float:
    """What a residual block of two causal convolutions takes besides its first input and what it keeps of earlier ones.

    Its input, the shortcut where that is another, what goes into the convolution, and that once more to be kept.
    """
    shortcut = 0 if inputs == outputs else outputs
    return (
        inputs
        + shortcut
        + max(
            inputs + inputs + _causal_convolution(inputs, outputs),
            inputs + 2 * outputs + _causal_convolution(outputs, outputs),
        )
    )


def _residual_block(inputs: float, outputs: float) -> float:
    """What a residual block of two convolutions takes besides its input."""
    return max(
        2 * inputs,
        inputs + _convolution(inputs, outputs),
        outputs + _convolution(outputs, outputs),
        (4 if inputs != outputs else 3) * outputs,
    )
