"""The words for what is wrong with a preset."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from pydantic_core import ErrorDetails, PydanticCustomError

from grat_cli.errors import choices


class Problem(NamedTuple):
    """What is wrong, and the path of the value that is."""

    path: tuple[str | int, ...]
    message: str


def problem_of(error: ErrorDetails) -> Problem:
    """Pydantic's account of an error in the words of a preset."""
    context: dict[str, Any] = error.get("ctx", {})
    value = error["input"]
    expected = {
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "string_type": "text",
        "model_type": "a section with keys",
        "tuple_type": "a list",
        "greater_than": f"more than {context.get('gt', 0):g}",
        "greater_than_equal": f"{context.get('ge', 0):g} or more",
        "less_than_equal": f"{context.get('le', 0):,.15g} or less",
        "too_long": f"at most {context.get('max_length', 0):,} entries",
        "string_too_long": f"text of at most {context.get('max_length', 0):,} characters",
        "bool_type": "true or false",
        "too_short": f"{context.get('min_length', 0)} or more of them",
        "string_pattern_mismatch": "a name of letters, digits, dots and dashes",
    }
    if error["type"] == "missing":
        message = "is missing"
    elif error["type"] == "literal_error":
        known = re.findall(r"'([^']+)'", context["expected"])
        message = f"unknown value {shown(value)}: {choices(str(value), known)}"
    elif error["type"] == "value_error":
        message = str(context["error"])
    elif error["type"] in expected:
        message = f"expected {expected[error['type']]}, not {shown(value)}"
    else:
        message = error["msg"]
    return Problem((*error["loc"], *context.get("path", ())), message)


def invalid(message: str, *path: str | int) -> PydanticCustomError:
    """A validation error at `path` below the section that raises it."""
    return PydanticCustomError("invalid", "{message}", {"message": message, "path": path})


def shown(value: Any) -> str:
    """A value as it would stand in YAML, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a section with keys"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shape_text(size: int | tuple[int, ...]) -> str:
    """`16x16` for a group or block, `2` for a single number."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def nesting_sizes(inner: tuple[int, ...], outer: tuple[int, ...]) -> str:
    """The sizes nearest to `inner` that nest in `outer`, for an error message."""
    smaller, larger = [], []
    for size, limit in zip(inner, outer, strict=True):
        small = [number for number in range(1, math.isqrt(limit) + 1) if limit % number == 0]
        divisors = sorted({*small, *(limit // number for number in small)})
        smaller.append(max(number for number in divisors if number <= size))
        larger.append(min((number for number in divisors if number >= size), default=limit))
    return " or ".join(dict.fromkeys([shape_text(tuple(smaller)), shape_text(tuple(larger))]))
