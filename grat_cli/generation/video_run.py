"""How far one video has got: kept in a file while it is denoised and until it is written, and taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput
from grat_cli.files.checkpoint import CheckpointStore
from grat_cli.files.latents import load_latents, save_latents
from grat_cli.files.outputs import checkpoint_path, latents_path, report_path
from grat_cli.files.whole import discard_leftovers
from grat_cli.generation.report import SCHEMA
from grat_cli.generation.timing import StepTiming
from grat_cli.generation.video_request import VideoRequest, request_data, request_from_data

if TYPE_CHECKING:
    import torch

# What files of runs say besides the report.
_OF_THE_FILE = ("request", "steps_done", "step_timings", "guard_state")
CHECKPOINT_ENDING, LATENTS_ENDING = ".checkpoint.safetensors", ".latents.safetensors"


@dataclass(frozen=True, kw_only=True)
class VideoRun:
    """The state of one video between two denoising steps, or between denoising and decoding.

    Attributes:
        seed: of the video.
        latents: `[1, C, T, H, W]` after the steps that are done; None before the first.
        steps: timing of the steps that are done.
        phases_ms: time spent so far.
        memory_bytes: peak memory of each phase so far.
        random_state: of the device's generator, as bytes, for schedulers that draw noise at every step; None before
            the first step.
        report: what there is to report so far; empty before the first step.
        guard: of `guard.RecallGuard.state`; None without a guard, and before the first step.
    """

    seed: int
    latents: torch.Tensor | None = None
    steps: tuple[StepTiming, ...] = ()
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    random_state: torch.Tensor | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    guard: Mapping[str, Any] | None = None

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


def write_run(run: VideoRun, request: VideoRequest, output: Path) -> Path:
    """Keeps a run beside its output: as a checkpoint, or where all steps are done as latents in its place.

    Raises:
        CannotWrite: if there is no room; what was kept before is still there.
    """
    assert run.latents is not None, "nothing is done yet"
    about = {**run.report, "request": request_data(request)}
    if run.done == request.preset.sampling.steps:
        path = latents_path(output)
        save_latents(path, run.latents, about)
        CheckpointStore(checkpoint_path(output)).remove()  # they have all that it had
    else:
        path = checkpoint_path(output)
        steps = [asdict(step) for step in run.steps]
        about["guard_state"] = run.guard
        CheckpointStore(path).write(run.done, run.latents, run.random_state, about, steps)
    return path


def discard_run(output: Path, *, latents: bool = True) -> None:
    """Removes what was kept of a run beside its output, or begun and left; the latents only if that is said."""
    CheckpointStore(checkpoint_path(output)).remove()
    for begun in (output, latents_path(output), report_path(output)):
        discard_leftovers(begun)
    if latents:
        latents_path(output).unlink(missing_ok=True)


def find_run(path: Path) -> Path:
    """The file to go on from: `path` itself, or what lies beside the output of that name.

    Raises:
        BadInput: if there is none.
    """
    ending = next((ending for ending in (CHECKPOINT_ENDING, LATENTS_ENDING) if path.name.endswith(ending)), "")
    if ending and path.is_file():
        return path
    # A run whose checkpoint is gone may have got as far as its latents.
    output = path.with_name(path.name.removesuffix(ending))
    for kept in (latents_path(output), checkpoint_path(output)):
        if kept.is_file():
            return kept
    raise BadInput(f"there is no checkpoint and there are no latents of {path}: there is nothing to go on with")


def read_run(path: Path) -> tuple[VideoRun, VideoRequest]:
    """A run that was kept, and what was asked of it.

    Raises:
        BadInput: if it cannot be read, or is not whole.
    """
    if path.name.endswith(LATENTS_ENDING):
        file = load_latents(path)
        latents, random_state, about = file.latents, None, file.about
    else:
        checkpoint = CheckpointStore(path).read()
        latents, random_state, about = checkpoint.latents, checkpoint.generator_state, checkpoint.about
    try:
        request = request_from_data(about["request"], path.parent)
        report: dict[str, Any] = {name: value for name, value in about.items() if name not in _OF_THE_FILE}
        report["schema"] = SCHEMA
        run = VideoRun(
            seed=report["seed"],
            latents=latents,
            steps=tuple(StepTiming(**step) for step in report["steps"]),
            phases_ms=report["phases"],
            memory_bytes=report["memory"],
            random_state=random_state,
            report=report,
            guard=about.get("guard_state"),
        )
        if run.seed not in request.seeds or not 0 < run.done <= request.preset.sampling.steps:
            raise ValueError("report and request contradict one another")
    except (KeyError, TypeError, ValueError, AttributeError, BadInput) as error:
        raise BadInput(f"{path} cannot be gone on with: it is damaged, or of another version of grat") from error
    return run, request
