"""Step timing and phases, on clocks that are set by hand."""

from __future__ import annotations

import pytest
import torch

from grat_cli.generation import timing
from grat_cli.generation.timing import Phases, StepRecorder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as `perf_counter` gives it."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def record_call(recorder: StepRecorder, clock: list[float], step: int, attention_s: float, other_s: float) -> None:
    recorder.begin_call(step, density=0.5)
    for _ in range(2):
        clock[0] += other_s / 2
        with recorder.attention():
            clock[0] += attention_s / 2
    recorder.end_call()


def test_steps_sum_their_calls_and_split_off_attention(clock: list[float]) -> None:
    recorder = StepRecorder()
    for step, calls in [(0, 1), (1, 2)]:  # the second step is guided: two calls
        for _ in range(calls):
            record_call(recorder, clock, step, attention_s=0.3, other_s=0.1)
            clock[0] += 50  # between calls: not the transformer's
    first, second = recorder.steps([1000.0, 500.0])
    assert (first.index, first.timestep, first.density) == (0, 1000.0, 0.5)
    assert (first.total_ms, first.attention_ms, first.other_ms) == pytest.approx((400, 300, 100))
    assert (second.total_ms, second.attention_ms, second.other_ms) == pytest.approx((800, 600, 200))


def test_exchanges_are_neither_attention_nor_the_rest(clock: list[float]) -> None:
    recorder = StepRecorder()
    for _ in range(2):
        recorder.begin_call(0, density=0.5)
        for sent_bytes in (300, 20):
            with recorder.exchange(sent_bytes):
                clock[0] += 0.25
        with recorder.attention():
            clock[0] += 0.125
        clock[0] += 0.5
        recorder.end_call()
    (step,) = recorder.steps([1000.0])
    assert (step.total_ms, step.attention_ms, step.exchange_ms, step.other_ms) == (2250, 250, 1000, 1000)
    assert step.exchanged_bytes == 640


def test_a_call_that_failed_is_left_out(clock: list[float]) -> None:
    recorder = StepRecorder()
    record_call(recorder, clock, 0, 0.3, 0.1)
    recorder.begin_call(1, density=0.5)
    assert [step.index for step in recorder.steps([1.0, 0.5])] == [0]


class Event:
    """A CUDA event on a made-up device that is one step behind: reading before `synchronize` is an error."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.done = False

    def record(self, stream: object) -> None:
        Event.now += 1.5
        self.at = Event.now

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, end: Event) -> float:
        assert end.done
        return end.at - self.at


def test_cuda_marks_are_events_that_are_read_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    recorder = StepRecorder(torch.device("cuda"))
    recorder.begin_call(0, density=1.0)
    with recorder.attention():
        pass
    recorder.end_call()
    (step,) = recorder.steps([7.0])
    assert (step.total_ms, step.attention_ms, step.other_ms) == (4.5, 1.5, 3.0)


@pytest.mark.gpu
def test_cuda_events_time_the_device() -> None:
    recorder = StepRecorder("cuda")
    square = torch.randn(4096, 4096, device="cuda")
    recorder.begin_call(0, density=1.0)
    with recorder.attention():
        torch.matmul(square, square)
    recorder.end_call()
    (step,) = recorder.steps([1.0])
    # 137 GFLOP take longer than 0.1 ms on any device so far.
    assert 0.1 < step.attention_ms <= step.total_ms


def test_phases_add_up_and_wait_for_the_device(clock: list[float]) -> None:
    def wait() -> None:
        clock[0] += 2

    phases = Phases(wait)
    for _ in range(2):
        with phases("decode"):
            clock[0] += 1
        clock[0] += 50
    with phases("save"):
        pass
    assert phases.phases_ms == pytest.approx({"decode": 6000, "save": 2000})
    assert list(phases.phases_ms) == ["decode", "save"]
