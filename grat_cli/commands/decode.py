"""`grat decode`: a picture or video from latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, only, option


def decode(
    context: typer.Context,
    file: Annotated[Path, argument("FILE", "Latents that were kept, or the output that lies beside them.")],
    *,
    tile: int | None = option(
        "PIXELS",
        "Side of the tiles that are decoded one by one; smaller ones take less memory. Default: the model's own.",
        options.MODEL,
    ),
    extent: Annotated[options.SizeOptions, only("fps")],
    model: Annotated[
        options.ModelOptions,
        only(
            "base",
            "allow_pickle",
            model=option(
                "NAME",
                "The model whose autoencoder decodes. Default: the one that made the latents.",
                options.MODEL,
                complete=options.complete_any_model,
                is_place=True,
            ),
            device=option("NAME", "auto, cpu, cuda, cuda:1 or mps. Default: as for the latents.", options.MODEL),
            dtype=option("NAME", "auto, float32, bfloat16 or float16. Default: as for the latents.", options.MODEL),
        ),
    ],
    out: Path | None = options.OUT_BESIDE,
    format: str | None = option(
        "NAME", "As for grat image and grat video. Default: as --out ends, else as for the latents.", options.OUTPUT
    ),
    quality: int | None = options.QUALITY,
    crf: int | None = options.CRF,
    overwrite: bool = options.OVERWRITE,
    no_metadata: bool = options.NO_METADATA,
    terminal: options.TerminalOptions,
) -> None:
    """Make a picture or video from latents that were kept: after memory ran out, or in another format."""
    from grat_cli.commands import making
    from grat_cli.errors import BadInput
    from grat_cli.files import outputs
    from grat_cli.files.formats import choose_format, kept_format, require_writable
    from grat_cli.files.whole import claimed
    from grat_cli.generation.checkpoint import find_run, place_of, read_run
    from grat_cli.generation.finishing import decode_run

    output = terminal.output()

    # 1. What can be refused without reading the latents.
    model.check()
    if tile is not None and (tile < 64 or tile % 16):
        raise BadInput(f"--tile {tile}: expected a multiple of 16 from 64 up")

    # 2. What made them, with what is to be different now.
    kept = find_run(file)
    run, request = read_run(kept, model.model)
    if not run.finished:
        raise BadInput(f"{kept} has done {run.done} of {run.total} steps: grat resume does the rest")
    of_videos, of_pictures = {"--fps": extent.fps, "--crf": crf}, {"--quality": quality}
    for flag, value in (of_pictures if request.frames else of_videos).items():
        if value is not None:
            noun = "pictures" if request.frames else "videos"
            raise BadInput(f"{flag} is for {noun}, and {kept} is none of one: leave it out")
    chosen_format, suffix = choose_format(request.model.medium, out, kept_format(out, format, request.format))
    encoding = crf if quality is None else quality
    request = replace(
        request,
        weights=replace(
            request.weights,
            base=request.weights.base if model.base is None else model.base,
            allow_pickle=model.allow_pickle,
        ),
        device=model.device or request.device,
        dtype=model.dtype or request.dtype,
        fps=request.fps if extent.fps is None else extent.fps,
        format=chosen_format,
        quality=encoding if encoding is not None or chosen_format != request.format else request.quality,
        metadata=request.metadata and not no_metadata,
        overwrite=overwrite,
    )
    require_writable(request.format, request.width, request.height, fps=request.fps, quality=request.quality)

    # 3. Where the output goes.
    place = place_of(kept)
    path = place.with_name(place.name + suffix)
    if out is not None:
        (path,) = outputs.output_paths(out, [path.name], [run.seed], suffix)
    outputs.refuse_unwritable([path, outputs.report_path(path)], overwrite=overwrite)

    # 4. Make it.
    output.hint(f"{kept.name}: {request.model.name}, {request.size}, seed {run.seed}")
    with claimed([path]), output.progress() as progress:
        made = decode_run(run, request, path, progress, tile, options.command_line(context))
        output.file(made.path)
    making.show([made], request, output)
