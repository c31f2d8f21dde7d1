"""What files say of a request: kept with a run that is gone on with, and with an output that is repeated.

Whoever wrote such a file, what it says is held to what may be typed, and decides neither where an output goes nor what
it may replace.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from grat_cli.errors import BadInput, choices
from grat_cli.families import Medium, ModelChoice
from grat_cli.files import formats, videos
from grat_cli.files.json_objects import validated
from grat_cli.files.places import absolute, expanded
from grat_cli.files.prompts import MOST_OUTPUTS
from grat_cli.generation.request import Request, check
from grat_cli.generation.told import MOST_REFERENCES, Frames, PathText, Rate, Seed, Side, Text
from grat_cli.models.catalogue import HUB_ID, KNOWN_MODELS, choose_model, is_known
from grat_cli.models.lora import LARGEST_SCALE, MOST_LORAS, is_weight_name, refuse_alike
from grat_cli.models.offloading import OFFLOADS
from grat_cli.models.quantization import CASTS, QUANTIZATIONS
from grat_cli.models.weights import Lora, Noise, Weights
from grat_cli.presets import Preset


def one_of(known: Iterable[str]) -> AfterValidator:
    def check(word: str) -> str:
        if word not in known:
            raise ValueError(choices(word, tuple(known)))
        return word

    return AfterValidator(check)


class StoredModel(BaseModel):
    """Of a model what is typed to choose it; what it can do, the model itself says."""

    model_config = ConfigDict(strict=True)

    name: PathText
    source: PathText
    kind: Literal["hub", "folder", "file"]


class StoredLora(BaseModel):
    """A `Lora`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    source: PathText
    kind: Literal["file", "hub"]
    weight_name: PathText | None
    scale: Annotated[float, Field(ge=-LARGEST_SCALE, le=LARGEST_SCALE, allow_inf_nan=False)]
    noise: Noise

    def as_lora(self) -> Lora:
        """Held to what may be typed."""
        if self.kind == "file" and (not Path(self.source).is_absolute() or self.weight_name is not None):
            raise ValueError("loras: a file is given by no absolute path")
        if self.kind == "hub" and not (HUB_ID.fullmatch(self.source) and is_weight_name(self.weight_name)):
            raise ValueError("loras: neither an absolute path nor a hub id")
        return Lora(**dict(self))


class StoredForm(BaseModel):
    """A `Weights`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    base: PathText | None = None
    quantize: Annotated[str, one_of(QUANTIZATIONS)] = "none"
    text_encoder: PathText | None = None
    cast: Annotated[str, one_of(CASTS)] = "none"
    loras: Annotated[tuple[StoredLora, ...], Field(max_length=MOST_LORAS)] = ()
    fuse_loras: bool = False

    def as_weights(self) -> Weights:
        """Held to what may be typed."""
        if self.text_encoder is not None and not Path(self.text_encoder).is_absolute():
            raise ValueError("weights.text_encoder: not an absolute path")
        loras = tuple(lora.as_lora() for lora in self.loras)
        refuse_alike(loras)
        return Weights(**dict(self) | {"base": _base(self.base), "loras": loras})


class StoredRequest(BaseModel):
    """What a file says of a request: all but where its outputs go and what they may replace, which no file decides."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Text
    negative_prompt: Text | None
    preset: Preset
    model: StoredModel
    weights: StoredForm
    width: Side
    height: Side
    frames: Frames | None
    fps: Rate | None
    init_image: PathText | None
    mask: PathText | None = None
    control: PathText | None = None
    references: Annotated[tuple[PathText, ...], Field(max_length=MOST_REFERENCES)] = ()
    strength: Annotated[float, Field(gt=0, le=1)] | None
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=MOST_OUTPUTS)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,2})?)$")]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    offload: Annotated[str, one_of(OFFLOADS)]
    compile: bool = False
    format: Annotated[str, one_of(formats.SUFFIXES)]
    quality: Annotated[int, Field(ge=0, le=100)] | None
    checkpoint_every: Annotated[int, Field(ge=0)] | None
    preview_every: Annotated[int, Field(ge=0)]
    save_latents: bool
    metadata: bool
    text_cache: bool = True
    command: Text

    @property
    def medium(self) -> Medium:
        """What is asked for."""
        return "image" if self.frames is None else "video"


