"""The things the demo model can draw. Every drawing stands on the pen's origin and is about one unit high."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from grat_cli.demo.drawing import COLOURS, INK, WHITE, Colour, Pen, darker, lighter

WOOD: Colour = (112, 74, 44)
GLASS: Colour = (190, 226, 244)


def contrast_white(colour: Colour) -> Colour:
    """Return the colour for white markings: off-white on a white subject, so that they still show."""
    return (204, 208, 220) if colour == COLOURS["white"] else WHITE


def draw_fox(pen: Pen, colour: Colour) -> None:
    white = contrast_white(colour)
    pen.line([(0.20, -0.10), (0.40, -0.14), (0.48, -0.32)], colour, 0.18)
    pen.ellipse(0.46, -0.44, 0.12, 0.18, colour)
    pen.ellipse(0.46, -0.54, 0.085, 0.10, white)
    pen.ellipse(0.0, -0.26, 0.27, 0.27, colour)
    pen.ellipse(0.0, -0.22, 0.13, 0.19, white)
    for side in (-1, 1):
        pen.ellipse(side * 0.12, -0.035, 0.10, 0.055, darker(colour))
        pen.polygon([(side * 0.34, -0.68), (side * 0.31, -1.0), (side * 0.04, -0.82)], colour)
        pen.polygon([(side * 0.28, -0.76), (side * 0.27, -0.91), (side * 0.14, -0.81)], INK)
    pen.polygon([(-0.37, -0.66), (-0.18, -0.84), (0.18, -0.84), (0.37, -0.66), (0.0, -0.36)], colour)
    for side in (-1, 1):
        pen.polygon([(side * 0.37, -0.66), (side * 0.13, -0.60), (0.0, -0.36)], white)
        pen.ellipse(side * 0.13, -0.69, 0.042, 0.048, INK)
    pen.ellipse(0.0, -0.40, 0.06, 0.048, INK)


def draw_cat(pen: Pen, colour: Colour) -> None:
    eye = (250, 214, 70) if colour == COLOURS["green"] else (126, 214, 88)
    pen.line([(0.20, -0.08), (0.42, -0.12), (0.47, -0.32), (0.40, -0.48)], colour, 0.10)
    pen.ellipse(0.0, -0.25, 0.27, 0.26, colour)
    pen.ellipse(0.0, -0.20, 0.13, 0.17, lighter(colour))
    for side in (-1, 1):
        pen.ellipse(side * 0.12, -0.04, 0.11, 0.06, lighter(colour))
        pen.polygon([(side * 0.33, -0.66), (side * 0.30, -1.0), (side * 0.03, -0.84)], colour)
        pen.polygon([(side * 0.27, -0.78), (side * 0.26, -0.92), (side * 0.13, -0.84)], COLOURS["pink"])
    pen.ellipse(0.0, -0.65, 0.34, 0.24, colour)
    for side in (-1, 1):
        pen.ellipse(side * 0.15, -0.69, 0.08, 0.08, eye)
        pen.ellipse(side * 0.15, -0.69, 0.032, 0.07, INK)
    pen.ellipse(0.0, -0.54, 0.13, 0.075, lighter(colour))
    pen.ellipse(0.0, -0.58, 0.045, 0.032, (226, 96, 120))


def draw_rabbit(pen: Pen, colour: Colour) -> None:
    pen.ellipse(0.27, -0.14, 0.10, 0.10, lighter(colour, 0.6))
    pen.ellipse(0.0, -0.23, 0.26, 0.23, colour)
    pen.ellipse(0.0, -0.19, 0.15, 0.16, lighter(colour, 0.6))
    for side in (-1, 1):
        pen.ellipse(side * 0.14, -0.81, 0.10, 0.24, colour)
        pen.ellipse(side * 0.14, -0.80, 0.05, 0.18, (244, 170, 184))
        pen.ellipse(side * 0.15, -0.04, 0.13, 0.065, darker(colour, 0.15))
    pen.ellipse(0.0, -0.54, 0.26, 0.20, colour)
    for side in (-1, 1):
        pen.ellipse(side * 0.11, -0.58, 0.042, 0.05, INK)
    pen.ellipse(0.0, -0.48, 0.05, 0.036, (226, 96, 120))


def draw_boat(pen: Pen, colour: Colour) -> None:
    sail = WHITE if colour != COLOURS["white"] else COLOURS["red"]
    pen.rectangle(-0.025, -0.98, 0.025, -0.22, WOOD)
    pen.polygon([(0.05, -0.95), (0.05, -0.30), (0.46, -0.30)], sail)
    pen.polygon([(-0.05, -0.85), (-0.05, -0.30), (-0.38, -0.30)], darker(sail, 0.1))
    pen.polygon([(-0.54, -0.26), (0.54, -0.26), (0.38, 0.02), (-0.38, 0.02)], colour)
    pen.polygon([(-0.54, -0.26), (0.54, -0.26), (0.50, -0.19), (-0.50, -0.19)], darker(colour, 0.3))


def draw_house(pen: Pen, colour: Colour) -> None:
    roof = (74, 78, 92) if colour in (COLOURS["red"], COLOURS["brown"]) else (142, 58, 46)
    pen.rectangle(0.18, -0.96, 0.31, -0.62, (110, 90, 84))
    pen.rectangle(-0.40, -0.57, 0.40, 0.0, colour)
    pen.polygon([(-0.52, -0.54), (0.0, -0.97), (0.52, -0.54)], roof)
    pen.rectangle(-0.09, -0.32, 0.09, 0.0, (92, 60, 40))
    for side in (-1, 1):
        pen.rectangle(side * 0.25 - 0.09, -0.44, side * 0.25 + 0.09, -0.24, (252, 236, 150))


def draw_tree(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.10, 0.0), (0.10, 0.0), (0.06, -0.50), (-0.06, -0.50)], WOOD)
    for x, y, radius in ((-0.24, -0.52, 0.22), (0.24, -0.52, 0.22), (0.0, -0.70, 0.30), (0.0, -0.50, 0.22)):
        pen.ellipse(x, y, radius, radius, colour)
    pen.ellipse(-0.10, -0.76, 0.12, 0.10, lighter(colour, 0.25))


def draw_car(pen: Pen, colour: Colour) -> None:
    pen.polygon([(-0.34, -0.36), (-0.20, -0.66), (0.22, -0.66), (0.38, -0.36)], colour)
    pen.polygon([(-0.25, -0.38), (-0.15, -0.60), (-0.02, -0.60), (-0.02, -0.38)], GLASS)
    pen.polygon([(0.05, -0.38), (0.05, -0.60), (0.19, -0.60), (0.30, -0.38)], GLASS)
    pen.rectangle(-0.54, -0.40, 0.54, -0.13, colour)
    pen.rectangle(-0.54, -0.19, 0.54, -0.13, darker(colour, 0.3))
    pen.ellipse(-0.49, -0.31, 0.05, 0.05, (252, 240, 160))
    for side in (-1, 1):
        pen.ellipse(side * 0.30, -0.13, 0.15, 0.15, INK)
        pen.ellipse(side * 0.30, -0.13, 0.07, 0.07, (196, 196, 202))


def draw_flower(pen: Pen, colour: Colour) -> None:
    middle = WOOD if colour in (COLOURS["yellow"], COLOURS["orange"]) else (250, 206, 64)
    pen.line([(0.0, -0.02), (0.0, -0.60)], (48, 130, 58), 0.07)
    pen.ellipse(-0.17, -0.16, 0.17, 0.07, (58, 150, 66))
    pen.ellipse(0.17, -0.22, 0.17, 0.07, (58, 150, 66))
    for petal in range(6):
        angle = petal * math.pi / 3
        pen.ellipse(0.22 * math.cos(angle), -0.66 + 0.22 * math.sin(angle), 0.15, 0.15, colour)
    pen.ellipse(0.0, -0.66, 0.14, 0.14, middle)


def draw_fish(pen: Pen, colour: Colour) -> None:
    fin = darker(colour, 0.25)
    pen.polygon([(0.24, -0.46), (0.56, -0.74), (0.48, -0.46), (0.56, -0.18)], fin)
    pen.polygon([(-0.16, -0.68), (0.10, -0.92), (0.22, -0.62)], fin)
    pen.polygon([(-0.08, -0.24), (0.08, -0.04), (0.16, -0.26)], fin)
    pen.ellipse(-0.08, -0.46, 0.44, 0.28, colour)
    pen.line([(0.06, -0.60), (0.11, -0.46), (0.06, -0.32)], lighter(colour, 0.5), 0.055)
    pen.ellipse(-0.32, -0.53, 0.085, 0.085, (255, 255, 255))
    pen.ellipse(-0.33, -0.53, 0.045, 0.045, INK)


def draw_balloon(pen: Pen, colour: Colour) -> None:
    stripe = lighter(colour, 0.55) if colour != COLOURS["white"] else (206, 70, 66)
    for side in (-1, 1):
        pen.line([(side * 0.12, -0.34), (side * 0.08, -0.16)], INK, 0.018)
    pen.polygon([(-0.33, -0.50), (0.33, -0.50), (0.13, -0.28), (-0.13, -0.28)], colour)
    pen.ellipse(0.0, -0.64, 0.36, 0.35, colour)
    pen.ellipse(0.0, -0.64, 0.15, 0.35, stripe)
    pen.polygon([(-0.14, -0.52), (0.14, -0.52), (0.06, -0.28), (-0.06, -0.28)], stripe)
    pen.rectangle(-0.12, -0.18, 0.12, 0.0, (150, 100, 56))


def draw_bird(pen: Pen, colour: Colour) -> None:
    for x in (-0.06, 0.12):
        pen.line([(x, -0.22), (x, -0.02)], (230, 150, 50), 0.045)
    pen.polygon([(0.18, -0.52), (0.58, -0.74), (0.54, -0.46), (0.24, -0.28)], darker(colour, 0.25))
    pen.ellipse(0.02, -0.42, 0.34, 0.27, colour)
    pen.ellipse(-0.06, -0.34, 0.21, 0.16, lighter(colour, 0.55))
    pen.polygon([(-0.40, -0.80), (-0.60, -0.70), (-0.40, -0.62)], (246, 168, 48))
    pen.ellipse(-0.23, -0.74, 0.22, 0.21, colour)
    pen.ellipse(-0.29, -0.77, 0.065, 0.065, (255, 255, 255))
    pen.ellipse(-0.30, -0.77, 0.035, 0.035, INK)
    pen.polygon([(-0.04, -0.56), (0.36, -0.50), (0.14, -0.24)], darker(colour, 0.25))


def draw_sun(pen: Pen, colour: Colour) -> None:
    for ray in range(12):
        angle = ray * math.pi / 6
        across, down = math.cos(angle), math.sin(angle)
        left = (0.32 * across - 0.08 * down, -0.5 + 0.32 * down + 0.08 * across)
        right = (0.32 * across + 0.08 * down, -0.5 + 0.32 * down - 0.08 * across)
        pen.polygon([left, right, (0.5 * across, -0.5 + 0.5 * down)], lighter(colour, 0.2))
    pen.ellipse(0.0, -0.5, 0.34, 0.34, colour)
    face = INK if colour != COLOURS["black"] else WHITE
    for side in (-1, 1):
        pen.ellipse(side * 0.12, -0.56, 0.04, 0.05, face)
    pen.line([(-0.14, -0.42), (-0.07, -0.36), (0.07, -0.36), (0.14, -0.42)], face, 0.04)


@dataclass(frozen=True)
class Subject:
    """A thing to draw.

    Attributes:
        draw: draws it in a colour, standing on the pen's origin.
        natural: names of the colours it has in life, used when a caption names none.
        weight: how often it is drawn, relative to the others. Animals have more parts to learn.
        nouns: what captions call it.
    """

    draw: Callable[[Pen, Colour], None]
    natural: tuple[str, ...]
    weight: int = 2
    nouns: tuple[str, ...] = ()


SUBJECTS: dict[str, Subject] = {
    "fox": Subject(draw_fox, ("orange", "red"), weight=3),
    "cat": Subject(draw_cat, ("black", "orange", "white", "brown"), weight=3),
    "rabbit": Subject(draw_rabbit, ("white", "brown"), weight=3),
    "boat": Subject(draw_boat, ("red", "blue", "white", "brown")),
    "house": Subject(draw_house, ("red", "white", "yellow", "brown")),
    "tree": Subject(draw_tree, ("green",)),
    "car": Subject(draw_car, ("red", "blue", "yellow", "white"), weight=3),
    "flower": Subject(draw_flower, ("red", "pink", "yellow", "purple")),
    "fish": Subject(draw_fish, ("orange", "blue", "yellow"), weight=3),
    "balloon": Subject(draw_balloon, ("red", "yellow", "blue", "purple"), nouns=("balloon", "hot air balloon")),
    "bird": Subject(draw_bird, ("blue", "red", "yellow", "black"), weight=3),
    "sun": Subject(draw_sun, ("yellow", "orange", "red"), weight=1),
}
