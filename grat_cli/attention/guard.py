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

Of attention that is carried over steps two things are watched. Its references are judged as other steps are, where they
are computed. And at each of them what would have been carried to it is compared with what is computed. That distance,
||carried - computed|| / ||computed||, grew from nothing over the steps of the gap, so half of it was lost on average,
and the rest is kept. Where the layers of a section of `over_steps` keep less than the bar
on average, their references come twice as often from then on: one more in the middle of what is left of each gap. What
was compared with fewer references says nothing about more of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from grat_cli.attention.layer import CallObserver
from grat_cli.attention.ranks import ALONE, Ranks
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
# As many as it takes to climb to full attention from the first step that a decision reaches.
_HORIZON_STEPS = DELAY_STEPS * (Width.FULL - 1) + 1

_MOST_LAYERS = _MOST_SECTIONS = 1000
_Step = Annotated[int, Field(ge=0, le=MOST_STEPS)]
_Layer = Annotated[int, Field(ge=0, le=_MOST_LAYERS)]
_Width = Annotated[int, Field(ge=Width.OWN, le=Width.FULL)]
_Figure = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
_Number = Annotated[str, Field(pattern="^[0-9]{1,6}$")]
_Section = Annotated[int, Field(ge=0, le=_MOST_SECTIONS)]


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


