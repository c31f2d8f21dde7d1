"""The comparison of the kernel of `rope_norm` with torch: see `trials`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from grat_kernels import rope_norm_runs
from grat_kernels.geometry import Grid, Grouping
from grat_kernels.pattern import Block, Far, Union
from grat_kernels.plan import build_plan
from grat_kernels.rope_norm_sections import Norms, Projections, Section, compute, empty_outputs, sections_of
from grat_kernels.self_test import require_close
from grat_kernels.trials import Form

if TYPE_CHECKING:
    from grat_kernels.plan import JointSequence


def compare(form: Form) -> None:
    """Compares the kernel with torch for a device, dtype and head dimension.

    Raises:
        KernelFailure: if rounding cannot explain the difference.
    """
    plan = build_plan(Grouping(Grid((7, 6)), (4, 4)), Union(Block(0), Far([(0, (2, 2)), (1, (4, 4))])), 5)
    results = []
    for work_dtype, work in ((form.dtype, rope_norm_runs.launch), (form.dtype, compute), (torch.float64, compute)):
        sections = _random_sections(plan, form.device, form.dtype, form.head_dim, work_dtype)
        outputs = empty_outputs(sections[1].projections.query, plan.tokens, plan.summaries.rows, text_apart=True)
        work(sections, outputs, plan)
        results.append([tensor.double() for tensor in outputs if tensor is not None])
    for output, plain, exact in zip(*results, strict=True):
        require_close("the fused norm and rotation kernel", output.to(form.dtype), plain, exact)


def _random_sections(
    plan: JointSequence, device: torch.device, dtype: torch.dtype, head_dim: int, work_dtype: torch.dtype
) -> tuple[Section, Section]:
    """Text and image of two samples and two heads, the same each time: values of `dtype`, held in `work_dtype`."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype).to(work_dtype)

    def projections(rows: int) -> Projections:
        return Projections(*(random(2, rows, 2, head_dim) for _ in range(3)))

    image, text = projections(plan.image_tokens), projections(plan.text_len)
    norms, text_norms = (Norms(random(head_dim), random(head_dim), 1e-6) for _ in range(2))
    angles = torch.randn(plan.tokens, head_dim // 2, generator=generator, device="cpu").repeat_interleave(2, dim=1)
    return sections_of(image, norms, text, text_norms, (angles.cos().to(device), angles.sin().to(device)), plan)
