"""`grat bench --level attention`: one attention call on random queries, keys and values."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from grat_cli.bench.baselines import Window, baseline_for, mask_row
from grat_cli.bench.dense import dense_rate, fastest_dense
from grat_cli.bench.measure import (
    CannotRun,
    Measurement,
    NotFinite,
    Progress,
    Run,
    Unwatched,
    guarded,
    measure,
    memory_obstacle,
    memory_words,
)
from grat_cli.bench.peers import Scene, peer_rows
from grat_cli.bench.record import bench_result
from grat_cli.bench.results import Absent, BenchResult, Case, Row
from grat_cli.bench.sampled import AttendedRows, SampledError, rows_of_mask, rows_of_plan, sampled_error
from grat_cli.bench.sizes import Size
from grat_cli.estimates.peak_rates import peak_tflops
from grat_cli.fidelity.variants import Request, Variant, variant_for
from grat_cli.models.devices import device_name
from grat_kernels import HeadPlan, Plan, can_run, span_attention
from grat_kernels.backends import tried_backend
from grat_kernels.trials import Form

_SAMPLED_ROWS = 5  # besides three corners
# What the sdpa backend gathers at once on a device that is no CPU.
_GATHER_BYTES = 512 * 2**20


@dataclass(frozen=True)
class _Candidate:
    """A row before it is measured: what is known of it, and what to call."""

    row: Row
    pairs: float
    call: Callable[[], torch.Tensor] | None = None
    executed_pairs: float = 0.0
    extra_bytes: int = 0
    attended: AttendedRows | None = None


def run_attention_level(
    requests: Sequence[Request],
    sizes: Sequence[Size],
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    backends: Sequence[str] = ("auto",),
    peers: Sequence[str] = (),
    repetitions: int,
    max_seconds: float | None,
    command: str,
    progress: Progress | None = None,
) -> BenchResult:
    """Measures every variant and peer at every size, interleaved within a size.

    Args:
        requests: of `--compare`.
        sizes: one case each.
        heads: attention heads.
        head_dim: channels per head.
        dtype: of query, key and value.
        device: where they lie.
        backends: of span attention; each pattern gets a row per backend.
        peers: names of other projects' kernels.
        repetitions: timed calls of each row.
        max_seconds: most time for one row.
        command: what was typed, for the record.
        progress: is told of every call.

    Raises:
        BadInput: if a request does not fit a size.
    """
    progress = progress or Unwatched()
    # Everything that does not fit is refused before anything is measured.
    variants = [[variant_for(request, size.grid) for request in requests] for size in sizes]
    settings: dict[str, Any] = {
        "heads": heads,
        "head_dim": head_dim,
        "repetitions": repetitions,
        "max_seconds": max_seconds,
        "backends": list(backends),
        "inputs": "normal random numbers, seed 0; batch 1",
    }
    if device.type == "cpu":
        settings["threads"] = torch.get_num_threads()
    progress.phase("measuring the device")
    rate = dense_rate(device, dtype, heads, head_dim)
    bench = _AttentionBench(heads, head_dim, dtype, device, backends, peers, repetitions, max_seconds, rate, progress)
    cases = []
    for size, of_size in zip(sizes, variants, strict=True):
        progress.phase(size.title)
        cases.append(bench.case(size, of_size))
    if state := _gpu_state(device):
        settings["gpu_state_after"] = state
    if bench.dense_trials:
        settings["dense_trials_ms"] = bench.dense_trials
    notes = (
        memory_words(device),
        "Image tokens lie in the order that each kernel wants, as inside a transformer, where they are permuted once "
        "per step: the permutation is not part of these times.",
        "Error: largest over sampled rows, against attention in fp64.",
    )
    return bench_result(
        "attention",
        cases,
        device=device,
        dtype=dtype,
        settings=settings,
        command=command,
        notes=notes,
        absent=tuple(bench.absent.values()),
    )


@dataclass
class _AttentionBench:
    """The measurement of all sizes; gathers what is said once for all of them."""

    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    backends: Sequence[str]
    peers: Sequence[str]
    repetitions: int
    max_seconds: float | None
    rate: float
    progress: Progress

    def __post_init__(self) -> None:
        self.absent: dict[str, Absent] = {}
        self.dense_trials: dict[str, dict[str, float | str]] = {}

    def case(self, size: Size, variants: Sequence[Variant]) -> Case:
        """The rows of one size, full first, then as requested, peers last."""
        # sorted() keeps the order of the others.
        variants = sorted(variants, key=lambda variant: variant.kind != "full")
        tensor_bytes = size.tokens * self.heads * self.head_dim * self.dtype.itemsize
        if obstacle := memory_obstacle(4 * tensor_bytes, self.device):
            rows = [replace(self._plain_row(variant, size), skipped=obstacle) for variant in variants]
            return Case(size.title, size.grid.shape, size.text_len, tuple(rows))
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, size.tokens, self.heads, self.head_dim)
        query, key, value = (
            torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype) for _ in range(3)
        )
        scene = Scene(query, key, value, variants, size.text_len, size.text_first)
        candidates = [candidate for variant in variants for candidate in self._candidates(variant, scene, size)]
        candidates += self._peer_candidates(scene)
        errors: dict[str, SampledError] = {}
        found = measure(
            [self._run(candidate, scene, size, errors) for candidate in candidates if candidate.call is not None],
            self.device,
            repetitions=self.repetitions,
            max_seconds=self.max_seconds,
            flop_per_second=self.rate,
            progress=self.progress,
        )
        full_ms = self._full_ms(candidates, found)
        rows = [
            self._row(candidate, found.get(candidate.row.name), errors.get(candidate.row.name), full_ms)
            for candidate in candidates
        ]
        return Case(size.title, size.grid.shape, size.text_len, tuple(rows))

    def _plain_row(self, variant: Variant, size: Size) -> Row:
        """What is known of a variant without running it."""
        row = Row(variant.name, variant.role, variant.description)
        if variant.obstacle:
            return replace(row, skipped=variant.obstacle)
        try:
            pairs = variant.attended_pairs(size.text_len, size.text_first, self.heads)
            plan = variant.plan(size.text_len, size.text_first, self.heads)
        except ValueError as reason:  # too few heads
            return replace(row, skipped=str(reason))
        work = None if plan is None else plan.parts.over(plan.tokens**2)._asdict()
        return replace(row, density=pairs / size.tokens**2, reach_tokens=variant.reach(), work=work)

    def _candidates(self, variant: Variant, scene: Scene, size: Size) -> list[_Candidate]:
        row = self._plain_row(variant, size)
        if row.skipped:
            return [_Candidate(row, 0.0)]
        pairs = variant.attended_pairs(size.text_len, size.text_first, self.heads)
        if (plan := variant.plan(size.text_len, size.text_first, self.heads)) is not None:
            return [self._span_candidate(plan, backend, row, scene) for backend in self.backends]
        tensors = scene.query, scene.key, scene.value
        if variant.kind == "full":
            try:
                kernel = fastest_dense(*tensors, max_seconds=self.max_seconds, flop_per_second=self.rate)
            except CannotRun as reason:
                return [_Candidate(replace(row, skipped=str(reason)), pairs)]
            if kernel.others:
                self.dense_trials[size.title] = kernel.others
            call, executed, extra = partial(kernel.attention, *tensors), float(pairs), self._dense_bytes(scene)
            row, attended = replace(row, kernel=kernel.name), rows_of_mask(lambda position: None)
        else:
            window = Window.of(variant, size.text_len, size.text_first)
            baseline = baseline_for(window, self.device, self.dtype, self.head_dim)
            call, executed = partial(baseline.attention, *tensors), float(baseline.executed_pairs)
            row, extra = replace(row, kernel=baseline.kernel), 4 * scene.query.nbytes
            attended = rows_of_mask(partial(mask_row, window, baseline.order))
        return [_Candidate(row, pairs, call, executed, extra, attended)]

    def _span_candidate(self, plan: Plan | HeadPlan, backend: str, row: Row, scene: Scene) -> _Candidate:
        kind = self.device, self.dtype, self.head_dim
        resolved = backend
        if backend == "auto":
            form = Form(scene.query.device, *kind[1:], far=plan.summaries.rows > 0, choosing=plan.chooses)
            resolved = tried_backend([form])[0].value
        if len(self.backends) > 1:
            row = replace(row, name=f"{row.name} ({backend})")
        row = replace(row, kernel=resolved)
        ability = can_run(resolved, *kind, plan.tokens, choosing=plan.chooses)
        if not ability:
            return _Candidate(replace(row, skipped=ability.reason), plan.attended_pairs)
        # sdpa copies keys and values, on a CPU also without a far field.
        copies = plan.summaries.rows > 0 or (resolved == "sdpa" and self.device.type == "cpu")
        copied = 2 * scene.query.nbytes * (1 + plan.summaries.rows / plan.tokens) if copies else 0
        extra_bytes = scene.query.nbytes + int(copied)
        executed = float(plan.attended_pairs)
        if resolved == "reference" or (resolved == "flex" and self.device.type == "cpu"):
            executed = float(plan.tokens) ** 2
            extra_bytes += 3 * self.heads * plan.tokens**2 * 4
        elif resolved == "sdpa" and self.device.type != "cpu":
            extra_bytes += _GATHER_BYTES

        def call() -> torch.Tensor:
            return span_attention(scene.query, scene.key, scene.value, plan, backend=resolved)

        # On a CPU nothing is compiled: there, an error is a bug.
        run = guarded(resolved, call) if self.device.type == "cuda" else call
        return _Candidate(row, plan.attended_pairs, run, executed, extra_bytes, rows_of_plan(plan))

    def _peer_candidates(self, scene: Scene) -> list[_Candidate]:
        candidates = []
        for name in self.peers:
            rows = peer_rows(name, scene)
            if isinstance(rows, Absent):
                self.absent[name] = rows
                continue
            for peer in rows:
                row = Row(
                    peer.name,
                    "peer",
                    peer.description,
                    kernel=peer.kernel,
                    mask=peer.mask,
                    density=peer.density,
                    reach_tokens=peer.reach,
                )
                pairs = peer.density * scene.query.shape[1] ** 2
                candidates.append(
                    _Candidate(row, pairs, peer.call, peer.executed_pairs, peer.extra_bytes, peer.attended)
                )
        return candidates

    def _dense_bytes(self, scene: Scene) -> int:
        """What dense attention allocates: on MPS it holds all scores."""
        scores = self.heads * scene.query.shape[1] ** 2 * self.dtype.itemsize if self.device.type == "mps" else 0
        return scene.query.nbytes + scores

    def _run(self, candidate: _Candidate, scene: Scene, size: Size, errors: dict[str, SampledError]) -> Run:
        assert candidate.call is not None
        name = candidate.row.name

        def inspect(output: object) -> None:
            assert isinstance(output, torch.Tensor)
            if output.shape != scene.query.shape:
                raise CannotRun(f"its output has the shape {list(output.shape)}, not {list(scene.query.shape)}")
            if candidate.attended is None:
                return
            text_start = 0 if size.text_first else size.grid.tokens
            tensors = output, scene.query, scene.key, scene.value
            sampled = sampled_error(*tensors, candidate.attended, text_start=text_start, samples=_SAMPLED_ROWS)
            if not math.isfinite(sampled.error):
                raise NotFinite("its output is not finite")
            errors[name] = sampled

        return Run(
            name,
            candidate.call,
            flop=4 * candidate.executed_pairs * self.heads * self.head_dim,
            extra_bytes=candidate.extra_bytes,
            held_bytes=3 * scene.query.nbytes,
            inspect=inspect,
        )

    def _full_ms(self, candidates: Sequence[_Candidate], found: dict[str, Measurement]) -> float | None:
        for candidate in candidates:
            measured = found.get(candidate.row.name)
            if candidate.row.role == "full" and measured is not None and measured.times_ms:
                return statistics.median(measured.times_ms)
        return None

    def _row(
        self, candidate: _Candidate, measured: Measurement | None, error: SampledError | None, full_ms: float | None
    ) -> Row:
        """The row with all its figures."""
        row = candidate.row
        if measured is None:
            return row
        if measured.skipped:
            return replace(row, skipped=measured.skipped, not_finite=measured.not_finite)
        median = statistics.median(measured.times_ms)
        speedup = full_ms / median if full_ms is not None else None
        tflops = 4 * candidate.pairs * self.heads * self.head_dim / median / 1e9
        peak = peak_tflops(device_name(self.device), _name_of(self.dtype))
        return replace(
            row,
            times_ms=measured.times_ms,
            speedup=speedup,
            sparse_efficiency=speedup * row.density if speedup is not None and row.density is not None else None,
            tflops=tflops,
            pair_ns=median * 1e6 / (candidate.pairs * self.heads),
            peak_share=tflops / peak if peak else None,
            peak_memory_bytes=measured.peak_memory_bytes,
            error=error.error if error else None,
            plain_error=error.plain_error if error else None,
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gpu_state(device: torch.device) -> str | None:
    """Clocks, power and driver as nvidia-smi tells them; None without one."""
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        return None
    fields = "clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
    # Its own numbers are not torch's where CUDA_VISIBLE_DEVICES hides some.
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [program, f"--query-gpu={fields}", "--format=csv", f"--id={identity}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    names, values = (line.split(", ") for line in answer.strip().splitlines()[:2])
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
