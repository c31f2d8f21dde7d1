"""Bytes that a rank sends to others, counted where they are handed to `torch.distributed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from shared_calls import STEPS, pictures, predictions
from torch import distributed
from torch.distributed import ProcessGroup


class Sent:
    """What was sent so far."""

    nbytes = 0


@contextmanager
def counted() -> Iterator[Sent]:
    """While inside, counts what the collectives send that ranks exchange tokens and predictions with.

    What is sent to all of a group goes to each of the others.
    """
    sent = Sent()
    kinds: dict[str, Callable[..., int]] = {
        "all_to_all_single": _to_others,
        "all_gather": lambda received, own, group: own.nbytes * (group.size() - 1),
        "broadcast": lambda own, group, group_src: own.nbytes * (group.size() - 1) * (group.rank() == group_src),
    }

    def counting(stock: Callable[..., Any], count: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent.nbytes += count(*args, **kwargs)
            return stock(*args, **kwargs)

        return call

    with patch.multiple(distributed, **{name: counting(getattr(distributed, name), kinds[name]) for name in kinds}):
        yield sent


def _to_others(
    received: torch.Tensor, own: torch.Tensor, from_each: list[int], to_each: list[int], group: ProcessGroup
) -> int:
    rows = sum(to_each) - to_each[group.rank()]
    return rows * own[0].nbytes


def sent_in_calls(ranks: ProcessGroup, names: Sequence[str]) -> dict[str, float]:
    """In a call of the small transformer of each family, on one of the ranks that share it."""
    found = {}
    for name in names:
        with counted() as sent:
            predictions(ranks, [name])
        found[name] = sent.nbytes / STEPS
    return found


def sent_in_run(ranks: ProcessGroup, preset: dict[str, Any], mesh: dict[str, int]) -> int:
    """In a run of the demo model with a preset, on one of the ranks of a mesh."""
    with counted() as sent:
        pictures(ranks, [preset], mesh)
    return sent.nbytes
