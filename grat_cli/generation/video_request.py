"""What videos are asked for: all that a run needs, so that it can be kept in a file and gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from grat_cli.errors import BadInput, choices
from grat_cli.files.videos import FASTEST, FORMATS, SUFFIXES
from grat_cli.generation.request import GenerationRequest, Progress, check_size
from grat_cli.generation.seeds import LARGEST_SEED, MOST_PICTURES
from grat_cli.models.catalogue import HUB_ID, KNOWN_MODELS, ModelChoice, VideoTraits, choose_model
from grat_cli.models.offloading import OFFLOADS
from grat_cli.models.quantization import QUANTIZATIONS
from grat_cli.models.resolution import LARGEST_SIDE
from grat_cli.models.video_size import MOST_FRAMES
from grat_cli.presets import Preset

MOST_STEPS = 100_000


@dataclass(frozen=True, kw_only=True)
class VideoRequest(GenerationRequest):
    """Which videos to make, and where they go.

    Attributes:
        frames: of each video.
        fps: frames per second.
        outputs: file, or folder of frames, of each seed's video; all in one folder.
        format: of `video_files.FORMATS`.
        crf: quality of the encoder, None for the format's own.
        checkpoint_every: steps between checkpoints; 0 for none.
        save_latents: whether the latents are kept beside the video.
        metadata: whether the video says how it was made.
        overwrite: whether existing files may be replaced.
        command: the command line as typed, for the report.
    """

    frames: int
    fps: int
    outputs: tuple[Path, ...]
    format: str = "mp4"
    crf: int | None = None
    checkpoint_every: int = 0
    save_latents: bool = False
    metadata: bool = True
    overwrite: bool = False
    command: str = ""

    @property
    def size(self) -> str:
        """For example `1280x720x129`."""
        return f"{self.width}x{self.height}x{self.frames}"

    @property
    def latent_frames(self) -> int:
        """Frames of the latents."""
        return (self.frames - 1) // _traits(self.model).frames_per_latent + 1

    @property
    def video_tokens(self) -> int:
        """Tokens of the video in the joint sequence."""
        side = self.model.token_side
        return self.latent_frames * (self.height // side) * (self.width // side)


def check_video(request: VideoRequest) -> None:
    """Raises BadInput unless the model can make such videos and there is a place for each."""
    unit = _traits(request.model).frames_per_latent
    check_size(request)
    if request.frames < 1 or (request.frames - 1) % unit:
        lower = max(0, (request.frames - 1) // unit) * unit + 1
        raise BadInput(
            f"the frames of a video must be a multiple of {unit} and one more, not {request.frames}: "
            f"use {lower} or {lower + unit}"
        )
    if request.fps < 1:
        raise BadInput(f"frames per second must be 1 or more, not {request.fps}")
    if len(request.outputs) != len(request.seeds):
        raise BadInput(f"{len(request.seeds)} seeds need as many outputs, not {len(request.outputs)}")
    if request.checkpoint_every < 0:
        raise BadInput(f"steps between checkpoints must be 0 or more, not {request.checkpoint_every}")


def note_expectations(request: VideoRequest, progress: Progress) -> None:
    """Says beforehand which words a model cannot make anything of."""
    if not request.model.is_demo:
        return
    from grat_cli.demo import unknown_words, video_vocabulary

    known = video_vocabulary()
    if unknown := unknown_words(request.prompt, known):
        progress.note(f"the demo model does not know {', '.join(unknown)}; it shows {', '.join(known['subjects'])}")


def _one_of(known: Sequence[str]) -> AfterValidator:
    def check(word: str) -> str:
        if word not in known:
            raise ValueError(choices(word, known))
        return word

    return AfterValidator(check)


Text = Annotated[str, Field(max_length=1_000_000)]
PathText = Annotated[str, Field(min_length=1, max_length=4096)]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


class _StoredModel(BaseModel):
    """Of a model what is typed to choose it; what it can do, the model itself says."""

    model_config = ConfigDict(strict=True)

    name: PathText
    source: PathText
    kind: Literal["hub", "folder", "file"]


class _StoredRequest(BaseModel):
    """What a file says of a request: all but where its outputs go and what they may replace, which no file decides."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Text
    negative_prompt: Text | None
    preset: Preset
    model: _StoredModel
    base: PathText | None
    width: Side
    height: Side
    frames: Annotated[int, Field(ge=1, le=MOST_FRAMES)]
    fps: Annotated[int, Field(ge=1, le=FASTEST)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=MOST_PICTURES)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,2})?)$")]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    offload: Annotated[str, _one_of(OFFLOADS)]
    quantize: Annotated[str, _one_of(QUANTIZATIONS)]
    format: Annotated[str, _one_of(FORMATS)]
    crf: Annotated[int, Field(ge=0, le=63)] | None
    checkpoint_every: Annotated[int, Field(ge=0)]
    save_latents: bool
    metadata: bool
    command: Text


