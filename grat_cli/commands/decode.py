"""`grat decode`: a video from latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, only, option


def decode(
    context: typer.Context,
    file: Annotated[Path, argument("FILE", "Latents that grat video kept, or the video that lies beside them.")],
    *,
    tile: int | None = option(
        "PIXELS",
        "Side of the tiles that are decoded one by one; smaller ones take less memory. Default: 256.",
        options.MODEL,
    ),
    extent: Annotated[options.SizeOptions, only("fps")],
    model: Annotated[
        options.ModelOptions,
        only(
            "base",
            model=option(
                "NAME",
                "The model whose autoencoder decodes. Default: the one that made the latents.",
                options.MODEL,
                complete=options.complete_video_model,
            ),
            device=option("NAME", "auto, cpu, cuda, cuda:1 or mps. Default: as for the latents.", options.MODEL),
            dtype=option("NAME", "auto, float32, bfloat16 or float16. Default: as for the latents.", options.MODEL),
        ),
    ],
    out: Path | None = options.OUT_BESIDE,
    format: str | None = options.VIDEO_FORMAT,
    crf: int | None = options.CRF,
    overwrite: bool = options.OVERWRITE,
    no_metadata: bool = options.NO_METADATA,
    terminal: options.TerminalOptions,
) -> None:
    """Make a video from latents that were kept: after memory ran out, or in another format."""
    from grat_cli.commands import video_output
    from grat_cli.errors import BadInput
    from grat_cli.files import outputs
    from grat_cli.files.videos import SUFFIXES, choose_video_format, require_encodable
    from grat_cli.files.whole import claimed
    from grat_cli.generation.video_decoding import decode_run
    from grat_cli.generation.video_run import find_run, place_of, read_run

    output = terminal.output()

    # 1. What can be refused without reading the latents.
    model.check()
    if tile is not None and (tile < 64 or tile % 16):
        raise BadInput(f"--tile {tile}: expected a multiple of 16 from 64 up")

    # 2. What made them, with what is to be different now.
    kept = find_run(file)
    run, request = read_run(kept, model.model)
    if run.done < request.preset.sampling.steps:
        raise BadInput(
            f"{kept} has done {run.done} of {request.preset.sampling.steps} steps: grat resume does the rest"
        )
    named = format is not None or (out is not None and out.suffix and not out.is_dir())
    chosen_format = choose_video_format(out, format) if named else request.format
    chosen_crf = crf if crf is not None or chosen_format != request.format else request.crf
    request = replace(
        request,
        base=request.base if model.base is None else model.base,
        device=model.device or request.device,
        dtype=model.dtype or request.dtype,
        fps=request.fps if extent.fps is None else extent.fps,
        format=chosen_format,
        crf=chosen_crf,
        metadata=request.metadata and not no_metadata,
        overwrite=overwrite,
    )
    require_encodable(request.format, fps=request.fps, crf=request.crf)

    # 3. Where the video goes.
    place, suffix = place_of(kept), SUFFIXES[request.format]
    path = place.with_name(place.name + suffix)
    if out is not None:
        (path,) = outputs.output_paths(out, [path.name], [run.seed], suffix)
    outputs.refuse_unwritable([path, outputs.report_path(path)], overwrite=overwrite)

    # 4. Make it.
    output.hint(f"{kept.name}: {request.model.name}, {request.size}, seed {run.seed}")
    command = options.command_line(context)
    with claimed([path]), output.progress() as progress:
        video = decode_run(run, kept, request, path, progress, tile, command)
        output.line(str(video.path))
    video_output.show_videos([video], output)
