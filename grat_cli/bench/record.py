"""The record of a benchmark: what was found at a level, with what every level says about its surroundings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import torch

from grat_cli.bench.results import Absent, BenchResult, Case, Level
from grat_cli.models.devices import device_name
from grat_cli.models.environment import versions


def bench_result(
    level: Level,
    cases: Sequence[Case],
    *,
    device: torch.device,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
    command: str,
    notes: Sequence[str],
    absent: Sequence[Absent] = (),
) -> BenchResult:
    """The result of a level, made now and here.

    Args:
        level: of the benchmark.
        cases: what was measured.
        device: on which.
        dtype: of what was computed.
        settings: what else the figures depend on.
        command: that asked for it.
        notes: what readers of the figures must know.
        absent: peers that were asked for and are not here.
    """
    return BenchResult(
        level=level,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=command,
        device=str(device),
        device_name=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        versions=versions(),
        settings=settings,
        cases=tuple(cases),
        absent=tuple(absent),
        notes=tuple(notes),
    )
