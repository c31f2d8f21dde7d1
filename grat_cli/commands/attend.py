"""`grat attend`: how far a model looks, and what patterns keep of that."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grat_cli.commands import options
from grat_cli.console.output import Output

if TYPE_CHECKING:
    from grat_cli.estimates.planning import Forecast


def attend(
    context: typer.Context,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What the picture or video shows.", show_default=False)
    ],
    res: Annotated[
        str | None,
        typer.Option(
            "--res",
            metavar="SIZE",
            help="As for grat image and grat video. Default: the model's own size.",
            show_default=False,
            rich_help_panel="Picture",
        ),
    ] = None,
    aspect: options.Aspect = None,
    seconds: options.Seconds = None,
    frames: options.Frames = None,
    seed: Annotated[
        str | None,
        typer.Option(
            "--seed",
            metavar="SEED,...",
            help="One seed or several; figures are means over all. Default: random.",
            show_default=False,
            rich_help_panel="Picture",
        ),
    ] = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    patterns: Annotated[
        str | None,
        typer.Option(
            "--patterns",
            metavar="NAME,...",
            help="Patterns to judge: names as for grat bench --compare, such as b,x:share=1,far, or of presets. "
            "Default: the presets for the model.",
            show_default=False,
            rich_help_panel="Attention",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="A preset that gives the sampling; without --patterns its attention is judged as well. "
            "Default: the model's recommended one.",
            show_default=False,
            rich_help_panel="Attention",
            autocompletion=options.complete_preset,
        ),
    ] = None,
    set_items: options.SetItems = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="STEPS",
            help="How many steps to record, evenly spread; or which, counted from 0: 0-4,19, 0.5-1.0 or all. "
            "Default: 5.",
            show_default=False,
            rich_help_panel="Attention",
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(
            "--rows",
            parser=options.number("--rows", int),
            metavar="COUNT",
            help="Queries drawn at each transformer call; four times as many halve the intervals. Default: 64.",
            show_default=False,
            rich_help_panel="Attention",
        ),
    ] = "64",  # pyright: ignore[reportArgumentType]
    query: Annotated[
        list[str] | None,
        typer.Option(
            "--query",
            metavar="Y,X",
            help="A token whose attention is drawn, T,Y,X in videos: counted from 0, or with a decimal point as "
            "fractions; may be repeated. Default: the middle and two more.",
            show_default=False,
            rich_help_panel="Attention",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="As for grat image and grat video; demo with --frames or --seconds makes a video. "
            "Default: flux-dev with a CUDA device, else demo.",
            show_default=False,
            rich_help_panel="Model",
            autocompletion=options.complete_any_model,
        ),
    ] = None,
    device: options.DeviceName = "auto",
    dtype: options.Dtype = "auto",
    offload: options.Offload = "none",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Folder to write to. Default: one with a telling name in the current folder.",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Run a prompt with full attention and show how far it looks, and what patterns would keep of that."""
    from grat_cli.errors import BadInput
    from grat_cli.estimates.fitting import refuse_unfit_here
    from grat_cli.estimates.planning import architecture_for, forecast
    from grat_cli.fidelity import attend as watching
    from grat_cli.files import outputs
    from grat_cli.generation.seeds import resolve_seeds
    from grat_cli.generation.selection import (
        DTYPES,
        choose_medium,
        mismatch_note,
        require_choice,
        require_device,
        select_preset,
    )
    from grat_cli.models.catalogue import choose_model
    from grat_cli.models.offloading import OFFLOADS
    from grat_cli.models.resolution import parse_resolution
    from grat_cli.models.video_size import parse_video_size
    from grat_cli.presets import load_preset

    output = Output(as_json=as_json, quiet=quiet)

    # 1. What can be refused without looking at any model.
    if not prompt.strip():
        raise BadInput('the prompt is empty: try grat attend "a red fox in the snow"')
    require_device(device)
    require_choice("--dtype", dtype, DTYPES)
    require_choice("--offload", offload, OFFLOADS)
    seeds = resolve_seeds(seed, None)
    if rows < 2:
        raise BadInput(f"--rows {rows}: expected 2 or more, or no interval could be given")

    # 2. Model, preset, size, patterns, steps and queries; whether they fit one another.
    family = load_preset(preset).model if preset is not None else None
    of_video = any(option is not None for option in (aspect, seconds, frames))
    medium = choose_medium(model, family, of_video)
    choice = choose_model("demo" if model is None and family == "demo" else model, medium)
    chosen = select_preset(choice, preset=preset, steps=steps, guidance=guidance, set_items=set_items or ())
    size: Any = (
        parse_resolution(res, choice.native_side, choice.size_multiple)
        if medium == "image"
        else parse_video_size(res, aspect, seconds, frames, None, choice)
    )
    architecture = architecture_for(choice)
    grid = choice.grid(size.width, size.height, size.frames)
    candidates = watching.candidates_for(patterns, chosen, choice.presets, grid)
    recorded = watching.recorded_steps(at, chosen.sampling.steps)
    queries = watching.queries_for(query or (), grid)
    watched = watching.watched_preset(chosen, candidates)

    # 3. Where the files go, and whether the run fits, before minutes are spent on it.
    from grat_cli.fidelity.files import paths_in, write

    created = datetime.now().astimezone()
    folder = out or Path(outputs.default_name(created, prompt, str(size), "attend", seeds[0], suffix=""))
    if folder.is_dir():
        outputs.refuse_unwritable(paths_in(folder, medium, seeds, len(queries)), overwrite=overwrite)
    else:
        outputs.refuse_unwritable([folder], overwrite=False)
    if medium == "video":
        from grat_cli.files.videos import require_encodable

        require_encodable("mp4", fps=size.fps, crf=None)

    def forecasts(size: Any, in_dtype: str) -> list[Forecast]:
        return [forecast(watched, choice.name, architecture, size, in_dtype)]

    refuse_unfit_here(choice, forecasts, size, device=device, dtype=dtype, offload=offload, quantize="none")

    # 4. Run and watch.
    from dataclasses import replace

    from grat_cli.estimates.stages import FAIR_AREA
    from grat_cli.generation.makers import maker_for, request_for

    output.hint(f"{choice.name} ({choice.reason}), {size}, {chosen.sampling.steps} steps with full attention")
    output.hint(f"recorded: steps {', '.join(map(str, recorded))} (counted from 0), {rows} queries a call")
    output.hint(f"seed {', '.join(map(str, seeds))}")
    if chosen.schedule.rules or chosen.schedule.dense_steps:
        output.hint(f"the schedule of {chosen.name} is left aside: every pattern is judged at all recorded steps")
    for note in getattr(size, "notes", ()):
        output.hint(note)
    if note := mismatch_note(chosen, choice):
        output.hint(note)
    if medium == "image" and size.width * size.height > FAIR_AREA * choice.native_side**2:
        output.hint(
            f"{choice.name} was trained at about {choice.native_side}x{choice.native_side}: attention at {size} from "
            "noise is not that of a large picture that is made in stages"
        )
    of_size = {"width": size.width, "height": size.height}
    request = request_for(choice, chosen, prompt, **of_size, frames=getattr(size, "frames", None))
    maker = maker_for(replace(request, device=device, dtype=dtype, offload=offload))
    with output.progress() as progress:
        attended = watching.attend(maker, candidates, progress, seeds=seeds, steps=recorded, queries=queries, rows=rows)
        progress.phase("save")
        command = shlex.join(["grat", *(context.find_root().obj or ())])
        data = write(attended, maker, folder, command, created)

    # 5. What it shows.
    from grat_cli.fidelity.figures import density_hint, pattern_figures, table

    output.data({"folder": str(folder), **data})
    output.show(table(pattern_figures(attended)), "", " ".join(data["findings"]))
    if hint := density_hint(attended):
        output.hint(hint)
    output.line(str(folder / "index.html"))
