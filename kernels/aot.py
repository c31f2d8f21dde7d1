"""Ahead-of-time compilation of the kernels without a GPU: the span kernel for every row of its table, and rope_norm.

    python -m grat_kernels.aot                 everything (minutes)
    python -m grat_kernels.aot --arch sm_90    one architecture

What is compiled is what the launcher launches: its own arguments, for tensors without data. The machine code is then
read for what a row of the table promises: no spill inside a loop, shared memory within the architecture's, tensor
cores and asynchronous loads of the right kind; of `rope_norm`, that it loads 16 bytes at a time. The exit code is 1
where a promise is broken.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, cast

from grat_kernels.tile_configs import SHARED_MEMORY_LIMIT, TileConfig, architecture_of, tile_config

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

_WIDE_LOAD = "LDG.E.128"

_DTYPES = ("bfloat16", "float16", "float32")
# One that is padded to a power of two, which rules descriptors out.
_PADDED_HEAD_DIM = 96
_HEAD_DIMS = (64, _PADDED_HEAD_DIM, 128, 256)


class Variant(NamedTuple):
    """One compilation of the kernel."""

    architecture: str
    dtype: str
    head_dim: int
    descriptors: bool  # whether the tensors allow them
    text_valid: bool
    far: bool

    @property
    def config(self) -> TileConfig:
        """The table's tiles, in this variant's form."""
        cuda = self.architecture.startswith("sm_")
        row = architecture_of(divmod(int(self.architecture.removeprefix("sm_")), 10)) if cuda else "rocm"
        bits = 32 if self.dtype == "float32" else 16
        return tile_config(row, self.head_dim, bits, descriptors=self.descriptors)


@dataclass(frozen=True)
class Build:
    """What came out of a compilation.

    Attributes:
        registers: per thread.
        spills: instructions that read or write local memory.
        spills_in_loops: those of them inside a loop.
        matrix_loops: loops that compute on tensor cores; None where that cannot be read.
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


def variants(architectures: Iterable[str]) -> Iterator[Variant]:
    """Every compilation that the table can lead to on these architectures."""
    for architecture, dtype, head_dim, text_valid, far in itertools.product(
        architectures, _DTYPES, _HEAD_DIMS, (False, True), (False, True)
    ):
        variant = Variant(architecture, dtype, head_dim, False, text_valid, far)
        yield variant
        if variant._replace(descriptors=True).config != variant.config and head_dim != _PADDED_HEAD_DIM:
            yield variant._replace(descriptors=True)


def compile_variant(variant: Variant) -> Build:
    """Compiles one variant and reads its machine code.

    Raises:
        RuntimeError: if Triton runs as an interpreter in this process, which compiles nothing.
    """
    compiled = _compile(variant)
    matrix_opcode = _MATRIX_OPCODE[variant.architecture]
    cuda = variant.architecture.startswith("sm_")
    code = _read_cuda(compiled, matrix_opcode) if cuda else _read_rocm(compiled)
    problems = []
    if code.spills_in_loops:
        problems.append(f"{code.spills_in_loops} spills inside a loop")
    if compiled.metadata.shared > SHARED_MEMORY_LIMIT[variant.architecture]:
        problems.append(f"{compiled.metadata.shared} bytes of shared memory")
    expected_loops = 3 if variant.far else 2
    if variant.dtype != "float32" and code.matrix_loops not in (None, expected_loops):
        problems.append(f"{code.matrix_loops} loops on tensor cores instead of {expected_loops}")
    if variant.dtype != "float32" and not code.opcodes[matrix_opcode]:
        problems.append(f"no {matrix_opcode}")
    if variant.config.stages > 1 and not code.opcodes[_LOAD_OPCODE[variant.config.form]]:
        problems.append(f"no {_LOAD_OPCODE[variant.config.form]}")
    return Build(variant, *code, compiled.metadata.shared, tuple(problems))


def _compile(variant: Variant) -> Any:
    import torch
    import triton
    from triton.backends.driver import DriverBase
    from triton.runtime.driver import driver

    from grat_kernels.geometry import Grid, Grouping
    from grat_kernels.pattern import Block, Far, Union
    from grat_kernels.plan import build_plan
    from grat_kernels.span_kernel import span_attention_kernel
    from grat_kernels.triton_backend import launch_of

    if not isinstance(span_attention_kernel, triton.JITFunction):
        raise RuntimeError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    pattern = Union(Block(1), Far([(1, (8, 8))])) if variant.far else Block(1)
    plan = build_plan(Grouping(Grid((64, 64)), (16, 16)), pattern, text_len=512)
    batch, heads = 2, 24
    tokens, summaries = (
        torch.empty(batch, rows, heads, variant.head_dim, dtype=getattr(torch, variant.dtype), device="meta")
        for rows in (plan.tokens, plan.summaries.rows)
    )
    launch = launch_of(
        *(tokens, tokens, tokens, tokens),
        *((summaries, summaries) if variant.far else (None, None)),
        plan,
        torch.empty(batch, dtype=torch.int32, device="meta") if variant.text_valid else None,
        1 / math.sqrt(variant.head_dim),
        variant.config,
    )
    driver.set_active(cast(DriverBase, _TargetOnly(variant.architecture)))
    return span_attention_kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.options)


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


