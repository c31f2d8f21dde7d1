"""What a run will cost, by arithmetic alone: tokens, density, attention work, memory. No torch, no model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from grat_cli.architectures import Architecture, architecture_of
from grat_cli.models import ModelChoice
from grat_cli.presets import Preset
from grat_cli.resolution import Resolution
from grat_cli.schedule import AttentionSchedule
from grat_kernels import Grid, Plan

SCHEMA = "grat.plan/1"
_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
_TILE = 128


@dataclass(frozen=True)
class Forecast:
    """A run's attention, laid out.

    Attributes:
        schedule: the plans of all steps and layers.
        main_plan: the plan that serves most attention calls.
        full_flop_per_step: floating-point operations of one step's attention if it were full.
        qkvo_bytes: query, key, value and output of one attention call.
    """

    preset: Preset
    model: str
    architecture: Architecture
    resolution: Resolution
    dtype: str
    schedule: AttentionSchedule
    main_plan: Plan
    full_flop_per_step: float
    qkvo_bytes: int

    @property
    def planned_flop_per_step(self) -> float:
        """Floating-point operations of one step's attention, mean over the run."""
        return self.full_flop_per_step * self.schedule.density

    def as_dict(self) -> dict[str, Any]:
        """The forecast as plain data, schema `grat.plan/1`."""
        plan = self.main_plan
        return {
            "schema": SCHEMA,
            "model": self.model,
            "preset": self.preset.model_dump(mode="json"),
            "width": self.resolution.width,
            "height": self.resolution.height,
            "grid": list(self.schedule.grid.shape),
            "tokens": {"image": plan.image_tokens, "text": plan.text_len, "total": plan.tokens},
            "group": list(plan.grouping.group),
            "groups": list(plan.grouping.counts),
            "steps": self.schedule.steps,
            "layers": self.schedule.layers,
            "density": self.schedule.density,
            "ideal_speedup": self.schedule.ideal_speedup,
            "tile": _TILE,
            "tile_efficiency": plan.tile_efficiency(_TILE, _TILE),
            "reach_tokens": plan.reach,
            "attention_flop_per_step": {"full": self.full_flop_per_step, "planned": self.planned_flop_per_step},
            "dtype": self.dtype,
            "qkvo_bytes": self.qkvo_bytes,
            "plans": [
                {"calls": calls, "density": used.density, "groups": list(used.grouping.counts)}
                for used, calls in self.schedule.uses.items()
            ],
        }


def architecture_for(choice: ModelChoice) -> Architecture:
    """The shape of a chosen model; its heads and layers are those of its family where it is not a known one."""
    return replace(
        architecture_of(choice.name, choice.family),
        text_tokens=choice.text_tokens,
        token_side=choice.token_side,
        native_side=choice.native_side,
    )


def schedule_for(preset: Preset, architecture: Architecture, resolution: Resolution) -> AttentionSchedule:
    """The schedule of a picture.

    Raises:
        BadInput: if the preset does not fit the picture's tokens, or its rules not the steps and layers.
    """
    grid = Grid((resolution.height // architecture.token_side, resolution.width // architecture.token_side))
    text_tokens, layers = architecture.text_tokens, architecture.layers
    return AttentionSchedule(preset, grid, text_tokens, text_first=True, steps=preset.sampling.steps, layers=layers)


def forecast(
    preset: Preset, model: str, architecture: Architecture, resolution: Resolution, dtype: str = "auto"
) -> Forecast:
    """Lays out a run.

    Args:
        preset: resolved.
        model: name of the model.
        architecture: its shape.
        resolution: size of the picture.
        dtype: of query, key and value; `auto` is bfloat16, float32 for the demo.

    Raises:
        BadInput: if the preset does not fit the picture.
    """
    if dtype == "auto":
        dtype = "float32" if architecture.family == "demo" else "bfloat16"
    schedule = schedule_for(preset, architecture, resolution)
    main_plan = max(schedule.uses, key=lambda plan: schedule.uses[plan])
    width = architecture.heads * architecture.head_dim
    # Two products of tokens x width x tokens, a multiplication and an addition each.
    per_call = 4 * main_plan.tokens**2 * width
    calls = architecture.layers * architecture.calls_per_step(preset.sampling.guidance)
    return Forecast(
        preset=preset,
        model=model,
        architecture=architecture,
        resolution=resolution,
        dtype=dtype,
        schedule=schedule,
        main_plan=main_plan,
        full_flop_per_step=float(per_call * calls),
        qkvo_bytes=4 * main_plan.tokens * width * _BYTES_OF_DTYPE[dtype],
    )
