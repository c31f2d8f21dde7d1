"""What pictures and videos are asked for alike, and how a run tells that it gets on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from grat_cli.errors import BadInput
from grat_cli.models.catalogue import ModelChoice
from grat_cli.presets import Preset


@dataclass(frozen=True)
class GenerationRequest:
    """What to make.

    Attributes:
        prompt: what the output shows.
        preset: attention, schedule, kernel and sampling.
        model: of `models.choose_model`.
        width: in pixels.
        height: in pixels.
        seeds: one output is made for each.
        negative_prompt: what to steer away from, or None.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        offload: one of `offloading.OFFLOADS`.
        quantize: one of `quantization.QUANTIZATIONS`.
        base: folder or hub id of the other parts, for a model that is a file of a transformer alone.
    """

    prompt: str
    preset: Preset
    model: ModelChoice
    width: int
    height: int
    seeds: tuple[int, ...]
    negative_prompt: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    quantize: str = "none"
    base: str | None = None


class Progress(Protocol):
    """Told how a run goes on."""

    def phase(self, name: str) -> None:
        """A phase begins: load, text, denoise, decode or encode."""
        ...

    def step(self, done: int, total: int) -> None:
        """So many denoising steps have been issued; those of an earlier process count."""
        ...

    def note(self, text: str) -> None:
        """Something worth knowing, in one sentence."""
        ...


def check_size(request: GenerationRequest) -> None:
    """Raises BadInput unless the model can make outputs of this width and height."""
    unit = request.model.size_multiple
    if request.width % unit or request.height % unit or min(request.width, request.height) < unit:
        raise BadInput(
            f"width and height must be multiples of {unit}, not {request.width}x{request.height}: "
            f"the nearest is {_nearest(request.width, unit)}x{_nearest(request.height, unit)}"
        )


def _nearest(size: int, unit: int) -> int:
    return max(unit, round(size / unit) * unit)
