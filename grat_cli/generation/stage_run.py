"""One stage of a picture: from noise or an upscaled picture to latents, and their decoding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from grat_cli.attention.extrapolation import Extrapolation
from grat_cli.estimates.stages import Stage, stage_data
from grat_cli.families import picture_coding
from grat_cli.families.guidance import Guidance
from grat_cli.families.time_shift import time_shift
from grat_cli.generation.denoising import StepWatch, explained_backend_failures
from grat_cli.generation.low_resolution_guidance import low_resolution_guidance
from grat_cli.generation.preview import Preview, PreviewedSteps
from grat_cli.generation.timing import Phases, StepRecorder, StepTiming
from grat_cli.installation import Installation, install
from grat_cli.models.devices import wait_for

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from grat_cli.generation.request import Progress


@dataclass(frozen=True)
class StageRecord:
    """What there is to report about a stage.

    Attributes:
        stage: what was to be done.
        steps: timing of every step that was run.
        phases: time of encode, denoise and decode, as far as they took place.
        shift: effective time shift, a factor.
        guidance: effective guidance scale, or None.
        installation: what ran inside the pipeline.
    """

    stage: Stage
    steps: list[StepTiming]
    phases: Phases
    shift: float
    guidance: float | None
    installation: Installation

    @property
    def guard(self) -> dict[str, Any] | None:
        """What the guard of the stage did, as plain data; None without one."""
        return self.installation.guard and self.installation.guard.report()

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data for a report, without its steps."""
        return {
            **stage_data(self.stage, self.installation.last_schedule),
            "guidance": self.guidance,
            "shift": self.shift,
            "backend": self.installation.backend.value,
            "guard": self.guard,
            "phases": {name: round(milliseconds, 3) for name, milliseconds in self.phases.phases_ms.items()},
        }


