"""The greedy walk against all choices there are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.fidelity.knapsack import greedy_path, hull

ROUNDING = 1e-9
numbers = st.integers(0, 1000).map(lambda number: number / 1000)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    candidates, units = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    of_unit = st.lists(numbers, min_size=candidates, max_size=candidates)
    costs, losses = (draw(st.lists(of_unit, min_size=units, max_size=units)) for _ in range(2))
    return np.array(costs), np.array(losses)


def best_loss(costs: np.ndarray, losses: np.ndarray, budget: float) -> float:
    """Of all choices within the budget."""
    choices = itertools.product(range(costs.shape[1]), repeat=len(costs))
    return min(mean(losses, choice) for choice in choices if mean(costs, choice) <= budget + ROUNDING)


def mean(values: np.ndarray, choice: Sequence[int] | np.ndarray) -> float:
    """Over units that have chosen."""
    return float(values[np.arange(len(values)), np.asarray(choice)].mean())


@given(problems())
def test_each_point_of_the_walk_is_the_best_for_its_cost(problem: tuple[np.ndarray, np.ndarray]) -> None:
    costs, losses = problem
    path = greedy_path(costs, losses)
    for moves, (cost, loss) in enumerate(zip(path.costs, path.losses, strict=True)):
        choice = path.after(moves)
        assert mean(costs, choice) == pytest.approx(cost)
        assert mean(losses, choice) == pytest.approx(loss)
        assert loss <= best_loss(costs, losses, cost) + ROUNDING


@given(problems(), numbers)
def test_between_points_it_misses_the_best_by_less_than_a_move(
    problem: tuple[np.ndarray, np.ndarray], budget: float
) -> None:
    costs, losses = problem
    path = greedy_path(costs, losses)
    if budget < path.costs[0]:
        with pytest.raises(ValueError, match="cheapest"):
            path.within(budget)
        return
    choice = path.within(budget)
    assert mean(costs, choice) <= budget + ROUNDING
    moves = int(np.searchsorted(path.costs, mean(costs, choice) + ROUNDING, side="right")) - 1
    saved = path.losses[moves] - path.losses[moves + 1] if moves + 1 < len(path.losses) else 0.0
    assert mean(losses, choice) <= best_loss(costs, losses, budget) + saved + ROUNDING


@given(problems())
def test_the_walk_never_costs_less_nor_loses_more_as_it_goes(problem: tuple[np.ndarray, np.ndarray]) -> None:
    path = greedy_path(*problem)
    assert (np.diff(path.costs) >= 0).all()
    assert (np.diff(path.losses) <= 0).all()


def test_a_hull_leaves_out_what_is_never_worth_its_cost() -> None:
    costs = np.array([0.1, 0.2, 0.3, 0.4, 0.05])
    losses = np.array([1.0, 0.9, 0.2, 0.3, 2.0])
    assert hull(costs, losses) == [4, 0, 2]  # 1 lies above the line from 0 to 2; 3 costs more and loses more than 2


def test_two_candidates_of_one_cost_are_the_better_one() -> None:
    assert hull(np.array([0.1, 0.1]), np.array([0.5, 0.4])) == [1]


def test_units_that_lose_nothing_stay_with_the_cheapest() -> None:
    path = greedy_path(np.array([[0.1, 0.5]] * 2), np.array([[0.0, 0.0], [1.0, 0.0]]))
    assert path.within(0.3).tolist() == [0, 1]
    assert path.within(0.29).tolist() == [0, 0]
    assert len(path.units) == 1
