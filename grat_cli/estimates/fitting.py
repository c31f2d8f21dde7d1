"""Whether a run fits a device, and what would make it fit: flags to type."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from grat_cli.console.output import bytes_text
from grat_cli.errors import GratError, ModelUnavailable, OutOfMemory
from grat_cli.estimates.components import components_of, components_of_pipeline, with_loras
from grat_cli.estimates.hardware import GPUS, Device, cuda_device, present_cpu
from grat_cli.estimates.memory import OFFLOAD_KINDS, PHASES, Execution, PhaseMemory, RunMemory, run_memory
from grat_cli.estimates.planning import Forecast
from grat_cli.families import family_of
from grat_cli.families.autoencoders import Pixels
from grat_cli.families.base import ModelChoice
from grat_cli.families.shapes import Components
from grat_cli.models.catalogue import is_known
from grat_cli.models.offloading import choose_offload
from grat_cli.models.parallel import ALONE, Parallel
from grat_cli.models.resolution import Resolution
from grat_cli.models.weights import AS_THEY_ARE, Weights
from grat_cli.presets.over_steps import Keep

if TYPE_CHECKING:
    import torch

# Feed-forward in chunks of so many tokens where the usual ones are too large.
_SMALL_CHUNK = 4096


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a device.

    Attributes:
        device: which.
        memory: what the run needs by phase.
        needed: bytes at its peak, with what is not tensors.
        execution: how it uses the device.
        advice: flags that would make it fit, where it does not; None where nothing was found.
    """

    device: Device
    memory: RunMemory
    needed: float
    execution: Execution
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


def needs(runs: Sequence[Forecast], components: Components, execution: Execution) -> RunMemory:
    """What a run in one stage or several needs by phase: of each phase the stage that needs most."""
    largest: dict[str, PhaseMemory] = {}
    offloaded = 0.0
    for number, stage in enumerate(runs):
        kept = stage.kept(execution.keep, on_cpu=execution.on_cpu)
        text, tokens = stage.main_plan.text_len, stage.main_plan.tokens
        share = (execution.own(tokens - text) + text) / tokens
        memory = run_memory(
            components,
            Pixels.of(stage.size),
            stage.schedule.plans,
            execution,
            guided_twice=stage.calls_per_step == 2,
            encodes=number > 0 or bool(stage.architecture.model.needs),
            lets_go=family_of(stage.architecture.model).lets_go,
            cache=stage.preset.cache,
            kept=share * (kept.device + kept.buffers),
        )
        offloaded = memory.offloaded
        for phase in memory.phases:
            if phase.phase not in largest or phase.peak > largest[phase.phase].peak:
                largest[phase.phase] = phase
    return RunMemory(tuple(largest[name] for name in PHASES if name in largest), offloaded)


def judge(
    runs: Sequence[Forecast],
    components: Components,
    choice: ModelChoice,
    device: Device,
    *,
    offload: str = "none",
    quantize: str = "none",
    cast: str = "none",
    parallel: Parallel = ALONE,
    shards_weights: bool = False,
    at_size: Callable[[Any], Sequence[Forecast]] | None = None,
) -> Verdict:
    """Whether a run fits a device; where it does not, with the nearest thing that does.

    Args:
        runs: forecasts of its stages.
        components: parts of the pipeline.
        choice: of the model.
        device: where.
        offload: as for `load_model`; `auto` is the first kind that fits.
        quantize: likewise.
        cast: likewise.
        parallel: how several such devices share it.
        shards_weights: `--shard-weights`.
        at_size: forecasts of another size, which is advised where nothing else helps; None for no advice at all.
    """
    kinds: Sequence[str] = (offload,)
    if offload == "auto":
        kinds = OFFLOAD_KINDS if device.kind == "cuda" and not shards_weights else ("none",)
    verdict = None
    for kind in kinds:
        execution = execution_of(
            choice,
            runs[-1],
            device,
            offload=kind,
            quantize=quantize,
            cast=cast,
            parallel=parallel,
            shards_weights=shards_weights,
        )
        memory = needs(runs, components, execution)
        verdict = Verdict(device, memory, device.with_overhead(memory.peak), execution)
        if verdict.fits:
            break
    assert verdict is not None
    if verdict.fits or at_size is None:
        return verdict
    return replace(verdict, advice=_advice(runs, components, verdict.execution, device, at_size))


