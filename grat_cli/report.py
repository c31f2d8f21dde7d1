"""Reports: what made a picture or video, how long it took, on what; written beside it, and in part inside it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from grat_cli.environment import versions

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from grat_cli.denoising import GenerationRecord
    from grat_cli.generation import GeneratedImage
    from grat_cli.generation_request import GenerationRequest
    from grat_cli.image_request import ImageRequest
    from grat_cli.timing import StepTiming
    from grat_cli.video_request import VideoRequest

SCHEMA = "grat.report/1"

# What a run cost says nothing about how to repeat it, and stays out of the output.
_COSTS = ("phases", "steps", "peak_memory_bytes", "peak_memory_kind", "memory")
_STEPS_SHOWN_WHOLE = 4


def build_report(request: ImageRequest, generated: GeneratedImage, command: str, created: datetime) -> dict[str, Any]:
    """Everything about one picture, as plain data.

    Args:
        request: what was asked for.
        generated: what came of it.
        command: the command line as typed.
        created: when, with time zone.
    """
    strength = next((record.stage.strength for record in generated.stages), request.strength)
    how = {
        "init_image": None if request.init_image is None else str(request.init_image),
        "strength": None if request.init_image is None else strength,
    }
    built = _report(request, generated, command, created, how)
    for step, timed in zip(built["steps"], generated.steps, strict=True):
        step["stage"] = timed.stage
    built["stages"] = [record.as_dict() for record in generated.stages]
    return built


def build_video_report(request: VideoRequest, made: GenerationRecord, created: datetime) -> dict[str, Any]:
    """Everything about one video, as plain data, as far as it has been made.

    Args:
        request: what was asked for.
        made: what came of it up to the end of denoising.
        created: when, with time zone.
    """
    how = {
        "frames": request.frames,
        "fps": request.fps,
        "seconds": round(request.frames / request.fps, 3),
        "format": request.format,
        "crf": request.crf,
    }
    built = _report(request, made, request.command, created, how)
    # Of a run that is not done yet, `steps` has those that are.
    built["sampling"]["steps"] = request.preset.sampling.steps
    return built


def measured(
    report: Mapping[str, Any], phases_ms: Mapping[str, float], memory_bytes: Mapping[str, int]
) -> dict[str, Any]:
    """A video's report with time and peak memory of its phases.

    Args:
        report: of `build_video_report`.
        phases_ms: milliseconds by phase.
        memory_bytes: peak memory by phase.
    """
    return {
        **report,
        "phases": {name: round(milliseconds, 3) for name, milliseconds in phases_ms.items()},
        "memory": dict(memory_bytes),
        "peak_memory_bytes": max([0, *memory_bytes.values()]),
    }


def _report(
    request: GenerationRequest, made: GenerationRecord, command: str, created: datetime, how: Mapping[str, Any]
) -> dict[str, Any]:
    """A report; `how` is what pictures and videos do not have in common."""
    schedule = made.schedule
    image_tokens = schedule.grid.tokens
    return {
        "schema": SCHEMA,
        "created": created.isoformat(timespec="seconds"),
        "command": command,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": made.seed,
        "width": made.width,
        "height": made.height,
        **how,
        "preset": request.preset.model_dump(mode="json"),
        "model": {
            "name": request.model.name,
            "source": request.model.source,
            "family": request.model.family,
            "revision": made.model_revision,
            "base": request.base,
            "reason": request.model.reason,
        },
        "sampling": {
            "steps": len(made.steps),
            "guidance": made.guidance,
            "shift": made.shift,
        },
        "grid": list(schedule.grid.shape),
        "tokens": {
            "image": image_tokens,
            "text": made.text_tokens,
            "total": image_tokens + made.text_tokens,
        },
        "density": schedule.density,
        "ideal_speedup": schedule.ideal_speedup,
        "backend": {
            "requested": request.preset.kernel.backend,
            "used": made.backend,
            "reason": made.backend_reason,
            "preparation": made.preparation,
        },
        "device": {
            "name": made.device,
            "model": made.device_name,
            "dtype": made.dtype,
            "autoencoder_dtype": made.autoencoder_dtype,
            "threads": made.threads,
            "offload": request.offload,
        },
        "versions": versions(),
        "phases": {name: round(milliseconds, 3) for name, milliseconds in made.phases_ms.items()},
        "steps": [_step(step) for step in made.steps],
        "peak_memory_bytes": made.peak_memory_bytes,
        "peak_memory_kind": made.peak_memory_kind,
    }


def provenance(report: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a report that goes into the picture or video: all but what the run cost."""
    kept = {name: value for name, value in report.items() if name not in _COSTS}
    if "stages" in kept:
        kept["stages"] = [{name: stage[name] for name in stage if name != "phases"} for stage in kept["stages"]]
    return kept


