"""Shapes of the parts of a pipeline, known or read from a folder's files, for planning without loading any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from grat_cli.errors import ModelUnavailable, first_line
from grat_cli.families import family_of
from grat_cli.families.autoencoders import AutoencoderShape
from grat_cli.families.base import ModelChoice
from grat_cli.families.shapes import Components, TextEncoderShape, TransformerShape
from grat_cli.files.json_objects import read_json
from grat_cli.files.weight_headers import read_header
from grat_cli.models import lora as loras
from grat_cli.models.catalogue import is_known
from grat_cli.models.quantization import quantization_of
from grat_cli.models.single_file import without_prefix
from grat_cli.models.weights import Weights

# Scales, and what else a file may hold beside weights, as a share of these.
_STRAY = 0.02
_ENCODERS = ("text_encoder*", "image_encoder")


def components_of(choice: ModelChoice, parameters: Mapping[str, int] | None = None) -> Components:
    """The parts of a chosen model: of a folder as its files say, else those of its kin.

    Args:
        choice: which.
        parameters: weights of each part of a folder that holds its configurations alone; None for one that has them.

    Raises:
        ModelUnavailable: if a folder lacks the configuration or the weights of a part, or they are damaged.
    """
    transformer, autoencoder = denoising_shapes(choice)
    stays = _bytes_that_stay(choice, transformer) if choice.kind == "file" else None
    if (folder := choice.folder) is None:
        encoders = family_of(choice).text_encoders_of(choice)
        return Components(encoders, transformer, autoencoder, choice.transformers, stays)
    with _damage_of(choice):
        encoders = [part for kind in _ENCODERS for part in sorted(folder.glob(kind)) if part.is_dir()]
        encoders = [part for part in encoders if part.name not in family_of(choice).not_loaded]

        def count(part: Path) -> int:
            return stored_parameters(part) if parameters is None else parameters[part.name]

        return Components(
            tuple(_text_encoder(read_json(part / "config.json"), count(part), choice) for part in encoders),
            transformer,
            replace(autoencoder, parameters=count(folder / "vae")),
            choice.transformers,
            stays,
        )


def with_loras(components: Components, weights: Weights) -> Components:
    """The parts with the LoRAs beside them that are in files: of those of the hub nothing is known beforehand.

    Raises:
        ModelUnavailable, BadInput: if one is damaged, or none.
    """
    added = 0
    for lora in weights.loras:
        if lora.kind == "file" and not weights.fuse_loras:
            loras.read_header(Path(lora.source), loras.own_name(lora))  # refuses what is none
            added += read_header(Path(lora.source)).numbers * (2 if lora.noise == "both" else 1)
    return replace(components, added=added)


def denoising_shapes(choice: ModelChoice) -> tuple[TransformerShape, AutoencoderShape]:
    """Transformer and autoencoder of a chosen model as their configurations say, which need no weights beside them.

    The number of weights of a folder's autoencoder, which its configuration does not tell, is 0.

    Raises:
        ModelUnavailable: if a folder lacks the configuration of a part, or it is damaged.
    """
    family = family_of(choice)
    with _damage_of(choice):
        transformer = family.transformer_shape(family.transformer_config(choice))
        if choice.folder is None:
            return transformer, family.autoencoder_of(choice)
        return transformer, family.autoencoder_shape(read_json(choice.folder / "vae" / "config.json"))


def components_of_pipeline(pipe: Any, choice: ModelChoice) -> Components:
    """The parts of a loaded pipeline of a chosen model."""
    stays = None
    if quantization_of(pipe.transformer) == "gguf":
        stays = sum(weight.numel() * weight.element_size() for weight in pipe.transformer.parameters())
    encoders = [
        part for kind in _ENCODERS for name, part in pipe.components.items() if fnmatch(name, kind) and part is not None
    ]
    autoencoder = {**pipe.vae.config, "_class_name": type(pipe.vae).__name__}
    return Components(
        tuple(_text_encoder(part.config.to_dict(), part.num_parameters(), choice) for part in encoders),
        family_of(choice).transformer_shape(pipe.transformer.config),
        family_of(choice).autoencoder_shape(autoencoder, pipe.vae.num_parameters()),
        len(family_of(choice).transformers(pipe)),
        stays,
    )


def _bytes_that_stay(choice: ModelChoice, transformer: TransformerShape) -> int | None:
    """Bytes of the weights of a file that stay as they are stored, which those of GGUF do; None for all others."""
    path = Path(choice.source)
    with _damage_of(choice):
        header = read_header(path)
        tensors = without_prefix(header.tensors)
        held = sum(tensor.numbers for tensor in tensors.values())
        if abs(held - transformer.parameters) > _STRAY * transformer.parameters:
            raise ValueError(
                f"it holds {held:,} weights, and a transformer of {family_of(choice).title} of its shape has "
                f"{transformer.parameters:,}"
            )
        return sum(tensor.bytes for tensor in tensors.values()) if header.format == "gguf" else None


@contextmanager
def _damage_of(choice: ModelChoice) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if choice.kind == "file":
            raise ModelUnavailable(
                f"{choice.name} is damaged, or holds no transformer that is known ({first_line(error)}): "
                "get the file again, or plan for the model that it was made from"
            ) from error
        raise ModelUnavailable(
            f"{choice.name} is incomplete: in {choice.source} a configuration or weights are missing or damaged "
            f"({first_line(error)})\n"
            + ("install grat again, or choose another --model" if is_known(choice) else "get the folder again")
        ) from error


def _text_encoder(config: Mapping[str, Any], parameters: int, choice: ModelChoice) -> TextEncoderShape:
    # Encoders of text and pictures describe the one that makes the text's embeddings apart.
    config = {**config, **(config.get("text_config") or {})}

    def value(*names: str) -> int:
        return next(int(config[name]) for name in names if name in config)

    # CLIP takes as many tokens as it has positions, or patches of a picture and one; the others what the model was
    # trained for.
    tokens, of_pictures = choice.text_tokens, config.get("model_type") == "clip_vision_model"
    if config.get("model_type") == "clip_text_model":
        tokens = value("max_position_embeddings")
    elif of_pictures:
        tokens = (value("image_size") // value("patch_size")) ** 2 + 1
    return TextEncoderShape(
        parameters,
        layers=value("num_layers", "num_hidden_layers"),
        width=value("d_model", "hidden_size"),
        feed_forward=value("d_ff", "intermediate_size"),
        heads=value("num_heads", "num_attention_heads"),
        tokens=tokens,
        vocabulary=int(config.get("vocab_size", 0)),
        of_pictures=of_pictures,
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
    return sum(read_header(path).numbers for path in files)
