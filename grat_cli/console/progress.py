"""How a run shows that it gets on, on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import TaskID

    from grat_cli.console.worker_table import WorkerRow

PHASE_WORDS = {
    "load": "loading",
    "text": "reading the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "save": "saving",
    "workers": "starting workers",
}


class Hints(Protocol):
    """What takes hints: `console.output.Output`."""

    error_console: Any

    def hint(self, *texts: str | None) -> Any:
        """Shows some."""
        ...


class ProgressDisplay:
    """A `request.WritingProgress` that is shown while a `with` block lasts; this one shows nothing."""

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the terminal to others while a `with` block lasts."""
        yield

    def phase(self, name: str) -> None:
        """A phase begins: load, text, denoise, decode, encode or save."""

    def step(self, done: int, total: int) -> None:
        """So many denoising steps are done."""

    def written(self, count: int) -> None:
        """So many bytes of the output are written."""

    def work(self, text: str) -> None:
        """What of the step that is told next was computed, in a few words."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def outputs(self, done: int, total: int) -> None:
        """So many outputs of a batch are done; the first call, with 0, says that a batch begins."""

    def waiting(self, others: int) -> None:
        """Nothing is left of a batch but so many outputs that other workers make."""

    def workers(self, rows: Sequence[WorkerRow]) -> None:
        """What the workers of a batch are at, now and then; they tell no phases and steps of their own."""


class LogProgress(ProgressDisplay):
    """For files and pipes: a line per phase, and during denoising a line at most every `interval_s` seconds."""

    def __init__(self, output: Hints, interval_s: float = 10.0) -> None:
        self._output, self._interval_s = output, interval_s
        self._pace, self._last_line = _Pace(), 0.0
        self._batch: _Pace | None = None
        self._work = ""
        self._others = 0

    def phase(self, name: str) -> None:
        self._pace, self._work = _Pace(), ""
        if self._batch is None:  # else there would be several lines for each of hundreds of outputs
            self._last_line = time.monotonic()
            self._output.hint(PHASE_WORDS.get(name, name))

    def step(self, done: int, total: int) -> None:
        per_step, now = self._pace.after(done), time.monotonic()
        is_last = done == total and self._batch is None
        if done and (now - self._last_line >= self._interval_s or is_last):
            self._last_line = now
            left = f"{duration(per_step * (total - done))} left"
            self._output.hint(f"step {done}/{total}, {pace(per_step)}, {left}{self._work}")

    def work(self, text: str) -> None:
        self._work = f", {text}"

    def written(self, count: int) -> None:
        if (now := time.monotonic()) - self._last_line >= self._interval_s:
            self._last_line = now
            self._output.hint(f"{count / 2**20:.0f} MiB written")

    def note(self, text: str) -> None:
        self._output.hint(text)

    def outputs(self, done: int, total: int) -> None:
        self._batch = self._batch or _Pace()
        each = self._batch.after(done)
        if done:
            self._last_line = time.monotonic()
            self._output.hint(batch_text(done, total, each))

    def waiting(self, others: int) -> None:
        if others != self._others:
            self._others = others
            self._output.hint(waiting_text(others))


class LiveProgress(ProgressDisplay):
    """For terminals: a bar with steps, time per step and time left; a spinner for other phases."""

    def __init__(self, output: Hints) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn

        self._output = output
        self._progress = _bars_class()(
            SpinnerColumn("dots" if output.error_console.encoding.startswith("utf") else "line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[steps]}", markup=False),
            console=output.error_console,
            transient=True,
            redirect_stdout=False,  # else results printed meanwhile would end up on stderr
            expand=True,
        )
        self._task = self._progress.add_task("", total=None, steps="")
        self._pace = _Pace()
        self._batch: tuple[_Pace, TaskID] | None = None
        self._work = ""

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    def phase(self, name: str) -> None:
        self._pace, self._work = _Pace(), ""
        self._progress.reset(self._task, description=PHASE_WORDS.get(name, name), total=None, steps="")

    def step(self, done: int, total: int) -> None:
        steps = f"{done}/{total}"
        per_step = self._pace.after(done)
        if done:
            steps += f" {pace(per_step)} {duration(per_step * (total - done))} left{self._work}"
        self._progress.update(self._task, completed=done, total=total, steps=steps)

    def work(self, text: str) -> None:
        self._work = f" ({text})"

    def written(self, count: int) -> None:
        self._progress.update(self._task, steps=f"{count / 2**20:.0f} MiB")

    def note(self, text: str) -> None:
        self._output.hint(text)

    def outputs(self, done: int, total: int) -> None:
        if self._batch is None:
            self._batch = _Pace(), self._progress.add_task("batch", total=total, steps="")
        pace, task = self._batch
        text = batch_text(done, total, pace.after(done)) if done else f"0 of {total}"
        self._progress.update(task, completed=done, steps=text)

    def waiting(self, others: int) -> None:
        self.phase(waiting_text(others))

    def workers(self, rows: Sequence[WorkerRow]) -> None:
        self._progress.rows = rows
        self._progress.update(self._task, visible=not rows)


@cache
def _bars_class() -> Any:
    """Made when it is needed: rich takes time to load."""
    from rich.progress import Progress

    from grat_cli.console.worker_table import worker_table

    class Bars(Progress):
        """Bars, with a table of workers above them where there are any."""

        rows: Sequence[WorkerRow] = ()

        def get_renderables(self) -> Iterator[Any]:
            """What is drawn anew several times a second."""
            if self.rows:
                yield worker_table(self.rows, self.console.width, max(3, self.console.height - 4))
            yield from super().get_renderables()

    return Bars


class _Pace:
    """Time per step, counted from where a phase began; a resumed run does not begin at step 0."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._before: int | None = None

    def after(self, done: int) -> float:
        """Mean seconds per step, when `done` steps of the whole run are done."""
        if self._before is None:
            self._before = max(0, done - 1)
        return (time.monotonic() - self._began) / max(1, done - self._before)


def pace(seconds_per_step: float) -> str:
    """Time per step, such as `0.21 s/step`."""
    return f"{seconds_per_step:.{0 if seconds_per_step >= 100 else 2}f} s/step"


def batch_text(done: int, total: int, seconds_each: float) -> str:
    """How far a batch is, such as `3 of 12 done, 4.1 s each, 37 s left`."""
    each = f"{seconds_each:.1f} s" if seconds_each < 60 else duration(seconds_each)
    return f"{done} of {total} done, {each} each, {duration(seconds_each * (total - done))} left"


def waiting_text(others: int) -> str:
    """What a worker does that has nothing left to make."""
    return f"waiting for {others} that other workers make"


def duration(seconds: float) -> str:
    """A time for people: `8 s`, `2:05` or `1:02:05`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
