"""Records, while a model runs with full attention, where in the picture chosen queries look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from grat_cli.attention.layer import AttentionInputs, CallObserver
from grat_cli.attention.recall import query_maps
from grat_kernels import Grid
from grat_kernels.geometry import Cell, cell_counts

# Values of a map, and of a map of one head, of which there are many: 128x128 and 64x64.
MOST_CELLS, MOST_CELLS_OF_HEADS = 16_384, 4096


def map_cell(grid: Grid, most: int = MOST_CELLS, unit: int = 1) -> Cell:
    """Tokens per axis that one value of a map stands for, so that maps stay small: frames apart, square cells.

    Args:
        grid: image tokens.
        most: values of a map.
        unit: of which the side of a cell is a multiple.
    """
    side = unit
    while math.prod(cell_counts(grid, cell := (*(1,) * (grid.axes - 2), side, side))) > most:
        side += unit
    return cell


@dataclass(frozen=True)
class QueryRecord:
    """Where chosen queries of one output look.

    Attributes:
        queries: places of the queries on the grid.
        steps: steps that were recorded, `R` of them.
        cell: tokens per axis that one value of a map stands for.
        head_cell: rows and columns of tokens that one value of a head's map stands for.
        maps: softmax mass on each cell, mean over heads, `[Q, R, L, *cells]`; with `text` it sums to 1.
        text: softmax mass on text, mean over heads, `[Q, R, L]`.
        head_maps: softmax mass on each cell of the query's own frame, mean over the recorded steps, `[Q, L, H, rows,
            columns]`; of a picture with `head_text` it sums to 1.
        head_text: softmax mass on text, mean over the recorded steps, `[Q, L, H]`.
    """

    queries: tuple[tuple[int, ...], ...]
    steps: tuple[int, ...]
    cell: Cell
    head_cell: Cell
    maps: np.ndarray
    text: np.ndarray
    head_maps: np.ndarray
    head_text: np.ndarray


class QueryRecorder(CallObserver):
    """Records maps of chosen queries at each recorded step; an `layer.CallObserver`.

    With true guidance a step has two transformer calls; the first one, with the prompt, is looked at.

    Args:
        queries: their places on the grid.
        grid: image tokens.
        recorded: steps that are looked at, rising.
        layers: attention layers of the transformer.
        heads: heads of each.
    """

    def __init__(
        self, queries: Sequence[tuple[int, ...]], grid: Grid, recorded: Sequence[int], layers: int, heads: int
    ) -> None:
        self._queries, self._grid, self._recorded = tuple(queries), grid, tuple(recorded)
        self._tokens = np.array([np.ravel_multi_index(query, grid.shape) for query in queries])
        self._cell = map_cell(grid)
        counts = cell_counts(grid, self._cell)
        frame = Grid(grid.shape[-2:])
        self._head_cell = map_cell(frame, MOST_CELLS_OF_HEADS, self._cell[-1])
        asked = len(self._queries)
        self._maps = np.zeros((asked, len(self._recorded), layers, *counts), np.float32)
        self._text = np.zeros((asked, len(self._recorded), layers))
        self._head_maps = np.zeros((asked, layers, heads, *cell_counts(frame, self._head_cell)), np.float32)
        self._head_text = np.zeros((asked, layers, heads))
        self._step, self._is_first = -1, False

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call begins."""
        self._is_first = step != self._step
        self._step = step

    def end_call(self) -> None:
        """It ends."""

    @contextmanager
    def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
        """Looks at one attention; this waits for the device."""
        if inputs is not None and self._is_first and self._step in self._recorded:
            with torch.no_grad():
                self._look(inputs)
        yield

    def record(self) -> QueryRecord:
        """What has been seen."""
        return QueryRecord(
            self._queries,
            self._recorded,
            self._cell,
            self._head_cell,
            self._maps,
            self._text,
            self._head_maps / len(self._recorded),
            self._head_text / len(self._recorded),
        )

    def _look(self, inputs: AttentionInputs) -> None:
        found = query_maps(
            inputs.query[0],
            inputs.key[0],
            inputs.plan,
            self._tokens,
            self._cell,
            inputs.scale,
            None if inputs.text_valid is None else int(inputs.text_valid[0]),
        )
        at = self._recorded.index(self._step)
        self._maps[:, at, inputs.layer] = found.image.mean(1).cpu().numpy()
        self._text[:, at, inputs.layer] = found.text.mean(1).cpu().numpy()
        self._head_text[:, inputs.layer] += found.text.cpu().numpy()
        for number, query in enumerate(self._queries):
            of_frame = tuple(place // size for place, size in zip(query[:-2], self._cell[:-2], strict=True))
            own = found.image[number][(slice(None), *of_frame)].cpu().numpy()
            self._head_maps[number, inputs.layer] += _added_up(own, self._head_cell[0] // self._cell[-1])


def _added_up(maps: np.ndarray, factor: int) -> np.ndarray:
    """Sums over squares of so many values a side, `[..., rows, columns]`; the last ones hold the remainder."""
    for axis in (-2, -1):
        maps = np.add.reduceat(maps, range(0, maps.shape[axis], factor), axis)
    return maps


class CallCounter(CallObserver):
    """Counts transformer calls, and the text tokens of the longest; an `layer.CallObserver`."""

    def __init__(self) -> None:
        self.calls, self.text_tokens = 0, 0

    def begin_call(self, step: int, density: float) -> None:
        """A transformer call begins."""
        self.calls += 1

    def end_call(self) -> None:
        """It ends."""

    @contextmanager
    def attention(self, inputs: AttentionInputs | None = None) -> Iterator[None]:
        """Looks at one attention."""
        if inputs is not None:
            self.text_tokens = max(self.text_tokens, inputs.plan.text_len)
        yield