class _StoredDoubling(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    step: _Step
    section: _Section
    measured_step: _Step
    kept: _Figure
    layer: _Layer
    least: _Figure
    references: Annotated[tuple[_Step, ...], Field(max_length=MOST_STEPS)]


class GuardState(BaseModel):
    """What `RecallGuard.state` writes, read from a file: decisions as they are, the others as lists of figures."""

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
    doubled: Annotated[tuple[_StoredDoubling, ...], Field(max_length=MOST_STEPS)] = ()
    least_carried: tuple[_Step, _Section, _Figure] | None = None
    carried: Annotated[
        dict[_Number, Annotated[tuple[tuple[_Layer, _Figure], ...], Field(max_length=10_000)]],
        Field(max_length=1000),
    ] = {}

    @property
    def layers(self) -> set[int]:
        """All that it tells of."""
        told = {one.layer for one in (*self.widened, *self.doubled)}
        told |= {one[0] for of_step in (*self.measured.values(), *self.carried.values()) for one in of_step}
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


@dataclass(frozen=True)
class Doubling:
    """References that come twice as often.

    Attributes:
        step: from which on, counted from 0 over the steps that are run.
        section: of the preset's `over_steps`, counted from 0.
        measured_step: the reference to which its layers would have carried too little.
        kept: how much of what was computed then, mean over the layers.
        layer: which kept least.
        least: how much.
        references: the steps that became some.
    """

    step: int
    section: int
    measured_step: int
    kept: float
    layer: int
    least: float
    references: tuple[int, ...]


def in_the_middle(references: Sequence[int], steps: int, begin: int) -> tuple[int, ...]:
    """Steps in the middle of what is left of each gap between references, and behind the last one.

    Args:
        references: in order.
        steps: of the run.
        begin: the first step that is left.
    """
    gaps = ((max(one, begin - 1), other) for one, other in pairwise((*references, steps)))
    return tuple((one + other) // 2 for one, other in gaps if other - one > 1)


class RecallGuard(CallObserver):
    """Watches the layers of one run and widens them; an `layer.CallObserver`.

    It starts anew where steps go back, and when it is told to, so that a pipeline may be called again.

    Args:
        bar: share of full attention that a layer has to keep, above 0 and up to 1.
        layers: of the transformer.
        rows: queries that are looked at in each layer, drawn anew for every step, the same for each run.
        ranks: share the calls, and decide alike: by the mean of what those of a call find with their heads, and by all
            calls of a step.
    """

    def __init__(self, bar: float, layers: int, rows: int = ROWS, ranks: Ranks = ALONE) -> None:
        self.bar, self.rows, self._ranks = bar, rows, ranks
        self._layers = layers
        self.start_anew()

    def start_anew(self) -> None:
        """Forgets the run that it has watched."""
        self._step = -1
        self._widenings: list[Widening] = []
        self._lowest: _Seen | None = None
        self._doublings: list[Doubling] = []
        self._least_carried: tuple[int, int, float] | None = None
        self._pending: dict[int, list[_Call | _SplitCall | _Known]] = {}
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
            self.start_anew()
        self._planned_density = schedule.density
        if self._step < step < schedule.steps:
            self._step = step
            self._sampled.clear()
            self._decide(schedule, step)
        self._applied = self._widened(schedule)
        return self._applied

    def _decide(self, schedule: AttentionSchedule, step: int) -> None:
        """Decides by what was measured two steps ago and earlier."""
        low: dict[int, tuple[int, Measured]] = {}
        for measured_step in [earlier for earlier in self._pending if earlier <= step - DELAY_STEPS]:
            found = _lowest_of(self._pending.pop(measured_step))
            self._lowest = _lower(self._lowest, measured_step, found.measured)
            self._double(schedule, step, measured_step, found.carried)
            for layer, measured in found.measured.items():
                # What it kept before it went wider says nothing about what it keeps now.
                if not measured.kept >= self.bar and measured.width == self._width_of(layer):
                    low[layer] = measured_step, measured
        sparse = {
            layer: [at for at in range(step, schedule.steps) if schedule.reference_plan(at, layer).density < 1]
            for layer in low
        }
        new = [
            Widening(
                step=sparse[layer][0],
                layer=layer,
                measured_step=measured_step,
                kept=measured.kept,
                recall=measured.recall,
                error=measured.error,
                width=measured.width + 1,
            )
            for layer, (measured_step, measured) in sorted(low.items())
            if sparse[layer]  # none is left where steps were left out, and full attention follows
        ]
        self._widenings += new
        if new:
            wider = self._widened(schedule)
            self._widenings[-len(new) :] = [replace(one, to=wider.described(one.step, one.layer)) for one in new]

    def _double(self, schedule: AttentionSchedule, step: int, measured_step: int, carried: Mapping[int, float]) -> None:
        """Has references come twice as often in each section whose layers would have carried too little to one."""
        of_section: dict[int, dict[int, float]] = {}
        for layer, kept in carried.items():
            if (section := schedule.section_of(layer)) is not None:
                of_section.setdefault(section, {})[layer] = kept
        for section, of_layer in sorted(of_section.items()):
            kept = fmean(of_layer.values())
            if self._least_carried is None or kept < self._least_carried[2]:
                self._least_carried = measured_step, section, kept
            if kept >= self.bar or any(one.section == section and one.step >= measured_step for one in self._doublings):
                continue
            references = in_the_middle(self._widened(schedule).references(section), schedule.steps, step)
            if references:
                layer = min(of_layer, key=lambda one: of_layer[one])
                self._doublings.append(Doubling(step, section, measured_step, kept, layer, of_layer[layer], references))

    def _width_of(self, layer: int) -> int:
        return max((one.width for one in self._widenings if one.layer == layer), default=Width.OWN)

    def _widths(self, schedule: AttentionSchedule) -> np.ndarray:
        widths = np.full((schedule.steps, self._layers), int(Width.OWN))
        for widening in self._widenings:
            widths[widening.step :, widening.layer] = widening.width
        return widths

    def _references(self, schedule: AttentionSchedule) -> np.ndarray:
        """Those that there are besides, `[steps, sections]`."""
        references = np.zeros((schedule.steps, schedule.sections), bool)
        for doubling in self._doublings:
            try:
                references[list(doubling.references), doubling.section] = True
            except IndexError as error:
                raise BadInput("what the guard had done is of another run: start it anew") from error
        return references

    def _widened(self, schedule: AttentionSchedule) -> AttentionSchedule:
        decisions = len(self._widenings) + len(self._doublings)
        if not decisions:
            return schedule
        count, widened = self._laid_out.get(schedule, (0, schedule))
        if count != decisions:
            widened = schedule.widened(self._widths(schedule), self._references(schedule))
            self._laid_out[schedule] = decisions, widened
        return widened

    # As an observer of transformer calls.

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call begins."""
        self._call = _Call()

    def end_call(self) -> None:
        """All of it has been issued: what was measured sets out for the host."""
        call: _Call | _SplitCall = self._call
        if self._ranks.cfg is not None:
            call = _SplitCall(self._call, list(map(self._width_of, range(self._layers))))
        if call.has_figures:
            call.send(self._ranks)
            self._pending.setdefault(self._step, []).append(call)

    @contextmanager
    def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
        """Looks at what one attention is computed from, unless its layer is to have full attention."""
        if inputs is not None and self._is_judged(inputs.layer):
            step = self._sparse_step(inputs.layer)
            if step is not None:
                plan = self._applied.reference_plan(step, inputs.layer)
                figures = self._measured(inputs, plan if inputs.heads is None else plan.of_heads(inputs.heads))
                self._call.add(inputs.layer, self._width_of(inputs.layer), figures)
        yield

    def compared(self, layer: int, distance: torch.Tensor) -> None:
        """Takes in how far what would have been carried to this call is from what was computed.

        Args:
            layer: counted from 0.
            distance: ||carried - computed|| / ||computed||, a number on the device.
        """
        self._call.carried.append((layer, distance))

    def _is_judged(self, layer: int) -> bool:
        """Whether an attention is the layer's own, and the first that it computes in this call.

        A layer that is carried to a step may compute a sparser attention, the base of what is carried, and does so at
        references besides its own.
        """
        carried = self._applied.carried(self._step, layer)
        return (carried is None or carried.is_reference) and layer not in self._call.measured

    def _sparse_step(self, layer: int) -> int | None:
        """The step whose pattern is judged: the first one in reach at which the layer does not have full attention.

        Steps to which it is carried are none of those that are counted.
        """
        steps = range(self._step + DELAY_STEPS, self._applied.steps)
        computed = (
            step for step in steps if (carried := self._applied.carried(step, layer)) is None or carried.is_reference
        )
        reach = islice(computed, _HORIZON_STEPS)
        return next((step for step in reach if self._applied.reference_plan(step, layer).density < 1), None)

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
            **self._told_of_carrying(),
        }

    def _told_of_carrying(self) -> dict[str, Any]:
        """Where something is carried over steps."""
        if self._least_carried is None:
            return {}
        names = "step", "section", "kept"
        return {
            "least_carried": _rounded(dict(zip(names, self._least_carried, strict=True))),
            "doubled": [
                _rounded(asdict(doubling) | {"references": list(doubling.references)}) for doubling in self._doublings
            ],
        }

    def state(self, done: int) -> dict[str, Any]:
        """All that the rest of the run depends on, as plain data for `restore`; waits for the device.

        Args:
            done: steps that are done; what was measured in one that was broken off is left out.
        """
        pending = {str(step): _lowest_of(calls) for step, calls in self._pending.items() if step < done}
        return {
            "widened": [asdict(widening) for widening in self._widenings],
            "lowest": self._lowest,
            "measured": {
                step: [[layer, *measured] for layer, measured in found.measured.items()]
                for step, found in pending.items()
            },
            "doubled": [asdict(doubling) for doubling in self._doublings],
            "least_carried": self._least_carried,
            "carried": {step: [*found.carried.items()] for step, found in pending.items()},
        }

    def restore(self, state: Mapping[str, Any], done: int) -> None:
        """Goes on where a run stood.

        Args:
            state: of `state`.
            done: steps that are done.

        Raises:
            BadInput: if it is not whole.
        """
        self.start_anew()
        self._step = done - 1
        try:
            known = validated(GuardState, state)
            if not known.layers <= set(range(self._layers)):
                raise ValueError(f"layers beyond the model's {self._layers}")
        except ValueError as error:
            raise BadInput(f"what the guard had done is damaged, or of another version of grat: {error}") from error
        self._widenings = [Widening(**dict(one)) for one in known.widened]
        self._lowest = known.lowest and _Seen.read(*known.lowest)
        self._doublings = [Doubling(**dict(one)) for one in known.doubled]
        self._least_carried = known.least_carried
        self._pending = {
            int(step): [
                _Known(
                    _Found(
                        {one[0]: Measured(*one[1:]) for one in known.measured.get(step, ())},
                        dict(known.carried.get(step, ())),
                    )
                )
            ]
            for step in sorted({*known.measured, *known.carried}, key=int)
        }


class _Found(NamedTuple):
    """What was measured of layers, and how much of what was computed they would have carried."""

    measured: dict[int, Measured]
    carried: dict[int, float]


@dataclass
class _Call:
    """What one transformer call measured, on its way from the device.

    Attributes:
        measured: of each layer the width that was judged, and its figures.
        carried: of layers how far off what would have been carried to the call is.
    """

    measured: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)
    carried: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    _sent: _Sent | None = None

    @property
    def has_figures(self) -> bool:
        return bool(self.measured or self.carried)

    def add(self, layer: int, width: int, figures: torch.Tensor) -> None:
        self.measured[layer] = int(width), figures

    def gathered(self, ranks: Ranks) -> torch.Tensor:
        """All figures on the device, means over the ranks that share the call."""
        import torch

        from grat_cli.attention.context_parallel import mean_over_ranks

        together = torch.cat(
            [figures for _, figures in self.measured.values()] + [one.reshape(1) for _, one in self.carried]
        )
        return together if ranks.cp is None else mean_over_ranks(together, ranks.cp)

    def send(self, ranks: Ranks) -> None:
        """Copies all figures to the host."""
        self._sent = _Sent(self.gathered(ranks))

    def read(self) -> _Found:
        assert self._sent is not None, "it was sent"
        figures = iter(self._sent.read().tolist())
        measured = {}
        for layer, (width, _) in self.measured.items():
            kept, recall, error = islice(figures, 3)
            measured[layer] = _measured(kept, recall, error, width)
        return _Found(measured, {layer: _kept_of(next(figures)) for layer, _ in self.carried})


class _SplitCall:
    """What both calls of a step measured, of which another rank made one.

    A cache may have the two compute different layers, so figures of all layers are exchanged, infinite where there is
    none.
    """

    has_figures = True

    def __init__(self, own: _Call, widths: Sequence[int]) -> None:
        """Of this rank's call, and the widths of all layers in both."""
        self._own, self._widths = own, widths
        self._sent: _Sent | None = None

    def send(self, ranks: Ranks) -> None:
        """Copies all figures of both calls to the host."""
        import torch
        from torch.distributed import all_gather

        from grat_cli.attention.context_parallel import peers

        assert ranks.cfg is not None, "the calls are split"
        none = torch.full((4,), torch.inf, device=ranks.device)
        rows = dict.fromkeys(range(len(self._widths)), none)
        if self._own.has_figures:
            sizes = [3] * len(self._own.measured) + [1] * len(self._own.carried)
            figures = iter(self._own.gathered(ranks).split(sizes))
            for layer in self._own.measured:
                rows[layer] = torch.cat([next(figures), none[:1]])
            for layer, _ in self._own.carried:
                rows[layer] = torch.cat([rows[layer][:3], next(figures)])
        table = torch.stack([*rows.values()]).float()
        tables = [torch.empty_like(table) for _ in range(ranks.cfg.size())]
        with peers():
            all_gather(tables, table, group=ranks.cfg)
        self._sent = _Sent(torch.stack(tables))

    def read(self) -> _Found:
        assert self._sent is not None, "it was sent"
        return _lowest_of([_Known(self._found(table)) for table in self._sent.read().tolist()])

    def _found(self, table: Sequence[Sequence[float]]) -> _Found:
        measured = {
            layer: _measured(kept, recall, error, self._widths[layer])
            for layer, (kept, recall, error, _) in enumerate(table)
            if not math.isinf(kept)
        }
        carried = {layer: _kept_of(row[3]) for layer, row in enumerate(table) if not math.isinf(row[3])}
        return _Found(measured, carried)


def _measured(kept: float, recall: float, error: float, width: int) -> Measured:
    return Measured(kept, recall, None if math.isnan(error) else error, width)


def _kept_of(distance: float) -> float:
    """How much would have been carried to a call, by what `compared` takes in."""
    return 1 - distance / 2


class _Sent:
    """Figures on their way to the host; on a CUDA device into pinned memory, with an event to wait for."""

    def __init__(self, figures: torch.Tensor) -> None:
        import torch

        self._arrived: torch.cuda.Event | None = None
        if figures.is_cuda:
            on_host = torch.empty(figures.shape, pin_memory=True)
            on_host.copy_(figures, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(figures.device))
            figures = on_host
        self._figures = figures

    def read(self) -> torch.Tensor:
        """They have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._figures


class _Known:
    """What an earlier process measured."""

    def __init__(self, found: _Found) -> None:
        self._found = found

    def read(self) -> _Found:
        return self._found


def _lowest_of(calls: Sequence[_Call | _SplitCall | _Known]) -> _Found:
    """What each layer kept at one step: the least of its calls."""
    lowest = _Found({}, {})
    for found in (call.read() for call in calls):
        for layer, measured in found.measured.items():
            if layer not in lowest.measured or not measured.kept >= lowest.measured[layer].kept:
                lowest.measured[layer] = measured
        for layer, kept in found.carried.items():
            lowest.carried[layer] = min(kept, lowest.carried.get(layer, kept))
    return lowest


def _lower(lowest: _Seen | None, step: int, found: Mapping[int, Measured]) -> _Seen | None:
    """The least that any layer kept, of what was seen before and of one step more."""
    for layer, measured in found.items():
        if lowest is None or measured.kept < lowest.measured.kept:
            lowest = _Seen(step, layer, measured)
    return lowest


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
