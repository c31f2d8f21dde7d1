"""Benchmark results as the levels would write them, and as nobody would wish them."""

from __future__ import annotations

import math
from dataclasses import replace

from grat_cli.bench.results import Absent, BenchResult, Case, Fidelity, Quality, Row

VERSIONS = {"python": "3.12.3", "grat": "0.2.0", "torch": "2.13.0", "triton": "3.7.1", "natten": None}
SETTINGS = {"heads": 24, "head_dim": 128, "repetitions": 20, "seed": 0, "flush_l2": True}


def attention_row(name: str, density: float, milliseconds: float, full_ms: float = 1073.4, **values: object) -> Row:
    """A row of the attention level whose figures belong together (848 TFLOP for full attention)."""
    tflops = 848.0 * density / milliseconds * 1e3
    figures: dict[str, object] = {
        "role": "pattern",
        "description": "",
        "kernel": "gluon",
        "density": density,
        "reach_tokens": 45.2,
        "times_ms": tuple(milliseconds * factor for factor in (1.0, 0.991, 1.004, 1.051, 0.998)),
        "speedup": full_ms / milliseconds,
        "sparse_efficiency": full_ms / milliseconds * density,
        "tflops": tflops,
        "pair_ns": 4 * 128 / tflops / 1000,
        "peak_share": tflops / 989.0,
        "peak_memory_bytes": 6_460_000_000,
        "error": 3.1e-3,
        "plain_error": 2.9e-3,
    }
    return Row(name=name, **(figures | values))  # type: ignore[arg-type]


ATTENTION = BenchResult(
    level="attention",
    created="2025-11-21T09:30:00+00:00",
    command="grat bench --level attention --res 8192 --compare full,grat-b,grat-b-wide,grat-x,far --peers flex,na",
    device="cuda:0",
    device_name="NVIDIA H200",
    dtype="bfloat16",
    versions=VERSIONS,
    settings=SETTINGS,
    cases=(
        Case(
            "8192x8192 pixels",
            (512, 512),
            512,
            (
                attention_row(
                    "full",
                    1.0,
                    1073.4,
                    role="full",
                    kernel="cuDNN",
                    description="every token attends every token",
                    reach_tokens=722.7,
                ),
                attention_row("grat-b", 0.01228, 14.6, description="the 3×3 groups of 16×16 tokens around each group"),
                attention_row("grat-b-wide", 0.02645, 30.9, description="the 5×5 groups around each group"),
                attention_row("grat-x", 0.06548, 74.1, description="the group's row and column of groups"),
                attention_row("far", 0.0278, 33.0, description="3×3 groups, and means of 8×8 tokens beyond"),
                attention_row(
                    "na", 0.0129, 22.4, role="baseline", kernel="natten", description="a window of 57×57 tokens"
                ),
                attention_row("clear", 0.0141, 61.0, role="baseline", kernel="flex", description="a disc of radius 32"),
                attention_row(
                    "flex",
                    0.01228,
                    21.7,
                    role="peer",
                    kernel="torch flex",
                    mask="identical",
                    description="FlexAttention with the mask of grat-b",
                ),
                attention_row(
                    "sta",
                    0.01266,
                    18.2,
                    role="peer",
                    kernel="FastVideo",
                    mask="equal density",
                    description="sliding tiles of 16×16",
                    error=None,
                    plain_error=None,
                ),
            ),
        ),
    ),
    absent=(
        Absent("sparge", "not installed: pip install spargeattn"),
        Absent("flash-attention-4", "needs compute capability 10.0 or newer, this device has 9.0"),
    ),
    notes=("L2 flushed before every call.", "Clocks not locked: 1,755–1,980 MHz during the run."),
)

SKIPPED = replace(
    ATTENTION,
    device="cpu",
    device_name="AMD EPYC 9654",
    dtype="float32",
    absent=(),
    notes=(),
    cases=(
        Case(
            "512x512 pixels",
            (32, 32),
            512,
            (
                attention_row("full", 1.0, 41.7, 41.7, role="full", kernel="sdpa", tflops=None, peak_share=None),
                Row("grat-b", "pattern", "3×3 groups", skipped="groups of 16×16 on a grid of 32×32 attend everything"),
                Row("na", "baseline", "neighbours", skipped="out of memory: 68.7 GiB asked for, 24.0 GiB there"),
            ),
        ),
    ),
)

