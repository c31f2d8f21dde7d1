"""What a run will cost, by arithmetic alone: tokens, density, attention work, memory. No torch, no model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.estimates.components import denoising_shapes
from grat_cli.estimates.over_steps import KeptBytes, StepCost, kept_bytes, over_steps_data, step_cost
from grat_cli.estimates.stages import stages_of
from grat_cli.families import family_of
from grat_cli.families.autoencoders import AutoencoderShape
from grat_cli.families.base import NO_PICTURES, ModelChoice, PictureKind
from grat_cli.families.shapes import TransformerShape
from grat_cli.models.resolution import Resolution
from grat_cli.models.video_size import VideoSize
from grat_cli.presets import Preset
from grat_cli.presets.over_steps import Keep
from grat_kernels import Plan
from grat_kernels.analysis import reach, tile_efficiency

SCHEMA = "grat.plan/1"
_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
_TILE = 128


@dataclass(frozen=True)
class Architecture:
    """A model, and the shapes of what makes its outputs.

    Attributes:
        model: which.
        transformer: its shape.
        autoencoder: likewise.
    """

    model: ModelChoice
    transformer: TransformerShape
    autoencoder: AutoencoderShape

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.transformer.head_dim

    def calls_per_step(self, guidance: float | None) -> int:
        """Transformer calls per denoising step."""
        return 2 if self.model.true_guidance and guidance is not None and guidance > 1 else 1


@dataclass(frozen=True)
class Forecast:
    """A run's attention, laid out.

    Attributes:
        size: of the picture or video.
        schedule: the plans of all steps, layers and heads.
        main_plan: the plan that serves most of them.
        full_flop_per_step: floating-point operations of one step's attention if it were full.
        qkvo_bytes: query, key, value and output of one attention call.
    """

    preset: Preset
    model: str
    architecture: Architecture
    size: Resolution | VideoSize
    dtype: str
    schedule: AttentionSchedule
    main_plan: Plan
    full_flop_per_step: float
    qkvo_bytes: int

    @property
    def planned_flop_per_step(self) -> float:
        """Floating-point operations of one step's attention, mean over the run."""
        return self.full_flop_per_step * self.schedule.density

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return _BYTES_OF_DTYPE[self.dtype]

    @property
    def linear_flop_per_call(self) -> float:
        """Floating-point operations of a transformer call besides attention over image tokens."""
        return self.linear_flop(self.tokens_besides_text)

    def linear_flop(self, tokens: int) -> float:
        """The same of a rank that has so many tokens besides text."""
        return self.architecture.transformer.linear_flop(tokens, self.architecture.model.text_tokens)

    @property
    def tokens_besides_text(self) -> int:
        """Image tokens, and those of references."""
        return self.main_plan.tokens - self.main_plan.text_len

    @property
    def calls_per_step(self) -> int:
        """Transformer calls per denoising step."""
        return self.architecture.calls_per_step(self.preset.sampling.guidance)

    def kept(self, keep: Keep | None = None, *, on_cpu: bool = False) -> KeptBytes:
        """What is kept where attention is carried over steps; see `over_steps.kept_bytes`."""
        schedules = [self.schedule] * self.calls_per_step
        return kept_bytes(schedules, self.architecture.transformer, self.element, keep=keep, on_cpu=on_cpu)

    def carrying(self, step: int) -> StepCost:
        """What carrying changes of a transformer call of a step."""
        return step_cost(self.schedule, self.architecture.transformer, step, self.element)

    @property
    def over_steps(self) -> dict[str, Any] | None:
        """Which steps are references, as plain data; None where attention is not carried over steps."""
        schedule = self.schedule
        if not schedule.is_over_steps:
            return None
        kinds = map(schedule.kind_of_step, range(schedule.steps))
        return over_steps_data(kinds, schedule, None, self.kept().total)

    def as_dict(self) -> dict[str, Any]:
        """The forecast as plain data, schema `grat.plan/1`."""
        plan = self.main_plan
        return {
            "schema": SCHEMA,
            "model": self.model,
            "preset": self.preset.model_dump(mode="json"),
            "width": self.size.width,
            "height": self.size.height,
            **_time_axis(self.size),
            "grid": list(self.schedule.grid.shape),
            "tokens": {"image": plan.image_tokens, "text": plan.text_len, **_references(plan), "total": plan.tokens},
            "group": list(plan.grouping.group),
            "groups": list(plan.grouping.counts),
            "steps": self.schedule.steps,
            "layers": self.schedule.layers,
            "density": self.schedule.density,
            "ideal_speedup": self.schedule.ideal_speedup,
            "work": self.schedule.parts._asdict(),
            **({"over_steps": self.over_steps} if self.over_steps else {}),
            "tile": _TILE,
            "tile_efficiency": tile_efficiency(plan, _TILE, _TILE),
            "reach_tokens": reach(plan),
            "attention_flop_per_step": {"full": self.full_flop_per_step, "planned": self.planned_flop_per_step},
            "dtype": self.dtype,
            "qkvo_bytes": self.qkvo_bytes,
            "plans": [
                {"share": share, "density": used.density, "groups": list(used.grouping.counts)}
                for used, share in self.schedule.shares.items()
            ],
        }


