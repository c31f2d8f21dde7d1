"""From decoded pixels to frames of 8 bits, one by one, and whether they can be a video, or a picture, at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from grat_cli.errors import NumericalFailure, steadier

if TYPE_CHECKING:
    import numpy as np
    import torch

_BAND = 1024  # rows of pixels that are turned into bytes at once


class FrameCheck:
    """Looks at decoded frames as they pass: at tensors for NaN, at frames for whether there is anything to see.

    Attributes:
        frames: frames seen.

    Args:
        dtype: of the autoencoder, for advice; pixels may have been decoded in another than they have.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.frames = 0
        self._flat: list[int] = []
        self._identical = True
        self._first: np.ndarray | None = None
        self._dtype = dtype

    def require_finite(self, pixels: torch.Tensor) -> None:
        """Looks at the next frame as it was decoded.

        Args:
            pixels: of any shape.

        Raises:
            NumericalFailure: if it has NaN or infinity; names the frame, counted from 1.
        """
        self._dtype = self._dtype or pixels.dtype
        if not pixels.isfinite().all():
            raise NumericalFailure(
                f"frame {self.frames + 1} has NaN or infinity after decoding: {steadier(self._dtype, 'another --seed')}"
            )

    def see(self, frame: np.ndarray) -> None:
        """Looks at the next frame, uint8 `[H, W, 3]`."""
        self.frames += 1
        if (frame == frame[0, 0]).all():
            self._flat.append(self.frames)
        if self._first is None:
            self._first = frame
        elif self._identical:
            self._identical = bool((frame == self._first).all())

    def finish(self) -> tuple[str, ...]:
        """What is worth knowing about the whole video, once all frames were seen.

        Raises:
            NumericalFailure: if every frame is one flat colour.
        """
        if self.frames and len(self._flat) == self.frames:
            every = "every frame of the video is one flat colour, from frame 1 on"
            raise NumericalFailure(
                f"{'the picture is one flat colour' if self.frames == 1 else every}: "
                f"{steadier(self._dtype, 'another --seed', 'more --steps')}"
            )
        notes = []
        if self._flat:
            notes.append(
                f"{len(self._flat)} of {self.frames} frames are one flat colour, beginning with frame {self._flat[0]}"
            )
        if self._identical and self.frames > 1:
            notes.append(f"all {self.frames} frames are identical: the video does not move")
        return tuple(notes)


def frames_of(pixels: torch.Tensor, check: FrameCheck | None = None) -> Iterator[np.ndarray]:
    """The frames of a decoded video, or of a part of it, equal bit for bit to those of diffusers' processors.

    Only one frame at a time is held besides the tensor, and a band of it in floating point. A picture has one frame.

    Args:
        pixels: `[1, 3, T, H, W]`, about -1 to 1, as the VAE returns it; any float dtype and device.
        check: looks at every frame; call its `finish` after the last part.

    Yields:
        uint8 `[H, W, 3]`.

    Raises:
        NumericalFailure: if a frame has NaN or infinity and there is a check.
    """
    import numpy as np
    import torch

    if pixels.ndim != 5 or pixels.shape[:2] != (1, 3):
        raise ValueError(f"expected a decoded video [1, 3, T, H, W], got {list(pixels.shape)}")
    for index in range(pixels.shape[2]):
        picture = pixels[0, :, index].detach()
        if check is not None:
            check.require_finite(picture)
        frame = np.empty((*picture.shape[1:], 3), np.uint8)
        for top in range(0, len(frame), _BAND):
            # As VaeImageProcessor: `denormalize` in the VAE's own dtype, then float32, then `numpy_to_pil`'s rounding.
            unit = (picture[:, top : top + _BAND] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float()
            frame[top : top + _BAND] = unit.mul_(255).round_().to(torch.uint8).cpu().numpy()
        if check is not None:
            check.see(frame)
        yield frame


def checked_frames(parts: Iterable[torch.Tensor], check: FrameCheck) -> Iterator[np.ndarray]:
    """The frames of a video that is decoded part by part.

    The check of the whole comes after the last frame: where it fails, whoever consumes the frames fails, and a file
    that was being written is given up.

    Args:
        parts: `[1, 3, T, H, W]` each.
        check: afterwards its `finish()` tells the notes.

    Yields:
        uint8 `[H, W, 3]`.

    Raises:
        NumericalFailure: if a frame has NaN or infinity, or every frame is one flat colour.
    """
    for part in parts:
        yield from frames_of(part, check)
    check.finish()
