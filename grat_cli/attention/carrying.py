"""Attention outputs that are carried over denoising steps: what is kept of each layer, and what follows from it.

At reference steps attention is computed, and its output is kept with its slope: how much it has changed a step since
the reference before. At a step to which a layer is carried, one multiplication and addition stands for the attention.
Where a block's attention module returns attention alone, it stands for the whole module, projections and norms
included: the output projection is affine, and the weights of the outputs that are added up sum to one. Elsewhere, in
compiled code, and where only the difference to a sparser attention is carried, it stands for the attention itself.

What is kept belongs to one run, one transformer, one of its calls in a step (guidance makes two), and one layer, and to
inputs of one form. It begins anew with every run, is dropped after an exception and when GRAT leaves the transformer,
and is in no file: a run that goes on begins with a reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from grat_cli.attention.clock import CallCounter
from grat_cli.attention.keeping import Keeper, Kept
from grat_cli.attention.schedule import kind_of_step

if TYPE_CHECKING:
    from grat_cli.attention.clock import PipelineClock
    from grat_cli.attention.schedule import AttentionSchedule, Carried, StepKind
    from grat_kernels import HeadPlan, Plan

_FURTHEST = 1e6  # that is told

# Shape, dtype and device of each input.
Form: TypeAlias = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


def form_of(*inputs: Any) -> Form:
    """Of the tensors among some inputs."""
    return tuple((one.shape, one.dtype, one.device) for one in inputs if isinstance(one, torch.Tensor))


class _Place(NamedTuple):
    transformer: int
    call: int
    layer: int


@dataclass
class _Output:
    """The latest output of a layer that was computed, a tensor or several.

    Attributes:
        step: at which.
        form: of what it was computed from.
        latest: the output.
        slope: its change a step; None after the first.
        is_single: whether it is one tensor, rather than a tuple of them.
    """

    step: int
    form: Form
    latest: list[Kept]
    slope: list[Kept] | None
    is_single: bool

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (*self.latest, *(self.slope or ())))

    def at(self, step: int, slope: float) -> Any:
        """What follows for a later step."""
        factor = slope * (step - self.step)
        slopes = self.slope if self.slope is not None and factor else [None] * len(self.latest)
        made = [one.plus(other, factor) for one, other in zip(self.latest, slopes, strict=True)]
        return made[0] if self.is_single else tuple(made)

    def fetch(self) -> None:
        """Sets out what is elsewhere, to be there when it is asked for."""
        for one in (*self.latest, *(self.slope or ())):
            one.fetch()


class Carrying:
    """What is carried in the transformers of an installation.

    Attributes:
        kept_bytes: of all that is kept now.
        most_kept_bytes: the most that it has been in the run.
        clock: of the pipeline.
    """

    def __init__(
        self,
        clock: PipelineClock,
        begun: Callable[[], None] = lambda: None,
        compared: Callable[[int, torch.Tensor], None] | None = None,
    ) -> None:
        """Keeps nothing yet.

        Args:
            clock: of the pipeline.
            begun: called when a run begins.
            compared: told at references of each layer how far what would have been carried to it is from what was
                computed, as a share of that, a number on the device; None where nobody asks.
        """
        self.clock = clock
        self._counter, self._begun, self._compared = CallCounter(clock), begun, compared
        self._outputs: dict[_Place, _Output] = {}
        self._keeper = Keeper()
        self._step, self._transformer = -1, -1
        self._transformers = 0
        self.kept_bytes = self.most_kept_bytes = 0
        # Of each step, whether each layer that was called was carried to it.
        self._is_carried: dict[int, dict[_Place, bool]] = {}

    def of_transformer(self, layers: int) -> CarriedLayers:
        """What serves one more transformer, with so many layers."""
        self._transformers += 1
        return CarriedLayers(self, self._transformers - 1, layers)

    @contextmanager
    def served(self) -> Iterator[Carrying]:
        """While inside, it may keep something; nothing is left afterwards."""
        try:
            yield self
        finally:
            self.forget()

    def forget(self) -> None:
        """Drops all that is kept."""
        self._outputs.clear()
        self._keeper.clear()
        self.kept_bytes = 0

    def begin_call(self, transformer: int) -> int:
        """A transformer is called; says which of the calls of its step it is."""
        at = self._counter.count()
        if at.begins_run:
            self.forget()
            self.most_kept_bytes = 0
            self._is_carried.clear()
            self._begun()
        elif transformer != self._transformer and at.step > self._step:
            # One takes over from another for the rest of the run.
            for place in [place for place in self._outputs if place.transformer == self._transformer]:
                self._drop(place)
        self._step, self._transformer = at.step, transformer
        return at.call

    def carried(self, place: _Place, step: int, rule: Carried, form: Form) -> Any:
        """What a layer's kept output makes at a step; None where it is a reference or nothing is kept."""
        output = self._outputs.get(place)
        is_carried = not rule.is_reference and output is not None and output.form == form
        self._is_carried.setdefault(step, {})[place] = is_carried
        if not is_carried or output is None:
            return None
        made = output.at(step, rule.slope)
        if not rule.is_kept:  # the last step that it is carried to: decoders find its memory free
            self._drop(place)
        return made

    def kind_of_step(self, step: int) -> StepKind | None:
        """What a step was; None where no layer that is carried over steps was called."""
        return kind_of_step(self._is_carried.get(step, {}).values())

    def fetch(self, place: _Place) -> None:
        """Sets out what is kept of a layer."""
        if (output := self._outputs.get(place)) is not None:
            output.fetch()

    def keep(
        self,
        place: _Place,
        step: int,
        rule: Carried,
        form: Form,
        output: Any,
        *,
        whole: torch.Tensor | None = None,
        copies: bool = False,
    ) -> None:
        """Keeps what was computed of a layer at a step.

        Args:
            place: its own.
            step: at which.
            rule: how it is carried on.
            form: of what it was computed from.
            output: a tensor, or a tuple of them.
            whole: what the output is a part of; None where it is all.
            copies: whether the caller may change the output where it is.
        """
        before = self._outputs.get(place)
        if before is not None and (before.form != form or before.step >= step):
            self._drop(place)
            before = None
        if not rule.is_kept:
            self._drop(place)
            return
        parts = _parts(output)
        if before is not None and self._compared is not None:
            carried = _parts(before.at(step, rule.slope))
            self._compared(place.layer, _distance(carried, parts, parts if whole is None else [whole]))
        no_rooms: list[Kept | None] = [None] * len(parts)
        slope, rooms = None, no_rooms
        if before is not None:
            rooms = [*before.latest]
            if rule.extrapolates:
                span = step - before.step
                slopes = [(part - one.get()).div_(span) for part, one in zip(parts, before.latest, strict=True)]
                rooms_of_slope = before.slope or no_rooms
                slope = [
                    self._keeper.keep(rule.keep, one, room) for one, room in zip(slopes, rooms_of_slope, strict=True)
                ]
        latest = [
            self._keeper.keep(rule.keep, part, room, copies=copies) for part, room in zip(parts, rooms, strict=True)
        ]
        self._drop(place)
        self._outputs[place] = made = _Output(step, form, latest, slope, isinstance(output, torch.Tensor))
        self.kept_bytes += made.nbytes
        self.most_kept_bytes = max(self.most_kept_bytes, self.kept_bytes)

    def _drop(self, place: _Place) -> None:
        if (dropped := self._outputs.pop(place, None)) is not None:
            self.kept_bytes -= dropped.nbytes