def offload_for(
    pipe: Any,
    choice: ModelChoice,
    runs: Sequence[Forecast],
    device: torch.device,
    *,
    weights: Weights = AS_THEY_ARE,
) -> tuple[str, str]:
    """The fastest kind of offload with which a run fits a CUDA device, and why; what `--offload auto` stands for.

    Args:
        pipe: the loaded pipeline, which knows its parts where the model's name does not tell them.
        choice: of the model.
        runs: forecasts of its stages.
        device: where it is to run.
        weights: how they come.
    """
    import torch

    free = torch.cuda.mem_get_info(device)[0]
    there = cuda_device(torch.cuda.get_device_name(device), free)
    components = components_of(choice) if is_known(choice) else components_of_pipeline(pipe, choice)
    components = with_loras(components, weights)
    parts = getattr(pipe, "components", {})
    if "text_encoder" in parts and parts["text_encoder"] is None:  # texts are known: what encodes them was not loaded
        left = tuple(encoder for encoder in components.text_encoders if encoder.of_pictures)
        components = replace(components, text_encoders=left)
    needed = {}
    for kind in OFFLOAD_KINDS:
        execution = execution_of(choice, runs[-1], there, offload=kind, quantize=weights.quantize, cast=weights.cast)
        needed[kind] = there.with_overhead(needs(runs, components, execution).peak)
    return choose_offload(needed, free)


def what_fits(
    runs: Sequence[Forecast],
    components: Components,
    choice: ModelChoice,
    *,
    offload: str = "none",
    quantize: str = "none",
    cast: str = "none",
    parallel: Parallel = ALONE,
    shards_weights: bool = False,
) -> str:
    """Which of the GPUs known a run fits, in a line."""
    fitting = [
        gpu.name
        for gpu in GPUS.values()
        if judge(
            runs,
            components,
            choice,
            gpu,
            offload=offload,
            quantize=quantize,
            cast=cast,
            parallel=parallel,
            shards_weights=shards_weights,
        ).fits
    ]
    if not fitting:
        return "fits none of the GPUs known: --gpu h200 says what would"
    return f"fits {', '.join(fitting)}"


def refuse_unfit_here(
    choice: ModelChoice,
    at_size: Callable[[Any, str], Sequence[Forecast]],
    size: Any,
    *,
    device: str,
    dtype: str,
    offload: str,
    weights: Weights = AS_THEY_ARE,
    parallel: Parallel = ALONE,
    shards_weights: bool = False,
) -> None:
    """Makes sure, before anything is loaded, that a run fits the device that it is for.

    Nothing is said of models whose parts are not known before they are loaded, and of MPS devices.

    Args:
        choice: of the model.
        at_size: forecasts of a size, in a dtype.
        size: of the picture or video.
        device: as for `devices.choose_device`.
        dtype: as for `devices.choose_dtype`.
        offload: `--offload`.
        weights: how they come.
        parallel: how several such devices share it.
        shards_weights: `--shard-weights`.

    Raises:
        OutOfMemory: if it does not fit, with what does.
        BadInput: if there is no such device here.
    """
    import torch

    from grat_cli.models.devices import choose_device, choose_dtype

    if choice.folder is None and not is_known(choice):
        return
    chosen = choose_device(device)
    if chosen.type == "cuda":
        there = cuda_device(torch.cuda.get_device_name(chosen), torch.cuda.mem_get_info(chosen)[0])
    elif chosen.type == "cpu":
        there = present_cpu()
    else:
        return
    try:
        components = with_loras(components_of(choice), weights)
    except ModelUnavailable:  # loading says more of what is wrong
        return
    in_dtype = str(choose_dtype(dtype, chosen)).removeprefix("torch.")

    def forecasts(size: Any) -> Sequence[Forecast]:
        return at_size(size, in_dtype)

    refuse_unfit(
        judge(
            forecasts(size),
            components,
            choice,
            there,
            offload=offload,
            quantize=weights.quantize,
            cast=weights.cast,
            parallel=parallel,
            shards_weights=shards_weights,
            at_size=forecasts,
        )
    )


def refuse_unfit(verdict: Verdict) -> None:
    """Raises OutOfMemory unless a run fits, with what to type instead."""
    if not verdict.fits:
        advice = verdict.advice or "no flag makes it fit: use a larger GPU"
        raise OutOfMemory(f"{verdict.sentence}\n{advice}")


