"""GRAT together with what else people use, cell by cell: small models of two picture and two video families.

`python -m combinations` prints the whole table.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import small_pictures
import tiny_flux
import tiny_flux2
import tiny_hunyuan
import tiny_hunyuan15
import tiny_qwen
import tiny_wan
import torch
from accelerate import cpu_offload

import grat_cli
from grat_cli.errors import BadInput
from grat_cli.families import family_of_transformer
from grat_cli.generation import run as generation
from grat_cli.models.loading import LoadedModel, load_model
from grat_cli.models.offloading import offload
from grat_cli.presets import Preset

STEPS = 6
# Two computations of one fp32 pass through a few layers, over so many steps of a chaotic little model.
EQUAL = 1e-4
# A cache that reuses what far attention gave may be off by as much as one that reuses what full attention gave, and by
# as much again as the two attentions differ.
SLACK = 3.0
FAR_APART = 40.0  # grey levels, mean: those of another picture are further apart
CPU = torch.device("cpu")
THRESHOLD = 1.0  # small random models move further from step to step than trained ones


# ---- Families


@dataclass(frozen=True)
class Model:
    """A small model of a family.

    Attributes:
        make: a pipeline of it, the same weights each time.
        size: of its outputs, as `install` takes it.
        text: arguments of its calls.
        group: tokens of a group.
        block: of summaries.
    """

    make: Callable[[], Any]
    size: Mapping[str, Any]
    text: Callable[[], dict[str, Any]]
    group: tuple[int, ...]
    block: tuple[int, ...]


def _wide_wan(kind: str = "text", **changes: Any) -> Any:
    return tiny_wan.pipeline(kind, transformer=_wide_wan_transformer(), **changes)


def _wide_wan_transformer(seed: int = 0) -> Any:
    # Rows of quantized matrices are cut into blocks of 32.
    return tiny_wan.transformer(seed, attention_head_dim=16, text_dim=16, freq_dim=32)


MODELS: Mapping[str, Model] = {
    "Flux": Model(tiny_flux.pipeline, {"height": 72, "width": 104}, tiny_flux.prompt, (4, 4), (2, 2)),
    "Qwen-Image": Model(tiny_qwen.pipeline, {"height": 144, "width": 176}, lambda: tiny_qwen.prompt(7), (4, 4), (2, 2)),
    "HunyuanVideo": Model(
        tiny_hunyuan.pipeline,
        {"height": 80, "width": 112, "num_frames": 13},
        lambda: {"prompt": "a cat walks"},
        (2, 2, 2),
        (1, 2, 2),
    ),
    "Wan": Model(
        _wide_wan,
        {"height": 80, "width": 112, "num_frames": 13},
        lambda: {"prompt": "a cat walks"},
        (2, 2, 2),
        (1, 2, 2),
    ),
}

# Whose attention is carried over steps besides.
CARRIED: Mapping[str, Model] = {
    **MODELS,
    "FLUX.2": Model(
        tiny_flux2.pipeline,
        {"height": 144, "width": 176},
        lambda: {**tiny_flux2.prompt(), "guidance_scale": 1.0},
        (4, 4),
        (2, 2),
    ),
    "HunyuanVideo-1.5": Model(
        tiny_hunyuan15.pipeline,
        {"height": 80, "width": 112, "num_frames": 13},
        lambda: {"prompt": "a cat walks"},
        (2, 2, 2),
        (1, 2, 2),
    ),
    "Wan A14B": Model(
        lambda: _wide_wan("two", transformer_2=_wide_wan_transformer(seed=1)),
        {"height": 80, "width": 112, "num_frames": 13},
        lambda: {"prompt": "a cat walks", "guidance_scale": 3.0},
        (2, 2, 2),
        (1, 2, 2),
    ),
}
GUIDED: Mapping[str, Callable[[], dict[str, Any]]] = {
    "Flux": lambda: {**tiny_flux.negative_prompt(), "true_cfg_scale": 2.0},
    "Qwen-Image": lambda: {**tiny_qwen.negative_prompt(5), "true_cfg_scale": 2.0},
    "HunyuanVideo": lambda: {"negative_prompt": "a boat", "true_cfg_scale": 2.0},
    "Wan": lambda: {"negative_prompt": "a boat", "guidance_scale": 3.0},
    "FLUX.2": lambda: {"guidance_scale": 3.0, **tiny_flux2.negative_prompt()},
}


def latents_of(pipe: Any, model: Model, **arguments: Any) -> torch.Tensor:
    """What a call gives, the same noise each time."""
    asked = {**model.text(), **model.size, "generator": torch.Generator().manual_seed(5), **arguments}
    with torch.no_grad():
        output = pipe(**asked, num_inference_steps=STEPS, output_type="latent")
    return output[0] if isinstance(output[0], torch.Tensor) else torch.as_tensor(np.stack(output[0]))


# ---- Attention

Attention = Literal["full", "far", "far with guard", "over steps"]
ATTENTIONS: tuple[Attention, ...] = ("full", "far", "far with guard")


def preset_of(name: str, attention: Attention) -> Preset:
    """Of a model, with groups and summaries of its size."""
    model = CARRIED[name]
    family = family_of_transformer(model_transformer(name))
    assert family is not None
    pattern: dict[str, Any] = {"variant": "full", "group": model.group}
    schedule: dict[str, Any] = {} if attention == "full" else {"dense_steps": 1}
    if attention != "full":
        pattern |= {"variant": "b", "radius": 1, "far": [{"beyond": 1, "block": model.block}]}
    if attention == "over steps":
        schedule["over_steps"] = {"reference": [0, 2, 4], "between": "extrapolate", "slope": 0.4}
    return Preset.model_validate(
        {
            "name": "combined",
            "model": next(iter(family.presets)),
            "attention": pattern,
            "schedule": schedule,
            "guard": 0.97 if attention == "far with guard" else 0,
            "kernel": {"backend": "sdpa"},
        }
    )


@cache
def model_transformer(name: str) -> Any:
    """To tell a family by."""
    return CARRIED[name].make().transformer


def run(pipe: Any, name: str, attention: Attention, cache: str | None = None, **arguments: Any) -> torch.Tensor:
    """Latents of a call with GRAT installed."""
    model = CARRIED[name]
    with grat_cli.install(pipe, preset_of(name, attention), cache=cache, **model.size):
        return latents_of(pipe, model, **arguments)


# ---- Features


@dataclass(frozen=True)
class Feature:
    """Something that people use.

    Attributes:
        apply: to a pipeline.
        plain: makes of a pipeline that it was applied to one that computes the same without it; None for caches, which
            compute something else.
        made: makes a pipeline that it is applied to, where that is not `Model.make`.
        changes: whether it changes what is computed.
    """

    apply: Callable[[Any], None]
    plain: Callable[[Any, Model], Any] | None = None
    made: Callable[[Model], Any] | None = None
    changes: bool = True


def _untouched(pipe: Any, model: Model) -> Any:
    return model.make()


def _with_lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(3)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    for parameter_name, parameter in pipe.transformer.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    pipe.transformer.requires_grad_(False)


def _fused(pipe: Any, model: Model) -> Any:
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()
    return pipe


def _cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _as_cast(pipe: Any, model: Model) -> Any:
    plain = model.make()
    state = {name: tensor.float() for name, tensor in pipe.transformer.state_dict().items()}
    plain.transformer.load_state_dict(state)
    return plain


def _from_gguf(model: Model) -> Any:
    import gguf
    from diffusers.quantizers.quantization_config import GGUFQuantizationConfig

    pipe = model.make()
    own = pipe.transformer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.gguf"
        writer = gguf.GGUFWriter(path, "small")
        for tensor_name, tensor in own.state_dict().items():
            values = tensor.float().numpy()
            kind = gguf.GGMLQuantizationType.F32
            if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
                kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        own.save_config(folder)
        quantized = type(own).from_single_file(
            str(path),
            config=folder,
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
            dtype=torch.float32,
        )
    assert any("GGUF" in type(module).__name__ for module in quantized.modules())
    pipe.transformer = quantized.eval()
    return pipe


def _dequantized(pipe: Any, model: Model) -> Any:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    plain = model.make()
    state = {
        name: dequantize_gguf_tensor(tensor).float() if hasattr(tensor, "quant_type") else tensor.float()
        for name, tensor in pipe.transformer.named_parameters()
    }
    plain.transformer.load_state_dict(state, strict=False)
    return plain


def _compiled(pipe: Any) -> None:
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="aot_eager")


def _layer_by_layer(pipe: Any) -> None:
    # As pipelines do it, but for text encoders: on a CPU accelerate stumbles over theirs.
    for part in (pipe.vae, pipe.transformer):
        cpu_offload(part, CPU)


def _first_block(pipe: Any) -> None:
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))


def _mag(pipe: Any) -> None:
    from diffusers.hooks.mag_cache import MagCacheConfig

    ratios = torch.linspace(1.0, 0.9, STEPS)
    pipe.transformer.enable_cache(
        MagCacheConfig(threshold=0.2, num_inference_steps=STEPS, retention_ratio=0.2, mag_ratios=ratios)
    )


def _taylor(pipe: Any) -> None:
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig

    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(
            # Whatever a family calls its blocks; its own names of them leave out Wan's.
            cache_identifiers=[r".*blocks\.[0-9]+\.attn.?"],
            cache_interval=2,
            disable_cache_before_step=2,
            max_order=1,
            taylor_factors_dtype=torch.float32,
        )
    )


def _broadcast(pipe: Any) -> None:
    from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig

    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 900),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )


def _faster(pipe: Any) -> None:
    from diffusers.hooks.faster_cache import FasterCacheConfig

    pipe.transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            attention_weight_callback=lambda module: 0.3,
            current_timestep_callback=lambda: pipe.current_timestep,
            tensor_format="BFCHW" if "Video" in type(pipe).__name__ else "BCHW",
            is_guidance_distilled=True,
        )
    )


FEATURES: Mapping[str, Feature] = {
    "LoRA": Feature(_with_lora, _fused),
    "first-block": Feature(_first_block),
    "mag": Feature(_mag),
    "taylor": Feature(_taylor),
    "pab": Feature(_broadcast),
    "faster": Feature(_faster),
    "compiled blocks": Feature(_compiled, _untouched, changes=False),
    "GGUF Q8_0": Feature(lambda pipe: None, _dequantized, _from_gguf),
    "cast to fp8": Feature(_cast, _as_cast),
    "offload model": Feature(lambda pipe: offload(pipe, "model", CPU), _untouched, changes=False),
    "offload group": Feature(lambda pipe: offload(pipe, "group", CPU), _untouched, changes=False),
    "offload sequential": Feature(_layer_by_layer, _untouched, changes=False),
}


# ---- Cells


@dataclass(frozen=True)
class Cell:
    """What came of a feature with an attention.

    Attributes:
        outcome: equal to what it is held to, near it, refused, or wrong.
        text: for people.
    """

    outcome: Literal["equal", "near", "refused", "not served", "wrong"]
    text: str


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """||one - other|| over ||other||."""
    return ((one - other).norm() / other.norm()).item()


def made_with(name: str, feature: Feature) -> Any:
    """A pipeline with a feature."""
    model = CARRIED[name]
    pipe = model.make() if feature.made is None else feature.made(model)
    feature.apply(pipe)
    return pipe


@cache
def _without(name: str, attention: Attention) -> torch.Tensor:
    return run(CARRIED[name].make(), name, attention)


@cache
def _stock(name: str, feature_name: str | None) -> torch.Tensor | str:
    """Of stock diffusers, or what it says in refusing."""
    model = CARRIED[name]
    try:
        pipe = model.make() if feature_name is None else made_with(name, FEATURES[feature_name])
        return latents_of(pipe, model)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _plain(name: str) -> torch.Tensor:
    """Of stock diffusers without anything."""
    plain = _stock(name, None)
    assert isinstance(plain, torch.Tensor), plain
    return plain


def cell(name: str, feature_name: str, attention: Attention) -> Cell:
    """Runs a feature with an attention, and holds it to stock diffusers, or to the same attention without it."""
    model, feature = CARRIED[name], FEATURES[feature_name]
    stock = _stock(name, feature_name)
    if isinstance(stock, str):
        return Cell("not served", f"not by diffusers ({stock[:60]})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run(made_with(name, feature), name, attention)
    except BadInput as error:
        return Cell("refused", str(error))
    if not result.isfinite().all():
        return Cell("wrong", "not finite")
    if feature.changes and distance(stock, _plain(name)) < EQUAL:
        return Cell("wrong", "it does nothing to stock diffusers either")
    if attention == "full":
        apart = distance(result, stock)
        return Cell("equal" if apart < EQUAL else "wrong", f"{apart:.0e} from stock")
    if feature.plain is not None:
        with_feature = made_with(name, feature)
        expected = run(feature.plain(with_feature, model), name, attention)
        apart = distance(result, expected)
        return Cell("equal" if apart < EQUAL else "wrong", f"{apart:.0e} from the same without")
    of_stock, of_pattern = distance(stock, _plain(name)), distance(_without(name, attention), _plain(name))
    apart = distance(result, _without(name, attention))
    fine = 0 < apart <= SLACK * max(of_stock, of_pattern)
    return Cell("near" if fine else "wrong", f"moves it by {apart:.2f} (full attention: {of_stock:.2f})")


# ---- Large pictures in stages


def _bundled() -> Any:
    return load_model(small_pictures.DEMO, device=CPU, dtype=torch.float32).pipe


CASCADE = Model(_bundled, {}, dict, (4, 4), (2, 2))


# Pipelines of diffusers tell their caches too little for this, so these are the presets' own.
CACHES: Mapping[str, Mapping[str, Any]] = {
    "first-block": {"threshold": 0.5},
    "mag": {"threshold": 0.3, "ratios": [1.0, 0.98, 0.96, 0.94, 0.92, 0.9]},
    "taylor": {"cache_interval": 2, "disable_cache_before_step": 1},
    "pab": {"timesteps": "0-1000"},
    "faster": {"timesteps": "0-1000"},
}


def _cascaded(pipe: Any, cache_name: str | None = None) -> torch.Tensor:
    """Pixels of a picture in two stages, sparse in the second, from a pipeline as it is."""
    made, chosen = LoadedModel(pipe, None), small_pictures.sparse_stages(STEPS)
    if cache_name is not None:
        section = {"kind": cache_name, **CACHES[cache_name]}
        chosen = Preset.model_validate({**chosen.model_dump(), "cache": section})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "load_model", lambda *arguments, **options: made)
        (picture,) = small_pictures.generate_staged(chosen)
    return torch.from_numpy(picture.pixels).float()


@cache
def _plain_cascade() -> torch.Tensor:
    return _cascaded(_bundled())


def cascade_cell(feature_name: str) -> Cell:
    """Runs a feature in the stages of a large picture, and holds it to the same stages without it."""
    feature = FEATURES[feature_name]

    if feature.plain is None:
        moved = (_cascaded(_bundled(), feature_name) - _plain_cascade()).abs().mean().item()
        return Cell("near" if 0 < moved < FAR_APART else "wrong", f"moves it by {moved:.1f} grey levels")

    def made() -> Any:
        pipe = _bundled() if feature.made is None else feature.made(CASCADE)
        feature.apply(pipe)
        return pipe

    try:
        result = _cascaded(made())
    except BadInput as error:
        return Cell("refused", str(error))
    moved = (result - _plain_cascade()).abs().mean().item()
    if feature.changes and not moved:
        return Cell("wrong", "it does nothing")
    apart = (result - _cascaded(feature.plain(made(), CASCADE))).abs().max().item()
    return Cell("equal" if apart <= 1 else "wrong", f"{apart:.0f} grey levels at most from the same without")


def main() -> None:
    """Prints every cell."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "with", *ATTENTIONS, "cascade")
    for name in MODELS:
        for feature_name in FEATURES:
            cells = [cell(name, feature_name, attention) for attention in ATTENTIONS]
            cells += [cascade_cell(feature_name)] if name == "Flux" else [Cell("refused", "no stages")]
            table.add_row(name, feature_name, *(f"{each.outcome}: {each.text}" for each in cells))
        table.add_section()
    Console(width=220).print(table, markup=False)


if __name__ == "__main__":
    main()
