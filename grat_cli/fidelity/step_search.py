"""What a run over steps takes: its references, the slopes between them, and a pattern for each layer and head at each.

What a setting loses is foretold from what runs with full attention have shown: the loss of what is carried
(`references`), and that of the patterns. How much the one and the other move the final latents, two measured runs tell.
The settings that are foretold best then are measured, and the best of those goes on from step to step as long as that
brings its latents closer to full attention's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import numpy as np

from grat_cli.fidelity.knapsack import Choice, Floats, Path, greedy_path
from grat_cli.fidelity.observations import Observations
from grat_cli.fidelity.references import Stretches, best_references, loss_of, moved, stretches, weights_of

_PATTERNS_COUNT = 12.0
"""Before anything is measured: patterns err alike at every step, and their errors add up; what is carried errs to and
fro. So it is with the demo model's pictures."""

_LEAST_SHARE = 0.1
_STEEPNESS = tuple(round(0.1 * tenth, 1) for tenth in range(3, 14))
_MEASURED_FIRST = 3


@dataclass(frozen=True)
class Setting:
    """What a run over steps takes.

    Attributes:
        references: steps that are computed.
        steepness: of slopes, over those that are foretold best; 0 where outputs are reused as they are.
        slopes: after each reference.
        choice: candidate of each reference, layer and head, `[K, L, H]`.
        carried: what carrying is foretold to lose, weighed mean over the steps.
        patterns: what patterns are foretold to lose, likewise.
    """

    references: tuple[int, ...]
    steepness: float
    slopes: tuple[float, ...]
    choice: Choice = field(compare=False)
    carried: float
    patterns: float

    @property
    def key(self) -> tuple[tuple[int, ...], float]:
        """All that the rest follows from."""
        return self.references, self.steepness


class Foreteller:
    """Foretells what settings lose, and finds those that lose least.

    Attributes:
        patterns_count: how much of the final error the loss of patterns makes, over as much loss of what is carried.
    """

    def __init__(self, observations: Observations, density: float, weights: Floats, *, extrapolates: bool) -> None:
        """Of runs that are looked at.

        Args:
            observations: means over them.
            density: wanted of the whole run.
            weights: of the loss at each step, `[S]`; they add up to 1.
            extrapolates: whether outputs are extrapolated, or reused as they are.
        """
        self.patterns_count = _PATTERNS_COUNT
        self._observations, self._density, self._weights = observations, density, weights
        self._steepness = 1.0 if extrapolates else 0.0
        gram = observations.gram.mean((0, 1))
        self._stretches: Callable[[float], Stretches] = cache(lambda steepness: stretches(gram, weights, steepness))
        self.steps = len(weights)

    @property
    def most(self) -> int:
        """References that a run can have at most, with the sparsest patterns of all."""
        # The same rounding is forgiven as by `Path.moves_within`, which has to find something for each of them.
        return min(self.steps, int(self._density * self.steps / self._observations.densities.min() * (1 + 1e-12)))

    def loss(self, setting: Setting) -> float:
        """What a setting is foretold to lose, in all."""
        return setting.carried + self.patterns_count * setting.patterns

    def settings(self, counts: Sequence[int], some: int) -> list[Setting]:
        """Settings of the numbers of references that are best, so many of them, the least loss first.

        Args:
            counts: of references, to choose from.
            some: at most so many settings.
        """
        losses = self._stretches(self._steepness).losses
        ends = np.concatenate([[0.0], np.cumsum(self._weights)])
        spans = ends[None, :] - ends[:-1, None]  # [j, next]
        found = []
        for count in counts:
            all_losses = losses + self.patterns_count * self._pattern_losses(count)[:, None] * spans
            best = best_references(all_losses, count)[-1]
            found.append((loss_of(all_losses, best), best))
        # Patterns that are chosen for all references together lose less, but take longer to find.
        return sorted((self.setting(best, self._steepness) for _, best in sorted(found)[:some]), key=self.loss)

    def setting(self, references: Sequence[int], steepness: float) -> Setting:
        """The setting of some references, with the patterns that lose least."""
        references = tuple(references)
        losses = self._observations.of_steps(references, "loss")  # [K, L, H, C]
        losses = losses * weights_of(references, self._weights)[:, None, None, None]
        candidates = losses.shape[-1]
        costs = np.broadcast_to(self._observations.densities, losses.shape)
        path = greedy_path(costs.reshape(-1, candidates), losses.reshape(-1, candidates))
        choice = path.within(self._budget(len(references))).reshape(losses.shape[:3])
        chosen = np.take_along_axis(losses, choice[..., None], 3)[..., 0]
        of_steepness = self._stretches(steepness)
        return Setting(
            references,
            steepness,
            of_steepness.slopes_of(references),
            choice,
            of_steepness.loss(references),
            float(chosen.mean((1, 2)).sum()),
        )

    def exact(self, setting: Setting) -> Setting:
        """The setting with the candidate that loses least everywhere, whatever it costs: full attention."""
        losses = self._observations.loss.mean((0, 1, 2))  # steps that were not observed have none
        return replace(setting, choice=np.full_like(setting.choice, int(np.argmin(losses))), patterns=0.0)

    def neighbours(self, setting: Setting) -> Iterator[Setting]:
        """Settings with one reference a step earlier or later, or less or more steep."""
        for references in moved(setting.references, self.steps):
            yield self.setting(references, setting.steepness)
        if any(setting.slopes):
            at = _STEEPNESS.index(setting.steepness)
            for steepness in (*_STEEPNESS[max(at - 1, 0) : at], *_STEEPNESS[at + 1 : at + 2]):
                yield self.setting(setting.references, steepness)

    def _budget(self, references: int) -> float:
        """Density at each reference."""
        return self._density * self.steps / references

    def _pattern_losses(self, references: int) -> Floats:
        """What patterns lose at each step, were it a reference, one of so many; mean over layers and heads, `[S]`."""
        budget = self._budget(references)
        losses = [path.losses[path.moves_within(budget)] for path in self._paths]
        return np.interp(np.arange(self.steps), self._observations.steps_seen, losses)

    @cached_property
    def _paths(self) -> list[Path]:
        """The greedy walk over all layers and heads of each step that was observed."""
        densities = self._observations.densities
        costs = np.broadcast_to(densities, self._observations.loss.shape[1:]).reshape(-1, len(densities))
        seen = self._observations.loss[self._observations.steps_seen]
        return [greedy_path(costs, losses.reshape(-1, len(densities))) for losses in seen]


