"""The patterns that `tune` chooses from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from grat_cli.presets import Attention

# What is chosen by content: 64ths of all blocks that are attended token by token, and by fine means.
_CHOICES = ((2, 6), (4, 8), (4, 16), (6, 8), (8, 8), (8, 16), (8, 32), (12, 16), (16, 16), (20, 16), (28, 24))
_LARGE_GROUP = 64


def palette(group: tuple[int, ...], grid: tuple[int, ...]) -> tuple[Attention, ...]:
    """Full attention; near patterns of groups, cheap ones and wide ones; each with far fields of several kinds; and
    far fields by content, of which more and more is told closely.

    Blocks of far levels are as large as a group, or half as long on each axis, and those of fine means once more, so
    all of it shares one token order.

    Args:
        group: tokens per group on each axis.
        grid: image tokens on each axis.
    """
    patterns: list[dict[str, Any]] = [{"variant": "full"}, *_chosen(group, grid)]
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


def _chosen(group: tuple[int, ...], grid: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The own group, and of all else blocks by content."""
    block = [_half(size) for size in group] if math.prod(group) > _LARGE_GROUP else list(group)
    fine = [_half(size) for size in block]
    if fine == block:  # of one token
        return
    blocks = math.prod(-(-extent // size) for extent, size in zip(grid, block, strict=True))
    for exact, means in _CHOICES:
        choose = {"exact": round(exact * blocks / 64), "fine": round(means * blocks / 64), "block": fine}
        if choose["exact"] and choose["fine"]:
            far = {"levels": [{"beyond": 0, "block": block}], "choose": choose}
            yield {"variant": "b", "radius": 0, "far": far}


def _far(group: tuple[int, ...], inner: int) -> Iterator[list[dict[str, Any]] | None]:
    """Far fields beyond a distance in groups: none, coarse, fine nearby and coarse beyond, fine."""
    coarse = list(group)
    fine = [_half(size) for size in group]
    yield None
    yield [{"beyond": inner, "block": coarse}]
    yield [{"beyond": inner, "block": fine}, {"beyond": inner + 1, "block": coarse}]
    yield [{"beyond": inner, "block": fine}]


def _half(size: int) -> int:
    """The largest divisor of a size that is not the size itself; 1 of 1."""
    return max((part for part in range(1, size // 2 + 1) if size % part == 0), default=1)
