"""`grat resume`: goes on with a picture or video that was interrupted."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, only


def resume(
    context: typer.Context,
    file: Annotated[Path, argument("FILE", "The checkpoint, or the output that it is to become.")],
    *,
    out: Path | None = options.OUT_BESIDE,
    overwrite: bool = options.OVERWRITE,
    model: Annotated[options.ModelOptions, only("allow_pickle")],
    ranks: options.ParallelOptions,
    terminal: options.TerminalOptions,
) -> None:
    """Go on with an output that was interrupted, to the same result; it lies beside FILE, by its name, or at --out."""
    from grat_cli.commands import making
    from grat_cli.commands.ranks import leave_to_others
    from grat_cli.files import outputs, whole
    from grat_cli.files.formats import SUFFIXES
    from grat_cli.generation.checkpoint import files_of, find_run, read_run
    from grat_cli.generation.finishing import written_already
    from grat_cli.generation.sharing import of_launcher

    leave_to_others(context, ranks)
    output = terminal.output()

    # 1. Where it stands.
    kept = find_run(file)
    run, request = read_run(kept)
    left = request.seeds[request.seeds.index(run.seed) :]
    paths = list(request.outputs[-len(left) :])
    if out is not None:
        paths = outputs.output_paths(out, [path.name for path in paths], left, SUFFIXES[request.format])
    if of_launcher(os.environ):  # each rank has a device of its own
        request = replace(request, device=request.device.partition(":")[0])
    weights = replace(request.weights, allow_pickle=model.allow_pickle)
    request = replace(request, seeds=left, outputs=tuple(paths), overwrite=overwrite, weights=weights)
    there = written_already(run, request, paths[0])
    if request.preview_every and out is None:
        whole.adopt(outputs.preview_path(paths[0]))  # of a process that was killed: others remove theirs
    making.refuse_unwritable(
        paths[1:] if there else paths, overwrite=overwrite, own=files_of(run), previews=request.preview_every > 0
    )
    output.hint(f"{kept.name}: {request.model.name}, {request.size}, {request.preset.name}")
    output.hint(f"seed {', '.join(map(str, left))}: step {run.done} of {run.total} is done")
    if request.preset.schedule.over_steps and run.done_in_stage and not run.finished:
        output.hint(
            "attention that is carried over steps begins with a reference: outputs may differ slightly from those of "
            "an unbroken run"
        )
    if there:
        tidied = "" if request.save_latents else ": what was kept of it is removed"
        output.hint(f"{there.path} is there, whole{tidied}")

    # 2. The rest.
    making.make(request, output, ranks, run)
