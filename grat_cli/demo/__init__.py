"""The bundled demo: a tiny Flux and a tiny HunyuanVideo, small enough to ship and real enough to run every command on.

Importing this module loads neither torch nor Pillow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoModel:
    """Where a bundled model lies, and the settings it was trained for.

    Attributes:
        path: folder for `from_pretrained`.
        native_side: height and width in pixels it was trained at.
        text_tokens: `max_sequence_length` of its text encoders.
        steps: recommended number of denoising steps.
        guidance: recommended `true_cfg_scale`, with an empty negative prompt. 1 turns guidance off.
    """

    path: Path
    native_side: int
    text_tokens: int
    steps: int
    guidance: float


DEMO_FLUX = DemoModel(
    path=Path(__file__).resolve().parent / "flux", native_side=256, text_tokens=24, steps=20, guidance=2.0
)


@dataclass(frozen=True)
class DemoVideoModel:
    """Where a bundled video model lies, and the settings it was trained for.

    Attributes:
        path: folder for `from_pretrained`.
        width: in pixels, of the videos it was trained on.
        height: likewise.
        frames: likewise.
        fps: frames per second of them.
        text_tokens: `max_sequence_length` of its first text encoder.
        steps: recommended number of denoising steps.
        guidance: recommended `true_cfg_scale`, with an empty negative prompt. 1 turns guidance off.
    """

    path: Path
    width: int
    height: int
    frames: int
    fps: int
    text_tokens: int
    steps: int
    guidance: float


DEMO_HUNYUAN = DemoVideoModel(
    path=Path(__file__).resolve().parent / "hunyuan",
    width=256,
    height=144,
    frames=33,
    fps=24,
    text_tokens=32,
    steps=20,
    guidance=2.0,
)


def video_vocabulary() -> dict[str, list[str]]:
    """Return the words that the demo video model knows, by kind: subjects, times of day, colours and other words."""
    from grat_cli.demo.moving.scenes import LIGHTS, PAINTS, known_words

    subjects = ["waves", "boat", "sun", "ball", "snow"]
    times = list(dict.fromkeys(phrase for light in LIGHTS.values() for phrase in light.phrases if phrase))
    named = {*subjects, *PAINTS, *(word for phrase in times for word in phrase.split())}
    return {
        "subjects": subjects,
        "times of day": times,
        "colours": list(PAINTS),
        "other words": [word for word in known_words() if word not in named],
    }


def unknown_words(prompt: str, known: dict[str, list[str]]) -> list[str]:
    """Return the words of a prompt that are not in a vocabulary."""
    words = {word for phrases in known.values() for phrase in phrases for word in phrase.split()}
    prompted = re.findall(r"[^\W_]+", prompt.lower())
    return [word for word in dict.fromkeys(prompted) if word not in words]


def vocabulary() -> dict[str, list[str]]:
    """Return the words that the demo image model knows, by kind: subjects, colours, places and other words.

    A place is named by any of its phrases, such as "in the snow"; the list gives the phrases.
    """
    from grat_cli.demo.drawing import COLOURS
    from grat_cli.demo.places import PLACES
    from grat_cli.demo.scenes import ARTICLES, known_words
    from grat_cli.demo.subjects import SUBJECTS

    places = [phrase for place in PLACES.values() for phrase in place.phrases]
    named = {*SUBJECTS, *COLOURS, *(word for phrase in places for word in phrase.split())} - set(ARTICLES)
    return {
        "subjects": list(SUBJECTS),
        "colours": list(COLOURS),
        "places": places,
        "other words": [word for word in known_words() if word not in named],
    }
