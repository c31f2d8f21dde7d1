"""What a preset says about which image tokens attend which."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from grat_cli.presets.problems import invalid, nesting_sizes, problem_of, shape_text, shown
from grat_cli.presets.section import Section, as_tuple
from grat_kernels import Block, CrissCross, Far, Full, Pattern, SlidingTile, Union
from grat_kernels.geometry import nests

Variant = Literal["full", "b", "x", "bx", "sta"]
VARIANTS: tuple[str, ...] = get_args(Variant)

# Far beyond what means anything, and within what every computation with it takes.
LARGEST_COUNT = 1_000_000
_MOST_LEVELS = 16

# The fields that say something to each variant, with the value that stands where none is given.
FIELDS_OF_VARIANT: Mapping[str, Mapping[str, int | None]] = {
    "full": {},
    "b": {"radius": 1, "far": None},
    "x": {"share": 1, "far": None},
    "bx": {"radius": 1, "share": 1, "far": None},
    "sta": {"window": 3, "far": None},
}


def _whole_numbers(value: Any, least: int, example: str) -> tuple[int, ...]:
    items = value if isinstance(value, list | tuple) else ()
    if not items or not all(type(item) is int and item >= least for item in items):
        raise ValueError(f"expected a list of whole numbers from {least} up, such as {example}, not {shown(value)}")
    for number in items:
        _refuse_outside(number, least)
    return tuple(items)


def _refuse_outside(number: int, least: int) -> None:
    """Raises ValueError for a whole number that means nothing."""
    if number < least:
        raise ValueError(f"expected {least} or more, not {shown(number)}")
    if number > LARGEST_COUNT:
        raise ValueError(f"expected {LARGEST_COUNT:,} or less, not {shown(number)}")


def _sizes(value: Any) -> tuple[int, ...]:
    return _whole_numbers(value, 1, "[16, 16]")


def _sizes_or_none(value: Any) -> tuple[int, ...] | None:
    return None if value is None else _sizes(value)


def _radius(value: Any) -> int | tuple[int, ...] | None:
    return _number_or_list(value, 0, "2 or [1, 2]")


def _window(value: Any) -> int | tuple[int, ...] | None:
    return _number_or_list(value, 1, "3 or [3, 5]")


def _number_or_list(value: Any, least: int, example: str) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    if type(value) is int:
        _refuse_outside(value, least)
        return value
    return _whole_numbers(value, least, example)


Sizes = Annotated[tuple[int, ...], BeforeValidator(_sizes)]
Radius = Annotated[int | tuple[int, ...] | None, BeforeValidator(_radius)]
Window = Annotated[int | tuple[int, ...] | None, BeforeValidator(_window)]
Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]


def without_unused(attention: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """The fields of an attention section that say something to `variant`."""
    meant_for_some = {name for fields in FIELDS_OF_VARIANT.values() for name in fields}
    unused = meant_for_some - set(FIELDS_OF_VARIANT.get(variant, meant_for_some))
    return {name: value for name, value in attention.items() if name not in unused}


class FarLevel(Section):
    """Groups more than `beyond` groups away are attended as means over blocks of `block` tokens."""

    beyond: Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
    block: Sizes


class Choice(Section):
    """How many blocks of the far level each query group and head attends more closely than by one mean each.

    Attributes:
        exact: the best blocks, attended token by token.
        fine: the next best, attended by means of `block` tokens.
        block: tokens of these means on each axis.
        by: what makes a block better than another (`grat_kernels.choosing`).
    """

    exact: Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
    fine: Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
    block: Sizes
    by: Literal["mass-and-spread"] = "mass-and-spread"

    @model_validator(mode="after")
    def _check_counts(self) -> Choice:
        if self.exact + self.fine == 0:
            raise invalid("exact and fine are both 0, which chooses nothing: give one of them, or leave choose out")
        return self

    @property
    def summary(self) -> str:
        """For people, for example `8 exact and 32 by 2x2`."""
        counts = ((self.exact, "exact"), (self.fine, f"by {shape_text(self.block)}"))
        return " and ".join(f"{count} {how}" for count, how in counts if count)


class FarField(Section):
    """What of the image is attended by means: a list of levels alone, or a section that also says what to choose.

    Attributes:
        levels: nearest first.
        choose: which blocks of the one level are attended more closely, by content; None for none of them.
    """

    levels: Annotated[tuple[FarLevel, ...], BeforeValidator(as_tuple), Field(min_length=1, max_length=_MOST_LEVELS)]
    choose: Choice | None = None

    @model_serializer(mode="wrap")
    def _write_levels_alone_as_a_list(self, write: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        written = write(self)
        return written if self.choose or info.context == SPELLED_OUT else written["levels"]

    @model_validator(mode="after")
    def _check_choice(self) -> FarField:
        if self.choose is None:
            return self
        if len(self.levels) != 1:
            raise invalid(
                f"choose takes the blocks of one level, not of {len(self.levels)}: leave one of the levels", "choose"
            )
        block, within = self.levels[0].block, self.choose.block
        if within == block or not nests(within, block):
            halves = tuple(next(part for part in range(max(1, size // 2), 0, -1) if size % part == 0) for size in block)
            advice = "use larger blocks" if halves == block else f"use for example {shape_text(halves)}"
            raise invalid(
                f"means of {shape_text(within)} do not nest in the blocks of {shape_text(block)} that are chosen from: "
                f"{advice}",
                *("choose", "block"),
            )
        return self

    @property
    def summary(self) -> str:
        """For people, for example `4x4 beyond 0, of which 8 exact and 32 by 2x2`."""
        levels = " and ".join(f"{shape_text(level.block)} beyond {level.beyond}" for level in self.levels)
        return f"{levels}, of which {self.choose.summary}" if self.choose else levels

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of all means on each axis."""
        return (*(level.block for level in self.levels), *([self.choose.block] if self.choose else []))

    def pattern(self) -> Far:
        """It as a pattern."""
        choose = self.choose and (self.choose.exact, self.choose.fine, self.choose.block)
        return Far([(level.beyond, level.block) for level in self.levels], choose)


