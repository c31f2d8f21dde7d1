"""Which steps of a run are references, and how steeply outputs are carried to those between: by dynamic programming.

With i < j the last two references, a later output is O_t ~ O_j + a (t - j) / (j - i) (O_j - O_i). What that loses is a
quadratic form of the Gram matrix of the outputs over the steps, `<O_s, O_t>`, which one run with full attention shows.
The loss of a stretch between two references depends on them and on the one before them, so the best references of a run
follow exactly from those of its beginnings, with the last two of them as the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from grat_cli.fidelity.knapsack import Floats

MOST_STEPS = 200
"""A search over more would hold tables of more than 64 MB: losses by two references and a step."""

STEEPEST = 1.5
_ROUNDS = 20


@dataclass(frozen=True)
class Outputs:
    """Full attention's outputs over the steps of a run, and what is wrong with those that are computed.

    Attributes:
        gram: `<O_s, O_t>`, mean over layers, heads and rows, `[S, S]`.
        weights: of the loss at each step, `[S]`.
        error: mean square of what outputs are wrong by where they are computed, `[S]`: it is carried on. Errors of two
            references count as independent.
    """

    gram: Floats
    weights: Floats
    error: Floats

    @property
    def steps(self) -> int:
        """Of the run."""
        return len(self.gram)

    def losses(self, slopes: Floats) -> Floats:
        """What outputs at each step lose, by the last two references before it, times the step's weight.

        Args:
            slopes: of each step, `[S]`.

        Returns:
            `[S + 1, S, S]`, by i + 1, j and t, where i = -1 says that there is no reference before j; 0 where the
            three are not in that order, but for t = j, which loses `error`.
        """
        gram, steps = self.gram, np.arange(self.steps)
        own = np.diagonal(gram)
        change = own[None, :] + own[:, None] - 2 * gram  # |O_t - O_j|²
        # <O_t - O_j, O_j - O_i> by i, j and t.
        along = gram[None] - gram[:, None, :] - own[None, :, None] + gram[:, :, None]
        i, j, t = steps[:, None, None], steps[None, :, None], steps[None, None, :]
        far = slopes * np.where((i < j) & (j < t), (t - j) / np.maximum(j - i, 1), 0.0)
        carried = change[None] - 2 * far * along + far**2 * change[:, :, None]
        carried = carried + (1 + far) ** 2 * self.error[None, :, None] + far**2 * self.error[:, None, None]
        first = change + self.error[:, None]
        found = np.concatenate([np.where(j[0] <= t[0], first, 0.0)[None], np.where((i < j) & (j <= t), carried, 0.0)])
        return np.maximum(found, 0) * self.weights

    def loss(self, references: Sequence[int], slopes: Floats) -> float:
        """Of a whole run, the sum over its steps."""
        return float(self.losses_of(references, slopes).sum())

    def losses_of(self, references: Sequence[int], slopes: Floats) -> Floats:
        """Of each step of a run, `[S]`."""
        earlier, latest = last_two(references, self.steps)
        return self.losses(slopes)[earlier + 1, latest, np.arange(self.steps)]

    def best_slopes(self, references: Sequence[int], stretches: Sequence[range], steepest: float = STEEPEST) -> Floats:
        """The slope of each stretch of steps with which a run loses least, `[stretches]`, from 0 to `steepest`.

        Where nothing in a stretch is extrapolated it is 0.
        """
        steps = np.arange(self.steps)
        i, j = last_two(references, self.steps)
        far = np.where((i >= 0) & (j < steps), (steps - j) / np.maximum(j - i, 1), 0.0)
        own = np.diagonal(self.gram)
        along = self.gram[steps, j] - self.gram[steps, i] - own[j] + self.gram[j, i]
        step = own[j] + own[i] - 2 * self.gram[j, i]
        gain = self.weights * far * (along - self.error[j])
        curvature = self.weights * far**2 * (step + self.error[j] + self.error[i])
        found = [
            gain[list(stretch)].sum() / total if (total := curvature[list(stretch)].sum()) > 0 else 0.0
            for stretch in stretches
        ]
        return np.clip(found, 0.0, steepest)


@dataclass(frozen=True)
class References:
    """References of a run.

    Attributes:
        steps: in order, from 0.
        slopes: of each stretch of steps.
        loss: of the run, see `Outputs`.
    """

    steps: tuple[int, ...]
    slopes: tuple[float, ...]
    loss: float


def last_two(references: Sequence[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The last but one and the last reference up to each step, itself included, `[S]` each; -1 where there is none."""
    numbers = np.searchsorted(references, np.arange(steps), side="right") - 1
    padded = np.array([-1, *references])
    return padded[numbers], padded[numbers + 1]


