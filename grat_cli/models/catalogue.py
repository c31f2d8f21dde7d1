"""Which model a name means, and what is known of it before anything is downloaded. Imports no torch for a name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grat_cli.errors import BadInput, ModelUnavailable, first_line, nearest
from grat_cli.families import FAMILIES, families_of, family_of_pipeline
from grat_cli.families.base import Family, Medium, ModelChoice
from grat_cli.files.json_objects import read_json
from grat_cli.files.places import expanded
from grat_cli.files.weight_headers import read_header
from grat_cli.models.parts import read_index, validation_problem

_Blocks = Annotated[list[int] | None, Field(max_length=8)]
_Channels = Annotated[int, Field(ge=1, le=2**20)]
_Scale = Annotated[int, Field(ge=1, le=64)]
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SINGLE_FILE_SUFFIXES = (".safetensors", ".sft", ".gguf", *_PICKLES)


def _known(medium: Medium) -> dict[str, ModelChoice]:
    """Bundled models first."""
    models = [model for family in families_of(medium) for model in family.models]
    return {model.name: model for model in sorted(models, key=lambda model: not model.is_demo)}


KNOWN_MODELS: Mapping[Medium, Mapping[str, ModelChoice]] = {medium: _known(medium) for medium in get_args(Medium)}


def is_known(model: ModelChoice) -> bool:
    """Whether a model is one of those that go by names of their own, so that all of it is known before it is loaded."""
    return model.name in KNOWN_MODELS[model.medium]


def choose_model(name: str | None, medium: Medium = "image", base: str | None = None) -> ModelChoice:
    """The model that a name means: a known name, a folder, a file of weights, or a hub id `owner/name`.

    Without a name it is the first of the medium's first family where a CUDA device is present, else the bundled one;
    only then torch is imported.

    Args:
        name: as typed, or None.
        medium: what it is to make; `demo` is another model for each.
        base: of a file: a known name, a folder or a hub id with the other parts.

    Raises:
        ModelUnavailable: if the name means nothing, or a folder is not that of a supported pipeline.
        BadInput: if it makes the other medium, with the command that takes it.
    """
    known = KNOWN_MODELS[medium]
    if name is None:
        import torch

        if torch.cuda.is_available():
            return replace(families_of(medium)[0].models[0], reason="a CUDA device is present")
        bundled = next(model for model in known.values() if model.is_demo)
        return replace(bundled, reason="no CUDA device is present")
    if name in known:
        return known[name]
    if medium_of_name(name) not in (None, medium):
        raise wrong_medium(name, medium)
    path = expanded(name)
    if os.path.isdir(path):  # which says no to what can be no path, where Path.is_dir raises OSError
        return _choose_folder(name, path, medium)
    if path.suffix.lower() in _SINGLE_FILE_SUFFIXES or os.path.isfile(path):
        return _choose_file(name, path, medium, base)
    if HUB_ID.fullmatch(name):
        return replace(_kin(name, medium), name=name, source=name, reason="hub id")
    closest = nearest(name, known)
    hint = f"did you mean {closest}? " if closest else ""
    raise ModelUnavailable(
        f"no model, folder or file is named {name!r}: {hint}"
        f"known are {_some_of(known)}; folders, .safetensors and .gguf files, and hub ids such as owner/name"
    )


def models_for(presets: str | None, medium: Medium) -> list[ModelChoice]:
    """The known models that presets with this name as their `model` are made for, else all; the usual one first."""
    models = [model for family in families_of(medium) for model in family.models]
    return [model for model in models if model.presets == presets] or models


def medium_of_name(name: str) -> Medium | None:
    """What a model makes that is known by name, or by the folder of that name; None where that does not tell."""
    media: list[Medium] = [medium for medium, known in KNOWN_MODELS.items() if name in known]
    if media:
        return media[0] if len(media) == 1 else None
    if (family := _family_of_file(expanded(name))) is not None:
        return family.medium
    index = expanded(name) / "model_index.json"
    return medium_of_pipeline(read_index(index).class_name) if os.path.isfile(index) else None


def medium_of_pipeline(class_name: Any) -> Medium | None:
    """What a pipeline class makes; None for one that is not supported."""
    family = family_of_pipeline(class_name)
    return family.medium if family else None


def refusal_of_pipeline(name: str, class_name: Any, medium: Medium) -> BadInput | ModelUnavailable:
    """What to raise for a model whose pipeline is none of those for `medium`."""
    if medium_of_pipeline(class_name) not in (None, medium):
        return wrong_medium(name, medium)
    for family in FAMILIES.values():
        reasons = {**family.refused, **family.not_driven}
        if class_name in reasons:
            return ModelUnavailable(
                f"{name} is a {class_name}, which is not supported: {reasons[class_name]}\n"
                f"give a {family.pipelines[0]}, which makes {family.medium}s from text alone"
            )
    wanted = " or ".join(family.pipelines[0] for family in families_of(medium))
    return ModelUnavailable(f"{name} is a {class_name}, which is not supported: give a folder or hub id of {wanted}")


def wrong_medium(name: str, medium: Medium) -> BadInput:
    """What to raise for a model that makes the other medium than `medium`."""
    (other,) = KNOWN_MODELS.keys() - {medium}
    names = _some_of(KNOWN_MODELS[medium])
    return BadInput(f"{name} makes {other}s: use it with grat {other}; for {medium}s give --model one of {names}")


def _some_of(known: Mapping[str, ModelChoice]) -> str:
    """The demo and the usual model of each family, and how many there are besides."""
    usual: dict[str, str] = {}
    for name, model in known.items():
        usual.setdefault("demo" if model.is_demo else model.family, name)
    names = usual.values()
    return f"{', '.join(names)}, and {len(known) - len(names)} of their kin"


def _kin(name: str, medium: Medium) -> ModelChoice:
    """The known model that another checkpoint is most likely kin to."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())

    def fits(family: Family) -> int:
        return max((len(mark) for mark in family.marks or (family.name,) if mark in letters), default=0)

    return max(families_of(medium), key=fits).kin(name)


