"""`--level step`: one transformer call of a real architecture, with stock attention and with each variant.

A row says how long the call takes and how much of it is attention: what a faster attention leaves of a step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from grat_cli.bench.dense import DenseKernel, dense_candidates, dense_rate, fastest_dense
from grat_cli.bench.inside_models import Attach, Host, Inside, backend_of
from grat_cli.bench.measure import (
    CannotRun,
    Measurement,
    NotFinite,
    Progress,
    Run,
    Unwatched,
    available_memory,
    measure,
    memory_obstacle,
    memory_words,
)
from grat_cli.bench.random_weights import (
    own_transformer,
    random_transformer,
    step_inputs,
    step_model,
    transformer_config,
)
from grat_cli.bench.record import bench_result
from grat_cli.bench.results import BenchResult, Case, Row
from grat_cli.errors import BadInput, OutOfMemory, steadier
from grat_cli.families import family_of
from grat_cli.families.base import ModelChoice
from grat_cli.families.shapes import TransformerShape
from grat_cli.fidelity.variants import Request, Variant, size_text, variant_for
from grat_cli.generation.timing import StepRecorder
from grat_cli.installation import backend_for
from grat_cli.models.devices import choose_device, choose_dtype
from grat_kernels import Grid

# By the rate of dense attention, steps that would take far too long are skipped before they start. Their matrix
# products may be as many times faster.
_RATE_MARGIN = 3.0


@dataclass(frozen=True)
class StepSettings:
    """What to measure.

    Attributes:
        model: name of a step model.
        compare: variants beside full attention, which is always measured.
        grids: image tokens per axis of each case; empty for the model's own.
        layers: double and single blocks in place of the model's own numbers, for smaller machines.
        weights: `own` or `random`; None for the model's own where they are bundled and fit.
        text_len: text tokens, attended jointly or across; None for the model's.
        device: as in `--device`.
        dtype: as in `--dtype`.
        backend: of span attention; one chosen by name never falls back.
        repetitions: timed calls of each row, after a warm-up.
        max_seconds: most time for one row of a case; None for no limit.
        seed: of weights and inputs.
        command: that asked for it, for the record.
    """

    model: str
    compare: tuple[Request, ...]
    grids: tuple[tuple[int, ...], ...] = ()
    layers: tuple[int, ...] | None = None
    weights: str | None = None
    text_len: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    repetitions: int = 5
    max_seconds: float | None = None
    seed: int = 0
    command: str = ""


def run_step_level(settings: StepSettings, progress: Progress | None = None) -> BenchResult:
    """Measures one denoising step.

    Raises:
        BadInput: if the settings do not fit one another, or a backend by name cannot run here.
        OutOfMemory: if the weights alone do not fit.
    """
    progress = progress or Unwatched()

    # 1. What can be refused before a model is made.
    model = step_model(settings.model)
    weights = settings.weights or ("own" if model.is_demo and settings.layers is None else "random")
    config = transformer_config(model, settings.layers, weights)
    shape = family_of(model).transformer_shape(config)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    text = model.text_tokens if settings.text_len is None else settings.text_len
    text_len = shape.joint_text(text)
    grids = [Grid(sides) for sides in settings.grids] or list(family_of(model).step_grids(model))
    cases = [(grid, _variants(settings.compare, model, grid)) for grid in grids]
    most_tokens = max(grid.tokens for grid in grids) + text_len
    kind = device, dtype, shape.head_dim, most_tokens
    backend, why = backend_for(settings.backend, *kind, choosing=False)
    for variant in cases[0][1]:  # those of other sizes differ in size alone
        backend_of(variant, settings.backend, *kind)
    _refuse_large(model, shape, dtype, device)

    # 2. The transformer.
    progress.phase(f"making {model.name}")
    transformer = (
        random_transformer(config, device, dtype, settings.seed)
        if weights == "random"
        else own_transformer(model, device, dtype)
    )
    host = Host(transformer, family_of(model), text_len, backend, device, dtype)
    bench = _Steps(model, config, shape, host, text, settings)
    rate = None
    if settings.max_seconds is not None:
        rate = _RATE_MARGIN * dense_rate(device, dtype, shape.heads, shape.head_dim)

    # 3. Its steps.
    found = []
    for grid, variants in cases:
        progress.phase(f"{model.name}, {size_text(grid.shape)} tokens")
        found.append(bench.case(grid, variants, rate, progress))

    return bench_result(
        "step",
        found,
        device=device,
        dtype=dtype,
        settings={
            "model": model.name,
            "weights": weights,
            **shape.blocks,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "parameters": shape.parameters,
            "text_tokens": text,
            "batch": 1,
            "backend": backend.value,
            "backend_reason": why,
            "repetitions": settings.repetitions,
            "max_seconds": settings.max_seconds,
            "seed": settings.seed,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
        },
        command=settings.command,
        notes=_notes(model, device),
    )


def _notes(model: ModelChoice, device: torch.device) -> tuple[str, ...]:
    notes = ["A step is one transformer call of one sample: everything but text encoders and autoencoder."]
    if device.type == "cuda":
        notes.append("Summaries are made by the kernel that normalises and rotates: they count in the rest of a step.")
    if model.is_demo and model.true_guidance:
        notes.append("With guidance the demo makes two such calls a step.")
    notes.append("Full attention is stock diffusers; its attention is timed as that of the variants is.")
    if note := family_of(model).full_note:
        notes.append(note)
    return (*notes, memory_words(device))


def _variants(compare: Sequence[Request], model: ModelChoice, grid: Grid) -> list[Variant]:
    """Full attention, then what else was asked for."""
    family = family_of(model)
    if grid.axes != family.axes:
        raise BadInput(
            f"{model.name} has tokens on {family.axes} axes, --grid {size_text(grid.shape)} has {grid.axes}: "
            f"try --grid {size_text(family.step_grids(model)[0].shape)}"
        )
    others = [variant_for(request, grid) for request in compare if not request.is_full]
    return [variant_for(Request("full", "full", {}), grid), *others]


def _refuse_large(model: ModelChoice, shape: TransformerShape, dtype: torch.dtype, device: torch.device) -> None:
    """Raises OutOfMemory if the weights do not fit on the device."""
    needed, available = shape.parameters * dtype.itemsize, available_memory(device)
    if available is not None and needed > available:
        raise OutOfMemory(
            f"the weights of {model.name} take {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, "
            f"{available / 2**30:.1f} GiB are free on {device}: use fewer blocks, such as --layers 2,4"
        )


class _Steps:
    """A transformer, and what its steps run on."""

    def __init__(
        self,
        model: ModelChoice,
        config: Mapping[str, Any],
        shape: TransformerShape,
        host: Host,
        text: int,
        settings: StepSettings,
    ) -> None:
        self._model, self._config, self._shape, self._host, self._settings = model, config, shape, host, settings
        self._text = text

    def case(self, grid: Grid, variants: Sequence[Variant], rate: float | None, progress: Progress) -> Case:
        """Measures the rows of one size, interleaved.

        Args:
            grid: image tokens per axis.
            variants: full attention first.
            rate: floating-point operations per second that steps may reach, or None.
            progress: is told of every call.
        """
        host, settings = self._host, self._settings
        inputs = step_inputs(self._config, grid.shape, self._text, host.device, host.dtype, settings.seed)
        candidates: dict[str, Inside] = {}
        obstacles: dict[str, str] = {}
        for variant in variants:
            try:
                dense = self._fastest_dense(grid, rate) if variant.kind == "full" else None
                kind = host.device, host.dtype, self._shape.head_dim, grid.tokens + host.text_len
                own = replace(host, backend=backend_of(variant, settings.backend, *kind))
                candidates[variant.name] = own.inside(variant, dense)
            except CannotRun as reason:
                obstacles[variant.name] = str(reason)

        held = sum(parameter.nbytes for parameter in host.transformer.parameters())
        held += sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
        calls = {
            name: _Watched(host.transformer, inputs, inside.attach, host.device) for name, inside in candidates.items()
        }
        runs = [
            Run(
                name,
                calls[name],
                flop=self._flop(grid, inside.pairs),
                extra_bytes=self._activation_bytes(grid),
                held_bytes=held,
                inspect=_refuse_not_finite,
            )
            for name, inside in candidates.items()
        ]
        measured = measure(
            runs,
            host.device,
            repetitions=settings.repetitions,
            max_seconds=settings.max_seconds,
            flop_per_second=rate,
            progress=progress,
        )
        rows: list[Row] = []
        for variant in variants:
            if variant.name in obstacles:
                rows.append(_row(variant, skipped=obstacles[variant.name]))
                continue
            measurement = measured[variant.name]
            times = calls[variant.name].last(len(measurement.times_ms))
            full = rows[0] if rows else None
            rows.append(_measured_row(variant, candidates[variant.name], measurement, times, full))
        return Case(self._title(grid), grid.shape, host.text_len, tuple(rows))

    def _fastest_dense(self, grid: Grid, rate: float | None) -> DenseKernel:
        """The dense kernel that is fastest at the size of an attention call.

        Raises:
            CannotRun: if none can be run at that size.
        """
        device, dtype = self._host.device, self._host.dtype
        candidates = dense_candidates(device)
        if len(candidates) == 1:  # no need of tensors to find out
            [(name, attention)] = candidates.items()
            return DenseKernel(name, attention, {})
        shape = (1, grid.tokens + self._host.text_len, self._shape.heads, self._shape.head_dim)
        if reason := memory_obstacle(4 * math.prod(shape) * dtype.itemsize, device):
            raise CannotRun(reason)
        query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
        return fastest_dense(query, key, value, max_seconds=self._settings.max_seconds, flop_per_second=rate)

    def _flop(self, grid: Grid, pairs: float) -> float:
        """Floating-point operations of a step, roughly."""
        attention = 4.0 * pairs * self._shape.width * self._shape.layers
        return self._shape.linear_flop(grid.tokens, self._text) + attention

    def _activation_bytes(self, grid: Grid) -> int:
        """Memory of a step's activations, roughly: at the widest point a single block holds the joint sequence in
        about 15 times its width: itself, its norm, query, key, value, output, and 4 times as much for feed-forward,
        twice."""
        return 15 * (grid.tokens + self._host.text_len) * self._shape.width * self._host.dtype.itemsize

    def _title(self, grid: Grid) -> str:
        *frames, rows, columns = grid.shape
        side = self._model.token_side
        # A video's first frame has a latent of its own.
        unit = self._model.video.frames_per_latent if self._model.video else 1
        video = f"{(frames[0] - 1) * unit + 1} frames of " if frames else ""
        return f"{size_text(grid.shape)} tokens, {video}{columns * side}x{rows * side} pixels"


class _Watched:
    """Calls a transformer with an attention attached, and keeps what each call took."""

    def __init__(
        self,
        transformer: Any,
        inputs: Mapping[str, Any],
        attach: Attach,
        device: torch.device,
    ) -> None:
        self._transformer, self._inputs, self._attach = transformer, inputs, attach
        self._recorder, self._calls = StepRecorder(device), 0

    def __call__(self) -> torch.Tensor:
        # Every call counts as a step of its own, so that the recorder keeps them apart.
        number = self._calls
        self._calls += 1
        with self._attach(self._recorder, lambda: number):
            return self._transformer(**self._inputs)[0]

    def last(self, count: int) -> list[tuple[float, float]]:
        """Milliseconds of the last calls, and of the attention in them; those before were warm-up."""
        steps = self._recorder.steps(range(self._calls))
        return [(step.total_ms, step.attention_ms) for step in steps[len(steps) - count :]]


def _refuse_not_finite(prediction: object) -> None:
    """Raises NotFinite if a prediction has NaN or infinities: there is something wrong with it then."""
    if not bool(torch.as_tensor(prediction).isfinite().all()):
        tensor = torch.as_tensor(prediction)
        raise NotFinite(f"its prediction is not finite: {steadier(tensor.dtype, 'another --backend')}")


def _row(variant: Variant, **values: Any) -> Row:
    return Row(variant.name, variant.role, variant.description, **values)


def _measured_row(
    variant: Variant, inside: Inside, measurement: Measurement, times: Sequence[tuple[float, float]], full: Row | None
) -> Row:
    """The row of a variant that was called.

    Args:
        variant: which.
        inside: what ran.
        measurement: its memory, or why it was skipped.
        times: milliseconds of each call, and of the attention in it.
        full: the row of full attention; None for that row itself.
    """
    known: dict[str, Any] = {"density": inside.density, "reach_tokens": variant.reach()}
    if inside.work is not None:
        known["work"] = inside.work._asdict()
    if measurement.skipped is not None:
        return _row(variant, **known, skipped=measurement.skipped, not_finite=measurement.not_finite)
    total_ms = statistics.median(total for total, _ in times)
    attention_ms = statistics.median(attention for _, attention in times)
    speedup = efficiency = None
    if full is None:
        speedup = 1.0
    elif full.median_ms is not None and full.attention_ms is not None:
        speedup, efficiency = full.median_ms / total_ms, full.attention_ms * inside.density / attention_ms
    return _row(
        variant,
        **known,
        kernel=inside.kernel,
        times_ms=tuple(total for total, _ in times),
        attention_ms=attention_ms,
        speedup=speedup,
        sparse_efficiency=efficiency,
        peak_memory_bytes=measurement.peak_memory_bytes,
    )