def _parts(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


def _distance(carried: list[torch.Tensor], computed: list[torch.Tensor], whole: list[torch.Tensor]) -> torch.Tensor:
    """||carried - computed|| / ||whole||, a number on the device."""
    apart = _norm([one - other for one, other in zip(carried, computed, strict=True)])
    norm = _norm(whole)
    # Outputs of zero have no error to speak of.
    return (apart / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(_FURTHEST)


def _norm(parts: list[torch.Tensor]) -> torch.Tensor:
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


class CarriedLayers:
    """Serves the layers of one transformer.

    Attributes:
        layers: each of them.
    """

    def __init__(self, carrying: Carrying, transformer: int, layers: int) -> None:
        self._carrying, self._transformer = carrying, transformer
        self.layers = tuple(CarriedLayer(carrying, number) for number in range(layers))
        self._has_ended = True

    def begin_call(self, step: int, schedule: AttentionSchedule) -> None:
        """The transformer is called at a step."""
        if not self._has_ended:  # one that was broken off so that nobody could tell
            self._carrying.forget()
        self._has_ended = False
        call = self._carrying.begin_call(self._transformer)
        following = None
        for number, layer in reversed(list(enumerate(self.layers))):
            layer.place = _Place(self._transformer, call, number)
            layer.step, layer.rule = step, schedule.carried(step, number)
            layer.following = following
            if layer.rule is not None:
                following = layer.place
        if following is not None:
            self._carrying.fetch(following)

    def end_call(self) -> None:
        """It has been issued as a whole."""
        self._has_ended = True

    def leave_call(self) -> None:
        """It is over, as a whole or by an exception, after which nothing is carried on."""
        if not self._has_ended:
            self._carrying.forget()
            self._has_ended = True
        for layer in self.layers:
            layer.rule = None


class CarriedLayer:
    """What is carried of one layer, in the call under way.

    Attributes:
        is_whole: whether its attention module returns attention alone, so that all of it can be carried.
        rule: None where the layer is computed.
    """

    is_whole = False

    def __init__(self, carrying: Carrying, number: int) -> None:
        self._carrying = carrying
        self.place = _Place(0, 0, number)
        self.step = 0
        self.rule: Carried | None = None
        self.following: _Place | None = None

    @property
    def has_base(self) -> bool:
        """Whether something is computed at every step."""
        return self.rule is not None and self.rule.base is not None

    @property
    def takes_module(self) -> bool:
        """Whether the attention module is carried as a whole, in this call."""
        return self.rule is not None and self.is_whole and not self.has_base

    @property
    def takes_attention(self) -> bool:
        """Whether the attention itself is carried."""
        return self.rule is not None and not self.takes_module

    def carried(self, form: Form) -> Any:
        """What is carried to this call in place of computing it, or of what its base leaves; None if it is computed.

        It may be what is kept itself, and must not be changed.
        """
        if self.rule is None:
            return None
        made = self._carrying.carried(self.place, self.step, self.rule, form)
        if self.following is not None:
            self._carrying.fetch(self.following)
        return made

    def keep(self, form: Form, output: Any, *, whole: torch.Tensor | None = None, copies: bool = False) -> None:
        """Keeps what was computed; see `Carrying.keep`."""
        assert self.rule is not None
        self._carrying.keep(self.place, self.step, self.rule, form, output, whole=whole, copies=copies)

    def attention_carried(self, form: Form, *, copies: bool = False) -> torch.Tensor | None:
        """What stands for the attention itself; None where any is to be computed. See `attention`."""
        if not self.takes_attention or self.has_base or (carried := self.carried(form)) is None:
            return None
        return carried.clone() if copies else carried

    def attention(
        self,
        query: torch.Tensor,
        compute: Callable[[Plan | HeadPlan], torch.Tensor],
        plan: Plan | HeadPlan,
        *,
        copies: bool = False,
    ) -> torch.Tensor:
        """The attention itself, `[B, N, H, D]`, computed or carried.

        Args:
            query: `[B, N, H, D]`.
            compute: it under a plan.
            plan: its own.
            copies: whether the caller may change what is returned.
        """
        rule, form = self.rule, form_of(query)
        assert rule is not None
        if rule.base is None:
            if (carried := self.attention_carried(form, copies=copies)) is not None:
                return carried
            made = compute(plan)
            self.keep(form, made, copies=copies)
            return made
        if (carried := self.carried(form)) is not None:
            return compute(rule.base) + carried
        made = compute(plan)
        if rule.is_kept:
            self.keep(form, made - compute(rule.base), whole=made)
        return made


def with_module_carried(processor: Any, layer: CarriedLayer) -> Any:
    """The processor of an attention module that returns attention alone, so that what it computes is carried.

    Args:
        processor: of this module alone; its class becomes one of its own.
        layer: of the module.
    """
    layer.is_whole = True
    processor.__class__ = _carried_kind(type(processor))
    processor.over_steps = layer
    return processor


@functools.cache
def _carried_kind(kind: type) -> type:
    compute: Any = kind.__call__

    # Attention modules look at what their processor's call takes.
    @functools.wraps(compute)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        layer: CarriedLayer = self.over_steps
        if not layer.takes_module:
            return compute(self, attn, *args, **kwargs)
        form = form_of(*args, *kwargs.values())
        if (output := layer.carried(form)) is None:
            output = compute(self, attn, *args, **kwargs)
            layer.keep(form, output)
        return output

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
