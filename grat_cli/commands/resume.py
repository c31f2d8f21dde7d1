"""`grat resume`: goes on with a video that was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from grat_cli.commands import options
from grat_cli.commands.parameters import argument


def resume(
    file: Annotated[Path, argument("FILE", "The checkpoint, or the video that it is to become.")],
    *,
    out: Path | None = options.OUT_BESIDE,
    overwrite: bool = options.OVERWRITE,
    terminal: options.TerminalOptions,
) -> None:
    """Go on with a video that was interrupted, to the same result; it lies beside FILE, by its name, or at --out."""
    from grat_cli.commands import video_output
    from grat_cli.files import outputs as media
    from grat_cli.files.videos import SUFFIXES
    from grat_cli.generation.video_run import files_of, find_run, read_run

    output = terminal.output()

    # 1. Where it stands.
    kept = find_run(file)
    run, request = read_run(kept)
    left = request.seeds[request.seeds.index(run.seed) :]
    outputs = request.outputs[-len(left) :]
    if out is not None:
        outputs = media.output_paths(out, [path.name for path in outputs], left, SUFFIXES[request.format])
    request = replace(request, seeds=left, outputs=tuple(outputs), overwrite=overwrite)
    video_output.refuse_unwritable(outputs, overwrite=overwrite, own=files_of(run))
    output.hint(f"{kept.name}: {request.model.name}, {request.size}, {request.preset.name}")
    output.hint(f"seed {', '.join(map(str, left))}: step {run.done} of {request.preset.sampling.steps} is done")

    # 2. The rest.
    video_output.make_videos(request, output, run)
