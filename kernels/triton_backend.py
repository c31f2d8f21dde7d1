"""The Triton backend: what it needs, and the launch of the span kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from grat_kernels.chosen_tiles import choose_tiles
from grat_kernels.launching import (
    LOG2_E,
    Launch,
    descriptor,
    device_tiles,
    fits_descriptor,
    on_device,
    padded_head_dim,
    tokens_obstacle,
    triton_obstacle,
)
from grat_kernels.summaries import summary_pair
from grat_kernels.tile_configs import TileConfig, architecture_of, tile_config

if TYPE_CHECKING:
    from grat_kernels.plan import HeadPlan, Plan

DESCRIPTION = "span kernel in Triton, for CUDA and ROCm devices"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None) -> str | None:
    """Why the kernel cannot run, in words, or None where it can. Never raises.

    Args:
        device: where the tensors lie.
        dtype: dtype of query, key and value.
        head_dim: channels per head.
        tokens: length of the joint sequence, where known.
    """
    if dtype not in _DTYPES:
        return f"it takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        return f"it takes head dimensions up to {_MAX_HEAD_DIM}, not {head_dim}"
    reason = tokens_obstacle(tokens) or triton_obstacle(device)
    if reason is None and device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly: use float16 or float32 there"
    return reason


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan | HeadPlan,
    text_valid: torch.Tensor | None,
    scale: float,
    *,
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Span attention by the Triton kernel; shapes and arguments as in `grat_kernels.span_attention`.

    A tensor whose channels do not follow one another in memory is copied first.

    Args:
        config: tiles other than the table's, for tests and tuning.

    Raises:
        ValueError: if the scale is not positive, or `config` wants descriptors that the tensors do not allow.
    """
    query, key, value = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    config = config or config_for(query, key, value)
    summary_key = summary_value = chosen = None
    if plan.summaries.rows:
        summary_key, summary_value = pair = summary_pair(key, value, plan, summaries)
        if plan.chooses:
            chosen = choose_tiles(query, pair, plan, scale, config.block_tail)
    launch = launch_of(query, key, value, output, summary_key, summary_value, plan, text_valid, scale, config, chosen)
    from grat_kernels.span_kernel import span_attention_kernel

    with on_device(query.device):
        span_attention_kernel[(launch.programs,)](*launch.arguments, **launch.options)
    return output


def launch_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    summary_key: torch.Tensor | None,
    summary_value: torch.Tensor | None,
    plan: Plan | HeadPlan,
    text_valid: torch.Tensor | None,
    scale: float,
    config: TileConfig,
    chosen: torch.Tensor | None = None,
) -> Launch:
    """The launch for these tensors, which may lie on the meta device: ahead-of-time compilation asks for it too.

    Args:
        query: as the next three `[B, N, H, D]`.
        key: any strides but for the last, which is 1.
        value: likewise.
        output: contiguous.
        summary_key: `[B, R, H, D]` contiguous; None without far field.
        summary_value: likewise.
        plan: what attends what.
        text_valid: valid text tokens of each sample, `[B]` integers, or None for all.
        scale: positive factor on the scores.
        config: tiles.
        chosen: what `choose_tiles` returns for tiles of `config.block_tail`, where the plan has a choice.

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
    tiles = device_tiles(plan, device, block_m, block_n, block_tail, scale, mask_text=text_valid is not None)
    blocks: list[Any] = [None] * 5
    if form == "tma":
        if not all(fits_descriptor(tensor) for tensor in (query, key, value)):
            raise ValueError("these tensors cannot be read through tensor descriptors: use the pointer form")
        sources = ((query, block_m), (key, block_n), (value, block_n), (summary_key, block_n), (summary_value, block_n))
        blocks = [None if tensor is None else descriptor(tensor, rows) for tensor, rows in sources]
    arguments = (
        query,
        key,
        value,
        output,
        *blocks[:3],
        summary_key,
        summary_value,
        *blocks[3:],
        tiles.summary_bias,
        None if text_valid is None else text_valid.to(device, torch.int32),
        tiles.class_of_head,
        tiles.query_tiles,
        tiles.key_tiles,
        tiles.packed_rows,
        tiles.packed_bias,
        tiles.chosen_tiles,
        chosen,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        heads * head_dim,
        tokens,
        heads,
        plan.summaries.rows,
        plan.text_start,
        plan.text_start + plan.text_len,
        tiles.count,
        tiles.leading,
        tiles.leading * batch * heads,
        None if chosen is None else chosen.shape[2],
        scale * LOG2_E,
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
    return Launch(tiles.count * batch * heads, arguments, options)


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
