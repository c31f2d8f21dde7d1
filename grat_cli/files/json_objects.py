"""JSON from files that someone else may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LONGEST_BYTES = 1 << 23


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
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content
