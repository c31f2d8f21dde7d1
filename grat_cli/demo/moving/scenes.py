"""Moving scenes with captions, drawn from a seed: what the demo video model learns from.

Every motion has a speed per frame, so that a longer clip shows more of it: waves roll, a boat sails across, the sun
rises, a ball bounces, snow falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy
from PIL import Image, ImageDraw

from grat_cli.demo.drawing import COLOURS, Colour, Point, blend, darker, lighter

SUPERSAMPLING = 2  # drawn so many times larger and averaged, for smooth edges
MOTIONS = ("waves", "boat", "sun", "ball", "snow")
PAINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SEA_ROWS = 4
# Boats and balls, which are small and have colours, take longer to learn than waves.
_WEIGHTS = {"waves": 0.7, "boat": 1.8, "sun": 0.5, "ball": 1.8, "snow": 0.5}


@dataclass(frozen=True)
class View:
    """A picture, or a part of one: what is drawn of it.

    Attributes:
        width, height: of the whole picture in pixels.
        left, top: of the part.
        columns, rows: size of the part in pixels.
    """

    width: int
    height: int
    left: int
    top: int
    columns: int
    rows: int

    @classmethod
    def whole(cls, width: int, height: int) -> View:
        """The whole of a picture."""
        return cls(width, height, 0, 0, width, height)


@dataclass(frozen=True)
class MovingScene:
    """A scene that can be drawn at any time and any size.

    Attributes:
        caption: lower-case words that describe it.
        motion: one of MOTIONS.
        light: one of LIGHTS.
        paint: colour of the boat or the ball, by name; None for the other motions.
        draw: draws one frame, given a canvas and the frame's number.
    """

    caption: str
    motion: str
    light: str
    paint: str | None
    draw: Callable[[Canvas, float], None]

    def frames(self, view: View, first: int, count: int) -> numpy.ndarray:
        """Draw `count` frames from number `first` on, as uint8 [count, rows, columns, 3]."""
        return numpy.stack([self._frame(view, number) for number in range(first, first + count)])

    def _frame(self, view: View, number: int) -> numpy.ndarray:
        canvas = Canvas(view)
        self.draw(canvas, number)
        return numpy.asarray(canvas.picture.reduce(SUPERSAMPLING))


class Canvas:
    """Draws filled shapes; x and y are fractions of the picture's width and height, lengths of its shorter side."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._short = min(view.width, view.height)
        self.picture = Image.new("RGB", (view.columns * SUPERSAMPLING, view.rows * SUPERSAMPLING))
        self._draw = ImageDraw.Draw(self.picture)
        self.across = self._short / view.width  # a length of 1, as a fraction of the width
        self.down = self._short / view.height

    def _pixel(self, x: float, y: float) -> Point:
        view = self._view
        return (x * view.width - view.left) * SUPERSAMPLING, (y * view.height - view.top) * SUPERSAMPLING

    def sky(self, top: Colour, bottom: Colour, horizon: float) -> None:
        """Fill everything with a gradient that reaches `bottom` at y = `horizon`."""
        view = self._view
        y = (numpy.arange(self.picture.height) / SUPERSAMPLING + view.top + 0.25) / view.height
        share = numpy.clip(y / horizon, 0.0, 1.0)[:, None]
        column = numpy.asarray(top) + (numpy.asarray(bottom) - numpy.asarray(top)) * share
        rows = numpy.broadcast_to(column.round().astype(numpy.uint8)[:, None], (*column.shape[:1], 1, 3))
        self.picture.paste(Image.fromarray(numpy.ascontiguousarray(rows)).resize(self.picture.size))

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, colour: Colour) -> None:
        """Fill an ellipse around (`x`, `y`); radii are lengths."""
        left, top = self._pixel(x - radius_x * self.across, y - radius_y * self.down)
        right, bottom = self._pixel(x + radius_x * self.across, y + radius_y * self.down)
        self._draw.ellipse((left, top, right, bottom), fill=colour)

    def polygon(self, points: Iterable[Point], colour: Colour) -> None:
        """Fill a polygon of fractions."""
        self._draw.polygon([self._pixel(x, y) for x, y in points], fill=colour)

    def shape(self, x: float, y: float, size: float, points: Iterable[Point], colour: Colour) -> None:
        """Fill a polygon whose points are in units of `size`, a length, around (`x`, `y`)."""
        self.polygon(
            [(x + size * across * self.across, y + size * down * self.down) for across, down in points], colour
        )

    def below(self, crest: Sequence[Point], colour: Colour) -> None:
        """Fill everything below a line from the left to the right edge."""
        self.polygon([*crest, (1.02, 1.02), (-0.02, 1.02)], colour)


