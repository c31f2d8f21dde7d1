"""The tile table, compiled for each architecture without a GPU, and the reading of machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aot
import pytest
import sass

from grat_kernels.tile_configs import GLUON, SHARED_MEMORY_LIMIT, TABLE, architecture_of

# The head dimension of Flux and HunyuanVideo on every architecture, and the other forms of Hopper.
COMPILED = [
    aot.Variant("sm_80", "bfloat16", 128, descriptors=True, text_valid=True, far=True),
    aot.Variant("sm_86", "bfloat16", 128, descriptors=True, text_valid=False, far=True),
    aot.Variant("sm_90", "bfloat16", 128, descriptors=True, text_valid=False, far=False),
    aot.Variant("sm_90", "bfloat16", 128, descriptors=True, text_valid=True, far=True),
    aot.Variant("sm_90", "bfloat16", 128, descriptors=False, text_valid=True, far=True),
    aot.Variant("sm_90", "float16", 64, descriptors=True, text_valid=False, far=True),
    aot.Variant("sm_90", "bfloat16", 128, descriptors=True, text_valid=True, far=True, choosing=True),
    aot.Variant("sm_80", "bfloat16", 96, descriptors=False, text_valid=False, far=True, choosing=True),
    aot.Variant("sm_100", "bfloat16", 128, descriptors=True, text_valid=True, far=True),
    aot.Variant("sm_120", "bfloat16", 128, descriptors=True, text_valid=False, far=False),
    aot.Variant("gfx942", "bfloat16", 128, descriptors=False, text_valid=True, far=True),
    aot.Variant("sm_90", "bfloat16", 128, descriptors=True, text_valid=False, far=False, kernel="gluon"),
    aot.Variant("sm_90", "bfloat16", 128, descriptors=True, text_valid=True, far=True, kernel="gluon"),
    aot.Variant("sm_90", "float16", 64, descriptors=True, text_valid=False, far=True, kernel="gluon"),
    aot.Variant("sm_100", "bfloat16", 128, descriptors=True, text_valid=False, far=False, kernel="gluon"),
    aot.Variant("sm_100", "float16", 64, descriptors=True, text_valid=True, far=True, kernel="gluon"),
    aot.Variant("sm_90", "bfloat16", 128, False, text_valid=False, far=True, kernel="block-scores", choosing=True),
]

# Compiles the cases, and one configuration that is too large for its architecture.
PROGRAM = """
import json, sys
import aot

builds = [aot.compile_variant(aot.Variant(*fields)) for fields in json.loads(sys.argv[1])]
tile_config = aot.tile_config
aot.tile_config = lambda *case, **options: tile_config(*case, **options)._replace(block_n=128, stages=4)
builds.append(aot.compile_variant(aot.Variant("sm_86", "bfloat16", 128, False, False, False)))
print(json.dumps([[build.opcodes, build.spills_in_loops, build.shared_bytes, build.problems] for build in builds]))
"""

# Compiles the Hopper kernel with other text in one of its pieces of assembly.
OTHER_ASSEMBLY = """
import json, sys
import aot
from grat_kernels import hopper_consumer

name, text, instead = sys.argv[1:]
assembly = getattr(hopper_consumer, name).value
assert text in assembly
setattr(hopper_consumer, name, hopper_consumer.gl.constexpr(assembly.replace(text, instead)))
print(json.dumps(aot.compile_variant(aot.Variant("sm_90", "bfloat16", 128, True, False, False, "gluon")).problems))
"""


def run_compiler(program: str, cache: Path, *arguments: str) -> Any:
    """What a program prints as JSON, in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_the_assembler_needs_the_pin_to_leave_the_softmax_where_it_is(tmp_path: Path) -> None:
    pinning = "@never st.volatile.shared.f32 [address], $1; "
    assert run_compiler(OTHER_ASSEMBLY, tmp_path, "PIN", pinning, "") == [
        "a softmax outside of the matrix products",
        "the first softmax of an item outside of the matrix products",
    ]


@pytest.mark.slow
def test_a_row_that_is_rescaled_unseen_is_told(tmp_path: Path) -> None:
    """As if a thread held its elements in another order."""
    problems = run_compiler(OTHER_ASSEMBLY, tmp_path, "RESCALE", "decays, $66,", "decays, $65,")
    assert problems == ["an output that is rescaled by what was not looked at"]


