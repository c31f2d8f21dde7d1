"""`install`: GRAT attention inside a diffusers pipeline, for as long as a `with` block lasts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, NumericalFailure, choices
from grat_cli.preset_schema import BACKENDS
from grat_cli.presets import Preset, load_preset
from grat_cli.time_shift import extrapolation

if TYPE_CHECKING:
    from grat_cli.adapters.base import Adapter, CallObserver
    from grat_cli.schedule import AttentionSchedule
    from grat_kernels import Backend, Grid

SUPPORTED_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")


class Installation:
    """What is installed; an `adapters.base.Run`.

    Attributes:
        grid: image tokens of the calls to come.
        backend: how span attention is computed, never `AUTO`.
        backend_reason: why this backend.
    """

    def __init__(self, pipe: Any, preset: Preset, grid: Grid, steps: int | None, adapter: Adapter) -> None:
        self._pipe, self._preset, self._steps, self._adapter = pipe, preset, steps, adapter
        self._schedules: dict[tuple[int, int], AttentionSchedule] = {}
        self._last_schedule: AttentionSchedule | None = None
        self.grid = grid
        self.backend, self.backend_reason = _resolve_backend(pipe, preset.kernel.backend, grid.tokens)
        _check_kernel(pipe, preset, self.backend)

    def current_step(self) -> int:
        """The step of the call under way, from the scheduler's own counters: plain integers, so nothing waits."""
        return step_under_way(self._pipe.scheduler)

    def schedule(self, text_len: int) -> AttentionSchedule:
        """The schedule for a text length and for as many steps as the scheduler is set to run."""
        scheduler = self._pipe.scheduler
        to_run = len(scheduler.timesteps) - (scheduler.begin_index or 0)
        steps = self._steps or to_run
        if to_run > steps:
            raise BadInput(f"GRAT was installed for {steps} steps, the call runs {to_run}: leave steps out")
        if (text_len, steps) not in self._schedules:
            from grat_cli.schedule import AttentionSchedule

            self._schedules[text_len, steps] = AttentionSchedule(
                self._preset, self.grid, text_len, self._adapter.text_first, steps, self._adapter.layers
            )
        self._last_schedule = self._schedules[text_len, steps]
        return self._last_schedule

    @property
    def preparation(self) -> str | None:
        """What normalised, rotated and joined queries and keys in the latest call, and why."""
        return self._adapter.preparation

    @property
    def last_schedule(self) -> AttentionSchedule:
        """The schedule of the latest transformer call.

        Raises:
            BadInput: if there was none yet.
        """
        if self._last_schedule is None:
            raise BadInput("the pipeline has not been called yet: call it inside `with grat_cli.install(...)`")
        return self._last_schedule


