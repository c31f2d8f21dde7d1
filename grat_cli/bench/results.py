"""What a benchmark found, as plain data: schema `grat.bench/1`, written by every level and read by every output."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from grat_cli.fidelity.quality import Quality
from grat_cli.fidelity.variants import Role

SCHEMA = "grat.bench/1"

Level = Literal["attention", "step", "image", "video", "highres"]
# Levels of whole runs, which are not only timed but whose outputs are compared.
WHOLE_RUNS: tuple[Level, ...] = ("image", "video", "highres")
Mask = Literal["identical", "equal density"]


@dataclass(frozen=True)
class Fidelity:
    """What a variant keeps of full attention, given the same queries, keys and values: mean over sampled queries of all
    heads, layers and prompts, and over the steps of a run.

    Attributes:
        recall: softmax mass of full attention on what is attended token by token, text included.
        recall_interval: 95 % half-interval of its mean over prompts; None of a single prompt.
        output_error: distance of the output from that of full attention over the latter's length, root mean square.
            Unlike recall, it counts what summaries give back.
    """

    recall: float
    recall_interval: float | None
    output_error: float


@dataclass(frozen=True)
class Row:
    """One variant in one case. Figures that a level does not have, or that were not measured, are None.

    Attributes:
        name: as typed in `--compare` or `--peers`, such as `grat-b`.
        role: what the row is there for.
        description: the pattern in words.
        kernel: what computed it, such as `sdpa` or `cuDNN`; None where nothing ran.
        mask: for peers, how their mask relates to the pattern they stand beside.
        density: attended pairs over all pairs of the joint sequence.
        reach_tokens: farthest token that a query attends exactly, or may choose to, in tokens on the grid.
        times_ms: every repetition: of one attention call, one denoising step or one whole denoising run.
        speedup: median time of full over that of this row.
        sparse_efficiency: speed-up times density; 1 is the whole ideal speed-up. Attention level, or the attention
            part of a step.
        tflops: TFLOP/s over attended pairs, median.
        pair_ns: nanoseconds for each attended query-key pair of a head, median, by which rows of unequal density
            compare. Attention level.
        peak_share: `tflops` over the device's peak for this dtype.
        peak_memory_bytes: of one call, inputs and output included.
        error: largest error over sampled rows against attention in full precision.
        plain_error: the same for a plain computation in the dtype of the tensors: what rounding alone explains.
        attention_ms: part of `median_ms` in attention, where a step holds more.
        step_times_ms: time of each denoising step of a whole run, median over pictures or videos.
        quality: of pictures or videos.
        fidelity: of attention inside the model, in whole runs.
        preset: whose attention and schedule the row ran; None for other variants.
        cache: what steps took over from those before them; None for nothing.
        steps_computed: with a cache, or attention that is carried over steps, steps of a run in which all of it was
            computed, mean.
        work: attended pairs by part, over all pairs, as `grat_kernels.plan.Parts` has them; None where they are not
            those of plans, or a cache took over some.
        skipped: why there are no figures, in words; None where there are.
        not_finite: whether it was skipped because NaN or infinities came of it, or nothing but one colour.
    """

    name: str
    role: Role
    description: str
    kernel: str | None = None
    mask: Mask | None = None
    density: float | None = None
    reach_tokens: float | None = None
    times_ms: tuple[float, ...] = ()
    speedup: float | None = None
    sparse_efficiency: float | None = None
    tflops: float | None = None
    pair_ns: float | None = None
    peak_share: float | None = None
    peak_memory_bytes: int | None = None
    error: float | None = None
    plain_error: float | None = None
    attention_ms: float | None = None
    step_times_ms: tuple[float, ...] = ()
    quality: Quality | None = None
    fidelity: Fidelity | None = None
    preset: Mapping[str, Any] | None = None
    cache: Mapping[str, Any] | None = None
    steps_computed: float | None = None
    work: Mapping[str, float] | None = None
    skipped: str | None = None
    not_finite: bool = False

    @property
    def median_ms(self) -> float | None:
        """Median over the repetitions."""
        return statistics.median(self.times_ms) if self.times_ms else None

    @property
    def ideal_speedup(self) -> float | None:
        """1 / density."""
        return 1 / self.density if self.density else None

    @property
    def attention_share(self) -> float | None:
        """Share of a step that is attention."""
        return self.attention_ms / self.median_ms if self.attention_ms is not None and self.median_ms else None


@dataclass(frozen=True)
class Case:
    """The rows of one size.

    Attributes:
        title: for people, such as `2048x2048 pixels` or `33x45x80 tokens`.
        grid: image tokens per axis.
        text_len: text tokens of the joint sequence.
        rows: full first.
    """

    title: str
    grid: tuple[int, ...]
    text_len: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Absent:
    """A peer that was asked for and is not here: never a slow row."""

    name: str
    reason: str


@dataclass(frozen=True)
class BenchResult:
    """A whole benchmark.

    Attributes:
        settings: what else the figures depend on: heads, head dimension, layers, repetitions, model, prompts.
        contact_sheet: file name of the pictures side by side, beside the other outputs; None without pictures.
    """

    level: Level
    created: str
    command: str
    device: str
    device_name: str
    dtype: str
    versions: Mapping[str, str | None]
    settings: Mapping[str, Any]
    cases: tuple[Case, ...]
    absent: tuple[Absent, ...] = ()
    notes: tuple[str, ...] = ()
    contact_sheet: str | None = None
    schema: str = field(default=SCHEMA)

    def as_dict(self) -> dict[str, Any]:
        """The result as plain data; each row also carries the figures that follow from its times."""
        data = asdict(self)
        for case, plain in zip(self.cases, data["cases"], strict=True):
            for row, values in zip(case.rows, plain["rows"], strict=True):
                values |= {
                    "median_ms": row.median_ms,
                    "min_ms": min(row.times_ms, default=None),
                    "max_ms": max(row.times_ms, default=None),
                    "ideal_speedup": row.ideal_speedup,
                    "attention_share": row.attention_share,
                }
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BenchResult:
        """The result that `as_dict` wrote.

        Raises:
            ValueError: if the schema is another one.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}, not {data.get('schema')!r}")
        cases = tuple(
            Case(case["title"], tuple(case["grid"]), case["text_len"], tuple(_row(row) for row in case["rows"]))
            for case in data["cases"]
        )
        known = _known(cls, data)
        known |= {"cases": cases, "absent": tuple(Absent(**absent) for absent in data["absent"])}
        known["notes"] = tuple(data["notes"])
        return cls(**known)

    @classmethod
    def from_json(cls, text: str) -> BenchResult:
        """The result in the text of a JSON file."""
        return cls.from_dict(json.loads(text))


def _row(values: Mapping[str, Any]) -> Row:
    known = _known(Row, values)
    quality, fidelity = values.get("quality"), values.get("fidelity")
    return Row(
        **known
        | {
            "times_ms": tuple(values.get("times_ms", ())),
            "step_times_ms": tuple(values.get("step_times_ms", ())),
            "quality": Quality(**quality) if quality else None,
            "fidelity": Fidelity(**fidelity) if fidelity else None,
        }
    )


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are fields: derived figures are not stored twice."""
    names: Sequence[str] = [item.name for item in fields(cls)]
    return {name: values[name] for name in names if name in values}