ONE_ROW = replace(SKIPPED, cases=(replace(SKIPPED.cases[0], rows=SKIPPED.cases[0].rows[:1]),))


def step_row(name: str, density: float, attention_ms: float, other_ms: float, full_ms: float, **values: object) -> Row:
    """A row of the step level."""
    total = attention_ms + other_ms
    figures: dict[str, object] = {
        "role": "pattern",
        "description": "",
        "kernel": "gluon",
        "density": density,
        "times_ms": tuple(total * factor for factor in (0.996, 1.0, 1.003, 1.02)),
        "attention_ms": attention_ms,
        "speedup": full_ms / total,
        "peak_memory_bytes": 61_000_000_000,
    }
    return Row(name=name, **(figures | values))  # type: ignore[arg-type]


def _step_case(title: str, side: int, attention: float, other: float) -> Case:
    whole = attention + other
    return Case(
        title,
        (side, side),
        512,
        (
            step_row("full", 1.0, attention, other, whole, role="full", kernel="cuDNN", description="everything"),
            *(
                step_row(
                    name,
                    density,
                    attention * density / efficiency,
                    other,
                    whole,
                    sparse_efficiency=efficiency,
                    description=description,
                )
                for name, density, efficiency, description in (
                    ("grat-b", 0.0123, 0.88, "3×3 groups"),
                    ("grat-b-wide", 0.0265, 0.92, "5×5 groups"),
                    ("grat-x", 0.0655, 0.94, "row and column"),
                    ("far", 0.0278, 0.9, "3×3 groups and means of 8×8 beyond"),
                )
            ),
        ),
    )


STEP = replace(
    ATTENTION,
    level="step",
    command="grat bench --level step --res 4096,8192 --model flux-dev --weights random",
    settings={**SETTINGS, "model": "flux-dev", "weights": "random", "layers": 57, "guidance": 3.5},
    cases=(
        _step_case("4096x4096 pixels", 256, 4070.0, 1260.0),
        _step_case("8192x8192 pixels", 512, 62_400.0, 5020.0),
    ),
    absent=(),
    notes=("Random weights: speed does not depend on them.",),
)

PROMPTS = (
    "a red fox in the snow",
    "a blue boat at night",
    "a portrait of a woman <with> a pearl & a very long list of further things that nobody could fit below a picture",
    "a castle",
)


def image_row(name: str, density: float, step_ms: float, quality: Quality | None, **values: object) -> Row:
    """A row of the image level: 20 steps, the first two dense."""
    steps = tuple((231.0 if step < 2 else step_ms) * (1 + 0.01 * (step % 3)) for step in range(20))
    figures: dict[str, object] = {
        "role": "pattern",
        "description": "",
        "kernel": "triton",
        "density": density,
        "times_ms": tuple(sum(steps) * factor for factor in (1.0, 0.98, 1.01, 1.03)),
        "step_times_ms": steps,
        "speedup": 231.0 * 20.2 / sum(steps),
        "quality": quality,
        "peak_memory_bytes": 1_210_000_000,
    }
    return Row(name=name, **(figures | values))  # type: ignore[arg-type]