@dataclass(frozen=True)
class Light:
    """The colours of a time of day, and the words for it."""

    phrases: tuple[str, ...]
    sky: tuple[Colour, Colour]
    water: Colour
    ground: Colour
    dimming: float


LIGHTS = {
    "day": Light(("", "", "by day"), ((84, 158, 232), (206, 232, 248)), (40, 122, 190), (108, 178, 84), 0.0),
    "night": Light(("at night",), ((14, 20, 66), (58, 72, 144)), (22, 40, 104), (34, 62, 74), 0.35),
    "sunset": Light(("at sunset",), ((112, 62, 140), (252, 156, 88)), (120, 74, 140), (122, 96, 82), 0.12),
}


def draw_scene(seed: int) -> MovingScene:
    """Return the scene of `seed`."""
    random = Random(seed)
    motion = random.choices(MOTIONS, [_WEIGHTS[name] for name in MOTIONS])[0]
    light = random.choice(("day", "night", "sunset")) if motion != "sun" else "day"
    paint = random.choice(PAINTS) if motion in ("boat", "ball") else None
    phrase = random.choice(LIGHTS[light].phrases) if motion != "sun" else ""
    named = paint if paint and random.random() < 0.9 else None
    nouns, draw = _MAKERS[motion](random, light, paint)
    noun = random.choice(nouns)
    if named:
        noun = noun.replace("a ", f"an {named} " if named[0] in "aeiou" else f"a {named} ", 1)
    return MovingScene(f"{noun} {phrase}".strip(), motion, light, paint, draw)


def known_words() -> list[str]:
    """Return every word that the captions use, sorted."""
    nouns = (*_WAVES, *_BOAT, *(noun for words in _SUN.values() for noun in words), *_BALL, *_SNOW)
    phrases = [*nouns, *PAINTS, "a", "an", "the", *(phrase for light in LIGHTS.values() for phrase in light.phrases)]
    return sorted({word for phrase in phrases for word in phrase.split()})


_WAVES = ("waves", "waves", "waves on the sea", "waves rolling", "the sea")
_BOAT = ("a boat", "a boat sailing", "a boat sailing across the sea", "a boat on the sea")
_SUN = {
    "sea": ("a sun rising over the sea", "the sun rises over the sea", "sunrise over the sea", "sunrise"),
    "hills": ("a sun rising over the hills", "the sun rises over the hills", "sunrise over the hills"),
}
_BALL = ("a ball", "a ball bouncing", "a ball bouncing on the grass", "a bouncing ball")
_SNOW = ("snow", "snow falling", "snow falling in the forest", "falling snow")

_Made = tuple[Sequence[str], Callable[[Canvas, float], None]]


def _sky_objects(random: Random, light: str) -> Callable[[Canvas], None]:
    """The things that hang still in the sky: clouds by day, moon and stars at night, a low sun at sunset."""
    side = random.choice((0.0, 1.0))
    x, y = abs(side - random.uniform(0.16, 0.24)), random.uniform(0.15, 0.20)
    stars = [(random.random(), random.uniform(0.02, 0.38)) for _ in range(9)]

    def clouds(canvas: Canvas) -> None:
        for centre, height, size in ((x, y, 0.13), (abs(1 - x) - 0.05, y + 0.08, 0.10)):
            for across, down, radius in ((-0.9, 0.2, 0.5), (0.0, 0.0, 0.75), (0.85, 0.2, 0.55)):
                place = centre + across * size * canvas.across
                canvas.ellipse(place, height + down * size * canvas.down, radius * size, radius * size * 0.7, _WHITE)

    def moon(canvas: Canvas) -> None:
        for across, down in stars:
            canvas.ellipse(across, down, 0.018, 0.018, (250, 246, 206))
        canvas.ellipse(x, y, 0.095, 0.095, (250, 240, 196))
        canvas.ellipse(x + 0.045 * canvas.across, y - 0.015 * canvas.down, 0.078, 0.078, (26, 33, 82))

    def low_sun(canvas: Canvas) -> None:
        canvas.ellipse(x, 0.42, 0.12, 0.12, (255, 222, 120))

    return {"day": clouds, "night": moon, "sunset": low_sun}[light]