class Studio:
    """A loaded model that runs stages. The pipelines for noise and for pictures share every component.

    Attributes:
        pipe: the pipeline that was loaded, for all that the two have in common.
    """

    def __init__(self, pipe: Any, device: torch.device, progress: Progress) -> None:
        self.pipe = pipe
        self._device, self._progress = device, progress

    def run(
        self,
        stage: Stage,
        text: dict[str, torch.Tensor],
        guidance: Guidance,
        before: Image.Image | torch.Tensor | None,
        generator: torch.Generator,
        preview: Preview | None = None,
    ) -> tuple[torch.Tensor, StageRecord]:
        """Runs the denoising of a stage.

        Args:
            stage: what to do.
            text: of `encode_text`.
            guidance: of the stage.
            before: picture or latents `[1, C, h, w]` that it starts from, of any size; None for noise.
            generator: of the noise; the stages of one picture draw from one generator in turn.
            preview: of the picture, None for none.

        Returns:
            Latents `[1, C, h, w]`, unpacked, scaled as the pipeline denoises them; what to report.

        Raises:
            BadInput: if attention or schedule do not fit the stage.
            NumericalFailure: if latents turn NaN or infinite.
        """
        # 1. What the stage starts from.
        phases = Phases(lambda: wait_for(self._device))
        start = None
        if before is not None:
            with phases("encode"):
                start = self._upscaled(before, stage)

        # 2. Denoise with GRAT attention installed.
        self._progress.phase("denoise" if stage.number == 0 else f"denoising {stage.size}")
        pipe = pipeline_for(self.pipe, from_picture=start is not None)
        recorder, watch = StepRecorder(self._device), StepWatch(self._progress)
        callback = watch if preview is None else PreviewedSteps(preview, watch, stage.height, stage.width)
        side = pipe.vae_scale_factor * 2
        image_tokens = (stage.height // side) * (stage.width // side)
        with (
            time_shift(pipe, image_tokens, stage.preset.sampling.shift) as shift,
            _guided(pipe, stage, start),
            install(
                pipe,
                stage.preset,
                height=stage.height,
                width=stage.width,
                observer=recorder,
                extrapolation=extrapolation_of(stage, side),
            ) as installation,
        ):
            with phases("denoise"):
                packed = denoise(pipe, stage, text | guidance.arguments, start, generator, callback)
            timesteps = pipe.scheduler.timesteps[pipe.scheduler.begin_index or 0 :].tolist()
        watch.raise_if_not_finite()
        latents = pipe._unpack_latents(packed, stage.height, stage.width, pipe.vae_scale_factor)
        record = StageRecord(stage, recorder.steps(timesteps), phases, shift, guidance.scale, installation)
        return latents, record

    def decode(self, latents: torch.Tensor, record: StageRecord) -> Image.Image:
        """The picture of latents `[1, C, h, w]` of a stage, whose record is told the time.

        Raises:
            NumericalFailure: if it has NaN or is one flat colour.
        """
        self._progress.phase("decode")
        with record.phases("decode"):
            return picture_coding.to_picture(self.pipe, picture_coding.decode(self.pipe, latents))

    def _upscaled(self, before: Image.Image | torch.Tensor, stage: Stage) -> torch.Tensor:
        """Latents `[1, C, h, w]` of the size of a stage."""
        from PIL import Image

        if isinstance(before, Image.Image):
            resized = before.resize((stage.width, stage.height), Image.Resampling.LANCZOS)
            return picture_coding.encode(self.pipe, resized)
        from torch.nn import functional

        scale = self.pipe.vae_scale_factor
        size = stage.height // scale, stage.width // scale
        return functional.interpolate(before.float(), size, mode="bicubic", antialias=True).to(before.dtype)


def _guided(pipe: Any, stage: Stage, start: torch.Tensor | None) -> AbstractContextManager[None]:
    """Low-resolution guidance of a stage that has it."""
    if start is None or not stage.low_resolution_guidance:
        return nullcontext()
    trained = stage.trained.height // pipe.vae_scale_factor, stage.trained.width // pipe.vae_scale_factor
    return low_resolution_guidance(pipe, start, trained, stage.low_resolution_guidance)


def extrapolation_of(stage: Stage, token_side: int) -> Extrapolation:
    """How positions and scores are fitted to a stage; `token_side` is in pixels."""
    trained_grid = stage.trained.height // token_side, stage.trained.width // token_side
    return Extrapolation(trained_grid, stage.positions, stage.proportional_attention)


def pipeline_for(pipe: Any, *, from_picture: bool) -> Any:
    """The pipeline that starts from noise, or from a picture; it shares the components of `pipe`, hooks included.

    Args:
        pipe: a `FluxPipeline` or `FluxImg2ImgPipeline`.
        from_picture: which of them is wanted.
    """
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline

    kind = FluxImg2ImgPipeline if from_picture else FluxPipeline
    if isinstance(pipe, kind):
        return pipe
    other = kind(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


def denoise(
    pipe: Any,
    stage: Stage,
    arguments: dict[str, Any],
    start: torch.Tensor | None,
    generator: torch.Generator,
    watch: StepWatch | PreviewedSteps,
) -> torch.Tensor:
    """Latents of one picture, `[1, image tokens, channels]`.

    Args:
        pipe: of `pipeline_for`.
        stage: its size, steps and strength.
        arguments: text and guidance.
        start: latents to start from, `[1, C, h, w]`; None for noise.
        generator: of the noise.
        watch: the callback after every step.
    """
    if start is not None:
        arguments = arguments | {"image": start, "strength": stage.strength}
    with explained_backend_failures():
        return pipe(
            **arguments,
            height=stage.height,
            width=stage.width,
            num_inference_steps=stage.preset.sampling.steps,
            generator=generator,
            output_type="latent",
            callback_on_step_end=watch,
        ).images


def numbered(records: list[StageRecord]) -> list[StepTiming]:
    """The steps of all stages, counted through; each names its stage."""
    every = [(record.stage.number, step) for record in records for step in record.steps]
    return [replace(step, index=index, stage=stage) for index, (stage, step) in enumerate(every)]


def total_phases(records: list[StageRecord]) -> dict[str, float]:
    """Milliseconds by phase, added up over the stages, in order of first entry."""
    totals: dict[str, float] = {}
    for record in records:
        for name, milliseconds in record.phases.phases_ms.items():
            totals[name] = totals.get(name, 0.0) + milliseconds
    return totals
