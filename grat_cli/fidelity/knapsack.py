"""One candidate for each unit, so that all together lose least for what they cost: the multiple-choice knapsack.

The greedy walk along the lower convex hulls of (cost, loss), best gain per cost first, solves the linear relaxation
(Sinha and Zoltners, Operations Research 27, 1979). At each of its points nothing as cheap loses less, and between two
of them it misses the optimum by less than what one move of one unit saves.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Choice = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Path:
    """The greedy walk, from the cheapest choice for all units to the one that loses least.

    Attributes:
        start: cheapest candidate of each unit on its hull, `[U]`.
        units: of each move, `[M]`.
        candidates: that the unit takes after the move, `[M]`.
        costs: mean cost over the units before the first move and after each, `[M + 1]`; it never falls.
        losses: likewise; it never rises.
    """

    start: Choice
    units: Choice
    candidates: Choice
    costs: Floats
    losses: Floats

    def after(self, moves: int) -> Choice:
        """Candidate of each unit after so many moves, `[U]`."""
        choice = self.start.copy()
        choice[self.units[:moves]] = self.candidates[:moves]  # of several moves of a unit the last one stands
        return choice

    def within(self, budget: float) -> Choice:
        """The choice that loses least of those whose mean cost is within a budget.

        Raises:
            ValueError: if even the cheapest choice is not.
        """
        return self.after(self.moves_within(budget))

    def moves_within(self, budget: float) -> int:
        """How many moves that choice is from the start.

        Raises:
            ValueError: if even the cheapest choice is not within the budget.
        """
        moves = int(np.searchsorted(self.costs, budget * (1 + 1e-12), side="right")) - 1
        if moves < 0:
            raise ValueError(f"the cheapest choice costs {self.costs[0]:.4f}, more than {budget:.4f}")
        return moves


def hull(costs: Floats, losses: Floats) -> list[int]:
    """Candidates on the lower convex hull of (cost, loss), cheapest first, as far as loss falls.

    Args:
        costs: `[C]`.
        losses: `[C]`.
    """
    kept: list[int] = []
    for candidate in np.lexsort((losses, costs)).tolist():
        if kept and losses[candidate] >= losses[kept[-1]]:
            continue
        # A candidate above the line between its neighbours is never worth its cost.
        while len(kept) > 1 and _gain(costs, losses, kept[-2], kept[-1]) <= _gain(costs, losses, kept[-1], candidate):
            kept.pop()
        kept.append(candidate)
    return kept


def greedy_path(costs: Floats, losses: Floats) -> Path:
    """The walk over all units, best gain per cost first.

    Args:
        costs: of each candidate for each unit, `[U, C]`.
        losses: likewise.
    """
    hulls = [hull(*of_unit) for of_unit in zip(costs, losses, strict=True)]
    moves = [
        (_gain(costs[unit], losses[unit], before, after), unit, before, after)
        for unit, on_hull in enumerate(hulls)
        for before, after in itertools.pairwise(on_hull)
    ]
    # Within a unit gains fall along the hull, and sorting keeps the order of equal ones.
    moves.sort(key=lambda move: -move[0])
    start = np.array([on_hull[0] for on_hull in hulls], np.int64)
    units, before, after = (np.array([move[place] for move in moves], np.int64) for place in (1, 2, 3))
    everyone = np.arange(len(losses))

    def means(values: Floats) -> Floats:
        """Mean over the units before the first move and after each."""
        changes = values[units, after] - values[units, before]
        return np.cumsum(np.append(values[everyone, start].sum(), changes)) / len(values)

    return Path(start, units, after, means(costs), means(losses))


def _gain(costs: Floats, losses: Floats, before: int, after: int) -> float:
    return float((losses[before] - losses[after]) / (costs[after] - costs[before]))
