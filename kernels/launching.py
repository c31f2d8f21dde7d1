"""What the launchers of all compiled kernels share: layouts they can read, and a plan's tables on a device."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from grat_kernels.plan import HeadPlan
from grat_kernels.tile_lists import EMPTY, build_tile_lists

if TYPE_CHECKING:
    from grat_kernels.plan import Plan

LOG2_E = 1.4426950408889634
# Smallest inner dimension of a matrix product in Triton.
_MIN_PADDED_DIM = 16


class Launch(NamedTuple):
    """Everything that a kernel is launched with.

    Attributes:
        programs: as many as there is work for; kernels whose programs share it out take fewer as well.
        arguments: run-time arguments in order.
        options: constants and options of the compiler.
    """

    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, int]


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


def descriptor(tensor: torch.Tensor, rows: int, *, gluon: bool = False) -> Any:
    """`tensor` `[B, N, H, D]` as a matrix `[B·N, H·D]`, read in blocks of `rows` tokens of one head.

    Args:
        tensor: one that fits, see `fits_descriptor`; for Gluon in 16 bits.
        rows: tokens of a block.
        gluon: whether for a kernel in Gluon, which says how blocks lie in shared memory.
    """
    batch, tokens, heads, head_dim = tensor.shape
    block = [rows, head_dim]
    matrix = tensor, [batch * tokens, heads * head_dim], [tensor.stride(1), 1], block
    if not gluon:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(*matrix)
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    element = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    layout: Any = gl.NVMMASharedLayout.get_default_for(block, element)
    return GluonDescriptor(*matrix, layout)


@torch.compiler.assume_constant_result
def triton_obstacle(device: torch.device) -> str | None:
    """Why no Triton kernel runs on a device, in words, or None where they do. Never raises."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux only)"
    if device.type == "cpu":
        return _interpreter_obstacle()
    if device.type != "cuda":
        return f"it runs on CUDA and ROCm devices, not on {device.type}"
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return f"there is no device {device}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, {device} has {capability[0]}.{capability[1]}"
    return None


def tokens_obstacle(tokens: int | None) -> str | None:
    """Why no kernel of ours takes so many tokens, in words, or None."""
    if tokens is not None and tokens >= 2**31:
        return f"it counts tokens in 32 bits, {tokens} are too many"
    return None


def _interpreter_obstacle() -> str | None:
    from triton.runtime.interpreter import InterpretedFunction

    from grat_kernels.span_kernel import span_attention_kernel

    if isinstance(span_attention_kernel, InterpretedFunction):
        return None
    return "it runs on CUDA and ROCm devices; on the CPU only in Triton's interpreter: set TRITON_INTERPRET=1 at start"


class DeviceTiles(NamedTuple):
    """`TileLists` on a device, with the scores' biases.

    Attributes:
        class_of_head: class of each head, `[H]` int32; None where there is one class.
        packed_bias: what is added to the score of each slot before scaling, `[P, block_tail]` fp32.
        summary_bias: the same for each summary row, `[R]` fp32; None without far field.
        count: query tiles of one class, T.
        chosen_tiles: None where nothing is chosen by content.
    """

    query_tiles: torch.Tensor
    key_tiles: torch.Tensor
    packed_rows: torch.Tensor
    packed_bias: torch.Tensor
    summary_bias: torch.Tensor | None
    class_of_head: torch.Tensor | None
    count: int
    leading: int
    chosen_tiles: torch.Tensor | None = None


def device_tiles(
    plan: Plan | HeadPlan,
    device: torch.device,
    block_m: int,
    block_n: int,
    block_tail: int,
    scale: float,
    *,
    mask_text: bool,
) -> DeviceTiles:
    """A plan's tile lists on a device, moved once; arguments as for `build_tile_lists`.

    Args:
        scale: factor on the scores. Biases are divided by it, so that what is added after scaling is the logarithm of
            the tokens that a summary stands for.
    """

    def build() -> DeviceTiles:
        tiles = build_tile_lists(plan, block_m, block_n, block_tail, mask_text=mask_text)
        summary_bias = (np.log(plan.summaries.counts) / scale).astype(np.float32)
        # Bias of any position: 0 for tokens, then the summaries, -inf last, where EMPTY finds it.
        bias = np.concatenate([np.zeros(plan.tokens, np.float32), summary_bias, np.full(1, -np.inf, np.float32)])
        assert EMPTY == -1
        tables = (tiles.query_tiles, tiles.key_tiles, tiles.packed_rows, bias[tiles.packed_rows])
        classes = np.asarray(plan.class_of_head, np.int32) if isinstance(plan, HeadPlan) else None

        def moved(table: np.ndarray | None) -> torch.Tensor | None:
            return None if table is None else torch.from_numpy(table).to(device)

        return DeviceTiles(
            *(torch.from_numpy(table).to(device) for table in tables),
            summary_bias=moved(summary_bias if plan.summaries.rows else None),
            class_of_head=moved(classes),
            count=len(tiles.query_tiles) // len(plan.classes),
            leading=tiles.leading,
            chosen_tiles=moved(tiles.chosen_tiles),
        )

    return plan.cached(("device tiles", device, block_m, block_n, block_tail, scale, mask_text), build)


def heads_of_class(plan: HeadPlan, number: int, device: torch.device) -> slice | torch.Tensor:
    """The heads of a class; where they follow one another as a slice, which takes a view."""
    heads = plan.heads_of(number)
    if len(heads) == heads[-1] - heads[0] + 1:
        return slice(heads[0], heads[-1] + 1)
    return plan.cached(("heads", number, device), lambda: torch.tensor(heads, device=device))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a CUDA device current: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
