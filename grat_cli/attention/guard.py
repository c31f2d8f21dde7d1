"""The guard: while a run goes on, layers whose pattern keeps too little of full attention go wider.

At every transformer call some queries of each layer are looked at (`online_recall`): how much of full
attention the layer's pattern keeps. A layer that keeps less than the bar goes to the next wider pattern, and from
there to full attention (`schedule.Width`), all its heads together, and stays there for the rest of the run. Where a
step calls the transformer twice (true guidance) the lower figure counts.

What a step measures takes effect two steps later, on every device: by then it has been computed and copied, and only
work that was issued a whole step before is waited for. So the pattern that is judged is the one that the layer is to
have two steps later, or where that is full up to four: after four dense steps or more, layers have gone as wide as they
have to before the first sparse step is run. Full attention itself is never judged. Where a plan is met for the first
time its tables are moved to the device, which does wait, once for each plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from grat_cli.attention.schedule import AttentionSchedule, Width
from grat_cli.errors import BadInput
from grat_cli.files.json_objects import validated
from grat_cli.presets import MOST_STEPS

if TYPE_CHECKING:
    import torch

    from grat_cli.attention.layer import AttentionInputs
    from grat_cli.attention.online_recall import SampledRows
    from grat_kernels import HeadPlan, Plan

ROWS = 32
DELAY_STEPS = 2
_HORIZON_STEPS = DELAY_STEPS * Width.FULL  # as many as it takes to climb to full attention


_MOST_LAYERS = 1000
_Step = Annotated[int, Field(ge=0, le=MOST_STEPS)]
_Layer = Annotated[int, Field(ge=0, le=_MOST_LAYERS)]
_Width = Annotated[int, Field(ge=Width.OWN, le=Width.FULL)]
_Figure = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
_Number = Annotated[str, Field(pattern="^[0-9]{1,6}$")]


class _StoredWidening(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    step: _Step
    layer: _Layer
    measured_step: _Step
    kept: _Figure
    recall: _Figure
    error: _Figure | None
    width: _Width
    to: Annotated[str, Field(max_length=4096)]


class GuardState(BaseModel):
    """What `RecallGuard.state` writes, read from a file: `widened` as they are, the others as lists of figures."""

    model_config = ConfigDict(strict=True, extra="forbid")

    widened: Annotated[tuple[_StoredWidening, ...], Field(max_length=_MOST_LAYERS * Width.FULL)]
    lowest: tuple[_Step, _Layer, tuple[_Figure, _Figure, _Figure | None, _Width]] | None
    measured: Annotated[
        dict[
            _Number,
            Annotated[tuple[tuple[_Layer, _Figure, _Figure, _Figure | None, _Width], ...], Field(max_length=10_000)],
        ],
        Field(max_length=1000),
    ]

    @property
    def layers(self) -> set[int]:
        """All that it tells of."""
        told = {one.layer for one in self.widened} | {one[0] for of_step in self.measured.values() for one in of_step}
        return told if self.lowest is None else told | {self.lowest[1]}


class Measured(NamedTuple):
    """What a layer's pattern keeps of full attention; see `online_recall`."""

    kept: float
    recall: float
    error: float | None
    width: int = Width.OWN
    """That of the pattern, a `Width`."""


class _Seen(NamedTuple):
    """What a layer kept, and when."""

    step: int
    layer: int
    measured: Measured

    @property
    def figures(self) -> dict[str, Any]:
        """For people."""
        return {name: value for name, value in self.measured._asdict().items() if name != "width"}

    @classmethod
    def read(cls, step: int, layer: int, measured: Iterable[Any]) -> _Seen:
        """From plain data."""
        return cls(step, layer, Measured(*measured))


@dataclass(frozen=True)
class Widening:
    """A layer that went wider.

    Attributes:
        step: from which on, counted from 0 over the steps that are run; full attention before does not count.
        layer: counted from 0.
        measured_step: when its pattern was found to keep too little.
        kept: how much it kept then.
        recall: softmax mass on the keys that it attends token by token.
        error: ||o - o_full|| / ||o_full|| of heads with summaries, None where it has none.
        width: a `Width`.
        to: its attention from then on, for people.
    """

    step: int
    layer: int
    measured_step: int
    kept: float
    recall: float
    error: float | None
    width: int
    to: str = ""


