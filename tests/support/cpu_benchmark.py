"""Planning, start-up and memory: `make bench`. Prints figures beside their targets; judges nothing. Attention itself is
timed by `grat bench`.

Run it on an idle machine: variants are interleaved and medians printed, but a busy core still shows.
"""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from grat_kernels import Block, CrissCross, Far, Grid, Grouping, Pattern, Union, build_plan, span_attention
from grat_kernels.tile_lists import build_tile_lists

SIDE, HEADS, HEAD_DIM = 128, 4, 64
REPETITIONS = 5


def median_ms(runs: Mapping[str, Callable[[], object]], repetitions: int = REPETITIONS) -> dict[str, list[float]]:
    """Milliseconds of each repetition, all runs interleaved, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repetition:
                times[name].append((time.perf_counter() - start) * 1000)
    return times


def plan_table() -> Table:
    """Time to build plans and their tile lists from nothing."""
    flux, video = Grid((512, 512)), Grid((33, 45, 80))
    cases: dict[str, tuple[Grid, tuple[int, ...], Pattern, int, bool]] = {
        "8192², x": (flux, (16, 16), CrissCross(1), 512, True),
        "8192², b": (flux, (16, 16), Block(1), 512, True),
        "8192², b + far 8×8": (flux, (16, 16), Union(Block(1), Far([(1, (8, 8))])), 512, True),
        "33×45×80, planes": (video, (4, 8, 8), CrissCross(1), 256, False),
        "33×45×80, b + far 4×4×4": (video, (4, 8, 8), Union(Block(1), Far([(1, (4, 4, 4))])), 256, False),
    }

    def build(grid: Grid, group: tuple[int, ...], pattern: Pattern, text_len: int, text_first: bool) -> None:
        build_plan.cache_clear()
        plan = build_plan(Grouping(grid, group), pattern, text_len, text_first)
        _ = plan.order, build_tile_lists(plan, 128, 128, 32, mask_text=False)

    times = median_ms({name: lambda case=case: build(*case) for name, case in cases.items()}, 9)
    table = Table(title="plan, token order and tile lists, built from nothing")
    for column in ("grid and pattern", "median ms (target 100)", "min–max ms"):
        table.add_column(column, justify="right")
    for name, values in times.items():
        table.add_row(name, f"{statistics.median(values):.1f}", _spread(values))
    return table


def memory_table() -> Table:
    """Peak memory of the sdpa backend, each pattern in a process of its own."""
    table = Table(title=f"peak memory of one sdpa call over that of an idle process, {SIDE}×{SIDE} tokens")
    for column in ("pattern", "inputs and output MB", "peak MB", "target MB"):
        table.add_column(column, justify="right")
    for name in ("x", "b", "far"):
        command = [sys.executable, __file__, "--memory", name]
        tensors, peak = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        table.add_row(name, f"{tensors:.0f}", f"{peak:.0f}", f"{1.5 * tensors + 200:.0f}")
    return table


def measure_memory(name: str) -> None:
    """Prints the megabytes of inputs and output, and the peak above the start."""
    pattern = {"x": CrissCross(1), "b": Block(1), "far": Union(Block(1), Far([(1, (8, 8))]))}[name]

    def run(side: int) -> int:
        query, key, value = (torch.randn(1, side * side, HEADS, HEAD_DIM) for _ in range(3))
        plan = build_plan(Grouping(Grid((side, side)), (16, 16)), pattern, 0, True)
        output = span_attention(query, key, value, plan, backend="sdpa")
        return sum(tensor.nbytes for tensor in (query, key, value, output))

    with torch.inference_mode():
        run(32)
        start = _peak_bytes()
        tensors = run(SIDE)
    print(tensors / 1e6, (_peak_bytes() - start) / 1e6)


def start_table() -> Table:
    """Wall-clock time of commands that must not load torch."""
    grat = str(Path(sys.executable).with_name("grat"))
    commands = {
        "grat --help": [grat, "--help"],
        "grat plan flux-x --res 8192": [grat, "plan", "flux-x", "--res", "8192"],
    }
    runs = {
        name: lambda command=command: subprocess.run(command, check=True, capture_output=True)
        for name, command in commands.items()
    }
    table = Table(title="start-up")
    for column in ("command", "median ms (target 500)", "min–max ms"):
        table.add_column(column, justify="right")
    for name, values in median_ms(runs).items():
        table.add_row(name, f"{statistics.median(values):.0f}", _spread(values))
    return table


def _spread(values: list[float]) -> str:
    return f"{min(values):.0f}–{max(values):.0f}"


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        measure_memory(sys.argv[2])
        return
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.platform()}")
    for table in (plan_table, start_table, memory_table):
        console.print(table())


if __name__ == "__main__":
    main()
