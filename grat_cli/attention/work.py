"""What of a run's attention was computed: counted from outside, so that whatever skips an attention is seen.

Step caches take the place of attentions, or of whole blocks, and a schedule knows nothing of them; and what is to be
carried over steps may not have been kept. All is counted in plain integers on the host, so nothing waits for the
device.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from grat_cli.attention.layer import CallObserver
from grat_cli.console.run_tables import ranges_text

if TYPE_CHECKING:
    from grat_cli.attention.layer import AttentionInputs


@dataclass(frozen=True)
class StepWork:
    """What was computed in one step.

    Attributes:
        density: pairs that were computed over all pairs, mean over calls and layers.
        computed: of each call, the layers whose attention was computed, such as `0, 3-5`; empty where all were.
    """

    density: float
    computed: tuple[str, ...] = ()


@dataclass
class _Call:
    step: int
    density: float
    layers: list[int] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)


class Work(CallObserver):
    """Counts the attentions of transformer calls; a `layer.CallObserver`."""

    def __init__(self, layers: int) -> None:
        """For transformers with so many attentions that take a plan."""
        self.layers = layers
        self._calls: dict[int, list[_Call]] = {}
        self._call: _Call | None = None

    def clear(self) -> None:
        """Forgets what was counted of calls before the one under way: a run begins anew."""
        self._calls = {}

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call begins; what an earlier one that never ended has counted is dropped."""
        self._call = _Call(step, density)

    def end_call(self) -> None:
        """It ends."""
        if (call := self._call) is not None:
            self._calls.setdefault(call.step, []).append(call)
            self._call = None

    @contextmanager
    def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
        """One attention is computed."""
        self.count(inputs)
        yield

    def count(self, inputs: AttentionInputs | None) -> None:
        """Likewise; `inputs` are None where it is not span attention."""
        if (call := self._call) is not None:
            call.layers.append(len(call.layers) if inputs is None else inputs.layer)
            call.densities.append(call.density if inputs is None else inputs.density)

    def of_step(self, step: int) -> StepWork | None:
        """What was computed in a step; None of one of which no call has ended."""
        calls = self._calls.get(step)
        if not calls:
            return None
        layers = [sorted(set(call.layers)) for call in calls]  # with a base to carry on, a layer attends twice
        whole = all(len(of_call) >= self.layers for of_call in layers)
        computed = () if whole else tuple(map(ranges_text, layers))
        return StepWork(statistics.fmean(self._density(call) for call in calls), computed)

    def _density(self, call: _Call) -> float:
        counted = sum(call.densities) / self.layers
        # To the last digit as its schedule says where that is what ran.
        return call.density if math.isclose(counted, call.density) else counted