@pytest.mark.slow
def test_the_table_compiles_as_promised(tmp_path: Path) -> None:
    *builds, too_large = run_compiler(PROGRAM, tmp_path, json.dumps(COMPILED))
    for variant, (opcodes, spills_in_loops, shared_bytes, problems) in zip(COMPILED, builds, strict=True):
        assert not problems, (variant, problems)
        assert spills_in_loops == 0
        assert shared_bytes <= SHARED_MEMORY_LIMIT[variant.architecture]
        if variant.architecture == "sm_90":
            assert opcodes["HGMMA"] > 0
            assert (opcodes["UTMALDG"] > 0) == variant.descriptors
        if variant.architecture == "sm_100":
            assert opcodes["UTC*MMA"] > 0
            assert opcodes["UTMALDG"] > 0
    assert any("shared memory" in problem for problem in too_large[3])


ROPE_NORM_COMPILED = [
    aot.RopeNormVariant("sm_80", "bfloat16", 128, text_apart=True, levels=1),
    aot.RopeNormVariant("sm_90", "bfloat16", 128, text_apart=True, levels=3),
    aot.RopeNormVariant("sm_90", "bfloat16", 128, text_apart=False, levels=0),
    aot.RopeNormVariant("sm_90", "float32", 80, text_apart=True, levels=1),
    aot.RopeNormVariant("sm_100", "float16", 128, text_apart=True, levels=1),
    aot.RopeNormVariant("sm_120", "bfloat16", 64, text_apart=True, levels=1),
    aot.RopeNormVariant("gfx942", "bfloat16", 128, text_apart=True, levels=1),
]

ROPE_NORM_PROGRAM = """
import json, sys
import aot

builds = [aot.compile_rope_norm(aot.RopeNormVariant(*fields)) for fields in json.loads(sys.argv[1])]
print(json.dumps([[build.wide_loads, build.spills_in_loops, build.problems] for build in builds]))
"""


@pytest.mark.slow
def test_rope_norm_compiles_as_promised(tmp_path: Path) -> None:
    builds = run_compiler(ROPE_NORM_PROGRAM, tmp_path, json.dumps(ROPE_NORM_COMPILED))
    for variant, (wide_loads, spills_in_loops, problems) in zip(ROPE_NORM_COMPILED, builds, strict=True):
        assert not problems, (variant, problems)
        assert wide_loads >= 8
        assert spills_in_loops == 0


def test_every_row_of_the_table_is_compiled() -> None:
    compiled = {variant.config for variant in aot.variants(SHARED_MEMORY_LIMIT)}
    assert {config for configs in GLUON.values() for config in configs.values()} <= compiled
    for architecture, rows in TABLE.items():
        if architecture != "interpreter":
            assert {row.config for row in rows} <= compiled


