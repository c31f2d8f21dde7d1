"""Which model a name means, and what is known of it before anything is downloaded. Imports no torch for a name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import ModelUnavailable, nearest

PIPELINE_CLASSES = ("FluxPipeline", "FluxImg2ImgPipeline")
DEMO_TOKEN_SIDE = 8
FLUX_TOKEN_SIDE = 16
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_SINGLE_FILE_SUFFIXES = (".safetensors", ".sft")


@dataclass(frozen=True)
class ModelChoice:
    """A model, and the settings it was trained for.

    Attributes:
        name: as typed, or as chosen where nothing was typed.
        source: hub id, folder, or file of a transformer alone.
        kind: which of these three.
        family: which presets are made for it.
        reason: why this model.
        native_side: height and width in pixels that it was trained at.
        token_side: pixels per side of an image token.
        size_multiple: heights and widths must be multiples of it.
        text_tokens: length that prompts are padded or cut to.
        default_steps: denoising steps that suit it.
        default_guidance: guidance that suits it, None where it takes none.
    """

    name: str
    source: str
    kind: Literal["hub", "folder", "file"]
    family: Literal["flux", "demo"]
    reason: str
    native_side: int = 1024
    token_side: int = FLUX_TOKEN_SIDE
    size_multiple: int = 16
    text_tokens: int = 512
    default_steps: int = 28
    default_guidance: float | None = 3.5


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
KNOWN_MODELS = {choice.name: choice for choice in (_DEMO, _FLUX_DEV, _FLUX_SCHNELL)}


def choose_model(name: str | None) -> ModelChoice:
    """The model that a name means: a known name, a folder, a `.safetensors` file, or a hub id `owner/name`.

    Without a name it is `flux-dev` where a CUDA device is present, else `demo`; only then torch is imported.

    Raises:
        ModelUnavailable: if the name means nothing, or a folder is not that of a Flux pipeline.
    """
    if name is None:
        import torch

        if torch.cuda.is_available():
            return replace(_FLUX_DEV, reason="a CUDA device is present")
        return replace(_DEMO, reason="no CUDA device is present")
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return _choose_folder(name, path)
    if path.suffix in _SINGLE_FILE_SUFFIXES or path.is_file():
        return _choose_file(name, path)
    if _HUB_ID.fullmatch(name):
        template = _FLUX_SCHNELL if "schnell" in name.lower() else _FLUX_DEV
        return replace(template, name=name, source=name, reason="hub id")
    closest = nearest(name, KNOWN_MODELS)
    hint = f"did you mean {closest}? " if closest else ""
    raise ModelUnavailable(
        f"no model, folder or file is named {name!r}: {hint}"
        f"known are {', '.join(KNOWN_MODELS)}, folders, .safetensors files, and hub ids such as owner/name"
    )


def _choose_file(name: str, path: Path) -> ModelChoice:
    if path.suffix not in _SINGLE_FILE_SUFFIXES:
        raise ModelUnavailable(f"{name} is not a .safetensors file: other formats are not supported")
    if not path.is_file():
        raise ModelUnavailable(f"there is no file {name}: check the path, or use --model demo")
    template = _FLUX_SCHNELL if "schnell" in path.stem.lower() else _FLUX_DEV
    return replace(template, name=name, source=str(path), kind="file", reason="a file of that name")


def _choose_folder(name: str, path: Path) -> ModelChoice:
    """A pipeline folder; the files in it tell how large its tokens are and how it takes guidance."""
    index = _read_json(path / "model_index.json", name)
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINE_CLASSES:
        raise ModelUnavailable(
            f"{name} is a {pipeline}, which is not supported: give a folder of {' or '.join(PIPELINE_CLASSES)}"
        )
    transformer = _read_json(path / "transformer" / "config.json", name)
    autoencoder = _read_json(path / "vae" / "config.json", name)
    # AutoencoderTiny does not store its own block_out_channels.
    blocks = autoencoder.get("block_out_channels") or autoencoder.get("decoder_block_out_channels") or [0] * 4
    token_side = 2 ** (len(blocks) - 1) * 2
    if token_side == DEMO_TOKEN_SIDE:
        template = _DEMO
    else:
        template = _FLUX_DEV if transformer.get("guidance_embeds") else _FLUX_SCHNELL
    return replace(
        template,
        name=name,
        source=str(path),
        kind="folder",
        reason="a folder of that name",
        token_side=token_side,
        size_multiple=max(template.size_multiple, token_side),
    )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelUnavailable(
            f"{name} is not a pipeline folder: {path} is missing\n"
            "give a folder that a FluxPipeline was saved to, or use --model demo"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} cannot be read ({error}): get the folder again, or use --model demo") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{path} is damaged: get the folder again, or use --model demo")
    return content
