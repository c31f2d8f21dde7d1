"""Several processes that talk by gloo, each of which runs the same function."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.multiprocessing.spawn import start_processes

# Once for all tests of this process: they take seconds of each process that imports them itself.
_IMPORTED = ("sent_bytes", "shared_calls", "shared_runs", "shared_tiles", "sharded_models")


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of a module returns on each of so many ranks, in processes of their own.

    Args:
        count: of ranks.
        function: takes the process group and the arguments; what it returns must be loadable by `torch.load`.
        arguments: can be pickled.

    Raises:
        ProcessRaisedException: if it raises on one of them, with what it raised.
    """
    _serve_forks()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, folder, dict(os.environ), function, arguments)
        start_processes(_run, arguments, count, start_method="forkserver")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(count)]


def one_after_another(group: ProcessGroup, *calls: tuple[Callable[..., Any], ...]) -> list[Any]:
    """What several functions return on a rank, each with its arguments, so that processes are begun once for all."""
    return [function(group, *arguments) for function, *arguments in calls]


def _serve_forks() -> None:
    """Starts the process that ranks are forked from, which computes nothing itself, if there is none."""
    get_context("forkserver").set_forkserver_preload([*_IMPORTED])
    # Where to import from is otherwise told to its forks alone.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def _run(
    rank: int,
    count: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    met = f"file://{folder}/met"
    distributed.init_process_group("gloo", init_method=met, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    try:
        torch.save(function(distributed.group.WORLD, *arguments), Path(folder, f"{rank}.pt"))
    finally:
        distributed.destroy_process_group()
