"""Previews: a small picture of where a run is, every few steps.

The pipeline's callback gets the noisy latents x alone. With those of the step before, x', flow matching's Euler step
tells the clean ones that the model now expects: x = x' + (s - s')·v, so x0 = x - s·v = x - s·(x - x')/(s - s'), where
s is the noise level (diffusers 0.42.1, `FlowMatchEulerDiscreteScheduler.step`; arXiv 2403.03206, section 2). Both are
averaged down to the size that the model was trained at before they are decoded, so that a preview of a picture of any
size costs the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import NumericalFailure
from grat_cli.families import Family
from grat_cli.files.pictures import FORMATS, write_picture
from grat_cli.files.whole import remove
from grat_cli.generation.frames import FrameCheck, checked_frames

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

LONGEST_SIDE = 512


@dataclass(frozen=True)
class Preview:
    """Previews of one output.

    Attributes:
        path: the file, replaced by each preview.
        every: steps from one preview to the next.
        trained_side: pixels a side that the model was trained at.
        family: of the model.
        overwrite: whether a file that is no preview of this run may be replaced.
    """

    path: Path
    every: int
    trained_side: int
    family: Family
    overwrite: bool = False

    def remove(self) -> None:
        """Removes the preview, if there is one: the picture itself is there."""
        remove(self.path)


class PreviewedSteps:
    """A pipeline's callback that writes previews after another one has done its work.

    It waits for the device where it writes one. There is none of a stage's last step, which is decoded anyway, and none
    of its first, before which there is nothing to compare with.

    Args:
        preview: where and how often.
        watch: the other callback.
        height: of the picture that is made, in pixels.
        width: likewise.
    """

    def __init__(self, preview: Preview, watch: Callable[..., dict[str, Any]], height: int, width: int) -> None:
        self._preview, self._watch = preview, watch
        self._height, self._width = height, width
        self._before: torch.Tensor | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        result = self._watch(pipe, step, timestep, tensors)
        latents, done = tensors["latents"], step + 1
        if self._before is not None and done < pipe.num_timesteps:
            self._write(pipe, self._before, latents)
        # Held for the one step that a preview compares.
        self._before = latents if (done + 1) % self._preview.every == 0 else None
        return result

    def _write(self, pipe: Any, before: torch.Tensor, latents: torch.Tensor) -> None:
        from PIL import Image

        scheduler = pipe.scheduler
        earlier, now = (float(scheduler.sigmas[scheduler.step_index - back]) for back in (1, 0))
        noisier, noisy = (self._scaled_down(pipe, tensor) for tensor in (before, latents))
        clean = noisy - now * (noisy - noisier) / (now - earlier)
        try:
            pixels = self._preview.family.decode(pipe, clean.to(latents.dtype))
            (frame,) = checked_frames([pixels], FrameCheck())
        except NumericalFailure:
            # What comes of it is told at the end of the run; an early estimate may be flat.
            return
        picture = Image.fromarray(frame)
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        write_picture(picture, self._preview.path, FORMATS["png"], None, overwrite=self._preview.overwrite)

    def _scaled_down(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[1, C, h, w]` in fp32 of `[1, image tokens, channels]`, no longer than those of the trained size."""
        from torch.nn import functional

        unpacked = self._preview.family.spatial(pipe, latents, self._width, self._height)
        longest = self._preview.trained_side // pipe.vae_scale_factor
        scale = min(1.0, longest / max(unpacked.shape[2:]))
        size = [max(1, round(extent * scale)) for extent in unpacked.shape[2:]]
        return functional.interpolate(unpacked.float(), size, mode="area")
