"""The ranks that make the outputs of one command together, in processes that torch's launcher starts.

The first one runs the command line, and tells the others what is made; from then on all of them do the same, but it
alone writes and talks. A rank that ends has the others end too: with `RankLost`, or by the launcher's signal.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any

from grat_cli.attention.context_parallel import peers
from grat_cli.attention.ranks import CFG, CP
from grat_cli.errors import INTERRUPTED, BadInput, RankLost
from grat_cli.generation.checkpoint import Run
from grat_cli.generation.report import ranks_data
from grat_cli.generation.request import Request
from grat_cli.generation.sharing import Shard
from grat_cli.generation.timing import StepTiming
from grat_cli.models.devices import choose_device
from grat_cli.models.parallel import Parallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# Within which ranks meet, and wait for one another: while the first one writes a large video, for example.
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This rank among those that make an output together.

    Attributes:
        rank: from 0, which is the one that writes and talks.
        local_rank: among those of its machine; None where nobody says.
        parallel: how they share the work.
        device_type: of all ranks, `cuda` or `cpu`.
        shards_weights: whether those that share a call share the transformer's weights.
        foretold: what `grat plan` says of it, of `machine.foretold`; of the first rank.
    """

    rank: int
    local_rank: int | None
    parallel: Parallel
    device_type: str = "cpu"
    shards_weights: bool = False
    foretold: Mapping[str, float] = field(default_factory=dict)

    @property
    def leads(self) -> bool:
        """Whether it writes and talks."""
        return self.rank == 0

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks, by what they share; the first time, all have to ask."""
        from torch.distributed.device_mesh import init_device_mesh

        with peers():
            return init_device_mesh(self.device_type, (self.parallel.cfg, self.parallel.cp), mesh_dim_names=(CFG, CP))

    @property
    def group(self) -> ProcessGroup:
        """All ranks, for tensors on the device of each."""
        from torch import distributed

        group = distributed.group.WORLD
        assert group is not None, "the ranks have met"
        return group

    @property
    def shares_weights(self) -> DeviceMesh | None:
        """The ranks that share weights: those that share a call, as others may leave out blocks that these compute."""
        return self.mesh[CP] if self.shards_weights else None

    def for_this_rank(self, request: Request) -> Request:
        """A request, but for the first rank without anything that is written beside; and takes the rank's device, which
        `cuda` and `auto` mean from then on.

        Raises:
            BadInput: if this machine has too few devices.
        """
        if self.device_type == "cuda":
            import torch

            local, count = self.local_rank or 0, torch.cuda.device_count()
            if local >= count:
                raise BadInput(
                    f"this machine has {count} CUDA device{'s' * (count != 1)}, and this is rank {local + 1} of it: "
                    "start fewer ranks"
                )
            torch.cuda.set_device(local)
        if self.leads:
            return request
        return replace(request, checkpoint_every=0, preview_every=0, save_latents=False)

    def leave(self) -> None:
        """All outputs are made: parts from the other ranks."""
        from torch import distributed

        distributed.destroy_process_group()

    def told(self, steps: Sequence[StepTiming]) -> dict[str, Any] | None:
        """What each rank took, for the report of the first one; None for the others.

        A rank cannot tell an exchange from waiting for those that take part in it, but none can exchange in less time
        than the one that was waited for: of each step, the least time of all is the exchange, and the rest is waiting.

        Args:
            steps: that this process has done.
        """
        import torch
        from torch import distributed

        own = [[step.total_ms, step.attention_ms, step.exchange_ms, float(step.exchanged_bytes)] for step in steps]
        table = torch.tensor(own, dtype=torch.float64).reshape(len(steps), 4)
        tables: list[Any] | None = [None] * self.parallel.ranks if self.leads else None
        with peers():
            distributed.gather_object(table, tables)
        if tables is None or not steps:
            return None
        totals, attentions, exchanges, sent = torch.stack(tables).unbind(2)  # [ranks, steps] each
        least = exchanges.min(0).values
        each = [
            {
                "rank": rank,
                "total_ms": round(float(totals[rank].sum()), 3),
                "attention_ms": round(float(attentions[rank].sum()), 3),
                "exchange_ms": round(float(least.sum()), 3),
                "waiting_ms": round(float((exchanges[rank] - least).sum()), 3),
                "bytes_per_step": round(fmean(sent[rank].tolist())),
            }
            for rank in range(self.parallel.ranks)
        ]
        return {**ranks_data(self.parallel), "each": each, "foretold": dict(self.foretold)}


def lead(
    request: Request,
    run: Run | None,
    here: Shard,
    parallel: Parallel,
    *,
    shards_weights: bool,
    foretold: Mapping[str, float],
) -> World:
    """Joins the other ranks as the first one, and tells them what is made.

    Raises:
        BadInput: if the device of the request is one for all ranks, or of a kind that cannot exchange.
        RankLost: if they do not come.
    """
    kind, _, number = request.device.partition(":")
    if number or (kind := choose_device(kind).type) == "mps":
        raise BadInput(f"--device {request.device} is one device, and each rank has its own: use cuda, cpu or auto")
    _join()
    world = World(0, here.local_rank, parallel, kind, shards_weights, foretold)
    _broadcast([request, run, parallel, kind, shards_weights])
    return world


def followed(here: Shard) -> tuple[Request, Run | None, World]:
    """Joins as one of the other ranks: what is made, as the first one says.

    Raises:
        RankLost: if they do not come.
    """
    _join()
    request, run, *told = _broadcast([None] * 5)
    return request, run, World(here.rank - 1, here.local_rank, *told)


def _join() -> None:
    """Meets the other ranks; what lies on CPUs is exchanged by gloo, what lies on GPUs by NCCL."""
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with peers():
        distributed.init_process_group(backend, timeout=_TIMEOUT)


def _broadcast(objects: list[Any]) -> list[Any]:
    """What the first rank has, on all of them."""
    import torch
    from torch import distributed

    with peers():
        distributed.broadcast_object_list(objects, src=0, device=torch.device("cpu"))
    return objects


def end_undisturbed() -> None:
    """From here on signals to end do nothing: this process ends by itself, and keeps what is done; the launcher sends
    some as soon as a rank has ended."""
    if threading.current_thread() is threading.main_thread():  # which alone gets signals
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            if hasattr(signal, name):  # Windows lacks one
                signal.signal(getattr(signal, name), signal.SIG_IGN)


def launch(count: int, arguments: Sequence[str]) -> tuple[int, str | None]:
    """Runs a command line on so many ranks of this machine, with torch's launcher.

    Args:
        count: of ranks.
        arguments: of the command line, without the program's name.

    Returns:
        The exit code of the rank that failed first, or 0; and why it ended, where it could not say so itself.

    Raises:
        BadInput: if there are fewer CUDA devices.
    """
    import logging
    from uuid import uuid4

    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices and devices < count:
        raise BadInput(f"--gpus {count}: this machine has {devices} CUDA devices: use --gpus {devices} or fewer")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    # What a rank computes with on a CPU, unless the user says; and no module of the current folder is to be imported.
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), "PYTHONSAFEPATH": "1"}
    quiet = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # ranks say themselves what is wrong
    try:
        with inherited(environment), _own_signals():
            elastic_launch(config, sys.executable)("-m", "grat_cli", *arguments)
    except SignalException:
        return INTERRUPTED, None
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda one: one[1].exitcode == RankLost.exit_code)
        rank, failure = failures[0]
        if failure.exitcode >= 0:
            return failure.exitcode, None
        number = -failure.exitcode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        advice = ", as Linux does where memory runs out" if name == "SIGKILL" else ""
        return 128 + number, f"rank {rank} was ended by {name}{advice}"
    finally:
        logging.disable(quiet)
    return 0, None


@contextmanager
def _own_signals() -> Iterator[None]:
    """What signals do is as before when the block is left: the launcher takes them for itself, and keeps them."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # Windows lacks some
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before: dict[Any, Any] = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # which alone gets signals
            for number, handler in before.items():
                if handler is not None:  # one that Python did not set
                    signal.signal(number, handler)


@contextmanager
def inherited(environment: Mapping[str, str]) -> Iterator[None]:
    """While inside, processes that are started have these variables."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
