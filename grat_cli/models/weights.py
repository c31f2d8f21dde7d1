"""How the weights of a model come: what typed options say of them beyond which model it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Noise = Literal["all", "high", "low", "both"]
"""Which transformers a LoRA is for: the only one; of two that take turns the one for the steps of high noise, the
one for those of low noise, or both."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA, as `lora.parse_lora` reads what is typed.

    Attributes:
        source: path of a file, or hub id.
        kind: which of these.
        weight_name: of a file in the hub's repository; None for the only one there, and for files.
        scale: how strongly it works; 1 as it was trained.
        noise: which transformers it is for.
    """

    source: str
    kind: Literal["file", "hub"] = "file"
    weight_name: str | None = None
    scale: float = 1.0
    noise: Noise = "all"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How a model's weights come.

    Attributes:
        base: folder or hub id of the other parts, for a model that is a file of a transformer alone.
        quantize: one of `quantization.QUANTIZATIONS`.
        loras: what is added to them.
        fuse_loras: whether it is added once, to the weights themselves, and not at every product.
        text_encoder: file with the weights of the large text encoder, in place of the pipeline's own.
        cast: one of `quantization.CASTS`.
        allow_pickle: whether tensors may be read from pickles; it is typed, and never read from a file.
    """

    base: str | None = None
    quantize: str = "none"
    loras: tuple[Lora, ...] = ()
    fuse_loras: bool = False
    text_encoder: str | None = None
    cast: str = "none"
    allow_pickle: bool = False


AS_THEY_ARE = Weights()
