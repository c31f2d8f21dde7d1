"""What torch allocates on a CPU while something runs, block by block, scratch memory inside kernels included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, RecordScope, _ExperimentalConfig


@dataclass(frozen=True)
class Tracked:
    """Memory over what was held before.

    Attributes:
        peak_bytes: the most that was held at once of what was allocated inside.
        left_bytes: what was still held at the end.
    """

    peak_bytes: int
    left_bytes: int


def track(run: Callable[[], Any]) -> Tracked:
    """Runs something and adds up what torch's CPU allocator gave and took back.

    The profiler reports every block that the allocator hands out, also those that kernels ask for by themselves, which
    no tensor of Python's stands for. Blocks from before do not count when they are freed. `torch.profiler.profile`
    would record operators as well, a hundred times as much.
    """
    profiler: Any = torch.autograd
    config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
    activities = {ProfilerActivity.CPU}
    profiler._prepare_profiler(config, activities)
    profiler._enable_profiler(config, activities, {RecordScope.USER_SCOPE})
    try:
        result = run()
    finally:
        events = profiler._disable_profiler().events()
    held = peak = 0
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    del result
    return Tracked(peak, held)
