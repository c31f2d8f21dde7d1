"""Whether a run fits a device, and what would make it fit: flags to type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from grat_cli.components import Components
from grat_cli.errors import GratError, OutOfMemory
from grat_cli.hardware import Device
from grat_cli.memory_estimate import Execution, Pixels, RunMemory, run_memory
from grat_cli.models import ModelChoice
from grat_cli.output import bytes_text
from grat_cli.planning import Forecast, forecast
from grat_cli.resolution import Resolution

# Feed-forward in chunks of so many tokens where the usual ones are too large.
_SMALL_CHUNK = 4096


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a device.

    Attributes:
        device: which.
        memory: what the run needs by phase.
        needed: bytes at its peak, with what is not tensors.
        advice: flags that would make it fit, where it does not; None where nothing was found.
    """

    device: Device
    memory: RunMemory
    needed: float
    advice: str | None = None

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.needed <= self.device.memory

    @property
    def sentence(self) -> str:
        """The verdict in a line."""
        if self.fits:
            free = bytes_text(self.device.memory - self.needed)
            return f"fits {self.device.title}: {free} of {self._memory} left"
        largest = self.memory.largest
        return f"does not fit {self.device.title}: {largest.phase} needs {bytes_text(self.needed)} of {self._memory}"

    @property
    def _memory(self) -> str:
        return bytes_text(self.device.memory) + (" free" if self.device.present else "")

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "device": self.device.name,
            "device_memory_bytes": self.device.memory,
            "needed_bytes": round(self.needed),
            "fits": self.fits,
            "advice": self.advice,
        }


def needs(expected: Forecast, components: Components, execution: Execution) -> RunMemory:
    """What a run needs by phase."""
    return run_memory(
        components,
        Pixels.of(expected.size),
        expected.schedule.plans,
        execution,
        guided_twice=expected.architecture.calls_per_step(expected.preset.sampling.guidance) == 2,
    )


def judge(
    expected: Forecast, components: Components, execution: Execution, device: Device, *, advise: bool = True
) -> Verdict:
    """Whether a run fits a device; where it does not and `advise` is set, with the nearest thing that does."""
    memory = needs(expected, components, execution)
    verdict = Verdict(device, memory, device.with_overhead(memory.peak))
    return verdict if verdict.fits or not advise else replace(verdict, advice=_advice(expected, components, execution, device))


def refuse_unfit(verdict: Verdict) -> None:
    """Raises OutOfMemory unless a run fits, with what to type instead."""
    if not verdict.fits:
        advice = verdict.advice or "no flag makes it fit: use a larger GPU"
        raise OutOfMemory(f"{verdict.sentence}\n{advice}")


def _advice(expected: Forecast, components: Components, execution: Execution, device: Device) -> str | None:
    def fits(at: Forecast, how: Execution) -> bool:
        return device.with_overhead(needs(at, components, how).peak) <= device.memory

    for flags, how in _alternatives(execution):
        if fits(expected, how):
            return f"try {flags}"
    # The smaller sizes, as they are and with whatever else helps.
    for size in _smaller(expected):
        try:
            at = forecast(expected.preset, expected.model, expected.architecture, size, expected.dtype)
        except GratError:  # groups that are larger than so small a picture, for example
            return None
        if fits(at, execution):
            return f"try --res {size}"
        for flags, how in _alternatives(execution):
            if fits(at, how):
                return f"try --res {size} {flags}"
    return None


def _alternatives(execution: Execution) -> Iterator[tuple[str, Execution]]:
    """Other ways to run, those that cost least time first."""
    chunks = []
    if execution.chunk_tokens is None:
        chunks.append(("--set memory.chunk_tokens=auto", "auto"))
    chunks.append((f"--set memory.chunk_tokens={_SMALL_CHUNK}", _SMALL_CHUNK))
    for flags, tokens in chunks:
        yield flags, replace(execution, chunk_tokens=tokens)
    if execution.on_cpu:
        return
    # Moving whole parts costs seconds a run; the weights of every step cost more, and one layer at a time the most.
    ways = (
        ("model", execution.quantize),
        ("none", "int8"),
        ("model", "int8"),
        ("group", "none"),
        ("none", "nf4"),
        ("model", "nf4"),
        ("sequential", "none"),
    )
    for chunk_flags, chunk_tokens in (("", execution.chunk_tokens), *chunks[-1:]):
        for offload, quantize in ways:
            if (offload, quantize) == (execution.offload, execution.quantize):
                continue
            flags = [f"--offload {offload}"] if offload != "none" else []
            flags += [f"--quantize {quantize}"] if quantize != "none" else []
            flags += [chunk_flags] if chunk_flags else []
            yield " ".join(flags), replace(execution, offload=offload, quantize=quantize, chunk_tokens=chunk_tokens)


def _smaller(expected: Forecast) -> Iterator[Any]:
    """The same shape at three quarters, half, three eighths and so on of its side."""
    unit = max(16, expected.architecture.token_side)
    size = expected.size
    for eighths in (6, 4, 3, 2, 1):
        width, height = (side * eighths // (8 * unit) * unit for side in (size.width, size.height))
        if min(width, height) >= 8 * unit:
            yield Resolution(width, height) if isinstance(size, Resolution) else replace(size, width=width, height=height)


def execution_of(
    choice: ModelChoice,
    expected: Forecast,
    device: Device,
    *,
    offload: str = "none",
    quantize: str = "none",
) -> Execution:
    """How a run uses a device, by what was typed and by grat's defaults.

    Args:
        choice: of the model.
        expected: the forecast.
        device: where.
        offload: `--offload`.
        quantize: `--quantize`.
    """
    memory = getattr(expected.preset, "memory", None)
    half = device.kind == "cuda" and expected.dtype != "float32"
    beside = "float16" if choice.medium == "video" and half else None
    return Execution(
        dtype=expected.dtype,
        on_cpu=device.kind == "cpu",
        offload=offload,  # pyright: ignore[reportArgumentType]
        quantize=quantize,
        chunk_tokens=memory.chunk_tokens if memory else None,
        kernel=expected.preset.kernel.backend in ("auto", "triton", "triton-ws", "gluon"),
        autoencoder_dtype=beside,
        text_dtype=beside,
    )
