"""Picture sizes as people write them: `8192`, `4096x2048`, `4k`, `4mp`, `16:9`, `16:9@4mp`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from grat_cli.errors import BadInput

LARGEST_SIDE = 32768
MEGAPIXEL = 1024 * 1024  # as image models count: 1mp is 1024x1024, 4mp is 2048x2048

_SIZE = re.compile(r"(\d{1,6})(?:[x×](\d{1,6}))?", re.ASCII)
_AMOUNT = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)(k|mp)", re.ASCII)
_RATIO = re.compile(r"(\d{1,4}(?:\.\d{1,3})?):(\d{1,4}(?:\.\d{1,3})?)(?:@(.+))?", re.ASCII)
_FORMS = "expected a side (1024), WIDTHxHEIGHT (1536x1024), 2k, 4mp, 16:9 or 16:9@4mp"


@dataclass(frozen=True)
class Resolution:
    """A picture's size in pixels.

    Attributes:
        computed: whether it was worked out from a ratio or an amount, so that people should be told.
    """

    width: int
    height: int
    computed: bool = False

    @property
    def frames(self) -> None:
        """A picture has no time axis."""

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def parse_resolution(text: str | None, native_side: int, multiple: int) -> Resolution:
    """Reads `--res`.

    Args:
        text: as typed; None is a square of the native side.
        native_side: side in pixels that the model was trained on; a ratio alone takes its area.
        multiple: both sides must be multiples of this many pixels. Computed sides are rounded to the nearest,
            sides that were typed never are.

    Raises:
        BadInput: if the text is not a size, or a size that the model cannot make, with the nearest ones that it can.
    """
    if text is None:
        return Resolution(native_side, native_side)
    word = text.strip().lower()
    if match := _SIZE.fullmatch(word):
        width = int(match.group(1))
        resolution = Resolution(width, int(match.group(2) or width))
        _refuse_other_sizes(text, resolution, multiple)
        return resolution
    if _AMOUNT.fullmatch(word):
        return _computed(text, _area(text, word), 1.0, multiple)
    if match := _RATIO.fullmatch(word):
        across, down, amount = float(match.group(1)), float(match.group(2)), match.group(3)
        if not (across and down):
            raise BadInput(f"--res {text}: neither side of a ratio can be 0")
        area = _area(text, amount) if amount else float(native_side**2)
        return _computed(text, area, across / down, multiple)
    raise BadInput(f"--res {text}: {_FORMS}")


def _area(text: str, amount: str) -> float:
    """Pixels that `2k` (a square of 2048), `2048` or `4mp` stand for."""
    if match := _AMOUNT.fullmatch(amount):
        number = float(match.group(1))
        return number * MEGAPIXEL if match.group(2) == "mp" else (number * 1024) ** 2
    if amount.isascii() and amount.isdigit() and len(amount) <= 6:
        return float(int(amount) ** 2)
    raise BadInput(f"--res {text}: after @ comes a side (2048), 2k or 4mp, not {amount!r}")


def _computed(text: str, area: float, ratio: float, multiple: int) -> Resolution:
    sides = math.sqrt(area * ratio), math.sqrt(area / ratio)
    width, height = (round(side / multiple) * multiple for side in sides)
    resolution = Resolution(width, height, computed=True)
    _refuse_other_sizes(text, resolution, multiple)
    return resolution


def _refuse_other_sizes(text: str, resolution: Resolution, multiple: int) -> None:
    sides = (resolution.width, resolution.height)
    if min(sides) < multiple or max(sides) > LARGEST_SIDE:
        raise BadInput(f"--res {text}: sides go from {multiple} to {LARGEST_SIDE} pixels, not {resolution}")
    if any(side % multiple for side in sides):
        width, height = sides
        lower = Resolution(width // multiple * multiple, height // multiple * multiple)
        upper = Resolution(-(-width // multiple) * multiple, -(-height // multiple) * multiple)
        offers = " or ".join(dict.fromkeys(str(size) for size in (lower, upper) if min(size.width, size.height)))
        raise BadInput(f"--res {text}: sides must be multiples of {multiple}: use {offers}")
