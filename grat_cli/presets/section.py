"""What all mappings of a preset have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from grat_cli.errors import choices
from grat_cli.presets.problems import invalid

LARGEST_NUMBER = 1e6
Number = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]


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


def as_tuple(value: Any) -> Any:
    """A list as pydantic takes a tuple."""
    return tuple(value) if isinstance(value, list) else value
