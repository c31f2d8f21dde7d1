"""Prompts of a benchmark or of tuning, as they are given on the command line."""

from __future__ import annotations

from pathlib import Path

from grat_cli.errors import BadInput


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
        if not 1 <= int(text) <= len(built_in):
            raise BadInput(f"{option} {text}: there are {len(built_in)} built-in prompts")
        return built_in[: int(text)]
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{option} {text}: expected a count or a text file with a prompt on each line") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise BadInput(f"{option} {text}: the file is empty")
    return found
