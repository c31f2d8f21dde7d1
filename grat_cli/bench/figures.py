"""Figures and words of a benchmark as people read them: what the terminal, Markdown and HTML outputs share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grat_cli.bench.results import BenchResult, Case, Level, Row
from grat_cli.pages.html import plain
from grat_cli.pages.numbers import decimals, density_text, figure

NOTHING = "–"
_SUBJECTS: Mapping[Level, str] = {
    "attention": "Attention",
    "step": "Denoising step",
    "image": "Pictures",
    "video": "Videos",
    "highres": "High resolution",
}
OUTPUTS: Mapping[Level, str] = {"image": "picture", "video": "video", "highres": "picture"}


@dataclass(frozen=True)
class Column:
    """One column of figures of one case.

    Attributes:
        title: for people.
        unit: of all its figures; None where they have none or carry it.
        cells: one per row of the case, None where the row has no such figure.
        essential: shown first where there is little room.
        meaning: what the figure is, in a sentence.
    """

    title: str
    unit: str | None
    cells: tuple[str | None, ...]
    essential: bool
    meaning: str

    @property
    def heading(self) -> str:
        """Title and unit in one line."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def padding(self) -> tuple[int, ...]:
        """Characters to add behind each cell so that decimal points stand below one another.

        All zero where the cells are not plain figures, such as ranges.
        """
        shown = [cell for cell in self.cells if cell is not None]
        if not all(re.fullmatch(r"[\d,]+(\.\d+)?[×%]?", cell) for cell in shown):
            return (0,) * len(self.cells)
        behind = [_behind_integer(cell) if cell is not None else 0 for cell in self.cells]
        return tuple(
            max(behind) - here if cell is not None else 0 for here, cell in zip(behind, self.cells, strict=True)
        )


def speedup_text(speedup: float) -> str:
    """A speed-up, such as `72.4×`."""
    return f"{figure(speedup)}×"