def request_data(request: VideoRequest) -> dict[str, Any]:
    """The request as plain data, from which `request_from_data` makes it again in another folder or process."""
    data = {name: getattr(request, name) for name in _StoredRequest.model_fields}
    model = {"name": request.model.name, "source": request.model.source, "kind": request.model.kind}
    if request.model.kind != "hub":
        model["source"] = str(Path(request.model.source).resolve())
    if request.base is not None and Path(request.base).expanduser().exists():
        data["base"] = str(Path(request.base).expanduser().resolve())
    preset = request.preset.model_dump(mode="json")
    return {**data, "preset": preset, "model": model, "seeds": list(request.seeds)}


def request_from_data(data: Mapping[str, Any], place: Path, seed: int, model: str | None = None) -> VideoRequest:
    """The request that `request_data` was made of; what it says is held to what may be typed.

    Args:
        data: what it returned.
        place: where the video of a seed goes, without the format's suffix; those of the others get names like it.
        seed: of that video.
        model: in place of the stored one, as typed.

    Raises:
        BadInput: if it is not whole, or of another version, with what is wrong.
        ModelUnavailable: if its model is not here.
    """
    try:
        # Former versions kept the last two; they are not obeyed.
        stored = stored_as(_StoredRequest, {name: data[name] for name in data.keys() - {"outputs", "overwrite"}})
        if stored.preset.sampling.steps > MOST_STEPS:
            raise ValueError(f"preset.sampling.steps: more than {MOST_STEPS:,}")
        if seed not in stored.seeds or len(set(stored.seeds)) < len(stored.seeds):
            raise ValueError("seeds: one is missing, or there twice")
        suffix, beginning = SUFFIXES[stored.format], place.name.removesuffix(f"-s{seed}")
        names = [place.name if one == seed else f"{beginning}-s{one}" for one in stored.seeds]
        request = VideoRequest(
            **{name: getattr(stored, name) for name in _StoredRequest.model_fields if name not in ("model", "base")},
            model=_chosen(stored.model) if model is None else choose_model(model, medium="video"),
            base=_base(stored.base),
            outputs=tuple(place.with_name(name + suffix) for name in names),
        )
        check_video(request)
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


def _chosen(stored: _StoredModel) -> ModelChoice:
    """The model of a request as if it were typed: one on this machine is not looked for on the hub, nor the reverse."""
    name = stored.name if stored.name in KNOWN_MODELS["video"] else stored.source
    if name == stored.source and stored.kind != "hub" and not Path(name).is_absolute():
        raise ValueError("model.source: not an absolute path")
    choice = choose_model(name, medium="video")
    if choice.kind != stored.kind:
        raise ValueError(f"model: {name!a} was a {stored.kind} and is a {choice.kind} here")
    return replace(choice, name=stored.name)


def _base(stored: str | None) -> str | None:
    if stored is None or Path(stored).is_absolute() or (HUB_ID.fullmatch(stored) and not Path(stored).exists()):
        return stored
    raise ValueError("base: neither an absolute path nor a hub id")


def _traits(model: ModelChoice) -> VideoTraits:
    """Raises BadInput for a model of images."""
    if model.video is None:
        raise BadInput(f"{model.name} makes images: give --model a model of videos, such as hunyuan or demo")
    return model.video