_WHITE: Colour = (250, 250, 250)


def _sea(random: Random) -> Callable[..., None]:
    """A sea whose waves roll towards one side: draws the given ones of its rows, the farthest first."""
    way = random.choice((-1, 1))
    phases = [random.uniform(0, 2 * math.pi) for _ in range(SEA_ROWS)]

    def draw(canvas: Canvas, frame: float, colour: Colour, rows: range = range(SEA_ROWS)) -> None:
        for row in rows:
            phase, height, swing = phases[row], 0.54 + 0.13 * row, 0.022 + 0.008 * row
            waves = (2.4 - 0.4 * row) / canvas.across / 1.78
            turn = phase - way * 2 * math.pi * frame / (30 - 3 * row)
            crest = [
                (x / 48, height + swing * math.sin(2 * math.pi * waves * x / 48 + turn) * canvas.down)
                for x in range(-1, 50)
            ]
            light_line = [(x, y - 0.032 * canvas.down) for x, y in crest]
            canvas.below(light_line, lighter(colour, 0.45))
            canvas.below(crest, darker(colour, 0.10 * row))

    return draw


def _waves(random: Random, light: str, paint: str | None) -> _Made:
    colours = LIGHTS[light]
    objects, sea = _sky_objects(random, light), _sea(random)

    def draw(canvas: Canvas, frame: float) -> None:
        canvas.sky(*colours.sky, 0.55)
        objects(canvas)
        sea(canvas, frame, colours.water)

    return _WAVES, draw


def _boat(random: Random, light: str, paint: str | None) -> _Made:
    colours = LIGHTS[light]
    objects, sea = _sky_objects(random, light), _sea(random)
    way = random.choice((-1, 1))
    start, speed = random.uniform(0.12, 0.25), random.uniform(0.55, 0.75) / 32
    bob, size = random.uniform(0, 2 * math.pi), random.uniform(0.30, 0.36)
    hull = blend(COLOURS[paint or "red"], (0, 0, 20), colours.dimming)
    sail = blend(_WHITE, (0, 0, 40), colours.dimming)

    def draw(canvas: Canvas, frame: float) -> None:
        canvas.sky(*colours.sky, 0.55)
        objects(canvas)
        progress = min(start + speed * frame, 1.3)
        x = progress if way > 0 else 1 - progress
        y = 0.61 + 0.014 * math.sin(bob + 2 * math.pi * frame / 22) * canvas.down

        def part(points: Sequence[Point], colour: Colour) -> None:
            canvas.shape(x, y, size, [(way * across, down) for across, down in points], colour)

        sea(canvas, frame, colours.water, range(1))
        part([(-0.03, 0.0), (-0.03, -1.0), (0.03, -1.0), (0.03, 0.0)], (96, 66, 44))
        part([(0.06, -0.10), (0.06, -0.95), (0.52, -0.10)], sail)
        part([(-0.06, -0.10), (-0.06, -0.80), (-0.40, -0.10)], darker(sail, 0.08))
        part([(-0.62, -0.02), (0.68, -0.02), (0.42, 0.34), (-0.44, 0.34)], hull)
        sea(canvas, frame, colours.water, range(1, SEA_ROWS))

    return _BOAT, draw


def _sun(random: Random, light: str, paint: str | None) -> _Made:
    place = random.choice(tuple(_SUN))
    sea = _sea(random)
    x, start, speed = random.uniform(0.35, 0.65), random.uniform(0.60, 0.68), random.uniform(0.42, 0.50) / 32
    hills = [random.uniform(0, 2 * math.pi) for _ in range(2)]

    def draw(canvas: Canvas, frame: float) -> None:
        height = max(start - speed * frame, 0.12)
        risen = min(max((0.62 - height) / 0.45, 0.0), 1.0)
        canvas.sky(blend((40, 34, 98), (84, 158, 232), risen), blend((236, 120, 84), (220, 236, 246), risen), 0.6)
        disc = blend((248, 140, 60), (255, 226, 110), risen)
        canvas.ellipse(x, height, 0.17, 0.17, blend(disc, blend((236, 120, 84), (220, 236, 246), risen), 0.55))
        canvas.ellipse(x, height, 0.13, 0.13, disc)
        if place == "sea":
            sea(canvas, frame, blend((56, 48, 112), (40, 122, 190), risen))
            return
        for row, phase in enumerate(hills):
            crest = [
                (step / 32, 0.60 + 0.13 * row + 0.045 * math.sin(phase + 2 * math.pi * 1.1 * step / 32))
                for step in range(-1, 34)
            ]
            canvas.below(crest, blend((44, 40, 70), ((96, 156, 84), (74, 132, 62))[row], 0.25 + 0.75 * risen))

    return _SUN[place], draw


