"""Transformers and text encoders from a file of weights alone, in the layouts and forms that people have them in.

| what | how it is read |
| --- | --- |
| names as in diffusers, or as in the original code | by diffusers' own table of conversions |
| names behind `model.diffusion_model.`, `transformer.` or the like | without it |
| 8-bit floats, with or without a scale | times their scale, in the dtype of the run |
| GGUF | matrices stay quantized, and are turned back at each product, by diffusers; all else is turned back once |
| pickles | only where that was typed, and nothing of them but tensors |

Every weight that the model has must be there, in its shape, and nothing else: libraries go on without.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, ModelUnavailable, printable
from grat_cli.files.weight_headers import Header, format_of, read_header
from grat_cli.models.quantization import installed

if TYPE_CHECKING:
    import torch

# What names of a transformer's weights may begin with, where others saved it; the longest first.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "model.")
# What lies beside a transformer in files of whole pipelines. The base has these parts.
_BESIDE = (
    *("text_encoders.", "text_encoder.", "text_encoder_2.", "cond_stage_model.", "conditioner."),
    *("vae.", "first_stage_model."),
)
# ComfyUI's older and newer names beside a matrix of 8-bit floats: what it is multiplied with; what inputs would be
# divided by, to multiply in 8 bits, which is not done here; and how it is stored, as JSON.
_SCALES, _INPUT_SCALES, _STORED_AS = ("scale_weight", "weight_scale"), ("scale_input", "input_scale"), "comfy_quant"
_MARKER = "scaled_fp8"
_FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_T5_OF_GGUF = ("t5", "t5encoder")
_ENCODERS_OF_GGUF = ("T5EncoderModel", "UMT5EncoderModel")
# Sums of the sizes of tensors of a pickle may be larger than the file, where tensors share what they are views of.
_SHARED = 4

Tensors = dict[str, Any]


def read_weights(path: Path, dtype: torch.dtype, *, allow_pickle: bool) -> Tensors:
    """The weights of a transformer, by their names in some layout, without a prefix.

    Args:
        path: the file.
        dtype: of 8-bit floats once they have their scales.
        allow_pickle: whether a pickle may be read.

    Returns:
        plain tensors, and of GGUF files those of diffusers' own kind where they are quantized.

    Raises:
        ModelUnavailable: if it is of a kind that is not read, with what to do.
        OSError, ValueError, LookupError, SafetensorError: if it is damaged.
    """
    kind = format_of(path)
    if kind == "gguf":
        return without_prefix(_of_gguf(path))
    return plain(without_prefix(_unquantized(path, allow_pickle=allow_pickle)), dtype)


def _unquantized(path: Path, *, allow_pickle: bool) -> Tensors:
    if format_of(path) == "pickle":
        return _of_pickle(path, allow_pickle=allow_pickle)
    from safetensors.torch import load_file

    return load_file(path)


def without_prefix(tensors: Mapping[str, Any]) -> Tensors:
    """Weights of a transformer without what their names begin with, and without other parts of a pipeline.

    Raises:
        ValueError: if only some names begin that way.
    """
    for prefix in _PREFIXES:
        inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if inside:
            outside = [name for name in tensors if not name.startswith((prefix, *_BESIDE)) and name != _MARKER]
            if outside:
                raise ValueError(f"only some of its weights are named {prefix}…, and {_shown(outside[0])} is not")
            return without_prefix(inside)
    return dict(tensors)


def holds_other_parts(path: Path) -> bool:
    """Whether a file holds more of a pipeline than its transformer.

    Raises:
        OSError, ValueError: if it cannot be read, or tells nothing beforehand.
    """
    return any(name.startswith(_BESIDE) for name in read_header(path).tensors)


def plain(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Tensors:
    """Weights without 8-bit floats: these become numbers of `dtype`, times their scale where they have one.

    The product is rounded once: it is taken in fp32.

    Raises:
        ValueError: if a scale is not that of such a weight, or a matrix is stored in another way.
    """
    import torch

    left = {name: tensor for name, tensor in tensors.items() if name != _MARKER}
    scales: dict[str, torch.Tensor] = {}
    for name in list(left):
        module, _, kind = name.rpartition(".")
        if kind in _SCALES:
            scales[module] = left.pop(name)
        elif kind in _INPUT_SCALES:
            left.pop(name)
        elif kind == _STORED_AS:
            _require_fp8(name, left.pop(name))
    for module, scale in scales.items():
        name = f"{module}.weight"
        weight = left.get(name)
        if weight is None or not _is_fp8(weight):
            raise ValueError(f"{_shown(module)} has a scale, and no weight of 8-bit floats")
        left[name] = (weight.to(torch.float32) * _spread(scale, weight, name)).to(dtype)
    return {name: tensor.to(dtype) if _is_fp8(tensor) else tensor for name, tensor in left.items()}


def _is_fp8(tensor: torch.Tensor) -> bool:
    return str(tensor.dtype).startswith("torch.float8_e4m3") or str(tensor.dtype).startswith("torch.float8_e5m2")


def _require_fp8(name: str, about: torch.Tensor) -> None:
    """Makes sure that a matrix is stored in a way that is known; ComfyUI says it in JSON, as bytes of a tensor."""
    try:
        kind = json.loads(bytes(about.flatten()[:1024].tolist()))["format"]
    except (ValueError, TypeError, LookupError):
        kind = None
    if kind not in _FP8_FORMATS:
        raise ValueError(f"{_shown(name)} is stored as {_shown(str(kind))}, and only {_FP8_FORMATS[0]} is read")


def _spread(scale: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    """A scale of a whole matrix, of its rows, or of its blocks, as it multiplies the matrix."""
    import torch

    scale = scale.to(torch.float32)
    if not scale.numel() or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"the scale of {_shown(name)} is no positive number")
    if scale.numel() == 1:
        return scale.reshape(())
    if weight.dim() == 2 and scale.dim() == 3 and scale.shape[2] == 1:
        scale = scale.squeeze(2)
    if weight.dim() == 2 and scale.dim() == 1:
        scale = scale.unsqueeze(1)
    if weight.dim() != 2 or scale.dim() != 2 or any(n % m for n, m in zip(weight.shape, scale.shape, strict=True)):
        raise ValueError(f"the scale of {_shown(name)} does not fit it")
    rows, columns = (n // m for n, m in zip(weight.shape, scale.shape, strict=True))
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


# ---- GGUF


def require_gguf(path: Path) -> Header:
    """The header of a GGUF file that can be read.

    Raises:
        ModelUnavailable: if the package that reads it is not installed, or a type of its is not known.
        ValueError: if it is damaged.
    """
    header = read_header(path)
    if not installed("gguf"):
        raise ModelUnavailable(
            f"{path.name} is a GGUF file, for which a package is missing: pip install grat-cli[gguf]"
        )
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    known = {"F32", "F16", *(kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES)}
    for name, tensor in header.tensors.items():
        if tensor.type not in known:
            raise ModelUnavailable(
                f"{path.name} cannot be read: {_shown(name)} is of type {tensor.type}, and diffusers reads "
                f"{', '.join(sorted(known))}\nget the file in one of these, such as Q8_0 or Q4_K"
            )
    return header


def _of_gguf(path: Path) -> Tensors:
    """Quantized matrices as they are; other numbers as plain tensors of their own dtype and shape."""
    header = require_gguf(path)
    import torch
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    found: Tensors = {}
    for name, tensor in load_gguf_checkpoint(str(path)).items():
        # ComfyUI-GGUF's converter notes the shape of what it has stored in another, as of more than four dimensions.
        shape = header.facts.get(f"comfy.gguf.orig_shape.{name}")
        stored = header.tensors[name]
        if stored.type == "BF16":
            tensor = tensor.as_tensor().contiguous().view(torch.bfloat16).reshape(stored.shape)
        if shape is not None and tuple(shape) != stored.shape:
            if not isinstance(shape, list) or min(shape, default=1) < 0 or math.prod(shape) != stored.numbers:
                raise ValueError(f"{_shown(name)} does not hold as many numbers as its original shape says")
            tensor = _turned_back(tensor).reshape(shape)
        found[name] = tensor
    return found


def _turned_back(tensor: Any) -> torch.Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(tensor)


def _is_quantized(tensor: Any) -> bool:
    return hasattr(tensor, "quant_type")


def _shape_of(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.quant_shape if _is_quantized(tensor) else tensor.shape)


# ---- Pickles


def pickle_refusal(name: str) -> ModelUnavailable:
    """What to raise for a pickle that was not asked for."""
    return ModelUnavailable(
        f"{name} is a pickle, which can run code as it is read: get the model as .safetensors, or convert it with "
        f'python -c "import sys, torch; from safetensors.torch import save_file; '
        'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" FILE NEW.safetensors\n'
        "or add --allow-pickle, which reads nothing but its tensors"
    )


def _of_pickle(path: Path, *, allow_pickle: bool) -> Tensors:
    if not allow_pickle:
        raise pickle_refusal(path.name)
    import torch

    try:
        with open(path, "rb") as file:  # of a path the library looks at how it ends
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (MemoryError, OSError):
        raise
    except Exception:  # an unpickler raises whatever a damaged file makes it
        raise ValueError("it is damaged, or holds more than tensors") from None
    for key in ("state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError("it holds no tensors by name")
    room = _SHARED * path.stat().st_size
    for name, tensor in content.items():
        if not isinstance(name, str) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(f"{_shown(str(name))} is no tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{_shown(name)} is no plain tensor")
        room -= tensor.numel() * tensor.element_size()
    if room < 0:
        raise ValueError("it claims to hold more numbers than it does")
    return {name: tensor.detach() for name, tensor in content.items()}


# ---- Into a model


def transformer_of(
    model: Any,
    tensors: Tensors,
    config: Mapping[str, Any],
    base: str,
    dtype: torch.dtype,
    quantized: Any = None,
    *,
    called: str | None = None,
) -> Any:
    """A transformer with the weights of a file.

    Args:
        model: its class in diffusers.
        tensors: of `read_weights`.
        config: of the transformer of `base`.
        base: folder or hub id with that configuration.
        dtype: of weights that are not quantized, and of products.
        quantized: `quantization_config` of weights that are to be quantized here.
        called: how `base` is called in messages; None for as it is.

    Raises:
        ModelUnavailable: if diffusers reads no such files.
        BadInput: if they are quantized, and are to be quantized once more.
        ValueError: if the weights are not those of such a transformer, with the first that is amiss.
    """
    import torch
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    conversion = SINGLE_FILE_LOADABLE_CLASSES.get(model.__name__)
    if conversion is None:
        raise ModelUnavailable(
            f"diffusers reads no file of a {model.__name__} alone: give a folder or a hub id of a whole pipeline"
        )
    with init_empty_weights():
        empty = model.from_config(config)
    expected = empty.state_dict()
    if 2 * sum("lora_" in name or ".lora." in name for name in tensors) > len(tensors):
        raise ValueError("it is a LoRA, which goes with a model: give it as --lora")
    if 2 * len(expected.keys() & tensors.keys()) < len(expected):
        tensors = _converted(conversion["checkpoint_mapping_fn"], tensors, config)
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    tensors = {name: tensor for name, tensor in tensors.items() if not any(re.search(one, name) for one in ignored)}
    _require_all(tensors, expected, called or base)
    matrices = {f"{name}.weight" for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = set(model._keep_in_fp32_modules or ())
    for name, tensor in tensors.items():
        if _is_quantized(tensor) and (name not in matrices or kept.intersection(name.split("."))):
            tensors[name] = _turned_back(tensor)
    options = {} if quantized is None else {"quantization_config": quantized}
    if any(map(_is_quantized, tensors.values())):
        if quantized is not None:
            raise BadInput("--quantize: the transformer is quantized already, in its GGUF file: leave it out")
        from diffusers.quantizers.quantization_config import GGUFQuantizationConfig

        options = {"quantization_config": GGUFQuantizationConfig(compute_dtype=dtype)}
    return model.from_single_file(tensors, config=base, subfolder="transformer", dtype=dtype, **options)


def _converted(conversion: Any, tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Weights of the original code by diffusers' names, with all that it does not know."""
    unknown = f"its weights are named as those of no such transformer, such as {_shown(next(iter(tensors), ''))}"
    left = dict(tensors)
    try:
        converted = conversion(checkpoint=left, config=config)
    except KeyError as error:
        raise ValueError(f"it lacks {_shown(str(error.args[0]))}, or {unknown}") from None
    except RuntimeError:
        # Its joint projections are taken apart at the width of the full model, which is written in the code.
        raise ValueError("its matrices are not those of the full model, whose layout it has") from None
    except (LookupError, ValueError, TypeError, AttributeError):
        raise ValueError(unknown) from None
    return {**left, **converted}


