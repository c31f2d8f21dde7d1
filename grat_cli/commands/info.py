"""`grat info`: how a picture was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grat_cli import options
from grat_cli.output import Output, bytes_text, fact_table


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A picture by grat, or the report beside it.")],
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show what made a picture: prompt, seed, model, preset, size, versions."""
    from grat_cli import media, report

    output = Output(as_json=as_json, quiet=quiet)
    found = media.read_provenance(file)
    output.data(found)
    try:
        facts = _facts(found)
        timings = [report.timing_table(found), report.phases_line(found)] if "steps" in found else []
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise media.BadInput(f"{file} is not a whole report of grat: {error!r} is missing or wrong") from error
    output.show(fact_table(facts), *timings)
    if quiet:
        output.line(str(found["command"]))


def _facts(found: dict[str, Any]) -> dict[str, str]:
    from grat_cli.presets import Preset

    preset = Preset.model_validate(found["preset"])
    model, device, backend = found["model"], found["device"], found["backend"]
    facts = {
        "prompt": found["prompt"],
        "negative": found.get("negative_prompt"),
        "seed": str(found["seed"]),
        "size": f"{found['width']}x{found['height']}",
        "from": f"{found['init_image']}, strength {found['strength']}" if found.get("init_image") else None,
        "model": f"{model['name']} ({model['source']})" if model["source"] != model["name"] else model["name"],
        "revision": model.get("revision"),
        "preset": preset.name,
        "attention": preset.attention.summary,
        "density": f"{found['density']:.3f} ({found['ideal_speedup']:.1f}x less attention work)",
        "steps": str(preset.sampling.steps),
        "guidance": None if preset.sampling.guidance is None else f"{preset.sampling.guidance:g}",
        "backend": f"{backend['used']} ({backend['reason']})",
        "device": f"{device['model']} ({device['name']}, {device['dtype']})",
        "peak memory": bytes_text(found["peak_memory_bytes"]) if found.get("peak_memory_bytes") else None,
        "made": f"{found['created']} by grat {found['versions']['grat']}",
        "command": found["command"],
    }
    return {name: value for name, value in facts.items() if value}
