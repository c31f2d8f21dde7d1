"""Dense attention, as fast as this machine has it: what sparse attention is measured against."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from grat_cli.bench.measure import CannotRun, Run, guarded, measure

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# The kernels of PyTorch, and packages with one of their own.
_TORCH_KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_FLASH_PACKAGES = {"FlashAttention-3": "flash_attn_interface", "FlashAttention-2": "flash_attn"}

_TRIAL_REPETITIONS = 3
# Tokens of the call that measures a device's rate: large enough for its full speed, small enough for a fraction of a
# second on two CPU cores.
_RATE_TOKENS = {"cuda": 16_384, "mps": 4096, "cpu": 2048}


@dataclass(frozen=True)
class DenseKernel:
    """The dense kernel that was fastest here.

    Attributes:
        name: such as `cuDNN`.
        attention: runs it on query, key and value `[B, N, H, D]`.
        others: median milliseconds of the other candidates at the same size, or why they did not run.
    """

    name: str
    attention: Attention
    others: dict[str, float | str]


def dense_candidates(device: torch.device) -> dict[str, Attention]:
    """Every dense kernel that may run on a device, by name; each may raise `CannotRun`."""
    if device.type != "cuda":
        return {"torch SDPA": _torch_default}
    candidates = {f"{name} SDPA": _torch_kernel(name, backend) for name, backend in _TORCH_KERNELS.items()}
    for name, package in _FLASH_PACKAGES.items():
        if importlib.util.find_spec(package) is not None:
            candidates[name] = _flash_package(package)
    return candidates


def fastest_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    max_seconds: float | None = None,
    flop_per_second: float | None = None,
) -> DenseKernel:
    """The dense kernel that is fastest on these tensors `[B, N, H, D]`; a single candidate needs no trial.

    Raises:
        CannotRun: if none runs, with each one's reason.
    """
    candidates = dense_candidates(query.device)
    if len(candidates) == 1:
        [(name, attention)] = candidates.items()
        return DenseKernel(name, attention, {})
    batch, tokens, heads, head_dim = query.shape
    flop = 4 * batch * tokens**2 * heads * head_dim
    runs = [
        Run(name, lambda attention=attention: attention(query, key, value), flop=flop, extra_bytes=query.nbytes)
        for name, attention in candidates.items()
    ]
    # Nobody watches: that a candidate cannot run here is no news.
    found = measure(
        runs,
        query.device,
        repetitions=_TRIAL_REPETITIONS,
        max_seconds=max_seconds,
        flop_per_second=flop_per_second,
    )
    medians = {name: statistics.median(trial.times_ms) for name, trial in found.items() if trial.times_ms}
    reasons = {name: trial.skipped for name, trial in found.items() if trial.skipped}
    if not medians:
        raise CannotRun("; ".join(dict.fromkeys(reasons.values())))
    best = min(medians, key=lambda name: medians[name])
    others = {name: medians[name] if name in medians else reasons[name] for name in candidates if name != best}
    return DenseKernel(best, candidates[best], others)


def dense_rate(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> float:
    """FLOP/s of dense attention, from one short call after a warm-up: for predicting what does not fit the time."""
    tokens = _RATE_TOKENS.get(device.type, 2048)
    tensors = [torch.randn(1, tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(3)]
    run = Run("rate", lambda: _torch_default(*tensors))
    [milliseconds] = measure([run], device, repetitions=1)["rate"].times_ms
    return 4 * tokens**2 * heads * head_dim / milliseconds * 1000


def _torch_default(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _torch_kernel(name: str, backend: SDPBackend) -> Attention:
    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        try:
            with sdpa_kernel(backend):
                return _torch_default(query, key, value)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CannotRun(f"{name} SDPA does not take these tensors ({str(error).splitlines()[0]})") from error

    return attention


def _flash_package(package: str) -> Attention:
    """`flash_attn_func` of a package takes and gives `[B, N, H, D]`; FlashAttention-3 may add the log-sum-exp."""

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        def call() -> torch.Tensor:
            output = importlib.import_module(package).flash_attn_func(query, key, value)
            return output[0] if isinstance(output, tuple) else output

        return guarded(package, call)()

    return attention
