"""JSON from files that someone else may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

    Model = TypeVar("Model", bound=BaseModel)

_LONGEST_BYTES = 1 << 23
_DEEPEST = 100


def parsed(text: str | bytes) -> Any:
    """JSON as plain data that can be written again as it is.

    Raises:
        ValueError: if it is none, has numbers that are none (NaN, 1e999), or is nested more than a hundred deep.
    """
    deep = "it is nested too deeply"
    try:
        content = json.loads(text)
        json.dumps(content, allow_nan=False)
    except RecursionError:
        raise ValueError(deep) from None
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return content
    raise ValueError(deep)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that someone else may have written.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it holds no such object, is too long, or nested too deeply.
    """
    if not path.is_file():  # opening a pipe would wait for ever
        raise FileNotFoundError(f"{path} is missing")
    with open(path, "rb") as file:
        text = file.read(_LONGEST_BYTES + 1)
    if len(text) > _LONGEST_BYTES:
        raise ValueError(f"{path.name} is longer than {_LONGEST_BYTES >> 20} MiB")
    content = parsed(text)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content


def validated(kind: type[Model], data: Any) -> Model:
    """Plain data from a file as a pydantic model of it.

    Raises:
        ValueError: in one line, if it does not fit.
    """
    from pydantic import ValidationError

    try:
        return kind.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        # A name may be anything that somebody wrote into a file.
        raise ValueError(f"{ascii(where)[1:-1][:80]}: {first['msg'].splitlines()[0][:160]}") from error
