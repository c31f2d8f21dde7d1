"""Speed of span attention on a CUDA device, against the fastest dense kernel that is here.

    make bench-gpu BENCH_ARGS="--case flux-4096 --backend triton --max-seconds 20"

A result of `grat bench --level attention` over the sizes that matter. Each pattern is measured beside dense attention
and written as soon as it is known, so that a run that is cut short leaves what it had; a file that exists gets more
rows. Needs torch, triton and numpy alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from grat_cli.bench.attention_level import run_attention_level
from grat_cli.bench.markdown import as_markdown
from grat_cli.bench.measure import Run, measure
from grat_cli.bench.results import BenchResult, Case
from grat_cli.bench.sizes import Size
from grat_cli.fidelity.variants import PEERS, Request, default_group, parse_variants, variant_for
from grat_kernels import Backend, Grid, Grouping, build_plan, can_run, trials
from grat_kernels.summaries import summarise

HEADS, HEAD_DIM = 24, 128
RESULTS = Path(__file__).resolve().parents[2] / "kernels" / "results"
# Backends that are no kernels of this project.
OTHERS = (Backend.AUTO, Backend.REFERENCE, Backend.SDPA, Backend.FLEX)

_IMAGE = "full,full-list,na,sta,grat-x,grat-b,grat-b:radius=2,grat-far:block=8x8,grat-far:block=4x4"
_VIDEO = "full,full-list,na,sta,grat-x:share=1,grat-x:share=2,grat-b,grat-far:block=4x4x4,grat-far:radius=0:block=2x4x4"


# A size for Triton's interpreter.
REHEARSAL = "rehearsal"


class Comparison(NamedTuple):
    """A model's joint sequence, and what to compare on it."""

    size: Size
    compare: str


CASES = {
    "flux-2048": Comparison(Size("2048x2048 pixels", Grid((128, 128)), 512), _IMAGE),
    "flux-4096": Comparison(Size("4096x4096 pixels", Grid((256, 256)), 512), _IMAGE),
    "flux-8192": Comparison(Size("8192x8192 pixels", Grid((512, 512)), 512), _IMAGE),
    "hunyuan-720p": Comparison(Size("720p video, 129 frames", Grid((33, 45, 80)), 256), _VIDEO),
    REHEARSAL: Comparison(Size("128x192 pixels", Grid((8, 12)), 5), "full,grat-x:group=4x4,grat-b:group=4x4"),
}
REAL_CASES = [name for name in CASES if name != REHEARSAL]


class Log:
    """Progress on stderr."""

    def phase(self, name: str) -> None:
        print(name, file=sys.stderr, flush=True)

    def step(self, done: int, total: int) -> None:
        if done == total:
            print(f"{total} calls done", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def parts_ms(
    size: Size, requests: Sequence[Request], heads: int, device: torch.device, dtype: torch.dtype, repetitions: int
) -> dict[str, float]:
    """Median milliseconds of what surrounds the kernel: ordering tokens once per step, summaries once per call."""
    hidden = torch.randn(1, size.grid.tokens, heads * HEAD_DIM, device=device, dtype=dtype)
    key, value = (torch.randn(1, size.tokens, heads, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
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


def with_row(result: BenchResult | None, found: BenchResult) -> BenchResult:
    """A result with what another one found of one size: rows of the same names are replaced, dense attention stays."""
    (case,) = (_by_kernel(case) for case in found.cases)
    if result is None:
        return replace(found, cases=(case,))
    trials = result.settings.get("dense_trials_ms", {}) | found.settings.get("dense_trials_ms", {})
    parts = result.settings.get("parts_ms", {}) | found.settings.get("parts_ms", {})
    own = next((known for known in result.cases if known.title == case.title), case)
    rows = {row.name: row for row in own.rows} | {row.name: row for row in case.rows if row.role != "full"}
    cases = [known for known in result.cases if known.title != case.title]
    return replace(
        found,
        cases=(*cases, replace(case, rows=tuple(rows.values()))),
        absent=tuple({item.name: item for item in (*result.absent, *found.absent)}.values()),
        settings={**found.settings, "dense_trials_ms": trials, "parts_ms": parts},
    )


def _by_kernel(case: Case) -> Case:
    """Patterns by names that tell their kernels apart."""
    named = [
        row if row.role in ("full", "peer") else replace(row, name=f"{row.name} ({row.kernel})") for row in case.rows
    ]
    return replace(case, rows=tuple(named))


def write(result: BenchResult, path: Path) -> None:
    """As JSON, and as Markdown beside it; whole or not at all."""
    texts = {
        path: json.dumps(result.as_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n",
        path.with_suffix(".md"): as_markdown(result),
    }
    for place, text in texts.items():
        unfinished = place.with_name(f"{place.name}.unfinished")
        unfinished.write_text(text)
        unfinished.replace(place)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one; repeatable")
    parser.add_argument("--backend", action="append", help="only this kernel; repeatable; default: all that run here")
    parser.add_argument("--compare", help="other variants than the usual ones, as for grat bench")
    parser.add_argument("--peers", default="natten,flashinfer,sage,pisa", help=f"of {', '.join(PEERS)}; may be empty")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--device", default="cuda", help="cpu, where Triton's interpreter stands in, to rehearse this")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--max-seconds", type=float, default=60, help="most time for one row")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: kernels/results/GPU-DATE.json")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    trials._is_safe = lambda *_: True  # in this process, which is there to be ended
    device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
    kernels = [backend.value for backend in Backend if backend not in OTHERS]
    backends = chosen.backend or [name for name in kernels if can_run(name, device, dtype, HEAD_DIM)]
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    gpu = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = chosen.out or RESULTS / f"{gpu}-{time.strftime('%Y-%m-%d')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = BenchResult.from_json(path.read_text()) if path.is_file() else None
    for name in chosen.case or REAL_CASES:
        size, compare = CASES[name]
        full, *others = parse_variants(chosen.compare or compare)
        run = partial(
            run_attention_level,
            sizes=[size],
            heads=chosen.heads,
            head_dim=HEAD_DIM,
            dtype=dtype,
            device=device,
            repetitions=chosen.repetitions,
            max_seconds=chosen.max_seconds,
            command=shlex.join(["python", *sys.argv]),
            progress=Log(),
        )
        for backend in backends:
            for request in others:
                result = with_row(result, run([full, request], backends=[backend]))
                write(result, path)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        peers = [peer for peer in chosen.peers.split(",") if peer]
        if peers:
            result = with_row(result, run([full], peers=peers))
            write(result, path)
        if result is not None and size.title not in result.settings.get("parts_ms", {}):
            parts = {size.title: parts_ms(size, (full, *others), chosen.heads, device, dtype, chosen.repetitions)}
            known = result.settings.get("parts_ms", {})
            result = replace(result, settings={**result.settings, "parts_ms": known | parts})
            write(result, path)
    if result is not None:
        print(as_markdown(result))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
