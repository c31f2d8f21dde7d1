"""From latents to a file: decoding, writing and reporting, with the latents kept until the output is there."""

from __future__ import annotations

import contextlib
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, CannotWrite, GratError, Interrupted, OutOfMemory
from grat_cli.files import formats, outputs, whole
from grat_cli.generation import report
from grat_cli.generation.checkpoint import LATENTS_ENDING, Run, discard_run, write_run
from grat_cli.generation.frames import FrameCheck, checked_frames
from grat_cli.generation.request import Request, WritingProgress
from grat_cli.generation.stored import told_model
from grat_cli.generation.timing import Phases, phase_of
from grat_cli.models.devices import (
    choose_device,
    choose_dtype,
    is_out_of_memory,
)
from grat_cli.models.loading import load_autoencoder

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

from grat_cli.generation.machine import phases_of

SMALLEST_TILE = 64  # side in pixels


@dataclass(frozen=True)
class Made:
    """An output that was written, and the report that lies beside it."""

    path: Path
    report: dict[str, Any]


def decode_run(
    run: Run, request: Request, output: Path, progress: WritingProgress, tile: int | None = None, command: str = ""
) -> Made:
    """Makes the output of latents; of the model only the autoencoder is loaded.

    Args:
        run: with all of its steps done, taken up from a file.
        request: model, device, and how to write the output.
        output: where.
        progress: told how it goes on.
        tile: side in pixels of the tiles that are decoded one by one, None for the autoencoder's own.
        command: the command line that asks for it, where it is not that of the run; for the report.

    Raises:
        BadInput, ModelUnavailable, OutOfMemory, NumericalFailure, Interrupted: as for `generate`.
    """
    device = choose_device(request.device)
    phases = phases_of(device, run)
    with kept_latents(run.kept or outputs.latents_path(output), request, output, progress, tile):
        progress.phase("load")
        with phases("load"):
            pipe = load_autoencoder(
                request.model, device=device, dtype=choose_dtype(request.dtype, device), weights=request.weights
            )
        request.family.prepare(pipe, tile)
        if command:
            run = replace(run, report={**run.report, **_decoded(run, request, tile, command)})
        pixels = decoded(pipe, device, run, request, phases, progress, tile)
        return written(pipe, pixels, run, request, output, phases, progress)


def written_already(run: Run, request: Request, output: Path) -> Made | None:
    """The output of latents that are still there because the process that wrote it was killed before it tidied up.

    Args:
        run: that was taken up.
        request: how its output was to be written.
        output: where.

    Returns:
        None where there is no output, or another one, or it is not whole, or it does not say what made it.
    """
    if not (run.finished and request.metadata):
        return None
    own, beside = report.provenance(run.report), outputs.report_path(output)
    try:
        if outputs.embedded_provenance(output) != own:
            return None
        formats.require_whole(output, request.format)
        if beside.is_file():
            made = outputs.read_provenance(beside)
            return Made(output, made) if report.provenance(made) == own else None
    except BadInput:
        return None
    made = report.measured(run.report, run.steps, run.stages, run.phases_ms, run.memory_bytes)
    outputs.write_json(made, beside)
    return Made(output, made)


def _decoded(run: Run, request: Request, tile: int | None, command: str) -> dict[str, Any]:
    """What a report says of an output that was not decoded by the run itself."""
    asked, of_video = run.report.get("asked"), {}
    if isinstance(asked, dict):
        asked = {"asked": {**asked, "format": request.format, "quality": request.quality}}
    if request.frames and request.fps:
        seconds = round(request.frames / request.fps, 3)
        of_video = {"fps": request.fps, "seconds": seconds, "format": request.format, "crf": request.quality}
    return {
        **(asked or {}),
        **of_video,
        "decoded": {
            "command": report.without_folders(command),
            "model": told_model(request.model)["source"],
            "device": request.device,
            "dtype": request.dtype,
            "tile": tile,
        },
    }


