"""How the weights of a model come: what typed options say of them beyond which model it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How a model's weights come.

    Attributes:
        base: folder or hub id of the other parts, for a model that is a file of a transformer alone.
        quantize: one of `quantization.QUANTIZATIONS`.
    """

    base: str | None = None
    quantize: str = "none"


AS_THEY_ARE = Weights()
