"""Pictures of the bundled model that take no time, made as `grat image` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from grat_cli.generation import run
from grat_cli.generation.request import Request
from grat_cli.models.catalogue import choose_model
from grat_cli.presets import Preset, load_preset, resolve_preset

WIDTH, HEIGHT = 96, 80  # 10 x 12 tokens: ragged groups of 4
STEPS = 3
PROMPT = "a red fox in the snow"
DEMO = choose_model("demo")
SMALL_DEMO = replace(DEMO, native_side=64)  # as if it was trained at 64x64, so that stages are small


class Progress:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.notes: list[str] = []
        self.works: list[str] = []
        self.bytes_written: list[int] = []

    def phase(self, name: str) -> None:
        self.events.append(name)

    def step(self, done: int, total: int) -> None:
        self.events.append((done, total))

    def work(self, text: str) -> None:
        self.works.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def written(self, count: int) -> None:
        self.bytes_written.append(count)


@dataclass(frozen=True)
class Picture:
    """What was written."""

    image: Image.Image
    report: dict[str, Any]

    @property
    def bytes(self) -> bytes:
        return self.image.tobytes()

    @property
    def pixels(self) -> np.ndarray:
        return pixels(self.image)


def pixels(image: Image.Image) -> np.ndarray:
    """Numbers that can be subtracted."""
    return np.asarray(image).astype(int)


def preset(variant: str = "x", **sections: Any) -> Preset:
    """Of the demo, in groups of 4x4, with few steps."""
    return Preset.model_validate(
        {
            "name": "test",
            "model": "demo",
            "attention": {"variant": variant, "group": [4, 4]},
            "sampling": {"steps": STEPS, "guidance": 2.0},
            **sections,
        }
    )


def staged(name: str = "flux-far", **highres: Any) -> Preset:
    """A preset that comes with grat, with a `highres` section of its own."""
    return Preset.model_validate({**load_preset(name).model_dump(), "highres": highres})


def sparse_stages(steps: int = 3, **highres: Any) -> Preset:
    """Of the demo, sparse at every stage but the base."""
    return resolve_preset(staged("demo-b", **({"dense_below": 0} | highres)), steps=steps)


def request(**changes: Any) -> Request:
    """For one small picture."""
    plain: dict[str, Any] = {"width": WIDTH, "height": HEIGHT, "seeds": (7,), "device": "cpu", "format": "png"}
    return Request(**{"prompt": PROMPT, "preset": preset(), "model": DEMO, **plain, **changes})


def generate(progress: Progress | None = None, **changes: Any) -> Sequence[Picture]:
    """The pictures of a request, each with its report."""
    asked = request(**changes)
    with TemporaryDirectory() as folder:
        outputs = tuple(Path(folder) / f"{seed}.png" for seed in asked.seeds)
        made = []
        for one in run.generate(replace(asked, outputs=outputs), progress or Progress()):
            with Image.open(one.path) as image:
                made.append(Picture(image.copy(), one.report))
        return made


def generate_staged(chosen: Preset, side: int = 128, progress: Progress | None = None, **changes: Any) -> Any:
    """The pictures of a square that is large for `SMALL_DEMO`."""
    return generate(progress, preset=chosen, width=side, height=side, model=SMALL_DEMO, **changes)
