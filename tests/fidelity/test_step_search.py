"""Settings over steps: their patterns keep to the density, and a search by measured runs ends where nothing is closer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from grat_cli.fidelity.observations import Observations
from grat_cli.fidelity.step_search import Foreteller, Setting, kept_bytes, measured_best

STEPS, LAYERS, HEADS = 8, 2, 2
DENSITIES = np.array([1.0, 0.6, 0.3, 0.1])


def observations(seed: int = 0) -> Observations:
    """Outputs that turn from step to step, and patterns that lose the less the denser they are."""
    generator = np.random.default_rng(seed)
    vectors = np.cumsum(np.cumsum(generator.normal(size=(LAYERS, HEADS, STEPS, 6)), 2), 2)
    shape = (STEPS, LAYERS, HEADS, len(DENSITIES))
    loss = generator.uniform(0.5, 1.5, shape) * (1 - DENSITIES)
    queries = np.zeros((STEPS, LAYERS), np.int64)
    queries[1::3] = 8
    return Observations(DENSITIES, queries, 1 - loss / 2, loss, loss, vectors @ vectors.swapaxes(2, 3))


def foreteller(density: float, *, extrapolates: bool = True, seed: int = 0) -> Foreteller:
    return Foreteller(observations(seed), density, np.ones(STEPS), extrapolates=extrapolates)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("extrapolates", [True, False])
def test_every_setting_keeps_to_the_density(density: float, extrapolates: bool) -> None:
    one = foreteller(density, extrapolates=extrapolates)
    settings = one.settings(range(1, one.most + 1))
    assert {len(setting.references) for setting in settings} == set(range(1, STEPS + 1))
    assert [setting.loss for setting in settings] == sorted(setting.loss for setting in settings)
    for setting in itertools.chain(settings, one.neighbours(settings[0])):
        assert setting.choice.shape == (len(setting.references), LAYERS, HEADS)
        of_run = DENSITIES[setting.choice].mean() * len(setting.references) / STEPS
        assert of_run <= density + 1e-9
        assert any(setting.slopes) <= extrapolates


def test_references_that_the_sparsest_pattern_is_too_dense_for_are_not_offered() -> None:
    assert foreteller(0.05).most == 4
    assert foreteller(0.01).most == 0


def test_what_is_not_observed_lies_between_what_is() -> None:
    found = observations()
    assert found.of_steps([1, 4, 7], "loss") == pytest.approx(found.loss[[1, 4, 7]])
    assert found.of_steps([0], "loss")[0] == pytest.approx(found.loss[1])
    assert found.of_steps([2], "loss")[0] == pytest.approx((2 * found.loss[1] + found.loss[4]) / 3)


def test_without_loss_of_patterns_what_is_foretold_is_that_of_what_is_carried() -> None:
    one = foreteller(1.0)
    (all_steps,) = one.settings([STEPS])
    assert all_steps.loss == pytest.approx(0)
    assert (all_steps.choice == 0).all()


def valley(setting: Setting) -> float:
    """Least at one place; the early slope says nothing where nothing is extrapolated by it."""
    away = [abs(one - other) for one, other in zip(setting.references, (0, 3, 5), strict=True)]
    return 1 + sum(away) + abs(setting.slopes[1] - 0.6)


def test_a_search_ends_in_the_valley_and_measures_nothing_twice() -> None:
    one, seen = foreteller(0.3), []

    def error(setting: Setting, least: float) -> float:
        seen.append(setting.key)
        found = valley(setting)
        return found if found <= least else float("inf")

    best, least = measured_best(one, one.settings([3]), error, lambda: True)
    assert best.references == (0, 3, 5)
    assert least == pytest.approx(valley(best))
    assert least <= 1.05 + 1e-9  # slopes go to tenths
    assert len(set(seen)) == len(seen)


def test_a_search_stops_where_its_budget_does() -> None:
    one, seen = foreteller(0.3), []

    def error(setting: Setting, least: float) -> float:
        seen.append(setting.key)
        return valley(setting)

    measured_best(one, one.settings([3]), error, lambda: len(seen) < 2)
    assert len(seen) == 2
    settings = one.settings([2, 3, 4])
    best, least = measured_best(one, settings, error, lambda: False)
    assert (best, least) == (settings[0], float("inf"))


def test_what_is_kept_is_an_output_and_a_slope_of_each_layer_and_call() -> None:
    choice = np.zeros((2, LAYERS, HEADS), np.int64)
    both, outputs = (Setting((0, 3), slopes, choice, 0.0) for slopes in ((0.4, 0.9), (0.0, 0.0)))
    size = {"tokens": 10, "width": 4, "layers": 3, "calls": 2, "element": 2}
    assert kept_bytes(both, STEPS, **size) == 2 * kept_bytes(outputs, STEPS, **size) == 2 * 10 * 4 * 3 * 2 * 2
    every = Setting(tuple(range(STEPS)), (0.4, 0.9), choice, 0.0)
    assert kept_bytes(every, STEPS, **size) == 0
