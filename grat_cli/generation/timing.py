"""Timing from outside: denoising steps through an adapter's observer, phases of a run through a context manager."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from grat_cli.attention.carrying import Carrying
    from grat_cli.attention.schedule import StepKind
    from grat_cli.attention.work import Work


@dataclass(frozen=True)
class StepTiming:
    """One denoising step.

    Attributes:
        index: step, counted from 0 over the steps that were run.
        timestep: the scheduler's timestep.
        total_ms: time in the transformer, both calls where classifier-free guidance makes two.
        attention_ms: the part of it in span attention, text queries included.
        other_ms: the rest but for exchanges: projections, feed-forward, norms, permutation.
        density: attended pairs over all pairs, mean over layers.
        stage: of the run that it belongs to, counted from 0; see `highres.Stage`.
        computed: of each transformer call the layers whose attention was computed, such as `0, 3-5`; empty where all
            were.
        over_steps: what the step was where attention is carried over steps, else None.
        exchange_ms: the part of `total_ms` in exchanges between ranks, waiting for each other included.
        exchanged_bytes: that this rank sent to others in them.
    """

    index: int
    timestep: float
    total_ms: float
    attention_ms: float
    other_ms: float
    density: float
    stage: int = 0
    computed: tuple[str, ...] = ()
    over_steps: StepKind | None = None
    exchange_ms: float = 0.0
    exchanged_bytes: int = 0


@dataclass
class _Call:
    """Marks of one transformer call: its begin and end, and (begin, end) of every attention and exchange in it, and of
    exchanges of what it has made."""

    step: int
    density: float
    begin: Any
    end: Any = None
    attentions: list[tuple[Any, Any]] = field(default_factory=list)
    exchanges: list[tuple[Any, Any]] = field(default_factory=list)
    afterwards: list[tuple[Any, Any]] = field(default_factory=list)
    sent_bytes: int = 0
    left_out_ms: float = 0.0


class StepRecorder:
    """Records transformer calls, and the attentions and exchanges in them; a `layer.CallObserver`.

    On CUDA and MPS devices a mark is an event in the stream, so nothing waits for the device until `steps()`;
    elsewhere it is the wall clock.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._mark, self._elapsed_ms = _stopwatch(device)
        self._calls: list[_Call] = []

    def begin_call(self, step: int, density: float) -> None:
        """Marks the begin of a transformer call of denoising step `step`."""
        self._calls.append(_Call(step, density, self._mark()))

    def end_call(self) -> None:
        """Marks the end of the transformer call."""
        self._calls[-1].end = self._mark()

    @contextmanager
    def attention(self, inputs: object = None) -> Iterator[None]:
        """Marks begin and end of one attention, whatever it is computed from."""
        begin = self._mark()
        yield
        self._calls[-1].attentions.append((begin, self._mark()))

    @contextmanager
    def exchange(self, sent_bytes: int) -> Iterator[None]:
        """Marks begin and end of one exchange between ranks; one after a transformer call counts with it."""
        begin, call = self._mark(), self._calls[-1]
        yield
        (call.exchanges if call.end is None else call.afterwards).append((begin, self._mark()))
        call.sent_bytes += sent_bytes

    def leave_out(self, milliseconds: float) -> None:
        """Time of the transformer call under way, if any, that is not its own: the device did nothing in it."""
        if self._calls and self._calls[-1].end is None:
            self._calls[-1].left_out_ms += milliseconds

    def steps(self, timesteps: Sequence[float]) -> list[StepTiming]:
        """Timings of all finished calls by step; waits for the device.

        Args:
            timesteps: the scheduler's timestep of every step that was run.
        """
        calls: dict[int, list[_Call]] = {}
        for call in self._calls:
            if call.end is not None:
                calls.setdefault(call.step, []).append(call)
        return [self._timing(step, float(timesteps[step]), of_step) for step, of_step in sorted(calls.items())]

    def _timing(self, step: int, timestep: float, calls: Sequence[_Call]) -> StepTiming:
        """Of a step, from its calls."""

        def within(marks: Iterable[tuple[Any, Any]]) -> float:
            return sum((self._elapsed_ms(begin, end) for begin, end in marks), start=0.0)

        afterwards = sum(within(call.afterwards) for call in calls)
        total = sum(max(0.0, within([(call.begin, call.end)]) - call.left_out_ms) for call in calls) + afterwards
        attention = sum(within(call.attentions) for call in calls)
        exchange = sum(within(call.exchanges) for call in calls) + afterwards
        return StepTiming(
            step,
            timestep,
            total,
            attention,
            total - attention - exchange,
            calls[-1].density,
            exchange_ms=exchange,
            exchanged_bytes=sum(call.sent_bytes for call in calls),
        )


def with_work(steps: Sequence[StepTiming], work: Work | None, carrying: Carrying | None = None) -> list[StepTiming]:
    """Timings with what was computed of each step, in place of what its schedule says; as they are without a count."""
    found = [work and work.of_step(step.index) for step in steps]
    kinds = [carrying and carrying.kind_of_step(step.index) for step in steps]
    return [
        replace(step, density=done.density, computed=done.computed, over_steps=kind) if done else step
        for step, done, kind in zip(steps, found, kinds, strict=True)
    ]


