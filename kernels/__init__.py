"""GRAT attention: grids cut into groups, patterns over groups, plans of key spans, and kernels that run them.

Geometry, patterns and plans need NumPy alone; the attention functions load torch when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grat_kernels.geometry import Grid, Grouping
from grat_kernels.pattern import Block, Choice, CrissCross, Far, FarLevel, Full, Pattern, SlidingTile, Union
from grat_kernels.plan import HeadPlan, Plan, build_head_plan, build_plan
from grat_kernels.sequence import Segments
from grat_kernels.span_lists import Span

if TYPE_CHECKING:
    from grat_kernels.attention import span_attention
    from grat_kernels.backends import Ability, Backend, BackendUnavailable, can_run
    from grat_kernels.trials import KernelFailure

__all__ = [
    "Ability",
    "Backend",
    "BackendUnavailable",
    "Block",
    "Choice",
    "CrissCross",
    "Far",
    "FarLevel",
    "Full",
    "Grid",
    "Grouping",
    "HeadPlan",
    "KernelFailure",
    "Pattern",
    "Plan",
    "Segments",
    "SlidingTile",
    "Span",
    "Union",
    "build_head_plan",
    "build_plan",
    "can_run",
    "span_attention",
]


_LOADS_TORCH = {
    "Ability": "backends",
    "Backend": "backends",
    "BackendUnavailable": "backends",
    "KernelFailure": "trials",
    "can_run": "backends",
    "span_attention": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _LOADS_TORCH:
        raise AttributeError(f"module 'grat_kernels' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"grat_kernels.{_LOADS_TORCH[name]}"), name)
