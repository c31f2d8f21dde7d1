"""Reports: what made a picture or video, how long it took, on what; written beside it, and in part inside it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from grat_cli.estimates.stages import Stage, stage_data
from grat_cli.generation.timing import StepTiming, by_name, of_stage
from grat_cli.models.environment import versions

if TYPE_CHECKING:
    from grat_cli.attention.schedule import AttentionSchedule
    from grat_cli.generation.request import Request

SCHEMA = "grat.report/1"

# What a run cost says nothing about how to repeat it, and stays out of the output.
_COSTS = ("phases", "steps", "peak_memory_bytes", "peak_memory_kind", "memory")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where a model runs, and in which form.

    Attributes:
        device: as torch calls it.
        device_name: what it is called.
        dtype: of the transformer.
        autoencoder_dtype: which may differ from it.
        threads: CPU threads where the device is a CPU, which results depend on in their last bits; else None.
        offload: which weights waited in main memory, never `auto`.
        offload_reason: why.
        revision: commit of the weights on the hub, or None.
        memory_kind: what is measured as peak memory, in words.
    """

    device: str
    device_name: str
    dtype: str
    autoencoder_dtype: str
    threads: int | None
    offload: str
    offload_reason: str
    revision: str | None
    memory_kind: str


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What there is to report about a stage.

    Attributes:
        stage: what was to be done.
        schedule: which attention ran when.
        text_tokens: length of the text in the joint sequence.
        reference_tokens: likewise of pictures to refer to.
        backend: how attention was computed, never `auto`.
        backend_reason: why.
        preparation: what normalised, rotated and joined queries and keys before attention, and why.
        guidance: effective guidance scale, or None.
        shift: effective time shift, a factor.
        guard: of `guard.RecallGuard.report`, None without a guard.
    """

    stage: Stage
    schedule: AttentionSchedule
    text_tokens: int
    backend: str
    backend_reason: str
    preparation: str | None
    guidance: float | None
    shift: float
    guard: dict[str, Any] | None = None
    reference_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data for a report, without its steps and phases."""
        return {
            **stage_data(self.stage, self.schedule),
            "guidance": self.guidance,
            "shift": self.shift,
            "backend": self.backend,
            "guard": self.guard,
        }


def build_report(
    request: Request,
    seed: int,
    surroundings: Surroundings,
    record: StageRecord,
    created: datetime,
    strength: float | None = None,
    pictures: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Everything about one output as plain data, but for what it cost, which `measured` adds.

    Args:
        request: what was asked for.
        seed: of the output.
        surroundings: where it is made.
        record: of the stage that is under way, or was the last.
        created: when, with time zone.
        strength: share of the steps that are run on the picture that the output starts from, or None.
        pictures: that the output is made from, of `inputs.told`.
    """
    schedule = record.schedule
    image_tokens = schedule.grid.tokens
    return {
        "schema": SCHEMA,
        "created": created.isoformat(timespec="seconds"),
        "command": request.command,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": seed,
        "width": request.width,
        "height": request.height,
        **_of_medium(request, strength),
        "pictures": [dict(picture) for picture in pictures],
        "preset": request.preset.model_dump(mode="json"),
        "model": {
            "name": request.model.name,
            "source": request.model.source,
            "family": request.model.presets,
            "revision": surroundings.revision,
            "base": request.base,
            "reason": request.model.reason,
        },
        "sampling": {"steps": record.stage.steps, "guidance": record.guidance, "shift": record.shift},
        "grid": list(schedule.grid.shape),
        "tokens": {
            "image": image_tokens,
            "text": record.text_tokens,
            **({"references": record.reference_tokens} if record.reference_tokens else {}),
            "total": image_tokens + record.text_tokens + record.reference_tokens,
        },
        "density": schedule.density,
        "ideal_speedup": schedule.ideal_speedup,
        "guard": record.guard,
        "backend": {
            "requested": request.preset.kernel.backend,
            "used": record.backend,
            "reason": record.backend_reason,
            "preparation": record.preparation,
        },
        "device": {
            "name": surroundings.device,
            "model": surroundings.device_name,
            "dtype": surroundings.dtype,
            "autoencoder_dtype": surroundings.autoencoder_dtype,
            "threads": surroundings.threads,
            "offload": surroundings.offload,
            "offload_reason": surroundings.offload_reason,
            "quantize": request.quantize,
            "compile": request.compile,
        },
        "versions": versions(),
        "peak_memory_kind": surroundings.memory_kind,
    }


def _of_medium(request: Request, strength: float | None) -> dict[str, Any]:
    """What pictures and videos do not have in common."""
    if request.fps and request.frames:
        return {
            "frames": request.frames,
            "fps": request.fps,
            "seconds": round(request.frames / request.fps, 3),
            "format": request.format,
            "crf": request.quality,
        }
    return {
        "init_image": None if request.init_image is None else str(request.init_image),
        "strength": None if request.init_image is None else strength,
    }


def measured(
    report: Mapping[str, Any],
    steps: Sequence[StepTiming],
    stages: Sequence[Mapping[str, Any]],
    phases_ms: Mapping[str, float],
    memory_bytes: Mapping[str, int],
) -> dict[str, Any]:
    """A report with what the output cost.

    Args:
        report: of `build_report`.
        steps: that are done, of all stages.
        stages: records as plain data, of those that are done or under way.
        phases_ms: milliseconds by `timing.phase_of`.
        memory_bytes: peak memory likewise.
    """
    memory = by_name(memory_bytes, max)
    return {
        **report,
        "sampling": {**report["sampling"], "steps": sum(stage["steps"] for stage in stages)},
        "phases": _rounded(by_name(phases_ms, operator.add)),
        "steps": [
            {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(step).items()}
            for step in steps
        ],
        "stages": [{**stage, "phases": _rounded(of_stage(phases_ms, number))} for number, stage in enumerate(stages)],
        "memory": memory,
        "peak_memory_bytes": max([0, *memory.values()]),
    }


def _rounded(phases_ms: Mapping[str, float]) -> dict[str, float]:
    return {name: round(milliseconds, 3) for name, milliseconds in phases_ms.items()}


def provenance(report: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a report that goes into the picture or video: all but what the run cost."""
    kept = {name: value for name, value in report.items() if name not in _COSTS}
    if "stages" in kept:
        kept["stages"] = [{name: stage[name] for name in stage if name != "phases"} for stage in kept["stages"]]
    return kept
