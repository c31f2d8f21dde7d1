"""The compilations of `rope_norm`, and what its machine code promises: see `aot`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from compilation import compile_for, read_cuda, read_rocm

from grat_kernels.tile_configs import SHARED_MEMORY_LIMIT

_WIDE_LOAD = "LDG.E.128"
_DTYPES = ("bfloat16", "float16", "float32")
_HEAD_DIMS = (64, 80, 128, 256)
_FAR_BLOCKS = ((2, 2), (4, 4), (16, 16))


class RopeNormVariant(NamedTuple):
    """One compilation of the kernel that normalises, rotates, joins and pools."""

    architecture: str
    dtype: str
    head_dim: int
    text_apart: bool  # as in double blocks, where text and image are joined
    levels: int  # of the far field


@dataclass(frozen=True)
class RopeNormBuild:
    """What came out of a compilation of `rope_norm`; as for `Build`.

    Attributes:
        wide_loads: loads of 16 bytes.
    """

    variant: RopeNormVariant
    registers: int
    spills: int
    spills_in_loops: int
    wide_loads: int
    shared_bytes: int
    problems: tuple[str, ...]


def rope_norm_variants(architectures: Iterable[str]) -> Iterator[RopeNormVariant]:
    """Single blocks without far field, and double blocks with little and much of it."""
    for architecture, dtype, head_dim, (text_apart, levels) in itertools.product(
        architectures, _DTYPES, _HEAD_DIMS, ((False, 0), (True, 1), (True, len(_FAR_BLOCKS)))
    ):
        yield RopeNormVariant(architecture, dtype, head_dim, text_apart, levels)


def compile_rope_norm(variant: RopeNormVariant) -> RopeNormBuild:
    """Compiles one variant and reads its machine code.

    Raises:
        RuntimeError: if Triton runs as an interpreter in this process, which compiles nothing.
    """
    kernel, arguments, options = _launch(variant)
    compiled = compile_for(variant.architecture, kernel, arguments, options)
    if variant.architecture.startswith("sm_"):
        code = read_cuda(compiled, _WIDE_LOAD, lambda code: code.loops)
        wide_loads = code.machine.count(_WIDE_LOAD) if code.machine else 0
    else:
        code = read_rocm(compiled)
        wide_loads = compiled.asm["amdgcn"].count("load_dwordx4")
    problems = []
    if code.spills_in_loops:
        problems.append(f"{code.spills_in_loops} spills inside a loop")
    if compiled.metadata.shared > SHARED_MEMORY_LIMIT[variant.architecture]:
        problems.append(f"{compiled.metadata.shared} bytes of shared memory")
    # Text and image have a loop each, and each reads query, key and the angles.
    if code.matrix_loops not in (None, 2):
        problems.append(f"{code.matrix_loops} loops load 16 bytes at a time instead of 2")
    if wide_loads < 8:
        problems.append(f"{wide_loads} loads of 16 bytes")
    return RopeNormBuild(
        variant,
        code.registers,
        code.spills,
        code.spills_in_loops,
        wide_loads,
        compiled.metadata.shared,
        tuple(problems),
    )


def _launch(variant: RopeNormVariant) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    import torch

    from grat_kernels.geometry import Grid, Grouping
    from grat_kernels.pattern import Block, Far, Union
    from grat_kernels.plan import build_plan
    from grat_kernels.rope_norm_kernel import rope_norm_kernel
    from grat_kernels.rope_norm_runs import launch_of
    from grat_kernels.rope_norm_sections import Norms, Projections, empty_outputs, sections_of

    pattern = Block(0)
    if variant.levels:
        pattern = Union(
            pattern, Far([(distance, block) for distance, block in enumerate(_FAR_BLOCKS[: variant.levels])])
        )
    plan = build_plan(Grouping(Grid((64, 64)), (16, 16)), pattern, text_len=512)
    batch, heads = 2, 24

    def empty(*shape: int, dtype: str = variant.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    def projections(rows: int) -> Projections:
        query, key, value = empty(batch, rows, 3, heads, variant.head_dim).unbind(2)
        return Projections(query, key, value)

    norms = Norms(empty(variant.head_dim), empty(variant.head_dim), 1e-6)
    angles = empty(plan.tokens, variant.head_dim, dtype="float32")
    image = projections(plan.image_tokens if variant.text_apart else plan.tokens)
    text = projections(plan.text_len) if variant.text_apart else None
    launch = launch_of(
        sections_of(image, norms, text, norms, (angles, angles), plan),
        empty_outputs(image.query, plan.tokens, plan.summaries.rows, variant.text_apart),
        plan,
    )
    return rope_norm_kernel, launch.arguments, launch.options


def rope_norm_row(build: RopeNormBuild) -> str:
    """A line of the table that `aot` prints."""
    variant = build.variant
    options = f"{'text apart' if variant.text_apart else 'joint'}, {variant.levels} levels"
    return (
        f"{variant.architecture:6} {variant.dtype:8} {variant.head_dim:3} {options:43} {build.registers:4} "
        f"{build.spills:6} {build.spills_in_loops:8} {build.shared_bytes / 1024:7.1f}  16-byte loads {build.wide_loads}"
        + "".join(f"  PROBLEM: {problem}" for problem in build.problems)
    )
