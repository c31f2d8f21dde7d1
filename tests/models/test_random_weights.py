"""Transformers with random weights: real sizes on paper, tiny ones in fact."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from grat_cli.bench.random_weights import (
    STEP_MODELS,
    parameter_count,
    random_transformer,
    step_inputs,
    step_model,
    transformer_config,
)
from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import BadInput
from grat_cli.families import family_of

TINY: dict[str, dict[str, Any]] = {
    "flux": {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
        "axes_dims_rope": [4, 6, 6],
        "guidance_embeds": True,
    },
    "hunyuan": {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 24,
        "rope_axes_dim": [4, 6, 6],
        "guidance_embeds": True,
    },
}
GRIDS = {"flux": (6, 8), "hunyuan": (3, 4, 6)}


@pytest.mark.parametrize(
    ("name", "billions"),
    # The model cards: "12 billion parameter" (FLUX.1), "over 13 billion parameters" (HunyuanVideo; that of the
    # transformer alone is 12.8). The counts themselves are those of the published checkpoints' shapes.
    [("flux-dev", 11.90), ("flux-schnell", 11.89), ("flux-fill", 11.90), ("flux-depth", 11.90), ("hunyuan", 12.82)],
)
def test_real_configurations_have_the_published_number_of_weights(name: str, billions: float) -> None:
    assert parameter_count(transformer_config(step_model(name))) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "flux-fill", "flux-canny", "hunyuan"])
def test_bundled_configurations_leave_nothing_to_defaults(name: str) -> None:
    config = transformer_config(STEP_MODELS[name])
    kind = family_of(STEP_MODELS[name]).transformer_class()
    arguments = set(inspect.signature(kind).parameters) - {"out_channels"}  # of Flux: as many as go in
    assert arguments <= config.keys()
    assert config["num_attention_heads"] * config["attention_head_dim"] == 3072


def test_the_demo_has_the_configuration_of_its_checkpoint() -> None:
    model = step_model("demo")
    stored = sum(file.stat().st_size for file in (DEMO_FLUX.path / "transformer").glob("*.safetensors"))
    # Two bytes a weight, and a header.
    assert 2 * parameter_count(transformer_config(model)) == pytest.approx(stored, rel=0.01)


def test_fewer_layers() -> None:
    model = step_model("flux-dev")
    config = transformer_config(model, (2, 4))
    assert (config["num_layers"], config["num_single_layers"]) == (2, 4)
    per_block = parameter_count(transformer_config(model, (3, 4))) - parameter_count(config)
    assert 17 * per_block == parameter_count(transformer_config(model, (19, 4))) - parameter_count(config)
    for layers in [(0, 0), (20, 1), (1, 39), (-1, 1)]:
        with pytest.raises(BadInput, match="up to 19 double and 38 single"):
            transformer_config(model, layers)


def test_unknown_models_are_refused_with_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"'flux-dve'.*flux-dev"):
        step_model("flux-dve")


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_finite_and_of_ordinary_size(family: str, dtype: torch.dtype) -> None:
    config, grid = TINY[family], GRIDS[family]
    model = random_transformer(config, "cpu", dtype)
    inputs = step_inputs(config, grid, text_len=5, device="cpu", dtype=dtype)
    with torch.no_grad():
        result = model(**inputs)[0]
    assert result.shape == inputs["hidden_states"].shape
    assert result.dtype == dtype
    assert 0.1 < result.float().std() < 10


def test_a_seed_gives_the_same_weights_and_inputs() -> None:
    config, grid = TINY["flux"], GRIDS["flux"]
    first, again, other = (random_transformer(config, "cpu", torch.float32, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["proj_out.weight"], other["proj_out.weight"])
    inputs = [step_inputs(config, grid, 5, "cpu", torch.float32, seed)["hidden_states"] for seed in (0, 0, 1)]
    assert torch.equal(inputs[0], inputs[1])
    assert not torch.equal(inputs[0], inputs[2])


def test_weights_are_made_in_their_own_dtype_only() -> None:
    """A model of half the memory must never pass through fp32: weights of 12 billion parameters fit once."""
    config = TINY["flux"]
    made: list[torch.dtype] = []

    class Allocations(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type != "meta" and result.dim() > 1:
                made.append(result.dtype)
            return result

    with Allocations():
        random_transformer(config, "cpu", torch.bfloat16)
    assert set(made) == {torch.bfloat16}
