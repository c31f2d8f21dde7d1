"""The failures that grat expects: each ends a run in one or two lines and an exit code of its own.

A message says what is wrong and what to type instead. Anything else that is raised is a bug.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import SequenceMatcher

INTERRUPTED = 130
_JOINERS = "\u200c\u200d"  # of emoji and cursive scripts
_LONGEST_NAME = 255  # of a file


class GratError(Exception):
    """An expected failure; its text is what the user reads."""

    exit_code = 1


class BadInput(GratError):
    """What was typed cannot be done: an option, a preset, a file, a size."""

    exit_code = 2


class CannotWrite(BadInput):
    """An output cannot be written: no space, no permission, or its encoder failed. What was there is still there."""


class ModelUnavailable(GratError):
    """A model is missing, gated or damaged."""

    exit_code = 3


class OutOfMemory(GratError):
    """The device has too little memory for the run."""

    exit_code = 4


class NumericalFailure(GratError):
    """The run produced NaN, an empty picture or a video of one colour."""

    exit_code = 5


class RankLost(GratError):
    """Another rank of the run has ended."""

    exit_code = 6


class Interrupted(GratError):
    """Ctrl-C or a signal ended a run that can be gone on with; the text says how."""

    exit_code = INTERRUPTED


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text of others as it may be shown: what would steer a terminal, or reorder what it shows, is written out.

    Control characters, bidirectional and other invisible formatting, and lone surrogates become escapes such as
    `\x1b`. Spaces of any script and the joiners of emoji and cursive scripts stay as they are.

    Args:
        text: of any kind.
        lines: whether it may have several.
    """
    if text.isprintable():
        return text
    return "".join(
        character if _is_shown(character) or (lines and character == "\n") else _written_out(character)
        for character in text
    )


def _is_shown(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode()


def first_line(error: BaseException) -> str:
    """What an exception says, at most one line of it; it may repeat what stands in a file."""
    lines = str(error).strip().splitlines()
    return shortened(printable(lines[0])) if lines else type(error).__name__


def shortened(text: str, longest: int = 160) -> str:
    """Text of about so many characters, cut between words: half a path helps nobody."""
    if len(text) <= longest:
        return text
    latest = longest + _LONGEST_NAME
    end = text.find(" ", longest, latest)
    if end == -1 and len(text) <= latest:
        return text
    if end == -1:
        end = text.rfind(" ", 0, longest)
    return f"{text[: end if end > 0 else longest]} ..."


def steadier(dtype: object, *others: str) -> str:
    """What to try after NaN: the dtypes of greater range or precision than the one in use, or else.

    Args:
        dtype: in use, torch's own or its name.
        others: what else may help, such as `another --backend`; needed of float32, which none is steadier than.
    """
    finer = {"float32": (), "float64": (), "bfloat16": ("--dtype float32",)}
    advice = (*finer.get(str(dtype).removeprefix("torch."), ("--dtype float32 or bfloat16",)), *others)
    return f"try {', or '.join(advice)}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is most likely a slip of, or None where nothing is close."""
    if len(word) > _LONGEST_NAME:  # comparing takes time that grows with its square
        return None

    def likeness(name: str) -> tuple[float, bool]:
        typed, meant = word.lower(), name.lower()
        # Among equally similar words, one of the same letters is a slip of the fingers.
        return SequenceMatcher(None, typed, meant).ratio(), sorted(typed) == sorted(meant)

    closest = max(known, key=likeness, default=None)
    return closest if closest is not None and likeness(closest)[0] >= 0.5 else None


def choices(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, if any, and all of them."""
    names = list(known)
    closest = nearest(word, names)
    listed = f"choose from {', '.join(names)}"
    return f"did you mean {closest!r}? ({listed})" if closest else listed
