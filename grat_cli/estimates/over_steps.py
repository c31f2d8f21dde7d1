"""What it costs to carry attention over steps: bytes that are kept, and what a step takes in place of its attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from grat_cli.attention.schedule import STEP_KINDS, AttentionSchedule, Carried, StepKind
from grat_cli.console.run_tables import ranges_text
from grat_cli.families.shapes import TransformerShape
from grat_cli.presets.over_steps import Keep

# Buffers of the device that tensors in main memory go through; see `attention.keeping`.
_BUFFERS = 6
_SCALE = 4  # bytes of each that a tensor in 8 bits has
# How often a hidden state is read or written by the rotation of a module that is carried in place of it.
_PASSES_OF_ROTATION = 4


class KeptBytes(NamedTuple):
    """The most that is kept over steps.

    Attributes:
        device: bytes on the device.
        host: in main memory.
        buffers: on the device, for what is in main memory.
    """

    device: float = 0.0
    host: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        """Wherever it is, without buffers."""
        return self.device + self.host


def kept_bytes(
    schedules: Sequence[AttentionSchedule],
    shape: TransformerShape,
    element: int,
    *,
    keep: Keep | None = None,
    on_cpu: bool = False,
    whole: bool = True,
) -> KeptBytes:
    """What is kept when it is most.

    Args:
        schedules: of each of the calls of a step, whose texts may differ in length.
        shape: of the transformer.
        element: bytes of an activation.
        keep: where it is kept; None for what the schedule says.
        on_cpu: whether the device's memory is main memory.
        whole: whether attention modules are carried as far as they can be; not where they are compiled.
    """
    most = KeptBytes()
    counts: Counter[tuple[int, int]] = Counter()  # tensors that are kept of a call and layer
    for step in range(schedules[0].steps):
        device, host, buffers = 0.0, 0.0, 0.0
        for call, schedule in enumerate(schedules):
            for layer, (rule, matrices) in enumerate(_rules(schedule, shape, step)):
                if rule is None:
                    continue
                if not rule.is_kept:
                    counts[call, layer] = 0
                elif rule.is_reference:
                    counts[call, layer] = 2 if counts[call, layer] and rule.extrapolates else 1
                where = rule.keep if keep is None else keep
                is_module = bool(matrices) and whole and rule.base is None
                size = _tensor_bytes(schedule, shape, element, where, is_module)
                if where == "host" and not on_cpu:
                    host, buffers = host + counts[call, layer] * size, _BUFFERS * size
                else:
                    device += counts[call, layer] * size
        most = max(most, KeptBytes(device, host, buffers), key=lambda kept: kept.total)
    return most


def _tensor_bytes(
    schedule: AttentionSchedule, shape: TransformerShape, element: int, keep: Keep, is_module: bool
) -> float:
    """Of an output of a layer, or its slope."""
    tokens = schedule.plans[0].tokens
    if keep == "fp8":
        # One scale for each row of the last axis: of a token, and of attention itself of a token and head.
        return tokens * (shape.width + _SCALE * (1 if is_module else shape.heads))
    return tokens * shape.width * element


class StepCost(NamedTuple):
    """What carrying changes of one of a step's transformer calls, besides its attention.

    Attributes:
        flop: floating-point operations of projections that are left out.
        device_bytes: that are read and written on the device for what is carried and kept, less those of what it takes
            the place of.
        link_bytes: that are copied between the device and main memory.
    """

    flop: float
    device_bytes: float
    link_bytes: float


def step_cost(schedule: AttentionSchedule, shape: TransformerShape, step: int, element: int) -> StepCost:
    """What a step has in place of its attention, by arithmetic alone.

    Args:
        schedule: of the run.
        shape: of the transformer.
        step: which.
        element: bytes of an activation.
    """
    tokens = schedule.plans[0].tokens
    row = tokens * shape.width * element
    flop, device, link = 0.0, 0.0, 0.0
    for rule, matrices in _rules(schedule, shape, step):
        if rule is None:
            continue
        stored = _tensor_bytes(schedule, shape, element, rule.keep, is_module=True)
        tensors = 1 + bool(rule.extrapolates if rule.is_reference else rule.slope)
        if rule.is_reference:
            if rule.is_kept:
                # The difference to the output before, divided; and with a base what that leaves.
                device += row * (5 * (tensors - 1) + 3 * (rule.base is not None))
                link += tensors * stored * (rule.keep == "host")
            continue
        # One multiplication and addition; what is reused in 16 bits or more is there as it is.
        if tensors > 1 or rule.keep == "fp8":
            device += tensors * (row if rule.keep == "host" else stored) + row
        link += tensors * stored * (rule.keep == "host")
        if rule.base is not None:
            device += 3 * row
        elif matrices:
            flop += 2.0 * matrices * shape.width**2 * tokens
            device -= _PASSES_OF_ROTATION * row
    return StepCost(flop, device, link)


def _rules(schedule: AttentionSchedule, shape: TransformerShape, step: int) -> Iterator[tuple[Carried | None, int]]:
    """How each layer is carried at a step, and `carried_matrices` of its block."""
    matrices = [shape.carried_matrices[kind] for kind, count in shape.blocks.items() for _ in range(count)]
    for layer, count in enumerate(matrices):
        yield schedule.carried(step, layer), count


def over_steps_data(
    kinds: Iterable[StepKind | None], schedule: AttentionSchedule, kept: int | None, foretold: float | None
) -> dict[str, Any]:
    """Which steps are references, and what is kept, as plain data, alike in plans and reports. Steps and layers are
    counted from 0.

    Args:
        kinds: of the steps, of those that are done in reports.
        schedule: of the run.
        kept: bytes that were kept at most; None where none ran.
        foretold: likewise what was foretold; None where that is not known.
    """
    steps_of: dict[StepKind, list[int]] = {kind: [] for kind in STEP_KINDS}
    for step, kind in enumerate(kinds):
        if kind is not None:
            steps_of[kind].append(step)
    some = schedule.layers_over_steps
    measured: Mapping[str, float | None] = {"kept_bytes": kept, "foretold_bytes": foretold}
    told = [(kind, ranges_text(steps), len(steps)) for kind, steps in steps_of.items() if steps]
    return {
        "steps": [dict(zip(("kind", "steps", "count"), values, strict=True)) for values in told],
        "layers": None if len(some) == schedule.layers else ranges_text(some),
        **{name: round(count) for name, count in measured.items() if count is not None},
    }
