"""Runs whose attention is carried over steps: stage by stage, and gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import STEPS, Small, broken_off, generate

from grat_cli.generation.checkpoint import read_run
from grat_cli.generation.request import Request


def carried(small: Small, *places: Path, **section: Any) -> Request:
    schedule = {"over_steps": {"reference": [0, 0.4], "between": "reuse", **section}}
    return small.of(*places, preset=small.preset(schedule=schedule), checkpoint_every=1)


def densities(report: Any, stage: int = 0) -> list[float]:
    return [step["density"] for step in report["steps"] if step["stage"] == stage]


@pytest.mark.parametrize("small", ["picture", "video"], indirect=True)
@pytest.mark.usefixtures("loaded")
def test_a_run_that_goes_on_begins_with_a_reference(
    small: Small, written: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Nothing that is carried is kept in a file. Where it goes on at a reference, it is as if whole."""
    asked = carried(small, tmp_path / "a")
    (made,) = generate(asked)
    (reference, *_) = whole = densities(made.report)
    assert whole == [reference, 0, reference, 0, 0]
    expected = written.pop("a")
    for after in (2, 3):
        asked.outputs[0].unlink(missing_ok=True)
        for path in tmp_path.glob("a*"):
            path.unlink()
        begun, restored = read_run(broken_off(asked, after))
        (again,) = generate(restored, begun=begun)
        assert densities(again.report) == [*whole[:after], reference, *whole[after + 1 :]]
        same = np.array_equal(written.pop("a"), expected)
        assert same == (after == 2)


@pytest.mark.parametrize("small", ["cascade"], indirect=True)
@pytest.mark.usefixtures("loaded")
def test_every_stage_and_every_output_begins_anew(small: Small, written: dict[str, np.ndarray], tmp_path: Path) -> None:
    asked = carried(small, tmp_path / "a", tmp_path / "b", reference=[0], between="extrapolate")
    made = generate(asked)
    for one in made:
        # The first stage, of few tokens, has full attention at every step.
        first, second = (densities(one.report, stage) for stage in (0, 1))
        assert len(first) + len(second) == STEPS
        assert set(first) == {1.0}
        assert second[0] > 0
        assert not any(second[1:])
    both = dict(written)
    written.clear()
    generate(carried(small, tmp_path / "c", reference=[0], between="extrapolate"))
    np.testing.assert_array_equal(written["c"], both["a"])
