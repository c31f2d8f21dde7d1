"""Ranges of steps, layers and heads in a preset's rules.

`3` or `"3"` is one index, `"0-1"` is indices 0 and 1. With a decimal point anywhere both ends are fractions of
the whole and the end is exclusive: `"0.5-1.0"` is the second half, so that `"0.0-0.5"` and `"0.5-1.0"` never overlap.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

_NUMBER = r"(\d+\.\d*|\.\d+|\d+)"
_RANGE = re.compile(rf"\s*{_NUMBER}\s*(?:-\s*{_NUMBER}\s*)?", re.ASCII)
MANY = 1_000_000  # more than there are of anything
EXPECTED = 'expected an index such as 3, indices such as "0-1", or fractions such as "0.5-1.0"'


def covered(spec: int | str, count: int) -> range:
    """Indices below `count` that a range covers; empty where it lies wholly beyond them.

    Raises:
        ValueError: if the range is not one, runs backwards, or has fractions above 1.
    """
    if isinstance(spec, int):
        if spec < 0:
            raise ValueError(f"{EXPECTED}, not {spec}")
        return range(min(spec, count), min(spec + 1, count))
    match = _RANGE.fullmatch(spec)
    if match is None:
        raise ValueError(f"{EXPECTED}, not {spec!r}")
    first, last = match.group(1), match.group(2)
    if "." in spec:
        if last is None:
            raise ValueError(f"a fraction needs both ends, such as {first}-1.0, not {spec!r}")
        start, stop = Fraction(first), Fraction(last)
        if stop > 1:
            raise ValueError(f"fractions lie between 0.0 and 1.0, not {spec!r}")
        if stop <= start:
            raise ValueError(f"the range {spec!r} is empty: its end must lie after its start")
        return range(math.ceil(start * count), math.ceil(stop * count))
    begin, end = int(first), int(last or first)
    if end < begin:
        raise ValueError(f"the range {spec!r} runs backwards: write {end}-{begin}")
    return range(min(begin, count), min(end + 1, count))


def leading(amount: int | float, count: int) -> int:
    """How many of `count` steps an amount stands for: a whole number counts, a fraction is a share, rounded up."""
    return amount if isinstance(amount, int) else math.ceil(Fraction(repr(amount)) * count)


def spread(steps: int, count: int) -> tuple[int, ...]:
    """At most so many of a run's steps: the middle ones of equal stretches."""
    count = min(count, steps)
    return tuple((2 * number + 1) * steps // (2 * count) for number in range(count))


def spaced(count: int, sigmas: Sequence[float]) -> tuple[int, ...]:
    """So many steps, or all, whose sigmas are nearest to evenly spaced ones; the first step always is one of them.

    Args:
        count: how many.
        sigmas: of each step, and what the last one ends at, falling.
    """
    steps = len(sigmas) - 1
    count, chosen, at = min(count, steps), [], 0
    for number in range(count):
        wanted = sigmas[0] + (sigmas[-1] - sigmas[0]) * number / count
        last = steps - (count - number)  # leaves one for each of the others
        while at < last and abs(sigmas[at + 1] - wanted) < abs(sigmas[at] - wanted):
            at += 1
        chosen.append(at)
        at += 1
    return tuple(chosen)
