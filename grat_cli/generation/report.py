"""Reports: what made a picture or video, how long it took, on what; written beside it, and in part inside it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from grat_cli.models.environment import versions

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from grat_cli.generation.denoising import GenerationRecord
    from grat_cli.generation.image_request import ImageRequest
    from grat_cli.generation.pictures import GeneratedImage
    from grat_cli.generation.request import GenerationRequest
    from grat_cli.generation.timing import StepTiming
    from grat_cli.generation.video_request import VideoRequest

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
            "family": request.model.presets,
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
        "guard": made.guard,
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
            "offload": made.offload,
            "offload_reason": made.offload_reason,
            "quantize": request.quantize,
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


def guard_lines(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the guard did, a line for each picture or video that was made with one.

    For example `guard 0.9: 7 of 12 layers went wider from step 3 on, 4 of them to full; density 0.172 became 0.493`.
    """
    lines = [(made["seed"], guard_text(made)) for made in reports]
    prefixes = {seed: f"seed {seed}: " if len(reports) > 1 else "" for seed, _ in lines}
    return [f"{prefixes[seed]}{text}" for seed, text in lines if text]


def guard_text(report: Mapping[str, Any]) -> str | None:
    """What the guard of a run did, in a line, or of a picture in several stages in one for each; None without one."""
    parts = _guarded_parts(report)
    if not parts:
        return None
    texts = [f"{size}{_guard_summary(part)}" for size, part in parts]
    return f"guard {parts[0][1]['guard']['bar']:g}: {'; '.join(texts)}"


def widenings_text(report: Mapping[str, Any]) -> str | None:
    """Which layers went wider when, such as `step 3: layers 0-3, 7 to b radius 2, groups 4x4`; None where none did."""
    groups: dict[tuple[str, int, str], list[int]] = {}
    for size, part in _guarded_parts(report):
        for one in part["guard"]["widened"]:
            groups.setdefault((size, one["step"], one["to"]), []).append(one["layer"])
    texts = [
        f"{size}step {step + 1}: layer{'s' if len(layers) > 1 else ''} {ranges_text(layers)} to {to}"
        for (size, step, to), layers in groups.items()
    ]
    return "; ".join(texts) or None


def _guarded_parts(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The run, or the stages of a picture that has several, each with its size; those that had a guard."""
    stages = report.get("stages", ())
    if len(stages) <= 1:
        return [("", report)] if report.get("guard") else []
    return [(f"{stage['width']}x{stage['height']} ", stage) for stage in stages if stage.get("guard")]


def _guard_summary(part: Mapping[str, Any]) -> str:
    guard = part["guard"]
    lowest, widened = guard["lowest"], guard["widened"]
    if lowest is None:
        return "all attention was full" if guard["planned_density"] == 1 else "too few steps to judge any layer"
    least = f"{lowest['kept']:.2f} in layer {lowest['layer']} at step {lowest['step'] + 1}"
    if not widened:
        return f"no layer went wider, the least kept was {least}"
    layers = {one["layer"] for one in widened}
    full = {one["layer"] for one in widened if one["to"] == "full"}
    to_full = f", {len(full)} of them to full" if full else ""
    first = min(one["step"] for one in widened) + 1
    return (
        f"{len(layers)} of {guard['layers']} layers went wider from step {first} on{to_full} (least kept {least}); "
        f"density {guard['planned_density']:.3f} became {part['density']:.3f}"
    )


def ranges_text(numbers: Sequence[int]) -> str:
    """Ascending numbers with their runs drawn together, such as `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


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
