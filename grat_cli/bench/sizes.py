"""Sizes of a benchmark's cases."""

from __future__ import annotations

from dataclasses import dataclass

from grat_kernels import Grid


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
