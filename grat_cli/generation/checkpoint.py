"""How far one output has got: kept in a file while it is made and until it is written, and taken up again.

Between steps that is `NAME.checkpoint.safetensors`, afterwards `NAME.latents.safetensors`. What a file says is held to
what may be typed, and decides neither where an output goes nor what it may replace.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from grat_cli.attention.guard import GuardState
from grat_cli.attention.schedule import StepKind
from grat_cli.errors import BadInput, printable
from grat_cli.estimates.stages import Stage
from grat_cli.families.base import Pictures
from grat_cli.files import outputs, tensors, whole
from grat_cli.files.json_objects import validated
from grat_cli.generation.inputs import pictures_in, tensors_of
from grat_cli.generation.report import SCHEMA
from grat_cli.generation.request import Request
from grat_cli.generation.stage import stages_for
from grat_cli.generation.stored import request_data, request_from_data
from grat_cli.generation.timing import StepTiming
from grat_cli.generation.told import (
    MOST_STAGES,
    Bytes,
    Count,
    KeptReport,
    Name,
    Number,
    Phases,
    Ranges,
    Side,
    Time,
    ToldStage,
)
from grat_cli.models.resolution import Resolution
from grat_cli.models.weight_files import WeightFile
from grat_cli.presets import MOST_STEPS

if TYPE_CHECKING:
    import torch

_COUNTS = ("steps_done", "steps_total")  # of a file, for people
CHECKPOINT_ENDING, LATENTS_ENDING = ".checkpoint.safetensors", ".latents.safetensors"
_SCHEMAS = {
    CHECKPOINT_ENDING: ("grat.checkpoint/2", "a checkpoint"),
    LATENTS_ENDING: ("grat.latents/2", "a latents file"),
}
_HISTORY, _MOST_OF_HISTORY = "history.", 64  # what a name of such a tensor begins with; solvers go back a few steps
_CACHE, _MOST_OF_CACHE = "cache.", 100_000  # likewise of what a cache keeps
_LARGEST_LATENT = 1_000_000  # far beyond those of any model
_STATE_BYTES_CPU, _STATE_BYTES_CUDA, _TWISTER = 5056, 16, 624
_TENSORS = ("latents", "picture", "start", "noise_state", "random_state")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The state of one output between two denoising steps, or between denoising and decoding.

    Attributes:
        seed: of the output.
        total: denoising steps of all stages.
        stage: that is under way, counted from 0.
        latents: after the steps that are done, within a stage as the pipeline has them, after its last step spatial;
            None before the stage's first step.
        picture: latents `[1, C, h, w]` of the picture that the first stage started from; None for noise.
        start: likewise what a later stage started from; None in the first.
        noise_state: of the generator of the noise, as bytes; None before the first stage has begun.
        random_state: of the device's generator, as bytes, for schedulers that draw noise at every step.
        steps: timing of the steps that are done, of all stages.
        phases_ms: time spent so far, by `timing.phase_of`.
        memory_bytes: peak memory of each phase so far, likewise.
        report: what there is to report so far; empty before the first step.
        stages: what there is to report of the stages that are finished.
        guard: of `guard.RecallGuard.state`; None without a guard, and before the first step of a stage.
        history: what the scheduler remembers within a stage; of `families.resumption.remembered`.
        cache: what a cache keeps within a stage, of `cache_states.Snapshot.data`; None without one.
        is_keepable: whether there is all that the rest of the run depends on.
        start_size: width and height of the picture that the output redoes, or None.
        pictures: that the pipeline is given.
        kept: the file that it was taken up from; None of one that is begun here.
    """

    seed: int
    total: int
    stage: int = 0
    latents: torch.Tensor | None = None
    picture: torch.Tensor | None = None
    start: torch.Tensor | None = None
    noise_state: torch.Tensor | None = None
    random_state: torch.Tensor | None = None
    steps: tuple[StepTiming, ...] = ()
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Mapping[str, Any], ...] = ()
    guard: Mapping[str, Any] | None = None
    history: Mapping[str, torch.Tensor] = field(default_factory=dict)
    cache: tuple[Sequence[Mapping[str, Any]], Mapping[str, torch.Tensor]] | None = None
    is_keepable: bool = True
    start_size: tuple[int, int] | None = None
    pictures: Pictures = field(default_factory=Pictures)
    kept: Path | None = None

    @property
    def done(self) -> int:
        """Denoising steps that are done."""
        return len(self.steps)

    @property
    def done_in_stage(self) -> int:
        """Those of the stage under way."""
        return sum(step.stage == self.stage for step in self.steps)

    @property
    def finished(self) -> bool:
        """Whether nothing is left but to decode."""
        return self.done == self.total

    def refuse_other_weights(
        self, revision: str | None, files: Sequence[WeightFile] = (), loras: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Raises BadInput if the run was begun with other weights.

        Args:
            revision: of those that are here.
            files: that these were read from, but for those that the revision tells of.
            loras: that these have, of `lora.AppliedLora.told`.
        """
        here = {(file.part, file.fingerprint.sha256) for file in files}
        for file in self.report.get("model", {}).get("weights", ()):
            if (file["part"], file["sha256"]) not in here:
                raise BadInput(
                    f"the run was begun with another {printable(file['name'])} as {file['part']} than is here: "
                    "its result would be another; start the run anew"
                )
        begun_with = self.report.get("model", {}).get("revision", revision)
        if begun_with != revision:
            raise BadInput(
                f"the run was begun with revision {begun_with} of the model, and {revision} is here: "
                "its result would be another; start the run anew"
            )
        if not self.report:
            return
        then, now = (
            {(lora["name"], lora["sha256"]) for lora in told} for told in (self.report["model"].get("loras", ()), loras)
        )
        if then != now:
            name, _ = sorted(then ^ now)[0]
            raise BadInput(
                f"the run was begun with another LoRA {name} than is here now: its result would be another; get the "
                "one of then back, or start the run anew"
            )


def write_run(run: Run, request: Request, output: Path) -> Path:
    """Keeps a run beside its output: as a checkpoint, or where all steps are done as latents in its place.

    Raises:
        CannotWrite: if there is no room; what was kept before is still there.
    """
    ending = LATENTS_ENDING if run.finished else CHECKPOINT_ENDING
    path = outputs.latents_path(output) if run.finished else outputs.checkpoint_path(output)
    held = {name: tensor for name in _TENSORS if (tensor := getattr(run, name)) is not None}
    held |= {_HISTORY + name: tensor.clone() for name, tensor in run.history.items()}  # some may be one
    states, of_cache = run.cache or ((), {})
    held |= {_CACHE + name: tensor.contiguous().clone() for name, tensor in of_cache.items()}  # likewise
    pixels = tensors_of(run.pictures)
    if run.finished:
        held["latents"] = held["latents"].float()
        # The outputs that are left start from the same pictures.
        is_last = run.seed == request.seeds[-1]
        names = ("latents",) if is_last else ("latents", "picture")
        held, pixels = {name: held[name] for name in names if name in held}, {} if is_last else pixels
    held |= pixels
    state = _StoredState(
        stage=run.stage,
        steps=tuple(_StoredStep(**asdict(step)) for step in run.steps),
        phases=dict(run.phases_ms),
        memory=dict(run.memory_bytes),
        stages=tuple(dict(stage) for stage in run.stages),
        guard=None if run.guard is None else validated(GuardState, run.guard),
        cache=None if run.cache is None else tuple(_StoredCache(**state) for state in states),
        start_size=run.start_size,
    )
    about = {
        **run.report,
        "schema": _SCHEMAS[ending][0],
        "seed": run.seed,
        "request": request_data(request),
        "state": state.model_dump(mode="json"),
        **dict(zip(_COUNTS, (run.done, run.total), strict=True)),
    }
    tensors.write_tensors(path, held, about, overwrite=request.overwrite)
    if run.finished:
        whole.remove(outputs.checkpoint_path(output))  # they have all that it had
    return path


def discard_run(output: Path, *, latents: bool = True, overwrite: bool = False) -> None:
    """Removes what was kept of a run beside its output, or begun and left.

    Args:
        output: of the run.
        latents: whether they go too.
        overwrite: whether that of another process goes too.
    """
    whole.remove(outputs.checkpoint_path(output), overwrite=overwrite)
    for begun in (output, outputs.latents_path(output), outputs.report_path(output)):
        whole.discard_leftovers(begun)
    if latents:
        whole.remove(outputs.latents_path(output), overwrite=overwrite)


def files_of(run: Run) -> list[Path]:
    """The file that a run was taken up from, and the checkpoint beside its latents that a killed process left of it."""
    if run.kept is None:
        return []
    checkpoint = outputs.checkpoint_path(run.kept.with_name(run.kept.name.removesuffix(LATENTS_ENDING)))
    try:
        both = [tensors.read_about(path) or {} for path in (run.kept, checkpoint)]
        # A run that has been taken up keeps only the seeds that are left.
        asked = [{**about["request"], "seeds": about["seed"]} for about in both]
    except (BadInput, KeyError, TypeError):
        return [run.kept]
    return [run.kept, checkpoint] if asked[0] == asked[1] else [run.kept]


def place_of(kept: Path) -> Path:
    """Where the output of a file of a run goes: beside it, by its name; without a suffix.

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
    if not path.name:  # as of the current folder
        raise BadInput(f"{path} is a folder: give a checkpoint or latents in it, or the output that they are to become")
    ending = next((ending for ending in _SCHEMAS if path.name.endswith(ending)), "")
    if ending and path.is_file():
        return path
    # A run whose checkpoint is gone may have got as far as its latents.
    output = path.with_name(path.name.removesuffix(ending)) if path.name else path
    for kept in outputs.kept_beside(output):
        return kept
    raise BadInput(f"there is no checkpoint and there are no latents of {path}: there is nothing to go on with")


def read_run(path: Path, model: str | None = None) -> tuple[Run, Request]:
    """A run that was kept, and what was asked of it; its outputs go beside the file, by its name.

    Args:
        path: of a checkpoint or of latents.
        model: in place of the stored one, as typed.

    Raises:
        BadInput: if it cannot be read, or is not whole.
        ModelUnavailable: if its model is not here.
    """
    ending = LATENTS_ENDING if path.name.endswith(LATENTS_ENDING) else CHECKPOINT_ENDING
    held, about = tensors.read_tensors(path, *_SCHEMAS[ending])
    place = place_of(path)
    try:
        seed = validated(KeptReport, about).seed
        state = validated(_StoredState, about.get("state"))
        request = request_from_data(about.get("request"), place, seed, model)
        stages = stages_for(request, None if state.start_size is None else Resolution(*state.start_size))
        _require_stages(state, stages)
        run = Run(
            seed=seed,
            total=sum(stage.steps for stage in stages),
            stage=state.stage,
            **{name: held.get(name) for name in _TENSORS},  # pyright: ignore[reportArgumentType]
            steps=tuple(StepTiming(**dict(step)) for step in state.steps),
            phases_ms=state.phases,
            memory_bytes=state.memory,
            report={name: value for name, value in about.items() if name not in ("request", "state", *_COUNTS)}
            | {"schema": SCHEMA, **({"stages": list(state.stages)} if "stages" in about else {})},
            stages=state.stages,
            guard=None if state.guard is None else state.guard.model_dump(mode="json"),
            history=_beginning(_HISTORY, held),
            cache=None
            if state.cache is None
            else (tuple(one.model_dump() for one in state.cache), _beginning(_CACHE, held)),
            start_size=state.start_size,
            kept=path,
        )
        if not (run.finished and seed == request.seeds[-1]):
            run = replace(run, pictures=pictures_in(held, request))
        _require_fit(run, request, stages, latents_alone=ending == LATENTS_ENDING)
    except (ValueError, LookupError, OSError, BadInput) as error:
        reason = str(error) if isinstance(error, BadInput) else f"it is damaged, or of another version of grat: {error}"
        raise BadInput(f"{path} cannot be gone on with: {reason}") from error
    return run, request


def _beginning(prefix: str, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, by what follows."""
    return {name.removeprefix(prefix): tensor for name, tensor in held.items() if name.startswith(prefix)}


def _require_stages(state: _StoredState, stages: Sequence[Stage]) -> None:
    """Raises BadInput unless a state is within the stages of its request, and those before its own are done."""
    if state.stage >= len(stages):
        raise BadInput(f"it is at stage {state.stage + 1} of {len(stages)}")
    done = Counter(step.stage for step in state.steps)
    if not state.steps or len(state.stages) != state.stage + bool(done[state.stage]):
        raise BadInput(f"it is at stage {state.stage + 1}, and tells of {len(state.stages)}")
    for number, steps in sorted(done.items()):
        if number > state.stage or steps > stages[number].steps:
            raise BadInput(f"stage {number + 1} has {steps} steps done, and it is at stage {state.stage + 1}")
    for number, stage in enumerate(stages[: len(state.stages)]):
        told = validated(ToldStage, state.stages[number])
        if (told.number, told.width, told.height, told.steps) != (number, stage.width, stage.height, stage.steps):
            raise BadInput(f"stage {number + 1} is told to be another one")
        if number < state.stage and done[number] < stage.steps:
            raise BadInput(f"stage {number + 1} has {done[number]} steps done of {stage.steps}")


def _require_fit(run: Run, request: Request, stages: Sequence[Stage], *, latents_alone: bool) -> None:
    """Raises ValueError unless a run's tensors are of its request, and of the stage under way."""

    stage = stages[run.stage]

    def shape(stage: Stage, *, called: bool = False) -> tuple[int, ...]:
        grid = request.model.grid(stage.width, stage.height, request.frames)
        return request.family.latents_shape(request.model, grid, called=called)

    if latents_alone and not run.finished:
        raise ValueError(f"{run.done} of {run.total} steps are done, and it has no checkpoint")
    begun = run.done_in_stage > 0
    redone = stages[0].strength is not None and not request.handed
    starts = redone and not (run.finished and run.seed == request.seeds[-1])
    expected = {
        "latents": shape(stage, called=run.done_in_stage < stage.steps) if begun else None,
        "picture": shape(stages[0]) if starts else None,
        "start": shape(stage) if run.stage and not run.finished else None,
    }
    for name, wanted in expected.items():
        tensor = getattr(run, name)
        if tensor is not None:
            _require_numbers(tensor, wanted, name)
        elif wanted is not None:
            raise ValueError(f"it has no {name}")
    if run.history and (not expected["latents"] or run.done_in_stage == stage.steps):
        raise ValueError("it remembers steps of a stage that is not under way")
    if len(run.history) > _MOST_OF_HISTORY:
        raise ValueError(f"it remembers {len(run.history)} tensors")
    for tensor in run.history.values():
        _require_numbers(tensor, expected["latents"], "memory of a step")
    for name in ("noise_state", "random_state"):
        tensor = getattr(run, name)
        if not run.finished and (tensor is None or not _is_random_state(tensor)):
            raise ValueError(f"its {name.replace('_', ' ')} is none")


def _require_numbers(tensor: torch.Tensor, shape: tuple[int, ...] | None, what: str) -> None:
    """Raises ValueError unless a tensor has a shape, which may be no shape at all, and numbers that a model takes."""
    import torch

    known = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if tuple(tensor.shape) != shape or tensor.dtype not in known:
        raise ValueError(f"its {what} is {list(tensor.shape)}, {tensor.dtype}, and not {shape and list(shape)}")
    if not tensor.isfinite().all():
        raise ValueError(f"its {what} is not finite")
    if tensor.abs().max() > _LARGEST_LATENT:
        raise ValueError(f"its {what} has numbers beyond {_LARGEST_LATENT:,}")


def _is_random_state(state: torch.Tensor) -> bool:
    """Whether bytes are the state of a generator that torch can go on from; it checks less itself, and reads beyond."""
    import torch

    if state.dtype != torch.uint8 or state.ndim != 1:
        return False
    if state.numel() == _STATE_BYTES_CUDA:
        return True
    if state.numel() != _STATE_BYTES_CPU:
        return False
    # Of the Mersenne Twister: seed, numbers left before all are made anew, whether there is a seed, the next one's
    # place (torch, aten/src/ATen/CPUGeneratorImpl.cpp). A new generator has one left, and begins anew with it.
    _, left, seeded, following = struct.unpack("<QiiQ", state[:24].numpy().tobytes())
    return seeded == 1 and ((left, following) == (1, 0) or (left > 0 and left + following == _TWISTER + 1))


# ---- What files say


class _StoredStep(BaseModel):
    """A `StepTiming`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    index: Count
    timestep: Number
    total_ms: Time
    attention_ms: Time
    other_ms: Number
    density: Number
    stage: Annotated[int, Field(ge=0, le=MOST_STAGES)]
    computed: Annotated[tuple[Ranges, ...], Field(max_length=16)] = ()
    over_steps: StepKind | None = None
    exchange_ms: Time = 0.0
    exchanged_bytes: Bytes = 0


class _StoredCache(BaseModel):
    """A state of a cache; `caching` says what values may be."""

    model_config = ConfigDict(strict=True, extra="forbid")

    transformer: Annotated[int, Field(ge=0, le=100)]
    holder: Annotated[int, Field(ge=-1, le=_MOST_OF_CACHE)]
    context: Name
    values: Annotated[dict[Name, Any], Field(max_length=100)]


class _StoredState(BaseModel):
    """What a file says of a run besides its request and its report."""

    model_config = ConfigDict(strict=True, extra="forbid")

    stage: Annotated[int, Field(ge=0, le=MOST_STAGES)]
    steps: Annotated[tuple[_StoredStep, ...], Field(max_length=MOST_STEPS)]
    phases: Phases
    memory: dict[Name, Bytes]
    stages: Annotated[tuple[dict[str, Any], ...], Field(max_length=MOST_STAGES)]
    guard: GuardState | None
    cache: Annotated[tuple[_StoredCache, ...], Field(max_length=_MOST_OF_CACHE)] | None = None
    start_size: tuple[Side, Side] | None