@dataclass(frozen=True)
class TimeUnit:
    """The unit in which all times of one case are given, so that they compare at a glance."""

    name: str
    milliseconds: float

    def number(self, milliseconds: float) -> str:
        """The time without its unit."""
        value = milliseconds / self.milliseconds
        return f"{value:,.{min(5, decimals(value))}f}" if math.isfinite(value) else figure(value)

    def text(self, milliseconds: float) -> str:
        """The time with its unit."""
        return f"{self.number(milliseconds)} {self.name}"

    def range(self, times_ms: Sequence[float]) -> str:
        """Shortest and longest, with the digits of the median."""
        places = min(5, decimals(sorted(times_ms)[len(times_ms) // 2] / self.milliseconds))
        low, high = (f"{bound / self.milliseconds:,.{places}f}" for bound in (min(times_ms), max(times_ms)))
        return f"{low}–{high}"


MILLISECONDS = TimeUnit("ms", 1.0)
SECONDS = TimeUnit("s", 1000.0)


def time_unit(case: Case) -> TimeUnit:
    """Milliseconds, or seconds where everything takes long."""
    times = [time for row in case.rows for time in (row.median_ms, row.attention_ms) if time is not None]
    if not times:
        return MILLISECONDS
    return SECONDS if min(times) >= 1000 or (max(times) >= 10_000 and min(times) >= 100) else MILLISECONDS


def ordered(case: Case) -> tuple[Row, ...]:
    """The rows, full first."""
    return tuple(sorted(case.rows, key=lambda row: row.role != "full"))


def measured(case: Case) -> tuple[Row, ...]:
    """The rows with figures, full first."""
    return tuple(row for row in ordered(case) if row.skipped is None)


def full_of(case: Case) -> Row | None:
    """Full attention, where it was measured."""
    return next((row for row in measured(case) if row.role == "full"), None)


def label(row: Row) -> str:
    """The name; full attention with the kernel that stands for it."""
    name = plain(row.name)
    return f"{name} ({plain(row.kernel)})" if row.role == "full" and row.kernel else name


def remark(row: Row) -> str | None:
    """What a reader must know beside the name: how a peer's mask relates, or that a row is the noise floor."""
    if row.mask is not None:
        return "identical mask" if row.mask == "identical" else "equal density"
    return "noise floor" if row.role == "noise floor" else None


def descriptions(result: BenchResult) -> dict[str, str]:
    """What each name stands for, with the kernels that computed it and how a peer's mask relates."""
    found: dict[str, dict[str, None]] = {}
    for case in result.cases:
        for row in ordered(case):
            parts = (row.description, remark(row), f"computed by {row.kernel}" if row.kernel else None)
            found.setdefault(row.name, {}).update(dict.fromkeys(plain(part) for part in parts if part))
    return {plain(name): "; ".join(parts) for name, parts in found.items() if parts}


def columns(level: Level, case: Case, rows: Sequence[Row]) -> list[Column]:
    """The columns for a case at this level; those without a single figure are left out."""
    noun = OUTPUTS.get(level, "")
    reference = f"the {noun}s of full attention with the same seeds"
    if level == "highres":
        reference = "the pictures of the trained size with the same seeds, after scaling down to that"
    frames = " Of a video it is the mean over its frames." if level == "video" else ""
    cells = _cells(case)
    made = []
    for name in _COLUMNS[level]:
        unit, cell = cells[name]
        shown = tuple(None if row.skipped is not None else cell(row) for row in rows)
        if any(text is not None for text in shown):
            meaning = _MEANINGS[name].format(noun=noun, reference=reference, frames=frames)
            made.append(Column(name, unit, shown, name in _ESSENTIAL, meaning))
    return made


_OF_WORK = {"pairs": "pairs", "text rows": "text", "selection": "selection", "forming": "forming"}
_OF_RUNS = ("recall", "output error", "SSIM", "PSNR", "LPIPS", "motion", "peak memory")
_COLUMNS: Mapping[Level, Sequence[str]] = {
    "attention": (
        *("density", *_OF_WORK, "1/density", "time", "min–max", "speed-up", "sparse efficiency", "TFLOP/s", "per pair"),
        *("of peak", "reach", "peak memory", "error", "over rounding"),
    ),
    "step": (
        *("density", *_OF_WORK, "step", "min–max", "attention", "share", "speed-up", "attention speed-up", "1/density"),
        *("sparse efficiency", "peak memory"),
    ),
    "image": ("density", *_OF_WORK, "computed", "denoising", "min–max", "speed-up", *_OF_RUNS),
    "video": ("density", *_OF_WORK, "computed", "denoising", "min–max", "attention share", "speed-up", *_OF_RUNS),
    "highres": ("density", "denoising", "min–max", "speed-up", *_OF_RUNS),
}
_ESSENTIAL = {
    *("density", "time", "step", "denoising", "attention", "speed-up", "sparse efficiency"),
    *("recall", "output error", "SSIM"),
}
_MEANINGS = {
    "density": "Share of all query–key pairs that is attended, text included; where steps take over some, of those of "
    "all steps.",
    "pairs": "The part of the density that image tokens attend, mean over a run.",
    "text rows": "The part that text attends.",
    "selection": "The part that choosing by content costs.",
    "forming": "What forming the means costs beside the density, as a share of the same pairs.",
    "computed": "Steps that took over no attention from those before, mean over the {noun}s.",
    "1/density": "The speed-up of attention that this density allows at most.",
    "time": "Median of all repetitions of one attention call.",
    "step": "Median time of one whole denoising step.",
    "denoising": "Median time of all denoising steps of a {noun}.",
    "min–max": "Shortest and longest repetition.",
    "attention": "The part of the step that is attention.",
    "share": "Share of the step that is attention.",
    "attention share": "Share of denoising that is attention.",
    "speed-up": "Median time of full attention over that of the row.",
    "attention speed-up": "Speed-up of the attention part alone.",
    "sparse efficiency": "Speed-up of attention × density: 1 means that every attended pair is computed as fast as by "
    "the kernel of full attention.",
    "TFLOP/s": "Floating-point operations on attended pairs alone, per second.",
    "per pair": "Median time over attended query–key pairs of all heads: it compares rows of unequal density.",
    "of peak": "That rate over the peak of the device in this dtype.",
    "reach": "Farthest token on the grid that a query attends exactly, or may choose to.",
    "peak memory": "Most memory held at once, inputs and outputs included.",
    "error": "Largest error on sampled rows against the same attention in full precision.",
    "over rounding": "That error over the error of a plain computation in the dtype of the tensors: what rounding "
    "alone explains is 1×.",
    "recall": "Softmax mass of full attention on what the variant attends token by token, text included: mean over "
    "sampled queries, heads, layers and steps; ± is a 95 % interval of the mean over prompts.",
    "output error": "Distance of the attention's output from that of full attention, given the same inputs, over the "
    "length of the latter: root mean square. Unlike recall, it counts what summaries give back.",
    "SSIM": "Similarity to {reference}, 1 for equal ones; ± is a 95 % interval of the mean.{frames}",
    "PSNR": "The same comparison as a ratio of signal to noise; in equal ones one value counts as off by 1.",
    "LPIPS": "Perceptual distance (arXiv 1801.03924, AlexNet), 0 for equal ones.",
    "motion": "Mean absolute difference of successive frames, over that of full attention's video: 1 is as much "
    "change. Flicker raises it too.",
}


def _cells(case: Case) -> dict[str, tuple[str | None, Callable[[Row], str | None]]]:
    """Unit of each column, and how it writes the figure of a row, None where the row has none."""
    unit, full = time_unit(case), full_of(case)

    def of(name: str, form: Callable[[Any], str]) -> Callable[[Row], str | None]:
        """A row's figure; `quality.ssim` is one of its parts."""

        def cell(row: Row) -> str | None:
            value: Any = row
            for part in name.split("."):
                value = getattr(value, part, None)
            return None if value is None else form(value)

        return cell

    def of_attention(row: Row) -> str | None:
        """Speed-up of the attention part."""
        if full is None or not full.attention_ms or not row.attention_ms:
            return None
        return speedup_text(full.attention_ms / row.attention_ms)

    return {
        "density": (None, of("density", density_text)),
        **{name: (None, _part(case, part)) for name, part in _OF_WORK.items()},
        "computed": ("steps", of("steps_computed", "{:,.1f}".format)),
        "1/density": (None, of("ideal_speedup", speedup_text)),
        **{name: (unit.name, of("median_ms", unit.number)) for name in ("time", "step", "denoising")},
        "min–max": (unit.name, lambda row: unit.range(row.times_ms) if row.times_ms else None),
        "attention": (unit.name, of("attention_ms", unit.number)),
        **{name: (None, of("attention_share", _percent)) for name in ("share", "attention share")},
        "speed-up": (None, of("speedup", speedup_text)),
        "attention speed-up": (None, of_attention),
        "sparse efficiency": (None, of("sparse_efficiency", "{:,.2f}".format)),
        "TFLOP/s": (None, of("tflops", figure)),
        "per pair": ("ns", of("pair_ns", figure)),
        "of peak": (None, of("peak_share", _percent)),
        "reach": ("tokens", of("reach_tokens", "{:,.0f}".format)),
        "peak memory": ("GiB", of("peak_memory_bytes", lambda count: f"{count / 2**30:,.2f}")),
        "error": (None, of("error", _scientific)),
        "over rounding": (None, _over_rounding),
        "recall": (None, of("fidelity", lambda made: _with_interval(made.recall, made.recall_interval, 3))),
        "output error": (None, of("fidelity.output_error", figure)),
        "SSIM": (None, of("quality", lambda made: _with_interval(made.ssim, made.ssim_interval, 3))),
        "PSNR": ("dB", of("quality", lambda made: _with_interval(made.psnr_db, made.psnr_interval_db, 1))),
        "LPIPS": (None, of("quality.lpips", "{:.3f}".format)),
        "motion": (None, of("quality.motion", "{:,.2f}×".format)),
    }


def _part(case: Case, part: str) -> Callable[[Row], str | None]:
    """A part of a row's work, in cases of which some row chooses by content."""
    chooses = any(row.work and row.work["selection"] for row in case.rows)

    def cell(row: Row) -> str | None:
        return density_text(row.work[part]) if chooses and row.work else None

    return cell


def title(result: BenchResult) -> str:
    """What was measured, on what: `Attention on NVIDIA H200`."""
    return f"{_SUBJECTS[result.level]} on {plain(result.device_name)}"


def tokens_text(case: Case) -> str:
    """The sequence: `512×512 image + 512 text = 262,656 tokens`; nothing without a grid."""
    if not case.grid:
        return ""
    image = math.prod(case.grid)
    shape = "×".join(f"{extent:,}" for extent in case.grid)
    if not case.text_len:
        return f"{shape} = {image:,} tokens" if len(case.grid) > 1 else f"{image:,} tokens"
    return f"{shape} image + {case.text_len:,} text = {image + case.text_len:,} tokens"


def conditions(result: BenchResult) -> dict[str, str]:
    """Everything that the figures depend on, for people."""
    known = {name: version for name, version in result.versions.items() if version}
    facts = {
        "device": f"{plain(result.device_name)} ({plain(result.device)})",
        "dtype": plain(result.dtype),
        "sizes": "; ".join(plain(case.title) for case in result.cases),
        **{plain(name).replace("_", " "): setting_text(value) for name, value in result.settings.items()},
        "versions": ", ".join(f"{plain(name)} {plain(version)}" for name, version in known.items()),
        "date": plain(result.created).replace("T", " "),
        "command": plain(result.command),
    }
    return {name: value for name, value in facts.items() if value}


def setting_text(value: Any) -> str:
    """A setting as people write it; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(name)} {setting_text(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        mark = "; " if any(isinstance(item, str) for item in value) else ", "
        return mark.join(setting_text(item) for item in value)
    return plain(value)


def finding(level: Level, case: Case) -> str:
    """The case in a sentence: what the fastest pattern brings over full attention."""
    if level == "highres":
        return _coherence(case)
    full = full_of(case)
    if full is None or full.median_ms is None:
        return "Full attention was not measured, so there is no speed-up to state."
    patterns = [row for row in measured(case) if row.role == "pattern" and row.speedup and row.median_ms]
    unit = time_unit(case)
    kernel = f" ({plain(full.kernel)})" if full.kernel else ""
    whole = f"Full attention{kernel} takes {unit.text(full.median_ms)}"
    if not patterns:
        return f"{whole}; no pattern was measured beside it."
    best = max(patterns, key=lambda row: row.speedup or 0)
    assert best.speedup is not None
    assert best.median_ms is not None
    taken = f"{plain(best.name)} {unit.text(best.median_ms)}"
    if best.speedup <= 1:
        return f"{whole}, and no pattern is faster: the fastest, {taken}, is {speedup_text(best.speedup)} as fast."
    parts = [f"{whole}, {taken}: a speed-up of {speedup_text(best.speedup)}"]
    if best.density is not None:
        parts.append(f"at density {density_text(best.density)}")
    if best.quality is not None:
        parts.append(f"with SSIM {_with_interval(best.quality.ssim, best.quality.ssim_interval, 3)}")
    elif best.sparse_efficiency is not None:
        where = " in attention" if level == "step" else ""
        parts.append(f"with a sparse efficiency of {best.sparse_efficiency:.2f}{where}")
    return " ".join(parts) + "."


def _coherence(case: Case) -> str:
    """How far the large pictures show what those of the trained size do."""
    shown = [
        f"{plain(row.name)} {_with_interval(row.quality.ssim, row.quality.ssim_interval, 3)}"
        for row in sorted(measured(case), key=lambda row: -row.quality.ssim if row.quality else 0)
        if row.quality is not None
    ]
    return f"Scaled down to the trained size, SSIM to the base: {', '.join(shown)}." if shown else "Nothing was made."


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f}%"


def _scientific(value: float) -> str:
    """`3.1e-3`."""
    if not math.isfinite(value):
        return figure(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _over_rounding(row: Row) -> str | None:
    if row.error is None or not row.plain_error or not math.isfinite(row.error / row.plain_error):
        return None
    return f"{row.error / row.plain_error:,.2f}×"


def _with_interval(value: float, interval: float | None, places: int) -> str:
    """`0.897 ± 0.015`; without an interval where there is none, as with a single picture."""
    return f"{value:.{places}f}" + (f" ± {interval:.{places}f}" if interval is not None else "")


def _behind_integer(cell: str) -> int:
    return len(cell) - len(re.match(r"[\d,]+", cell)[0])  # type: ignore[index]