def best_references(losses: Floats, most: int) -> list[tuple[int, ...]]:
    """The references of a run that lose least: one, two, and so on up to so many of them.

    Args:
        losses: see `Outputs.losses`, `[S + 1, S, S]`.
        most: at most as many as there are steps.
    """
    steps = losses.shape[1]
    # Of a stretch from j up to before k, with i before it: [S + 1, S, S + 1].
    stretches = np.concatenate([np.zeros((*losses.shape[:2], 1)), np.cumsum(losses, axis=2)], axis=2)
    order = np.arange(-1, steps)[:, None] < np.arange(steps)  # i < j
    best = np.full((steps + 1, steps), np.inf)
    best[0, 0] = 0.0  # the first step is a reference, with none before it
    before: list[np.ndarray] = []
    found = []
    for count in range(1, most + 1):
        whole = np.where(order, best + stretches[:, :, steps], np.inf)
        i, j = np.unravel_index(np.argmin(whole), whole.shape)
        chain = [int(j), int(i) - 1]
        for came_from in reversed(before):
            chain.append(int(came_from[chain[-1] + 1, chain[-2]]))
        found.append(tuple(step for step in reversed(chain) if step >= 0))
        if count == most:
            break
        reached = best[:, :, None] + stretches[:, :, :steps]  # by i + 1, j and the new reference
        reached[:, np.tri(steps, dtype=bool)] = np.inf  # which is later than j
        came_from = np.argmin(reached, axis=0)  # [j, new]
        best = np.full_like(best, np.inf)
        best[1:] = np.take_along_axis(reached, came_from[None], 0)[0]
        # The state is (j, new) from now on, and i is what it came from.
        before.append(np.concatenate([np.full((1, steps), -1), came_from - 1]))
    return found


def search(
    outputs: Outputs, counts: Sequence[int], stretches: Sequence[range], start: Sequence[float], *, fits: bool = True
) -> dict[int, References]:
    """References and slopes that lose least, for several numbers of references.

    References for given slopes and slopes for given references take turns until neither changes: the loss never rises
    on the way.

    Args:
        outputs: of the run.
        counts: of references.
        stretches: of steps, each with a slope of its own.
        start: the slopes to begin with.
        fits: whether slopes are fitted; otherwise they stay as they are.
    """
    best: dict[int, References] = {}
    if not counts:
        return best
    known: dict[tuple[float, ...], list[tuple[int, ...]]] = {}

    def references_for(slopes: tuple[float, ...], count: int) -> tuple[int, ...]:
        if slopes not in known:
            known[slopes] = best_references(outputs.losses(by_step(slopes, stretches, outputs.steps)), max(counts))
        return known[slopes][count - 1]

    for count in counts:
        slopes = tuple(start)
        for _ in range(_ROUNDS):
            steps = references_for(slopes, count)
            loss = outputs.loss(steps, by_step(slopes, stretches, outputs.steps))
            if count in best and loss >= best[count].loss:
                break
            best[count] = References(steps, slopes, loss)
            if not fits:
                break
            slopes = tuple(np.round(outputs.best_slopes(steps, stretches), 2).tolist())
    return best


def by_step(slopes: Sequence[float], stretches: Sequence[range], steps: int) -> Floats:
    """The slope of each step, `[S]`, from those of stretches that hold every step once."""
    found = np.zeros(steps)
    for slope, stretch in zip(slopes, stretches, strict=True):
        found[list(stretch)] = slope
    return found


def moved(references: Sequence[int], steps: int) -> list[tuple[int, ...]]:
    """All references that differ by one step in one of them; the first stays."""
    places = (0, *references[1:], steps)
    found = []
    for number in range(1, len(references)):
        for step in (references[number] - 1, references[number] + 1):
            if places[number - 1] < step < places[number + 1]:
                found.append((*references[:number], step, *references[number + 1 :]))
    return found


def gaps(references: Sequence[int], steps: int) -> list[int]:
    """Steps from each reference up to before the next one, itself included."""
    return [after - before for before, after in pairwise((*references, steps))]