def _references(plan: Plan) -> dict[str, int]:
    count = plan.tokens - plan.image_tokens - plan.text_len
    return {"references": count} if count else {}


def _time_axis(size: Resolution | VideoSize) -> dict[str, Any]:
    if isinstance(size, VideoSize):
        return {"frames": size.frames, "fps": size.fps, "seconds": round(size.seconds, 3)}
    return {}


def architecture_for(choice: ModelChoice) -> Architecture:
    """The shape of a chosen model: of a folder as its files say, else that of its family.

    Raises:
        ModelUnavailable: if the folder lacks the configuration of a part, or that is damaged.
    """
    return Architecture(choice, *denoising_shapes(choice))


def schedule_for(
    preset: Preset,
    architecture: Architecture,
    size: Resolution | VideoSize,
    steps: int | None = None,
    references: int = 0,
) -> AttentionSchedule:
    """The schedule of a picture or video.

    Args:
        preset: resolved.
        architecture: shape of the model.
        size: of the picture or video.
        steps: that are run; None for all of the preset's.
        references: tokens of pictures to refer to.

    Raises:
        BadInput: if the preset does not fit its tokens, or its rules not the steps, layers and heads.
    """
    model = architecture.model
    return AttentionSchedule(
        preset,
        model.grid(size.width, size.height, size.frames),
        architecture.transformer.joint_text(model.text_tokens),
        family_of(model).text_first,
        steps=preset.sampling.steps if steps is None else steps,
        layers=architecture.transformer.layers,
        heads=architecture.transformer.heads,
        references=references,
    )


def forecast(
    preset: Preset,
    model: str,
    architecture: Architecture,
    size: Resolution | VideoSize,
    dtype: str = "auto",
    steps: int | None = None,
    references: int = 0,
) -> Forecast:
    """Lays out a run.

    Args:
        preset: resolved.
        model: name of the model.
        architecture: its shape.
        size: of the picture or video.
        dtype: of query, key and value; `auto` is bfloat16, float32 for bundled models.
        steps: that are run; None for all of the preset's.
        references: tokens of pictures to refer to.

    Raises:
        BadInput: if the preset does not fit the picture or video.
    """
    if dtype == "auto":
        dtype = "float32" if architecture.model.is_demo else "bfloat16"
    schedule = schedule_for(preset, architecture, size, steps, references)
    main_plan = max(schedule.shares, key=lambda plan: schedule.shares[plan])
    width = architecture.transformer.width
    # Two products of tokens x width x tokens, a multiplication and an addition each.
    per_call = 4 * main_plan.tokens**2 * width
    calls = architecture.transformer.layers * architecture.calls_per_step(preset.sampling.guidance)
    return Forecast(
        preset=preset,
        model=model,
        architecture=architecture,
        size=size,
        dtype=dtype,
        schedule=schedule,
        main_plan=main_plan,
        full_flop_per_step=float(per_call * calls),
        qkvo_bytes=4 * main_plan.tokens * width * _BYTES_OF_DTYPE[dtype],
    )


def run_forecasts(
    preset: Preset,
    choice: ModelChoice,
    size: Resolution | VideoSize,
    dtype: str = "auto",
    *,
    handed: frozenset[PictureKind] = NO_PICTURES,
    references: int = 0,
    start: Resolution | None = None,
    strength: float | None = None,
) -> list[Forecast]:
    """Lays out a whole run: each stage of a picture, the last of which costs most, or a video; see `forecast`.

    Args:
        preset: resolved.
        choice: the model.
        size: of the picture or video.
        dtype: as for `forecast`.
        handed: kinds of the pictures that the pipeline is given as they are.
        references: tokens of those to refer to.
        start: size of the picture that is redone, as for `stages_of`; None for stages from noise.
        strength: likewise.
    """
    architecture = architecture_for(choice)
    return [
        forecast(
            stage.preset,
            choice.name,
            architecture,
            replace(size, width=stage.width, height=stage.height),
            dtype,
            stage.steps,
            references,
        )
        for stage in stages_of(preset, choice, size.width, size.height, start=start, strength=strength, handed=handed)
    ]
