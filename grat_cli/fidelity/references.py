"""Which steps of a run are references, and how steeply outputs are carried to those between: by dynamic programming.

With i < j the last two references, a later output is O_t ~ O_j + a (t - j) / (j - i) (O_j - O_i). What that loses is a
quadratic form of the Gram matrix of the outputs over the steps, `<O_s, O_t>`, which one run with full attention shows.
The loss of a stretch between two references, and the slope a with which it is least, depend on them and on the one
before them. So the best references of a run follow exactly from those of its beginnings, with the last two of them as
the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grat_cli.fidelity.knapsack import Floats

MOST_STEPS = 100
"""Tables go by two references and a step: those of more would take long."""

STEEPEST = 1.5


@dataclass(frozen=True)
class Stretches:
    """All stretches from a reference up to before the next one, by the one before them.

    Tables are `[S + 1, S, S + 1]`, by i + 1, j and the next reference, S for the end of the run; i = -1 says that there
    is no reference before j. Where the three are not in that order they mean nothing.

    Attributes:
        losses: sum over the steps of a stretch of what is carried to them, times their weights.
        slopes: that outputs are carried with.
    """

    losses: Floats
    slopes: Floats

    @property
    def steps(self) -> int:
        """Of the run."""
        return self.losses.shape[1]

    def loss(self, references: Sequence[int]) -> float:
        """Of a whole run."""
        return loss_of(self.losses, references)

    def slopes_of(self, references: Sequence[int]) -> tuple[float, ...]:
        """After each reference of a run."""
        return tuple(self.slopes[_places(references, self.steps)].tolist())


def loss_of(losses: Floats, references: Sequence[int]) -> float:
    """Of a whole run, by those of stretches, see `Stretches`."""
    return float(losses[_places(references, losses.shape[1])].sum())


def _places(references: Sequence[int], steps: int) -> tuple[np.ndarray, ...]:
    """Where the stretches of a run stand in tables of all."""
    places = np.array([-1, *references, steps])
    return places[:-2] + 1, places[1:-1], places[2:]


def stretches(gram: Floats, weights: Floats, steepness: float = 1.0) -> Stretches:
    """The stretches of a run, each with the slope that is best for it, or steeper ones.

    Args:
        gram: `<O_s, O_t>`, `[S, S]`.
        weights: of the loss at each step, `[S]`.
        steepness: slopes over the best ones; 0 reuses outputs as they are.
    """
    steps = np.arange(len(gram))
    own = np.diagonal(gram)
    change = own[None, :] + own[:, None] - 2 * gram  # |O_t - O_j|²
    # <O_t - O_j, O_j - O_i> by i, j and t.
    along = gram[None] - gram[:, None, :] - own[None, :, None] + gram[:, :, None]
    i, j, t = steps[:, None, None], steps[None, :, None], steps[None, None, :]
    far = np.where((i < j) & (j < t), (t - j) / np.maximum(j - i, 1), 0.0)

    still = _up_to(np.where(j[0] < t[0], weights * change, 0.0))  # [j, next]
    gain, curvature = _up_to(weights * far * along), _up_to(weights * far**2) * change[:, :, None]
    best = np.divide(gain, curvature, out=np.zeros_like(gain), where=curvature > 0)
    slopes = np.round(np.clip(steepness * best, 0.0, STEEPEST), 2)
    carried = np.maximum(still - 2 * slopes * gain + slopes**2 * curvature, 0.0)
    return Stretches(np.concatenate([still[None], carried]), np.concatenate([np.zeros_like(still)[None], slopes]))


def _up_to(values: Floats) -> Floats:
    """Sums along the last axis before each place, and of all, `[..., n + 1]`."""
    return np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)


def best_references(losses: Floats, most: int) -> list[tuple[int, ...]]:
    """The references of a run that lose least: one, two, and so on up to so many of them.

    Args:
        losses: of stretches, see `Stretches`.
        most: at most as many as there are steps.
    """
    steps = losses.shape[1]
    order = np.arange(-1, steps)[:, None] < np.arange(steps)  # i < j
    best = np.full((steps + 1, steps), np.inf)
    best[0, 0] = 0.0  # the first step is a reference, with none before it
    before: list[np.ndarray] = []
    found = []
    for count in range(1, most + 1):
        whole = np.where(order, best + losses[:, :, steps], np.inf)
        i, j = np.unravel_index(np.argmin(whole), whole.shape)
        chain = [int(j), int(i) - 1]
        for came_from in reversed(before):
            chain.append(int(came_from[chain[-1] + 1, chain[-2]]))
        found.append(tuple(step for step in reversed(chain) if step >= 0))
        if count == most:
            break
        reached = best[:, :, None] + losses[:, :, :steps]  # by i + 1, j and the new reference
        reached[:, np.tri(steps, dtype=bool)] = np.inf  # which is later than j
        came_from = np.argmin(reached, axis=0)  # [j, new]
        best = np.full_like(best, np.inf)
        best[1:] = np.take_along_axis(reached, came_from[None], 0)[0]
        # The state is (j, new) from now on, and i is what it came from.
        before.append(np.concatenate([np.full((1, steps), -1), came_from - 1]))
    return found


def weights_of(references: Sequence[int], weights: Floats) -> Floats:
    """The weight of each reference with that of the steps up to the next one, `[K]`."""
    return np.add.reduceat(weights, list(references))


def moved(references: Sequence[int], steps: int) -> list[tuple[int, ...]]:
    """All references that differ by one step in one of them; the first stays."""
    places = (*references, steps)
    found = []
    for number in range(1, len(references)):
        for step in (references[number] - 1, references[number] + 1):
            if places[number - 1] < step < places[number + 1]:
                found.append((*references[:number], step, *references[number + 1 :]))
    return found