_PICTURES = ("init_image", "mask", "control")


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(absolute(path))


def request_data(request: Request) -> dict[str, Any]:
    """The request as plain data, from which `request_from_data` makes it again in another folder or process."""
    data = {name: getattr(request, name) for name in StoredRequest.model_fields}
    model = {"name": request.model.name, "source": request.model.source, "kind": request.model.kind}
    if request.model.kind != "hub":
        model["source"] = str(absolute(request.model.source))
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
    if weights.base is not None and not is_known_name and os.path.exists(expanded(weights.base)):
        data["base"] = str(absolute(weights.base))
    if weights.text_encoder is not None:
        data["text_encoder"] = str(absolute(weights.text_encoder))
    for lora in data["loras"]:
        lora["source"] = str(absolute(lora["source"])) if lora["kind"] == "file" else lora["source"]
    return data


# What reports say of a request at other places than in their section of it, and what is none of their business.
_TOLD_ELSEWHERE = ("prompt", "negative_prompt", "preset", "width", "height", "frames", "fps", "seeds", "command")
_NOT_REPEATED: Mapping[str, Any] = {
    **{"checkpoint_every": None, "preview_every": 0, "save_latents": False},
    **{"metadata": True, "text_cache": True},
}


def told_model(model: ModelChoice) -> dict[str, str]:
    """A model as reports tell of it: by the name it is known by, its hub id, or its folder's or file's own name."""
    if is_known(model):
        name, source = model.name, model.source if model.kind == "hub" else model.name
    else:
        name = source = model.source if model.kind == "hub" else absolute(model.source).name
    return {"name": name, "source": source, "kind": model.kind}


def told_request(request: Request) -> dict[str, Any]:
    """What reports say of a request so that it can be repeated elsewhere: of files the names alone."""
    data = {**request_data(request), "model": told_model(request.model)}
    left_out = {*_TOLD_ELSEWHERE, *_NOT_REPEATED}
    return {name: _names_alone(value) for name, value in data.items() if name not in left_out}


def _names_alone(value: Any) -> Any:
    """Data of a request, in which all that lies on this machine has an absolute path."""
    if isinstance(value, Mapping):
        return {name: _names_alone(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_names_alone(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def request_of_report(report: Mapping[str, Any]) -> StoredRequest:
    """The request that a report tells of, with the names of files in place of paths.

    Raises:
        ValueError: in one line, if it is damaged, or of another version of grat.
    """
    section = report.get("asked")
    if not isinstance(section, Mapping) or section.keys() & {*_TOLD_ELSEWHERE, *_NOT_REPEATED}:
        raise ValueError("asked: Input should be what a report says of it")
    elsewhere = {name: report.get(name) for name in _TOLD_ELSEWHERE}
    stored = validated(
        StoredRequest, {**section, **elsewhere, **_NOT_REPEATED, "seeds": [report.get("seed")], "command": ""}
    )
    _require_sense(stored)
    return stored


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
        stored = validated(StoredRequest, data)
        _require_sense(stored)
        if seed not in stored.seeds:
            raise ValueError("seeds: one is missing, or there twice")
        suffix, beginning = formats.SUFFIXES[stored.format], place.name.removesuffix(f"-s{seed}")
        names = [place.name if one == seed else f"{beginning}-s{one}" for one in stored.seeds]
        same = {name: getattr(stored, name) for name in StoredRequest.model_fields}
        request = Request(
            **same
            | {
                "model": (
                    _chosen(stored.model, stored.medium, stored.weights.base)
                    if model is None
                    else choose_model(model, stored.medium, stored.weights.base)
                ),
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


def _require_sense(stored: StoredRequest) -> None:
    """Raises ValueError for what fits field by field and not as a whole."""
    if len(set(stored.seeds)) < len(stored.seeds):
        raise ValueError("seeds: one is missing, or there twice")
    of_videos = stored.frames is not None
    if of_videos != (stored.format in videos.FORMATS):
        raise ValueError(f"format: {stored.format} is none of {'videos' if of_videos else 'pictures'}")


def _chosen(stored: StoredModel, medium: Medium, base: str | None) -> ModelChoice:
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