def _stopwatch(device: torch.device | str) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """How to take a mark on a device without waiting for it, and the milliseconds between two marks."""
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        import torch

        def cuda_mark() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(device))
            return event

        def cuda_elapsed_ms(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
            end.synchronize()
            return begin.elapsed_time(end)

        return cuda_mark, cuda_elapsed_ms
    if kind == "mps":
        import torch

        def mps_mark() -> torch.mps.Event:
            event = torch.mps.Event(enable_timing=True)
            event.record()
            return event

        def mps_elapsed_ms(begin: torch.mps.Event, end: torch.mps.Event) -> float:
            end.synchronize()
            return begin.elapsed_time(end)

        return mps_mark, mps_elapsed_ms
    return time.perf_counter, lambda begin, end: (end - begin) * 1000


class Phases:
    """Wall-clock time and peak memory of the phases of a run: `with phases("denoise"): ...`.

    A phase that is entered again adds its time up, and keeps the highest of its peaks. On a CUDA device the end of a
    phase waits for the device, so that work is counted in the phase that issued it. A phase that fails is left out.

    Attributes:
        phases_ms: milliseconds by phase name, in order of first entry.
        memory_bytes: peak memory by phase name.
    """

    def __init__(
        self,
        wait: Callable[[], None] = lambda: None,
        forget_peak: Callable[[], None] = lambda: None,
        peak_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """Tells phases how to measure.

        Args:
            wait: returns when the device has finished what was issued to it.
            forget_peak: starts a new measurement of peak memory.
            peak_bytes: the peak since then.
        """
        self.phases_ms: dict[str, float] = {}
        self.memory_bytes: dict[str, int] = {}
        self._wait, self._forget_peak, self._peak_bytes = wait, forget_peak, peak_bytes
        self._running: tuple[str, float] | None = None
        self._apart_ms = 0.0  # of the running phase

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._forget_peak()
        self._running, self._apart_ms = (name, time.perf_counter()), 0.0
        try:
            yield
            self._wait()
            self.phases_ms, self.memory_bytes = self.so_far()
        finally:
            self._running = None

    def set_apart(self, name: str, milliseconds: float) -> None:
        """Counts time of the running phase as that of another."""
        self.phases_ms[name] = self.phases_ms.get(name, 0.0) + milliseconds
        self._apart_ms += milliseconds

    def take(self, other: Phases) -> None:
        """Adds what other phases have, and leaves them nothing."""
        for name, milliseconds in other.phases_ms.items():
            self.phases_ms[name] = self.phases_ms.get(name, 0.0) + milliseconds
        for name, peak in other.memory_bytes.items():
            self.memory_bytes[name] = max(self.memory_bytes.get(name, 0), peak)
        other.phases_ms, other.memory_bytes = dict.fromkeys(other.phases_ms, 0.0), {}

    def so_far(self) -> tuple[dict[str, float], dict[str, int]]:
        """`phases_ms` and `memory_bytes` with what the running phase, if any, has taken until now."""
        phases_ms, memory_bytes = dict(self.phases_ms), dict(self.memory_bytes)
        if self._running is not None:
            name, began = self._running
            passed = (time.perf_counter() - began) * 1000 - self._apart_ms
            phases_ms[name] = phases_ms.get(name, 0.0) + max(0.0, passed)
            memory_bytes[name] = max(memory_bytes.get(name, 0), self._peak_bytes())
        return phases_ms, memory_bytes


@contextmanager
def while_compiling(wait: Callable[[], None], tell: Callable[[float], None]) -> Iterator[None]:
    """While inside, tells how long `torch.compile` took, each time that it has made something.

    It is dynamo that says when it begins and ends, tracing and code generation of its backend included. What was issued
    before is waited for, so that a device computes nothing meanwhile, and the time is none of its own. Kernels that are
    loaded or tuned when they first run count as the step that runs them.

    Args:
        wait: returns when the device has finished what was issued to it.
        tell: is given milliseconds.
    """
    from torch._dynamo.callback import callback_handler

    began = 0.0

    def begin(about: Any) -> None:
        nonlocal began
        wait()
        began = time.perf_counter()

    def end(about: Any) -> None:
        tell((time.perf_counter() - began) * 1000)

    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begin)
        callback_handler.remove_end_callback(end)


def phase_of(name: str, stage: int) -> str:
    """The name of a phase of one stage, as `Phases` keeps it."""
    return f"{name} {stage}"


def by_name(phases: Mapping[str, Any], combine: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """Figures of phases with those of all stages in one, in order of first entry.

    Args:
        phases: of `Phases`.
        combine: of two figures one: `operator.add` for times, `max` for memory.
    """
    combined: dict[str, Any] = {}
    for phase, figure in phases.items():
        name = phase.partition(" ")[0]
        combined[name] = combine(combined[name], figure) if name in combined else figure
    return combined


def of_stage(phases: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """Figures of the phases of one stage, by name."""
    ending = f" {stage}"
    return {phase.removesuffix(ending): figure for phase, figure in phases.items() if phase.endswith(ending)}
