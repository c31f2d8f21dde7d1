"""Several processes that talk by gloo, each of which runs the same function."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.multiprocessing.spawn import spawn


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of a module returns on each of so many ranks, in processes of their own.

    Args:
        count: of ranks.
        function: takes the process group and the arguments; what it returns must be loadable by `torch.load`.
        arguments: can be pickled.

    Raises:
        ProcessRaisedException: if it raises on one of them, with what it raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run, (count, folder, function, arguments), count)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(count)]


def one_after_another(group: ProcessGroup, *calls: tuple[Callable[..., Any], ...]) -> list[Any]:
    """What several functions return on a rank, each with its arguments, so that processes are begun once for all."""
    return [function(group, *arguments) for function, *arguments in calls]


def _run(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    met = f"file://{folder}/met"
    distributed.init_process_group("gloo", init_method=met, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    try:
        torch.save(function(distributed.group.WORLD, *arguments), Path(folder, f"{rank}.pt"))
    finally:
        distributed.destroy_process_group()