def test_the_interpreter_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main(["--arch", "sm_90"]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_capabilities_take_the_nearest_older_row() -> None:
    expected = {(8, 0): "sm_80", (8, 9): "sm_86", (9, 0): "sm_90", (10, 3): "sm_100", (12, 1): "sm_120"}
    assert {capability: architecture_of(capability) for capability in expected} == expected
    with pytest.raises(ValueError, match="older than"):
        architecture_of((7, 5))


# As nvdisasm prints it: a loop (.L_x_1) whose wait retries behind the kernel's end (.L_x_3) and jumps back.
LISTING = """
        .section        .text.kernel
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   STL [R1], R0 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R4], R5 ;
        /*0040*/              @!P1 BRA `(.L_x_3) ;
.L_x_4:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        {spill}
        /*0070*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_2:
        /*0080*/                   LDL R0, [R1] ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R4], R5 ;
        /*00b0*/              @!P1 BRA `(.L_x_3) ;
        /*00c0*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*00d0*/                   BRA `(.L_x_5);
"""


def test_loops_are_told_from_retry_paths() -> None:
    code = sass.parse(LISTING.replace("{spill}", "/*0060*/                   FADD R2, R2, R3 ;"))
    assert code.count("HGMMA") == 1
    assert code.loops_with("HGMMA") == 1
    assert code.loops_with("SYNCS") == 2
    assert code.spills == 2
    assert code.spills_in_loops == 0
    assert sorted(len(loop) for loop in code.loops) == [1, 2, 8]


def test_a_spill_in_a_loop_is_seen() -> None:
    code = sass.parse(LISTING.replace("{spill}", "/*0060*/                   LDL.64 R2, [R1+0x8] ;"))
    assert code.spills == 3
    assert code.spills_in_loops == 1


# A consumer's loop over tiles inside its loop over work items, with a retry path behind the end.
OVERLAPPED = """
.text.kernel:
        /*0000*/                   LDL R0, [R1] ;
.L_x_1:
        /*0010*/                   STL [R1], R0 ;
.L_x_2:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, {first} ;
        /*0040*/                   {meet} ;
        /*0050*/              @!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x28160], RZ ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/                   SYNCS.ARRIVE.TRANS64 RZ, [UR4+0x28160], R3 ;
        /*00a0*/               @P2 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
"""
MEETING = "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80"


@pytest.mark.parametrize(
    ("first", "meet", "hides", "as_one"),
    [
        ("0x1", MEETING, True, True),
        ("0x0", MEETING, False, True),
        ("0x1", "NOP", True, False),
    ],
)
def test_the_order_of_a_softmax_and_of_arrivals(first: str, meet: str, hides: bool, as_one: bool) -> None:
    code = sass.parse(OVERLAPPED.format(first=first, meet=meet))
    (loop,) = code.innermost_with("HGMMA")
    assert len(code.loops) == 2
    assert code.hides_softmax(loop) is hides
    assert code.arrives_as_one(loop) is as_one
    assert code.spills == 2
    assert code.spills_in_loops == 1
    assert code.spills_within([loop]) == 0


@pytest.mark.parametrize("last", ["0x1", "0x0"])
def test_a_softmax_between_loops(last: str) -> None:
    """The loop over items computes one more under its products, and ends with products alone."""
    between = f"""/*0080*/               @P1 BRA `(.L_x_2) ;
        /*0081*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0082*/                   WARPGROUP.DEPBAR.LE gsb0, {last} ;
        /*0083*/                   MUFU.EX2 R4, R4 ;
        /*0084*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0085*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0086*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"""
    listing = OVERLAPPED.format(first="0x1", meet=MEETING)
    code = sass.parse(listing.replace("/*0080*/               @P1 BRA `(.L_x_2) ;", between))
    (loop,) = code.innermost_with("HGMMA")
    (outer,) = code.around(loop)
    assert code.hides_softmax(outer) is (last == "0x1")


@pytest.mark.parametrize(("tested", "known"), [("R9", True), ("R8", False)])
def test_factors_that_are_not_tested(tested: str, known: bool) -> None:
    rescaling = f"""/*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0071*/                   FSETP.NEU.AND P0, PT, R8, 1, PT ;
        /*0072*/                   FSETP.NEU.OR P0, PT, {tested}.reuse, 1, P0 ;
        /*0073*/                   FMUL R24, R24, R8.reuse ;
        /*0074*/                   FMUL R26, R26, R9 ;"""
    listing = OVERLAPPED.format(first="0x1", meet=MEETING)
    code = sass.parse(listing.replace("/*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", rescaling))
    (loop,) = code.innermost_with("HGMMA")
    assert code.tests_all_factors(loop) is known


def test_a_meeting_before_the_fence_is_none() -> None:
    fence = "/*0048*/                   FENCE.VIEW.ASYNC.S ;\n        /*0050*/"
    code = sass.parse(OVERLAPPED.format(first="0x1", meet=MEETING).replace("/*0050*/", fence))
    (loop,) = code.innermost_with("HGMMA")
    assert not code.arrives_as_one(loop)


# Roles that a table of jumps leads to; the first is a loop with two ways back.
ROLES = """
.text.kernel:
        /*0000*/                   BRX R4 -0x10                                (*"BRANCH_TARGETS .L_x_1,.L_x_3"*);
.L_x_1:
        /*0010*/                   LDTM.x32 R4, tmem[UR4] ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   {first} tmem[UR4], R4 ;
        /*0050*/                   {then} R4, tmem[UR4] ;
        /*0060*/              @!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x28160], RZ ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   UTCHMMA gdesc[UR60], gdesc[UR44], tmem[UR71] ;
        /*00a0*/               @P1 BRA `(.L_x_3) ;
        /*00b0*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("first", "then", "feeds"),
    [("STTM.x16", "NOP", True), ("STTM.x16", "LDTM.x32", False), ("NOP", "NOP", False)],
)
def test_roles_behind_a_table_of_jumps(first: str, then: str, feeds: bool) -> None:
    code = sass.parse(ROLES.format(first=first, then=then))
    assert sorted(len(loop) for loop in code.loops) == [2, 7]
    (softmax,) = code.innermost_with("MUFU.EX2")
    assert code.loops_with("UTC*MMA") == 1
    assert code.feeds_tensor_cores(softmax) is feeds