_ROPE_NORM_HEAD_DIMS = (64, 80, 128, 256)
_FAR_BLOCKS = ((2, 2), (4, 4), (16, 16))


def rope_norm_variants(architectures: Iterable[str]) -> Iterator[RopeNormVariant]:
    """Single blocks without far field, and double blocks with little and much of it."""
    for architecture, dtype, head_dim, (text_apart, levels) in itertools.product(
        architectures, _DTYPES, _ROPE_NORM_HEAD_DIMS, ((False, 0), (True, 1), (True, len(_FAR_BLOCKS)))
    ):
        yield RopeNormVariant(architecture, dtype, head_dim, text_apart, levels)


def compile_rope_norm(variant: RopeNormVariant) -> RopeNormBuild:
    """Compiles one variant and reads its machine code.

    Raises:
        RuntimeError: if Triton runs as an interpreter in this process, which compiles nothing.
    """
    compiled = _compile_rope_norm(variant)
    if variant.architecture.startswith("sm_"):
        code = _read_cuda(compiled, _WIDE_LOAD)
        wide_loads = code.opcodes[_WIDE_LOAD]
    else:
        code = _read_rocm(compiled)
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


def _compile_rope_norm(variant: RopeNormVariant) -> Any:
    import torch
    import triton
    from triton.backends.driver import DriverBase
    from triton.runtime.driver import driver

    from grat_kernels import rope_norm
    from grat_kernels.geometry import Grid, Grouping
    from grat_kernels.pattern import Block, Far, Union
    from grat_kernels.plan import build_plan
    from grat_kernels.rope_norm_kernel import rope_norm_kernel

    if not isinstance(rope_norm_kernel, triton.JITFunction):
        raise RuntimeError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    pattern = Block(0)
    if variant.levels:
        pattern = Union(
            pattern, Far([(distance, block) for distance, block in enumerate(_FAR_BLOCKS[: variant.levels])])
        )
    plan = build_plan(Grouping(Grid((64, 64)), (16, 16)), pattern, text_len=512)
    batch, heads = 2, 24

    def empty(*shape: int, dtype: str = variant.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    def projections(rows: int) -> rope_norm.Projections:
        query, key, value = empty(batch, rows, 3, heads, variant.head_dim).unbind(2)
        return rope_norm.Projections(query, key, value)

    norms = rope_norm.Norms(empty(variant.head_dim), empty(variant.head_dim), 1e-6)
    angles = empty(plan.tokens, variant.head_dim, dtype="float32")
    image = projections(plan.image_tokens if variant.text_apart else plan.tokens)
    text = projections(plan.text_len) if variant.text_apart else None
    launch = rope_norm.launch_of(
        rope_norm.sections_of(image, norms, text, norms, (angles, angles), plan),
        rope_norm.empty_outputs(image.query, plan.tokens, plan.summaries.rows, variant.text_apart),
        plan,
    )
    driver.set_active(cast(DriverBase, _TargetOnly(variant.architecture)))
    return rope_norm_kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.options)


