"""`install`: GRAT attention inside a diffusers pipeline, for as long as a `with` block lasts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from grat_cli.errors import BadInput, NumericalFailure, choices
from grat_cli.families.base import PIPELINES_OF_MEDIUM, UNSUPPORTED_PIPELINES
from grat_cli.families.time_shift import extrapolation as extrapolated_shift
from grat_cli.presets import Preset, load_preset
from grat_cli.presets.schema import AXES, BACKENDS, SMALLEST_CHUNK, ChunkTokens, Memory

if TYPE_CHECKING:
    from grat_cli.attention.adapter import Adapter, CallObserver
    from grat_cli.attention.extrapolation import Extrapolation
    from grat_cli.attention.guard import RecallGuard
    from grat_cli.attention.schedule import AttentionSchedule
    from grat_kernels import Backend, Grid

SUPPORTED_PIPELINES = tuple(name for classes in PIPELINES_OF_MEDIUM.values() for name in classes)


class Installation:
    """What is installed; an `adapters.base.Run`.

    Attributes:
        grid: image tokens of the calls to come.
        backend: how span attention is computed, never `AUTO`.
        backend_reason: why this backend.
        guard: what widens layers while a run goes on, None without one.
    """

    def __init__(
        self, pipe: Any, preset: Preset, grid: Grid, first_step: int, steps: int | None, adapter: Adapter
    ) -> None:
        self._pipe, self._preset, self._adapter = pipe, preset, adapter
        self._first_step, self._steps = first_step, steps
        self._schedules: dict[tuple[int, int], AttentionSchedule] = {}
        self._last_schedule: AttentionSchedule | None = None
        self.grid = grid
        self.guard = _guard(preset, adapter.layers)
        self.backend, self.backend_reason = _resolve_backend(pipe, preset.kernel.backend, grid.tokens)
        _check_kernel(pipe, preset, self.backend)

    def current_step(self) -> int:
        """The step of the call under way, from the scheduler's own counters: plain integers, so nothing waits."""
        return self._first_step + step_under_way(self._pipe.scheduler)

    def schedule(self, text_len: int) -> AttentionSchedule:
        """The schedule for a text length and for as many steps as the whole run has, as the guard has widened it."""
        scheduler = self._pipe.scheduler
        to_run = len(scheduler.timesteps) - (scheduler.begin_index or 0)
        steps = self._steps or self._first_step + to_run
        if self._first_step + to_run > steps:
            begun = f" from step {self._first_step} on" if self._first_step else ""
            raise BadInput(f"GRAT was installed for {steps} steps, the call runs {to_run}{begun}: leave steps out")
        if (text_len, steps) not in self._schedules:
            from grat_cli.attention.schedule import AttentionSchedule

            self._schedules[text_len, steps] = AttentionSchedule(
                self._preset,
                self.grid,
                text_len,
                self._adapter.text_first,
                steps,
                self._adapter.layers,
                self._adapter.heads,
            )
        schedule = self._schedules[text_len, steps]
        self._last_schedule = self.guard.applied(schedule, self.current_step()) if self.guard else schedule
        return self._last_schedule

    @property
    def preparation(self) -> str | None:
        """What normalised, rotated and joined queries and keys in the latest call, and why."""
        return self._adapter.preparation

    @property
    def chunking(self) -> tuple[int | None, str]:
        """How many tokens at most run through feed-forward and modulation at once, None for all; and why."""
        return self._adapter.chunking

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
    num_frames: int | None = None,
    steps: int | None = None,
    first_step: int = 0,
    backend: Backend | str | None = None,
    chunk_tokens: int | Literal["auto"] | None = "auto",
    observer: CallObserver | None = None,
    extrapolation: Extrapolation | None = None,
    guard: float | None = None,
) -> Iterator[Installation]:
    """Runs a pipeline with GRAT attention: `with grat_cli.install(pipe, "flux-x", height=8192, width=8192): pipe(...)`.

    It changes this instance's transformer, and leaving restores it exactly, also after an exception. Sampling stays
    the caller's: the preset's steps, guidance and shift are not applied. Image positions are passed to Flux's
    transformer in fp32, where pipelines round them to its dtype: bf16 gives neighbours the same position beyond 4096
    pixels. The padding of HunyuanVideo's text is cut off; it changes no prediction.

    Args:
        pipe: a diffusers `FluxPipeline`, `FluxImg2ImgPipeline` or `HunyuanVideoPipeline`.
        preset: a preset, its name, or the path of its file.
        height: of the images or videos to come, in pixels; calls of another size are refused.
        width: likewise.
        num_frames: likewise, for a `HunyuanVideoPipeline` alone, which needs it.
        steps: that the preset's fractions refer to; by default as many as each call runs, which is fewer than
            `num_inference_steps` for image-to-image. Steps are counted from the first one that is run.
        first_step: number of the first step that a call runs, where it goes on with a run that had been broken off:
            the preset's steps are those of the whole run.
        backend: overrides the preset's; one chosen by name never falls back.
        chunk_tokens: feed-forward and modulation run on at most so many tokens at once, None for all of them; `auto`
            leaves it to the preset. It changes no result on a CPU.
        observer: told of transformer calls and attentions, for example a `timing.StepRecorder`.
        extrapolation: how rotary positions and scores of Flux are fitted to pictures larger than it was trained at;
            None leaves them as they are. The preset's own `highres` section is not applied.
        guard: overrides the preset's: share of full attention that a layer has to keep, such as 0.9; those that keep
            less go wider while the run goes on. 0 for none. `Installation.guard` tells what it did.

    Raises:
        BadInput: if pipeline, preset, size or backend do not fit, here or at the pipeline call.
        NumericalFailure: if the backend's kernel computes wrong results on this machine.
    """
    family = _family(pipe)
    preset = load_preset(preset) if isinstance(preset, str) else preset
    if backend is not None:
        preset = _with_backend(preset, backend)
    if chunk_tokens != "auto":
        preset = _with_chunks(preset, chunk_tokens)
    if guard is not None:
        preset = _with_guard(preset, guard)
    if len(preset.attention.group) != AXES[family]:
        raise BadInput(
            f"preset {preset.name} is for {preset.model} models, the pipeline is a {type(pipe).__name__}: "
            f"use one of grat presets {family}"
        )
    if first_step < 0 or (steps is not None and first_step >= steps):
        raise BadInput(f"first_step {first_step} is none of the run's steps, which are counted from 0")
    grid = _grid(pipe, family, height, width, num_frames)
    if not hasattr(pipe.scheduler, "step_index") or not hasattr(pipe.scheduler, "begin_index"):
        raise BadInput(
            f"{type(pipe.scheduler).__name__} does not count its steps, which GRAT needs to know: "
            "use FlowMatchEulerDiscreteScheduler"
        )
    if extrapolation is not None and family != "flux":
        raise BadInput(f"positions of a {type(pipe).__name__} are not fitted: leave out extrapolation")
    adapter = _adapter(pipe, family, grid, extrapolation, preset.memory.chunk_tokens)
    installation = Installation(pipe, preset, grid, first_step, steps, adapter)
    warning = extrapolated_shift(pipe.scheduler, grid.tokens)
    if warning:
        warnings.warn(warning, stacklevel=3)
    with adapter.attached(installation, installation.backend, _observers(installation.guard, observer)):
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


