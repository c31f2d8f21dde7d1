"""Ahead-of-time compilation, without a GPU: the span kernels for every row of their tables, what scores blocks for
them, and `rope_norm`.

    python -m aot                 everything (minutes)
    python -m aot --arch sm_90    one architecture
    python -m aot --kernel gluon  one kernel

What is compiled is what the launchers launch: their own arguments, for tensors without data. The machine code is then
read for what a row of a table promises: no spill inside a loop over tiles, shared memory within the architecture's,
tensor cores and asynchronous loads of the right kind, on Hopper a softmax that runs under the matrix products, on
Blackwell weights that are written after their scores were read; and of `rope_norm`, loads of 16 bytes. The exit code is
1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any, NamedTuple

from compilation import Code, compile_for, read_cuda, read_rocm
from rope_norm_builds import (
    RopeNormBuild,
    RopeNormVariant,
    compile_rope_norm,
    rope_norm_row,
    rope_norm_variants,
)
from sass import MachineCode

from grat_kernels.tile_configs import (
    GLUON,
    SCORED_HEAD_DIM,
    SCORES,
    SHARED_MEMORY_LIMIT,
    GluonConfig,
    ScoreConfig,
    TileConfig,
    architecture_of,
    tile_config,
)

# What the loops should compute with (mma, wgmma, tcgen05, mfma) and load with (cp.async.bulk, cp.async).
_MATRIX_OPCODE = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTC*MMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
_LOAD_OPCODE = {"tma": "UTMALDG", "pointers": "LDGSTS"}

_DTYPES = ("bfloat16", "float16", "float32")
_ROPE_NORM = "rope_norm"
# One that is padded to a power of two, which rules descriptors out.
_PADDED_HEAD_DIM = 96
_HEAD_DIMS = (64, _PADDED_HEAD_DIM, 128, 256)


class Variant(NamedTuple):
    """One compilation of a kernel."""

    architecture: str
    dtype: str
    head_dim: int
    descriptors: bool  # whether the tensors allow them
    text_valid: bool
    far: bool
    kernel: str = "triton"
    ragged: bool = False  # whether spans leave something over after their full tiles
    choosing: bool = False  # whether groups choose by content what they attend

    @property
    def config(self) -> TileConfig | GluonConfig | ScoreConfig:
        """The table's tiles, in this variant's form."""
        return KERNELS[self.kernel].config(self)


@dataclass(frozen=True)
class Build:
    """What came out of a compilation.

    Attributes:
        registers: per thread.
        spills: instructions that read or write local memory.
        spills_in_loops: those of them inside a loop over tiles.
        matrix_loops: loops over tiles that compute on tensor cores; None where that cannot be read.
        opcodes: how often instructions of interest occur.
        shared_bytes: shared memory of a program.
        problems: broken promises, in words.
    """

    variant: Variant
    registers: int
    spills: int
    spills_in_loops: int
    matrix_loops: int | None
    opcodes: dict[str, int]
    shared_bytes: int
    problems: tuple[str, ...]


class Kernel(NamedTuple):
    """A kernel with a table of its own.

    Attributes:
        variants: every compilation that its table can lead to on these architectures.
        config: the table's tiles for a variant.
        launch: the kernel, its arguments and its options, as launched for a variant on tensors without data.
        tile_loops: the loops over tiles in its machine code.
        problems: promises of its own that are broken, in words.
    """

    variants: Callable[[Iterable[str]], Iterator[Variant]]
    config: Callable[[Variant], TileConfig | GluonConfig | ScoreConfig]
    launch: Callable[[Variant], tuple[Any, tuple[Any, ...], dict[str, int]]]
    tile_loops: Callable[[MachineCode], tuple[tuple[int, ...], ...]]
    problems: Callable[[Variant, Code], list[str]]


def variants(architectures: Iterable[str], kernels: Iterable[str] | None = None) -> Iterator[Variant]:
    """Every compilation that the tables of some kernels (all by default) can lead to on these architectures."""
    architectures = list(architectures)
    for name in KERNELS if kernels is None else kernels:
        yield from KERNELS[name].variants(architectures)


def compile_variant(variant: Variant) -> Build:
    """Compiles one variant and reads its machine code.

    Raises:
        RuntimeError: if Triton runs as an interpreter in this process, which compiles nothing.
    """
    compiled = _compile(variant)
    matrix_opcode = _MATRIX_OPCODE[variant.architecture]
    cuda = variant.architecture.startswith("sm_")
    code = read_cuda(compiled, matrix_opcode, KERNELS[variant.kernel].tile_loops) if cuda else read_rocm(compiled)
    problems = []
    if code.spills_in_loops:
        problems.append(f"{code.spills_in_loops} spills inside a loop")
    if compiled.metadata.shared > SHARED_MEMORY_LIMIT[variant.architecture]:
        problems.append(f"{compiled.metadata.shared} bytes of shared memory")
    if variant.dtype != "float32" and not code.opcodes[matrix_opcode]:
        problems.append(f"no {matrix_opcode}")
    problems += KERNELS[variant.kernel].problems(variant, code)
    figures = (code.registers, code.spills, code.spills_in_loops, code.matrix_loops, code.opcodes)
    return Build(variant, *figures, compiled.metadata.shared, tuple(problems))


def _compile(variant: Variant) -> Any:
    kernel, arguments, options = KERNELS[variant.kernel].launch(variant)
    return compile_for(variant.architecture, kernel, arguments, options)


def _inputs(variant: Variant) -> tuple[Any, ...]:
    """What the launchers take for a variant, on tensors without data: from queries to the tiles' sizes."""
    import torch

    from grat_kernels.geometry import Grid, Grouping
    from grat_kernels.pattern import Block, Choice, Far, Union
    from grat_kernels.plan import build_plan

    choice = Choice(8, 32, (4, 4)) if variant.choosing else None
    pattern = Union(Block(1), Far([(1, (8, 8))], choice)) if variant.far else Block(1)
    grid = Grid((64, 61) if variant.ragged else (64, 64))
    plan = build_plan(Grouping(grid, (16, 16)), pattern, text_len=512)
    batch, heads = 2, 24
    tokens, summaries = (
        torch.empty(batch, rows, heads, variant.head_dim, dtype=getattr(torch, variant.dtype), device="meta")
        for rows in (plan.tokens, plan.summaries.rows)
    )
    return (
        *(tokens, tokens, tokens, tokens),
        *((summaries, summaries) if variant.far else (None, None)),
        plan,
        torch.empty(batch, dtype=torch.int32, device="meta") if variant.text_valid else None,
        1 / math.sqrt(variant.head_dim),
        variant.config,
    )


