"""The backgrounds of the demo's scenes: simple, bold, and quiet in the middle, where the subject stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from PIL import Image

from grat_cli.demo.drawing import Colour, Pen, blend, gradient


def draw_hill(pen: Pen, random: Random, height: float, swing: float, colour: Colour) -> None:
    """Fill everything below a gentle wave around `height`."""
    phase, waves = random.uniform(0, 2 * math.pi), random.uniform(0.6, 1.2)
    pen.place(0, 0, 1)
    crest = [(x / 32, height + swing * math.sin(phase + waves * 2 * math.pi * x / 32)) for x in range(33)]
    pen.polygon([*crest, (1, 1), (0, 1)], colour)


def draw_pine(pen: Pen, x: float, y: float, height: float, colour: Colour) -> None:
    pen.place(x, y, height)
    pen.rectangle(-0.06, -0.15, 0.06, 0.0, (92, 62, 40))
    for layer in range(3):
        base, width = -0.12 - 0.27 * layer, 0.32 - 0.07 * layer
        pen.polygon([(-width, base), (width, base), (0, base - 0.38)], blend(colour, (255, 255, 255), 0.08 * layer))


def draw_cloud(pen: Pen, x: float, y: float, scale: float) -> None:
    pen.place(x, y, scale)
    for across, down, radius in ((-0.5, 0.05, 0.28), (-0.15, -0.12, 0.38), (0.25, -0.05, 0.33), (0.55, 0.08, 0.24)):
        pen.ellipse(across, down, radius, radius * 0.8, (255, 255, 255))
    pen.rectangle(-0.55, 0.08, 0.58, 0.27, (255, 255, 255))


def either_edge(random: Random, inner: float, outer: float) -> float:
    """Return an x between `inner` and `outer` from the left or the right edge."""
    x = random.uniform(outer, inner)
    return x if random.random() < 0.5 else 1 - x


def draw_snow(random: Random, side: int) -> Image.Image:
    picture = gradient(side, (132, 170, 212), (206, 222, 238))
    pen = Pen(picture)
    draw_hill(pen, random, 0.60, 0.02, (198, 214, 234))
    draw_pine(pen, random.uniform(0.06, 0.14), 0.68, random.uniform(0.34, 0.42), (60, 112, 104))
    draw_pine(pen, random.uniform(0.86, 0.94), 0.68, random.uniform(0.34, 0.42), (60, 112, 104))
    draw_hill(pen, random, 0.68, 0.015, (244, 248, 253))
    pen.place(0, 0, 1)
    for flake in range(16):
        x = (flake % 8 + random.uniform(0.2, 0.8)) / 8
        y = (flake // 8 + random.uniform(0.1, 0.9)) * 0.28
        pen.ellipse(x, y, 0.011, 0.011, (255, 255, 255))
    return picture


def draw_night(random: Random, side: int) -> Image.Image:
    picture = gradient(side, (20, 28, 84), (66, 80, 156))
    pen = Pen(picture)
    pen.place(0, 0, 1)
    for star in range(16):
        x = (star % 8 + random.uniform(0.2, 0.8)) / 8
        y = (star // 8 + random.uniform(0.1, 0.9)) * 0.30
        pen.ellipse(x, y, 0.009, 0.009, (250, 246, 206))
    x, y = either_edge(random, 0.16, 0.12), random.uniform(0.12, 0.16)
    pen.ellipse(x, y, 0.085, 0.085, (250, 240, 196))
    pen.ellipse(x + 0.04, y - 0.015, 0.07, 0.07, (30, 39, 98))
    draw_hill(pen, random, 0.72, 0.015, (30, 42, 76))
    return picture


def draw_sea(random: Random, side: int) -> Image.Image:
    picture = gradient(side, (140, 204, 240), (222, 240, 248))
    pen = Pen(picture)
    draw_cloud(pen, either_edge(random, 0.22, 0.14), random.uniform(0.12, 0.18), 0.14)
    pen.place(0, 0, 1)
    pen.rectangle(0, 0.60, 1, 1, (38, 124, 180))
    phase = random.uniform(0, 2 * math.pi)
    for wave in range(3):
        y = 0.70 + wave * 0.11
        crest = [(x / 40, y + 0.012 * math.sin(phase + 2.1 * wave + 25 * x / 40)) for x in range(41)]
        pen.line(crest, (112, 184, 222), 0.016)
    return picture


def draw_forest(random: Random, side: int) -> Image.Image:
    picture = gradient(side, (176, 214, 190), (206, 230, 196))
    pen = Pen(picture)
    for tree in range(5):
        x, height = 0.1 + tree * 0.2 + random.uniform(-0.03, 0.03), random.uniform(0.50, 0.62)
        draw_pine(pen, x, 0.73, height, (36, 98, 60) if tree % 2 else (64, 130, 78))
    draw_hill(pen, random, 0.71, 0.01, (84, 130, 62))
    return picture


def draw_sky(random: Random, side: int) -> Image.Image:
    picture = gradient(side, (72, 148, 230), (190, 224, 250))
    pen = Pen(picture)
    for x, y in ((0.15, 0.18), (0.85, 0.30), (0.17, 0.80), (0.83, 0.86)):
        draw_cloud(pen, x + random.uniform(-0.03, 0.03), y + random.uniform(-0.03, 0.03), random.uniform(0.14, 0.18))
    return picture


def draw_desert(random: Random, side: int) -> Image.Image:
    picture = gradient(side, (120, 196, 232), (244, 236, 200))
    pen = Pen(picture)
    draw_hill(pen, random, 0.60, 0.03, (216, 168, 96))
    draw_hill(pen, random, 0.70, 0.02, (238, 198, 126))
    green = (70, 140, 80)
    for x in (random.uniform(0.08, 0.13), random.uniform(0.87, 0.92)):
        pen.place(x, 0.74, random.uniform(0.26, 0.32))
        pen.line([(0, 0), (0, -0.92)], green, 0.20)
        pen.line([(0, -0.34), (-0.27, -0.34), (-0.27, -0.62)], green, 0.13)
        pen.line([(0, -0.44), (0.27, -0.44), (0.27, -0.74)], green, 0.13)
    return picture


def draw_meadow(random: Random, side: int) -> Image.Image:
    picture = gradient(side, (120, 190, 240), (214, 238, 250))
    pen = Pen(picture)
    draw_cloud(pen, either_edge(random, 0.22, 0.14), random.uniform(0.12, 0.20), 0.15)
    draw_hill(pen, random, 0.62, 0.02, (134, 198, 98))
    draw_hill(pen, random, 0.70, 0.012, (100, 176, 74))
    pen.place(0, 0, 1)
    for blossom in range(10):
        x, y = (blossom % 5 + random.uniform(0.2, 0.8)) / 5, 0.80 + 0.12 * (blossom // 5) + random.uniform(-0.03, 0.03)
        pen.ellipse(x, y, 0.013, 0.013, random.choice([(255, 255, 255), (250, 220, 80)]))
    return picture


def draw_sunset(random: Random, side: int) -> Image.Image:
    picture = gradient(side, (112, 62, 140), (252, 152, 84))
    pen = Pen(picture)
    pen.place(0, 0, 1)
    pen.ellipse(either_edge(random, 0.22, 0.14), 0.62, 0.12, 0.12, (255, 224, 130))
    draw_hill(pen, random, 0.70, 0.015, (92, 52, 74))
    return picture


def draw_city(random: Random, side: int) -> Image.Image:
    picture = gradient(side, (170, 200, 226), (226, 232, 238))
    pen = Pen(picture)
    pen.place(0, 0, 1)
    for building in range(5):
        left, height = building * 0.2, random.uniform(0.34, 0.60)
        wall = (112, 124, 148) if building % 2 else (148, 132, 130)
        pen.rectangle(left, 0.74 - height, left + 0.19, 0.76, wall)
        for row in range(int((height - 0.04) / 0.105)):
            top = 0.74 - height + 0.04 + row * 0.105
            for column in range(2):
                x = left + 0.035 + column * 0.07
                pen.rectangle(x, top, x + 0.05, top + 0.06, (240, 226, 158))
    pen.rectangle(0, 0.75, 1, 1, (92, 94, 104))
    for stripe in range(4):
        pen.rectangle(0.05 + stripe * 0.25, 0.925, 0.20 + stripe * 0.25, 0.95, (232, 228, 200))
    return picture


@dataclass(frozen=True)
class Place:
    """A background: how it is drawn at a side in pixels, and the phrases captions name it by."""

    draw: Callable[[Random, int], Image.Image]
    phrases: tuple[str, ...]


PLACES: dict[str, Place] = {
    "snow": Place(draw_snow, ("in the snow", "in snow", "on a snowy hill", "in winter")),
    "night": Place(draw_night, ("at night", "in the night", "under the stars", "under the moon")),
    "sea": Place(draw_sea, ("on the sea", "at sea", "by the sea", "on the ocean")),
    "forest": Place(draw_forest, ("in the forest", "in a forest", "among trees", "in the woods")),
    "sky": Place(draw_sky, ("in the sky", "among clouds", "in a blue sky", "above the clouds")),
    "desert": Place(draw_desert, ("in the desert", "in a desert", "on the sand")),
    "meadow": Place(draw_meadow, ("in a meadow", "on the grass", "in a field", "in the garden")),
    "sunset": Place(draw_sunset, ("at sunset", "in the evening", "at dusk")),
    "city": Place(draw_city, ("in the city", "in a city", "in the street", "in town")),
}
