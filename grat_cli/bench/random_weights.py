"""Transformers of real size without a download: diffusers' own classes, their published configurations, random weights.

How long a step takes does not depend on what the weights are, only on their number and on values being ordinary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, choices
from grat_cli.families import family_of, family_of_class
from grat_cli.models.catalogue import KNOWN_MODELS
from grat_kernels import Grid

if TYPE_CHECKING:
    import torch

    from grat_cli.families.base import ModelChoice

# Models whose steps can be measured; of two by one name the picture model.
STEP_MODELS: Mapping[str, ModelChoice] = {**KNOWN_MODELS["video"], **KNOWN_MODELS["image"]}


def step_model(name: str) -> ModelChoice:
    """The model of a name, one of `STEP_MODELS`.

    Raises:
        BadInput: if there is none.
    """
    if name not in STEP_MODELS:
        raise BadInput(f"there is no step to measure of model {name!r}: {choices(name, STEP_MODELS)}")
    return STEP_MODELS[name]


def transformer_config(
    model: ModelChoice, layers: tuple[int, ...] | None = None, weights: str = "random"
) -> dict[str, Any]:
    """The configuration of a model's transformer.

    Args:
        model: which.
        layers: blocks of each kind in place of the model's own numbers.
        weights: `own` or `random`: what it will be filled with.

    Raises:
        BadInput: if the model's own weights are not bundled or have other layers, or a number of blocks is not
            possible.
    """
    if weights == "own" and (not model.is_demo or layers is not None):
        raise BadInput(
            f"--layers changes {model.name}, whose own weights do not fit then: add --weights random"
            if model.is_demo
            else f"no weights of {model.name} are bundled: use --weights random, a step takes as long with them"
        )
    family = family_of(model)
    config = family.transformer_config(model)
    if layers is None:
        return config
    blocks = family.transformer_shape(config).blocks
    most = tuple(blocks.values())
    fits = len(layers) == len(most) and min(layers) >= 0 and sum(layers) > 0
    if not fits or any(wanted > has for wanted, has in zip(layers, most, strict=True)):
        kinds = " and ".join(f"{has} {name.removesuffix('blocks').rstrip('_')}".strip() for name, has in blocks.items())
        raise BadInput(
            f"--layers {','.join(map(str, layers))}: {model.name} has up to {kinds} blocks, "
            f"and needs one: try --layers {','.join('1' * len(most))}"
        )
    return family.with_blocks(config, layers)


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
    for name, module in family_of_class(config["_class_name"]).fresh_modules(config).items():
        model.set_submodule(name, module.to(device))
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                inputs = parameter[0].numel()
                parameter.normal_(0, inputs**-0.5, generator=generator)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)
    return model.eval().requires_grad_(False)


def own_transformer(model: ModelChoice, device: torch.device | str, dtype: torch.dtype) -> torch.nn.Module:
    """The transformer of a model whose weights are bundled."""
    loader = family_of(model).transformer_class()
    transformer = loader.from_pretrained(model.source, subfolder="transformer", dtype=dtype, local_files_only=True)
    return transformer.to(device).eval().requires_grad_(False)


def _hollow(config: Mapping[str, Any]) -> torch.nn.Module:
    """The transformer of a configuration, with shapes in place of weights."""
    import torch

    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        model: torch.nn.Module = family_of_class(config["_class_name"]).transformer_class()(**arguments)
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

    family = family_of_class(config["_class_name"])
    return {"return_dict": False, **family.step_inputs(config, Grid(grid), text_len, normal)}
