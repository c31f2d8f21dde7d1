"""The Triton backend: what it needs, and the launch of the span kernel."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from grat_kernels.summaries import summarise
from grat_kernels.tile_configs import TileConfig, architecture_of, tile_config
from grat_kernels.tile_lists import build_tile_lists

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
        config: tiles other than the table's, for tests and tuning.

    Returns:
        `[B, N, H, D]`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: if the scale is not positive, or `config` wants descriptors that the tensors do not allow.
    """
    query, key, value = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    far = plan.summaries.rows > 0
    launch = launch_of(
        query,
        key,
        value,
        output,
        summarise(key, plan) if far else None,
        summarise(value, plan) if far else None,
        plan,
        text_valid,
        scale,
        config or config_for(query, key, value),
    )
    from grat_kernels.span_kernel import span_attention_kernel

    with _on_device(query.device):
        span_attention_kernel[(launch.programs,)](*launch.arguments, **launch.options)
    return output


class Launch(NamedTuple):
    """Everything that the kernel is launched with: programs, run-time arguments in order, constants and options."""

    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, int]


def launch_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    summary_key: torch.Tensor | None,
    summary_value: torch.Tensor | None,
    plan: Plan,
    text_valid: torch.Tensor | None,
    scale: float,
    config: TileConfig,
) -> Launch:
    """The launch for these tensors, which may lie on the meta device: ahead-of-time compilation asks for it too.

    Raises:
        ValueError: if the scale is not positive, or `config` wants descriptors that the tensors do not allow.
    """
    if not scale > 0:
        raise ValueError(f"the Triton kernel needs a positive scale, not {scale}")
    device = query.device
    batch, tokens, heads, head_dim = query.shape
    block_m, block_n, block_tail, warps, stages, form = config
    if plan.text_len == 0:
        text_valid = None
    tiles = _device_tiles(plan, device, block_m, block_n, block_tail, mask_text=text_valid is not None)
    blocks: list[Any] = [None] * 5
    if form == "tma":
        if not all(fits_descriptor(tensor) for tensor in (query, key, value)):
            raise ValueError("these tensors cannot be read through tensor descriptors: use the pointer form")
        sources = ((query, block_m), (key, block_n), (value, block_n), (summary_key, block_n), (summary_value, block_n))
        blocks = [None if tensor is None else _descriptor(tensor, rows) for tensor, rows in sources]
    arguments = (
        query,
        key,
        value,
        output,
        *blocks[:3],
        summary_key,
        summary_value,
        *blocks[3:],
        None if summary_key is None else _summary_bias(plan, device, scale),
        None if text_valid is None else text_valid.to(device, torch.int32),
        tiles.query_tiles,
        tiles.key_tiles,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        heads * head_dim,
        tokens,
        heads,
        plan.summaries.rows,
        plan.text_start,
        plan.text_start + plan.text_len,
        len(tiles.query_tiles),
        tiles.leading,
        tiles.leading * batch * heads,
        scale * _LOG2_E,
    )
    options = {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_head_dim(head_dim),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_TAIL": block_tail,
        "STAGES": stages,
        "num_warps": warps,
    }
    return Launch(len(tiles.query_tiles) * batch * heads, arguments, options)


def config_for(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> TileConfig:
    """The table's tiles for these tensors."""
    if query.device.type == "cpu":
        architecture = "interpreter"
    elif torch.version.hip is not None:
        architecture = "rocm"
    else:
        architecture = architecture_of(torch.cuda.get_device_capability(query.device))
    descriptors = all(fits_descriptor(tensor) for tensor in (query, key, value))
    return tile_config(architecture, query.shape[3], query.element_size() * 8, descriptors=descriptors)


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


class _DeviceTiles(NamedTuple):
    """`TileLists` on a device."""

    query_tiles: torch.Tensor
    key_tiles: torch.Tensor
    leading: int


def _device_tiles(
    plan: Plan, device: torch.device, block_m: int, block_n: int, block_tail: int, *, mask_text: bool
) -> _DeviceTiles:
    def build() -> _DeviceTiles:
        tiles = build_tile_lists(plan, block_m, block_n, block_tail, mask_text=mask_text)
        query_tiles, key_tiles = (torch.from_numpy(table).to(device) for table in (tiles.query_tiles, tiles.key_tiles))
        return _DeviceTiles(query_tiles, key_tiles, tiles.leading)

    return plan.cached(("triton tiles", device, block_m, block_n, block_tail, mask_text), build)


def _summary_bias(plan: Plan, device: torch.device, scale: float) -> torch.Tensor:
    """What is added to a summary's score before scaling, so that log of its count is added after, `[R]` fp32."""
    return plan.cached(("triton summary bias", device, scale), lambda: plan.tensors(device).log_counts / scale)


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