# The Triton kernel


def _triton_variants(architectures: Iterable[str]) -> Iterator[Variant]:
    fields = ((False, False), (True, False), (True, True))
    for architecture, dtype, head_dim, text_valid, (far, choosing) in itertools.product(
        architectures, _DTYPES, _HEAD_DIMS, (False, True), fields
    ):
        variant = Variant(architecture, dtype, head_dim, False, text_valid, far, choosing=choosing)
        yield variant
        if variant._replace(descriptors=True).config != variant.config and head_dim != _PADDED_HEAD_DIM:
            yield variant._replace(descriptors=True)


def _bits(variant: Variant) -> int:
    return 32 if variant.dtype == "float32" else 16


def _triton_config(variant: Variant) -> TileConfig:
    cuda = variant.architecture.startswith("sm_")
    row = architecture_of(divmod(int(variant.architecture.removeprefix("sm_")), 10)) if cuda else "rocm"
    return tile_config(row, variant.head_dim, _bits(variant), descriptors=variant.descriptors)


def _triton_launch(variant: Variant) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    import torch

    from grat_kernels.chosen_tiles import chosen_slots
    from grat_kernels.span_kernel import span_attention_kernel
    from grat_kernels.triton_backend import launch_of

    inputs = _inputs(variant)
    chosen = None
    if variant.choosing:
        (batch, _, heads, _), plan, config = inputs[0].shape, inputs[6], inputs[9]
        shape = (batch, heads, chosen_slots(plan, config.block_tail))
        chosen = torch.empty(shape, dtype=torch.int32, device="meta")
    launch = launch_of(*inputs, chosen=chosen)
    return span_attention_kernel, launch.arguments, launch.options


def _triton_problems(variant: Variant, code: Code) -> list[str]:
    problems = []
    expected_loops = 2 + variant.far + variant.choosing
    if variant.dtype != "float32" and code.matrix_loops not in (None, expected_loops):
        problems.append(f"{code.matrix_loops} loops on tensor cores instead of {expected_loops}")
    config = _triton_config(variant)
    if config.stages > 1 and not code.opcodes[_LOAD_OPCODE[config.form]]:
        problems.append(f"no {_LOAD_OPCODE[config.form]}")
    return problems


