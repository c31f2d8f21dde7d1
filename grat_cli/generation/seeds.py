"""Seeds of a run: `--seed` and `--n`."""

from __future__ import annotations

import secrets

from grat_cli.errors import BadInput
from grat_cli.files.prompts import LARGEST_SEED, MOST_PICTURES


def resolve_seeds(text: str | None, count: int | None) -> tuple[int, ...]:
    """The seeds of a run, one per picture.

    Args:
        text: `--seed` as typed: one seed, or several with commas; None draws a random one.
        count: `--n`: so many consecutive seeds from the first on.

    Raises:
        BadInput: if a seed is not a number in range, is repeated, or several seeds meet a count.
    """
    if count is not None and not 1 <= count <= MOST_PICTURES:
        raise BadInput(f"--n {count}: expected 1 to {MOST_PICTURES} pictures")
    # Random seeds stay short enough to be typed again.
    given: list[int] = [secrets.randbelow(2**32)] if text is None else [_parsed(text, part) for part in text.split(",")]
    if len(given) > 1 and count not in (None, len(given)):
        raise BadInput(f"--seed gives {len(given)} seeds, --n {count} another number: leave out --n")
    if len(set(given)) < len(given):
        raise BadInput(f"--seed {text}: the same seed twice gives the same picture twice")
    first = given[0]
    seeds = list(range(first, first + (count or 1))) if len(given) == 1 else given
    if seeds[-1] > LARGEST_SEED:
        raise BadInput(f"--seed {text} with --n {count} goes past the largest seed, {LARGEST_SEED}")
    return tuple(seeds)


def _parsed(text: str, part: str) -> int:
    part = part.strip()
    if not (part.isascii() and part.isdigit()):
        raise BadInput(f"--seed {text}: expected whole numbers such as 7 or 1,2,3")
    if len(part) > 19 or int(part) > LARGEST_SEED:
        raise BadInput(f"--seed {text}: seeds go from 0 to {LARGEST_SEED}")
    return int(part)