@dataclass(frozen=True)
class Found:
    """How a search ended.

    Attributes:
        setting: the best.
        error: that was measured of it; None where nothing was measured.
        exact: a setting of full attention that was measured besides, to tell what carrying alone loses.
    """

    setting: Setting
    error: float | None = None
    exact: Setting | None = None


class Search:
    """Finds the setting that is measured best."""

    def __init__(
        self, foreteller: Foreteller, measure: Callable[[Setting, float], float], lasts: Callable[[], bool]
    ) -> None:
        """Of settings that are foretold.

        Args:
            foreteller: foretells them.
            measure: the error of a setting; what exceeds the bound that it is given need not be measured to the end.
            lasts: whether another one may be measured.
        """
        self._foreteller, self._measure, self._lasts = foreteller, measure, lasts
        self._seen: set[tuple[tuple[int, ...], float]] = set()
        self._best: Setting | None = None
        self._least = float("inf")

    def best_of(self, counts: Sequence[int]) -> Found:
        """The best setting that is found from those with so many references."""
        first = self._foreteller.settings(counts, 1)[0]
        if not self._lasts():
            return Found(first)
        self._is_closer(first)
        exact = self._weigh(first) if self._lasts() and first.carried and first.patterns else None
        for setting in self._foreteller.settings(counts, _MEASURED_FIRST):
            self._is_closer(setting)
        while any(self._is_closer(setting) for setting in self._near()):
            pass
        assert self._best is not None, "something was measured"
        return Found(self._best, self._least, exact)

    def _weigh(self, setting: Setting) -> Setting:
        """Lets the foreteller know how much of a setting's error comes from its patterns; the setting without them."""
        whole, exact = self._least, self._foreteller.exact(setting)
        carried_error = self._measure(exact, float("inf"))
        per_loss = carried_error / setting.carried
        of_patterns = max(whole - carried_error, _LEAST_SHARE * whole) / setting.patterns
        self._foreteller.patterns_count = of_patterns / per_loss if per_loss else _PATTERNS_COUNT
        return exact

    def _is_closer(self, setting: Setting) -> bool:
        """Whether a setting is measured to be the best so far; False of one that was measured already, or cannot be."""
        if setting.key in self._seen or not self._lasts():
            return False
        self._seen.add(setting.key)
        found = self._measure(setting, self._least)
        if found >= self._least:
            return False
        self._best, self._least = setting, found
        return True

    def _near(self) -> list[Setting]:
        """Settings near the best one, the best foretold first."""
        assert self._best is not None, "something was measured"
        return sorted(self._foreteller.neighbours(self._best), key=self._foreteller.loss)
