"""What the demos are trained in on this CPU: torch's products in bf16 take 10 to 60 times as long without oneDNN's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@cache
def training_dtype() -> torch.dtype:
    """bf16 where oneDNN computes in it, else fp32."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def training_autocast() -> AbstractContextManager[object]:
    """Compute fp32 weights in `training_dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=training_dtype() is torch.bfloat16)


class _CopiesInsteadOfBfloat16(TorchFunctionMode):
    """`tensor.bfloat16()` is a copy of the tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


def orthogonalising() -> AbstractContextManager[object]:
    """Have torch's Muon, which rounds to bf16 to orthogonalise, do so in `training_dtype`."""
    return nullcontext() if training_dtype() is torch.bfloat16 else _CopiesInsteadOfBfloat16()