# The Gluon kernel


def _gluon_variants(architectures: Iterable[str]) -> Iterator[Variant]:
    for architecture in architectures:
        for dtype, head_dim in itertools.product(("bfloat16", "float16"), GLUON.get(architecture, ())):
            variant = Variant(architecture, dtype, head_dim, True, False, False, "gluon")
            # Padded text and far fields leave tiles to pack by themselves.
            yield from (variant, variant._replace(ragged=True))
            yield from (variant._replace(text_valid=text_valid, far=True) for text_valid in (False, True))
            yield variant._replace(text_valid=True)


def _gluon_launch(variant: Variant) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    from grat_kernels.gluon_backend import launch_of
    from grat_kernels.gluon_kernel import span_attention_kernel

    launch = launch_of(*_inputs(variant))
    return span_attention_kernel, launch.arguments, launch.options


def _gluon_tile_loops(code: MachineCode) -> tuple[tuple[int, ...], ...]:
    """Within the loop over work items, those of all roles."""
    opcodes = ("HGMMA", "UTC*MMA", "MUFU.EX2", "UTMALDG", "LDGSTS")
    return tuple(loop for opcode in opcodes for loop in code.innermost_with(opcode))


def _gluon_problems(variant: Variant, code: Code) -> list[str]:
    machine = code.machine
    assert machine is not None
    packed = variant.far or variant.text_valid or variant.ragged
    softmaxes = machine.innermost_with("MUFU.EX2")
    problems = []
    # Each consumer has one loop for full tiles of tokens and one for what has biases.
    expected_loops = 4 if packed else 2
    if len(softmaxes) != expected_loops:
        problems.append(f"{len(softmaxes)} loops with a softmax instead of {expected_loops}")
    if not all(machine.arrives_as_one(loop) for loop in (*softmaxes, *machine.innermost_with("LDGSTS"))):
        problems.append("a thread arrives before its warps have met")
    if not code.opcodes["UTMALDG"]:
        problems.append("no UTMALDG")
    if packed and not code.opcodes["LDGSTS"]:
        problems.append("no LDGSTS")
    return problems + (_hopper_problems if variant.architecture == "sm_90" else _blackwell_problems)(machine, softmaxes)


def _hopper_problems(machine: MachineCode, softmaxes: Sequence[tuple[int, ...]]) -> list[str]:
    problems = []
    if machine.innermost_with("HGMMA") != softmaxes:
        problems.append("loops on tensor cores other than those with a softmax")
    if not all(machine.hides_softmax(loop) for loop in softmaxes):
        problems.append("a softmax outside of the matrix products")
    if not all(machine.tests_all_factors(loop) for loop in softmaxes):
        problems.append("an output that is rescaled by what was not looked at")
    # From item to item the consumers go on without a gap.
    items = {outer for loop in softmaxes for outer in machine.around(loop)}
    if len(items) != 2 or not all(machine.hides_softmax(loop) for loop in items):
        problems.append("the first softmax of an item outside of the matrix products")
    return problems


def _blackwell_problems(machine: MachineCode, softmaxes: Sequence[tuple[int, ...]]) -> list[str]:
    problems = []
    products = machine.innermost_with("UTC*MMA")
    if len(products) != 1:
        problems.append(f"{len(products)} loops on tensor cores instead of 1")
    if not all(machine.feeds_tensor_cores(loop) for loop in softmaxes):
        problems.append("weights that follow anything but their scores")
    return problems


# The kernel that scores the blocks that groups choose from


def _score_variants(architectures: Iterable[str]) -> Iterator[Variant]:
    head_dims = [head_dim for head_dim in _HEAD_DIMS if head_dim <= SCORED_HEAD_DIM]
    for architecture, dtype, head_dim in itertools.product(architectures, _DTYPES, head_dims):
        yield Variant(architecture, dtype, head_dim, False, False, far=True, kernel="block-scores", choosing=True)


