"""`grat plan`: what a run will cost, before any download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grat_cli import options
from grat_cli.output import Mode, Output, bytes_text, fact_table

if TYPE_CHECKING:
    from grat_cli.planning import Forecast


def plan(
    preset_name: Annotated[
        str | None,
        typer.Argument(
            metavar="PRESET",
            help="A preset by name or from a YAML file. Default: the model's recommended one.",
            show_default=False,
            autocompletion=options.complete_preset,
        ),
    ] = None,
    res: options.Res = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    preset: options.PresetName = None,
    variant: options.VariantName = None,
    group: options.Group = None,
    radius: options.Radius = None,
    share: options.Share = None,
    set_items: options.SetItems = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="As for grat image. Default: demo for the demo's presets, else flux-dev.",
            show_default=False,
            rich_help_panel="Model",
            autocompletion=options.complete_model,
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE.png",
            help="Draw the pattern into a file instead of the terminal.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show tokens, density, attention work, memory and the pattern of a run, without loading a model."""
    from grat_cli import media
    from grat_cli.errors import BadInput
    from grat_cli.models import choose_model
    from grat_cli.picture import image_picture, text_picture
    from grat_cli.planning import architecture_for, forecast
    from grat_cli.presets import load_preset
    from grat_cli.resolution import parse_resolution
    from grat_cli.selection import DTYPES, mismatch_note, require_choice, select_preset

    output = Output(as_json=as_json, quiet=quiet)
    if preset_name and preset:
        raise BadInput(f"two presets are given, {preset_name} and {preset}: leave one out")
    require_choice("--dtype", dtype, DTYPES)
    preset = preset or preset_name

    # 1. A preset says which family it is for; without either, plan for Flux, which is what large pictures need.
    if model is None:
        model = "demo" if preset is not None and load_preset(preset).model == "demo" else "flux-dev"
    choice = choose_model(model)
    chosen = select_preset(
        choice,
        preset=preset,
        variant=variant,
        group=group,
        radius=radius,
        share=share,
        steps=steps,
        guidance=guidance,
        set_items=set_items or (),
    )

    # 2. The size, and everything that follows from it.
    resolution = parse_resolution(res, choice.native_side, choice.size_multiple)
    if picture is not None:
        if picture.suffix.lower() != ".png":
            raise BadInput(f"--picture {picture}: pictures are PNG files: use {picture.with_suffix('.png')}")
        media.refuse_unwritable([picture], overwrite=overwrite)
    result = forecast(chosen, choice.name, architecture_for(choice), resolution, dtype)

    # 3. Show it.
    if note := mismatch_note(chosen, choice):
        output.hint(note)
    output.data(result.as_dict())
    output.show(fact_table(_facts(result)))
    if picture is not None:
        media.write_png(image_picture(result.main_plan), picture, None)
        output.line(str(picture))
    elif output.mode is Mode.HUMAN:
        output.show("", text_picture(result.main_plan, min(output.console.width, 80)))
    elif output.mode is Mode.QUIET:
        output.line(f"{result.schedule.density:.6f}")


def _facts(result: Forecast) -> dict[str, str]:
    from grat_cli.picture import NOT_ATTENDED, marks

    schedule, main = result.schedule, result.main_plan
    rows, columns = schedule.grid.shape
    full, planned = result.full_flop_per_step, result.planned_flop_per_step
    unit, scale = ("PFLOP", 1e15) if full >= 1e15 else ("TFLOP", 1e12) if full >= 1e12 else ("GFLOP", 1e9)
    everything = bool((marks(main) != NOT_ATTENDED).all())
    beyond = ", all beyond through means" if main.pattern.far_levels and everything else ""
    facts = {
        "preset": result.preset.name,
        "attention": result.preset.attention.summary,
        "model": result.model,
        "size": f"{result.resolution} pixels",
        "tokens": f"{main.image_tokens:,} image ({rows} rows x {columns}) + {main.text_len} text",
        "groups": f"{len(main.grouping.sizes):,} ({main.grouping.counts[0]} rows x {main.grouping.counts[1]})",
        "density": f"{schedule.density:.4f} of all query-key pairs",
        "ideal speed-up": f"{schedule.ideal_speedup:.1f}x, attention alone",
        "tile efficiency": f"{main.tile_efficiency():.0%} of 128x128 tiles",
        "reach": f"{main.reach:.0f} tokens{beyond}",
        "attention work": f"{planned / scale:.3g} of {full / scale:.3g} {unit} per step",
        "Q, K, V, O": f"{bytes_text(result.qkvo_bytes)} in {result.dtype}",
    }
    if len(schedule.plans) > 1:
        calls = schedule.steps * schedule.layers
        shares = (f"density {plan.density:.4f} in {used / calls:.0%}" for plan, used in schedule.uses.items())
        facts["schedule"] = f"{schedule.steps} steps, {schedule.layers} layers: {', '.join(shares)} of the calls"
    return facts