IMAGE = replace(
    ATTENTION,
    level="image",
    device="cuda:0",
    command="grat bench --level image --compare full,grat-b,far,grat-x --prompts prompts.txt --html out.html",
    settings={"model": "flux-dev", "steps": 20, "guidance": 3.5, "prompts": PROMPTS},
    cases=(
        Case(
            "2048x2048 pixels",
            (128, 128),
            512,
            (
                image_row("full", 1.0, 231.0, None, role="full", kernel="cuDNN", description="everything"),
                image_row(
                    "full by flex",
                    1.0,
                    252.0,
                    Quality(0.991, 0.004, 41.2, 1.3),
                    role="noise floor",
                    kernel="flex",
                    description="full attention on another kernel",
                ),
                image_row(
                    "grat-b",
                    0.118,
                    71.0,
                    Quality(0.736, 0.020, 15.6, 0.6),
                    description="3×3 groups",
                    fidelity=Fidelity(0.8312, 0.0121, 0.412),
                ),
                image_row(
                    "far",
                    0.132,
                    76.0,
                    Quality(0.897, 0.015, 22.8, 0.5),
                    description="with means beyond",
                    fidelity=Fidelity(0.8314, None, 0.0921),
                    preset={"name": "far", "model": "flux", "attention": {"variant": "b", "group": [16, 16]}},
                ),
                image_row("far-fine", 0.213, 95.0, Quality(0.932, 0.013, 25.4, 0.5), description="finer means"),
                image_row("grat-x", 0.234, 99.0, Quality(0.793, 0.020, 17.5, 0.6), description="rows and columns"),
                image_row("na", 0.119, 110.0, Quality(0.756, 0.016, 16.1, 0.4), role="baseline", kernel="flex"),
            ),
        ),
    ),
    absent=(),
    notes=("SSIM and PSNR are against full attention with the same seed: similarity, not beauty.",),
    contact_sheet="bench-pictures.png",
)

VIDEO = replace(
    IMAGE,
    level="video",
    command="grat bench --level video --compare full,lines,b",
    settings={"model": "hunyuan", "steps": 20, "frames": 129, "fps": 24, "prompts": ("waves", "snow falling")},
    cases=(
        Case(
            "1280x720 pixels, 129 frames",
            (33, 45, 80),
            24,
            (
                image_row("full", 1.0, 231.0, None, role="full", kernel="diffusers", attention_ms=3200.0),
                image_row("lines", 0.045, 71.0, Quality(0.736, 0.020, 15.6, 0.6, motion=0.93), attention_ms=240.0),
                image_row("b", 0.043, 70.0, Quality(0.897, None, 22.8, None, motion=1.25), attention_ms=230.0),
                image_row("full by flex", 1.0, 252.0, Quality(0.991, 0.004, 41.2, 1.3, motion=1.0), role="noise floor"),
            ),
        ),
    ),
    contact_sheet="bench-frames.png",
)

NASTY = '<script>alert("&")</script>'
EXTREME = replace(
    ATTENTION,
    command=f"grat bench --compare 'full,{NASTY}' && echo \"$(date)\" | tee `x`",
    device_name='Device <0> & "co" | pipe [bold]x[/bold]',
    settings={"heads": 1, "nested": {"a": None, "b": [1, 2]}, "prompt": NASTY, "nothing": None},
    cases=(
        Case(
            "1x1 <tokens> | [red]",
            (1,),
            0,
            (
                attention_row("full", 1.0, 95_000.0, 95_000.0, role="full", kernel="math & <co>"),
                attention_row("tiny", 1e-3, 0.02, 95_000.0),
                attention_row("same-a", 0.05, 5000.0, 95_000.0),
                attention_row("same-b", 0.05, 5000.0, 95_000.0),
                attention_row("same-c", 0.05, 5001.0, 95_000.0),
                attention_row(NASTY, 0.2, 150_000.0, 95_000.0, description="slower | than `full` *so* _what_"),
                attention_row("a-very-long-name-" * 6 + "end", 0.5, 60_000.0, 95_000.0, description="long " * 60),
                attention_row("[bold]markup[/bold]", 0.7, 70_000.0, 95_000.0, error=math.inf, plain_error=math.nan),
                Row("nothing", "pattern", ""),
                Row("\x1b[31mesc\x00ape\n", "peer", "line\nbreak | pipe", skipped=f"{NASTY}\nsecond line | [red]"),
            ),
        ),
        Case("no rows", (), 0, ()),
    ),
    absent=(Absent(NASTY, f"{NASTY} | reason"),),
    notes=(f"{NASTY} ]]> -->",),
)

ALL = {
    "attention": ATTENTION,
    "skipped": SKIPPED,
    "one row": ONE_ROW,
    "step": STEP,
    "image": IMAGE,
    "video": VIDEO,
    "extreme": EXTREME,
}
