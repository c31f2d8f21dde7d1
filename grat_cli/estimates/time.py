"""How long a run will take, foretold before anything is loaded.

The operations of a run are known from its plan. How fast this machine does them is measured on small samples, one
each of attention, linear layers and convolutions, in a second or two. What comes out is approximate: large
tensors run at other rates than small ones, a machine that is busy elsewhere changes its mind, and loading, text and
the writing of the file are left out.

For a GPU that is not here the rates are shares of what its maker states. No kernel stands behind them yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grat_cli.estimates.components import AutoencoderShape, Components
from grat_cli.estimates.hardware import Device
from grat_cli.estimates.memory import PICTURE_TILE, Execution, Pixels, component_weights
from grat_cli.estimates.planning import Forecast
from grat_cli.families.architectures import Architecture
from grat_cli.models.devices import choose_device, choose_dtype, video_autoencoder_dtype, wait_for
from grat_cli.models.video_size import VideoSize

if TYPE_CHECKING:
    import torch

# Sides and steps of the tiles that AutoencoderKLHunyuanVideo decodes, in pixels and in frames of latents (diffusers
# 0.42.1): tiles overlap, and each window of frames but the first decodes one more than it keeps.
_TILE, _TILE_STEP, _WINDOW, _WINDOW_STEP = 256, 192, 5, 3


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of the two long phases of a video."""

    denoise: float
    decode: float

    @property
    def total(self) -> float:
        """Both, in seconds."""
        return self.denoise + self.decode


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second.

    Attributes:
        attention: over the pairs that a plan allows.
        linear: of a transformer's layers, norms and activations included.
        convolution: of an autoencoder's, likewise.
    """

    attention: float
    linear: float
    convolution: float


def planned_seconds(forecast: Forecast, device: str = "auto", dtype: str = "auto") -> float:
    """Seconds that a video will take, approximately; see `estimate`."""
    return estimate(forecast, device, dtype).total


def estimate(forecast: Forecast, device: str = "auto", dtype: str = "auto") -> TimeEstimate:
    """How long denoising and decoding of a video will take on a device, approximately.

    Args:
        forecast: of a video.
        device: as for `devices.choose_device`.
        dtype: as for `devices.choose_dtype`.

    Raises:
        BadInput: if there is no such device here.
    """
    chosen = choose_device(device)
    return estimate_at(forecast, measured_rates(forecast, chosen, choose_dtype(dtype, chosen)))


def estimate_at(forecast: Forecast, rates: Rates) -> TimeEstimate:
    """How long denoising and decoding take at known rates."""
    architecture, schedule = forecast.architecture, forecast.schedule
    assert isinstance(forecast.size, VideoSize), "the forecast is of an image"
    denoise = schedule.steps * step_seconds(forecast, rates)
    return TimeEstimate(denoise, decode_flop(architecture, forecast.size) / rates.convolution)


def step_seconds(forecast: Forecast, rates: Rates) -> float:
    """Seconds of a denoising step at known rates, mean over the run."""
    architecture = forecast.architecture
    calls = architecture.calls_per_step(forecast.preset.sampling.guidance)
    linear_flop = calls * architecture.linear_flop(forecast.main_plan.tokens)
    return forecast.planned_flop_per_step / rates.attention + linear_flop / rates.linear


# Shares of a GPU's peak that grat expects to reach: attention as plain Triton does on an H100, 490 of 989 TFLOP/s
# (facebookexperimental/triton #205), large matrix products 790 of 989; convolutions are a guess.
ATTENTION_SHARE, LINEAR_SHARE, CONVOLUTION_SHARE = 490 / 989, 790 / 989, 0.4
# How often a block reads or writes a hidden state outside attention and matrix products: norm and modulation 6, GELU
# 16 of an inner layer, joining it with attention's output 10 and text with image 2, rotation 4, gate and sum 5.
_PASSES_OF_BLOCK = 43
_DISK = 2e9  # bytes per second that weights are read at, as from an NVMe disk


def estimate_for(
    forecast: Forecast, components: Components, execution: Execution, device: Device
) -> dict[str, float] | None:
    """Seconds of the phases of a run on a GPU, from its maker's data; None where that is not known.

    Args:
        forecast: of the run.
        components: parts of the pipeline.
        execution: how it uses the GPU.
        device: the GPU.
    """
    if device.tensor_rate is None or device.bandwidth is None or device.link is None:
        return None
    architecture, main = forecast.architecture, forecast.main_plan
    # Tensor cores take fp32 as TF32, at half of the rate.
    peak = device.tensor_rate if execution.element == 2 else device.tensor_rate / 2
    calls = architecture.calls_per_step(forecast.preset.sampling.guidance)
    weights = component_weights(components, execution)

    hidden = main.tokens * components.transformer.width * execution.element
    compute = forecast.planned_flop_per_step / main.tile_efficiency() / (ATTENTION_SHARE * peak) + calls * (
        architecture.linear_flop(main.tokens) / (LINEAR_SHARE * peak)
        + (_PASSES_OF_BLOCK * architecture.layers * hidden + weights["transformer"]) / device.bandwidth
    )
    # Weights that come anew with every call: by group while the block before is at work, by layer before each.
    moving = calls * weights["transformer"] / device.link
    step = max(compute, moving) if execution.offload == "group" else compute
    step += moving if execution.offload == "sequential" else 0

    tokens = max(encoder.tokens for encoder in components.text_encoders)
    prompts = calls
    size = Pixels.of(forecast.size)
    encoding = {}
    if isinstance(forecast.size, VideoSize):
        convolutions = decode_flop(architecture, forecast.size)
    else:
        convolutions = picture_decode_flop(components.autoencoder, size, execution.tile)
        encoding["encode"] = picture_encode_flop(components.autoencoder, size, execution.tile) / (
            CONVOLUTION_SHARE * peak
        )
    total = sum(weights.values())
    return encoding | {
        "load": total / _DISK + (total / device.link if execution.offload == "none" else 0),
        "text": prompts * 2 * components.text_parameters * tokens / (LINEAR_SHARE * peak)
        + (weights["text"] / device.link if execution.offload != "none" else weights["text"] / device.bandwidth),
        "denoise": forecast.schedule.steps * step + (moving / calls if execution.offload == "model" else 0),
        "decode": convolutions / (CONVOLUTION_SHARE * peak),
    }


def phase_seconds(
    runs: Sequence[Forecast], components: Components, execution: Execution, device: Device, dtype: str = "auto"
) -> dict[str, float]:
    """Seconds of the phases of a run in one stage or several; nothing where the device's data are not known.

    On the CPU of this machine its rates are measured, in a few seconds, and loading and text are left out.
    """
    total: dict[str, float] = {}
    rates = None
    for number, stage in enumerate(runs):
        if device.kind == "cpu":
            if rates is None:
                chosen = choose_device("cpu")
                rates = measured_rates(stage, chosen, choose_dtype(dtype, chosen))
            found = _at_rates(stage, components, execution, rates)
        else:
            found = estimate_for(stage, components, execution, device) or {}
        for phase, seconds in found.items():
            # Stages after the first begin with a picture; model and text serve all of them.
            if phase not in (("encode",) if number == 0 else ("load", "text")):
                total[phase] = total.get(phase, 0.0) + seconds
    return total


def _at_rates(stage: Forecast, components: Components, execution: Execution, rates: Rates) -> dict[str, float]:
    if isinstance(stage.size, VideoSize):
        found = estimate_at(stage, rates)
        return {"denoise": found.denoise, "decode": found.decode}
    coding = components.autoencoder, Pixels.of(stage.size), execution.tile
    return {
        "encode": picture_encode_flop(*coding) / rates.convolution,
        "denoise": stage.schedule.steps * step_seconds(stage, rates),
        "decode": picture_decode_flop(*coding) / rates.convolution,
    }


def picture_decode_flop(shape: AutoencoderShape, size: Pixels, tile: int | None = None) -> float:
    """Floating-point operations to decode a picture; of convolutions alone, which are nearly all of it."""
    places = _pixels_in_tiles(shape, size, tile) / shape.scale**2
    previous, total = shape.channels[-1], 0.0
    if shape.kind == "kl":
        total += 5 * previous**2 * places  # the middle
    for level, channels in enumerate(reversed(shape.channels)):
        at = places * 4**level
        blocks = list(reversed(shape.layers))[level]
        if shape.kind == "tiny":
            total += (3 * blocks + 1) * channels**2 * at  # a convolution without a change of channels closes a level
        else:
            total += (previous + (2 * blocks - 1) * channels) * channels * at
        if level + 1 < len(shape.channels):
            total += (4 * channels**2 * at) * (shape.kind == "kl")
        previous = channels
    return 2 * 9 * total


def picture_encode_flop(shape: AutoencoderShape, size: Pixels, tile: int | None = None) -> float:
    """Likewise to encode one. The encoder of an AutoencoderKL has a block less at each level."""
    pixels = _pixels_in_tiles(shape, size, tile)
    previous, total = shape.channels[0], 0.0
    for level, (channels, layers) in enumerate(zip(shape.channels, shape.layers, strict=True)):
        at = pixels / 4**level
        if shape.kind == "tiny":
            total += 3 * layers * channels**2 * at
        else:
            total += (previous + (2 * (layers - 1) - 1) * channels) * channels * at
        if level + 1 < len(shape.channels):
            total += channels**2 * at / 4
        previous = channels
    if shape.kind == "kl":
        total += 5 * previous**2 * pixels / shape.scale**2  # the middle
    return 2 * 9 * total


def _pixels_in_tiles(shape: AutoencoderShape, size: Pixels, tile: int | None) -> float:
    """Pixels that convolutions see, those that tiles have in common more than once."""
    pixels = float(size.width * size.height)
    if pixels > (tile or PICTURE_TILE) ** 2 and shape.kind == "kl":
        pixels *= (4 / 3) ** 2  # a quarter of each tile is its neighbours'
    return pixels


def decode_flop(architecture: Architecture, size: VideoSize) -> float:
    """Floating-point operations to decode a video in overlapping tiles, a few frames at a time."""
    assert architecture.decoder is not None
    assert architecture.frames_per_latent is not None
    # Two by two latents make a token.
    pixels = architecture.token_side // 2
    latent_frames = (size.frames - 1) // architecture.frames_per_latent + 1
    windows = [latent_frames]
    if latent_frames > _WINDOW - 1:
        windows = _parts(latent_frames, _WINDOW, _WINDOW_STEP)
    rows, columns = [size.height // pixels], [size.width // pixels]
    if max(size.height, size.width) > _TILE:
        rows, columns = (_parts(whole, _TILE // pixels, _TILE_STEP // pixels) for whole in (rows[0], columns[0]))
    return sum(architecture.decoder.flop(frames, high, wide) for frames in windows for high in rows for wide in columns)


def _parts(whole: int, size: int, step: int) -> list[int]:
    """Lengths of the overlapping parts of something."""
    return [min(size, whole - start) for start in range(0, whole, step)]


def measured_rates(forecast: Forecast, device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of this machine, on samples of a run's own kind."""
    import torch

    of_video = isinstance(forecast.size, VideoSize)
    with torch.no_grad():
        return Rates(
            _attention_rate(forecast, device, dtype),
            _linear_rate(forecast.architecture, device, dtype),
            # Autoencoders of pictures keep the dtype of the run.
            _convolution_rate(
                forecast.architecture, device, video_autoencoder_dtype(device, dtype) if of_video else dtype
            ),
        )


