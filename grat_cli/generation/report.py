"""Reports: what made a picture or video, how long it took, on what; written beside it, and in part inside it."""

from __future__ import annotations

import operator
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.console.run_tables import ranges_text
from grat_cli.estimates.stages import Stage, stage_data
from grat_cli.files.places import expanded
from grat_cli.generation.stored import told_request
from grat_cli.generation.timing import StepTiming, by_name, of_stage
from grat_cli.models.catalogue import HUB_ID
from grat_cli.models.environment import versions

if TYPE_CHECKING:
    from grat_cli.attention.schedule import AttentionSchedule
    from grat_cli.generation.request import Request
    from grat_cli.models.parallel import Parallel
    from grat_cli.presets import Cache

SCHEMA = "grat.report/1"

# What a run cost says nothing about how to repeat it, and stays out of the output.
_COSTS = ("phases", "steps", "text", "peak_memory_bytes", "peak_memory_kind", "memory")
# Of a step, what is told where there is any.
_WHERE_ANY = ("computed", "over_steps", "exchange_ms", "exchanged_bytes")


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
        loras: that are added to the weights, of `lora.AppliedLora.told`.
        weights: files that weights were read from, of `WeightFile.as_dict`.
        parallel: how ranks share an output; None for one process alone.
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
    loras: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[dict[str, Any], ...] = ()
    parallel: Parallel | None = None


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
        cache: of `cache_data`, None without a cache.
        over_steps: of `over_steps.over_steps_data`, None where attention is not carried over steps.
        density: of what was computed; None for what the schedule says.
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
    cache: dict[str, Any] | None = None
    over_steps: dict[str, Any] | None = None
    density: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data for a report, without its steps and phases."""
        return {
            **stage_data(self.stage, self.schedule),
            "density": self.attended,
            "guidance": self.guidance,
            "shift": self.shift,
            "backend": self.backend,
            "guard": self.guard,
            **self.taken_over,
        }

    @property
    def taken_over(self) -> dict[str, Any]:
        """What steps took over from those before, by what did that; nothing where they took nothing."""
        sections = {"cache": self.cache, "over_steps": self.over_steps}
        return {name: section for name, section in sections.items() if section}

    @property
    def attended(self) -> float:
        """Pairs that were computed over all pairs."""
        return self.schedule.density if self.density is None else self.density


def cache_data(
    cache: Cache, steps: Sequence[StepTiming], layers: int, planned: float, ratios: Sequence[float] = ()
) -> dict[str, Any]:
    """What a cache did in a stage, as plain data. Steps and layers are counted from 0.

    Args:
        cache: its settings.
        steps: that are done, of this stage.
        layers: attention layers.
        planned: density without it.
        ratios: that it has measured.
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, step in enumerate(steps):
        alike.setdefault(step.computed, []).append(number)
    return {
        **cache.model_dump(mode="json"),
        "skipped": cache.skipped,
        "layers": layers,
        "planned_density": planned,
        "steps": [
            {"steps": ranges_text(numbers), "count": len(numbers), "computed": list(computed) or None}
            for computed, numbers in alike.items()
        ],
        **({"ratios": [round(ratio, 5) for ratio in ratios]} if ratios else {}),
    }


def build_report(
    request: Request,
    seed: int,
    surroundings: Surroundings,
    record: StageRecord,
    created: datetime,
    strength: float | None = None,
    pictures: Sequence[Mapping[str, Any]] = (),
    *,
    text_known: bool = False,
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
        text_known: whether its text was in the cache of texts.
    """
    schedule, asked = record.schedule, told_request(request)
    image_tokens = schedule.grid.tokens
    return {
        "schema": SCHEMA,
        "created": created.isoformat(timespec="seconds"),
        "command": without_folders(request.command),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": seed,
        "width": request.width,
        "height": request.height,
        **_of_medium(request, strength),
        "pictures": [dict(picture) for picture in pictures],
        "asked": asked,
        "preset": request.preset.model_dump(mode="json"),
        "model": {
            "name": asked["model"]["name"],
            "source": asked["model"]["source"],
            "family": request.model.presets,
            "revision": surroundings.revision,
            "loras": [dict(lora) for lora in surroundings.loras],
            "text_encoder": _name_of(request.weights.text_encoder),
            "weights": [dict(file) for file in surroundings.weights],
            "base": asked["weights"]["base"],
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
        "density": record.attended,
        "ideal_speedup": 1 / record.attended if record.attended else None,
        "guard": record.guard,
        **record.taken_over,
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
            "quantize": request.weights.quantize,
            "cast": request.weights.cast,
            "compile": request.compile,
        },
        **({"ranks": ranks_data(surroundings.parallel)} if surroundings.parallel else {}),
        "text": {"from": "cache" if text_known else "encoders"},
        "versions": versions(),
        "peak_memory_kind": surroundings.memory_kind,
    }


def ranks_data(parallel: Parallel) -> dict[str, Any]:
    """How ranks share an output, as plain data."""
    return {"count": parallel.ranks, "cp": parallel.cp, "cfg": parallel.cfg, "reason": parallel.reason}


def _name_of(file: str | None) -> str | None:
    """A file's own name: where it lies is nobody's business."""
    return None if file is None else Path(file).name


# Options whose values are files, and those whose values may also be hub ids.
_OF_FILES = (
    *("--out", "--init-image", "--mask", "--control", "--reference", "--preset"),
    *("--model", "--base", "--lora", "--text-encoder"),
)
_OF_HUB_IDS = ("--model", "--base", "--lora", "--text-encoder")


def without_folders(command: str) -> str:
    """A command line with the names of files alone: where they lay is nobody's business, and helps nobody elsewhere."""
    try:
        words = shlex.split(command)
    except ValueError:  # of a file that somebody else wrote
        return ""
    told, before = [], ""
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else (before, "", word)
        told.append(f"{option}={_name_alone(option, value)}" if equals else _name_alone(option, word))
        before = word
    return shlex.join(told)


def _name_alone(option: str, value: str) -> str:
    """What stands after an option, or anywhere, in a command line: of a path its last part."""
    place = value.partition("@")[0]
    looks_so = value.startswith(("/", "~", "./", "../")) and not any(map(str.isspace, value))
    of_hub = option in _OF_HUB_IDS and HUB_ID.match(value) and not _exists(place)
    is_path = looks_so or (option in _OF_FILES and not of_hub) or _exists(place)
    return value.rstrip("/").rpartition("/")[2] if "/" in value and is_path else value


def _exists(place: str) -> bool:
    try:
        return os.path.exists(expanded(place))
    except (OSError, ValueError, RuntimeError):  # a prompt, which no path could be
        return False


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
        "init_image": None if request.init_image is None else request.init_image.name,
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
            {
                name: round(value, 6) if isinstance(value, float) else value
                for name, value in asdict(step).items()
                if value or name not in _WHERE_ANY
            }
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
    if "ranks" in kept:
        told = ("count", "cp", "cfg", "reason")
        kept["ranks"] = {name: value for name, value in kept["ranks"].items() if name in told}
    if "stages" in kept:
        kept["stages"] = [{name: stage[name] for name in stage if name != "phases"} for stage in kept["stages"]]
    return kept
