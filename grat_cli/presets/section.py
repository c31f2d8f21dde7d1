"""What all mappings of a preset have in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from grat_cli.errors import choices
from grat_cli.presets import ranges
from grat_cli.presets.problems import invalid, shown

if TYPE_CHECKING:
    from typing_extensions import Self

LARGEST_NUMBER = 1e6
MOST_STEPS, _LONGEST_RANGE = 100_000, 40
Number = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]


def _range(value: Any) -> int | str | None:
    if value is not None and type(value) is not int and not isinstance(value, str):
        raise ValueError(f"{ranges.EXPECTED}, not {shown(value)}")
    if isinstance(value, str) and len(value) > _LONGEST_RANGE:
        raise ValueError(f"{ranges.EXPECTED}, not {shown(value)}")
    if value is not None:
        ranges.covered(value, 1)
    return value


Range = Annotated[int | str | None, BeforeValidator(_range)]


class Section(BaseModel):
    """A mapping of a preset: immutable, strict, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                raise invalid(f"unknown key: {choices(str(key), cls.model_fields)}", key)
        return values

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values, which are held to what a file may say; what follows from them follows anew.

        Args:
            update: values by field.
            deep: whether values are copied as well.

        Raises:
            ValidationError: if the result is not valid.
        """
        kept = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).model_validate({**(copy.deepcopy(kept) if deep else kept), **(update or {})})


def as_tuple(value: Any) -> Any:
    """A list as pydantic takes a tuple."""
    return tuple(value) if isinstance(value, list) else value