@contextmanager
def install(
    pipe: Any,
    preset: str | Preset = "flux-x",
    *,
    height: int,
    width: int,
    steps: int | None = None,
    backend: Backend | str | None = None,
    observer: CallObserver | None = None,
) -> Iterator[Installation]:
    """Runs a pipeline with GRAT attention: `with grat_cli.install(pipe, "flux-x", height=8192, width=8192): pipe(...)`.

    It changes this instance's transformer, and leaving restores it exactly, also after an exception. Sampling stays
    the caller's: the preset's steps, guidance and shift are not applied. Image positions are passed to the transformer
    in fp32, where pipelines round them to its dtype: bf16 gives neighbours the same position beyond 4096 pixels.

    Args:
        pipe: a diffusers `FluxPipeline` or `FluxImg2ImgPipeline`.
        preset: a preset, its name, or the path of its file.
        height: of the images to come, in pixels; calls of another size are refused.
        width: likewise.
        steps: that the preset's fractions refer to; by default as many as each call runs, which is fewer than
            `num_inference_steps` for image-to-image. Steps are counted from the first one that is run.
        backend: overrides the preset's; one chosen by name never falls back.
        observer: told of transformer calls and attentions, for example a `timing.StepRecorder`.

    Raises:
        BadInput: if pipeline, preset, size or backend do not fit, here or at the pipeline call.
        NumericalFailure: if the backend's kernel computes wrong results on this machine.
    """
    pixels_per_token, pipeline = _geometry(pipe)
    preset = load_preset(preset) if isinstance(preset, str) else preset
    if backend is not None:
        preset = _with_backend(preset, backend)
    if len(preset.attention.group) != 2:
        raise BadInput(f"preset {preset.name} is for {preset.model} models, the pipeline is a {pipeline}")
    if height % pixels_per_token or width % pixels_per_token:
        raise BadInput(
            f"height and width must be multiples of {pixels_per_token} for this model, not {height} and {width}: "
            f"the nearest are {_nearest_multiple(height, pixels_per_token)} and "
            f"{_nearest_multiple(width, pixels_per_token)}"
        )

    from grat_cli.adapters.flux import FluxAdapter
    from grat_kernels import Grid

    grid = Grid((height // pixels_per_token, width // pixels_per_token))
    if not hasattr(pipe.scheduler, "step_index") or not hasattr(pipe.scheduler, "begin_index"):
        raise BadInput(
            f"{type(pipe.scheduler).__name__} does not count its steps, which GRAT needs to know: "
            "use FlowMatchEulerDiscreteScheduler"
        )
    adapter = FluxAdapter(pipe.transformer, grid)
    installation = Installation(pipe, preset, grid, steps, adapter)
    warning = extrapolation(pipe.scheduler, grid.tokens)
    if warning:
        warnings.warn(warning, stacklevel=3)
    with adapter.attached(installation, installation.backend, observer):
        yield installation


def step_under_way(scheduler: Any) -> int:
    """The denoising step that a scheduler is at, counted from 0 over the steps that are run."""
    begin = scheduler.begin_index or 0
    index = begin if scheduler.step_index is None else scheduler.step_index
    return index - begin


def _with_backend(preset: Preset, backend: Backend | str) -> Preset:
    name = str(getattr(backend, "value", backend))
    if name not in BACKENDS:
        raise BadInput(f"unknown backend {name!r}: {choices(name, BACKENDS)}")
    return preset.model_copy(update={"kernel": preset.kernel.model_copy(update={"backend": name})})


def _geometry(pipe: Any) -> tuple[int, str]:
    """Pixels per side of an image token, and the pipeline's class name.

    Raises:
        BadInput: if the pipeline is not supported.
    """
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline

    name = type(pipe).__name__
    if not isinstance(pipe, (FluxPipeline, FluxImg2ImgPipeline)):
        raise BadInput(f"{name} is not supported: use one of {', '.join(SUPPORTED_PIPELINES)} of diffusers")
    # Latents are packed two by two into tokens.
    return pipe.vae_scale_factor * 2, name


def _nearest_multiple(size: int, unit: int) -> int:
    return max(unit, round(size / unit) * unit)


def _resolve_backend(pipe: Any, name: str, tokens: int) -> tuple[Backend, str]:
    """The backend that a name stands for on the pipeline's device, and why.

    Raises:
        BadInput: if a backend chosen by name cannot run there.
    """
    from grat_kernels import Backend, can_run
    from grat_kernels.attention import choose_backend

    # Public `device` is where weights rest; with offload they run elsewhere.
    device, dtype = pipe._execution_device, pipe.transformer.dtype
    head_dim = pipe.transformer.config.attention_head_dim
    if Backend(name) is Backend.AUTO:
        return choose_backend(device, dtype, head_dim)
    ability = can_run(name, device, dtype, head_dim, tokens)
    if not ability:
        raise BadInput(f"the {name} backend cannot run here: {ability.reason}; use --backend auto")
    return Backend(name), f"chosen by name; {ability.reason}"


def _check_kernel(pipe: Any, preset: Preset, backend: Backend) -> None:
    """Tests the kernel in the forms that the preset uses, so that no denoising step waits for it.

    Raises:
        NumericalFailure: if it computes wrong results on this machine.
    """
    from grat_kernels.attention import KernelMismatch, check_kernel

    forms = {bool(attention.far) for attention in (preset.attention, *preset.attention_of_rules)}
    if preset.schedule.dense_steps:
        forms.add(False)
    try:
        for far in sorted(forms):
            check_kernel(
                backend,
                pipe._execution_device,
                pipe.transformer.dtype,
                pipe.transformer.config.attention_head_dim,
                far=far,
            )
    except KernelMismatch as error:
        raise NumericalFailure(str(error)) from error
