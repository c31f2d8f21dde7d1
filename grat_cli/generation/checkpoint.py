"""How far one output has got: kept in a file while it is made and until it is written, and taken up again.

Between steps that is `NAME.checkpoint.safetensors`, afterwards `NAME.latents.safetensors`. What a file says is held to
what may be typed, and decides neither where an output goes nor what it may replace.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from grat_cli.errors import BadInput, choices, printable
from grat_cli.estimates.stages import Stage
from grat_cli.families import Medium, ModelChoice
from grat_cli.families.base import Pictures
from grat_cli.files import formats, outputs, tensors, videos, whole
from grat_cli.files.prompts import LARGEST_SEED, MOST_OUTPUTS
from grat_cli.generation.inputs import pictures_in, tensors_of
from grat_cli.generation.report import SCHEMA
from grat_cli.generation.request import Request, check
from grat_cli.generation.stage import stages_for
from grat_cli.generation.timing import StepTiming
from grat_cli.models.catalogue import HUB_ID, KNOWN_MODELS, choose_model
from grat_cli.models.offloading import OFFLOADS
from grat_cli.models.quantization import CASTS, QUANTIZATIONS
from grat_cli.models.resolution import LARGEST_SIDE, Resolution
from grat_cli.models.video_size import MOST_FRAMES
from grat_cli.models.weight_files import WeightFile
from grat_cli.models.weights import Weights
from grat_cli.presets import Preset

if TYPE_CHECKING:
    import torch

_COUNTS = ("steps_done", "steps_total")  # of a file, for people
CHECKPOINT_ENDING, LATENTS_ENDING = ".checkpoint.safetensors", ".latents.safetensors"
_SCHEMAS = {
    CHECKPOINT_ENDING: ("grat.checkpoint/2", "a checkpoint"),
    LATENTS_ENDING: ("grat.latents/2", "a latents file"),
}
MOST_STEPS, MOST_REFERENCES = 100_000, 100
_HISTORY, _MOST_OF_HISTORY = "history.", 64  # what a name of such a tensor begins with; solvers go back a few steps
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

    def refuse_other_weights(self, revision: str | None, files: Sequence[WeightFile] = ()) -> None:
        """Raises BadInput if the run was begun with other weights than those of `revision`, or of `files`."""
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


def write_run(run: Run, request: Request, output: Path) -> Path:
    """Keeps a run beside its output: as a checkpoint, or where all steps are done as latents in its place.

    Raises:
        CannotWrite: if there is no room; what was kept before is still there.
    """
    ending = LATENTS_ENDING if run.finished else CHECKPOINT_ENDING
    path = outputs.latents_path(output) if run.finished else outputs.checkpoint_path(output)
    held = {name: tensor for name in _TENSORS if (tensor := getattr(run, name)) is not None}
    held |= {_HISTORY + name: tensor.clone() for name, tensor in run.history.items()}  # some may be one
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
        guard=None if run.guard is None else dict(run.guard),
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
    ending = next((ending for ending in _SCHEMAS if path.name.endswith(ending)), "")
    if ending and path.is_file():
        return path
    # A run whose checkpoint is gone may have got as far as its latents.
    output = path.with_name(path.name.removesuffix(ending))
    for kept in (outputs.latents_path(output), outputs.checkpoint_path(output)):
        if kept.is_file():
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
        seed = stored_as(_StoredReport, about).seed
        state: _StoredState = stored_as(_StoredState, about.get("state"))
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
            | {"schema": SCHEMA},
            stages=state.stages,
            guard=state.guard,
            history={name.removeprefix(_HISTORY): tensor for name, tensor in held.items() if name.startswith(_HISTORY)},
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
        told: _StoredStage = stored_as(_StoredStage, state.stages[number])
        if (told.number, told.width, told.height, told.steps) != (number, stage.width, stage.height, stage.steps):
            raise BadInput(f"stage {number + 1} is told to be another one")
        if number < state.stage and done[number] < stage.steps:
            raise BadInput(f"stage {number + 1} has {done[number]} steps done of {stage.steps}")


def _require_fit(run: Run, request: Request, stages: Sequence[Stage], *, latents_alone: bool) -> None:
    """Raises ValueError unless a run's tensors are of its request, and of the stage under way."""
    import torch

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
        if tensor is not None and (tuple(tensor.shape) != wanted or not tensor.is_floating_point()):
            raise ValueError(f"its {name} is {list(tensor.shape)}, {tensor.dtype}, and not {wanted and list(wanted)}")
        if tensor is None and wanted is not None:
            raise ValueError(f"it has no {name}")
    if run.history and (not expected["latents"] or run.done_in_stage == stage.steps):
        raise ValueError("it remembers steps of a stage that is not under way")
    if len(run.history) > _MOST_OF_HISTORY:
        raise ValueError(f"it remembers {len(run.history)} tensors")
    for tensor in run.history.values():
        if tuple(tensor.shape) != expected["latents"] or not tensor.is_floating_point():
            raise ValueError(f"what it remembers of a step is {list(tensor.shape)}, {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError("what it remembers of a step is not finite")
    for name in ("noise_state", "random_state"):
        tensor = getattr(run, name)
        if not run.finished and (tensor is None or tensor.dtype != torch.uint8 or tensor.ndim != 1):
            raise ValueError(f"its {name.replace('_', ' ')} is none")


# ---- What files say


def _one_of(known: Iterable[str]) -> AfterValidator:
    def check(word: str) -> str:
        if word not in known:
            raise ValueError(choices(word, tuple(known)))
        return word

    return AfterValidator(check)


Text = Annotated[str, Field(max_length=1_000_000)]
PathText = Annotated[str, Field(min_length=1, max_length=4096)]
Name = Annotated[str, Field(max_length=80)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Number = Annotated[float, Field(ge=-1e15, le=1e15)]


class _StoredDevice(BaseModel):
    model_config = ConfigDict(strict=True)

    threads: Annotated[int, Field(ge=1, le=4096)] | None


class _StoredFile(BaseModel):
    """What a `WeightFile` is known by."""

    model_config = ConfigDict(strict=True)

    part: Annotated[str, Field(pattern=r"^[a-z][a-z_0-9]{0,40}$")]
    name: Annotated[str, Field(max_length=255)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _StoredWeights(BaseModel):
    model_config = ConfigDict(strict=True)

    revision: Annotated[str, Field(max_length=200)] | None
    weights: Annotated[tuple[_StoredFile, ...], Field(max_length=1000)] = ()


class _StoredLowest(BaseModel):
    model_config = ConfigDict(strict=True)

    step: Count
    layer: Count
    kept: Number


class _StoredWidening(BaseModel):
    model_config = ConfigDict(strict=True)

    step: Count
    layer: Count
    to: Text


class _StoredGuard(BaseModel):
    model_config = ConfigDict(strict=True)

    bar: Number
    layers: Count
    planned_density: Number | None
    lowest: _StoredLowest | None
    widened: Annotated[tuple[_StoredWidening, ...], Field(max_length=MOST_STEPS)]


class _StoredReport(BaseModel):
    """What of a report decides how a run goes on, and what of it is shown."""

    model_config = ConfigDict(strict=True)

    seed: Seed
    device: _StoredDevice
    model: _StoredWeights
    sampling: dict[str, Any]
    density: Number
    guard: _StoredGuard | None
    peak_memory_kind: Annotated[str, Field(max_length=200)]


class _StoredStage(BaseModel):
    """What is shown of a stage that is done."""

    model_config = ConfigDict(strict=True)

    number: Count
    width: Side
    height: Side
    steps: Count
    density: Number
    guard: _StoredGuard | None


class _StoredStep(BaseModel):
    """A `StepTiming`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    index: Count
    timestep: Number
    total_ms: Number
    attention_ms: Number
    other_ms: Number
    density: Number
    stage: Annotated[int, Field(ge=0, le=100)]


class _StoredState(BaseModel):
    """What a file says of a run besides its request and its report."""

    model_config = ConfigDict(strict=True, extra="forbid")

    stage: Annotated[int, Field(ge=0, le=100)]
    steps: Annotated[tuple[_StoredStep, ...], Field(max_length=MOST_STEPS)]
    phases: dict[Name, Annotated[Number, Field(ge=0)]]
    memory: dict[Name, Annotated[int, Field(ge=0, le=2**63)]]
    stages: Annotated[tuple[dict[str, Any], ...], Field(max_length=100)]
    guard: dict[str, Any] | None
    start_size: tuple[Side, Side] | None


class _StoredModel(BaseModel):
    """Of a model what is typed to choose it; what it can do, the model itself says."""

    model_config = ConfigDict(strict=True)

    name: PathText
    source: PathText
    kind: Literal["hub", "folder", "file"]


class _StoredForm(BaseModel):
    """A `Weights`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    base: PathText | None = None
    quantize: Annotated[str, _one_of(QUANTIZATIONS)] = "none"
    text_encoder: PathText | None = None
    cast: Annotated[str, _one_of(CASTS)] = "none"

    def as_weights(self) -> Weights:
        """Held to what may be typed."""
        if self.text_encoder is not None and not Path(self.text_encoder).is_absolute():
            raise ValueError("weights.text_encoder: not an absolute path")
        return Weights(base=_base(self.base), quantize=self.quantize, text_encoder=self.text_encoder, cast=self.cast)


class _StoredRequest(BaseModel):
    """What a file says of a request: all but where its outputs go and what they may replace, which no file decides."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Text
    negative_prompt: Text | None
    preset: Preset
    model: _StoredModel
    weights: _StoredForm
    width: Side
    height: Side
    frames: Annotated[int, Field(ge=1, le=MOST_FRAMES)] | None
    fps: Annotated[int, Field(ge=1, le=videos.FASTEST)] | None
    init_image: PathText | None
    mask: PathText | None = None
    control: PathText | None = None
    references: Annotated[tuple[PathText, ...], Field(max_length=MOST_REFERENCES)] = ()
    strength: Annotated[float, Field(gt=0, le=1)] | None
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=MOST_OUTPUTS)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,2})?)$")]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    offload: Annotated[str, _one_of(OFFLOADS)]
    format: Annotated[str, _one_of(formats.SUFFIXES)]
    quality: Annotated[int, Field(ge=0, le=100)] | None
    checkpoint_every: Annotated[int, Field(ge=0)] | None
    preview_every: Annotated[int, Field(ge=0)]
    save_latents: bool
    metadata: bool
    command: Text


_PICTURES = ("init_image", "mask", "control")


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().resolve())


def request_data(request: Request) -> dict[str, Any]:
    """The request as plain data, from which `request_from_data` makes it again in another folder or process."""
    data = {name: getattr(request, name) for name in _StoredRequest.model_fields}
    model = {"name": request.model.name, "source": request.model.source, "kind": request.model.kind}
    if request.model.kind != "hub":
        model["source"] = str(Path(request.model.source).resolve())
    return {
        **data,
        "preset": request.preset.model_dump(mode="json"),
        "model": model,
        "weights": _weights_data(request.weights),
        **{name: _absolute(getattr(request, name)) for name in _PICTURES},
        "references": [_absolute(path) for path in request.references],
        "seeds": list(request.seeds),
    }


def _weights_data(weights: Weights) -> dict[str, Any]:
    data = asdict(weights)
    del data["allow_pickle"]
    is_known_name = any(weights.base in known for known in KNOWN_MODELS.values())
    if weights.base is not None and not is_known_name and Path(weights.base).expanduser().exists():
        data["base"] = str(Path(weights.base).expanduser().resolve())
    if weights.text_encoder is not None:
        data["text_encoder"] = str(Path(weights.text_encoder).expanduser().resolve())
    return data


def request_from_data(data: Any, place: Path, seed: int, model: str | None = None) -> Request:
    """The request that `request_data` was made of; what it says is held to what may be typed.

    Args:
        data: what it returned.
        place: where the output of a seed goes, without the format's suffix; those of the others get names like it.
        seed: of that output.
        model: in place of the stored one, as typed.

    Raises:
        BadInput: if it is not whole, or of another version, with what is wrong.
        ModelUnavailable: if its model is not here.
    """
    try:
        stored: _StoredRequest = stored_as(_StoredRequest, data)
        if stored.preset.sampling.steps > MOST_STEPS:
            raise ValueError(f"preset.sampling.steps: more than {MOST_STEPS:,}")
        if seed not in stored.seeds or len(set(stored.seeds)) < len(stored.seeds):
            raise ValueError("seeds: one is missing, or there twice")
        of_videos = stored.frames is not None
        if of_videos != (stored.format in videos.FORMATS):
            raise ValueError(f"format: {stored.format} is none of {'videos' if of_videos else 'pictures'}")
        suffix, beginning = formats.SUFFIXES[stored.format], place.name.removesuffix(f"-s{seed}")
        names = [place.name if one == seed else f"{beginning}-s{one}" for one in stored.seeds]
        same = {name: getattr(stored, name) for name in _StoredRequest.model_fields}
        medium: Medium = "video" if of_videos else "image"
        request = Request(
            **same
            | {
                "model": _chosen(stored.model, medium, stored.weights.base)
                if model is None
                else choose_model(model, medium, stored.weights.base),
                "weights": stored.weights.as_weights(),
                **{name: None if same[name] is None else Path(same[name]) for name in _PICTURES},
                "references": tuple(map(Path, stored.references)),
                "outputs": tuple(place.with_name(name + suffix) for name in names),
            }
        )
        check(request)
    except (TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"the request is damaged, or of another version of grat: {error}") from error
    return request


def stored_as(kind: type[Any], data: Any) -> Any:
    """What was read from a file, as a pydantic model of it.

    Raises:
        ValueError: in one line, if it does not fit.
    """
    try:
        return kind.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        # A name may be anything that somebody wrote into a file.
        raise ValueError(f"{ascii(where)[1:-1][:80]}: {first['msg'].splitlines()[0][:160]}") from error


def _chosen(stored: _StoredModel, medium: Medium, base: str | None) -> ModelChoice:
    """The model of a request as if it were typed: one on this machine is not looked for on the hub, nor the reverse."""
    name = stored.name if stored.name in KNOWN_MODELS[medium] else stored.source
    if name == stored.source and stored.kind != "hub" and not Path(name).is_absolute():
        raise ValueError("model.source: not an absolute path")
    choice = choose_model(name, medium, _base(base))
    if choice.kind != stored.kind:
        raise ValueError(f"model: {name!a} was a {stored.kind} and is a {choice.kind} here")
    return replace(choice, name=stored.name)


def _base(stored: str | None) -> str | None:
    if stored is None or Path(stored).is_absolute() or (HUB_ID.fullmatch(stored) and not Path(stored).exists()):
        return stored
    if any(stored in known for known in KNOWN_MODELS.values()):
        return stored
    raise ValueError("base: neither an absolute path nor a hub id")
