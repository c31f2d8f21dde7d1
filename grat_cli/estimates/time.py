"""How long a run will take, foretold before anything is loaded.

The operations of a run are known from its plan. How fast this machine does them is measured on small samples, one
each of attention, linear layers and convolutions, in a second or two. What comes out is approximate: large
tensors run at other rates than small ones, a machine that is busy elsewhere changes its mind, and loading, text and
the writing of the file are left out.

For a GPU that is not here the rates are shares of what its maker states. No kernel stands behind them yet.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from grat_cli.estimates.hardware import LINK_SHARE, Device
from grat_cli.estimates.memory import Execution, component_weights
from grat_cli.estimates.planning import Forecast
from grat_cli.estimates.ranks import bytes_of_step, density_on_ranks, exchange_of
from grat_cli.families import family_of
from grat_cli.families.autoencoders import Pixels
from grat_cli.families.shapes import Components
from grat_cli.models.devices import choose_device, choose_dtype, wait_for
from grat_kernels.analysis import tile_efficiency

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of the two long phases of a run in one stage."""

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
    """Seconds that a run will take, approximately; see `estimate`."""
    return estimate(forecast, device, dtype).total


def estimate(forecast: Forecast, device: str = "auto", dtype: str = "auto") -> TimeEstimate:
    """How long denoising and decoding will take on a device, approximately.

    Args:
        forecast: of a run in one stage.
        device: as for `devices.choose_device`.
        dtype: as for `devices.choose_dtype`.

    Raises:
        BadInput: if there is no such device here.
    """
    chosen = choose_device(device)
    return estimate_at(forecast, measured_rates(forecast, chosen, choose_dtype(dtype, chosen)))


def estimate_at(forecast: Forecast, rates: Rates) -> TimeEstimate:
    """How long denoising and decoding take at known rates."""
    denoise = forecast.schedule.steps * step_seconds(forecast, rates)
    decoding = forecast.architecture.autoencoder.decode_flop(Pixels.of(forecast.size))
    return TimeEstimate(denoise, decoding / rates.convolution)


def step_seconds(forecast: Forecast, rates: Rates) -> float:
    """Seconds of a denoising step at known rates, mean over the run; reading what is carried is left out."""
    steps = range(forecast.schedule.steps)
    left_out = sum(forecast.carrying(step).flop for step in steps) / len(steps)
    linear_flop = forecast.calls_per_step * (forecast.linear_flop_per_call - left_out)
    return forecast.planned_flop_per_step / rates.attention + linear_flop / rates.linear


# Shares of a GPU's peak that grat expects to reach: attention as plain Triton does on an H100, 490 of 989 TFLOP/s
# (facebookexperimental/triton #205), large matrix products 790 of 989; convolutions are a guess.
ATTENTION_SHARE, LINEAR_SHARE, CONVOLUTION_SHARE = 490 / 989, 790 / 989, 0.4
# How often a block reads or writes a hidden state outside attention and matrix products: norm and modulation 6, GELU
# 16 of an inner layer, joining it with attention's output 10 and text with image 2, rotation 4, gate and sum 5.
_PASSES_OF_BLOCK = 43
# Likewise around the exchanges of an attention: query, key and value are put in order of the ranks, and what comes
# together with the text; what was attended is put in order of the ranks, by head, and together with the text.
_PASSES_OF_EXCHANGE = 2 * (3 * 2 + 3)
_DISK = 2e9  # bytes per second that weights are read at, as from an NVMe disk


class DenoiseSeconds(NamedTuple):
    """What denoising takes on a GPU, summed over the steps of a run in one stage or several.

    Attributes:
        attention: of image tokens, and of text among them.
        rest: linear layers, norms, and what of moved weights and tensors computing does not hide.
        exchange: between GPUs that share a call.
        weights: their gathering, where GPUs have a share of them each.
    """

    attention: float = 0.0
    rest: float = 0.0
    exchange: float = 0.0
    weights: float = 0.0

    @property
    def total(self) -> float:
        """All of it: nothing is exchanged while something is computed."""
        return sum(self)

    def plus(self, other: DenoiseSeconds) -> DenoiseSeconds:
        """Both."""
        return DenoiseSeconds(*map(operator.add, self, other))


def gathered_bytes(components: Components, execution: Execution) -> float:
    """Bytes of weights that a GPU gets in a transformer call from those that it shares them with."""
    called = component_weights(components, execution)["transformer"] / components.transformers
    return called * (1 - 1 / execution.parallel.cp) if execution.shards_weights else 0.0


