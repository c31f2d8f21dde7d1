"""Files of transformers as others lay them out: Black Forest Labs' keys, Wan's own, scaled fp8, GGUF."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers.loaders.single_file_utils as single_file_utils
import gguf
import numpy as np
import pytest
import torch

Tensors = dict[str, torch.Tensor]
E4M3_LARGEST = 448.0

# Of Flux: a module of the original, and those of diffusers whose rows it holds one after the other.
_OF_FLUX: dict[str, tuple[str, ...]] = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "txt_in": ("context_embedder",),
    "img_in": ("x_embedder",),
    "final_layer.linear": ("proj_out",),
}
_OF_DOUBLE: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
}
_OF_SINGLE: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}


def of_black_forest_labs(weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The weights of a `FluxTransformer2DModel` under the keys of black-forest-labs/flux (src/flux/model.py)."""
    names = dict(_OF_FLUX)
    for ours, theirs, table in (
        ("transformer_blocks", "double_blocks", _OF_DOUBLE),
        ("single_transformer_blocks", "single_blocks", _OF_SINGLE),
    ):
        blocks = {name.split(".")[1] for name in weights if name.startswith(f"{ours}.")}
        for block in blocks:
            names |= {
                f"{theirs}.{block}.{module}": tuple(f"{ours}.{block}.{part}" for part in parts)
                for module, parts in table.items()
            }
    left = dict(weights)
    found: Tensors = {}
    for module, parts in names.items():
        for kind in ("weight", "bias"):
            if all(f"{part}.{kind}" in left for part in parts):
                key = f"{module}.scale" if module.endswith("_norm") else f"{module}.{kind}"
                found[key] = torch.cat([left.pop(f"{part}.{kind}") for part in parts])
    for kind in ("weight", "bias"):
        scale, shift = left.pop(f"norm_out.linear.{kind}").chunk(2)
        found[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    assert not left, f"these have no place there: {sorted(left)}"
    return found


_OF_WAN = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("proj_out", "head.head"),
    (".norm2.", ".norm3."),
)


def of_wan(weights: Mapping[str, torch.Tensor]) -> Tensors:
    """The weights of a `WanTransformer3DModel` under the keys of Wan-Video/Wan2.1 (wan/modules/model.py)."""
    found: Tensors = {}
    for name, weight in weights.items():
        for ours, theirs in _OF_WAN:
            name = name.replace(ours, theirs)
        if name.endswith("scale_shift_table"):
            name = name.replace("scale_shift_table", "modulation" if name.startswith("blocks.") else "head.modulation")
        found[name] = weight
    return found


@contextmanager
def small_originals(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """While inside, diffusers takes apart the joint projections of Flux's single blocks at any width: it has the full
    model's, 3072, written in its code. All else of its conversion runs as it is."""

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def split(tensor: torch.Tensor, sizes: Any, dim: int = 0) -> Any:
            if isinstance(sizes, tuple) and sum(sizes) != tensor.shape[dim]:
                sizes = [size * tensor.shape[dim] // sum(sizes) for size in sizes]
            return torch.split(tensor, list(sizes) if isinstance(sizes, tuple) else sizes, dim)

    with patch.context() as inside:
        inside.setattr(single_file_utils, "torch", Torch())
        yield


def scaled_fp8(weights: Mapping[str, torch.Tensor], *, newer: bool = False) -> Tensors:
    """Matrices as 8-bit floats with a scale each, as ComfyUI stores them: under its older names, or its newer ones."""
    found: Tensors = {} if newer else {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    weight_scale, input_scale = ("weight_scale", "input_scale") if newer else ("scale_weight", "scale_input")
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or weight.dim() != 2:
            found[name] = weight
            continue
        scale = weight.float().abs().max() / E4M3_LARGEST
        found[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
        found[f"{module}.{weight_scale}"] = scale
        found[f"{module}.{input_scale}"] = torch.ones(())
        if newer:
            text = b'{"format": "float8_e4m3fn"}'
            found[f"{module}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return found


def write_gguf(path: Path, weights: Mapping[str, torch.Tensor], kind: str, *, architecture: str = "flux") -> None:
    """A GGUF file as ComfyUI-GGUF's converter writes one: matrices in a type, all else as 32-bit floats; matrices whose
    rows are not of whole blocks as 16-bit floats; what has more than four dimensions as 32-bit floats too.

    Args:
        path: where to.
        weights: by name.
        kind: of matrices, such as `Q8_0`.
        architecture: that it names.
    """
    wanted = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, weight in weights.items():
        data = weight.float().numpy()
        type_ = wanted if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        if data.ndim == 2 and data.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            type_ = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
