"""LoRAs in pipelines of each family: what stock diffusers makes of the same files, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lora_files
import pytest
import tiny_flux
import tiny_flux2
import tiny_hunyuan
import tiny_qwen
import tiny_wan
import torch
from diffusers.pipelines.flux.pipeline_flux_fill import FluxFillPipeline
from lora_files import diffusers_layout, layers_of, other_layout, write

import grat_cli
from grat_cli.errors import BadInput, ModelUnavailable
from grat_cli.models.catalogue import choose_model
from grat_cli.models.lora_layers import AppliedLora, apply_loras
from grat_cli.models.weights import Lora, Weights
from grat_cli.presets import Preset

# Two computations of one fp32 denoising, whose LoRA is added at another place or in another order.
RELATIVE = 2e-5


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Case:
    """A family, how its pipeline is called, and layers of its original by the layouts that diffusers reads.

    Attributes:
        build: makes the pipeline, always the same.
        model: a name of the family.
        arguments: of a call.
        size: of it.
        group: of its tokens.
        layouts: tensors of a LoRA.
    """

    build: Callable[[], Any]
    model: str
    arguments: Callable[[], Mapping[str, Any]]
    size: Mapping[str, int]
    group: tuple[int, ...]
    layouts: Mapping[str, Callable[[Any], lora_files.Tensors]]

    @property
    def choice(self) -> Any:
        return choose_model(self.model, "video" if len(self.group) == 3 else "image")

    def call(self, pipe: Any) -> torch.Tensor:
        made = pipe(
            **self.arguments(),
            **self.size,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        )
        return made.frames if hasattr(made, "frames") else made.images

    def preset(self, variant: str = "full", **attention: Any) -> Preset:
        return Preset.model_validate(
            {
                "name": "test",
                "model": self.choice.presets,
                "attention": {"variant": variant, "group": list(self.group), **attention},
                "kernel": {"backend": "sdpa"},
            }
        )

    def installed(self, pipe: Any, preset: Preset | None = None, **options: Any) -> torch.Tensor:
        with grat_cli.install(pipe, preset or self.preset(), **self.size, **options):
            return self.call(pipe)


def own_layout(pipe: Any) -> lora_files.Tensors:
    """Of every linear layer of the transformer."""
    return diffusers_layout(layers_of(pipe.transformer))


def kohya_flux(pipe: Any) -> lora_files.Tensors:
    layers = {
        "double_blocks_0_img_attn_qkv": (32, 96),
        "double_blocks_0_txt_attn_qkv": (32, 96),
        "double_blocks_0_txt_mlp_2": (128, 32),
        "double_blocks_0_img_mod_lin": (32, 192),
        "single_blocks_0_modulation_lin": (32, 96),
        "single_blocks_1_linear2": (160, 32),
    }
    return other_layout(layers, "lora_unet_", alpha=6.0)


def xlabs_flux(pipe: Any) -> lora_files.Tensors:
    layers = {
        "double_blocks.0.processor.qkv_lora1": (32, 96),
        "double_blocks.0.processor.proj_lora2": (32, 32),
        "single_blocks.1.processor.qkv_lora": (32, 96),
    }
    return other_layout(layers, "", ("down", "up"))


FLUX2_LAYERS = {
    "double_blocks{}0{}img_attn{}qkv": (32, 96),
    "double_blocks{}0{}txt_mlp{}2": (96, 32),
    "single_blocks{}1{}linear1": (32, 288),
    "single_blocks{}0{}linear2": (128, 32),
}


def named(layers: Mapping[str, tuple[int, int]], mark: str) -> dict[str, tuple[int, int]]:
    return {name.replace("{}", mark): widths for name, widths in layers.items()}


WAN_LAYERS = {
    f"blocks{{}}{block}{{}}{name}": widths
    for block in range(2)
    for name, widths in {
        **{f"{attention}_attn{{}}{one}": (24, 24) for attention in ("self", "cross") for one in "qkvo"},
        "ffn{}0": (24, 32),
        "ffn{}2": (32, 24),
    }.items()
}


def hunyuan_original(pipe: Any) -> lora_files.Tensors:
    layers = {"double_blocks.0.img_attn_qkv": (32, 96), "double_blocks.0.txt_mlp.fc1": (32, 128)}
    return other_layout(layers, "transformer.", ("lora_A", "lora_B"))


QWEN_LAYERS = {"transformer_blocks{}1{}attn{}to_q": (32, 32), "transformer_blocks{}0{}img_mlp{}net{}2": (128, 32)}
WAN: dict[str, Callable[[Any], lora_files.Tensors]] = {
    "diffusers": own_layout,
    "kohya": lambda pipe: other_layout(named(WAN_LAYERS, "_"), "lora_unet_", alpha=2.0),
    "original": lambda pipe: other_layout(named(WAN_LAYERS, "."), "diffusion_model.", ("lora_A", "lora_B")),
}
CASES = {
    "flux": Case(
        tiny_flux.pipeline,
        "flux-dev",
        tiny_flux.prompt,
        {"height": 144, "width": 208},
        (4, 4),
        {"diffusers": own_layout, "kohya": kohya_flux, "original": xlabs_flux},
    ),
    "flux2": Case(
        tiny_flux2.pipeline,
        "flux2-klein-4b",
        lambda: {**tiny_flux2.prompt(), "guidance_scale": 1.0},
        {"height": 144, "width": 208},
        (4, 4),
        {
            "diffusers": own_layout,
            "kohya": lambda pipe: other_layout(named(FLUX2_LAYERS, "_"), "lora_unet_", alpha=6.0),
            "original": lambda pipe: other_layout(
                named(FLUX2_LAYERS, "."), "diffusion_model.", ("lora_A", "lora_B")
            ),
        },
    ),
    "qwen": Case(
        tiny_qwen.pipeline,
        "qwen-image",
        lambda: {**tiny_qwen.prompt(7), "true_cfg_scale": 1.0},
        {"height": 144, "width": 208},
        (4, 4),
        {
            "diffusers": own_layout,
            "kohya": lambda pipe: other_layout(named(QWEN_LAYERS, "_"), "lora_unet_", alpha=6.0),
            "original": lambda pipe: other_layout(
                named(QWEN_LAYERS, "."), "diffusion_model.", ("lora_A", "lora_B"), alpha=6.0
            ),
        },
    ),
    "wan": Case(
        tiny_wan.pipeline,
        "wan2.1-1.3b",
        lambda: {"prompt": "snow", "guidance_scale": 1.0, "max_sequence_length": 16},
        {"height": 48, "width": 80, "num_frames": 13},
        (2, 3, 3),
        WAN,
    ),
    "hunyuan": Case(
        tiny_hunyuan.pipeline,
        "hunyuan",
        lambda: {"prompt": "waves at night", "max_sequence_length": 16},
        {"height": 80, "width": 112, "num_frames": 13},
        (2, 3, 3),
        {"diffusers": own_layout, "original": hunyuan_original},
    ),
}


@pytest.fixture(scope="module")
def built() -> Callable[[str], Any]:
    """A pipeline of a family, to be changed at will."""
    made: dict[str, Any] = {}

    def build(family: str) -> Any:
        if family not in made:
            made[family] = CASES[family].build()
        return copy.deepcopy(made[family])

    return build


def apply(pipe: Any, model: Any, *loras: Path | Lora, fuse: bool = False) -> tuple[AppliedLora, ...]:
    asked = tuple(lora if isinstance(lora, Lora) else Lora(source=str(lora)) for lora in loras)
    return apply_loras(pipe, model, Weights(loras=asked, fuse_loras=fuse))


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("family", "layout"), [(family, layout) for family, case in CASES.items() for layout in case.layouts]
)
def test_each_layout_works_as_in_stock_diffusers(
    family: str, layout: str, built: Callable[[str], Any], tmp_path: Path
) -> None:
    case, stock, ours = CASES[family], built(family), built(family)
    file = write(tmp_path / "a.safetensors", case.layouts[layout](stock))
    plain = case.call(stock)
    stock.load_lora_weights(str(file), use_safetensors=True)
    (applied,) = apply(ours, case.choice, file)
    expected = case.call(stock)
    assert applied.left_out == 0
    assert applied.layers >= 2
    assert difference(expected, plain) > 0.01
    assert difference(case.installed(ours), expected) < RELATIVE
    assert difference(case.installed(ours, chunk_tokens=256), expected) < RELATIVE
    if layout == "diffusers":
        fused = built(family)
        apply(fused, case.choice, file, fuse=True)
        assert not any("lora" in name for name, _ in fused.transformer.named_modules())
        assert difference(case.installed(fused), expected) < RELATIVE
        sparse = case.preset("b", radius=0)
        assert 0.001 < difference(case.installed(ours, sparse), expected)
        assert difference(case.installed(ours, sparse), case.installed(fused, sparse)) < RELATIVE
