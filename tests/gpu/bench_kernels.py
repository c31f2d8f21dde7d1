"""Speed of span attention on a CUDA device, against the fastest dense kernel that is here.

    make bench-gpu
    PYTHONPATH=.links python tests/gpu/bench_kernels.py --case flux-8192 --backend gluon

A result of `grat bench --level attention` over the sizes that matter, with every kernel that runs on the device. It
is written after each case, so that a run that is cut short leaves what it had. Needs torch, triton and numpy alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from grat_cli.bench.attention_level import run_attention_level
from grat_cli.bench.markdown import as_markdown
from grat_cli.bench.measure import Run, measure
from grat_cli.bench.results import BenchResult
from grat_cli.bench.sizes import Size
from grat_cli.fidelity.variants import PEERS, Request, default_group, parse_variants, variant_for
from grat_kernels import Backend, Grid, Grouping, build_plan, can_run
from grat_kernels.summaries import summarise

HEADS, HEAD_DIM = 24, 128
RESULTS = Path(__file__).resolve().parents[2] / "kernels" / "results"
# Backends that are no kernels of this project.
OTHERS = (Backend.AUTO, Backend.REFERENCE, Backend.SDPA, Backend.FLEX)

_IMAGE = "full,full-list,na,sta,grat-x,grat-b,grat-b:radius=2,grat-far:block=8x8,grat-far:block=4x4"
_VIDEO = "full,full-list,na,sta,grat-x:share=1,grat-x:share=2,grat-b,grat-far:block=4x4x4,grat-far:radius=0:block=2x4x4"


class Case(NamedTuple):
    """A model's joint sequence, and what to compare on it."""

    size: Size
    compare: str


CASES = {
    "flux-2048": Case(Size("2048x2048 pixels", Grid((128, 128)), 512), _IMAGE),
    "flux-4096": Case(Size("4096x4096 pixels", Grid((256, 256)), 512), _IMAGE),
    "flux-8192": Case(Size("8192x8192 pixels", Grid((512, 512)), 512), _IMAGE),
    "hunyuan-720p": Case(Size("720p video, 129 frames", Grid((33, 45, 80)), 256), _VIDEO),
}


class Log:
    """Progress on stderr."""

    def phase(self, name: str) -> None:
        print(name, file=sys.stderr, flush=True)

    def step(self, done: int, total: int) -> None:
        if done == total:
            print(f"{total} calls done", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def parts_ms(size: Size, requests: tuple[Request, ...], dtype: torch.dtype, repetitions: int) -> dict[str, float]:
    """Median milliseconds of what surrounds the kernel: ordering tokens once per step, summaries once per call."""
    device = torch.device("cuda")
    hidden = torch.randn(1, size.grid.tokens, HEADS * HEAD_DIM, device=device, dtype=dtype)
    key, value = (torch.randn(1, size.tokens, HEADS, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
    variants = [variant_for(request, size.grid) for request in requests]
    plans = {
        variant.name: build_plan(variant.grouping, variant.pattern, size.text_len, size.text_first)
        for variant in variants
        if variant.grouping is not None and variant.pattern is not None
    }
    order = torch.from_numpy(Grouping(size.grid, default_group(size.grid)).order).to(device)
    runs = [Run("token order of hidden states", lambda: hidden.index_select(1, order))]
    runs += [
        Run(f"summaries of {name}", lambda plan=plan: (summarise(key, plan), summarise(value, plan)))
        for name, plan in plans.items()
        if plan.summaries.rows
    ]
    found = measure(runs, device, repetitions=repetitions)
    return {name: round(statistics.median(part.times_ms), 4) for name, part in found.items() if part.times_ms}


def joined(results: list[BenchResult], parts: dict[str, Any]) -> BenchResult:
    """All cases as one result."""
    last = results[-1]
    trials: dict[str, Any] = {}
    for result in results:
        trials |= result.settings.get("dense_trials_ms", {})
    absent = {item.name: item for result in results for item in result.absent}
    return replace(
        last,
        cases=tuple(case for result in results for case in result.cases),
        absent=tuple(absent.values()),
        settings={**last.settings, "dense_trials_ms": trials, "parts_ms": parts},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one; repeatable")
    parser.add_argument("--backend", action="append", help="only this kernel; repeatable; default: all that run here")
    parser.add_argument("--compare", help="other variants than the usual ones, as for grat bench")
    parser.add_argument("--peers", default="natten,flashinfer,sage,pisa", help=f"of {', '.join(PEERS)}; may be empty")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--max-seconds", type=float, default=60, help="most time for one row")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: kernels/results/GPU-DATE.json")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    device, dtype = torch.device("cuda"), getattr(torch, chosen.dtype)
    kernels = [backend.value for backend in Backend if backend not in OTHERS]
    backends = chosen.backend or [name for name in kernels if can_run(name, device, dtype, HEAD_DIM)]
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = chosen.out or RESULTS / f"{gpu}-{time.strftime('%Y-%m-%d')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results, parts = [], {}
    for name in chosen.case or CASES:
        size, compare = CASES[name]
        requests = parse_variants(chosen.compare or compare)
        results.append(
            run_attention_level(
                requests,
                [size],
                heads=HEADS,
                head_dim=HEAD_DIM,
                dtype=dtype,
                device=device,
                backends=backends,
                peers=[peer for peer in chosen.peers.split(",") if peer],
                repetitions=chosen.repetitions,
                max_seconds=chosen.max_seconds,
                command=shlex.join(["python", *sys.argv]),
                progress=Log(),
            )
        )
        parts[size.title] = parts_ms(size, requests, dtype, chosen.repetitions)
        result = joined(results, parts)
        path.write_text(json.dumps(result.as_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
        torch.cuda.empty_cache()
    print(as_markdown(result))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
