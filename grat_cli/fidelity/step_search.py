"""What a run over steps takes: its references, the slopes between them, and a pattern for each layer and head at each.

What a setting loses is foretold from what runs with full attention have shown: the loss of what is carried
(`references`), and that of the patterns, as often as it is carried on. The settings that are foretold best are then
measured, and the best of those goes on from step to step as long as that brings its latents closer to full attention's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from grat_cli.fidelity.knapsack import Choice, Floats, greedy_path
from grat_cli.fidelity.observations import Observations
from grat_cli.fidelity.references import Outputs, by_step, gaps, last_two, moved, search

EARLY = 0.25
"""Where the slope changes: outputs of the first steps turn, and going on as before overshoots."""

_START = (0.4, 0.9)
_GRID = tuple(round(0.1 * tenth, 1) for tenth in range(3, 11))
_MEASURED_FIRST = 3


@dataclass(frozen=True)
class Setting:
    """What a run over steps takes.

    Attributes:
        references: steps that are computed.
        slopes: of the steps before `EARLY` of the run, and after; 0 where outputs are reused as they are.
        choice: candidate of each reference, layer and head, `[K, L, H]`.
        loss: foretold, mean over the steps.
    """

    references: tuple[int, ...]
    slopes: tuple[float, ...]
    choice: Choice
    loss: float

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """All that patterns follow from."""
        return self.references, self.slopes


class Foreteller:
    """Foretells what settings lose, and finds those that lose least."""

    def __init__(self, observations: Observations, density: float, weights: Floats, *, extrapolates: bool) -> None:
        """Of runs that are looked at.

        Args:
            observations: means over them.
            density: wanted of the whole run.
            weights: of the loss at each step, `[S]`, 1 on the mean.
            extrapolates: whether outputs are extrapolated, or reused as they are.
        """
        self._observations, self._density, self._weights = observations, density, weights
        self._extrapolates = extrapolates
        self._gram = observations.gram.mean((0, 1))
        self.steps = len(weights)
        early = int(np.ceil(EARLY * self.steps))
        self.stretches = (range(early), range(early, self.steps))

    @property
    def most(self) -> int:
        """References that a run can have at most, with the sparsest patterns of all."""
        return min(self.steps, int(self._density * self.steps / self._observations.densities.min() + 1e-9))

    def settings(self, counts: Sequence[int]) -> list[Setting]:
        """The best setting for each number of references, the least loss first."""
        found = []
        for count in counts:
            outputs = Outputs(self._gram, self._weights, self._pattern_loss(count))
            start = _START if self._extrapolates else (0.0, 0.0)
            best = search(outputs, [count], self.stretches, start, fits=self._extrapolates)[count]
            found.append(self.setting(best.steps, best.slopes))
        return sorted(found, key=lambda setting: setting.loss)

    def setting(self, references: Sequence[int], slopes: Sequence[float]) -> Setting:
        """The setting of references and slopes, with the patterns that lose least."""
        references, slopes = tuple(references), tuple(slopes)
        losses = self._observations.of_steps(references, "loss")  # [K, L, H, C]
        of_slopes = by_step(slopes, self.stretches, self.steps)
        times = self._times_carried(references, of_slopes)
        candidates = losses.shape[-1]
        weighed = losses * times[:, None, None, None]
        costs = np.broadcast_to(self._observations.densities, losses.shape)
        path = greedy_path(costs.reshape(-1, candidates), weighed.reshape(-1, candidates))
        choice = path.within(self._budget(len(references))).reshape(losses.shape[:3])
        of_patterns = np.take_along_axis(weighed, choice[..., None], 3).mean((1, 2)).sum()
        carried = Outputs(self._gram, self._weights, np.zeros(self.steps)).loss(references, of_slopes)
        return Setting(references, slopes, choice, float(carried + of_patterns) / self.steps)

    def neighbours(self, setting: Setting) -> Iterator[Setting]:
        """Settings with one reference a step earlier or later, or one slope a step lower or higher."""
        for references in moved(setting.references, self.steps):
            yield self.setting(references, setting.slopes)
        _, latest = last_two(setting.references, self.steps)
        is_extrapolated = (latest > 0) & (latest < np.arange(self.steps)) & self._extrapolates
        for number, slope in enumerate(setting.slopes):
            if not is_extrapolated[list(self.stretches[number])].any():
                continue
            lower, higher = [one for one in _GRID if one < slope - 1e-9], [one for one in _GRID if one > slope + 1e-9]
            for other in (*lower[-1:], *higher[:1]):
                slopes = (*setting.slopes[:number], other, *setting.slopes[number + 1 :])
                yield self.setting(setting.references, slopes)

    def _budget(self, references: int) -> float:
        """Density at each reference."""
        return self._density * self.steps / references

    def _pattern_loss(self, references: int) -> Floats:
        """What patterns lose at each step, were it a reference, one of so many; mean over layers and heads, `[S]`."""
        losses = self._observations.of_steps(range(self.steps), "loss")
        candidates = losses.shape[-1]
        costs = np.broadcast_to(self._observations.densities, losses.shape[1:]).reshape(-1, candidates)
        found = []
        for of_step in losses.reshape(self.steps, -1, candidates):
            choice = greedy_path(costs, of_step).within(self._budget(references))
            found.append(np.take_along_axis(of_step, choice[:, None], 1).mean())
        return np.array(found)

    def _times_carried(self, references: Sequence[int], slopes: Floats) -> Floats:
        """How often the loss of each reference counts in that of the run, `[K]`."""
        found = np.zeros(len(references))
        for number, (first, after) in enumerate(pairwise((*references, self.steps))):
            steps = np.arange(first, after)
            far = slopes[steps] * (steps - first) / (first - references[number - 1]) if number else 0.0 * steps
            found[number] += (self._weights[steps] * (1 + far) ** 2).sum()
            if number:
                found[number - 1] += (self._weights[steps] * far**2).sum()
        return found


def measured_best(
    foreteller: Foreteller,
    settings: Sequence[Setting],
    error: Callable[[Setting, float], float],
    lasts: Callable[[], bool],
) -> tuple[Setting, float]:
    """The setting that is measured best, and its error.

    Args:
        foreteller: gives those that are near another.
        settings: to begin with, the best foretold first.
        error: measures a setting; what exceeds the bound that it is given need not be measured to the end.
        lasts: whether another one may be measured.
    """
    best, least = settings[0], float("inf")
    seen = set()

    def closer(setting: Setting) -> bool:
        nonlocal best, least
        seen.add(setting.key)
        found = error(setting, least)
        if found >= least:
            return False
        best, least = setting, found
        return True

    for setting in settings[:_MEASURED_FIRST]:
        if lasts():
            closer(setting)
    improved = least < float("inf")
    while improved:
        near = (setting for setting in foreteller.neighbours(best) if setting.key not in seen)
        improved = any(lasts() and closer(setting) for setting in sorted(near, key=lambda one: one.loss))
    return best, least


def kept_bytes(setting: Setting, steps: int, tokens: int, width: int, layers: int, calls: int, element: int) -> int:
    """What a run keeps from step to step: of each layer and call the latest output, and a slope where there is one.

    Args:
        setting: of the run.
        steps: of it.
        tokens: of the joint sequence.
        width: channels of an attention's output.
        layers: that are carried.
        calls: of the transformer at a step, each sample of a batch for one.
        element: bytes of a number.
    """
    if max(gaps(setting.references, steps)) == 1:
        return 0
    return tokens * width * (2 if any(setting.slopes) else 1) * layers * calls * element