def decoded(
    pipe: Any,
    device: torch.device,
    run: Run,
    request: Request,
    phases: Phases,
    progress: WritingProgress,
    tile: int | None = None,
    ranks: ProcessGroup | None = None,
) -> torch.Tensor:
    """The pixels of latents, as `Family.decode` has them.

    Args:
        pipe: with an autoencoder.
        device: where it runs.
        run: with all of its steps done.
        request: of the output.
        phases: of the run so far.
        progress: told how it goes on.
        tile: side in pixels of the tiles that are decoded one by one, None for the family's own.
        ranks: that share the tiles; None for this process alone.
    """
    # 6. Decode.
    progress.phase("decode")
    with phases(phase_of("decode", run.stage)):
        assert run.latents is not None, "a run whose steps are done has latents"
        return request.family.decode(pipe, run.latents.to(device), tile, ranks)


def written(
    pipe: Any,
    pixels: torch.Tensor,
    run: Run,
    request: Request,
    output: Path,
    phases: Phases,
    progress: WritingProgress,
) -> Made:
    """Writes an output and its report.

    Args:
        pipe: with the autoencoder.
        pixels: of `decoded`.
        run: with all of its steps done.
        request: how to write the output.
        output: where.
        phases: of the run so far.
        progress: told how it goes on.

    Raises:
        NumericalFailure: if there are NaN, or all is of one colour.
        CannotWrite: if the output cannot be written.
    """
    # 7. Write.
    progress.phase("save")
    check = FrameCheck(pipe.vae.dtype)
    with phases("save"):
        inside = report.provenance(run.report) if request.metadata else None
        whole = formats.write_output(
            checked_frames([pixels], check),
            output,
            request.format,
            fps=request.fps,
            quality=request.quality,
            provenance=inside,
            overwrite=request.overwrite,
            written=progress.written,
        )
    if inside and not whole:
        progress.note(f"{output} has no room for how it was made: that is in {outputs.report_path(output).name}")
    for note in check.finish():
        progress.note(note)

    # 8. Report.
    made = report.measured(run.report, run.steps, run.stages, phases.phases_ms, phases.memory_bytes)
    outputs.write_json(made, outputs.report_path(output), overwrite=request.overwrite)
    return Made(output, made)


def keep_latents(run: Run, request: Request, output: Path, progress: WritingProgress) -> Path | None:
    """Writes the latents of a run beside its output, in place of the checkpoint.

    Where there is no room, they go to a folder of temporary files, and that is said.

    Returns:
        The file to go on from: the latents, the checkpoint where there is room for them nowhere, or None.
    """
    try:
        return write_run(run, request, output)
    except CannotWrite as error:
        reason = str(error)
    folder = Path(tempfile.mkdtemp(prefix="grat-"))
    try:
        kept = write_run(run, request, folder / output.name)
    except CannotWrite:
        folder.rmdir()
        progress.note(f"{reason}: its latents are not kept until the output is written")
        checkpoint = outputs.checkpoint_path(output)
        return checkpoint if checkpoint.is_file() else None
    progress.note(f"{reason}: until the output is written, its latents are in {kept}")
    return kept


@contextmanager
def kept_latents(
    kept: Path | None, request: Request, output: Path, progress: WritingProgress, tile: int | None = None
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
                advice = f"\n{advice} --tile {max(SMALLEST_TILE, (tile or request.family.tile) // 2)}"
            raise OutOfMemory(
                f"too little memory to decode {request.size} with {request.model.name}{advice}"
            ) from error
        if not advice:
            raise
        if isinstance(error, GratError):
            raise type(error)(f"{'; '.join(str(error).splitlines())}\n{advice}") from error
        progress.note(advice)
        raise


def tidy_up(run: Run, request: Request, output: Path, kept: Path | None) -> None:
    """Removes what was kept until the output was written, but latents that are asked for."""
    discard_run(output, latents=not request.save_latents)
    if request.save_latents and not outputs.latents_path(output).is_file():  # there may be room now
        write_run(run, request, output)
    if kept is not None and kept.parent != output.parent:  # in a folder of temporary files
        whole.remove(kept)
        with contextlib.suppress(OSError):
            kept.parent.rmdir()


def command_for(name: str, path: Path) -> str:
    """A command line that goes on from a file."""
    return f"grat {name} {shlex.quote(str(path))}"