def _score_launch(variant: Variant) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    import torch

    from grat_kernels.block_scores import block_tables, launch_of
    from grat_kernels.block_scores_kernel import block_scores_kernel

    query, _, _, _, summary_key, summary_value, plan, _, scale, _ = _inputs(variant)
    tables = block_tables(plan, query.device)
    (batch, _, heads, head_dim), groups = query.shape, len(plan.list_of_group)
    queries, scores = (
        torch.empty(batch, heads, groups, columns, device=query.device) for columns in (head_dim, len(tables.rows))
    )
    launch = launch_of(queries, summary_key, summary_value, scores, tables, scale)
    return block_scores_kernel, launch.arguments, launch.options


KERNELS = {
    "triton": Kernel(_triton_variants, _triton_config, _triton_launch, lambda code: code.loops, _triton_problems),
    "gluon": Kernel(
        _gluon_variants,
        lambda variant: GLUON[variant.architecture][variant.head_dim],
        _gluon_launch,
        _gluon_tile_loops,
        _gluon_problems,
    ),
    "block-scores": Kernel(
        _score_variants,
        lambda variant: SCORES[_bits(variant)],
        _score_launch,
        lambda code: code.loops,
        lambda variant, code: [],
    ),
}


def _row(build: Build) -> str:
    variant, config = build.variant, build.variant.config
    if isinstance(config, TileConfig):
        form, tiles = (
            config.form,
            f"{config.block_m}x{config.block_n}/{config.block_tail} w{config.warps} s{config.stages}",
        )
    elif isinstance(config, GluonConfig):
        form, tiles = variant.kernel, f"{config.block_m}x{config.block_n} s{config.stages}"
    else:
        form, tiles = "scores", f"{config.groups}x{config.columns} w{config.warps}"
    options = "+".join(name for name in ("text_valid", "far", "choosing", "ragged") if getattr(variant, name)) or "-"
    opcodes = " ".join(f"{name} {count}" for name, count in build.opcodes.items() if count)
    return (
        f"{variant.architecture:6} {variant.dtype:8} {variant.head_dim:3} {form:8} {options:23} {tiles:19} "
        f"{build.registers:4} {build.spills:6} {build.spills_in_loops:8} {build.shared_bytes / 1024:7.1f}  {opcodes}"
        + "".join(f"  PROBLEM: {problem}" for problem in build.problems)
    )


def _record(build: Build | RopeNormBuild) -> dict[str, Any]:
    record = asdict(build) | {"variant": build.variant._asdict()}
    return record | {"config": build.variant.config._asdict()} if isinstance(build, Build) else record


_HEADER = (
    f"{'target':6} {'dtype':8} {'dim':3} {'form':8} {'variant':23} {'tiles':19} "
    f"{'regs':>4} {'spills':>6} {'in loops':>8} {'KiB':>7}  instructions"
)


def _compile_any(variant: Variant | RopeNormVariant) -> Build | RopeNormBuild:
    return compile_variant(variant) if isinstance(variant, Variant) else compile_rope_norm(variant)


def main(arguments: list[str] | None = None) -> int:
    """Compiles the table and prints what came out; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m aot", description="Compile the span kernels' tile tables, and rope_norm."
    )
    parser.add_argument("--arch", action="append", choices=list(SHARED_MEMORY_LIMIT), help="only this one; repeatable")
    parser.add_argument("--kernel", action="append", choices=[*KERNELS, _ROPE_NORM], help="only this one; repeatable")
    parser.add_argument("--dtype", choices=_DTYPES, help="only this dtype")
    parser.add_argument("--head-dim", type=int, help="only this head dimension")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("Triton's interpreter compiles nothing: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    architectures, kernels = chosen.arch or SHARED_MEMORY_LIMIT, chosen.kernel or [*KERNELS, _ROPE_NORM]
    span = variants(architectures, [name for name in kernels if name != _ROPE_NORM])
    before = rope_norm_variants(architectures) if _ROPE_NORM in kernels else ()
    wanted = [
        variant
        for variant in (*span, *before)
        if chosen.dtype in (None, variant.dtype) and chosen.head_dim in (None, variant.head_dim)
    ]
    builds: list[Build | RopeNormBuild] = []
    if not chosen.json:
        print(f"Triton {version('triton')}\n{_HEADER}")
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        for build in pool.map(_compile_any, wanted):
            builds.append(build)
            if not chosen.json:
                print(_row(build) if isinstance(build, Build) else rope_norm_row(build), flush=True)
    if chosen.json:
        print(json.dumps([_record(build) for build in builds], indent=1))
    broken = sum(bool(build.problems) for build in builds)
    print(f"{len(builds)} compiled, {broken} with problems", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
