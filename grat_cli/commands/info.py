"""`grat info`: how a picture or video was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from grat_cli.commands import options
from grat_cli.commands.parameters import argument
from grat_cli.console.output import Mode, Output, bytes_text, fact_table

if TYPE_CHECKING:
    from grat_cli.presets import Preset


def info(
    file: Annotated[Path, argument("FILE", "A picture or video by grat, its latents or checkpoint, or the report.")],
    terminal: options.TerminalOptions,
) -> None:
    """Show what made a picture or video: prompt, seed, model, preset, size, versions."""
    from grat_cli.console import run_tables
    from grat_cli.errors import BadInput
    from grat_cli.files import outputs

    output = terminal.output()
    told = outputs.read_provenance(file)
    output.data(told)
    if output.mode is Mode.JSON:
        return
    try:
        found, preset = _checked(told)
    except ValueError as error:
        raise BadInput(
            f"{file} is not a whole report of this version of grat ({error}): --json shows it as it is"
        ) from error
    facts = _facts(found, preset) | _file_facts(file, output)
    timings = [run_tables.timing_table(found), run_tables.phases_line(found)] if "steps" in found else []
    output.show(fact_table(facts), *timings)
    if terminal.quiet:
        output.line(found["command"])


def _checked(told: Mapping[str, Any]) -> tuple[dict[str, Any], Preset]:
    """What is shown of a report, each field of its type; what is not there is left out.

    Raises:
        ValueError: if one is not, in one line.
    """
    from grat_cli.files.json_objects import validated
    from grat_cli.generation.told import ShownReport

    # Of text that was typed in bytes which are none, what can be shown.
    readable = json.loads(json.dumps(told, ensure_ascii=False).encode("utf-8", "replace"))
    report = validated(ShownReport, readable)
    return {name: value for name, value in report.model_dump().items() if value is not None}, report.preset


def _facts(found: Mapping[str, Any], preset: Preset) -> dict[str, str]:
    from grat_cli.console import run_tables

    model, device, backend, sampling = found["model"], found["device"], found["backend"], found["sampling"]
    facts = {
        "prompt": found["prompt"],
        "negative": found.get("negative_prompt"),
        "seed": str(found["seed"]),
        "size": _size(found),
        "from": f"{found['init_image']}, strength {found['strength']:g}"
        if {"init_image", "strength"} <= set(found)
        else None,
        "pictures": ", ".join(_picture(picture) for picture in found.get("pictures", ())),
        "model": f"{model['name']} ({model['source']})" if model["source"] != model["name"] else model["name"],
        "revision": model.get("revision"),
        "LoRA": ", ".join(_lora(lora) for lora in model.get("loras", ())),
        "preset": preset.name,
        "attention": preset.attention.summary,
        "density": _density(found),
        "guard": (run_tables.guard_text(found) or "").removeprefix("guard ") or None,
        "went wider": run_tables.widenings_text(found),
        "references": run_tables.references_text(found),
        "cache": (run_tables.cache_text(found) or "").removeprefix("cache ") or None,
        "over steps": run_tables.over_steps_text(found),
        "steps": _steps(found),
        "guidance": None if sampling["guidance"] is None else f"{sampling['guidance']:g}",
        "time shift": f"{sampling['shift']:.3g}",
        "backend": f"{backend['used']} ({backend['reason']})",
        "device": f"{device['model']} ({device['name']}, {device['dtype']})",
        "ranks": run_tables.ranks_text(found),
        "peak memory": _peak_memory(found),
        "made": f"{found['created']} by grat {found['versions']['grat']}",
        "command": found["command"],
    }
    return {name: value for name, value in facts.items() if value}


def _lora(lora: Mapping[str, Any]) -> str:
    """`style.safetensors at 0.8`, and what else there is to know."""
    of = {"high": ", high noise", "low": ", low noise", "both": ", both transformers"}.get(lora["noise"], "")
    return f"{lora['name']} at {lora['scale']:g}{of}{', fused' if lora['fused'] else ''} (sha256 {lora['sha256'][:12]})"


def _density(found: Mapping[str, Any]) -> str:
    speedup = found["ideal_speedup"]
    return f"{found['density']:.3f}" + ("" if speedup is None else f" ({speedup:.1f}x less attention work)")


def _picture(picture: Mapping[str, Any]) -> str:
    return f"{picture['kind']} {picture['file']} ({picture['width']}x{picture['height']})"


def _file_facts(file: Path, output: Output) -> dict[str, str]:
    """What a video file says of itself, which another program may have changed; a damaged one is told."""
    from grat_cli.errors import BadInput
    from grat_cli.files.videos import SUFFIXES, probe_video

    if output.mode is not Mode.HUMAN or not (file.is_dir() or file.suffix.lower() in SUFFIXES.values()):
        return {}
    try:
        facts = probe_video(file)
    except BadInput as error:
        output.hint(str(error))
        return {}
    rate = "" if facts.fps is None else f" at {facts.fps:g} per second ({facts.seconds:.3g} s)"
    return {"file": f"{facts.codec}, {facts.width}x{facts.height}, {facts.frames} frames{rate}"}


def _size(found: Mapping[str, Any]) -> str:
    size = f"{found['width']}x{found['height']}"
    if "frames" not in found:
        return size
    return f"{size}, {found['frames']} frames at {found['fps']:g} per second ({found['seconds']:.3g} s)"


def _steps(found: Mapping[str, Any]) -> str:
    done, total = found.get("steps_done"), found.get("steps_total")
    return str(found["sampling"]["steps"]) if done == total else f"{done} of {total} are done"


def _peak_memory(found: Mapping[str, Any]) -> str | None:
    """Only reports say it, pictures do not."""
    if "peak_memory_bytes" not in found:
        return None
    return f"{bytes_text(found['peak_memory_bytes'])} ({found['peak_memory_kind']})"
