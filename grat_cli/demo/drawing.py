"""A pen that draws filled shapes in unit coordinates, and the palette of the demo's scenes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (214, 48, 49),
    "orange": (240, 132, 40),
    "yellow": (246, 205, 52),
    "green": (58, 160, 74),
    "blue": (44, 104, 214),
    "purple": (138, 68, 190),
    "pink": (242, 130, 178),
    "white": (245, 245, 245),
    "black": (38, 38, 44),
    "brown": (134, 84, 48),
}
WHITE: Colour = (250, 250, 250)
INK: Colour = (24, 22, 26)


def blend(first: Colour, second: Colour, share: float) -> Colour:
    """Return `first` moved towards `second` by `share` (0 to 1)."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def darker(colour: Colour, share: float = 0.35) -> Colour:
    """Return `colour` moved towards black by `share`."""
    return blend(colour, (0, 0, 0), share)


def lighter(colour: Colour, share: float = 0.4) -> Colour:
    """Return `colour` moved towards white by `share`."""
    return blend(colour, (255, 255, 255), share)


def gradient(side: int, top: Colour, bottom: Colour) -> Image.Image:
    """Return a square picture that runs from `top` to `bottom`."""
    column = Image.new("RGB", (1, 64))
    for row in range(64):
        column.putpixel((0, row), blend(top, bottom, row / 63))
    return column.resize((side, side), Image.Resampling.BILINEAR)


class Pen:
    """Draws on a square picture. Coordinates are in units of `scale` from an origin, y pointing down.

    The origin (`place`) and the scale are given as fractions of the picture's side, so that a shape is described once
    whatever its place and the resolution.
    """

    def __init__(self, picture: Image.Image) -> None:
        self._draw = ImageDraw.Draw(picture)
        self._side = picture.width
        self.place(0.0, 0.0, 1.0)

    def place(self, x: float, y: float, scale: float) -> None:
        """Move the origin to (`x`, `y`) and set the unit to `scale`, all fractions of the picture's side."""
        self._x, self._y, self._scale = x, y, scale

    def _point(self, x: float, y: float) -> Point:
        return (self._x + x * self._scale) * self._side, (self._y + y * self._scale) * self._side

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> None:
        """Fill an ellipse around (`x`, `y`)."""
        corners = self._point(x - radius_x, y - radius_y), self._point(x + radius_x, y + radius_y)
        self._draw.ellipse(corners, fill=colour)

    def polygon(self, points: Iterable[Point], colour: Colour) -> None:
        """Fill a polygon."""
        self._draw.polygon([self._point(x, y) for x, y in points], fill=colour)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fill a rectangle."""
        self._draw.rectangle((self._point(left, top), self._point(right, bottom)), fill=colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        """Draw a line with rounded ends through `points`."""
        pixels = max(1, round(width * self._scale * self._side))
        self._draw.line([self._point(x, y) for x, y in points], fill=colour, width=pixels, joint="curve")
        for x, y in (points[0], points[-1]):
            self.ellipse(x, y, width / 2, width / 2, colour)
