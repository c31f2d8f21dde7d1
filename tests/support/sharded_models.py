"""Transformers whose weights ranks share, and what they predict; with all weights on one rank as well."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from shared_calls import STEPS
from small_transformers import MODELS, Run
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from grat_cli.models.sharding import shard_weights
from grat_kernels import Backend


class Sharded(NamedTuple):
    """Of a transformer.

    Attributes:
        predictions: `[steps, ...]`.
        share: of the bytes of weights that this rank holds.
        kept: bytes of all tensors after calls beyond those before.
        whole: blocks that are whole at the end of one, at most.
        chunking: of the adapter.
    """

    predictions: torch.Tensor
    share: float
    kept: int
    whole: int
    chunking: tuple[int | None, str]


def sharded(
    ranks: ProcessGroup | None, names: Sequence[str], *, chunk: int | None = None, is_call_shared: bool = False
) -> dict[str, Sharded]:
    """Of the small transformer of each family, with GRAT, at steps with other plans.

    Args:
        ranks: that share the weights; None for one that has them all.
        names: of families.
        chunk: most tokens of a chunk.
        is_call_shared: whether they share calls, too.
    """
    made = {}
    for name in names:
        kind = MODELS[name]
        model: Any = kind.make()
        size = sum(parameter.nbytes for parameter in model.parameters())
        if ranks is not None:
            shard_weights(model, DeviceMesh.from_group(ranks, "cpu"))
        share = sum(local(parameter).nbytes for parameter in model.parameters()) / size
        adapter = kind.adapter(model, kind.grids[0], chunk_tokens=chunk, ranks=ranks if is_call_shared else None)
        run, whole, outputs = Run(adapter), [0], []

        def count(*_: Any, blocks: Any = adapter.blocks, whole: list[int] = whole) -> None:
            parameters = [next(block.parameters()) for block in blocks]
            whole.append(sum(not isinstance(parameter, DTensor) for parameter in parameters))

        for block in adapter.blocks:
            block.register_forward_pre_hook(count)
        before = held()
        with torch.no_grad(), adapter.attached(run, Backend.SDPA):
            for run.step in range(STEPS):
                output: Any = model(**kind.inputs(adapter.grid))
                outputs.append(output[0] if isinstance(output, tuple) else output.sample)
        made[name] = Sharded(torch.stack(outputs), share, held() - before, max(whole), adapter.chunking)
    return made


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def held() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor):
            storage = local(one).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def variants(ranks: ProcessGroup | None, names: Sequence[str]) -> list[dict[str, Sharded]]:
    """Of each transformer: as it is, in chunks of tokens, and where ranks share calls as well."""
    return [
        sharded(ranks, names),
        sharded(ranks, names, chunk=16),
        sharded(ranks, names, is_call_shared=ranks is not None),
    ]
