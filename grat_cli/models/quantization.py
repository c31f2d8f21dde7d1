"""Weights in fewer bits: of the transformer and the large text encoder, by torchao or bitsandbytes.

Only weights are stored that way; products are in the dtype of the run. That saves memory and, on its own, no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, choices

if TYPE_CHECKING:
    import torch

# What quantizes each; bits per weight.
PACKAGES: Mapping[str, str] = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
QUANTIZATIONS = ("none", *PACKAGES)
CASTS = ("none", "fp8")
"""How weights of the transformer wait between products, which are in the dtype of the run: diffusers turns each layer's
to that dtype as it is called, and back. It needs no package, and runs on any device."""


def require_quantization(kind: str, device: torch.device, *, offload: str = "none", is_demo: bool = False) -> None:
    """Makes sure that weights can be quantized like that.

    Args:
        kind: one of `QUANTIZATIONS`.
        device: where the run is.
        offload: how weights are offloaded.
        is_demo: whether the model is a bundled one.

    Raises:
        BadInput: if they cannot, with the reason.
    """
    if kind not in QUANTIZATIONS:
        raise BadInput(f"unknown quantization {kind!r}: {choices(kind, QUANTIZATIONS)}")
    if kind == "none":
        return
    if is_demo:
        raise BadInput(f"--quantize {kind}: the demo has a few million weights, and nothing to gain: leave it out")
    if device.type != "cuda":
        raise BadInput(
            f"--quantize {kind} is for CUDA devices, and the run is on {device.type}, where weights would be turned "
            "back at every product: leave it out"
        )
    package = PACKAGES[kind]
    if not installed(package):
        raise BadInput(f"--quantize {kind} needs {package}, which is not installed: pip install {package}")
    if kind == "nf4" and offload in ("group", "sequential"):
        raise BadInput(
            f"--quantize nf4 with --offload {offload}: bitsandbytes keeps scales beside its weights, which these hooks "
            "leave behind; use --offload model, or --quantize int8"
        )
    if offload == "sequential":
        raise BadInput(
            f"--quantize {kind} with --offload sequential: its hooks rebuild weights, which loses what they are "
            "quantized to; use --offload group or model"
        )
    if kind == "fp8":
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            raise BadInput(
                f"--quantize fp8 needs compute capability 8.9 or more, this device has {major}.{minor}: use int8"
            )


def require_cast(kind: str, quantize: str, *, is_quantized: str | None = None) -> None:
    """Makes sure that weights can be cast like that.

    Args:
        kind: one of `CASTS`.
        quantize: one of `QUANTIZATIONS`.
        is_quantized: how the weights are quantized that are loaded, for messages; None where they are not.

    Raises:
        BadInput: if they cannot, with the reason.
    """
    if kind not in CASTS:
        raise BadInput(f"unknown cast {kind!r}: {choices(kind, CASTS)}")
    if kind == "none":
        return
    if quantize != "none":
        raise BadInput(
            f"--cast {kind} with --quantize {quantize}: both say in which form weights wait: leave one of them out"
        )
    if is_quantized is not None:
        raise BadInput(f"--cast {kind}: the weights are quantized already, {is_quantized}: leave it out")


def require_movable(part: Any, cast: str, offload: str, device: torch.device) -> None:
    """Makes sure that a part's weights survive how they are moved.

    Args:
        part: as loaded.
        cast: one of `CASTS`.
        offload: how they are offloaded, never `auto`.
        device: where the run is.

    Raises:
        BadInput: if they do not, with what to use.
    """
    by = quantization_of(part)
    if by == "bitsandbytes" and device.type != "cuda":
        raise BadInput(f"the model is quantized by bitsandbytes, for CUDA devices, and the run is on {device.type}")
    if by == "bitsandbytes" and offload in ("group", "sequential"):
        raise BadInput(
            f"weights quantized by bitsandbytes with --offload {offload}: scales are beside them, which these hooks "
            "leave behind; use --offload model"
        )
    form = f"--cast {cast}" if cast != "none" else None if by is None else f"weights quantized by {by}"
    if form is not None and offload == "sequential":
        raise BadInput(
            f"{form} with --offload sequential: its hooks rebuild weights, which loses in which form they wait; "
            "use --offload group or model"
        )


def cast(transformer: Any, kind: str, dtype: torch.dtype) -> None:
    """Has the weights of a transformer wait in 8 bits, but for norms and the like that diffusers leaves out.

    Args:
        transformer: of diffusers, on any device, not offloaded yet.
        kind: one of `CASTS`.
        dtype: of products.
    """
    if kind == "none":
        return
    import torch

    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)


def quantization_of(part: Any) -> str | None:
    """By what a loaded part is quantized: gguf, torchao or bitsandbytes; None where it is not."""
    quantizer = getattr(part, "hf_quantizer", None)
    return None if quantizer is None else quantizer.quantization_config.quant_method.value


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None


def configurations(kind: str, large_encoder: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` of each part that is quantized takes as `quantization_config`.

    Args:
        kind: one of `QUANTIZATIONS`.
        large_encoder: the part that is quantized beside the transformer.
        dtype: of products.
    """
    if kind == "none":
        return {}
    from diffusers.quantizers import quantization_config as of_diffusers
    from transformers.utils import quantization_config as of_transformers

    if kind == "nf4":
        options: dict[str, Any] = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        }
        transformer, encoder = of_diffusers.BitsAndBytesConfig(**options), of_transformers.BitsAndBytesConfig(**options)
    else:
        from torchao import quantization  # pyright: ignore[reportMissingImports]

        weights = quantization.Int8WeightOnlyConfig if kind == "int8" else quantization.Float8WeightOnlyConfig
        transformer, encoder = of_diffusers.TorchAoConfig(weights()), of_transformers.TorchAoConfig(weights())
    return {"transformer": transformer, large_encoder: encoder}
