"""Settings over steps: their patterns keep to the density; a search by measured runs ends where nothing is closer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from grat_cli.fidelity.observations import Observations
from grat_cli.fidelity.step_search import Foreteller, Search, Setting

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
    return Foreteller(observations(seed), density, np.full(STEPS, 1 / STEPS), extrapolates=extrapolates)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("extrapolates", [True, False])
def test_every_setting_keeps_to_the_density(density: float, extrapolates: bool) -> None:
    one = foreteller(density, extrapolates=extrapolates)
    settings = one.settings(range(1, one.most + 1), STEPS)
    assert {len(setting.references) for setting in settings} == set(range(1, STEPS + 1))
    assert settings == sorted(settings, key=one.loss)
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
    (all_steps,) = one.settings([STEPS], 1)
    assert (all_steps.carried, all_steps.patterns) == pytest.approx((0, 0))
    assert (all_steps.choice == 0).all()


class Valley:
    """Errors that are least at one place; counted."""

    def __init__(self, measures: int = 10**6) -> None:
        self.seen: list[Setting] = []
        self._measures = measures

    def lasts(self) -> bool:
        return len(self.seen) < self._measures

    def __call__(self, setting: Setting, least: float) -> float:
        self.seen.append(setting)
        away = [abs(one - other) for one, other in zip(setting.references, (0, 3, 5), strict=False)]
        found = 1 + sum(away) + abs(setting.steepness - 0.6) + 5 * (len(setting.references) != 3)
        return found if found <= least else float("inf")


def test_a_search_ends_in_the_valley_and_measures_nothing_twice() -> None:
    one, valley = foreteller(0.3), Valley()
    found = Search(one, valley, valley.lasts).best_of([2, 3, 4])
    assert found.setting.references == (0, 3, 5)
    assert found.setting.steepness == 0.6
    assert found.error == pytest.approx(1)
    keys = [setting.key for setting in valley.seen if setting.patterns]
    assert len(set(keys)) == len(keys)


def test_two_runs_tell_how_much_patterns_count() -> None:
    one = foreteller(0.3)
    measured = []

    def measure(setting: Setting, least: float) -> float:
        measured.append(setting)
        return 2 * setting.carried + 60 * setting.patterns

    found = Search(one, measure, lambda: len(measured) < 3).best_of([2, 3, 4])
    first, exact = measured[:2]
    assert (exact.key, exact.patterns) == (first.key, 0)
    assert (exact.choice == 0).all()
    assert one.patterns_count == pytest.approx(30)
    assert found.exact == exact
    assert found.setting in (first, measured[2])


@pytest.mark.parametrize("measures", [0, 1, 2, 5])
def test_a_search_stops_where_its_budget_does(measures: int) -> None:
    one, valley = foreteller(0.3), Valley(measures)
    found = Search(one, valley, valley.lasts).best_of([3])
    assert len(valley.seen) == measures
    assert (found.error is None) == (measures == 0)
    assert (found.exact is None) == (measures < 2)
