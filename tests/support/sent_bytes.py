"""Bytes that a rank sends to others: as they are recorded, and counted where they are handed to `torch.distributed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from shared_calls import pictures
from small_transformers import MODELS, FullRun
from torch import distributed
from torch.distributed import ProcessGroup

from grat_cli.generation.timing import StepRecorder
from grat_kernels import Backend


class Sent(NamedTuple):
    """Of one rank.

    Attributes:
        in_calls: recorded of a call of the small transformer of each family.
        counted: of the same.
        in_run: counted of a run of the demo model.
    """

    in_calls: list[int]
    counted: list[int]
    in_run: int


def sent(ranks: ProcessGroup, names: Sequence[str], preset: dict[str, Any], mesh: dict[str, int]) -> Sent:
    """What one of some ranks sends, which share calls of small transformers with as many heads, and a run with a preset
    as a mesh says."""
    recorded, counted = [], []
    for name in names:
        kind = MODELS[name]
        adapter = kind.adapter(small(name, ranks.size()), kind.grids[1], ranks=ranks)
        recorder = StepRecorder()
        with torch.no_grad(), _counted() as count, adapter.attached(FullRun(adapter), Backend.SDPA, recorder):
            adapter.model(**kind.inputs(adapter.grid))
        recorded.append(recorder.steps([1000.0])[0].exchanged_bytes)
        counted.append(sum(count))
    with _counted() as count:
        pictures(ranks, [preset], mesh)
    return Sent(recorded, counted, sum(count))


def small(name: str, ranks: int) -> Any:
    """The small transformer of a family, with heads for so many ranks."""
    make: Callable[..., Any] = MODELS[name].make
    return make(num_attention_heads=ranks)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """While inside, lists what the collectives send that ranks exchange tokens and predictions with.

    What is sent to all of a group goes to each of the others.
    """
    found: list[int] = []
    kinds: dict[str, Callable[..., int]] = {
        "all_to_all_single": _to_others,
        "all_gather": lambda received, own, group: own.nbytes * (group.size() - 1),
        "broadcast": lambda own, group, group_src: own.nbytes * (group.size() - 1) * (group.rank() == group_src),
    }

    def counting(stock: Callable[..., Any], count: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(count(*args, **kwargs))
            return stock(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for name, count in kinds.items():
            patches.enter_context(patch.object(distributed, name, counting(getattr(distributed, name), count)))
        yield found


def _to_others(
    received: torch.Tensor, own: torch.Tensor, from_each: list[int], to_each: list[int], group: ProcessGroup
) -> int:
    rows = sum(to_each) - to_each[group.rank()]
    return rows * own[0].nbytes
