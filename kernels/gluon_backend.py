"""The Gluon backend: what it needs, and the launch of the span kernel for Hopper and Blackwell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from grat_kernels.launching import (
    LOG2_E,
    Launch,
    descriptor,
    device_tiles,
    fits_descriptor,
    on_device,
    tokens_obstacle,
    triton_obstacle,
)
from grat_kernels.summaries import summarise
from grat_kernels.tile_configs import GLUON, GluonConfig, architecture_of
from grat_kernels.tile_lists import EMPTY

if TYPE_CHECKING:
    from grat_kernels.plan import HeadPlan, Plan

DESCRIPTION = "span kernel in Gluon, for Hopper and Blackwell (compute capabilities 9.0 and 10)"

_DTYPES = (torch.float16, torch.bfloat16)
# What one cp.async copies, in elements: rows of packed tiles are addressed in these.
_VECTOR = 8
# Consumers share the queries of a tile.
_CONSUMERS = 2
_WARPS = 4
# With which threads start, of the 64 K of a multiprocessor: three warp groups on Hopper, four on Blackwell. The limit
# also makes their split take effect.
_HOPPER_REGISTERS, _BLACKWELL_REGISTERS = 168, 128


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None) -> str | None:
    """Why the kernel cannot run, in words, or None where it can. Never raises.

    Args:
        device: where the tensors lie.
        dtype: dtype of query, key and value.
        head_dim: channels per head.
        tokens: length of the joint sequence, where known.
    """
    if dtype not in _DTYPES:
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu":
        return "it runs on Hopper and Blackwell GPUs, not on cpu"
    return tokens_obstacle(tokens) or triton_obstacle(device) or _gpu_obstacle(device, head_dim) or _language_obstacle()


@torch.compiler.assume_constant_result
def _gpu_obstacle(device: torch.device, head_dim: int) -> str | None:
    architecture = served_architecture(device)
    if architecture is None:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        named = "ROCm" if torch.version.hip is not None else f"compute capability {capability}"
        return f"it needs a Hopper or Blackwell GPU (compute capability 9.0 or 10), {device} has {named}"
    if head_dim not in GLUON[architecture]:
        served = ", ".join(map(str, GLUON[architecture]))
        return f"it takes head dimensions {served} on {architecture}, not {head_dim}"
    return None


def served_architecture(device: torch.device) -> str | None:
    """The key of `GLUON` for a GPU, or None where the kernel is not for it."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability[0] not in (9, 10):
        return None
    return architecture_of(capability)


def _language_obstacle() -> str | None:
    """Whether the installed Gluon, which is experimental, is one that the kernel is written in."""
    try:
        from triton.experimental.gluon.language.nvidia.blackwell import get_tmem_reg_layout
        from triton.experimental.gluon.language.nvidia.hopper import tma
    except ImportError:
        get_tmem_reg_layout = tma = None
    if get_tmem_reg_layout is None or not hasattr(tma, "async_copy_global_to_shared"):
        import triton

        return f"it is written in the Gluon language of Triton 3.6 and 3.7, here is Triton {triton.__version__}"
    return None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan | HeadPlan,
    text_valid: torch.Tensor | None,
    scale: float,
    *,
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: GluonConfig | None = None,
) -> torch.Tensor:
    """Span attention by the Gluon kernel; shapes and arguments as in `grat_kernels.span_attention`.

    A tensor that the tensor memory accelerator cannot read as `[B·N, H·D]` is copied first, see `fits_descriptor`.

    Args:
        config: tiles other than the table's, for tests and tuning.

    Raises:
        ValueError: if the scale is not positive.
    """
    query, key, value = (
        tensor if fits_descriptor(tensor) else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in (query, key, value)
    )
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if plan.summaries.rows and summaries is None:
        summaries = (summarise(key, plan), summarise(value, plan))
    architecture = served_architecture(query.device)
    assert architecture is not None
    launch = launch_of(
        query,
        key,
        value,
        output,
        *(summaries or (None, None)),
        plan,
        text_valid,
        scale,
        config or GLUON[architecture][query.shape[3]],
    )
    from grat_kernels.gluon_kernel import span_attention_kernel

    with on_device(query.device):
        multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
        span_attention_kernel[(min(multiprocessors, launch.programs),)](*launch.arguments, **launch.options)
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
    config: GluonConfig,
) -> Launch:
    """The launch for these tensors, which may lie on any device: ahead-of-time compilation asks for it too.

    Raises:
        ValueError: if the scale is not positive.
    """
    if not scale > 0:
        raise ValueError(f"the Gluon kernel needs a positive scale, not {scale}")
    device = query.device
    batch, tokens, heads, _ = query.shape
    block_m, block_n = config.block_m, config.block_n
    if plan.text_len == 0:
        text_valid = None
    tiles = device_tiles(plan, device, block_m, block_n, block_n, scale, mask_text=text_valid is not None)
    packed = len(tiles.packed_rows) > 0
    runs = None
    if text_valid is not None:
        key_of_runs = ("runs", device, block_m, block_n)
        runs = plan.cached(key_of_runs, lambda: _runs_of(tiles.packed_rows, tokens))
    items = tiles.count * batch * heads
    sources = (
        (query, block_m // _CONSUMERS),
        (key, block_n),
        (value, block_n),
        (summary_key, block_n),
        (summary_value, block_n),
    )
    arguments = (
        *(None if tensor is None else descriptor(tensor, rows, gluon=True) for tensor, rows in sources),
        key,
        value,
        summary_key,
        summary_value,
        output,
        tiles.summary_bias,
        tiles.packed_rows if packed else None,
        tiles.packed_bias if packed else None,
        runs,
        None if text_valid is None else text_valid.to(device, torch.int32),
        tiles.query_tiles,
        tiles.key_tiles,
        tiles.class_of_head,
        torch.zeros(1, dtype=torch.int32, device=device),
        key.stride(1) // _VECTOR,
        value.stride(1) // _VECTOR,
        tokens,
        heads,
        plan.summaries.rows,
        plan.text_start,
        plan.text_start + plan.text_len,
        tiles.count,
        tiles.leading,
        tiles.leading * batch * heads,
        items,
        scale * LOG2_E,
    )
    options = {
        "QUERY_STAGES": config.query_stages,
        "KEY_STAGES": config.stages,
        "VALUE_STAGES": config.value_stages,
        "num_warps": _WARPS,
        "maxnreg": _BLACKWELL_REGISTERS if config.tensor_memory else _HOPPER_REGISTERS,
        "TENSOR_MEMORY": config.tensor_memory,
    }
    return Launch(items, arguments, options)


def _runs_of(packed_rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """First token of each packed tile that holds tokens one after another, `EMPTY` for the others, `[P]` int32.

    They are text, which is packed lest its padding is read: where none of it is padded, it can be read as one block.

    Args:
        packed_rows: as in `TileLists`, `[P, BLOCK_N]`.
        tokens: in the joint sequence; larger rows are summaries.
    """
    first, last = packed_rows[:, 0], packed_rows[:, -1]
    follow = (packed_rows[:, 1:] == packed_rows[:, :-1] + 1).all(1)
    return torch.where(follow & (first >= 0) & (last < tokens), first, EMPTY)
