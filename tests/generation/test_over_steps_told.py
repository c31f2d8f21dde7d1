"""What is told of runs whose attention is carried over steps: by progress, reports, tables and files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from small_runs import Progress, Small, broken_off, generate, tamper

from grat_cli.console import run_tables
from grat_cli.errors import BadInput
from grat_cli.files.json_objects import validated
from grat_cli.generation.checkpoint import read_run
from grat_cli.generation.told import ShownReport

MIXED = [{"reference": [0, 2], "layers": 0}, {"reference": [0, 3], "layers": "1-2"}]


def over_steps(small: Small, section: Any, *places: Path, **changes: Any) -> Any:
    return small.of(*places, preset=small.preset(schedule={"over_steps": section}), **changes)


def shown(renderable: Any, columns: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=columns).print(renderable)
    return file.getvalue()


@pytest.mark.parametrize("small", ["picture", "video"], indirect=True)
@pytest.mark.usefixtures("loaded", "written")
def test_steps_are_told_by_what_they_were(small: Small, tmp_path: Path) -> None:
    progress = Progress()
    (made,) = generate(over_steps(small, {"reference": [0, 2]}, tmp_path / "a"), progress)
    kinds = ["reference", "carried", "reference", "carried", "carried"]
    assert [step["over_steps"] for step in made.report["steps"]] == progress.works == kinds
    told = made.report["over_steps"]
    assert told["steps"] == [
        {"kind": "reference", "steps": "0, 2", "count": 2},
        {"kind": "carried", "steps": "1, 3-4", "count": 3},
    ]
    assert told["layers"] is None
    assert told["foretold_bytes"] == told["kept_bytes"] > 0
    assert made.report["density"] == pytest.approx(np.mean([step["density"] for step in made.report["steps"]]))
    assert made.report["stages"][0]["over_steps"] == told
    (line,) = run_tables.over_steps_lines([made.report])
    assert line.startswith("over steps: 2 reference steps of 5 (1, 3), attention carried to the others; kept ")
    table = shown(run_tables.timing_table(made.report), 40)
    assert [row.split()[0] for row in table.splitlines()[2:4]] == ["reference", "carried"]
    validated(ShownReport, made.report)


@pytest.mark.parametrize("small", ["picture"], indirect=True)
@pytest.mark.usefixtures("loaded", "written")
def test_layers_that_differ_and_runs_that_go_on(small: Small, tmp_path: Path) -> None:
    progress, asked = Progress(), over_steps(small, MIXED, tmp_path / "a", checkpoint_every=1)
    (made,) = generate(asked, progress)
    # The demo has five layers, of which the last two are always computed.
    assert [step["over_steps"] for step in made.report["steps"]] == [
        "reference",
        "carried",
        "mixed",
        "mixed",
        "carried",
    ]
    assert progress.works[2] == "mixed: layers 0, 3-4 computed, the rest carried"
    (line,) = run_tables.over_steps_lines([made.report])
    assert line.partition("; ")[0] == (
        "over steps: 1 reference step of 5 (1), 2 mixed steps (3-4), attention of layers 0-2 carried to the others"
    )
    for path in tmp_path.iterdir():
        path.unlink()
    kept = broken_off(asked, 3)
    begun, restored = read_run(kept)
    (again,) = generate(restored, begun=begun)
    # Nothing that is carried is in a file, so the run goes on with a reference.
    assert [step["over_steps"] for step in again.report["steps"]][2:] == ["mixed", "reference", "carried"]
    assert again.report["over_steps"]["kept_bytes"] > 0


@pytest.mark.parametrize("small", ["picture"], indirect=True)
@pytest.mark.usefixtures("loaded", "written")
@pytest.mark.parametrize("wrong", ["between", 3, ["reference"]])
def test_kinds_of_steps_in_files_are_held_to_those_known(small: Small, wrong: Any, tmp_path: Path) -> None:
    kept = broken_off(over_steps(small, {"reference": [0, 2]}, tmp_path / "a", checkpoint_every=1), 2)
    begun, _ = read_run(kept)
    steps = [
        {"index": step.index, "timestep": step.timestep, "total_ms": step.total_ms, "attention_ms": step.attention_ms}
        | {"other_ms": step.other_ms, "density": step.density, "stage": 0, "over_steps": wrong}
        for step in begun.steps
    ]
    tamper(kept, state={"steps": steps})
    with pytest.raises(BadInput, match="over_steps"):
        read_run(kept)


def test_texts_of_steps() -> None:
    assert run_tables.step_text((), None, "reference", 5) == "reference"
    assert run_tables.step_text(("",), None, "carried", 5) == "carried"
    assert run_tables.step_text(("0", "0"), "reused", None, 5) == "layer 0 computed, the rest reused"
    both = run_tables.step_text(("0",), "reused", "reference", 5)
    assert both == "reference: layer 0 computed, the rest reused or carried"
    parts = {"pairs": 0.0321, "text": 0.0467, "selection": 0.0, "forming": 0.00001}
    assert run_tables.work_text(parts) == "pairs 0.0321, text rows 0.0467"
    assert run_tables.work_text(parts | {"selection": 0.0081, "forming": 0.0012}) == (
        "pairs 0.0321, text rows 0.0467, selection 0.0081; forming of means 0.0012 besides"
    )
