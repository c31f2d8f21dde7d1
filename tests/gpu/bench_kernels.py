"""Speed of span attention on a CUDA device, against the fastest dense kernel of PyTorch.

    make bench-gpu
    PYTHONPATH=.links:tests/gpu python tests/gpu/bench_kernels.py --case flux-8192 --json bench.json

Variants are interleaved in one process, timed by CUDA events with a cold L2 cache, on fresh random tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import triton
from sampled_rows import sampled_error
from torch.nn.attention import SDPBackend, sdpa_kernel

from grat_kernels import Block, CrissCross, Far, Full, Grid, Grouping, Pattern, build_plan, triton_backend
from grat_kernels import Union as Join
from grat_kernels.summaries import summarise

HEADS, HEAD_DIM = 24, 128


class Case(NamedTuple):
    """A model's joint sequence, and the patterns to time on it."""

    grouping: Grouping
    text_len: int
    text_first: bool
    patterns: dict[str, Pattern]


_IMAGE = {
    "full": Full(),
    "x": CrissCross(),
    "b r=1": Block(1),
    "b r=2": Block(2),
    "b r=1 + 8x8 beyond": Join(Block(1), Far([(1, (8, 8))])),
    "b r=1 + 4x4 beyond": Join(Block(1), Far([(1, (4, 4))])),
}
_VIDEO = {
    "full": Full(),
    "planes": CrissCross(1),
    "lines": CrissCross(2),
    "b r=1": Block(1),
    "b r=1 + 4x4x4 beyond": Join(Block(1), Far([(1, (4, 4, 4))])),
    "b r=0 + 1x2x2 at 1 + 2x4x4 beyond": Join(Block(0), Far([(0, (1, 2, 2)), (1, (2, 4, 4))])),
}
CASES = {
    "flux-2048": Case(Grouping(Grid((128, 128)), (16, 16)), 512, True, _IMAGE),
    "flux-4096": Case(Grouping(Grid((256, 256)), (16, 16)), 512, True, _IMAGE),
    "flux-8192": Case(Grouping(Grid((512, 512)), (16, 16)), 512, True, _IMAGE),
    "hunyuan-720p": Case(Grouping(Grid((33, 45, 80)), (4, 8, 8)), 256, False, _VIDEO),
}


@dataclass(frozen=True)
class Timing:
    """One variant: times over repetitions in milliseconds, work, and error over sampled rows."""

    case: str
    variant: str
    density: float
    tile_efficiency: float | None
    median_ms: float
    min_ms: float
    max_ms: float
    pooling_ms: float | None
    tflops: float  # over attended pairs
    speedup: float | None  # dense time / time
    sparse_efficiency: float | None  # speedup * density
    error: float
    plain_error: float


def dense_kernels(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """PyTorch's dense kernels that run here, by name, on tensors `[B, N, H, D]`."""
    heads_first = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def of(backend: SDPBackend) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=False).transpose(1, 2)

        return run

    kernels = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            of(backend)()
            kernels[f"dense, {name}"] = of(backend)
        except RuntimeError as reason:
            print(f"dense, {name}: not here ({str(reason).splitlines()[0]})", file=sys.stderr)
    return kernels


def time_interleaved(
    variants: dict[str, Callable[[], torch.Tensor]], repetitions: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each call; every round runs every variant once, the slow ones until their share is spent."""
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in variants}
    spent = dict.fromkeys(variants, 0.0)
    for run in variants.values():
        run()
    torch.cuda.synchronize()
    for _ in range(repetitions):
        for name, run in variants.items():
            if len(times[name]) >= 5 and spent[name] > seconds:
                continue
            began = time.monotonic()
            flush.zero_()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
            spent[name] += time.monotonic() - began
    return times


def bench(name: str, case: Case, dtype: torch.dtype, repetitions: int, seconds: float) -> list[Timing]:
    plans = {
        variant: build_plan(case.grouping, pattern, case.text_len, case.text_first)
        for variant, pattern in case.patterns.items()
    }
    tokens = case.grouping.grid.tokens + case.text_len
    query, key, value = (torch.randn(1, tokens, HEADS, HEAD_DIM, dtype=dtype, device="cuda") for _ in range(3))
    scale = 1 / math.sqrt(HEAD_DIM)

    def span(variant: str) -> Callable[[], torch.Tensor]:
        return lambda: triton_backend.attention(query, key, value, plans[variant], None, scale)

    def pool(variant: str) -> Callable[[], torch.Tensor]:
        return lambda: (summarise(key, plans[variant]), summarise(value, plans[variant]))[1]

    far = {f"{variant}: pooling": pool(variant) for variant, plan in plans.items() if plan.summaries.rows}
    dense = dense_kernels(query, key, value)
    runs = {**dense, **{variant: span(variant) for variant in plans}, **far}
    times = time_interleaved(runs, repetitions, seconds)
    dense_ms = min((statistics.median(times[variant]) for variant in dense), default=None)

    timings = []
    for variant in [*dense, *plans]:
        plan = plans.get(variant, plans["full"])
        median = statistics.median(times[variant])
        pairs = plan.attended_pairs if variant in plans else tokens**2
        density = pairs / tokens**2
        sampled = sampled_error(runs[variant](), query, key, value, plan, samples=8)
        pooling = times.get(f"{variant}: pooling")
        config = triton_backend.config_for(query, key, value)
        timings.append(
            Timing(
                case=name,
                variant=variant,
                density=density,
                tile_efficiency=plan.tile_efficiency(*config[:3]) if variant in plans else None,
                median_ms=median,
                min_ms=min(times[variant]),
                max_ms=max(times[variant]),
                pooling_ms=statistics.median(pooling) if pooling else None,
                tflops=4 * pairs * HEADS * HEAD_DIM / median / 1e9,
                speedup=dense_ms / median if dense_ms else None,
                sparse_efficiency=dense_ms / median * density if dense_ms else None,
                error=sampled.error,
                plain_error=sampled.plain_error,
            )
        )
    return timings


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show(timing: Timing) -> str:
    return (
        f"{timing.variant:36} {timing.density:7.4f} {_cell(timing.tile_efficiency, '.3f'):>6} "
        f"{timing.median_ms:9.3f} {timing.min_ms:9.3f} {timing.max_ms:9.3f} {_cell(timing.pooling_ms, '.3f'):>8} "
        f"{timing.tflops:7.0f} {_cell(timing.speedup, '.2f'):>8} {_cell(timing.sparse_efficiency, '.3f'):>6} "
        f"{timing.error:9.1e} {timing.plain_error:9.1e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one; repeatable")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10, help="most time for one variant, after five repetitions")
    parser.add_argument("--json", metavar="FILE", help="write everything there as well")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    conditions = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "dtype": chosen.dtype,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "repetitions": chosen.repetitions,
    }
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    timings = []
    for name in chosen.case or CASES:
        case = CASES[name]
        print(f"\n{name}: {case.grouping.grid.tokens} + {case.text_len} tokens, groups {case.grouping.group}")
        print(
            f"{'variant':36} {'density':>7} {'tiles':>6} {'ms':>9} {'min':>9} {'max':>9} {'pooling':>8} "
            f"{'TFLOP/s':>7} {'speed-up':>8} {'s.eff.':>6} {'error':>9} {'plain':>9}"
        )
        for timing in bench(name, case, getattr(torch, chosen.dtype), chosen.repetitions, chosen.seconds):
            timings.append(timing)
            print(show(timing), flush=True)
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({"conditions": conditions, "timings": [asdict(timing) for timing in timings]}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