def denoise_seconds(
    forecast: Forecast, components: Components, execution: Execution, device: Device
) -> DenoiseSeconds | None:
    """What denoising will take on a GPU, or on each of several that share it, from its maker's data; None where that is
    not known.

    Args:
        forecast: of the run.
        components: parts of the pipeline.
        execution: how it uses the GPUs.
        device: each of them.
    """
    if device.tensor_rate is None or device.bandwidth is None or device.link is None or device.peers is None:
        return None
    shape, main, parallel = forecast.architecture.transformer, forecast.main_plan, execution.parallel
    # Tensor cores take fp32 as TF32, at half of the rate.
    peak = device.tensor_rate if execution.element == 2 else device.tensor_rate / 2
    bandwidth, link, between = device.bandwidth, device.link, LINK_SHARE * device.peers[1]
    calls = forecast.calls_per_step // parallel.cfg
    called = component_weights(components, execution)["transformer"] / components.transformers
    # Each GPU has a share of the tokens, and all of the text.
    most = max(exchange_of(forecast, parallel).counts)
    tokens = most + main.text_len
    share = tokens / main.tokens
    row = components.transformer.width * execution.element
    passed = _PASSES_OF_BLOCK * shape.layers * tokens * row + called
    gathered = calls * gathered_bytes(components, execution)

    def of_step(step: int) -> DenoiseSeconds:
        density = density_on_ranks(forecast.schedule, step, parallel.cp)
        pairs = forecast.full_flop_per_step * density / parallel.ranks
        attention = pairs / tile_efficiency(main) / (ATTENTION_SHARE * peak)
        carrying = forecast.carrying(step)
        rest = calls * (
            (forecast.linear_flop(most) - share * carrying.flop) / (LINEAR_SHARE * peak)
            + (passed + share * carrying.device_bytes) / bandwidth
        )
        # Weights that come anew with every call: by group while the block before is at work, as what is carried does
        # from main memory; by layer before each.
        weights_moving = calls * called / link
        meanwhile = calls * share * carrying.link_bytes / link
        meanwhile += weights_moving if execution.offload == "group" else 0
        rest = max(attention + rest, meanwhile) - attention
        rest += weights_moving if execution.offload == "sequential" else 0
        exchange = max(bytes_of_step(forecast, parallel, step)) / between
        if parallel.cp > 1:
            attentions = sum(len(forecast.schedule.computed(step, layer)) for layer in range(shape.layers))
            exchange += calls * attentions * _PASSES_OF_EXCHANGE * tokens * row / bandwidth
        return DenoiseSeconds(attention, rest, exchange, gathered / between)

    return functools.reduce(DenoiseSeconds.plus, map(of_step, range(forecast.schedule.steps)), DenoiseSeconds())


def estimate_for(
    forecast: Forecast, components: Components, execution: Execution, device: Device
) -> dict[str, float] | None:
    """Seconds of the phases of a run on a GPU, or on several that share its denoising; None where its maker's data are
    not known.

    Args:
        forecast: of the run.
        components: parts of the pipeline.
        execution: how it uses the GPU.
        device: the GPU.
    """
    denoising = denoise_seconds(forecast, components, execution, device)
    if denoising is None or device.tensor_rate is None or device.bandwidth is None or device.link is None:
        return None
    peak = device.tensor_rate if execution.element == 2 else device.tensor_rate / 2
    weights = component_weights(components, execution)
    tokens = max(encoder.tokens for encoder in components.text_encoders)
    prompts = forecast.calls_per_step
    coding = Pixels.of(forecast.size), execution.tile
    total = sum(weights.values())
    return {
        "encode": components.autoencoder.encode_flop(*coding) / (CONVOLUTION_SHARE * peak),
        "load": total / _DISK + (total / device.link if execution.offload == "none" else 0),
        "text": prompts * 2 * components.text_parameters * tokens / (LINEAR_SHARE * peak)
        + (weights["text"] / device.link if execution.offload != "none" else weights["text"] / device.bandwidth),
        "denoise": denoising.total + (weights["transformer"] / device.link if execution.offload == "model" else 0),
        "decode": components.autoencoder.decode_flop(*coding) / (CONVOLUTION_SHARE * peak),
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
            # Stages after the first begin with a picture, as some models do; model and text serve all of them.
            left_out = ("load", "text") if number else () if stage.architecture.model.needs else ("encode",)
            if phase not in left_out:
                total[phase] = total.get(phase, 0.0) + seconds
    return total


def _at_rates(stage: Forecast, components: Components, execution: Execution, rates: Rates) -> dict[str, float]:
    coding = Pixels.of(stage.size), execution.tile
    return {
        "encode": components.autoencoder.encode_flop(*coding) / rates.convolution,
        "denoise": stage.schedule.steps * step_seconds(stage, rates),
        "decode": components.autoencoder.decode_flop(*coding) / rates.convolution,
    }


def measured_rates(forecast: Forecast, device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of this machine, on samples of a run's own kind."""
    import torch

    architecture = forecast.architecture
    autoencoder_dtype = family_of(architecture.model).dtypes(("vae",), device, dtype)["vae"]
    with torch.no_grad():
        sample = architecture.autoencoder.sample(device, autoencoder_dtype)
        return Rates(
            _attention_rate(forecast, device, dtype),
            _linear_rate(architecture.transformer.width, device, dtype),
            sample.flop / _seconds(sample.run, device, sample.repeats),
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
    transformer = forecast.architecture.transformer
    # Heads do not change the rate of a CPU.
    heads = min(transformer.heads, 2) if device.type == "cpu" else transformer.heads
    shape = (1, plan.tokens, heads, transformer.head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    backend = forecast.preset.kernel.backend
    seconds = _seconds(lambda: span_attention(query, key, value, plan, backend=backend), device)
    return 4 * plan.density * plan.tokens**2 * heads * transformer.head_dim / seconds


def _linear_rate(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Of a feed-forward layer with its norm and activation."""
    import torch
    from torch.nn import functional

    tokens = max(256, int((2e9 if device.type == "cpu" else 1e12) / (16 * width**2)))
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    wide = torch.randn(4 * width, width, device=device, dtype=dtype) / width**0.5
    narrow = wide.T.contiguous()

    def feed_forward() -> torch.Tensor:
        inner = functional.linear(functional.layer_norm(hidden, (width,)), wide)
        return functional.linear(functional.gelu(inner, approximate="tanh"), narrow)

    return 16 * tokens * width**2 / _seconds(feed_forward, device)


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
