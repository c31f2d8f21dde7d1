"""Runs that several ranks make together, and what they leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from small_runs import Progress
from torch.distributed import ProcessGroup

from grat_cli.errors import Interrupted
from grat_cli.generation import run
from grat_cli.generation.request import Request
from grat_cli.generation.world import World
from grat_cli.models.parallel import Parallel


class Asked(NamedTuple):
    """What ranks are to make, and how far they get.

    Attributes:
        request: with outputs that lie in folders of their own.
        cfg: of the ranks.
        stop: after so many steps they are broken off, all at once; None for not at all.
    """

    request: Request
    cfg: int = 1
    stop: int | None = None


def runs(ranks: ProcessGroup, asked: Sequence[Asked]) -> list[list[dict[str, Any]]]:
    """The reports of what this rank has written."""
    made = []
    for request, cfg, stop in asked:
        world = World(ranks.rank(), None, Parallel(ranks.size() // cfg, cfg))
        reports: list[dict[str, Any]] = []
        try:
            for one in run.generate(request, Progress(stop), None, world):
                reports.append(one.report)
        except (Interrupted, KeyboardInterrupt):
            assert stop is not None
        made.append(reports)
    return made
