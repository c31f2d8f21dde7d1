"""Weights of a transformer that ranks share, where they are too many for the memory of one device.

FSDP2 (`torch.distributed.fsdp.fully_shard`): each rank has a part of every weight; a block is put together on all ranks
as it is called, while the one before it computes, and let go of after it. What it computes is the same to the bit. In
main memory each rank has all weights until they are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput
from grat_cli.models.quantization import quantization_of

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

_NOT_PLAIN = "only plain tensors can be cut in parts"


def require_sharding(
    offload: str = "none", *, quantize: str = "none", cast: str = "none", compiled: bool = False
) -> None:
    """Makes sure that weights can be shared by ranks, before any are loaded.

    Args:
        offload: one of `offloading.OFFLOADS`.
        quantize: one of `quantization.QUANTIZATIONS`.
        cast: one of `quantization.CASTS`.
        compiled: whether blocks are to be compiled.

    Raises:
        BadInput: if they cannot, with the reason.
    """
    if offload not in ("none", "auto"):
        raise BadInput(
            f"--shard-weights with --offload {offload}: weights wait on the other devices, or in main memory: "
            "leave one of them out"
        )
    if quantize != "none":
        raise BadInput(f"--shard-weights with --quantize {quantize}: {_NOT_PLAIN}: leave one of them out")
    if cast != "none":
        raise BadInput(
            f"--shard-weights with --cast {cast}: its hooks turn weights to another dtype in the midst of a block, "
            "which was put together before: leave one of them out"
        )
    if compiled:
        raise BadInput(
            "--shard-weights with --compile: hooks bring weights in the midst of what is compiled: "
            "leave one of them out"
        )


def shard_pipeline(pipe: Any, transformers: Sequence[Any], device: torch.device, mesh: DeviceMesh) -> None:
    """Puts a pipeline on a device, of its transformers the part of this rank.

    Args:
        pipe: a pipeline on the CPU.
        transformers: of it.
        device: where it runs.
        mesh: the ranks; see `shard_weights`.

    Raises:
        BadInput: if the weights are quantized.
    """
    import torch

    for transformer in transformers:
        shard_weights(transformer, mesh)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module) and not any(part is transformer for transformer in transformers):
            part.to(device)


def shard_weights(transformer: Any, mesh: DeviceMesh) -> None:
    """Leaves each rank its part of the weights of a transformer, on its device; for good.

    All ranks have to call it, and the transformer, equally often.

    Args:
        transformer: of diffusers, with all of its weights on the CPU or the device, the same on all ranks. Block by
            block they go to the device, so that it never holds more than the parts and one block.
        mesh: the ranks, along one axis; those of a CUDA device have chosen theirs with `torch.cuda.set_device`.

    Raises:
        BadInput: if the weights are quantized.
    """
    from torch.distributed.fsdp import fully_shard

    if by := quantization_of(transformer):
        raise BadInput(f"--shard-weights: the weights are quantized by {by}, and {_NOT_PLAIN}: leave it out")
    # Gradients would have to be of one dtype in a block.
    transformer.requires_grad_(False)
    for module in (*_blocks(transformer), transformer):
        kind = type(module)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # In front of it FSDP puts a class with methods for training. By their own ones caches of diffusers, and chunks
        # of tokens, know blocks.
        module.__class__ = kind


def _blocks(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a transformer of diffusers, which are in lists."""
    import torch

    lists = [part for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]
    return [block for blocks in lists for block in blocks]