def _require_all(tensors: Mapping[str, Any], expected: Mapping[str, torch.Tensor], base: str) -> None:
    """Raises ValueError unless weights are those of a transformer, no less and no more, in its shapes."""
    lacking = [name for name in expected if name not in tensors]
    if lacking:
        raise ValueError(f"it lacks {len(lacking)} weights, such as {lacking[0]}")
    strange = [name for name in tensors if name not in expected]
    if strange:
        raise ValueError(f"it holds {len(strange)} weights that {base} has no place for, such as {_shown(strange[0])}")
    for name, tensor in tensors.items():
        here, there = _shape_of(tensor), tuple(expected[name].shape)
        if here != there:
            raise ValueError(f"{name} is {_sides(here)}, and that of {base} {_sides(there)}")
        if expected[name].is_floating_point() and not (tensor.is_floating_point() or _is_quantized(tensor)):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} is stored as {kind}, in no way of quantizing that is read")


def text_encoder_of(
    model: Any,
    path: Path,
    folder: Path,
    dtype: torch.dtype,
    *,
    allow_pickle: bool,
    quantized: Any = None,
) -> tuple[Any, Mapping[str, Any]]:
    """A text encoder with the weights of a file, and what `from_pretrained` says of them.

    Args:
        model: its class in transformers.
        path: the file.
        folder: with its configuration.
        dtype: of weights.
        allow_pickle: whether a pickle may be read.
        quantized: `quantization_config` of weights that are to be quantized here.

    Raises:
        ModelUnavailable: if it is of a kind that is not read, with what to do.
        OSError, ValueError, LookupError, SafetensorError: if it is damaged.
    """
    config = model.config_class.from_pretrained(folder, local_files_only=True)
    options: dict[str, Any] = {} if quantized is None else {"quantization_config": quantized}
    source, silent = None, nullcontext()
    if format_of(path) == "gguf":
        architecture = require_gguf(path).facts.get("general.architecture")
        if model.__name__ not in _ENCODERS_OF_GGUF or architecture not in _T5_OF_GGUF:
            raise ModelUnavailable(
                f"{path.name} is a GGUF file of the architecture {_shown(str(architecture))}: of text encoders only T5 "
                f"is read from GGUF, and this one is a {model.__name__}: give --text-encoder a .safetensors file"
            )
        source, options["gguf_file"] = path.parent, path.name
        silent = redirect_stderr(StringIO())  # there is a progress bar that nothing turns off
    else:
        options["state_dict"] = plain(_unquantized(path, allow_pickle=allow_pickle), dtype)
    with silent:
        return model.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told in the loading info, and refused
            local_files_only=True,
            **options,
        )


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _shown(name: str) -> str:
    return printable(name)[:80]
