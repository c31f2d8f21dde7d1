"""Scenes with captions, drawn from a seed: what the demo model learns from."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageChops

from grat_cli.demo.drawing import COLOURS, Pen
from grat_cli.demo.places import PLACES
from grat_cli.demo.subjects import SUBJECTS

ARTICLES = ("a", "an", "the")
MEDIA = ("picture", "painting", "photo", "drawing", "image")
# Accepted in prompts as filler; the tokenizers know them, the scenes do not depend on them.
FILLERS = ("and", "with", "small", "big", "one", "of")


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        caption: lower-case words that describe it.
        picture: RGB, square.
        mask: mode "L", same size: 255 where the subject covers the background.
        subject, colour, place: what was drawn, by name.
    """

    caption: str
    picture: Image.Image
    mask: Image.Image
    subject: str
    colour: str
    place: str


def with_article(words: str) -> str:
    """Return `words` with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def made_up_word(random: Random) -> str:
    """Return three to seven random letters: training with such words teaches the model to pass over unknown ones."""
    return "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(random.randint(3, 7)))


def write_caption(random: Random, subject: str, colour: str, place: str) -> tuple[str, str]:
    """Return a caption and the colour to paint with, which is a natural one where the caption names no colour."""
    noun = random.choice(SUBJECTS[subject].nouns or (subject,))
    where = random.choice(PLACES[place].phrases)
    style = random.random()
    if style < 0.08:
        return f"{with_article(noun)} {where}", random.choice(SUBJECTS[subject].natural)
    coloured = f"{colour} {noun}"
    if style < 0.12:
        return with_article(coloured), colour
    if style < 0.18:
        return f"{where}, {with_article(coloured)}", colour
    if style < 0.26:
        return f"{with_article(random.choice(MEDIA))} of {with_article(coloured)} {where}", colour
    if style < 0.30:
        return f"{coloured} {where}", colour
    if style < 0.34:
        return f"{with_article(f'{made_up_word(random)} {coloured}')} {where}", colour
    if style < 0.37:
        return f"{with_article(coloured)} {where} {made_up_word(random)}", colour
    return f"{with_article(coloured)} {where}", colour


def draw_scene(seed: int, side: int) -> Scene:
    """Draw the scene of `seed` at `side` pixels.

    The same seed gives the same scene at every side. Drawn at twice the side and averaged, for smooth edges.
    """
    random = Random(seed)
    subject = random.choices(list(SUBJECTS), [entry.weight for entry in SUBJECTS.values()])[0]
    place = random.choice(list(PLACES))
    natural = random.random() < 0.3
    colour = random.choice(SUBJECTS[subject].natural) if natural else random.choice(list(COLOURS))
    caption, colour = write_caption(random, subject, colour, place)
    background = PLACES[place].draw(random, 2 * side)
    picture = background.copy()
    pen = Pen(picture)
    pen.place(random.uniform(0.46, 0.54), random.uniform(0.84, 0.88), random.uniform(0.64, 0.72))
    SUBJECTS[subject].draw(pen, COLOURS[colour])
    changed = ImageChops.difference(picture, background).convert("L").point(lambda value: 255 if value else 0)
    return Scene(
        caption=caption,
        picture=picture.resize((side, side), Image.Resampling.BOX),
        mask=changed.resize((side, side), Image.Resampling.BOX),
        subject=subject,
        colour=colour,
        place=place,
    )


def known_words() -> list[str]:
    """Return every word that the captions use, sorted, without made-up ones."""
    phrases = [*ARTICLES, *MEDIA, *FILLERS, *COLOURS, *SUBJECTS]
    for subject in SUBJECTS.values():
        phrases += subject.nouns
    for place in PLACES.values():
        phrases += place.phrases
    return sorted({word for phrase in phrases for word in phrase.split()})