class _TargetOnly:
    """Stands where Triton expects a GPU's driver: it names an architecture and runs nothing."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture

    def get_current_device(self) -> str:
        # Triton keeps one compiler per device: each architecture counts as one.
        return self._architecture

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self._architecture.startswith("sm_"):
            return GPUTarget("cuda", int(self._architecture.removeprefix("sm_")), 32)
        return GPUTarget("hip", self._architecture, 64)


class _Code(NamedTuple):
    """The part of `Build` that is read off machine code."""

    registers: int
    spills: int
    spills_in_loops: int
    matrix_loops: int | None
    opcodes: dict[str, int]


def _read_cuda(compiled: Any, matrix_opcode: str) -> _Code:
    """Reads a cubin by the tools that come with Triton."""
    import triton

    from grat_kernels.sass import parse

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file], **_CAPTURE).stdout
        listing = subprocess.run([tools / "nvdisasm", "-c", file], **_CAPTURE).stdout
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump names no registers: {usage!r}")
    code = parse(listing)
    opcodes = {opcode: code.count(opcode) for opcode in ("HMMA", "HGMMA", "UTC*MMA", "UTMALDG", "LDGSTS", _WIDE_LOAD)}
    return _Code(int(registers[1]), code.spills, code.spills_in_loops, code.loops_with(matrix_opcode), opcodes)


def _read_rocm(compiled: Any) -> _Code:
    """Reads the figures at the end of an assembly listing, which do not tell where a spill lies."""
    listing = compiled.asm["amdgcn"]
    registers, spills = (
        sum(int(number) for number in re.findall(rf"\.{name}:\s+(\d+)", listing))
        for name in ("vgpr_count", "vgpr_spill_count")
    )
    return _Code(registers, spills, spills, None, {"v_mfma": listing.count("v_mfma")})


_CAPTURE: dict[str, Any] = {"capture_output": True, "text": True, "check": True}


def _row(build: Build) -> str:
    variant, config = build.variant, build.variant.config
    tiles = f"{config.block_m}x{config.block_n}/{config.block_tail} w{config.warps} s{config.stages}"
    options = "+".join(name for name in ("text_valid", "far") if getattr(variant, name)) or "-"
    opcodes = " ".join(f"{name} {count}" for name, count in build.opcodes.items() if count)
    return (
        f"{variant.architecture:6} {variant.dtype:8} {variant.head_dim:3} {config.form:8} {options:14} {tiles:19} "
        f"{build.registers:4} {build.spills:6} {build.spills_in_loops:8} {build.shared_bytes / 1024:7.1f}  {opcodes}"
        + "".join(f"  PROBLEM: {problem}" for problem in build.problems)
    )


def _rope_norm_row(build: RopeNormBuild) -> str:
    variant = build.variant
    options = f"{'text apart' if variant.text_apart else 'joint'}, {variant.levels} levels"
    return (
        f"{variant.architecture:6} {variant.dtype:8} {variant.head_dim:3} {options:43} {build.registers:4} "
        f"{build.spills:6} {build.spills_in_loops:8} {build.shared_bytes / 1024:7.1f}  16-byte loads {build.wide_loads}"
        + "".join(f"  PROBLEM: {problem}" for problem in build.problems)
    )


def _record(build: Build | RopeNormBuild) -> dict[str, Any]:
    record = asdict(build) | {"variant": build.variant._asdict()}
    return record | {"config": build.variant.config._asdict()} if isinstance(build, Build) else record


_HEADER = (
    f"{'target':6} {'dtype':8} {'dim':3} {'form':8} {'variant':14} {'tiles':19} "
    f"{'regs':>4} {'spills':>6} {'in loops':>8} {'KiB':>7}  instructions"
)


class _Table(NamedTuple):
    """What is compiled of one kernel, how, and how a result is printed."""

    variants: Callable[[Iterable[str]], Iterable[Any]]
    compile: Callable[[Any], Any]
    row: Callable[[Any], str]


_TABLES = {
    "span": _Table(variants, compile_variant, _row),
    "rope_norm": _Table(rope_norm_variants, compile_rope_norm, _rope_norm_row),
}


def main(arguments: list[str] | None = None) -> int:
    """Compiles the table and prints what came out; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m grat_kernels.aot", description="Compile the span kernel's tile table, and rope_norm."
    )
    parser.add_argument("--kernel", choices=list(_TABLES), help="only this one")
    parser.add_argument("--arch", action="append", choices=list(SHARED_MEMORY_LIMIT), help="only this one; repeatable")
    parser.add_argument("--dtype", choices=_DTYPES, help="only this dtype")
    parser.add_argument("--head-dim", type=int, help="only this head dimension")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("Triton's interpreter compiles nothing: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    builds = []
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) as pool:
        for kernel in [chosen.kernel] if chosen.kernel else _TABLES:
            table = _TABLES[kernel]
            wanted = [
                variant
                for variant in table.variants(chosen.arch or SHARED_MEMORY_LIMIT)
                if chosen.dtype in (None, variant.dtype) and chosen.head_dim in (None, variant.head_dim)
            ]
            if not chosen.json:
                print(f"{kernel}\n{_HEADER}")
            for build in pool.map(table.compile, wanted):
                builds.append(build)
                if not chosen.json:
                    print(table.row(build), flush=True)
    if chosen.json:
        print(json.dumps([_record(build) for build in builds], indent=1))
    broken = sum(bool(build.problems) for build in builds)
    print(f"{len(builds)} compiled, {broken} with problems", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
