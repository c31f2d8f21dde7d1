"""What a run asks of the machine: where a model runs, in which form, how much memory, and what would help."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grat_cli.errors import ModelUnavailable, OutOfMemory
from grat_cli.estimates.stages import Stage
from grat_cli.generation import report
from grat_cli.generation.checkpoint import Run
from grat_cli.generation.request import Request
from grat_cli.generation.timing import Phases
from grat_cli.models.devices import (
    choose_device,
    choose_dtype,
    cpu_threads,
    device_name,
    forget_peak_memory,
    is_out_of_memory,
    peak_memory,
    wait_for,
)
from grat_cli.models.loading import LoadedModel
from grat_cli.models.parallel import Parallel
from grat_cli.models.resolution import Resolution
from grat_cli.models.video_size import VideoSize

if TYPE_CHECKING:
    import torch

    from grat_cli.estimates.planning import Forecast


def phases_of(device: torch.device, run: Run | None = None) -> Phases:
    """Phases that add to those of a run that is taken up."""
    phases = Phases(lambda: wait_for(device), lambda: forget_peak_memory(device), lambda: peak_memory(device)[0])
    if run is not None:
        phases.phases_ms, phases.memory_bytes = dict(run.phases_ms), dict(run.memory_bytes)
    return phases


def surroundings(model: LoadedModel, device: torch.device, parallel: Parallel | None = None) -> report.Surroundings:
    """Where a model runs, in which form, and on how many ranks."""
    return report.Surroundings(
        device=str(device),
        device_name=device_name(device),
        dtype=str(model.pipe.transformer.dtype).removeprefix("torch."),
        autoencoder_dtype=str(model.pipe.vae.dtype).removeprefix("torch."),
        threads=cpu_threads(device),
        offload=model.offload,
        offload_reason=model.offload_reason,
        revision=model.revision,
        memory_kind=peak_memory(device)[1],
        loras=tuple(lora.told() for lora in model.loras),
        weights=tuple(file.as_dict() for file in model.files),
        parallel=parallel,
    )


def offload_chooser(request: Request, device: torch.device, references: int = 0) -> Callable[[Any], tuple[str, str]]:
    """What `--offload auto` stands for with a loaded pipeline: by the memory that the run is foretold to need.

    Args:
        request: what is made.
        device: where.
        references: tokens of pictures to refer to.
    """

    def choose(pipe: Any) -> tuple[str, str]:
        from grat_cli.estimates.fitting import offload_for

        dtype = str(choose_dtype(request.dtype, device)).removeprefix("torch.")
        runs = _forecasts(request, dtype, references)
        return offload_for(pipe, request.model, runs, device, weights=request.weights)

    return choose


def foretold(request: Request, parallel: Parallel, *, shards_weights: bool) -> dict[str, float]:
    """What `grat plan --gpus` says of a request on ranks that share it, as far as this machine's GPUs are known.

    Returns:
        `bytes_per_step` that a rank sends at most, mean over the steps; and where it is known how fast the GPUs are,
        how many times as fast denoising is as on one (`speedup`), also if nothing had to be exchanged (`ceiling`).
    """
    from grat_cli.estimates.components import components_of
    from grat_cli.estimates.fitting import execution_of
    from grat_cli.estimates.hardware import Device, present_gpu
    from grat_cli.estimates.several_gpus import several_gpus
    from grat_cli.generation.inputs import reference_tokens

    try:
        components = components_of(request.model)
    except (LookupError, ModelUnavailable):  # whose parts are not known before it is loaded
        return {}
    on_cpu = choose_device(request.device).type != "cuda"
    device = None if on_cpu else present_gpu()
    dtype = str(choose_dtype(request.dtype, choose_device(request.device))).removeprefix("torch.")
    runs = _forecasts(request, dtype, reference_tokens(request))
    device = device or Device("unknown", "unknown", 0)
    weights = request.weights
    execution = execution_of(
        request.model,
        runs[-1],
        device,
        offload="none",
        quantize=weights.quantize,
        cast=weights.cast,
        parallel=parallel,
        shards_weights=shards_weights,
    )
    found = several_gpus(runs, components, execution, device)
    figures = {"bytes_per_step": max(found.of_steps) / found.steps, "speedup": found.speedup, "ceiling": found.ceiling}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _forecasts(request: Request, dtype: str, references: int) -> list[Forecast]:
    """Of the stages of a request."""
    from grat_cli.estimates.planning import run_forecasts

    size: Resolution | VideoSize = Resolution(request.width, request.height)
    if request.frames and request.fps:
        size = VideoSize(request.width, request.height, request.frames, request.fps)
    return run_forecasts(request.preset, request.model, size, dtype, handed=request.handed, references=references)


def release(pipe: Any, *parts: str) -> None:
    """Lets go of parts of a pipeline that are not needed any more, so that the device has their memory."""
    import torch

    for part in parts:
        setattr(pipe, part, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def memory_advice(request: Request, device: torch.device, stage: Stage | None = None) -> Iterator[None]:
    """Turns running out of memory into OutOfMemory with what would help.

    Args:
        request: what is made.
        device: where.
        stage: that is under way; None for the whole output.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        unit = request.model.size_multiple
        smaller = "x".join(str(max(unit, side // (2 * unit) * unit)) for side in (request.width, request.height))
        advice = [f"a smaller --res such as {smaller}"]
        if device.type != "cpu":
            advice += [f"--offload {kind}" for kind in ("model", "group", "sequential") if kind != request.offload]
        size = request.size if stage is None or request.frames else stage.size
        raise OutOfMemory(
            f"{device_name(device)} has too little memory for {size} with {request.model.name}: "
            f"try {' or '.join(advice)}"
        ) from error