def _ball(random: Random, light: str, paint: str | None) -> _Made:
    colours = LIGHTS[light]
    objects = _sky_objects(random, light)
    way, x = random.choice((-1, 1)), random.uniform(0.30, 0.45)
    period, begin, height = random.uniform(20, 26), random.random(), random.uniform(0.42, 0.52)
    drift, radius = random.uniform(0.20, 0.35) / 32, random.uniform(0.12, 0.14)
    colour = blend(COLOURS[paint or "red"], (0, 0, 20), 0.6 * colours.dimming)
    hill = random.uniform(0, 2 * math.pi)

    def draw(canvas: Canvas, frame: float) -> None:
        canvas.sky(*colours.sky, 0.62)
        objects(canvas)
        crest = [(step / 24, 0.62 + 0.02 * math.sin(hill + 5 * step / 24)) for step in range(-1, 26)]
        canvas.below(crest, lighter(colours.ground, 0.12))
        canvas.below([(-0.02, 0.74), (1.02, 0.74)], colours.ground)
        share = (begin + frame / period) % 1.0
        lift = height * 4 * share * (1 - share)
        # Back and forth between the walls that the picture's edges are.
        along = (x + drift * frame) % 2.0
        along = 2.0 - along if along > 1.0 else along
        place = 0.12 + 0.76 * (along if way > 0 else 1 - along)
        squash = max(0.0, 1 - lift / 0.06) * 0.22
        wide, tall = radius * (1 + squash), radius * (1 - squash)
        ground = 0.86
        canvas.ellipse(place, ground, wide * (1.05 - 0.5 * lift), 0.03, darker(colours.ground, 0.3))
        centre = ground - (lift + tall) * canvas.down
        canvas.ellipse(place, centre, wide, tall, colour)
        shine = place - 0.35 * wide * canvas.across, centre - 0.35 * tall * canvas.down
        canvas.ellipse(*shine, 0.28 * wide, 0.28 * tall, lighter(colour, 0.6))

    return _BALL, draw


def _snow(random: Random, light: str, paint: str | None) -> _Made:
    colours = LIGHTS[light]
    sky = {"day": ((132, 170, 212), (206, 222, 238))}.get(light, colours.sky)
    ground = blend((244, 248, 253), colours.water, 1.2 * colours.dimming)
    trees = [(0.08 + 0.21 * index + random.uniform(-0.04, 0.04), random.uniform(0.42, 0.58)) for index in range(5)]
    flakes = [
        (random.random(), random.random(), random.uniform(0.024, 0.036), random.uniform(0.012, 0.022))
        for _ in range(24)
    ]
    wind = random.uniform(-0.004, 0.004)
    green = blend((44, 104, 84), (10, 14, 50), 1.4 * colours.dimming)

    def draw(canvas: Canvas, frame: float) -> None:
        canvas.sky(*sky, 0.72)
        for index, (x, size) in enumerate(trees):
            for layer in range(3):
                base, width = -0.08 - 0.27 * layer, 0.34 - 0.07 * layer
                points = [(-width, base), (width, base), (0, base - 0.40)]
                canvas.shape(x, 0.78, size, points, lighter(green, 0.06 * layer + 0.05 * (index % 2)))
        canvas.below([(step / 24, 0.74 + 0.012 * math.sin(9 * step / 24 + wind)) for step in range(-1, 26)], ground)
        for x, y, radius, speed in flakes:
            falling = (y + speed * frame) % 1.1 - 0.05
            canvas.ellipse((x + wind * frame) % 1.0, falling, radius * 0.9, radius * 0.9, _WHITE)

    return _SNOW, draw


_MAKERS: dict[str, Callable[[Random, str, str | None], _Made]] = {
    "waves": _waves,
    "boat": _boat,
    "sun": _sun,
    "ball": _ball,
    "snow": _snow,
}