def _attention_rate(forecast: Forecast, device: torch.device, dtype: torch.dtype) -> float:
    import torch

    from grat_kernels import Grid, Grouping, build_plan, span_attention

    main = forecast.main_plan
    # A few groups along every axis, from one that is no larger than the run's own.
    whole, extents = main.grouping.grid.shape, list(main.grouping.group)
    while torch.Size(extents).numel() < (3_000 if device.type == "cpu" else 30_000):
        growing = [axis for axis, extent in enumerate(extents) if extent < whole[axis]]
        if not growing:
            break
        axis = min(growing, key=lambda axis: extents[axis] / main.grouping.group[axis])
        extents[axis] = min(whole[axis], 2 * extents[axis])
    grid = Grid(tuple(min(extent, size) for extent, size in zip(extents, whole, strict=True)))
    plan = build_plan(
        Grouping(grid, main.grouping.group, main.grouping.cells), main.pattern, main.text_len, main.text_first
    )
    architecture = forecast.architecture
    # Heads do not change the rate of a CPU.
    heads = min(architecture.heads, 2) if device.type == "cpu" else architecture.heads
    shape = (1, plan.tokens, heads, architecture.head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    backend = forecast.preset.kernel.backend
    seconds = _seconds(lambda: span_attention(query, key, value, plan, backend=backend), device)
    return 4 * plan.density * plan.tokens**2 * heads * architecture.head_dim / seconds


def _linear_rate(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> float:
    """Of a feed-forward layer with its norm and activation."""
    import torch
    from torch.nn import functional

    width = architecture.heads * architecture.head_dim
    tokens = max(256, int((2e9 if device.type == "cpu" else 1e12) / (16 * width**2)))
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    wide = torch.randn(4 * width, width, device=device, dtype=dtype) / width**0.5
    narrow = wide.T.contiguous()

    def feed_forward() -> torch.Tensor:
        inner = functional.linear(functional.layer_norm(hidden, (width,)), wide)
        return functional.linear(functional.gelu(inner, approximate="tanh"), narrow)

    return 16 * tokens * width**2 / _seconds(feed_forward, device)


def _convolution_rate(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> float:
    """Of a decoder of the model's shape with random weights, on a few latents."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoDecoder3D

    shape = architecture.decoder
    if shape is None:
        return _picture_convolution_rate(device, dtype)
    side = 32
    while side > 4 and shape.flop(3, side, side) > (4e10 if device.type == "cpu" else 1e13):
        side //= 2
    with torch.device("meta"):
        decoder = HunyuanVideoDecoder3D(
            in_channels=shape.channels[-1],
            block_out_channels=shape.channels,
            layers_per_block=shape.layers,
            norm_num_groups=1,
            mid_block_add_attention=False,
        )
    decoder = decoder.to_empty(device=device).to(dtype)
    for weight in decoder.parameters():
        weight.fill_(0.01)  # memory as it was found may hold numbers that a CPU is slow with
    latents = torch.randn(1, shape.channels[-1], 3, side, side, device=device, dtype=dtype)
    # Large enough on a CPU that neither its first call nor a pause of the machine weighs much.
    repeats = 0 if device.type == "cpu" else 2
    return shape.flop(3, side, side) / _seconds(lambda: decoder(latents), device, repeats)


def _picture_convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Of a convolution with its activation, of 32 channels as at the finest level of the demo's decoder."""
    import torch
    from torch.nn import functional

    channels, side = 32, 256 if device.type == "cpu" else 1024
    planes = torch.randn(1, channels, side, side, device=device, dtype=dtype)
    kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype) / (3 * channels**0.5)
    seconds = _seconds(lambda: functional.relu(functional.conv2d(planes, kernel, padding=1)), device)
    return 2 * 9 * channels**2 * side**2 / seconds


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """What a call takes: the best of so many after one that warms up, or that one itself."""
    best = float("inf")
    for number in range(repeats + 1):
        wait_for(device)
        begin = time.perf_counter()
        run()
        wait_for(device)
        if number or not repeats:
            best = min(best, time.perf_counter() - begin)
    return best
