"""Batches of small pictures, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grat_cli.errors import NumericalFailure
from grat_cli.generation import run as generation

SMALL = ("--model", "demo", "--res", "64", "--steps", "2")
GENEVAL = (
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "cow", "count": 2}],
        "exclude": [{"class": "cow", "count": 3}],
        "prompt": "a photo of two cows",
    },
)


def write_lines(name: str, *items: Any) -> None:
    """A file of prompts: each a text, or an object."""
    Path(name).write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))


def files(folder: str) -> dict[str, int]:
    """Every file in a folder, and when it was written last."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


def pixels(path: Path | str) -> np.ndarray:
    """Of a picture, `[height, width, 3]`."""
    with Image.open(path) as image:
        return np.asarray(image)


def fail_at(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of one seed turn out to be NaN."""
    written = generation.written

    def written_or_failed(pipe: Any, pixels: Any, run: Any, *rest: Any, **options: Any) -> Any:
        if run.seed == seed:
            raise NumericalFailure("the picture has NaN after decoding: try --dtype float32")
        return written(pipe, pixels, run, *rest, **options)

    monkeypatch.setattr(generation, "written", written_or_failed)