def _with_chunks(preset: Preset, chunk_tokens: int | None) -> Preset:
    if chunk_tokens is not None and chunk_tokens < SMALLEST_CHUNK:
        raise BadInput(f"chunk_tokens {chunk_tokens}: expected {SMALLEST_CHUNK} or more, None or 'auto'")
    return preset.model_copy(update={"memory": Memory(chunk_tokens=chunk_tokens)})


def _with_guard(preset: Preset, guard: float) -> Preset:
    if not 0 <= guard <= 1:
        raise BadInput(f"guard {guard:g}: expected a share from 0 to 1, such as 0.9, or 0 for none")
    return preset.model_copy(update={"guard": guard})


def _guard(preset: Preset, layers: int) -> RecallGuard | None:
    if not preset.guard:
        return None
    from grat_cli.attention.guard import RecallGuard

    return RecallGuard(preset.guard, layers)


def _observers(guard: RecallGuard | None, observer: CallObserver | None) -> CallObserver | None:
    """Both, if there are both; the guard's own work is outside of what the other one times as attention."""
    if guard is None or observer is None:
        return guard or observer
    from grat_cli.attention.observers import Observers

    return Observers(guard, observer)


def _family(pipe: Any) -> Literal["flux", "hunyuan"]:
    """Which presets a pipeline takes.

    Raises:
        BadInput: if it is not supported, with the reason.
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

    if isinstance(pipe, HunyuanVideoPipeline):
        return "hunyuan"
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline

    if isinstance(pipe, (FluxPipeline, FluxImg2ImgPipeline)):
        return "flux"
    name = type(pipe).__name__
    reason = f" ({UNSUPPORTED_PIPELINES[name]})" if name in UNSUPPORTED_PIPELINES else ""
    raise BadInput(f"{name} is not supported{reason}: use one of {', '.join(SUPPORTED_PIPELINES)} of diffusers")


def _grid(pipe: Any, family: str, height: int, width: int, num_frames: int | None) -> Grid:
    """The image tokens of calls of a size.

    Raises:
        BadInput: if the pipeline cannot make that size.
    """
    from grat_kernels import Grid

    if family == "flux":
        if num_frames is not None:
            raise BadInput(f"a {type(pipe).__name__} makes images: leave out num_frames")
        # Latents are packed two by two into tokens.
        side = pipe.vae_scale_factor * 2
    else:
        side = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size
    if height % side or width % side:
        raise BadInput(
            f"height and width must be multiples of {side} for this model, not {height} and {width}: "
            f"the nearest are {_nearest_multiple(height, side)} and {_nearest_multiple(width, side)}"
        )
    sides = height // side, width // side
    if family == "flux":
        return Grid(sides)
    if num_frames is None:
        raise BadInput(f"a {type(pipe).__name__} makes videos: give num_frames, such as num_frames=129")
    unit = pipe.vae_scale_factor_temporal
    if num_frames < 1 or (num_frames - 1) % unit:
        fewer = max(0, num_frames - 1) // unit * unit + 1
        raise BadInput(f"num_frames must be {unit}k+1 for this model, not {num_frames}: use {fewer} or {fewer + unit}")
    return Grid(((num_frames - 1) // unit // pipe.transformer.config.patch_size_t + 1, *sides))


def _adapter(
    pipe: Any, family: str, grid: Grid, extrapolation: Extrapolation | None, chunk_tokens: ChunkTokens
) -> Adapter:
    if family == "flux":
        from grat_cli.families.flux import FluxAdapter

        return FluxAdapter(pipe.transformer, grid, extrapolation=extrapolation, chunk_tokens=chunk_tokens)
    from grat_cli.families.hunyuan import HunyuanAdapter

    return HunyuanAdapter(pipe.transformer, grid, chunk_tokens=chunk_tokens)


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

    forms = {bool(attention.far) for attention in preset.attentions}
    if preset.schedule.dense_steps or preset.guard:
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
