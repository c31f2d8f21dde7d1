"""Sizes of a benchmark's cases, and how `--res` and `--grid` give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from grat_cli.errors import BadInput
from grat_cli.models.resolution import parse_resolution
from grat_kernels import Grid

# Flux: a token stands for 16x16 pixels, and 512 come from the text. HunyuanVideo, on three axes, takes up to 256.
TOKEN_SIDE = 16
_NATIVE_SIDE = 1024
_TEXT_TOKENS: Mapping[int, int] = {2: 512, 3: 256}


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
        """As in Flux; the joint sequence of HunyuanVideo, on three axes, ends with the text."""
        return self.grid.axes < 3

    @property
    def tokens(self) -> int:
        """Length of the joint sequence."""
        return self.grid.tokens + self.text_len


def picture_sizes(res: str | None, text_len: int | None, token_side: int = TOKEN_SIDE) -> list[Size]:
    """The sizes of `--res`.

    Args:
        res: as typed, None where it was not given.
        text_len: text tokens; None for those of Flux.
        token_side: pixels that a token stands for along each axis.

    Raises:
        BadInput: if one is no size.
    """
    sizes = []
    for item in res.split(",") if res is not None else ():
        resolution = parse_resolution(item, _NATIVE_SIDE, TOKEN_SIDE)
        grid = Grid((resolution.height // token_side, resolution.width // token_side))
        sizes.append(Size(f"{resolution} pixels", grid, _TEXT_TOKENS[2] if text_len is None else text_len))
    return sizes


def grid_sizes(grid: str | None, text_len: int | None) -> list[Size]:
    """The sizes of `--grid`.

    Args:
        grid: as typed, None where it was not given.
        text_len: text tokens; None for those of Flux or, on three axes, of HunyuanVideo.

    Raises:
        BadInput: if one is not two or three positive numbers.
    """
    sizes = []
    for item in grid.split(",") if grid is not None else ():
        if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){1,2}", item.strip(), re.ASCII):
            raise BadInput(f"--grid {item}: expected image tokens per axis, such as 128x128 or 33x45x80")
        shape = tuple(map(int, item.strip().split("x")))
        title = f"{item.strip()} tokens"
        sizes.append(Size(title, Grid(shape), _TEXT_TOKENS[len(shape)] if text_len is None else text_len))
    return sizes
