"""Interleaved timing and peak memory of calls, on any device, with limits of time and memory that say so.

Every call warms up once; then every round runs each call once, so that a clock that drifts, drifts for all. A call
that would take too long or too much memory is skipped with the reason in words, never cut short silently.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from grat_cli.models.devices import is_out_of_memory, wait_for

# On CUDA every call finds a cold L2 cache. The buffer is larger than any L2, so that writing it (about 0.1 ms) also
# gives the host time to issue the call: launch overhead is no part of what is timed, as in a model that runs ahead.
_FLUSH_BYTES = 512 * 2**20


class Progress(Protocol):
    """Who watches a benchmark."""

    def phase(self, name: str) -> None:
        """A phase begins, in words."""

    def step(self, done: int, total: int) -> None:
        """So many calls of the phase are done."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Unwatched:
    """A `Progress` that tells nobody."""

    def phase(self, name: str) -> None:
        pass

    def step(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class CannotRun(Exception):
    """A call cannot run here; its text says why. The row is skipped with these words."""


class NotFinite(CannotRun):
    """A call ran, and NaN or infinities came of it."""


def guarded(name: str, call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A call of a kernel that depends on its surroundings: what it raises becomes the reason why it has no figures.

    For other projects' kernels, and for compiled ones, which may fail to compile on one device and not on another.
    """

    def attempt() -> torch.Tensor:
        try:
            return call()
        except (CannotRun, torch.OutOfMemoryError):
            raise
        except Exception as error:
            what = str(error).strip().partition("\n")[0]
            raise CannotRun(f"{name} failed: {type(error).__name__}: {what}") from error

    return attempt


@dataclass(frozen=True)
class Run:
    """A call to measure.

    Attributes:
        name: unique among the runs that are measured together.
        call: what is timed; its result is dropped.
        flop: floating-point operations of one call as executed, for predicting its time; None where unknown.
        extra_bytes: what one call is expected to allocate at most, its output included, for predicting memory.
        held_bytes: inputs and weights that lie in memory already; they count as memory of the call.
        inspect: looks at the result of the warm-up call, outside of any timing.
    """

    name: str
    call: Callable[[], object]
    flop: float | None = None
    extra_bytes: int = 0
    held_bytes: int = 0
    inspect: Callable[[object], None] | None = None


@dataclass(frozen=True)
class Measurement:
    """What was found about a run: times of all repetitions, or why there are none.

    Attributes:
        times_ms: of each repetition; empty where the run was skipped.
        peak_memory_bytes: of one call, `held_bytes` included; None where the device cannot tell.
        skipped: the reason in words, None where the run was measured.
        not_finite: whether the reason is that NaN or infinities came of it.
    """

    times_ms: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None
    skipped: str | None = None
    not_finite: bool = False


def measure(
    runs: Sequence[Run],
    device: torch.device,
    *,
    repetitions: int,
    max_seconds: float | None = None,
    flop_per_second: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Measurement]:
    """Warms up and times runs, interleaved.

    Args:
        runs: in the order in which each round calls them.
        device: where they compute.
        repetitions: timed calls of each run, after one warm-up call.
        max_seconds: most time for one run, warm-up and repetitions together; None for no limit.
        flop_per_second: a measured rate, by which runs that would take far too long are skipped before they start.
        progress: is told of every call.

    Returns:
        A measurement for every run, by name.
    """
    progress = progress or Unwatched()
    found = {run.name: Measurement() for run in runs}
    waiting = list(runs)
    done, total = 0, len(runs) * (repetitions + 1)

    def skip(run: Run, reason: str | CannotRun) -> None:
        nonlocal total
        found[run.name] = Measurement(skipped=str(reason), not_finite=isinstance(reason, NotFinite))
        waiting.remove(run)
        progress.note(f"{run.name} is skipped: {reason}")

    # 1. One call each, in which compilers and caches do their work. What it takes tells whether there is time for more.
    with torch.no_grad():  # as in diffusers
        for run in list(waiting):
            reason = (
                memory_obstacle(run.extra_bytes, device)
                or _predicted_obstacle(run, repetitions, max_seconds, flop_per_second)
                or _attempt(lambda run=run: _warm_up(run, device, repetitions, max_seconds))
            )
            if reason:
                skip(run, reason)
            done += 1 + repetitions if reason else 1
            progress.step(done, total)

        # 2. Rounds.
        times: dict[str, list[float]] = {run.name: [] for run in waiting}
        peaks: dict[str, int | None] = dict.fromkeys(times)
        clock = clock_for(device)
        for repetition in range(repetitions):
            for run in list(waiting):

                def timed(run: Run = run, repetition: int = repetition) -> None:
                    # Giving freed memory back before the call makes its first touch part of the time on a CPU, which
                    # happens in one repetition only.
                    if device.type == "cuda" or repetition == 0:
                        with PeakMemory(device) as memory:
                            times[run.name].append(clock(run.call))
                        if memory.extra_bytes is not None:
                            peaks[run.name] = max(peaks[run.name] or 0, run.held_bytes + memory.extra_bytes)
                    else:
                        times[run.name].append(clock(run.call))

                if reason := _attempt(timed):
                    skip(run, reason)
                    done += repetitions - repetition - 1
                done += 1
                progress.step(done, total)
    found |= {run.name: Measurement(tuple(times[run.name]), peaks[run.name]) for run in waiting}
    return found


def seconds_text(seconds: float) -> str:
    """A duration for people, such as `0.3 s`, `43 s`, `12 min` or `2.4 h`."""
    if seconds < 120:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# Clocks


def clock_for(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs a call and returns its milliseconds on the device.

    CUDA: events around the call, the L2 cache cold. MPS: events. Elsewhere the wall clock.
    """
    if device.type == "cuda":
        return _cuda_clock(device)
    return _mps_clock if device.type == "mps" else _wall_clock


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    free, _ = torch.cuda.mem_get_info(device)
    flush = torch.empty(min(_FLUSH_BYTES, free // 4), dtype=torch.uint8, device=device)

    def clock(call: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            result = call()
            stop.record()
            stop.synchronize()
            del result
            return start.elapsed_time(stop)

    return clock


def _mps_clock(call: Callable[[], object]) -> float:
    start, stop = torch.mps.Event(enable_timing=True), torch.mps.Event(enable_timing=True)
    start.record()
    result = call()
    stop.record()
    stop.synchronize()
    del result
    return start.elapsed_time(stop)


def _wall_clock(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - began
    del result
    return elapsed * 1000


# Memory


def memory_words(device: torch.device) -> str:
    """What peak memory means on a device, for a note beside the figures."""
    if device.type == "cuda":
        what = "what PyTorch had allocated on the device"
    elif device.type == "cpu" and _resident_peak_resets():
        what = "the resident memory of the process"
    else:
        return f"Peak memory is not measured on {device.type} under {sys.platform}."
    return f"Peak memory: the most of {what} during one call, above what it was before the call, plus inputs."


class PeakMemory:
    """Peak memory while a `with` block lasts, above what was in use where it began.

    Attributes:
        extra_bytes: the peak, after the block; None where it cannot be measured.
    """

    extra_bytes: int | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif self._device.type == "cpu" and _resident_peak_resets():
            gc.collect()
            _release_freed_memory()
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self.extra_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif self._device.type == "cpu" and _resident_peak_resets():
            self.extra_bytes = max(0, _status_bytes("VmHWM") - self._before)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    available = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    if available is None:
        return None
    room = int(available.split()[1]) * 1024
    # A container may allow less than the machine has (control groups version 2).
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdecimal():
        room = min(room, int(most) - int(used.read_text()))
    return room


def memory_obstacle(needed_bytes: int, device: torch.device) -> str | None:
    """Why so many bytes more do not fit, in words; None where they do or where nobody knows."""
    available = available_memory(device)
    if available is None or needed_bytes <= available:
        return None
    return f"it would need about {_gib(needed_bytes)} more memory, {_gib(available)} are free on {device}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.{1 if count < 100 * 2**30 else 0}f} GiB"


_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak resident set size to the current one


def _resident_peak_resets() -> bool:
    """Whether this system lets a process reset its peak of resident memory: Linux does."""
    return os.access(_CLEAR_REFS, os.W_OK)


def _release_freed_memory() -> None:
    """Has glibc give freed memory back, so that a call that would reuse it shows up in resident memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


# One call


def _warm_up(run: Run, device: torch.device, repetitions: int, max_seconds: float | None) -> None:
    """The first call of a run.

    Raises:
        CannotRun: if its repetitions would take more than `max_seconds`.
    """
    began = time.monotonic()
    result = run.call()
    wait_for(device)
    first = spent = once = time.monotonic() - began
    if run.inspect is not None:
        run.inspect(result)
    del result
    if max_seconds is None:
        return
    if first < max_seconds < first * (1 + repetitions):
        # The first call may have compiled: only a second one tells what a repetition takes.
        began = time.monotonic()
        run.call()
        wait_for(device)
        once = time.monotonic() - began
        spent += once
    if spent + repetitions * once > max_seconds:
        raise CannotRun(_too_long(spent + repetitions * once, repetitions, max_seconds))


def _attempt(call: Callable[[], object]) -> str | CannotRun | None:
    """Runs a call; why it failed, if it lacked memory or cannot run here."""
    try:
        call()
    except CannotRun as reason:
        return type(reason)(str(reason))  # without the traceback, which would hold the tensors of the failed call
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return None
    # Outside of the handler, whose traceback would hold the tensors of the failed call.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return "out of memory"


def _predicted_obstacle(
    run: Run, repetitions: int, max_seconds: float | None, flop_per_second: float | None
) -> str | None:
    if run.flop is None or max_seconds is None or flop_per_second is None:
        return None
    seconds = run.flop / flop_per_second * (1 + repetitions)
    return _too_long(seconds, repetitions, max_seconds) if seconds > max_seconds else None


def _too_long(seconds: float, repetitions: int, max_seconds: float) -> str:
    return (
        f"warm-up and {repetitions} repetitions would take about {seconds_text(seconds)}, "
        f"more than {seconds_text(max_seconds)} (--max-seconds)"
    )