def _advice(
    runs: Sequence[Forecast],
    components: Components,
    execution: Execution,
    device: Device,
    at_size: Callable[[Any], Sequence[Forecast]],
) -> str | None:
    expected = runs[-1]

    def fits(at: Sequence[Forecast], how: Execution) -> bool:
        return device.with_overhead(needs(at, components, how).peak) <= device.memory

    ways = list(_alternatives(execution, runs))
    for flags, how in ways:
        if fits(runs, how):
            return f"try {flags}"
    # The smaller sizes, as they are and with whatever else helps.
    for size in _smaller(expected):
        try:
            at = at_size(size)
        except GratError:  # groups that are larger than so small a picture, for example
            return None
        if fits(at, execution):
            return f"try --res {_typed(size)}"
        for flags, how in ways:
            if fits(at, how):
                return f"try --res {_typed(size)} {flags}"
    return None


def _typed(size: Any) -> str:
    return f"{size.width}x{size.height}"


def _alternatives(execution: Execution, runs: Sequence[Forecast]) -> Iterator[tuple[str, Execution]]:
    """Other ways to run, those that cost least time first."""
    kept = []
    sections = runs[-1].preset.schedule.over_steps
    if len(sections) == 1:
        # From main memory copies arrive meanwhile; 8 bits take less of both, and cost some of what is carried.
        smaller: tuple[Keep, ...] = ("fp8",) if execution.on_cpu else ("host", "fp8")
        kept = [
            (f"--set schedule.over_steps.keep={keep}", replace(execution, keep=keep))
            for keep in smaller
            if keep != sections[0].keep
        ]
    yield from kept
    yield from _with_less_at_once(execution)
    for flag, how in kept:
        for flags, otherwise in _with_less_at_once(how):
            yield f"{flag} {flags}", otherwise


def _with_less_at_once(execution: Execution) -> Iterator[tuple[str, Execution]]:
    """With more in main memory, weights in fewer bits, and smaller chunks."""
    chunks = []
    if execution.chunk_tokens is None:
        chunks.append(("--set memory.chunk_tokens=auto", "auto"))
    chunks.append((f"--set memory.chunk_tokens={_SMALL_CHUNK}", _SMALL_CHUNK))
    for flags, tokens in chunks:
        yield flags, replace(execution, chunk_tokens=tokens)
    if execution.on_cpu or execution.shards_weights:
        return
    if execution.parallel.cp > 1 and (execution.offload, execution.quantize, execution.cast) == ("none",) * 3:
        yield "--shard-weights", replace(execution, shards_weights=True)
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
            if execution.cast != "none" and quantize != "none":  # which do not go together
                continue
            flags = [f"--offload {offload}"] if offload != "none" else []
            flags += [f"--quantize {quantize}"] if quantize != "none" else []
            flags += [chunk_flags] if chunk_flags else []
            yield " ".join(flags), replace(execution, offload=offload, quantize=quantize, chunk_tokens=chunk_tokens)


def _smaller(expected: Forecast) -> Iterator[Any]:
    """The same shape at three quarters, half, three eighths and so on of its side."""
    unit = max(16, expected.architecture.model.token_side)
    size = expected.size
    for eighths in (6, 4, 3, 2, 1):
        width, height = (side * eighths // (8 * unit) * unit for side in (size.width, size.height))
        if min(width, height) >= 8 * unit:
            yield (
                Resolution(width, height) if isinstance(size, Resolution) else replace(size, width=width, height=height)
            )


def execution_of(
    choice: ModelChoice,
    expected: Forecast,
    device: Device,
    *,
    offload: str = "none",
    quantize: str = "none",
    cast: str = "none",
    parallel: Parallel = ALONE,
    shards_weights: bool = False,
) -> Execution:
    """How a run uses a device, by what was typed and by grat's defaults.

    Args:
        choice: of the model.
        expected: the forecast.
        device: where.
        offload: `--offload`.
        quantize: `--quantize`.
        cast: `--cast`.
        parallel: how several such devices share it.
        shards_weights: `--shard-weights`.
    """
    half = device.kind == "cuda" and expected.dtype != "float32"
    family = family_of(choice)
    beside = family.half_beside if half else None
    return Execution(
        dtype=expected.dtype,
        on_cpu=device.kind == "cpu",
        offload=offload,  # pyright: ignore[reportArgumentType]
        quantize=quantize,
        cast=cast,
        chunk_tokens=expected.preset.memory.chunk_tokens,
        kernel=expected.preset.kernel.backend in ("auto", "triton", "gluon"),
        autoencoder_dtype=family.autoencoder_dtype or beside,
        text_dtype=beside,
        threads=os.cpu_count() or 1,
        parallel=parallel,
        shards_weights=shards_weights,
    )