def timing_table(report: Mapping[str, Any]) -> RenderableType:
    """Steps of a report for people, the sum last; of many steps the first, the median and the last.

    Of a picture in several stages, the sum of each stage in their place.
    """
    steps: Sequence[Mapping[str, Any]] = report["steps"]
    stages = report.get("stages", ())
    table = _table("stage" if len(stages) > 1 else "step")
    for stage in stages if len(stages) > 1 else ():
        own = [step for step in steps if step["stage"] == stage["number"]]
        table.add_row(f"{stage['width']}x{stage['height']}", *_cells(_sum(own)))
    for name, step in _telling_steps(steps) if len(stages) <= 1 else ():
        table.add_row(name, *_cells(step))
    table.add_section()
    table.add_row(f"all {len(steps)}", *_cells(_sum(steps)))
    return table


def pictures_table(reports: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line per picture or video: denoising time, the part of it in attention, density."""
    table = _table("seed")
    for made in reports:
        table.add_row(str(made["seed"]), *_cells(_sum(made["steps"])))
    return table


def phases_line(report: Mapping[str, Any]) -> str:
    """For example `load 1.2 s, text 0.1 s, denoise 4.5 s, decode 0.2 s, save 0.1 s`."""
    return ", ".join(f"{name} {milliseconds_text(value)}" for name, value in report["phases"].items())


def milliseconds_text(milliseconds: float) -> str:
    """A time for people: `0.8 ms`, `210 ms`, `4.52 s` or `95 s`."""
    if milliseconds < 1000:
        return f"{milliseconds:.{1 if milliseconds < 10 else 0}f} ms"
    return f"{milliseconds / 1000:.{2 if milliseconds < 10_000 else 1}f} s"


def _table(first_column: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)  # 40 columns are enough
    table.add_column(first_column, no_wrap=True)
    for name in ("time", "attention", "share", "density"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(times: Mapping[str, Any]) -> tuple[str, str, str, str]:
    total, attention = times["total_ms"], times["attention_ms"]
    share = f"{attention / total:.0%}" if total else "-"
    return milliseconds_text(total), milliseconds_text(attention), share, f"{times['density']:.3f}"


def _sum(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Times added up, densities averaged."""
    times = {name: sum(step[name] for step in steps) for name in ("total_ms", "attention_ms")}
    return {**times, "density": statistics.fmean(step["density"] for step in steps) if steps else 0.0}


def _telling_steps(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    if len(steps) <= _STEPS_SHOWN_WHOLE:
        return [(str(step["index"] + 1), step) for step in steps]
    # The step of median length, not medians column by column: its parts belong together.
    median = sorted(steps, key=lambda step: step["total_ms"])[len(steps) // 2]
    return [("first", steps[0]), ("median", median), ("last", steps[-1])]


def _step(step: StepTiming) -> dict[str, Any]:
    """A step as plain data; only pictures have stages."""
    values = {name: value for name, value in asdict(step).items() if name != "stage"}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
