"""`grat resume`: goes on with a video that was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.console.output import Output


def resume(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The checkpoint, or the video that it is to become.", show_default=False),
    ],
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Go on with a video that was interrupted, to the same result; everything else is as it was asked for."""
    from grat_cli.commands import video_output
    from grat_cli.files import outputs as media
    from grat_cli.generation.video_run import find_run, read_run

    output = Output(as_json=as_json, quiet=quiet)

    # 1. Where it stands.
    kept = find_run(file)
    run, request = read_run(kept)
    request = replace(request, overwrite=overwrite or request.overwrite)
    left = request.seeds[request.seeds.index(run.seed) :]
    outputs = request.outputs[-len(left) :]
    media.refuse_unwritable([*outputs, *map(media.report_path, outputs)], overwrite=request.overwrite)
    output.hint(f"{kept.name}: {request.model.name}, {request.size}, {request.preset.name}")
    output.hint(f"seed {', '.join(map(str, left))}: step {run.done} of {request.preset.sampling.steps} is done")

    # 2. The rest.
    video_output.make_videos(request, output, run)
