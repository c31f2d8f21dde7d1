"""From latents to a video file: the end of the main path, and all of `grat decode`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import GratError, Interrupted, OutOfMemory
from grat_cli.files import outputs
from grat_cli.files.videos import write_video
from grat_cli.generation import report
from grat_cli.generation.frames import FrameCheck, checked_frames
from grat_cli.generation.request import Progress
from grat_cli.generation.timing import Phases
from grat_cli.generation.video_request import VideoRequest
from grat_cli.generation.video_run import LATENTS_ENDING, VideoRun
from grat_cli.models.devices import (
    choose_device,
    choose_dtype,
    forget_peak_memory,
    is_out_of_memory,
    peak_memory,
    wait_for,
)
from grat_cli.models.loading import load_autoencoder

if TYPE_CHECKING:
    import torch

SMALLEST_TILE, OWN_TILE = 64, 256  # side in pixels; the latter is diffusers' own


@dataclass(frozen=True)
class MadeVideo:
    """A video that was written, and the report that lies beside it."""

    path: Path
    report: dict[str, Any]


def decode_run(
    run: VideoRun,
    kept: Path,
    request: VideoRequest,
    output: Path,
    progress: Progress,
    tile: int | None = None,
    command: str = "",
) -> MadeVideo:
    """Makes the video of latents; of the model only the autoencoder is loaded.

    Args:
        run: with all of its steps done.
        kept: the file of its latents.
        request: model, device, and how to write the video.
        output: where.
        progress: told how it goes on.
        tile: side in pixels of the tiles that are decoded one by one, None for the autoencoder's own.
        command: the command line that asks for it, where it is not that of the run; for the report.

    Raises:
        BadInput, ModelUnavailable, OutOfMemory, NumericalFailure, Interrupted: as for `finish_video`.
    """
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    phases = phases_of(run, device)
    with kept_latents(kept, request, output, progress, tile):
        progress.phase("load")
        with phases("load"):
            autoencoder = load_autoencoder(request.model, device=device, dtype=dtype, base=request.base).vae
        use_tiles(autoencoder, tile)
        if command:
            run = replace(run, report={**run.report, **_decoded(request, tile, command)})
        return finish_video(autoencoder, device, run, request, output, phases, progress)


def _decoded(request: VideoRequest, tile: int | None, command: str) -> dict[str, Any]:
    """What a report says of a video that was not decoded by the run itself."""
    return {
        "fps": request.fps,
        "seconds": round(request.frames / request.fps, 3),
        "format": request.format,
        "crf": request.crf,
        "decoded": {
            "command": command,
            "model": request.model.source,
            "device": request.device,
            "dtype": request.dtype,
            "tile": tile,
        },
    }


def finish_video(
    autoencoder: Any,
    device: torch.device,
    run: VideoRun,
    request: VideoRequest,
    output: Path,
    phases: Phases,
    progress: Progress,
) -> MadeVideo:
    """Decodes latents, writes the video and its report.

    Args:
        autoencoder: of the pipeline.
        device: where it runs.
        run: with all of its steps done.
        request: how to write the video.
        output: where.
        phases: of the run so far.
        progress: told how it goes on.

    Raises:
        NumericalFailure: if the frames have NaN or are all of one colour.
        BadInput: if the video cannot be written.
    """
    progress.phase("decode")
    with phases("decode"):
        assert run.latents is not None, "a run whose steps are done has latents"
        pixels = decode(autoencoder, run.latents.to(device))
    progress.phase("encode")
    with phases("encode"):
        check = FrameCheck()
        write_video(
            checked_frames([pixels], check),
            output,
            fps=request.fps,
            crf=request.crf,
            format=request.format,
            provenance=report.provenance(run.report) if request.metadata else None,
        )
    for note in check.finish():
        progress.note(note)
    made = report.measured(run.report, phases.phases_ms, phases.memory_bytes)
    outputs.write_json(made, outputs.report_path(output))
    return MadeVideo(output, made)


def phases_of(run: VideoRun, device: torch.device) -> Phases:
    """Phases that add to those of a run that is taken up."""
    phases = Phases(lambda: wait_for(device), lambda: forget_peak_memory(device), lambda: peak_memory(device)[0])
    phases.phases_ms, phases.memory_bytes = dict(run.phases_ms), dict(run.memory_bytes)
    return phases


def use_tiles(autoencoder: Any, side: int | None = None) -> None:
    """Lets an autoencoder decode in overlapping tiles, a few frames at a time, which is what makes large videos fit.

    Args:
        autoencoder: an `AutoencoderKLHunyuanVideo`.
        side: of a tile in pixels, None for its own 256. Videos no larger than a tile are decoded whole.
    """
    if side is None:
        autoencoder.enable_tiling()
        return
    # A quarter of each tile overlaps with the next, as with the autoencoder's own.
    unit = autoencoder.spatial_compression_ratio
    stride = max(unit, side * 3 // 4 // unit * unit)
    autoencoder.enable_tiling(
        tile_sample_min_height=side,
        tile_sample_min_width=side,
        tile_sample_stride_height=stride,
        tile_sample_stride_width=stride,
    )


def decode(autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pixels `[1, 3, frames, height, width]` from about -1 to 1, as at the end of the pipeline."""
    import torch

    with torch.no_grad():
        scaled = latents.to(autoencoder.dtype) / autoencoder.config.scaling_factor
        return autoencoder.decode(scaled, return_dict=False)[0]


@contextmanager
def kept_latents(
    kept: Path | None, request: VideoRequest, output: Path, progress: Progress, tile: int | None = None
) -> Iterator[None]:
    """Makes whatever goes wrong between denoising and the end say how to go on from what is kept.

    Args:
        kept: latents, or a checkpoint where they could not be written, or None where nothing could.
        request: what is made.
        output: where.
        progress: told where an unforeseen error passes.
        tile: side in pixels of the tiles in use, None for the autoencoder's own.
    """
    try:
        yield
    except KeyboardInterrupt:
        if kept is None:
            raise
        raise Interrupted(f"interrupted; go on with {command_for('resume', kept)}") from None
    except Exception as error:
        if kept is None:
            advice = ""
        elif kept.name.endswith(LATENTS_ENDING):
            advice = f"its latents are kept: go on with {command_for('decode', kept)}"
            if kept.parent != output.parent:
                advice += f" --out {shlex.quote(str(output))}"
        else:
            advice = f"its last checkpoint is kept: go on with {command_for('resume', kept)}"
        if is_out_of_memory(error):
            if advice:
                advice = f"\n{advice} --tile {max(SMALLEST_TILE, (tile or OWN_TILE) // 2)}"
            raise OutOfMemory(
                f"too little memory to decode {request.size} with {request.model.name}{advice}"
            ) from error
        if not advice:
            raise
        if isinstance(error, GratError):
            raise type(error)(f"{'; '.join(str(error).splitlines())}\n{advice}") from error
        progress.note(advice)
        raise


def command_for(name: str, path: Path) -> str:
    """A command line that goes on from a file."""
    return f"grat {name} {shlex.quote(str(path))}"
