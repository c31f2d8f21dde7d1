"""Sizes of a benchmark's cases, and how `--res` and `--grid` give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from grat_cli.errors import BadInput
from grat_cli.families import FAMILIES
from grat_cli.families.base import Family
from grat_cli.models.resolution import parse_resolution
from grat_kernels import Grid

# By the axes of its tokens the family that a case is taken from: its first model says how long a text is.
_OF_AXES: Mapping[int, Family] = {family.axes: family for family in reversed([*FAMILIES.values()])}
_PICTURES = _OF_AXES[2].models[0]
TOKEN_SIDE = _PICTURES.token_side


@dataclass(frozen=True)
class Size:
    """A case to measure.

    Attributes:
        title: for people, such as `2048x2048 pixels`.
        grid: image tokens.
        text_len: text tokens of the joint sequence.
    """

    title: str
    grid: Grid
    text_len: int

    @property
    def text_first(self) -> bool:
        """Whether text comes before the image tokens in the joint sequence."""
        return _OF_AXES[self.grid.axes].text_first

    @property
    def tokens(self) -> int:
        """Length of the joint sequence."""
        return self.grid.tokens + self.text_len


def picture_sizes(res: str | None, text_len: int | None, token_side: int = TOKEN_SIDE) -> list[Size]:
    """The sizes of `--res`.

    Args:
        res: as typed, None where it was not given.
        text_len: text tokens; None for those of pictures.
        token_side: pixels that a token stands for along each axis.

    Raises:
        BadInput: if one is no size.
    """
    sizes = []
    for item in res.split(",") if res is not None else ():
        resolution = parse_resolution(item, _PICTURES.native_side, TOKEN_SIDE)
        grid = Grid((resolution.height // token_side, resolution.width // token_side))
        sizes.append(Size(f"{resolution} pixels", grid, _PICTURES.text_tokens if text_len is None else text_len))
    return sizes


def grid_sizes(grid: str | None, text_len: int | None) -> list[Size]:
    """The sizes of `--grid`.

    Args:
        grid: as typed, None where it was not given.
        text_len: text tokens; None for those of pictures or, on three axes, of videos.

    Raises:
        BadInput: if one is not two or three positive numbers.
    """
    sizes = []
    for item in grid.split(",") if grid is not None else ():
        if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){1,2}", item.strip(), re.ASCII):
            raise BadInput(f"--grid {item}: expected image tokens per axis, such as 128x128 or 33x45x80")
        shape = tuple(map(int, item.strip().split("x")))
        title = f"{item.strip()} tokens"
        sizes.append(
            Size(title, Grid(shape), _OF_AXES[len(shape)].models[0].text_tokens if text_len is None else text_len)
        )
    return sizes
