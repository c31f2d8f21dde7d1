"""How far one video has got: kept in a file while it is denoised and until it is written, and taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from grat_cli.errors import BadInput
from grat_cli.files.checkpoint import CheckpointStore
from grat_cli.files.latents import load_latents, save_latents
from grat_cli.files.outputs import checkpoint_path, latents_path, report_path
from grat_cli.files.tensors import read_about
from grat_cli.files.whole import discard_leftovers, remove
from grat_cli.generation.report import SCHEMA
from grat_cli.generation.timing import StepTiming
from grat_cli.generation.video_request import MOST_STEPS, Seed, VideoRequest, request_data, request_from_data, stored_as

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
        kept: the file that it was taken up from; None of one that is begun here.
    """

    seed: int
    latents: torch.Tensor | None = None
    steps: tuple[StepTiming, ...] = ()
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    random_state: torch.Tensor | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    guard: Mapping[str, Any] | None = None
    kept: Path | None = None

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
        save_latents(path, run.latents, about, overwrite=request.overwrite)
        CheckpointStore(checkpoint_path(output)).remove()  # they have all that it had
    else:
        path = checkpoint_path(output)
        steps = [asdict(step) for step in run.steps]
        about["guard_state"] = run.guard
        CheckpointStore(path).write(run.done, run.latents, run.random_state, about, steps, overwrite=request.overwrite)
    return path


def discard_run(output: Path, *, latents: bool = True, overwrite: bool = False) -> None:
    """Removes what was kept of a run beside its output, or begun and left.

    Args:
        output: of the run.
        latents: whether they go too.
        overwrite: whether that of another process goes too.
    """
    remove(checkpoint_path(output), overwrite=overwrite)
    for begun in (output, latents_path(output), report_path(output)):
        discard_leftovers(begun)
    if latents:
        remove(latents_path(output), overwrite=overwrite)


def files_of(run: VideoRun) -> list[Path]:
    """The file that a run was taken up from, and the checkpoint beside its latents that a killed process left of it."""
    if run.kept is None:
        return []
    checkpoint = checkpoint_path(run.kept.with_name(run.kept.name.removesuffix(LATENTS_ENDING)))
    try:
        both = [read_about(path) or {} for path in (run.kept, checkpoint)]
        # A run that has been taken up keeps only the seeds that are left.
        asked = [{**about["request"], "seeds": about["seed"]} for about in both]
    except (BadInput, KeyError, TypeError):
        return [run.kept]
    return [run.kept, checkpoint] if asked[0] == asked[1] else [run.kept]


def place_of(kept: Path) -> Path:
    """Where the video of a file of a run goes: beside it, by its name; without a suffix.

    Raises:
        BadInput: if its name has nothing before the ending.
    """
    name = kept.name.removesuffix(LATENTS_ENDING).removesuffix(CHECKPOINT_ENDING)
    if not name.strip("."):
        raise BadInput(f"{kept} has no name before its ending: rename it")
    return kept.with_name(name)


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


class _StoredDevice(BaseModel):
    model_config = ConfigDict(strict=True)

    threads: Annotated[int, Field(ge=1, le=4096)] | None


class _StoredWeights(BaseModel):
    model_config = ConfigDict(strict=True)

    revision: Annotated[str, Field(max_length=200)] | None


class _StoredRun(BaseModel):
    """What a file says of a run besides its request."""

    model_config = ConfigDict(strict=True)

    seed: Seed
    steps: Annotated[tuple[StepTiming, ...], Field(min_length=1, max_length=MOST_STEPS)]
    phases: dict[Annotated[str, Field(max_length=80)], Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    memory: dict[Annotated[str, Field(max_length=80)], Annotated[int, Field(ge=0)]]
    peak_memory_kind: Annotated[str, Field(max_length=200)]
    device: _StoredDevice
    model: _StoredWeights
    request: dict[str, Any]
    guard_state: dict[str, Any] | None = None


def read_run(path: Path, model: str | None = None) -> tuple[VideoRun, VideoRequest]:
    """A run that was kept, and what was asked of it; its outputs go beside the file, by its name.

    Args:
        path: of a checkpoint or of latents.
        model: in place of the stored one, as typed.

    Raises:
        BadInput: if it cannot be read, or is not whole.
        ModelUnavailable: if its model is not here.
    """
    if path.name.endswith(LATENTS_ENDING):
        file = load_latents(path)
        latents, random_state, about = file.latents, None, file.about
    else:
        checkpoint = CheckpointStore(path).read()
        latents, random_state, about = checkpoint.latents, checkpoint.generator_state, checkpoint.about
    place = place_of(path)
    try:
        stored = stored_as(_StoredRun, about)
        request = request_from_data(stored.request, place, stored.seed, model)
        _require_fit(latents, len(stored.steps), request)
    except (ValueError, BadInput) as error:
        reason = str(error) if isinstance(error, BadInput) else f"it is damaged, or of another version of grat: {error}"
        raise BadInput(f"{path} cannot be gone on with: {reason}") from error
    report = {name: value for name, value in about.items() if name not in _OF_THE_FILE}
    run = VideoRun(
        seed=stored.seed,
        latents=latents,
        steps=stored.steps,
        phases_ms=stored.phases,
        memory_bytes=stored.memory,
        random_state=random_state,
        report={**report, "schema": SCHEMA},
        guard=stored.guard_state,
        kept=path,
    )
    return run, request


def _require_fit(latents: torch.Tensor, done: int, request: VideoRequest) -> None:
    """Raises ValueError unless latents are of a request's shape, and no more steps are done than it has."""
    rows, columns = latents.shape[3:] if latents.ndim == 5 else (0, 0)
    if not rows or latents.shape[2] != request.latent_frames or rows * request.width != columns * request.height:
        raise ValueError(f"its latents are {list(latents.shape)}, of {request.size} they are not")
    if done > request.preset.sampling.steps:
        raise ValueError(f"{done} steps are done of {request.preset.sampling.steps}")
