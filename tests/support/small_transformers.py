"""A small transformer of each family, and runs whose layers attend differently from step to step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tiny_flux
import tiny_flux2
import tiny_hunyuan
import tiny_hunyuan15
import tiny_qwen
import tiny_wan

from grat_cli.attention.adapter import Adapter
from grat_cli.families.flux import FluxAdapter
from grat_cli.families.flux2 import Flux2Adapter
from grat_cli.families.hunyuan import HunyuanAdapter
from grat_cli.families.hunyuan15 import Hunyuan15Adapter
from grat_cli.families.qwen import QwenAdapter
from grat_cli.families.wan import WanAdapter
from grat_kernels import (
    Block,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    HeadPlan,
    Pattern,
    Plan,
    Segments,
    Union,
    build_head_plan,
    build_plan,
)

PICTURES, VIDEOS = (Grid((9, 13)), Grid((10, 11))), (Grid((3, 5, 6)), Grid((4, 6, 7)))


class Model(NamedTuple):
    """Of a family: its adapter, what makes a small one and its inputs, two sizes, and the forms of its blocks: two of
    single ones, because the first is given parts of other tensors, in stock as well."""

    adapter: type[Adapter]
    make: Callable[[], Any]
    inputs: Callable[[Grid], dict[str, Any]]
    grids: tuple[Grid, Grid]
    forms: int


MODELS = {
    "flux": Model(FluxAdapter, tiny_flux.transformer, lambda grid: tiny_flux.inputs(*grid.shape), PICTURES, 3),
    "flux2": Model(Flux2Adapter, tiny_flux2.transformer, lambda grid: tiny_flux2.inputs(*grid.shape), PICTURES, 2),
    "qwen": Model(QwenAdapter, tiny_qwen.transformer, lambda grid: tiny_qwen.inputs(grid.shape, 5), PICTURES, 2),
    "wan": Model(WanAdapter, tiny_wan.transformer, lambda grid: tiny_wan.inputs(grid.shape), VIDEOS, 1),
    "hunyuan": Model(
        HunyuanAdapter, tiny_hunyuan.transformer, lambda grid: tiny_hunyuan.inputs(grid.shape, (5, 3)), VIDEOS, 3
    ),
    "hunyuan15": Model(
        Hunyuan15Adapter, tiny_hunyuan15.transformer, lambda grid: tiny_hunyuan15.inputs(grid.shape), VIDEOS, 1
    ),
}


class Run:
    """Steps at which layers attend full, by rows and columns, by heads that differ, and with means of what is far."""

    step = 0

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._group, self._block = ((4, 4), (2, 2)) if adapter.grid.axes == 2 else ((2, 4, 4), (1, 2, 2))

    def current_step(self) -> int:
        return self.step

    def schedule(self, text_len: int, references: int = 0) -> Any:
        self._segments = Segments.of_text(text_len, self._adapter.text_first)
        return self

    def plan(self, step: int, layer: int) -> Plan | HeadPlan:
        group, block = self._group, self._block
        grouping = Grouping(self._adapter.grid, group, (group, block))
        far = Union(Block(0), Far([(0, block)]))
        patterns: Sequence[Pattern] = (Full(), CrissCross(1), far)
        if (number := (step + layer) % 4) < 3:
            return build_plan(grouping, patterns[number], segments=self._segments)
        classes = (grouping, far), (grouping, Block(1))
        heads = [head % 2 for head in range(self._adapter.heads)]
        return build_head_plan(classes, tuple(heads), segments=self._segments)

    def density_of_step(self, step: int) -> float:
        return 1.0


class FullRun(Run):
    """All layers attend fully."""

    def plan(self, step: int, layer: int) -> Plan:
        """Of any step and layer."""
        return build_plan(Grouping(self._adapter.grid, self._group), Full(), segments=self._segments)
