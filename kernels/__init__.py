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
    from grat_kernels.attention import Ability, Backend, BackendUnavailable, KernelMismatch, can_run, span_attention

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
    "KernelMismatch",
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


def __getattr__(name: str) -> Any:
    if name in ("Ability", "Backend", "BackendUnavailable", "KernelMismatch", "can_run", "span_attention"):
        from grat_kernels import attention

        return getattr(attention, name)
    raise AttributeError(f"module 'grat_kernels' has no attribute {name!r}")