# As the context of `model_dump`: far fields are sections even where they are levels alone, so that keys can be added.
SPELLED_OUT = "spelled out"


def _far_field(value: Any) -> FarField | None:
    """From levels alone, a section or null.

    Raises:
        ValueError, PydanticCustomError: if it is none.
    """
    listed = isinstance(value, list | tuple)
    if value is None or isinstance(value, FarField):
        return value
    if listed and not value:
        return None
    if not listed and not isinstance(value, dict):
        raise ValueError(f"expected a list of levels, or a section with levels and choose, not {shown(value)}")
    try:
        return FarField.model_validate({"levels": value} if listed else value)
    except ValidationError as error:
        problem = problem_of(error.errors()[0])
        raise invalid(problem.message, *(problem.path[1:] if listed else problem.path)) from error


FarOrNone = Annotated[FarField | None, BeforeValidator(_far_field)]


class Attention(Section):
    """Which image tokens attend which. Fields that the variant has no use for must be absent or null.

    Attributes:
        variant: `full`; `b`, `x`, `bx` (GRAT, arXiv 2505.14687); `sta` (sliding tiles, arXiv 2502.04507).
        group: tokens per group on each axis.
        radius: for `b` and `bx`: groups at most this far away, one number or one per axis.
        share: for `x` and `bx`: groups with at least this many coordinates in common.
        window: for `sta`: groups per axis, odd.
        far: what is not attended exactly, by means.
    """

    variant: Variant
    group: Sizes
    radius: Radius = None
    share: Count | None = None
    window: Window = None
    far: FarOrNone = None

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults_of_variant(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("variant"), str):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        return {**values, **FIELDS_OF_VARIANT.get(values["variant"], {}), **given}

    @model_validator(mode="after")
    def _check_fit(self) -> Attention:
        for name in ("radius", "share", "window", "far"):
            if getattr(self, name) is not None and name not in FIELDS_OF_VARIANT[self.variant]:
                takers = " or ".join(variant for variant, fields in FIELDS_OF_VARIANT.items() if name in fields)
                raise invalid(f"{name} has no meaning for variant {self.variant}: leave it out, or use {takers}", name)
        for index, level in enumerate(self.far.levels if self.far else ()):
            if len(level.block) == len(self.group) and not nests(level.block, self.group):
                raise invalid(
                    f"blocks of {shape_text(level.block)} do not nest in groups of {shape_text(self.group)}: "
                    f"use {nesting_sizes(level.block, self.group)}",
                    *(("far", "levels") if self.far and self.far.choose else ("far",)),
                    *(index, "block"),
                )
        try:
            self.pattern().check(len(self.group))
        except ValueError as error:
            raise invalid(str(error)) from error
        return self

    def pattern(self) -> Pattern:
        """The pattern over groups."""
        radius = 1 if self.radius is None else self.radius
        share = 1 if self.share is None else self.share
        near: dict[str, Pattern] = {
            "full": Full(),
            "b": Block(radius),
            "x": CrissCross(share),
            "bx": Union(Block(radius), CrissCross(share)),
            "sta": SlidingTile(3 if self.window is None else self.window),
        }
        return Union(near[self.variant], self.far.pattern()) if self.far else near[self.variant]

    def changed(self, changes: Mapping[str, Any]) -> Attention:
        """This with other values; fields that a new variant has no use for go, and its own take their defaults.

        Raises:
            ValidationError: if the result is not valid.
        """
        variant = changes.get("variant", self.variant)
        return Attention.model_validate({**without_unused(self.model_dump(), variant), **changes})

    @property
    def cells(self) -> tuple[tuple[int, ...], ...]:
        """Sizes that the token order has to keep together: the group and the blocks of its far field."""
        return (self.group, *(self.far.blocks if self.far else ()))

    @property
    def summary(self) -> str:
        """One line for people, for example `b radius 1, groups 16x16, far 8x8 beyond 1`."""
        parts = [
            f"{name} {shape_text(value)}"
            for name in ("radius", "share", "window")
            if (value := getattr(self, name)) is not None
        ]
        near = " ".join([self.variant, *parts])
        return ", ".join([near, f"groups {shape_text(self.group)}", *([f"far {self.far.summary}"] if self.far else [])])


class Change(Section):
    """Attention fields that differ from those of the preset's own attention."""

    variant: Variant | None = None
    group: Annotated[tuple[int, ...] | None, BeforeValidator(_sizes_or_none)] = None
    radius: Radius = None
    share: Count | None = None
    window: Window = None
    far: FarOrNone = None

    @model_serializer(mode="wrap")
    def _write_what_is_given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Absent is not null: `far: null` takes the far field away."""
        return {name: value for name, value in write(self).items() if name in self.model_fields_set}

    @cached_property
    def changes(self) -> dict[str, Any]:
        """The attention fields that are given."""
        given = self.model_dump(include=set(Change.model_fields))
        return {name: value for name, value in given.items() if value is not None or name == "far"}
