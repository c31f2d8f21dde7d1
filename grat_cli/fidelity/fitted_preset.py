"""A choice of patterns by stretch of steps, layer and head, written as attention and schedule of a preset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from grat_cli.fidelity.knapsack import Choice
from grat_cli.presets import Attention, Change, Schedule, Table

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def stretches_of(count: int) -> tuple[str, ...]:
    """Ranges of shares of the steps, as long as one another, that cover all of them."""
    return stretches_from(range(count), count)


def stretches_from(starts: Sequence[int], steps: int) -> tuple[str, ...]:
    """Ranges of shares of the steps, each from one of some steps up to before the next one.

    Args:
        starts: steps, in order, from 0.
        steps: of the run.
    """
    bounds = [f"{share_of(start, steps):.4f}" for start in (*starts, steps)]
    return tuple(f"{first}-{last}" for first, last in pairwise(bounds))


def share_of(step: int, steps: int) -> float:
    """A share of a run that begins with a step of it.

    It is cut after four digits, never rounded up: a share of 0.6667 of 30 steps would begin with the 22nd.
    """
    return 10_000 * step // steps / 10_000


def schedule_of(
    candidates: Sequence[Attention], choice: Choice, stretches: Sequence[str]
) -> tuple[Attention, Schedule]:
    """The attention and schedule that say what was chosen.

    Args:
        candidates: that were chosen from, at most 52 of them.
        choice: number of the candidate of each stretch of steps, layer and head, `[T, L, H]`.
        stretches: of steps, as ranges of shares, `[T]`.

    Returns:
        The candidate that most heads take, and a palette and tables, most used letters first.
    """
    counts = np.bincount(choice.ravel(), minlength=len(candidates))
    used = [number for number in np.argsort(-counts, kind="stable").tolist() if counts[number]]
    letters = {number: LETTERS[place] for place, number in enumerate(used)}
    own = candidates[used[0]]
    palette = {letters[number]: Change.model_validate(_spelled_out(own, candidates[number])) for number in used}
    tables = tuple(
        Table(steps=steps if len(choice) > 1 else None, layers=tuple(_words(stretch, letters)))
        for stretch, steps in zip(choice, stretches, strict=True)
    )
    return own, Schedule(palette=palette, tables=tables)


def _spelled_out(own: Attention, other: Attention) -> dict[str, Any]:
    """All that makes the one attention the other."""
    given = {name: value for name, value in other.model_dump().items() if value is not None}
    return given | ({"far": None} if own.far and not other.far else {})


def _words(stretch: Choice, letters: dict[int, str]) -> Iterator[str]:
    """A word for each layer of `[L, H]`; of one letter where all heads take the same."""
    for layer in stretch.tolist():
        word = "".join(letters[number] for number in layer)
        yield word if len(set(word)) > 1 else word[0]
