"""`grat decode`: a video from latents."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.console.output import Output


def decode(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Latents that grat video kept, or the video that lies beside them.", show_default=False
        ),
    ],
    tile: options.Tile = None,
    fps: options.Fps = None,
    model: options.DecodeModelName = None,
    base: options.Base = None,
    device: options.DecodeDevice = None,
    dtype: options.DecodeDtype = None,
    out: options.Out = None,
    format: options.Format = None,
    crf: options.Crf = None,
    overwrite: options.Overwrite = False,
    no_metadata: options.NoMetadata = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make a video from latents that were kept: after memory ran out, or in another format."""
    from grat_cli.commands import video_output
    from grat_cli.errors import BadInput
    from grat_cli.files import outputs as media
    from grat_cli.files.videos import SUFFIXES, choose_video_format, require_encodable
    from grat_cli.generation.selection import DTYPES, require_choice, require_device
    from grat_cli.generation.video_decoding import decode_run
    from grat_cli.generation.video_run import LATENTS_ENDING, find_run, read_run
    from grat_cli.models.catalogue import choose_model

    output = Output(as_json=as_json, quiet=quiet)

    # 1. What can be refused without reading the latents.
    if device is not None:
        require_device(device)
    if dtype is not None:
        require_choice("--dtype", dtype, DTYPES)
    if tile is not None and (tile < 64 or tile % 16):
        raise BadInput(f"--tile {tile}: expected a multiple of 16 from 64 up")

    # 2. What made them, with what is to be different now.
    kept = find_run(file)
    run, request = read_run(kept)
    if run.done < request.preset.sampling.steps:
        raise BadInput(
            f"{kept} has done {run.done} of {request.preset.sampling.steps} steps: grat resume does the rest"
        )
    named = format is not None or (out is not None and out.suffix and not out.is_dir())
    chosen_format = choose_video_format(out, format) if named else request.format
    chosen_crf = crf if crf is not None or chosen_format != request.format else request.crf
    request = replace(
        request,
        model=request.model if model is None else choose_model(model, medium="video"),
        base=request.base if base is None else base,
        device=request.device if device is None else device,
        dtype=request.dtype if dtype is None else dtype,
        fps=request.fps if fps is None else fps,
        format=chosen_format,
        crf=chosen_crf,
        metadata=request.metadata and not no_metadata,
    )
    require_encodable(request.format, fps=request.fps, crf=request.crf)

    # 3. Where the video goes: without --out, where it was to go in the first place.
    asked = request.outputs[request.seeds.index(run.seed)]
    name = media.latents_path(asked).name.removesuffix(LATENTS_ENDING) + SUFFIXES[request.format]
    path = (
        kept.with_name(name)
        if out is None
        else media.output_paths(out, [name], [run.seed], SUFFIXES[request.format])[0]
    )
    media.refuse_unwritable([path, media.report_path(path)], overwrite=overwrite)

    # 4. Make it.
    output.hint(f"{kept.name}: {request.model.name}, {request.size}, seed {run.seed}")
    command = shlex.join(["grat", *(context.find_root().obj or ())])
    with output.progress() as progress:
        video = decode_run(run, kept, request, path, progress, tile, command)
        output.line(str(video.path))
    video_output.show_videos([video], output)
