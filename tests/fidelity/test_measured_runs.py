"""Runs on trial: what is on file is not run again, a budget is kept, what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grat_cli.errors import BadInput
from grat_cli.fidelity.measured_runs import MeasuredRun, Measurements, relative_error
from grat_cli.presets import Preset, load_preset


class Runs:
    """Runs with given errors by prompt, counted."""

    def __init__(self, *errors: float) -> None:
        self.errors, self.made = errors, 0

    def __call__(self, preset: Preset, number: int) -> MeasuredRun:
        self.made += 1
        return MeasuredRun(error=self.errors[number])


def measurements(folder: Path, runs: Runs, left: int = 10) -> Measurements:
    return Measurements(folder, [{"prompt": number} for number in range(len(runs.errors))], runs, left)


def test_runs_on_file_are_not_made_again_and_count_all_the_same(tmp_path: Path) -> None:
    preset, runs = load_preset("demo-b"), Runs(0.2, 0.4)
    for _ in range(2):
        one = measurements(tmp_path, runs)
        assert one.ratio(preset) == 1
        assert one.error(preset) == pytest.approx(0.3)
        assert one.left == 8
    assert runs.made == 2
    # What a preset is called changes nothing; what it says does.
    measurements(tmp_path, runs).ratio(preset.model_copy(update={"name": "other"}))
    assert runs.made == 2
    measurements(tmp_path, runs).ratio(load_preset("demo-x"))
    assert runs.made == 4


def test_prompts_count_alike_and_what_is_sure_to_be_worse_is_not_measured_to_the_end(tmp_path: Path) -> None:
    runs = Runs(0.5, 0.001, 0.0)
    one = measurements(tmp_path, runs)
    assert one.ratio(load_preset("demo-b")) == pytest.approx(2 / 3)  # of no error at all there is no share
    runs.errors = (0.25, 0.003, 0.0)
    assert one.ratio(load_preset("demo-x")) == pytest.approx((0.5 + 3 + 0) / 3)
    assert (runs.made, one.left) == (6, 4)
    assert one.ratio(load_preset("demo-bx"), at_most=0.1) == float("inf")
    assert (runs.made, one.left) == (7, 3)


def test_a_budget_lasts_for_whole_settings(tmp_path: Path) -> None:
    one = measurements(tmp_path, Runs(0.5, 0.1), left=5)
    one.ratio(load_preset("demo-b"))
    assert one.lasts
    one.ratio(load_preset("demo-x"))
    assert not one.lasts


@pytest.mark.parametrize(
    "change",
    [
        lambda content: {},
        lambda content: content | {"schema": "grat.tune-run/9"},
        lambda content: content | {"about": {}},
        lambda content: content | {"measured": {"error": -1.0}},
        lambda content: content | {"measured": {"error": "0.1"}},
        lambda content: content | {"measured": {}},
        lambda content: content | {"more": 1},
        lambda content: [content],
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Any) -> None:
    measurements(tmp_path, Runs(0.2)).ratio(load_preset("demo-b"))
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(BadInput, match=r"measured-.* is damaged \(.*\): remove it"):
        measurements(tmp_path, Runs(0.2)).ratio(load_preset("demo-b"))


def test_errors_are_over_the_variance_of_the_reference() -> None:
    reference = torch.tensor([[1.0, 3.0, 1.0, 3.0]])
    assert relative_error(reference, reference) == 0
    assert relative_error(reference + 0.5, reference) == pytest.approx(0.25)
    assert relative_error((10 * reference + 5).half(), 10 * reference) == pytest.approx(0.25)
