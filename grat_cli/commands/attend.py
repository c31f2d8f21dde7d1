"""`grat attend`: how far a model looks, and what patterns keep of that."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, only, option

if TYPE_CHECKING:
    from grat_cli.estimates.planning import Forecast


def attend(
    context: typer.Context,
    prompt: Annotated[str, argument("PROMPT", "What the picture or video shows.", is_text=True)],
    *,
    extent: Annotated[options.SizeOptions, only("res", "aspect", "seconds", "frames")],
    sampling: Annotated[
        options.SamplingOptions,
        only(
            "steps",
            "guidance",
            seed="One seed or several; figures are means over all. Default: random.",
        ),
    ],
    patterns: str | None = option(
        "NAME,...",
        "Patterns to judge: names as for grat bench --compare, such as b,x:share=1,far, or of presets. "
        "Default: the presets for the model.",
        options.ATTENTION,
    ),
    attention: Annotated[
        options.AttentionOptions,
        only(
            "set_items",
            preset="A preset that gives the sampling; without --patterns its attention is judged as well. "
            "Default: the model's recommended one.",
        ),
    ],
    at: str | None = option(
        "STEPS",
        "How many steps to record, evenly spread; or which, counted from 0: 0-4,19, 0.5-1.0 or all. Default: 5.",
        options.ATTENTION,
    ),
    rows: int = option(
        "COUNT",
        "Queries drawn at each transformer call; four times as many halve the intervals. Default: 64.",
        options.ATTENTION,
        64,
    ),
    query: list[str] | None = option(
        "Y,X",
        "A token whose attention is drawn, T,Y,X in videos: counted from 0, or with a decimal point as "
        "fractions; may be repeated. Default: the middle and two more.",
        options.ATTENTION,
    ),
    model: Annotated[
        options.ModelOptions, only(*options.OF_WEIGHTS, "device", "dtype", "offload", model=options.EITHER_MODEL)
    ],
    out: Path | None = option(
        "FOLDER", "Folder to write to. Default: one with a telling name in the current folder.", options.OUTPUT
    ),
    overwrite: bool = options.OVERWRITE,
    terminal: options.TerminalOptions,
) -> None:
    """Run a prompt with full attention and show how far it looks, and what patterns would keep of that."""
    from grat_cli.errors import BadInput
    from grat_cli.estimates.fitting import refuse_unfit_here
    from grat_cli.estimates.planning import architecture_for, forecast
    from grat_cli.fidelity import attend as watching
    from grat_cli.files import outputs
    from grat_cli.files.formats import require_writable
    from grat_cli.generation.selection import mismatch_note
    from grat_cli.presets import LARGEST_COUNT

    output = terminal.output()

    # 1. What can be refused without looking at any model.
    if not prompt.strip():
        raise BadInput('the prompt is empty: try grat attend "a red fox in the snow"')
    model.check()
    seeds = sampling.seeds()
    if not 2 <= rows <= LARGEST_COUNT:
        raise BadInput(f"--rows {rows}: expected 2 to {LARGEST_COUNT:,}; of one no interval could be given")

    # 2. Model, preset, size, patterns, steps and queries; whether they fit one another.
    choice = model.choice_for(attention.preset, extent)
    chosen = attention.preset_for(choice, sampling)
    size = extent.size_for(choice)
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
        outputs.refuse_unwritable(paths_in(folder, choice.medium, seeds, len(queries)), overwrite=overwrite)
    else:
        outputs.refuse_unwritable([folder], overwrite=False)
    fps = getattr(size, "fps", None)
    require_writable("mp4" if fps else "png", size.width, size.height, fps=fps, quality=None)

    def forecasts(size: Any, in_dtype: str) -> list[Forecast]:
        """Without the stages of large pictures."""
        return [forecast(watched, choice.name, architecture, size, in_dtype)]

    refuse_unfit_here(choice, forecasts, size, **model.machine, weights=model.weights)

    # 4. Run and watch.
    from dataclasses import replace

    from grat_cli.estimates.stages import FAIR_AREA
    from grat_cli.families import family_of
    from grat_cli.generation.request import request_for

    output.hint(f"{choice.name} ({choice.reason}), {size}, {chosen.sampling.steps} steps with full attention")
    output.hint(f"recorded: steps {', '.join(map(str, recorded))} (counted from 0), {rows} queries a call")
    output.hint(f"seed {', '.join(map(str, seeds))}")
    if chosen.schedule.rules or chosen.schedule.dense_steps:
        output.hint(f"the schedule of {chosen.name} is left aside: every pattern is judged at all recorded steps")
    output.hint(*getattr(size, "notes", ()))
    output.hint(mismatch_note(chosen, choice))
    if family_of(choice).stages and size.width * size.height > FAIR_AREA * choice.native_side**2:
        output.hint(
            f"{choice.name} was trained at about {choice.native_side}x{choice.native_side}: attention at {size} from "
            "noise is not that of a large picture that is made in stages"
        )
    of_size = {"width": size.width, "height": size.height}
    request = request_for(choice, chosen, prompt, **of_size, frames=getattr(size, "frames", None))
    request = replace(request, **model.machine, weights=model.weights)
    with output.progress() as progress:
        attended = watching.attend(
            request, candidates, progress, seeds=seeds, steps=recorded, queries=queries, rows=rows
        )
        progress.phase("save")
        command = options.command_line(context)
        data = write(attended, request, folder, command, created, overwrite=overwrite)

    # 5. What it shows.
    from grat_cli.fidelity.figures import density_hint, pattern_figures, table

    output.data({"folder": str(folder), **data})
    output.show(table(pattern_figures(attended)), "", " ".join(data["findings"]))
    output.hint(density_hint(attended))
    output.file(folder / "index.html")
