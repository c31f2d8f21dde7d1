"""Attention over steps: at some steps it is computed, and its outputs are carried to the steps between.

Attention changes smoothly from step to step. Steps at which it is computed are references; with i < j the last two of
them, a layer's output at a later step t is carried as O_j + a (t - j) / (j - i) (O_j - O_i).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from grat_cli.presets import ranges
from grat_cli.presets.attention import Change
from grat_cli.presets.problems import invalid, problem_of, shown
from grat_cli.presets.section import MOST_STEPS, Number, Range, Section

Between = Literal["extrapolate", "reuse", "residual"]
Keep = Literal["device", "fp8", "host"]
KEEPS: tuple[str, ...] = get_args(Keep)
DEFAULT_SLOPE = 0.9
_STEEPEST = 2.0
_MOST_ENTRIES = 1000
_EXPECTED = (
    "expected steps such as [0, 3, 8] or [0, 0.1, 0.25], a whole number n for every n-th step, or a section such as "
    "{spaced: 6}"
)


class Spaced(Section):
    """So many references, evenly spaced in the sigmas of the run's schedule.

    Attributes:
        spaced: how many.
    """

    spaced: Annotated[int, Field(ge=1, le=MOST_STEPS)]


class Stretch(Section):
    """The slope of some steps.

    Attributes:
        steps: which, a range.
        slope: see `OverSteps`.
    """

    steps: Range = None
    slope: Annotated[Number, Field(ge=0, le=_STEEPEST)]


def _reference(value: Any) -> Any:
    if isinstance(value, Spaced | dict):
        return _section(Spaced, value)
    if type(value) is int:
        if not 1 <= value <= MOST_STEPS:
            raise ValueError(f"every n-th step is a reference: expected n from 1 to {MOST_STEPS:,}, not {value}")
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{_EXPECTED}, not {shown(value)}")
    if len(value) > _MOST_ENTRIES:
        raise ValueError(f"expected at most {_MOST_ENTRIES:,} steps, not {len(value):,}")
    for step in value:
        if not (type(step) is int and 0 <= step < MOST_STEPS) and not (type(step) is float and 0 <= step < 1):
            raise ValueError(
                f"expected steps from 0 to {MOST_STEPS - 1:,} or fractions from 0 to below 1, not {shown(step)}"
            )
    return tuple(value)


def _slope(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if not 0 < len(value) <= _MOST_ENTRIES:
            raise ValueError(f"expected 1 to {_MOST_ENTRIES:,} stretches of steps, not {len(value):,}")
        return tuple(_section(Stretch, entry, number) for number, entry in enumerate(value))
    if value is None or (type(value) in (int, float) and 0 <= value <= _STEEPEST):
        return value
    raise ValueError(
        f"expected a number from 0 to {_STEEPEST:g}, or a list such as "
        f'[{{steps: "0-0.25", slope: 0.4}}, {{steps: "0.25-1.0", slope: 0.9}}], not {shown(value)}'
    )


_Section = TypeVar("_Section", bound=Section)


def _section(kind: type[_Section], value: Any, *path: int) -> _Section:
    """A section where others than sections may stand, so that what is wrong is told of it alone."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = problem_of(error.errors()[0])
        raise invalid(problem.message, *path, *problem.path) from error


class OverSteps(Section):
    """References, the steps at which attention is computed, and how its outputs are carried to those between.

    The first step of a run always is a reference.

    Attributes:
        reference: the steps: numbers counted from 0, or fractions of the run; or n for every n-th step; or `Spaced`.
        between: `extrapolate`; `reuse`, which leaves the last output as it is; `residual`, which extrapolates the
            difference to the output of a sparser attention, which is computed at every step.
        slope: how much of the change from step to step is taken to go on, one number or by `Stretch`, later ones win;
            None, and steps in no stretch, take 0.9.
        layers: a range; absent means all.
        keep: where what is carried is kept: `device`, on the device as it is; `fp8`, there in 8 bits; `host`, in main
            memory.
        base: for `residual`: the sparser attention, as it differs from the preset's own.
    """

    reference: Annotated[Spaced | int | tuple[int | float, ...], BeforeValidator(_reference)]
    between: Between = "extrapolate"
    slope: Annotated[float | tuple[Stretch, ...] | None, BeforeValidator(_slope)] = None
    layers: Range = None
    keep: Keep = "device"
    base: Change | None = None

    @model_validator(mode="after")
    def _check_between(self) -> OverSteps:
        if self.between == "reuse" and self.slope is not None:
            raise invalid("has no meaning where outputs are reused as they are: leave it out", "slope")
        if self.between == "residual" and self.base is None:
            raise invalid("is missing: residual needs the attention that is computed at every step", "base")
        if self.between != "residual" and self.base is not None:
            raise invalid(f"has no meaning for {self.between}: leave it out, or use residual", "base")
        return self

    @property
    def is_spaced(self) -> bool:
        """Whether the references depend on the sigmas of the run's schedule."""
        return isinstance(self.reference, Spaced)

    def reference_steps(self, steps: int, sigmas: Sequence[float] | None = None) -> tuple[int, ...]:
        """The references of a run, in order, each once; the first step among them.

        Args:
            steps: of the run.
            sigmas: of each step, and what the last one ends at, `steps + 1` in all, falling; None for even ones.

        Raises:
            ValueError: if one is beyond the run. A fraction may fall behind the last step of a short run, which then
                does not have it.
        """
        if isinstance(self.reference, Spaced):
            return ranges.spaced(self.reference.spaced, sigmas or [float(steps - step) for step in range(steps + 1)])
        if isinstance(self.reference, int):
            return tuple(range(0, steps, self.reference))
        found = {0}
        for step in self.reference:
            if isinstance(step, int) and step >= steps:
                raise ValueError(f"has step {step} for a reference, but the run has {steps} steps, counted from 0")
            found.add(ranges.leading(step, steps))
        return tuple(sorted(step for step in found if step < steps))

    def slope_at(self, step: int, steps: int) -> float:
        """The slope at a step of a run of so many; 0 where outputs are reused."""
        if self.between == "reuse":
            return 0.0
        if isinstance(self.slope, tuple):
            stretches = (one for one in reversed(self.slope) if _covers(one.steps, step, steps))
            return next((one.slope for one in stretches), DEFAULT_SLOPE)
        return DEFAULT_SLOPE if self.slope is None else self.slope


def _covers(spec: int | str | None, step: int, steps: int) -> bool:
    return spec is None or step in ranges.covered(spec, steps)


def overlap(one: int | str | None, other: int | str | None) -> bool:
    """Whether two ranges of layers surely share some; whether a range of numbers and one of fractions do depends on
    how many layers there are."""
    if one is None or other is None:
        return True
    if ("." in str(one)) != ("." in str(other)):
        return False
    first, second = (ranges.covered(spec, ranges.MANY) for spec in (one, other))
    return max(first.start, second.start) < min(first.stop, second.stop)
