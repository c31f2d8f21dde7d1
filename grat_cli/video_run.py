"""How far one video has got: kept in a file while it is denoised and until it is written, and taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput
from grat_cli.latents_file import latents_path, read_latents, write_latents
from grat_cli.run_checkpoint import checkpoint_path, read_checkpoint, write_checkpoint
from grat_cli.timing import StepTiming
from grat_cli.video_request import VideoRequest, request_data, request_from_data

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class VideoRun:
    """The state of one video between two denoising steps, or between denoising and decoding.

    Attributes:
        seed: of the video.
        latents: `[1, C, T, H, W]` after the steps that are done; None before the first.
        steps: timing of the steps that are done.
        phases_ms: time spent so far.
        memory_bytes: peak memory of each phase so far.
        random_state: of torch's generators, `cpu` and the device's, as bytes.
        report: what there is to report so far; empty before the first step.
    """

    seed: int
    latents: torch.Tensor | None = None
    steps: tuple[StepTiming, ...] = ()
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    random_state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Denoising steps that are done."""
        return len(self.steps)

    def refuse_other_weights(self, revision: str | None) -> None:
        """Raises BadInput if the run was begun with other weights than those of `revision`."""
        begun_with = self.report.get("model", {}).get("revision", revision)
        if begun_with != revision:
            raise BadInput(
                f"the run was begun with revision {begun_with} of the model, and {revision} is here: "
                "its result would be another; start the run anew"
            )


def report_so_far(run: VideoRun, request: VideoRequest) -> dict[str, Any]:
    """What a checkpoint or latents say of themselves: the report, and the request under `request`."""
    return {**run.report, "request": request_data(request)}


def write_run(run: VideoRun, request: VideoRequest, output: Path) -> Path:
    """Keeps a run beside its output: as latents where all steps are done, else as a checkpoint.

    Raises:
        BadInput: if the file cannot be written.
    """
    assert run.latents is not None, "nothing is done yet"
    data = report_so_far(run, request)
    if run.done == request.preset.sampling.steps:
        path = latents_path(output)
        write_latents(run.latents, path, data)
    else:
        path = checkpoint_path(output)
        write_checkpoint(run.latents, run.random_state, path, data)
    return path


def find_run(path: Path) -> Path:
    """The file to go on from: `path` itself, or what lies beside the output of that name.

    Raises:
        BadInput: if there is none.
    """
    if path.name.endswith((".checkpoint.safetensors", ".latents.safetensors")):
        output = path.with_name(path.name.removesuffix(".safetensors").rpartition(".")[0])
    else:
        output = path
    # Latents come after the checkpoint, which is removed once they are written.
    for candidate in (path, latents_path(output), checkpoint_path(output)):
        if candidate.is_file() and candidate.suffix == ".safetensors":
            return candidate
    raise BadInput(f"there is no checkpoint or latents of {path}: nothing to go on with")


def read_run(path: Path) -> tuple[VideoRun, VideoRequest]:
    """A run that was kept, and what was asked of it.

    Raises:
        BadInput: if it cannot be read, or is not whole.
    """
    if path.name.endswith(".latents.safetensors"):
        latents, data = read_latents(path)
        random_state: dict[str, torch.Tensor] = {}
    else:
        latents, random_state, data = read_checkpoint(path)
    try:
        request = request_from_data(data["request"], path.parent)
        report = {name: value for name, value in data.items() if name != "request"}
        run = VideoRun(
            seed=report["seed"],
            latents=latents,
            steps=tuple(StepTiming(**step) for step in report["steps"]),
            phases_ms=report["phases"],
            memory_bytes=report["memory"],
            random_state=random_state,
            report=report,
        )
        if run.seed not in request.seeds or not 0 < run.done <= request.preset.sampling.steps:
            raise ValueError("the report and the request contradict each other")
    except (KeyError, TypeError, ValueError, BadInput) as error:
        raise BadInput(f"{path} cannot be gone on with: it is damaged, or of another version of grat") from error
    return run, request
