"""Shapes of the parts of a pipeline, known or read from a folder's files, for planning without loading any."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grat_cli.errors import ModelUnavailable, first_line
from grat_cli.files.tensors import LONGEST_HEADER
from grat_cli.models.catalogue import ModelChoice
from grat_cli.models.parts import read_json


@dataclass(frozen=True)
class TransformerShape:
    """A `FluxTransformer2DModel` or `HunyuanVideoTransformer3DModel`, by the fields of its configuration.

    Attributes:
        family: which of the two.
        heads: attention heads.
        head_dim: channels per head.
        double_blocks: blocks where text and image have weights of their own.
        single_blocks: blocks where they share them.
        in_channels: of an image token; of HunyuanVideo's latents, four of which make a token.
        text_channels: of a text token as the text encoder makes it.
        pooled_channels: of the pooled text.
        guidance_embeds: whether guidance is an input.
        refiner_blocks: of HunyuanVideo, blocks that see text alone.
    """

    family: Literal["flux", "hunyuan"]
    heads: int
    head_dim: int
    double_blocks: int
    single_blocks: int
    in_channels: int
    text_channels: int
    pooled_channels: int
    guidance_embeds: bool
    refiner_blocks: int = 0

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return self.heads * self.head_dim

    @property
    def token_channels(self) -> int:
        """Numbers that a token of latents holds."""
        return self.in_channels if self.family == "flux" else 4 * self.in_channels

    @property
    def double_parameters(self) -> int:
        """Weights of a double block: for text and image each 12 matrices, modulation by 6 vectors, norms of heads."""
        width = self.width
        return 2 * (18 * width**2 + 15 * width + 2 * self.head_dim)

    @property
    def single_parameters(self) -> int:
        """Weights of a single block: 12 matrices, modulation by 3 vectors, norms of heads."""
        width = self.width
        return 15 * width**2 + 11 * width + 2 * self.head_dim

    @property
    def parameters(self) -> int:
        """All weights."""
        return (
            self.double_blocks * self.double_parameters
            + self.single_blocks * self.single_parameters
            + self.other_parameters
        )

    @property
    def other_parameters(self) -> int:
        """Weights outside the blocks: of inputs, time, guidance, pooled text, output, and of the refiner."""
        width, token = self.width, self.token_channels
        embedder = 256 * width + width + width**2 + width  # timesteps and guidance come as 256 sines and cosines
        pooled = self.pooled_channels * width + width + width**2 + width
        total = (1 + self.guidance_embeds) * embedder + pooled
        total += (token * width + width) + (2 * width**2 + 2 * width) + (width * token + token)
        if self.family == "flux":
            return total + self.text_channels * width + width
        total += self.text_channels * width + width
        total += embedder + self.text_channels * width + width + width**2 + width
        return total + self.refiner_blocks * (14 * width**2 + 15 * width)


@dataclass(frozen=True)
class AutoencoderShape:
    """An autoencoder.

    Attributes:
        kind: `kl` is AutoencoderKL, `tiny` AutoencoderTiny, `video` AutoencoderKLHunyuanVideo.
        channels: of its levels, finest first.
        layers: residual blocks of each of the decoder's levels, finest first.
        latent_channels: of the latents.
        parameters: all weights.
        attention: whether its middle attends.
    """

    kind: Literal["kl", "tiny", "video"]
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    latent_channels: int
    parameters: int
    attention: bool

    @property
    def scale(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TextEncoderShape:
    """A text encoder.

    Attributes:
        parameters: all weights.
        layers: blocks of attention and feed-forward.
        width: channels of a token.
        feed_forward: channels inside its feed-forward layers.
        heads: attention heads.
        tokens: length that prompts are padded to.
    """

    parameters: int
    layers: int
    width: int
    feed_forward: int
    heads: int
    tokens: int


@dataclass(frozen=True)
class Components:
    """The parts of a pipeline that hold weights."""

    text_encoders: tuple[TextEncoderShape, ...]
    transformer: TransformerShape
    autoencoder: AutoencoderShape

    @property
    def text_parameters(self) -> int:
        """Weights of all text encoders."""
        return sum(encoder.parameters for encoder in self.text_encoders)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.text_parameters + self.transformer.parameters + self.autoencoder.parameters


# Configurations as published on the hub: black-forest-labs/FLUX.1-dev and FLUX.1-schnell, and
# hunyuanvideo-community/HunyuanVideo, files {transformer,vae,text_encoder,text_encoder_2}/config.json. Numbers of
# weights of encoders and autoencoders are those of the classes with these configurations.
_CLIP_L = TextEncoderShape(123_060_480, 12, 768, 3072, 12, 77)
_T5_XXL = TextEncoderShape(4_762_310_656, 24, 4096, 10240, 64, 512)
_LLAMA_8B = TextEncoderShape(7_505_186_816, 32, 4096, 14336, 32, 351)
_FLUX_AUTOENCODER = AutoencoderShape("kl", (128, 256, 512, 512), (3, 3, 3, 3), 16, 83_819_683, attention=True)
_VIDEO_AUTOENCODER = AutoencoderShape("video", (128, 256, 512, 512), (3, 3, 3, 3), 16, 246_478_803, attention=True)
_COMPONENTS: Mapping[str, Components] = {
    "flux-dev": Components(
        (_CLIP_L, _T5_XXL), TransformerShape("flux", 24, 128, 19, 38, 64, 4096, 768, True), _FLUX_AUTOENCODER
    ),
    "flux-schnell": Components(
        (_CLIP_L, _T5_XXL), TransformerShape("flux", 24, 128, 19, 38, 64, 4096, 768, False), _FLUX_AUTOENCODER
    ),
    "hunyuan": Components(
        (_LLAMA_8B, _CLIP_L), TransformerShape("hunyuan", 24, 128, 20, 40, 16, 4096, 768, True, 2), _VIDEO_AUTOENCODER
    ),
}
_KINDS: Mapping[str, Literal["kl", "tiny", "video"]] = {
    "AutoencoderKL": "kl",
    "AutoencoderTiny": "tiny",
    "AutoencoderKLHunyuanVideo": "video",
}


def components_of(choice: ModelChoice) -> Components:
    """The parts of a chosen model: of a folder as its files say, else those of its kin.

    Raises:
        ModelUnavailable: if a folder lacks the configuration or the weights of a part, or they are damaged.
    """
    if choice.kind != "folder":
        if choice.name in _COMPONENTS:
            return _COMPONENTS[choice.name]
        return _COMPONENTS[
            "hunyuan" if choice.medium == "video" else "flux-dev" if choice.default_guidance else "flux-schnell"
        ]
    folder = Path(choice.source)
    try:
        encoders = [_text_encoder(part, choice) for part in sorted(folder.glob("text_encoder*")) if part.is_dir()]
        transformer = transformer_shape(read_json(folder / "transformer" / "config.json"))
        return Components(tuple(encoders), transformer, _autoencoder(folder / "vae"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelUnavailable(
            f"{choice.name} is incomplete: in {folder} a configuration or weights are missing or damaged "
            f"({first_line(error)})\n"
            + ("install grat again, or choose another --model" if choice.name == "demo" else "get the folder again")
        ) from error


def transformer_shape(config: Mapping[str, Any]) -> TransformerShape:
    """The shape of a transformer of diffusers from its configuration."""
    common = {
        "heads": int(config["num_attention_heads"]),
        "head_dim": int(config["attention_head_dim"]),
        "double_blocks": int(config["num_layers"]),
        "single_blocks": int(config["num_single_layers"]),
        "in_channels": int(config["in_channels"]),
        "pooled_channels": int(config["pooled_projection_dim"]),
        "guidance_embeds": bool(config["guidance_embeds"]),
    }
    if config.get("_class_name") == "HunyuanVideoTransformer3DModel":
        refiners = int(config["num_refiner_layers"])
        return TransformerShape(
            "hunyuan", **common, text_channels=int(config["text_embed_dim"]), refiner_blocks=refiners
        )
    return TransformerShape("flux", **common, text_channels=int(config["joint_attention_dim"]))


def _autoencoder(folder: Path) -> AutoencoderShape:
    config = read_json(folder / "config.json")
    kind = _KINDS[config["_class_name"]]
    parameters, latent_channels = stored_parameters(folder), int(config["latent_channels"])
    if kind == "tiny":
        # Its decoder's lists begin with the coarsest level.
        channels = tuple(int(count) for count in reversed(config["decoder_block_out_channels"]))
        layers = tuple(int(count) for count in reversed(config["num_decoder_blocks"]))
        return AutoencoderShape(kind, channels, layers, latent_channels, parameters, attention=False)
    channels = tuple(int(count) for count in config["block_out_channels"])
    layers = (int(config["layers_per_block"]) + 1,) * len(channels)
    attention = bool(config.get("mid_block_add_attention", True))
    return AutoencoderShape(kind, channels, layers, latent_channels, parameters, attention)


def _text_encoder(folder: Path, choice: ModelChoice) -> TextEncoderShape:
    config = read_json(folder / "config.json")

    def value(*names: str) -> int:
        return next(int(config[name]) for name in names if name in config)

    # CLIP takes as many tokens as it has positions; the other one what the model was trained for.
    is_clip = config.get("model_type") == "clip_text_model"
    return TextEncoderShape(
        stored_parameters(folder),
        layers=value("num_layers", "num_hidden_layers"),
        width=value("d_model", "hidden_size"),
        feed_forward=value("d_ff", "intermediate_size"),
        heads=value("num_heads", "num_attention_heads"),
        tokens=value("max_position_embeddings") if is_clip else choice.text_tokens,
    )


def stored_parameters(folder: Path) -> int:
    """Numbers in the `.safetensors` files of a folder, from their headers.

    Raises:
        OSError: if there are none, or they cannot be read.
        ValueError: if a header is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    return sum(_elements(path) for path in files)


def _elements(path: Path) -> int:
    """Numbers in a file: its first 8 bytes are the length of a JSON header (huggingface/safetensors, README)."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(LONGEST_HEADER, os.fstat(file.fileno()).st_size - 8):
            raise ValueError(f"{path} is cut off")
        header = json.loads(file.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
