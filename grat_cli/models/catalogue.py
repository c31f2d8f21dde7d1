"""Which model a name means, and what is known of it before anything is downloaded. Imports no torch for a name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from grat_cli.demo import DEMO_FLUX, DEMO_HUNYUAN
from grat_cli.errors import BadInput, ModelUnavailable, first_line, nearest
from grat_cli.families.base import PIPELINES_OF_MEDIUM, UNSUPPORTED_PIPELINES, Medium, ModelChoice, VideoTraits
from grat_cli.models.parts import read_index, read_json, validation_problem

DEMO_TOKEN_SIDE = 8
HUNYUAN_TEXT_CHANNELS = 4096  # of the Llama that HunyuanVideo was trained with
_Blocks = Annotated[list[int] | None, Field(max_length=8)]
_Scale = Annotated[int, Field(ge=1, le=64)]
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_SINGLE_FILE_SUFFIXES = (".safetensors", ".sft")


_DEMO = ModelChoice(
    name="demo",
    source=str(DEMO_FLUX.path),
    kind="folder",
    family="demo",
    reason="chosen by name",
    native_side=DEMO_FLUX.native_side,
    token_side=DEMO_TOKEN_SIDE,
    text_tokens=DEMO_FLUX.text_tokens,
    default_steps=DEMO_FLUX.steps,
    default_guidance=DEMO_FLUX.guidance,
    true_guidance=True,
    is_demo=True,
)
_FLUX_DEV = ModelChoice("flux-dev", "black-forest-labs/FLUX.1-dev", "hub", "flux", "chosen by name")
# Distilled to four steps without guidance; its reference code cuts prompts at 256 tokens.
_FLUX_SCHNELL = ModelChoice(
    "flux-schnell",
    "black-forest-labs/FLUX.1-schnell",
    "hub",
    "flux",
    "chosen by name",
    text_tokens=256,
    default_steps=4,
    default_guidance=None,
)
# As in Tencent's own sample script: 50 steps, embedded guidance 6, shift 7, prompts of up to 256 tokens.
_HUNYUAN = ModelChoice(
    "hunyuan",
    "hunyuanvideo-community/HunyuanVideo",
    "hub",
    "hunyuan",
    "chosen by name",
    native_side=960,
    text_tokens=256,
    default_steps=50,
    default_guidance=6.0,
    default_shift=7.0,
    video=VideoTraits(width=1280, height=720, frames=129, fps=24),
)
_DEMO_HUNYUAN = ModelChoice(
    name="demo",
    source=str(DEMO_HUNYUAN.path),
    kind="folder",
    family="hunyuan",
    reason="chosen by name",
    native_side=192,
    text_tokens=DEMO_HUNYUAN.text_tokens,
    default_steps=DEMO_HUNYUAN.steps,
    default_guidance=DEMO_HUNYUAN.guidance,
    true_guidance=True,
    video=VideoTraits(DEMO_HUNYUAN.width, DEMO_HUNYUAN.height, DEMO_HUNYUAN.frames, DEMO_HUNYUAN.fps),
    is_demo=True,
)
KNOWN_MODELS: Mapping[Medium, Mapping[str, ModelChoice]] = {
    "image": {choice.name: choice for choice in (_DEMO, _FLUX_DEV, _FLUX_SCHNELL)},
    "video": {choice.name: choice for choice in (_DEMO_HUNYUAN, _HUNYUAN)},
}


def choose_model(name: str | None, medium: Medium = "image") -> ModelChoice:
    """The model that a name means: a known name, a folder, a `.safetensors` file, or a hub id `owner/name`.

    Without a name it is `flux-dev`, or `hunyuan` for videos, where a CUDA device is present, else `demo`; only then
    torch is imported.

    Args:
        name: as typed, or None.
        medium: what it is to make; `demo` is another model for each.

    Raises:
        ModelUnavailable: if the name means nothing, or a folder is not that of a supported pipeline.
        BadInput: if it makes the other medium, with the command that takes it.
    """
    known = KNOWN_MODELS[medium]
    if name is None:
        import torch

        if torch.cuda.is_available():
            return replace(_FLUX_DEV if medium == "image" else _HUNYUAN, reason="a CUDA device is present")
        return replace(known["demo"], reason="no CUDA device is present")
    if name in known:
        return known[name]
    if medium_of_name(name) not in (None, medium):
        raise wrong_medium(name, medium)
    path = Path(name).expanduser()
    if path.is_dir():
        return _choose_folder(name, path, medium)
    if path.suffix in _SINGLE_FILE_SUFFIXES or path.is_file():
        return _choose_file(name, path, medium)
    if HUB_ID.fullmatch(name):
        return replace(_template(name, medium), name=name, source=name, reason="hub id")
    closest = nearest(name, known)
    hint = f"did you mean {closest}? " if closest else ""
    raise ModelUnavailable(
        f"no model, folder or file is named {name!r}: {hint}"
        f"known are {', '.join(known)}, folders, .safetensors files, and hub ids such as owner/name"
    )


def medium_of_name(name: str) -> Medium | None:
    """What a model makes that is known by name, or by the folder of that name; None where that does not tell."""
    media: list[Medium] = [medium for medium, known in KNOWN_MODELS.items() if name in known]
    if media:
        return media[0] if len(media) == 1 else None
    index = Path(name).expanduser() / "model_index.json"
    return medium_of_pipeline(read_index(index).class_name) if index.is_file() else None


def medium_of_pipeline(class_name: Any) -> Medium | None:
    """What a pipeline class makes; None for one that is not supported."""
    return next((medium for medium, classes in PIPELINES_OF_MEDIUM.items() if class_name in classes), None)


def refusal_of_pipeline(name: str, class_name: Any, medium: Medium) -> BadInput | ModelUnavailable:
    """What to raise for a model whose pipeline is none of those for `medium`."""
    if medium_of_pipeline(class_name):
        return wrong_medium(name, medium)
    if reason := UNSUPPORTED_PIPELINES.get(class_name):
        return ModelUnavailable(
            f"{name} is a {class_name}, which is not supported: {reason}\n"
            "give a HunyuanVideoPipeline, which makes videos from text alone"
        )
    wanted = " or ".join(PIPELINES_OF_MEDIUM[medium])
    return ModelUnavailable(f"{name} is a {class_name}, which is not supported: give a folder or hub id of {wanted}")


def wrong_medium(name: str, medium: Medium) -> BadInput:
    """What to raise for a model that makes the other medium than `medium`."""
    other: Medium = "video" if medium == "image" else "image"
    names = ", ".join(KNOWN_MODELS[medium])
    return BadInput(f"{name} makes {other}s: use it with grat {other}; for {medium}s give --model one of {names}")


def _template(name: str, medium: Medium) -> ModelChoice:
    """The known model that another checkpoint is most likely kin to."""
    if medium == "video":
        return _HUNYUAN
    return _FLUX_SCHNELL if "schnell" in name.lower() else _FLUX_DEV


def _choose_file(name: str, path: Path, medium: Medium) -> ModelChoice:
    if path.suffix not in _SINGLE_FILE_SUFFIXES:
        raise ModelUnavailable(f"{name} is not a .safetensors file: other formats are not supported")
    if not path.is_file():
        raise ModelUnavailable(f"there is no file {name}: check the path, or use --model demo")
    template = _template(path.stem, medium)
    return replace(template, name=name, source=str(path), kind="file", reason="a file of that name")


def _choose_folder(name: str, path: Path, medium: Medium) -> ModelChoice:
    """A pipeline folder; the files in it tell how large its tokens are and how it takes guidance."""
    try:
        index = read_index(path / "model_index.json")
        if index.class_name not in PIPELINES_OF_MEDIUM[medium]:
            raise refusal_of_pipeline(name, index.class_name, medium)
        index.classes(name, medium)
        transformer, autoencoder = (
            _Traits.model_validate(read_json(path / part / "config.json")) for part in ("transformer", "vae")
        )
    except FileNotFoundError as error:
        raise ModelUnavailable(
            f"{name} is not a pipeline folder: {first_line(error)}\n"
            f"give a folder that a {PIPELINES_OF_MEDIUM[medium][0]} was saved to, or use --model demo"
        ) from None
    except (OSError, ValueError) as error:
        reason = validation_problem(error) if isinstance(error, ValidationError) else first_line(error)
        raise ModelUnavailable(
            f"{name} cannot be read ({reason}): get the folder again, or use --model demo"
        ) from error
    choice = _video_folder(transformer, autoencoder) if medium == "video" else _flux_folder(transformer, autoencoder)
    return replace(choice, name=name, source=str(path), kind="folder", reason="a folder of that name")


class _Traits(BaseModel):
    """What the configuration of a transformer or an autoencoder tells of tokens. Defaults are those of diffusers."""

    # AutoencoderTiny does not store its own block_out_channels.
    block_out_channels: _Blocks = None
    decoder_block_out_channels: _Blocks = None
    guidance_embeds: bool | None = None
    text_embed_dim: int = HUNYUAN_TEXT_CHANNELS
    spatial_compression_ratio: _Scale = 8
    temporal_compression_ratio: _Scale = 4
    patch_size: _Scale = 2


def _flux_folder(transformer: _Traits, autoencoder: _Traits) -> ModelChoice:
    blocks = autoencoder.block_out_channels or autoencoder.decoder_block_out_channels or [0] * 4
    token_side = 2 ** (len(blocks) - 1) * 2
    template = _DEMO if token_side == DEMO_TOKEN_SIDE else _FLUX_DEV if transformer.guidance_embeds else _FLUX_SCHNELL
    return replace(template, token_side=token_side, size_multiple=max(template.size_multiple, token_side))


def _video_folder(transformer: _Traits, autoencoder: _Traits) -> ModelChoice:
    """A pipeline with a small text encoder is taken for kin of the demo."""
    like_hunyuan = transformer.text_embed_dim == HUNYUAN_TEXT_CHANNELS
    # Its own scheduler's shift: a fine-tune may have another than HunyuanVideo.
    template = replace(_HUNYUAN, default_shift=None) if like_hunyuan else _DEMO_HUNYUAN
    assert template.video is not None
    token_side = autoencoder.spatial_compression_ratio * transformer.patch_size
    frames_per_latent = autoencoder.temporal_compression_ratio
    return replace(
        template,
        token_side=token_side,
        size_multiple=max(template.size_multiple, token_side),
        true_guidance=transformer.guidance_embeds is False,
        video=replace(template.video, frames_per_latent=frames_per_latent),
    )
