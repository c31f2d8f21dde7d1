"""Runs whose attention is carried over steps: stage by stage, and gone on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import small_pictures
from small_runs import STEPS, Small, broken_off, generate
from small_runs import picture as small_picture

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


@pytest.mark.parametrize("small", ["picture"], indirect=True)
@pytest.mark.usefixtures("loaded")
def test_a_guard_goes_on_with_what_it_had_decided(small: Small, written: dict[str, np.ndarray], tmp_path: Path) -> None:
    asked = carried(small, tmp_path / "a", reference=[0, 1])
    asked = replace(asked, preset=asked.preset.model_copy(update={"guard": 1.0}))
    (whole,) = generate(asked)
    (doubled,) = whole.report["guard"]["doubled"]
    assert (doubled["measured_step"], doubled["step"], doubled["references"]) == (1, 3, [3])
    assert densities(whole.report)[2:] == [0, densities(whole.report)[3], 0]
    assert densities(whole.report)[3] > 0
    for path in tmp_path.glob("a*"):
        path.unlink()
    begun, restored = read_run(broken_off(asked, 2))
    (made,) = generate(restored, begun=begun)
    assert made.report["guard"]["doubled"] == whole.report["guard"]["doubled"]
    assert densities(made.report)[2] > 0
    # What was computed counts, not what was planned.
    assert made.report["density"] == pytest.approx(fmean(densities(made.report)))
    assert made.report["density"] > whole.report["density"]
    assert written.keys() == {"a"}


def of_seed(*seeds: int, **changes: Any) -> Any:
    """Pictures of the demo, attention extrapolated over steps, the pattern chosen by content."""
    chosen = small_picture().preset(
        schedule={"over_steps": {"reference": [0, 2]}},
        attention={
            "variant": "b",
            "group": [4, 4],
            "radius": 0,
            "far": {
                "levels": [{"beyond": 0, "block": [4, 4]}],
                "choose": {"exact": 2, "fine": 2, "block": [2, 2], "by": "mass-and-spread"},
            },
        },
    )
    return small_pictures.generate(preset=chosen, seeds=seeds, **changes)


@pytest.mark.parametrize("small", ["picture"], indirect=True)
def test_nothing_that_is_kept_leaks(loaded: Any) -> None:
    """After another size, an exception in the middle and another seed: the pixels of before."""
    (before,) = of_seed(8)
    of_seed(8, width=80, height=64)
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 * 3 + 2:  # in the second call of a step to which all is carried
            raise RuntimeError("in the middle")

    handle = loaded.transformer.norm_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        of_seed(8)
    handle.remove()
    other, after = of_seed(7, 8)
    np.testing.assert_array_equal(after.pixels, before.pixels)
    assert not np.array_equal(other.pixels, before.pixels)
