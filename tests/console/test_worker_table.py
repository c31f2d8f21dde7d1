"""The table of workers, in terminals of any width and for any number of them."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from grat_cli.console.output import Output
from grat_cli.console.progress import LiveProgress
from grat_cli.console.worker_table import GONE, WorkerRow, worker_table

ROWS = [
    WorkerRow(1, "gpu-node-17.cluster.example", "NVIDIA H200", 40, 12, 30.0, "step 3/28"),
    WorkerRow(2, "gpu-node-18.cluster.example", "NVIDIA H200", 41, 3, 9.0, GONE),
    WorkerRow(3, doing="starting"),
]


def shown(rows: list[WorkerRow], width: int, **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(worker_table(rows, width, **options))
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("width", [20, 40, 60, 120])
def test_it_has_a_line_for_each_however_narrow(width: int) -> None:
    lines = shown(ROWS, width)
    assert len(lines) == 4
    assert all(len(line) <= width for line in lines)
    assert ("NVIDIA" in lines[1]) == (width >= 60)
    if width >= 40:
        assert [lines[1].split()[place] for place in ((2, 3) if width < 60 else (-3, -2))] == ["2.5", "step"]


def test_of_many_it_shows_those_at_work_and_sums_the_others() -> None:
    rows = [WorkerRow(number, made=1, doing=GONE if number < 50 else "denoising") for number in range(1, 101)]
    lines = shown(rows, 80, most=10)
    assert len(lines) == 11
    assert lines[1].split()[0] == "50"
    assert lines[-1].split() == ["91", "more", "91"]


def test_at_the_end_nobody_is_at_anything() -> None:
    assert shown([WorkerRow(1, "here", "CPU", 7, 1, 1.5)], 80, is_live=False)[0].split() == [
        "worker",
        "machine",
        "device",
        "made",
        "s",
        "each",
    ]


def test_a_terminal_has_it_above_the_bar_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output()
    screen = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    output.__dict__["error_console"] = screen
    with LiveProgress(output) as progress:
        progress.phase("workers")
        progress.outputs(0, 20)
        progress.workers(ROWS)
        progress.outputs(15, 20)
    text = screen.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "step 3/28" in text
    assert "15 of 20 done" in text
