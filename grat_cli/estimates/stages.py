"""Pictures larger than a model was trained at: which stages make them, of what size, with which attention.

Flux was trained at about a megapixel; from noise, larger pictures repeat and blur with any attention. So a picture of
the trained area comes first, with full attention, and fixes what is where. Then it is scaled up and partly redone,
stage by stage (SDEdit, arXiv 2108.01073; for Flux at these sizes CLEAR, arXiv 2412.16112, section 4). This module only
says what the stages are; `grat_cli.generation.run` runs them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.errors import BadInput
from grat_cli.families import ModelChoice, family_of
from grat_cli.families.base import NO_PICTURES, PictureKind
from grat_cli.models.resolution import Resolution
from grat_cli.presets import HighResolution, PositionsName, Preset

# Up to so many times the trained area a model makes pictures from noise as they are.
FAIR_AREA = 2.0
_DEFAULT_STRENGTH = 0.7  # of image-to-image at one size
_INPAINTING_STRENGTH = 1.0  # under a mask, where nothing of what was there is to be seen


@dataclass(frozen=True)
class Stage:
    """One denoising run of a picture.

    Attributes:
        number: counted from 0 over those that are run.
        width: in pixels.
        height: likewise.
        preset: attention, schedule, kernel and sampling of this stage.
        strength: share of the sampling steps that are run on what came before; None for all of them, from noise.
        trained: width and height in pixels, in this picture's shape, of the area that the model was trained at.
        decoded: whether a picture is made of it: the last one is, and what is upscaled as pixels.
        positions: how rotary frequencies are fitted; see `grat_cli.attention.extrapolation`.
        proportional_attention: whether scores are scaled by the number of keys.
        low_resolution_guidance: weight of the upscaled picture's low frequencies in each prediction.
    """

    number: int
    width: int
    height: int
    preset: Preset
    strength: float | None
    trained: Resolution
    decoded: bool = True
    positions: PositionsName = "none"
    proportional_attention: bool = False
    low_resolution_guidance: float = 0.0

    @property
    def size(self) -> str:
        """For people, such as `2048x2048`."""
        return f"{self.width}x{self.height}"

    @property
    def steps(self) -> int:
        """Steps that are run, as diffusers counts them (`FluxImg2ImgPipeline.get_timesteps`)."""
        steps = self.preset.sampling.steps
        return steps if self.strength is None else steps - int(max(steps - steps * self.strength, 0))


def stage_data(stage: Stage, schedule: AttentionSchedule) -> dict[str, Any]:
    """What a stage is, as plain data, alike in plans and reports."""
    return {
        "number": stage.number,
        "width": stage.width,
        "height": stage.height,
        "tokens": schedule.plans[0].tokens,
        "density": schedule.density,
        "steps": stage.steps,
        "strength": stage.strength,
        "attention": stage.preset.attention.summary,
        "positions": stage.positions,
        "proportional_attention": stage.proportional_attention,
        "low_resolution_guidance": stage.low_resolution_guidance,
    }


def uses_highres(preset: Preset, model: ModelChoice, width: int, height: int) -> bool:
    """Whether a picture of a size is made by the high-resolution path: above what the model makes as it is."""
    if not family_of(model).stages:
        return False
    return _settings(preset).mode != "off" and width * height > FAIR_AREA * model.native_side**2


def stages_of(
    preset: Preset,
    model: ModelChoice,
    width: int,
    height: int,
    *,
    start: Resolution | None = None,
    strength: float | None = None,
    handed: frozenset[PictureKind] = NO_PICTURES,
) -> tuple[Stage, ...]:
    """The stages of a picture, in the order in which they run; the last one has its size.

    Pictures that the pipeline is given as they are, such as a mask, a control or references, say what is where at any
    size: there is one stage, from noise or from what lies around the mask.

    Args:
        preset: resolved.
        model: what runs it.
        width: of the picture, in pixels.
        height: likewise.
        start: size of a picture to start from, cut to this one's shape: it takes the place of the base, and of stages
            that are no larger than it.
        strength: of the first stage after `start`; None for the preset's, or 0.7 without the high-resolution path.
        handed: kinds of the pictures that the pipeline is given as they are.

    Raises:
        BadInput: if strengths or overrides are for another number of stages.
    """
    settings = _settings(preset)
    trained = trained_size(model, width, height)
    plain = preset.model_copy(update={"highres": None})
    if handed:
        under_mask = (strength or _INPAINTING_STRENGTH) if model.redoes(handed) else None
        return (Stage(0, width, height, plain, under_mask, trained),)
    if not uses_highres(preset, model, width, height):
        first = None if start is None else strength or _DEFAULT_STRENGTH
        return (Stage(0, width, height, plain, first, trained),)
    fitted: dict[str, Any] = {
        "trained": trained,
        "positions": settings.positions,
        "proportional_attention": settings.proportional_attention,
    }
    if settings.mode == "direct":
        first = None if start is None else strength or _DEFAULT_STRENGTH
        return (Stage(0, width, height, _sampled(plain, settings, None), first, **fitted),)

    sizes = _sizes(trained, Resolution(width, height), settings.growth, model.size_multiple)
    strengths = _strengths(settings, len(sizes), f"{width}x{height}")
    base = Stage(0, trained.width, trained.height, _dense(plain), None, trained)
    stages = [replace(base, decoded=settings.upscale == "pixel")]
    for index, size in enumerate(sizes):
        override = settings.stages[index] if index < len(settings.stages) else None
        own = preset.of_stage(index)
        dense = _tokens(size, model) <= settings.dense_below and (override is None or override.attention is None)
        stage = Stage(
            index + 1,
            size.width,
            size.height,
            _sampled(_dense(own) if dense else own, settings, None if override is None else override.steps),
            strengths[index],
            decoded=settings.upscale == "pixel" or size == sizes[-1],
            low_resolution_guidance=settings.low_resolution_guidance,
            **fitted,
        )
        stages.append(stage)
    return tuple(stages) if start is None else _from_picture(stages, start, strength)


def trained_size(model: ModelChoice, width: int, height: int) -> Resolution:
    """A picture's shape at the area that the model was trained at, or the picture's own size if that is smaller."""
    scale = min(1.0, math.sqrt(model.native_side**2 / (width * height)))
    return _rounded(width * scale, height * scale, model.size_multiple)


def _settings(preset: Preset) -> HighResolution:
    return HighResolution() if preset.highres is None else preset.highres


def _sizes(base: Resolution, asked: Resolution, growth: float | None, unit: int) -> list[Resolution]:
    """Sizes of the stages after the base, in equal ratios of about `growth`; the last is the asked one."""
    ratio = math.sqrt(asked.width * asked.height / (base.width * base.height))
    count = 1 if growth is None else max(1, round(math.log(ratio, growth)))
    between = [
        _rounded(
            base.width * (asked.width / base.width) ** (number / count),
            base.height * (asked.height / base.height) ** (number / count),
            unit,
        )
        for number in range(1, count)
    ]
    return [*between, asked]


def _rounded(width: float, height: float, unit: int) -> Resolution:
    whole_width, whole_height = (max(unit, round(side / unit) * unit) for side in (width, height))
    return Resolution(whole_width, whole_height)


def _strengths(settings: HighResolution, stages: int, size: str) -> list[float]:
    """One per stage; what an override says wins."""
    given = settings.strength
    if isinstance(given, tuple) and len(given) != stages:
        raise BadInput(
            f"highres.strength has {len(given)} numbers, but {size} takes {stages} stages after the base: "
            f"give {stages}, or one for all"
        )
    if len(settings.stages) > stages:
        raise BadInput(
            f"highres.stages overrides {len(settings.stages)} stages, but {size} takes {stages} after the base: "
            "give fewer, or a larger --res"
        )
    strengths: list[float] = list(given) if isinstance(given, tuple) else [given] * stages
    for index, override in enumerate(settings.stages):
        if override.strength is not None:
            strengths[index] = override.strength
    return strengths


def _sampled(preset: Preset, settings: HighResolution, steps: int | None) -> Preset:
    """The preset with the sampling of a high-resolution stage."""
    changes = {"steps": steps or settings.steps, "guidance": settings.guidance, "shift": settings.shift}
    given = {name: value for name, value in changes.items() if value is not None}
    return preset.model_copy(update={"sampling": preset.sampling.model_copy(update=given)})


def _dense(preset: Preset) -> Preset:
    """The preset with full attention at every step, nothing carried over them: later stages rest on what it makes."""
    data = preset.model_dump()
    data["attention"] = preset.attention.changed({"variant": "full"}).model_dump()
    return Preset.model_validate({**data, "schedule": {}})


def _tokens(size: Resolution, model: ModelChoice) -> int:
    return (size.width // model.token_side) * (size.height // model.token_side)


def _from_picture(stages: list[Stage], start: Resolution, strength: float | None) -> tuple[Stage, ...]:
    """The stages that are left to do on a picture."""
    *earlier, last = stages[1:]
    left = [*(stage for stage in earlier if stage.width * stage.height > start.width * start.height), last]
    if strength is not None:
        left[0] = replace(left[0], strength=strength)
    return tuple(replace(stage, number=number) for number, stage in enumerate(left))
