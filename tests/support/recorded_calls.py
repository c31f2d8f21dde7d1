"""What tests of recorded runs share: steps, an observer that keeps what it is told, calls of tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tiny_flux
import tiny_hunyuan

from grat_cli.attention.layer import AttentionInputs, CallObserver
from grat_cli.presets import Attention, Preset

STEPS = 3


def preset(model: str, group: list[int]) -> Preset:
    return Preset.model_validate(
        {
            "name": "test",
            "model": model,
            "attention": {"variant": "b", "group": group, "radius": 1},
            "schedule": {"dense_steps": 1},
            "kernel": {"backend": "sdpa"},
        }
    )


def candidates(group: list[int], block: list[int]) -> list[Attention]:
    given = (
        {"variant": "full"},
        {"variant": "b", "radius": 0},
        {"variant": "x"},
        {"variant": "b", "radius": 0, "far": [{"beyond": 0, "block": block}]},
        {
            "variant": "b",
            "radius": 0,
            "far": {
                "levels": [{"beyond": 0, "block": block}],
                "choose": {"exact": 4, "fine": 4, "block": [*block[:-1], block[-1] // 2]},
            },
        },
    )
    return [Attention.model_validate({"group": group, **one}) for one in given]


class Keeper(CallObserver):
    """Keeps what each attention was computed from."""

    def __init__(self) -> None:
        self.step, self.seen = 0, []

    def begin_call(self, step: int, density: float) -> None:
        self.step = step

    def end_call(self) -> None:
        pass

    @contextmanager
    def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
        assert inputs is not None
        self.seen.append((self.step, inputs._replace(query=inputs.query.clone())))
        yield


def flux_call() -> tuple[Any, dict[str, Any], Preset, list[Attention], dict[str, Any]]:
    pipe = tiny_flux.pipeline()
    size = {"height": 10 * tiny_flux.PIXELS_PER_TOKEN, "width": 7 * tiny_flux.PIXELS_PER_TOKEN}
    call = tiny_flux.prompt() | {"num_inference_steps": STEPS}
    return pipe, size, preset("flux", [4, 4]), candidates([4, 4], [2, 2]), call


def hunyuan_call() -> tuple[Any, dict[str, Any], Preset, list[Attention], dict[str, Any]]:
    size = {"height": 80, "width": 112, "num_frames": 9}
    call = {"prompt": ["waves at night", "snow"], "num_inference_steps": STEPS, "max_sequence_length": 16}
    return (
        tiny_hunyuan.pipeline(),
        size,
        preset("hunyuan", [2, 4, 4]),
        candidates([2, 4, 4], [1, 2, 2]),
        call,
    )
