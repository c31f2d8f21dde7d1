"""Which step a pipeline is at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class PipelineClock:
    """Steps of a pipeline's runs, from its scheduler's own counters: plain integers, so nothing waits."""

    def __init__(self, pipe: Any, first_step: int = 0, steps: int | None = None) -> None:
        """Of a pipeline whose calls go on at a step of a run, which has so many in all; None for those of each call."""
        self._pipe, self._first_step, self._steps = pipe, first_step, steps
        self._sigmas: tuple[torch.Tensor, tuple[float, ...]] | None = None  # and of which timesteps

    def current_step(self) -> int:
        """The step of the call under way."""
        return self._first_step + step_under_way(self._pipe.scheduler, self.begin_index())

    def begin_index(self) -> int:
        """Index of the first step that is run: pipelines that do not tell their scheduler run the last so many."""
        scheduler = self._pipe.scheduler
        if scheduler.begin_index is not None:
            return scheduler.begin_index
        steps = len(scheduler.timesteps)
        return max(0, steps - getattr(self._pipe, "num_timesteps", steps))

    def steps_to_run(self) -> int:
        """Steps of the call."""
        return len(self._pipe.scheduler.timesteps) - self.begin_index()

    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self._steps or self._first_step + self.steps_to_run()

    def timesteps(self) -> tuple[torch.Tensor, int]:
        """Of the scheduler, and which of them is under way."""
        scheduler = self._pipe.scheduler
        index = scheduler.step_index
        return scheduler.timesteps, self.begin_index() if index is None else index

    def sigmas(self) -> tuple[float, ...] | None:
        """Of the whole run's steps, and what the last one ends at; None where the scheduler has none.

        Waits for the device once a run.
        """
        timesteps, _ = self.timesteps()
        if self._sigmas is None or not same(self._sigmas[0], timesteps):
            scheduler = self._pipe.scheduler
            of_schedule = getattr(getattr(scheduler, "whole", scheduler), "sigmas", None)
            self._sigmas = timesteps, () if of_schedule is None else tuple(map(float, of_schedule.tolist()))
        count = self.total_steps() + 1
        known = self._sigmas[1]
        return known[-count:] if len(known) >= count else None

    def laid_out(self) -> torch.Tensor:
        """Timesteps of the schedule that the run is the end of, another tensor for every run."""
        scheduler = self._pipe.scheduler
        return getattr(scheduler, "whole", scheduler).timesteps  # see `families.resumption.LaterSteps`


class CountedCall(NamedTuple):
    """Where a run is at a transformer call.

    Attributes:
        begins_run: whether it is the first of its run.
        step: of the run.
        call: which of the calls of the step.
    """

    begins_run: bool
    step: int
    call: int


class CallCounter:
    """Counts transformer calls, and tells runs apart by the timesteps that a scheduler lays out for each."""

    def __init__(self, clock: PipelineClock) -> None:
        """Of a clock's pipeline."""
        self._clock = clock
        self._timesteps: torch.Tensor | None = None
        self._step, self._call = -1, 0

    def count(self) -> CountedCall:
        """One more call."""
        step = self._clock.current_step()
        timesteps, _ = self._clock.timesteps()
        begins = self._timesteps is None or not same(timesteps, self._timesteps) or step < self._step
        self._call = self._call + 1 if step == self._step and not begins else 0
        self._timesteps, self._step = timesteps, step
        return CountedCall(begins, step, self._call)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors are one, or the same part of one; while either is held, no other can take its place."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def step_under_way(scheduler: Any, begin: int | None = None) -> int:
    """The denoising step that a scheduler is at, counted from 0 over the steps that are run.

    Args:
        scheduler: of diffusers.
        begin: index of the first of these; None for what the scheduler was told.
    """
    first: int = (scheduler.begin_index or 0) if begin is None else begin
    return 0 if scheduler.step_index is None else scheduler.step_index - first
