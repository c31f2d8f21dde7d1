"""Prompts of a benchmark or of tuning: built in, or as they are given on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from grat_cli.errors import BadInput
from grat_cli.families import Medium
from grat_cli.files.texts import read_text

_LONGEST_COUNT, _LONGEST_BYTES = 9, 1 << 23


def built_in_prompts(medium: Medium) -> tuple[str, ...]:
    """What the demo models can show: the prompts of their sample sheets, other subjects first, and some more."""
    from grat_cli.demo.evaluation import SHEET_PROMPTS
    from grat_cli.demo.moving.evaluation import SAMPLE_PROMPTS

    of_medium: Mapping[Medium, tuple[str, ...]] = {
        "image": (
            *SHEET_PROMPTS[:-1],
            "a red car in the desert",
            "a white house at night",
            "a brown fox at dusk",
            "a green boat at sea",
            "a yellow flower in the snow",
        ),
        "video": (
            *SAMPLE_PROMPTS[::2],
            *SAMPLE_PROMPTS[1::2],
            "waves rolling at sunset",
            "an orange boat sailing across the sea",
            "a purple boat on the sea at night",
            "a green ball bouncing on the grass",
            "a red ball bouncing at night",
            "snow falling at sunset",
        ),
    }
    return of_medium[medium]


def chosen_prompts(text: str, built_in: tuple[str, ...], option: str = "--prompts") -> tuple[str, ...]:
    """So many of the built-in prompts, or those of a text file with one on each line.

    Args:
        text: as typed.
        built_in: prompts that a count refers to.
        option: that it was typed for.

    Raises:
        BadInput: if there are not so many, or the text is neither a count nor such a file.
    """
    if text.isascii() and text.isdigit():
        if len(text) > _LONGEST_COUNT or not 1 <= int(text) <= len(built_in):
            raise BadInput(f"{option} {text}: there are {len(built_in)} built-in prompts")
        return built_in[: int(text)]
    try:
        lines = read_text(Path(text), _LONGEST_BYTES).splitlines()
    except BadInput as error:
        raise BadInput(
            f"{option} {text}: expected a count or a text file with a prompt on each line ({error})"
        ) from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise BadInput(f"{option} {text}: the file is empty")
    return found
