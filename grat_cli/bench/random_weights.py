"""Transformers of real size without a download: diffusers' own classes, their published configurations, random weights.

How long a step takes does not depend on what the weights are, only on their number and on values being ordinary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import BadInput, choices

if TYPE_CHECKING:
    import torch

Family = Literal["flux", "hunyuan"]


@dataclass(frozen=True)
class StepModel:
    """A transformer whose steps can be measured.

    Attributes:
        name: as typed.
        family: which inputs and which adapter it takes.
        config: file with the configuration of its transformer.
        text_tokens: text tokens of the joint sequence.
        default_grids: image tokens per axis where nothing else is asked for.
        pixels_per_token: pixels and frames that a token stands for, by axis.
        bundled: whether its own weights lie beside its configuration.
    """

    name: str
    family: Family
    config: Path
    text_tokens: int
    default_grids: tuple[tuple[int, ...], ...]
    pixels_per_token: tuple[int, ...]
    bundled: bool = False

    @property
    def axes(self) -> int:
        """Axes of the token grid."""
        return len(self.pixels_per_token)


def _bundled(name: str) -> Path:
    return Path(__file__).resolve().parent / "configs" / f"{name}.json"


_LARGE_PICTURES = ((128, 128), (256, 256))
# 720p with 129 frames; HunyuanVideo takes up to 256 tokens of text.
_VIDEO = ((33, 45, 80),)
STEP_MODELS: Mapping[str, StepModel] = {
    model.name: model
    for model in (
        StepModel(
            "demo",
            "flux",
            DEMO_FLUX.path / "transformer" / "config.json",
            DEMO_FLUX.text_tokens,
            ((64, 64), (128, 128)),
            (8, 8),
            bundled=True,
        ),
        StepModel("flux-dev", "flux", _bundled("flux-dev"), 512, _LARGE_PICTURES, (16, 16)),
        StepModel("flux-schnell", "flux", _bundled("flux-schnell"), 256, _LARGE_PICTURES, (16, 16)),
        StepModel("hunyuan", "hunyuan", _bundled("hunyuan"), 256, _VIDEO, (4, 16, 16)),
    )
}


def step_model(name: str) -> StepModel:
    """The step model of a name.

    Raises:
        BadInput: if there is none.
    """
    if name not in STEP_MODELS:
        raise BadInput(f"there is no step to measure of model {name!r}: {choices(name, STEP_MODELS)}")
    return STEP_MODELS[name]


def transformer_config(
    model: StepModel, layers: tuple[int, int] | None = None, weights: str = "random"
) -> dict[str, Any]:
    """The configuration of a model's transformer.

    Args:
        model: which.
        layers: double and single blocks in place of the model's own numbers.
        weights: `own` or `random`: what it will be filled with.

    Raises:
        BadInput: if the model's own weights are not bundled or have other layers, or a number of blocks is not
            possible.
    """
    if weights == "own" and (not model.bundled or layers is not None):
        raise BadInput(
            f"--layers changes {model.name}, whose own weights do not fit then: add --weights random"
            if model.bundled
            else f"no weights of {model.name} are bundled: use --weights random, a step takes as long with them"
        )
    config: dict[str, Any] = json.loads(model.config.read_text())
    if layers is None:
        return config
    most = config["num_layers"], config["num_single_layers"]
    if min(layers) < 0 or sum(layers) < 1 or layers[0] > most[0] or layers[1] > most[1]:
        raise BadInput(
            f"--layers {layers[0]},{layers[1]}: {model.name} has up to {most[0]} double and {most[1]} single blocks, "
            "and needs one: try --layers 1,1"
        )
    return config | {"num_layers": layers[0], "num_single_layers": layers[1]}


def parameter_count(config: Mapping[str, Any]) -> int:
    """Weights of a transformer, without making any."""
    return sum(parameter.numel() for parameter in _hollow(config).parameters())


def random_transformer(
    config: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> torch.nn.Module:
    """A transformer with random weights, made where and as it is used, so that it never takes memory twice.

    Matrices are normal with a variance of 1 / inputs, so that activations keep their size from layer to layer; biases
    are 0 and the scales of norms 1.

    Args:
        config: of `transformer_config`.
        device: where it is made.
        dtype: of its weights.
        seed: the same one gives the same weights on the same kind of device.
    """
    import torch

    # Not diffusers' own `to`, which warns of parts to be kept in fp32 though there are none.
    model = torch.nn.Module.to(_hollow(config), dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                inputs = parameter[0].numel()
                parameter.normal_(0, inputs**-0.5, generator=generator)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)
    return model.eval().requires_grad_(False)


def own_transformer(model: StepModel, device: torch.device | str, dtype: torch.dtype) -> torch.nn.Module:
    """The transformer of a model whose weights are bundled."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    loader: Any = FluxTransformer2DModel
    transformer = loader.from_pretrained(model.config.parent, dtype=dtype, local_files_only=True)
    return transformer.to(device).eval().requires_grad_(False)


def _hollow(config: Mapping[str, Any]) -> torch.nn.Module:
    """The transformer of a configuration, with shapes in place of weights."""
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

    classes: dict[str, Any] = {kind.__name__: kind for kind in (FluxTransformer2DModel, HunyuanVideoTransformer3DModel)}
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        model: torch.nn.Module = classes[config["_class_name"]](**arguments)
    # To fill a buffer one would have to know what it holds.
    assert not list(model.buffers())
    return model


def step_inputs(
    config: Mapping[str, Any],
    grid: tuple[int, ...],
    text_len: int,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of one transformer call of one sample, latents and text drawn from a normal distribution.

    Args:
        config: of the transformer.
        grid: image tokens per axis: rows and columns, or frames, rows and columns.
        text_len: text tokens, all of them valid.
        device: where the tensors lie.
        dtype: of latents and text; positions are fp32.
        seed: of the drawing.
    """
    import torch

    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    inputs: dict[str, Any] = {"return_dict": False}
    pooled = normal(1, config["pooled_projection_dim"])
    if config["_class_name"] == "FluxTransformer2DModel":
        inputs |= {
            "hidden_states": normal(1, grid[0] * grid[1], config["in_channels"]),
            "encoder_hidden_states": normal(1, text_len, config["joint_attention_dim"]),
            "timestep": torch.full((1,), 0.7, device=device, dtype=dtype),
            "img_ids": _positions(grid).to(device),
            "txt_ids": torch.zeros(text_len, 3, device=device),
        }
    else:
        patch = config["patch_size_t"], config["patch_size"], config["patch_size"]
        latents = [tokens * size for tokens, size in zip(grid, patch, strict=True)]
        inputs |= {
            "hidden_states": normal(1, config["in_channels"], *latents),
            "encoder_hidden_states": normal(1, text_len, config["text_embed_dim"]),
            "encoder_attention_mask": torch.ones(1, text_len, device=device, dtype=torch.bool),
            "timestep": torch.full((1,), 700, device=device),
        }
    if config["guidance_embeds"]:
        # Flux takes the scale and multiplies it by 1000 itself; HunyuanVideo's pipeline multiplies it beforehand.
        scale = 3.5 if config["_class_name"] == "FluxTransformer2DModel" else 6000.0
        inputs["guidance"] = torch.full((1,), scale, device=device, dtype=dtype)
    return inputs | {"pooled_projections": pooled}


def _positions(grid: tuple[int, ...]) -> torch.Tensor:
    """Raster positions `[tokens, 3]` of a Flux picture: 0, row, column."""
    import torch

    row, column = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()
