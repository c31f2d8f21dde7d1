"""The patterns that `tune` chooses from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grat_cli.presets import Attention


def palette(group: tuple[int, ...]) -> tuple[Attention, ...]:
    """Full attention; near patterns of groups, cheap ones and wide ones; and each with far fields of several kinds.

    Blocks of far levels are as large as a group, or half as long on each axis, so all of it shares one token order.

    Args:
        group: tokens per group on each axis.
    """
    patterns: list[dict[str, Any]] = [{"variant": "full"}]
    for near, inner in _near(len(group)):
        patterns += [near | {"far": far} for far in _far(group, inner)]
    made = (Attention.model_validate({"group": list(group), **pattern}) for pattern in patterns)
    return tuple(dict.fromkeys(made))


def _near(axes: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Near patterns, each with the distance in groups up to which all is attended token by token."""
    own = [0] * axes
    lengths = (1, 2) if axes == 2 else (1,)
    along = [[*own[:axis], length, *own[axis + 1 :]] for axis in range(axes) for length in lengths]
    frame = [[0, 1, 1]] if axes == 3 else []
    for radius in (0, *along, *frame):
        yield {"variant": "b", "radius": radius}, 0
    for radius in lengths:
        yield {"variant": "b", "radius": radius}, radius
    for share in range(1, axes):
        yield {"variant": "x", "share": share}, 0
    yield {"variant": "bx", "radius": 1, "share": axes - 1}, 1


def _far(group: tuple[int, ...], inner: int) -> Iterator[list[dict[str, Any]] | None]:
    """Far fields beyond a distance in groups: none, coarse, fine nearby and coarse beyond, fine."""
    coarse = list(group)
    fine = [_half(size) for size in group]
    yield None
    yield [{"beyond": inner, "block": coarse}]
    for width in (1, 2):
        yield [{"beyond": inner, "block": fine}, {"beyond": inner + width, "block": coarse}]
    yield [{"beyond": inner, "block": fine}]


def _half(size: int) -> int:
    """The largest divisor of a size that is not the size itself; 1 of 1."""
    return max((part for part in range(1, size // 2 + 1) if size % part == 0), default=1)
