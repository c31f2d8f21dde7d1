"""The Triton backend with warp specialisation, for Hopper: what it needs, and the launch of its kernel."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from grat_kernels.launching import (
    LOG2_E,
    Launch,
    descriptor,
    fits_descriptor,
    hopper_obstacle,
    on_device,
    tokens_obstacle,
)
from grat_kernels.padded_text import padded_positions
from grat_kernels.plan import HeadPlan
from grat_kernels.summaries import summarise
from grat_kernels.tile_configs import SPECIALISED, HopperConfig
from grat_kernels.tile_lists import EMPTY, build_single_lists

if TYPE_CHECKING:
    from grat_kernels.plan import Plan

DESCRIPTION = "warp-specialised span kernel in Triton, for Hopper GPUs"

_DTYPES = (torch.float16, torch.bfloat16)
# What the compiler specialises; it adds the warps of the second computing group and of the loading one.
_WARPS = 4


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None) -> str | None:
    """Why the kernel cannot run, in words, or None where it can. Never raises.

    Args:
        device: where the tensors lie.
        dtype: dtype of query, key and value.
        head_dim: channels per head.
        tokens: length of the joint sequence, where known.
    """
    # Triton's interpreter stands in for tests, in the dtypes that it computes rightly.
    dtypes = (torch.float16, torch.float32) if device.type == "cpu" else _DTYPES
    if dtype not in dtypes:
        names = " and ".join(str(known).removeprefix("torch.") for known in dtypes)
        return f"it takes {names} on {device.type}, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in SPECIALISED:
        return f"it takes head dimensions of {' and '.join(map(str, SPECIALISED))}, not {head_dim}"
    return tokens_obstacle(tokens) or hopper_obstacle(device)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan | HeadPlan,
    text_valid: torch.Tensor | None,
    scale: float,
    *,
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: HopperConfig | None = None,
) -> torch.Tensor:
    """Span attention by the warp-specialised kernel.

    Its one loop reads one matrix of keys and one of values. So with a far field, or with padded text, keys and values
    are copied once, with the summaries behind them and zeros for padding: with 24 heads of 128 channels and 262,656
    tokens that moves 6.5 GB.

    A NaN in a token that is not attended can reach the output (0·NaN) through a partial tile: where what a span has
    left after its full tiles ends less than a tile before that token. Padded text is exempt.

    Args:
        query: `[B, N, H, D]`, image tokens in the plan's order. A tensor that cannot be read as a matrix `[B·N, H·D]`
            in place is copied first.
        key: `[B, N, H, D]`.
        value: `[B, N, H, D]`.
        plan: what attends what.
        text_valid: valid text tokens of each sample, `[B]` integers, or None for all.
        scale: positive factor on the scores.
        summaries: means of keys and of values over the plan's far blocks, `[B, R, H, D]`, where they are known.
        config: tiles other than the table's, for tests and tuning.

    Returns:
        `[B, N, H, D]`, contiguous, in the dtype of `query`.

    Raises:
        ValueError: if the scale is not positive.
    """
    if plan.text_len == 0:
        text_valid = None
    padded = None if text_valid is None else padded_positions(plan, text_valid, query.device)
    if plan.summaries.rows:
        summary_key, summary_value = summaries or (summarise(key, plan), summarise(value, plan))
        key, value = torch.cat([key, summary_key], dim=1), torch.cat([value, summary_value], dim=1)
    elif padded is not None:
        key, value = key.clone(), value.clone()
    if padded is not None:
        # A weight of zero does not silence a NaN (0·NaN).
        text = slice(plan.text_start, plan.text_start + plan.text_len)
        for tensor in (key, value):
            tensor[:, text].masked_fill_(padded[:, text, None, None], 0)
    query, key, value = (
        tensor if fits_descriptor(tensor) else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in (query, key, value)
    )
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    launch = launch_of(query, key, value, output, plan, padded, scale, config or SPECIALISED[query.shape[3]])
    with on_device(query.device):
        # The allocator of Triton's scratch memory is the caller's business: ours holds in this context only.
        contextvars.copy_context().run(_run, launch, query.device)
    return output


def _run(launch: Launch, device: torch.device) -> None:
    import triton

    from grat_kernels.ws_kernel import specialised_attention_kernel

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    specialised_attention_kernel[(launch.programs,)](*launch.arguments, **launch.options)


def launch_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    plan: Plan | HeadPlan,
    padded: torch.Tensor | None,
    scale: float,
    config: HopperConfig,
) -> Launch:
    """The launch for these tensors, which may lie on the meta device: ahead-of-time compilation asks for it too.

    Args:
        query: `[B, N, H, D]`, as the others one that fits a tensor descriptor.
        key: `[B, N + R, H, D]`, tokens, then summaries.
        value: `[B, N + R, H, D]`.
        output: `[B, N, H, D]`, contiguous.
        plan: what attends what.
        padded: whether each position is padded text, `[B, N]`; None where there is none.
        scale: positive factor on the scores.
        config: tiles.

    Raises:
        ValueError: if the scale is not positive.
    """
    if not scale > 0:
        raise ValueError(f"the warp-specialised kernel needs a positive scale, not {scale}")
    batch, tokens, heads, head_dim = query.shape
    block_m, block_n, stages = config[:3]
    tiles = _device_tiles(plan, query.device, block_m, block_n, bias_text=padded is not None)
    bias = _bias(plan, tiles, padded, scale)
    arguments = (
        query,
        descriptor(key, block_n),
        descriptor(value, block_n),
        None if bias is None else _vector_descriptor(bias, block_n),
        output,
        tiles.class_of_head,
        tiles.query_tiles,
        tiles.key_tiles,
        query.stride(1),
        batch * tokens,
        tokens,
        key.shape[1],
        0 if padded is None else len(tiles.biased_rows),
        heads,
        tiles.count,
        tiles.leading,
        tiles.leading * batch * heads,
        scale * LOG2_E,
    )
    options = {
        "HEAD_DIM": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "STAGES": stages,
        "PARTIAL": tiles.partial,
        "num_warps": _WARPS,
        "num_stages": stages,
    }
    return Launch(tiles.count * batch * heads, arguments, options)


class _DeviceTiles(NamedTuple):
    """`SingleLists` on a device.

    Attributes:
        class_of_head: class of each head, `[H]` int32; None where there is one class.
        count: query tiles of one class, T.
        partial: whether any tile has fewer rows than the others.
    """

    query_tiles: torch.Tensor
    key_tiles: torch.Tensor
    biased_rows: torch.Tensor
    class_of_head: torch.Tensor | None
    count: int
    leading: int
    partial: bool


def _device_tiles(
    plan: Plan | HeadPlan, device: torch.device, block_m: int, block_n: int, *, bias_text: bool
) -> _DeviceTiles:
    def build() -> _DeviceTiles:
        tiles = build_single_lists(plan, block_m, block_n, bias_text=bias_text)
        tables = (tiles.query_tiles, tiles.key_tiles, tiles.biased_rows)
        query_tiles, key_tiles, biased_rows = (torch.from_numpy(table).to(device) for table in tables)
        class_of_head = None
        if isinstance(plan, HeadPlan):
            class_of_head = torch.tensor(plan.class_of_head, dtype=torch.int32, device=device)
        return _DeviceTiles(
            query_tiles,
            key_tiles,
            biased_rows,
            class_of_head,
            len(query_tiles) // len(plan.classes),
            tiles.leading,
            bool((tiles.key_tiles[:, 1] < block_n).any()),
        )

    return plan.cached(("single lists", device, block_m, block_n, bias_text), build)


def _bias(plan: Plan | HeadPlan, tiles: _DeviceTiles, padded: torch.Tensor | None, scale: float) -> torch.Tensor | None:
    """What is added to the scores of each biased tile before scaling, `[P, block_n]` or `[B, P, block_n]` fp32.

    Summaries: so that the logarithm of their tokens is added after scaling. Padded text: -inf. Where there are
    neither, None.
    """
    device = tiles.biased_rows.device

    def of_every_row() -> torch.Tensor:
        # The zero at the end is where EMPTY finds it.
        tokens, end = torch.zeros(plan.tokens, device=device), torch.zeros(1, device=device)
        return torch.cat([tokens, plan.tensors(device).log_counts / scale, end])

    def of_every_tile() -> torch.Tensor:
        return of_every_row()[tiles.biased_rows]

    assert EMPTY == -1
    if padded is not None:
        row_bias = plan.cached(("bias of every row", device, scale), of_every_row)
        row_padded = torch.nn.functional.pad(padded, (0, len(row_bias) - plan.tokens))
        return torch.where(row_padded, -torch.inf, row_bias)[:, tiles.biased_rows]
    if plan.summaries.rows:
        return plan.cached(("bias of every tile", device, scale, tiles.biased_rows.shape), of_every_tile)
    return None


def _vector_descriptor(tensor: torch.Tensor, rows: int) -> Any:
    """A contiguous tensor as a vector, read in blocks of `rows`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, [tensor.numel()], [1], [rows])
