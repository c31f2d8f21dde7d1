"""Timing and memory of calls: what is counted, what is skipped, and what is said about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest
import torch

from grat_cli.bench.measure import CannotRun, Measurement, PeakMemory, Run, measure, memory_obstacle, memory_words

CPU = torch.device("cpu")


class Watcher:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def phase(self, name: str) -> None:
        pass

    def step(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def named(
    calls: list[str], name: str, fails_at: int | None = None, error: Exception | None = None
) -> Callable[[], None]:
    def call() -> None:
        calls.append(name)
        if error is not None and calls.count(name) == fails_at:
            raise error

    return call


def test_one_warm_up_then_rounds_that_run_each_call_once() -> None:
    calls: list[str] = []
    watcher = Watcher()
    found = measure([Run("a", named(calls, "a")), Run("b", named(calls, "b"))], CPU, repetitions=3, progress=watcher)
    assert calls == ["a", "b"] * 4
    assert [len(found[name].times_ms) for name in "ab"] == [3, 3]
    assert watcher.steps == [(done, 8) for done in range(1, 9)]
    assert watcher.notes == []


def test_times_are_milliseconds_of_the_call_alone() -> None:
    # Sleeping longer than asked is possible, shorter is not; looking at the result takes far longer than the call.
    run = Run("nap", lambda: time.sleep(0.01), inspect=lambda result: time.sleep(0.2))
    times = measure([run], CPU, repetitions=2)["nap"].times_ms
    assert all(milliseconds >= 10 for milliseconds in times)
    assert min(times) < 200


def test_inspect_sees_the_result_once() -> None:
    seen: list[object] = []
    measure([Run("a", lambda: "result", inspect=seen.append)], CPU, repetitions=4)
    assert seen == ["result"]


def test_a_run_that_is_predicted_to_take_too_long_never_starts() -> None:
    calls: list[str] = []
    watcher = Watcher()
    runs = [Run("slow", named(calls, "slow"), flop=1e12), Run("quick", named(calls, "quick"), flop=1e6)]
    found = measure(runs, CPU, repetitions=4, max_seconds=20, flop_per_second=1e9, progress=watcher)
    assert set(calls) == {"quick"}
    assert found["slow"].skipped == "warm-up and 4 repetitions would take about 83 min, more than 20 s (--max-seconds)"
    assert watcher.notes == [f"slow is skipped: {found['slow'].skipped}"]
    assert watcher.steps[-1] == (10, 10)
    assert found["quick"].skipped is None


def test_a_run_that_turns_out_to_take_too_long_is_skipped_whole() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.05)

    found = measure([Run("slow", slow)], CPU, repetitions=1000, max_seconds=1)["slow"]
    assert found.times_ms == ()
    assert "1000 repetitions would take" in str(found.skipped)
    assert len(calls) == 2  # the second call tells compilation from slowness


def test_a_first_call_that_compiles_costs_no_run_its_place() -> None:
    calls: list[str] = []

    def compiles() -> None:
        calls.append("call")
        if len(calls) == 1:
            time.sleep(0.3)

    found = measure([Run("compiled", compiles)], CPU, repetitions=10, max_seconds=1)["compiled"]
    assert len(found.times_ms) == 10


def test_memory_that_is_not_there_is_not_asked_for() -> None:
    calls: list[str] = []
    found = measure([Run("huge", named(calls, "huge"), extra_bytes=2**60)], CPU, repetitions=1)["huge"]
    assert calls == []
    assert "GiB more memory" in str(found.skipped)
    assert memory_obstacle(1, CPU) is None


@pytest.mark.parametrize("fails_at", [1, 3])
def test_memory_that_runs_out_skips_that_row_alone(fails_at: int) -> None:
    calls: list[str] = []
    error = torch.OutOfMemoryError("CUDA out of memory")
    runs = [Run("big", named(calls, "big", fails_at, error)), Run("small", named(calls, "small"))]
    watcher = Watcher()
    found = measure(runs, CPU, repetitions=4, progress=watcher)
    assert found["big"] == Measurement(skipped="out of memory")
    assert len(found["small"].times_ms) == 4
    assert calls.count("big") == fails_at
    assert watcher.steps[-1] == (10, 10)


def test_a_call_that_cannot_run_says_why_and_any_other_error_is_a_bug() -> None:
    calls: list[str] = []
    found = measure([Run("a", named(calls, "a", 1, CannotRun("no such kernel")))], CPU, repetitions=1)
    assert found["a"].skipped == "no such kernel"
    with pytest.raises(RuntimeError, match="shape mismatch"):
        measure([Run("a", named(calls, "a", 2, RuntimeError("shape mismatch")))], CPU, repetitions=1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak of resident memory")
def test_peak_memory_counts_what_a_call_holds_at_its_worst_moment() -> None:
    megabytes = 2**20

    def call() -> torch.Tensor:
        first = torch.ones(40 * megabytes, dtype=torch.uint8)
        second = torch.ones(20 * megabytes, dtype=torch.uint8)
        del first
        return second

    for _ in range(2):  # memory that was freed to the allocator counts again
        with PeakMemory(CPU) as memory:
            call()
        assert memory.extra_bytes is not None
        assert 59 * megabytes <= memory.extra_bytes < 64 * megabytes  # Linux counts resident pages in batches
    found = measure([Run("a", call, held_bytes=5 * megabytes)], CPU, repetitions=2)["a"]
    assert found.peak_memory_bytes is not None
    assert 64 * megabytes <= found.peak_memory_bytes < 69 * megabytes
    assert "resident memory" in memory_words(CPU)
