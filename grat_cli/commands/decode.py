"""`grat decode`: a video from latents."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from grat_cli import options
from grat_cli.output import Output


def decode(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Latents that grat video kept.", show_default=False)
    ],
    tile: options.Tile = None,
    fps: options.Fps = None,
    model: options.VideoModelName = None,
    base: options.Base = None,
    device: options.DeviceName | None = None,
    dtype: options.Dtype | None = None,
    out: options.Out = None,
    format: options.Format = None,
    crf: options.Crf = None,
    overwrite: options.Overwrite = False,
    no_metadata: options.NoMetadata = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make the video of latents that were kept: after running out of memory, or in another format."""