def _choose_file(name: str, path: Path, medium: Medium, base: str | None) -> ModelChoice:
    """A file; the pipeline that it is to be a part of tells most, where that is known before it is loaded."""
    if path.suffix.lower() not in _SINGLE_FILE_SUFFIXES:
        raise ModelUnavailable(f"{name} is not a .safetensors or .gguf file: other formats are not supported")
    if not os.path.isfile(path):
        raise ModelUnavailable(f"there is no file {name}: check the path, or use --model demo")
    family = _family_of_file(path)
    if base is not None and (whole := _whole(base, medium)) is not None:
        if family is not None and family.name != whole.family:
            raise BadInput(
                f"{name} holds a transformer of {family.title}, and {base} is {FAMILIES[whole.family].title}: "
                f"try --base {family.base}"
            )
        own = {"name": name, "source": str(path), "kind": "file", "reason": "a file of that name"}
        return replace(whole, **own, is_demo=False, other_parts=whole.source if whole.kind == "folder" else "")
    kin = _kin(path.stem, medium)
    if family is not None:
        kin = replace(family.kin(path.stem), source=str(path), kind="file")
        try:
            kin = family.of_file(path.stem, family.transformer_config(kin))
        except (OSError, ValueError, LookupError, TypeError):  # loading says more of what is wrong
            kin = family.kin(path.stem)
    return replace(kin, name=name, source=str(path), kind="file", reason="a file of that name")


def _whole(base: str, medium: Medium) -> ModelChoice | None:
    """The model that a base is, where that is known before it is loaded."""
    if base in KNOWN_MODELS[medium]:
        return KNOWN_MODELS[medium][base]
    path = expanded(base)
    if not os.path.isdir(path) or medium_of_name(base) not in (None, medium):
        return None
    return _choose_folder(base, path, medium)


def _family_of_file(path: Path) -> Family | None:
    """The family that a file's weights are of; None where their names do not tell, or cannot be read."""
    if not os.path.isfile(path):
        return None
    try:
        names = read_header(path).tensors
    except (OSError, ValueError):  # loading says more of what is wrong
        return None
    return next((family for family in FAMILIES.values() if family.holds(names)), None)


def _choose_folder(name: str, path: Path, medium: Medium) -> ModelChoice:
    """A pipeline folder; the files in it tell how large its tokens are and how it takes guidance."""
    try:
        index = read_index(path / "model_index.json")
        family = family_of_pipeline(index.class_name)
        if family is None or family not in families_of(medium):
            raise refusal_of_pipeline(name, index.class_name, medium)
        parts = index.classes(name, family.classes)
        transformer, autoencoder = (
            _Traits.model_validate(read_json(path / part / "config.json")).model_dump(exclude_none=True)
            for part in ("transformer", "vae")
        )
    except FileNotFoundError as error:
        raise ModelUnavailable(
            f"{name} is not a pipeline folder: {first_line(error)}\n"
            f"give a folder that a {families_of(medium)[0].pipelines[0]} was saved to, or use --model demo"
        ) from None
    except (OSError, ValueError) as error:
        reason = validation_problem(error) if isinstance(error, ValidationError) else first_line(error)
        raise ModelUnavailable(
            f"{name} cannot be read ({reason}): get the folder again, or use --model demo"
        ) from error
    choice = replace(family.of_folder(transformer, autoencoder), source=str(path))
    choice = family.of_index(choice, index.class_name, frozenset(parts), index.options)
    return replace(choice, name=name, source=str(path), kind="folder", reason="a folder of that name")


class _Traits(BaseModel):
    """What the configuration of a transformer or an autoencoder tells of tokens, held to what can be."""

    model_config = ConfigDict(extra="ignore")

    block_out_channels: _Blocks = None
    decoder_block_out_channels: _Blocks = None
    guidance_embeds: bool | None = None
    in_channels: _Channels | None = None
    out_channels: _Channels | None = None
    text_embed_dim: int | None = None
    spatial_compression_ratio: _Scale | None = None
    temporal_compression_ratio: _Scale | None = None
    temperal_downsample: Annotated[list[bool] | None, Field(max_length=8)] = None
    patch_size: _Scale | Annotated[list[_Scale], Field(min_length=2, max_length=3)] | None = None
    in_channels: int | None = None
    out_channels: int | None = None
    image_dim: int | None = None
    num_attention_heads: int | None = None
    scale_factor_spatial: _Scale | None = None
    scale_factor_temporal: _Scale | None = None
    target_size: Annotated[int, Field(ge=16, le=8192)] | None = None
    task_type: Literal["t2v", "i2v"] | None = None
    image_condition_type: Literal["latent_concat", "token_replace"] | None = None