class RecallGuard:
    """Watches the layers of one run and widens them; an `layer.CallObserver`.

    It starts anew where the steps begin anew, so that a pipeline may be called again.

    Args:
        bar: share of full attention that a layer has to keep, above 0 and up to 1.
        layers: of the transformer.
        rows: queries that are looked at in each layer, drawn anew for every step, the same for each run.
    """

    def __init__(self, bar: float, layers: int, rows: int = ROWS) -> None:
        self.bar, self.rows = bar, rows
        self._layers = layers
        self._start_anew()

    def _start_anew(self) -> None:
        self._step = -1
        self._widenings: list[Widening] = []
        self._lowest: _Seen | None = None
        self._pending: dict[int, list[_Call | _Known]] = {}
        self._sampled: dict[tuple[int, torch.device], tuple[Plan | HeadPlan, SampledRows]] = {}
        self._planned_density = math.nan
        self._laid_out: dict[AttentionSchedule, tuple[int, AttentionSchedule]] = {}

    def applied(self, schedule: AttentionSchedule, step: int) -> AttentionSchedule:
        """The schedule with what the guard has widened so far, whatever came before `step` included.

        Args:
            schedule: of the preset.
            step: that is about to be run, or is under way.
        """
        if step < self._step:
            self._start_anew()
        self._planned_density = schedule.density
        if self._step < step < schedule.steps:
            self._step = step
            self._sampled.clear()
            self._widen(schedule, step)
        self._applied = self._widened(schedule)
        return self._applied

    def _widen(self, schedule: AttentionSchedule, step: int) -> None:
        """Decides by what was measured two steps ago and earlier."""
        low: dict[int, tuple[int, Measured]] = {}
        for measured_step in [earlier for earlier in self._pending if earlier <= step - DELAY_STEPS]:
            for layer, measured in self._take(measured_step).items():
                # What it kept before it went wider says nothing about what it keeps now.
                if not measured.kept >= self.bar and measured.width == self._width_of(layer):
                    low[layer] = measured_step, measured
        new = [
            Widening(
                step=next(at for at in range(step, schedule.steps) if schedule.plan(at, layer).density < 1),
                layer=layer,
                measured_step=measured_step,
                kept=measured.kept,
                recall=measured.recall,
                error=measured.error,
                width=measured.width + 1,
            )
            for layer, (measured_step, measured) in sorted(low.items())
        ]
        self._widenings += new
        if new:
            wider = self._widened(schedule)
            self._widenings[-len(new) :] = [replace(one, to=wider.described(one.step, one.layer)) for one in new]

    def _take(self, step: int) -> dict[int, Measured]:
        """What each layer kept at a step; it counts as seen."""
        found = _lowest_of(self._pending.pop(step))
        self._lowest = _lower(self._lowest, step, found)
        return found

    def _width_of(self, layer: int) -> int:
        return max((one.width for one in self._widenings if one.layer == layer), default=Width.OWN)

    def _widths(self, schedule: AttentionSchedule) -> np.ndarray:
        widths = np.full((schedule.steps, self._layers), int(Width.OWN))
        for widening in self._widenings:
            widths[widening.step :, widening.layer] = widening.width
        return widths

    def _widened(self, schedule: AttentionSchedule) -> AttentionSchedule:
        if not self._widenings:
            return schedule
        count, widened = self._laid_out.get(schedule, (0, schedule))
        if count != len(self._widenings):
            widened = schedule.widened(self._widths(schedule))
            self._laid_out[schedule] = len(self._widenings), widened
        return widened

    # As an observer of transformer calls.

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call begins."""
        self._call = _Call()

    def end_call(self) -> None:
        """All of it has been issued: what was measured sets out for the host."""
        if self._call.layers:
            self._call.send()
            self._pending.setdefault(self._step, []).append(self._call)

    @contextmanager
    def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
        """Looks at what one attention is computed from, unless its layer is to have full attention."""
        if inputs is not None and (step := self._sparse_step(inputs.layer)) is not None:
            figures = self._measured(inputs, self._applied.plan(step, inputs.layer))
            self._call.add(inputs.layer, self._width_of(inputs.layer), figures)
        yield

    def _sparse_step(self, layer: int) -> int | None:
        """The step whose pattern is judged: the first one in reach at which the layer does not have full attention."""
        end = min(self._step + _HORIZON_STEPS + 1, self._applied.steps)
        steps = range(self._step + DELAY_STEPS, end)
        return next((step for step in steps if self._applied.plan(step, layer).density < 1), None)

    def _measured(self, inputs: AttentionInputs, plan: Plan | HeadPlan) -> torch.Tensor:
        """What a plan would keep of an attention, on the device."""
        from grat_cli.attention.online_recall import measure

        summaries = inputs.summaries if plan.summaries.blocks == inputs.plan.summaries.blocks else None
        judged = inputs._replace(plan=plan, summaries=summaries)
        return measure(judged, self._rows(plan, inputs.query.device))

    def _rows(self, plan: Plan | HeadPlan, device: torch.device) -> SampledRows:
        """The queries of this step, and what they attend under a plan."""
        from grat_cli.attention.online_recall import sample_rows

        key = plan.key, device
        if key not in self._sampled:
            self._sampled[key] = plan, sample_rows(plan, self.rows, self._step, device)
        return self._sampled[key][1]

    # What is told of it, and kept.

    def report(self) -> dict[str, Any]:
        """What it did up to the step under way, as plain data. Steps and layers are counted from 0."""
        lowest = self._lowest and {"step": self._lowest.step, "layer": self._lowest.layer, **self._lowest.figures}
        return {
            "bar": self.bar,
            "rows": self.rows,
            "delay_steps": DELAY_STEPS,
            "layers": self._layers,
            "planned_density": self._planned_density,
            "lowest": lowest and _rounded(lowest),
            "widened": [
                _rounded({name: value for name, value in asdict(widening).items() if name != "width"})
                for widening in self._widenings
            ],
        }

    def state(self, done: int) -> dict[str, Any]:
        """All that the rest of the run depends on, as plain data for `restore`; waits for the device.

        Args:
            done: steps that are done; what was measured in one that was broken off is left out.
        """
        return {
            "widened": [asdict(widening) for widening in self._widenings],
            "lowest": self._lowest,
            "measured": {
                str(step): [[layer, *measured] for layer, measured in _lowest_of(calls).items()]
                for step, calls in self._pending.items()
                if step < done
            },
        }

    def restore(self, state: Mapping[str, Any], done: int) -> None:
        """Goes on where a run stood.

        Args:
            state: of `state`.
            done: steps that are done.

        Raises:
            BadInput: if it is not whole.
        """
        self._start_anew()
        self._step = done - 1
        try:
            known = validated(GuardState, state)
            if not known.layers <= set(range(self._layers)):
                raise ValueError(f"layers beyond the model's {self._layers}")
        except ValueError as error:
            raise BadInput(f"what the guard had done is damaged, or of another version of grat: {error}") from error
        self._widenings = [Widening(**dict(one)) for one in known.widened]
        self._lowest = known.lowest and _Seen.read(*known.lowest)
        self._pending = {
            int(step): [_Known({one[0]: Measured(one[1], one[2], one[3], one[4]) for one in measured})]
            for step, measured in known.measured.items()
        }


class _Call:
    """What one transformer call measured, on its way from the device."""

    def __init__(self) -> None:
        self.layers: list[tuple[int, int]] = []
        self._figures: list[torch.Tensor] = []
        self._arrived: torch.cuda.Event | None = None

    def add(self, layer: int, width: int, figures: torch.Tensor) -> None:
        self.layers.append((layer, int(width)))
        self._figures.append(figures)

    def send(self) -> None:
        """Copies all figures to the host; on a CUDA device into pinned memory, with an event to wait for."""
        import torch

        together = torch.stack(self._figures)
        if together.is_cuda:
            on_host = torch.empty(together.shape, pin_memory=True)
            on_host.copy_(together, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(together.device))
            together = on_host
        self._figures = [together]

    def read(self) -> dict[int, Measured]:
        if self._arrived is not None:
            self._arrived.synchronize()
        (together,) = self._figures
        return {
            layer: Measured(kept, recall, None if math.isnan(error) else error, width)
            for (layer, width), (kept, recall, error) in zip(self.layers, together.tolist(), strict=True)
        }


class _Known:
    """What an earlier process measured."""

    def __init__(self, measured: dict[int, Measured]) -> None:
        self._measured = measured

    def read(self) -> dict[int, Measured]:
        return self._measured


def _lowest_of(calls: list[_Call | _Known]) -> dict[int, Measured]:
    """What each layer kept at one step: the least of its calls."""
    found: dict[int, Measured] = {}
    for call in calls:
        for layer, measured in call.read().items():
            if layer not in found or not measured.kept >= found[layer].kept:
                found[layer] = measured
    return found


def _lower(lowest: _Seen | None, step: int, found: Mapping[int, Measured]) -> _Seen | None:
    """The least that any layer kept, of what was seen before and of one step more."""
    for layer, measured in found.items():
        if lowest is None or measured.kept < lowest.measured.kept:
            lowest = _Seen(step, layer, measured)
    return lowest


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
