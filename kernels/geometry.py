"""Grids of image tokens, their groups, and the order in which tokens are laid out.

A grid is cut into groups of neighbouring tokens; the last group along an axis holds the remainder, so any size
works without padding (GRAT, arXiv 2505.14687, section 3.2, whose released code needs divisibility). Tokens are
laid out group by group, and inside a group cell by cell, so that a group, and every cell nested in it, is one
contiguous run. Everything here is NumPy and written once for any number of axes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Cell = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """The image tokens of one sample in raster order, for example `Grid((512, 512))` or `Grid((33, 45, 80))`.

    Raises:
        ValueError: if there is no axis or an axis is not positive.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(extent) for extent in self.shape))
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"a grid needs positive extents on every axis, not {self.shape}")

    @property
    def axes(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def tokens(self) -> int:
        """Number of image tokens."""
        return math.prod(self.shape)


def nests(inner: Cell, outer: Cell) -> bool:
    """Whether cells of size `inner` never straddle cells of size `outer`, on any grid."""
    return len(inner) == len(outer) and all(out % size == 0 for size, out in zip(inner, outer, strict=True))


def cell_counts(grid: Grid, cell: Cell) -> tuple[int, ...]:
    """Cells per axis, the remainder cell included."""
    return tuple(-(-extent // size) for extent, size in zip(grid.shape, cell, strict=True))


def cell_sizes(grid: Grid, cell: Cell) -> IntArray:
    """Tokens in each cell, `[cells]`, cells in lexicographic order of their coordinates."""
    sizes = np.ones((), np.int64)
    for extent, size in zip(grid.shape, cell, strict=True):
        starts = np.arange(0, extent, size, dtype=np.int64)
        sizes = np.multiply.outer(sizes, np.minimum(size, extent - starts))
    return sizes.reshape(-1)


@dataclass(frozen=True)
class Grouping:
    """A grid cut into groups, with the order of its tokens.

    Attributes:
        grid: the image tokens.
        group: tokens per group on each axis, for example `(16, 16)` or `(4, 8, 8)`.
        cells: cell sizes that fix the token order, coarsest first: tokens are sorted by coarsest cell, then by the
            next finer cell, and so on, then in raster order. `group` must be one of them; the default is the
            group alone. Plans that share `grid` and `cells` share one token order.

    Raises:
        ValueError: if a size does not fit the grid's axes, is not positive, or the cells do not nest.
    """

    grid: Grid
    group: Cell
    cells: tuple[Cell, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", tuple(int(size) for size in self.group))
        cells = tuple(tuple(int(size) for size in cell) for cell in self.cells) or (self.group,)
        object.__setattr__(self, "cells", cells)
        for cell in (self.group, *cells):
            if len(cell) != self.grid.axes:
                raise ValueError(
                    f"a group or block of a {self.grid.axes}-axis grid needs {self.grid.axes} sizes, not {cell}"
                )
            if min(cell) < 1:
                raise ValueError(f"group and block sizes must be positive, not {cell}")
        for outer, inner in itertools.pairwise(cells):
            if not nests(inner, outer):
                raise ValueError(
                    f"cells of {inner} do not nest in cells of {outer}: each size must divide the coarser one"
                )
        if self.group not in cells:
            raise ValueError(f"the group {self.group} is not among the cells {cells} that fix the token order")

    def refined(self, blocks: tuple[Cell, ...]) -> Grouping:
        """The same groups with finer `blocks` added to the token order.

        Raises:
            ValueError: if a block nests neither in nor around every cell, naming sizes that would.
        """
        cells = sorted({*self.cells, *blocks}, key=math.prod, reverse=True)
        return Grouping(self.grid, self.group, tuple(cells))

    @property
    def counts(self) -> tuple[int, ...]:
        """Groups per axis."""
        return cell_counts(self.grid, self.group)

    @cached_property
    def coordinates(self) -> IntArray:
        """Coordinates of every group, `[groups, axes]`, in lexicographic order."""
        return np.stack([axis.reshape(-1) for axis in np.indices(self.counts)], axis=1).astype(np.int64)

    @cached_property
    def sizes(self) -> IntArray:
        """Tokens in each group, `[groups]`."""
        return cell_sizes(self.grid, self.group)

    @cached_property
    def starts(self) -> IntArray:
        """Position of each group's first token in the token order, `[groups]`."""
        return self.cell_starts(self.group)

    @cached_property
    def order(self) -> IntArray:
        """`order[i]` is the raster index of the i-th token in the token order, `[tokens]`."""
        order = np.empty(self.grid.tokens, np.int64)
        order[self.inverse] = np.arange(self.grid.tokens)
        return order

    @cached_property
    def inverse(self) -> IntArray:
        """`inverse[r]` is the position in the token order of raster index r, `[tokens]`."""
        position = np.zeros(self.grid.shape, np.int64)
        for coarser, finer in zip((None, *self.cells), (*self.cells, None), strict=True):
            position += self._offsets(coarser, finer)
        return position.reshape(-1)

    def cell_starts(self, cell: Cell) -> IntArray:
        """Position of the first token of each cell in the token order, `[cells]`, cells in lexicographic order."""
        corners = np.ix_(*(np.arange(0, extent, size) for extent, size in zip(self.grid.shape, cell, strict=True)))
        return self.inverse.reshape(self.grid.shape)[corners].reshape(-1)

    def _offsets(self, coarser: Cell | None, finer: Cell | None) -> IntArray:
        """Tokens of the enclosing `coarser` cell that come before each token's `finer` cell, `grid.shape`.

        Closed form, so that a million tokens need no sort: within a parent of extents E, the child at per-axis
        starts s with extents e is preceded by s0·E1·E2 + e0·s1·E2 + e0·e1·s2 tokens.
        """
        offsets = np.zeros((1,) * self.grid.axes, np.int64)
        before: IntArray = np.ones((1,) * self.grid.axes, np.int64)
        parents, children, starts = [], [], []
        for axis, extent in enumerate(self.grid.shape):
            index = np.arange(extent, dtype=np.int64)
            parent_size = coarser[axis] if coarser else extent
            child_size = finer[axis] if finer else 1
            parent_start, child_start = index // parent_size * parent_size, index // child_size * child_size
            broadcast = [1] * self.grid.axes
            broadcast[axis] = extent
            parents.append(np.minimum(parent_size, extent - parent_start).reshape(broadcast))
            children.append(np.minimum(child_size, extent - child_start).reshape(broadcast))
            starts.append((child_start - parent_start).reshape(broadcast))
        for axis in range(self.grid.axes):
            term = before * starts[axis]
            for later in parents[axis + 1 :]:
                term = term * later
            offsets = offsets + term
            before = before * children[axis]
        return offsets
