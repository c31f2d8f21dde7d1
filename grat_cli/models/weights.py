"""How the weights of a model come: what typed options say of them beyond which model it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How a model's weights come.

    Attributes:
        base: folder or hub id of the other parts, for a model that is a file of a transformer alone.
        quantize: one of `quantization.QUANTIZATIONS`.
        text_encoder: file with the weights of the large text encoder, in place of the pipeline's own.
        cast: one of `quantization.CASTS`.
        allow_pickle: whether tensors may be read from pickles; it is typed, and never read from a file.
    """

    base: str | None = None
    quantize: str = "none"
    text_encoder: str | None = None
    cast: str = "none"
    allow_pickle: bool = False


AS_THEY_ARE = Weights()
