"""Figures and words of a benchmark as people read them: what the terminal, Markdown and HTML outputs share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grat_cli.bench.results import BenchResult, Case, Level, Row

NOTHING = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+")
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


def plain(text: object) -> str:
    """Text in one line, without characters that steer terminals or that XML forbids."""
    return _CONTROL.sub(" ", str(text))


def shortened(text: str, length: int) -> str:
    """Text of at most so many characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def figure(value: float, digits: int = 3) -> str:
    """A number with so many significant digits: `0.0123`, `1.50`, `72.4`, `1,073`, `2.1·10⁻⁵`."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "not finite"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        exponent = math.floor(math.log10(abs(value)))
        return f"{value / 10**exponent:.{max(0, digits - 2)}f}·10{str(exponent).translate(_SUPERSCRIPT)}"
    return f"{value:,.{decimals(value, digits)}f}"


def decimals(value: float, digits: int = 3) -> int:
    """Digits after the decimal point that make so many significant ones."""
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}")))))


def density_text(density: float) -> str:
    """A density: three significant digits however small, and `1` for everything."""
    return "1" if density == 1 else f"{density:.{min(6, decimals(density))}f}"


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
    unit = time_unit(case)
    full = full_of(case)

    def of_attention(row: Row) -> str | None:
        """Speed-up of the attention part."""
        if full is None or not full.attention_ms or not row.attention_ms:
            return None
        return speedup_text(full.attention_ms / row.attention_ms)

    density = _column(
        "density",
        None,
        lambda row: _text(row.density, density_text),
        True,
        "Share of all query–key pairs that is attended, text included.",
    )
    ideal = _column(
        "1/density",
        None,
        lambda row: _text(row.ideal_speedup, speedup_text),
        False,
        "The speed-up of attention that this density allows at most.",
    )
    extent = _column(
        "min–max",
        unit.name,
        lambda row: unit.range(row.times_ms) if row.times_ms else None,
        False,
        "Shortest and longest repetition.",
    )
    speedup = _column(
        "speed-up",
        None,
        lambda row: _text(row.speedup, speedup_text),
        True,
        "Median time of full attention over that of the row.",
    )
    share = _column(
        "share" if level == "step" else "attention share",
        None,
        lambda row: _text(row.attention_share, _percent),
        False,
        "Share of the step that is attention." if level == "step" else "Share of denoising that is attention.",
    )
    efficiency = _column(
        "sparse efficiency",
        None,
        lambda row: _text(row.sparse_efficiency, "{:,.2f}".format),
        True,
        "Speed-up of attention × density: 1 means that every attended pair is computed as fast as by the kernel of "
        "full attention.",
    )
    memory = _column(
        "peak memory",
        "GiB",
        lambda row: _text(row.peak_memory_bytes, lambda count: f"{count / 2**30:,.2f}"),
        False,
        "Most memory held at once, inputs and outputs included.",
    )
    if level == "attention":
        made = [
            density,
            ideal,
            _column("time", unit.name, _time(unit), True, "Median of all repetitions of one attention call."),
            extent,
            speedup,
            efficiency,
            _column(
                "TFLOP/s",
                None,
                lambda row: _text(row.tflops, figure),
                False,
                "Floating-point operations on attended pairs alone, per second.",
            ),
            _column(
                "per pair",
                "ns",
                lambda row: _text(row.pair_ns, figure),
                False,
                "Median time over attended query–key pairs of all heads: it compares rows of unequal density.",
            ),
            _column(
                "of peak",
                None,
                lambda row: _text(row.peak_share, _percent),
                False,
                "That rate over the peak of the device in this dtype.",
            ),
            _column(
                "reach",
                "tokens",
                lambda row: _text(row.reach_tokens, "{:,.0f}".format),
                False,
                "Farthest token on the grid that a query attends exactly.",
            ),
            memory,
            _column(
                "error",
                None,
                lambda row: _text(row.error, _scientific),
                False,
                "Largest error on sampled rows against the same attention in full precision.",
            ),
            _column(
                "over rounding",
                None,
                _over_rounding,
                False,
                "That error over the error of a plain computation in the dtype of the tensors: what rounding alone "
                "explains is 1×.",
            ),
        ]
    elif level == "step":
        made = [
            density,
            _column("step", unit.name, _time(unit), True, "Median time of one whole denoising step."),
            extent,
            _column(
                "attention",
                unit.name,
                lambda row: _text(row.attention_ms, unit.number),
                True,
                "The part of the step that is attention.",
            ),
            share,
            speedup,
            _column("attention speed-up", None, of_attention, False, "Speed-up of the attention part alone."),
            ideal,
            efficiency,
            memory,
        ]
    else:
        noun = OUTPUTS[level]
        frames = " Of a video it is the mean over its frames." if level == "video" else ""
        reference = f"the {noun}s of full attention with the same seeds"
        if level == "highres":
            reference = "the pictures of the trained size with the same seeds, after scaling down to that"
        made = [
            density,
            _column("denoising", unit.name, _time(unit), True, f"Median time of all denoising steps of a {noun}."),
            extent,
            *([share] if level == "video" else []),
            speedup,
            _column(
                "recall",
                None,
                lambda row: row.fidelity and _with_interval(row.fidelity.recall, row.fidelity.recall_interval, 3),
                True,
                "Softmax mass of full attention on what the variant attends token by token, text included: mean over "
                "sampled queries, heads, layers and steps; ± is a 95 % interval of the mean over prompts.",
            ),
            _column(
                "output error",
                None,
                lambda row: row.fidelity and figure(row.fidelity.output_error),
                True,
                "Distance of the attention's output from that of full attention, given the same inputs, over the "
                "length of the latter: root mean square. Unlike recall, it counts what summaries give back.",
            ),
            _column(
                "SSIM",
                None,
                lambda row: row.quality and _with_interval(row.quality.ssim, row.quality.ssim_interval, 3),
                True,
                f"Similarity to {reference}, 1 for equal ones; ± is a 95 % interval of the mean.{frames}",
            ),
            _column(
                "PSNR",
                "dB",
                lambda row: row.quality and _with_interval(row.quality.psnr_db, row.quality.psnr_interval_db, 1),
                False,
                "The same comparison as a ratio of signal to noise; in equal ones one value counts as off by 1.",
            ),
            _column(
                "LPIPS",
                None,
                lambda row: row.quality and _text(row.quality.lpips, "{:.3f}".format),
                False,
                "Perceptual distance (arXiv 1801.03924, AlexNet), 0 for equal ones.",
            ),
            _column(
                "motion",
                None,
                lambda row: row.quality and _text(row.quality.motion, "{:,.2f}×".format),
                False,
                "Mean absolute difference of successive frames, over that of full attention's video: 1 is as much "
                "change. Flicker raises it too.",
            ),
            memory,
        ]
    made = [column(rows) for column in made]
    return [column for column in made if any(cell is not None for cell in column.cells)]


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


def _column(
    title: str, unit: str | None, cell: Callable[[Row], str | None], essential: bool, meaning: str
) -> Callable[[Sequence[Row]], Column]:
    def fill(rows: Sequence[Row]) -> Column:
        cells = tuple(None if row.skipped is not None else cell(row) for row in rows)
        return Column(title, unit, cells, essential, meaning)

    return fill


def _text(value: Any, form: Callable[[Any], str]) -> str | None:
    return None if value is None else form(value)


def _time(unit: TimeUnit) -> Callable[[Row], str | None]:
    return lambda row: _text(row.median_ms, unit.number)


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
