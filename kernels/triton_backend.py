"""The Triton backend: what it needs, and the launch of the span kernel."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from grat_kernels.summaries import summarise
from grat_kernels.tile_configs import TileConfig, architecture_of, tile_config

if TYPE_CHECKING:
    from grat_kernels.plan import Plan

DESCRIPTION = "span kernel in Triton, for CUDA and ROCm devices"

_LOG2_E = 1.4426950408889634
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256
# Smallest inner dimension of a matrix product in Triton.
_MIN_PADDED_DIM = 16


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None) -> str | None:
    """Why the kernel cannot run, in words, or None where it can. Never raises.

    Args:
        device: where the tensors lie.
        dtype: dtype of query, key and value.
        head_dim: channels per head.
        tokens: length of the joint sequence, where known.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux only)"
    if dtype not in _DTYPES:
        return f"it takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        return f"it takes head dimensions up to {_MAX_HEAD_DIM}, not {head_dim}"
    if tokens is not None and tokens >= 2**31:
        return f"it counts tokens in 32 bits, {tokens} are too many"
    if device.type == "cpu":
        return _interpreter_obstacle(dtype)
    if device.type != "cuda":
        return f"it runs on CUDA and ROCm devices, not on {device.type}"
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return f"there is no device {device}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, {device} has {capability[0]}.{capability[1]}"
    return None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    text_valid: torch.Tensor | None,
    scale: float,
    *,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Span attention by the Triton kernel.

    Args:
        query: `[B, N, H, D]`, image tokens in the plan's order. Any strides; a tensor whose last dimension is not
            contiguous is copied first.
        key: `[B, N, H, D]`.
        value: `[B, N, H, D]`.
        plan: what attends what.
        text_valid: valid text tokens of each sample, `[B]` integers, or None for all.
        scale: positive factor on the scores.
        config: tiles other than the table's, for tests and tuning. The `tma` form reads by pointers where the
            tensors are not laid out for it.

    Returns:
        `[B, N, H, D]`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: if the scale is not positive.
    """
    if not scale > 0:
        raise ValueError(f"the Triton kernel needs a positive scale, not {scale}")
    from grat_kernels.span_kernel import span_attention_kernel

    batch, tokens, heads, head_dim = query.shape
    query, key, value = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    block_m, block_n, warps, stages, form = config or config_for(query.device, query.dtype, head_dim)
    by_descriptor = form == "tma" and all(fits_descriptor(tensor) for tensor in (query, key, value))
    if plan.text_len == 0:
        text_valid = None
    far = plan.summaries.rows > 0
    query_tiles, key_tiles, leading = _device_tiles(
        plan, query.device, block_m, block_n, text_apart=text_valid is not None
    )
    with _on_device(query.device):
        span_attention_kernel[(len(query_tiles) * batch * heads,)](
            query,
            key,
            value,
            output,
            _descriptor(query, block_m) if by_descriptor else None,
            _descriptor(key, block_n) if by_descriptor else None,
            _descriptor(value, block_n) if by_descriptor else None,
            summarise(key, plan) if far else None,
            summarise(value, plan) if far else None,
            plan.tensors(query.device).log_counts if far else None,
            None if text_valid is None else text_valid.to(torch.int32),
            query_tiles,
            key_tiles,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            tokens,
            heads,
            plan.summaries.rows,
            plan.text_start,
            plan.text_start + plan.text_len,
            len(query_tiles),
            leading,
            leading * batch * heads,
            scale * _LOG2_E,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_head_dim(head_dim),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            STAGES=stages,
            num_warps=warps,
        )
    return output


def config_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> TileConfig:
    """The table's tiles for tensors on a device."""
    if device.type == "cpu":
        architecture = "interpreter"
    elif torch.version.hip is not None:
        architecture = "rocm"
    else:
        architecture = architecture_of(torch.cuda.get_device_capability(device))
    return tile_config(architecture, head_dim, dtype.itemsize * 8)


def padded_head_dim(head_dim: int) -> int:
    """Channels that a tile holds: the next power of two, and at least what a matrix product takes."""
    return max(_MIN_PADDED_DIM, 1 << (head_dim - 1).bit_length())


def fits_descriptor(tensor: torch.Tensor) -> bool:
    """Whether a tensor `[B, N, H, D]` can be read as a matrix `[B·N, H·D]` by the tensor memory accelerator.

    It wants a 16-byte aligned start and row length (CUDA driver API, cuTensorMapEncodeTiled), and a block that does
    not reach into the next head.
    """
    batch, tokens, heads, head_dim = tensor.shape
    batch_stride, token_stride, head_stride, channel_stride = tensor.stride()
    return (
        channel_stride == 1
        and head_dim == padded_head_dim(head_dim)
        and (heads == 1 or head_stride == head_dim)
        and (batch == 1 or batch_stride == tokens * token_stride)
        and token_stride >= heads * head_dim
        and token_stride * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        and batch * tokens < 2**31
    )


def _descriptor(tensor: torch.Tensor, rows: int) -> Any:
    """`tensor` as a matrix `[B·N, H·D]`, read in blocks of `rows` tokens of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, tokens, heads, head_dim = tensor.shape
    return TensorDescriptor(tensor, [batch * tokens, heads * head_dim], [tensor.stride(1), 1], [rows, head_dim])


def _device_tiles(
    plan: Plan, device: torch.device, block_m: int, block_n: int, *, text_apart: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Query tiles, key tiles and the number of leading tiles, moved to the device once."""

    def build() -> tuple[torch.Tensor, torch.Tensor, int]:
        tiles = plan.tiles(block_m, block_n, text_apart=text_apart)
        return (
            torch.from_numpy(tiles.query_tiles).to(device),
            torch.from_numpy(tiles.key_tiles).to(device),
            tiles.leading,
        )

    return plan.cached(("triton tiles", device, block_m, block_n, text_apart), build)


def _on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a CUDA device current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _interpreter_obstacle(dtype: torch.dtype) -> str | None:
    from triton.runtime.interpreter import InterpretedFunction

    from grat_kernels.span_kernel import span_attention_kernel

    if not isinstance(span_attention_kernel, InterpretedFunction):
        return (
            "it runs on CUDA and ROCm devices; on the CPU only in Triton's interpreter: set TRITON_INTERPRET=1 at start"
        )
    if dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly: use float16 or float32 there"
    return None
