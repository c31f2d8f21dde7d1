"""Schedulers that go on at a later step: the same samples, bit by bit, as if they had not been broken off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from grat_cli.errors import BadInput
from grat_cli.families.resumption import LaterSteps, remembered
from grat_cli.families.time_shift import shift_of, time_shift

STEPS = 6
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "unipc of three": lambda: UniPCMultistepScheduler(**FLOW, solver_order=3),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpm of three": lambda: DPMSolverMultistepScheduler(**FLOW, solver_order=3),
}


def predicted(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What stands for a model."""
    return torch.sin(3 * sample) + 0.001 * timestep


def steps(
    scheduler: Any, sample: torch.Tensor, begins: bool = True
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Samples after each step, and what is remembered then."""
    scheduler.set_timesteps(STEPS, device="cpu")
    if begins:  # some pipelines say so, some leave it to the scheduler
        scheduler.set_begin_index(0)
    found = []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(predicted(sample, timestep), timestep, sample, return_dict=False)[0]
        found.append((sample, remembered(scheduler, sample)))
    return found


@pytest.fixture
def start() -> torch.Tensor:
    return torch.randn(2, 4, 3, 2, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("first", range(1, STEPS))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_are_those_of_a_whole_run(name: str, first: int, begins: bool, start: torch.Tensor) -> None:
    whole = steps(SCHEDULERS[name](), start, begins)
    sample, history = whole[first - 1]
    rest = steps(LaterSteps(SCHEDULERS[name](), first, history), sample, begins)
    assert [torch.equal(ours, stock) for (ours, _), (stock, _) in zip(rest, whole[first:], strict=True)] == [True] * (
        STEPS - first
    )
    assert [sorted(kept) for _, kept in rest] == [sorted(kept) for _, kept in whole[first:]]


def test_from_outside_the_schedule_begins_at_the_later_step(start: torch.Tensor) -> None:
    stock = SCHEDULERS["unipc"]()
    whole = steps(stock, start)
    timesteps, sigmas = stock.timesteps.clone(), stock.sigmas.clone()
    later = LaterSteps(stock, 2, whole[1][1])
    later.set_timesteps(STEPS, device="cpu")
    assert torch.equal(later.timesteps, timesteps[2:])
    assert torch.equal(later.sigmas, sigmas[2:])
    assert (later.num_inference_steps, later.step_index, later.begin_index) == (STEPS - 2, 0, 0)
    assert torch.equal(stock.sigmas, sigmas), "a solver looks back in them"
    assert later.config is stock.config


def test_noise_that_a_scheduler_draws_is_not_used_up(start: torch.Tensor) -> None:
    def scheduler() -> Any:
        return FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)

    torch.manual_seed(3)
    samples, states = [start], [torch.get_rng_state()]
    stock = scheduler()
    stock.set_timesteps(STEPS)
    for timestep in stock.timesteps:
        samples.append(stock.step(predicted(samples[-1], timestep), timestep, samples[-1], return_dict=False)[0])
        states.append(torch.get_rng_state())
    torch.set_rng_state(states[3])
    rest = steps(LaterSteps(scheduler(), 3, {}), samples[3])
    assert torch.equal(rest[-1][0], samples[-1])


@pytest.mark.parametrize("change", ["missing", "more"])
def test_a_history_of_another_scheduler_is_refused(change: str, start: torch.Tensor) -> None:
    sample, history = steps(SCHEDULERS["unipc"](), start)[2]
    history = dict(history)
    if change == "missing":
        del history["last_sample"]
    else:
        history["sigmas"] = history["last_sample"]
    with pytest.raises(BadInput, match="not what a UniPCMultistepScheduler needs: start the run anew"):
        steps(LaterSteps(SCHEDULERS["unipc"](), 3, history), sample)


class Pipe:
    """What a time shift needs of a pipeline."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


@pytest.mark.parametrize("name", ["euler", "unipc", "dpm"])
def test_schedulers_are_shifted_by_the_name_that_they_have_for_it(name: str) -> None:
    stock = SCHEDULERS[name]()
    pipe = Pipe(stock)
    assert shift_of(stock, 100, None) == (3.0 if name == "euler" else 5.0)
    with time_shift(pipe, 100, 12.0) as shift:
        assert (shift, shift_of(pipe.scheduler, 100, None)) == (12.0, 12.0)
        config = {**stock.config, ("shift" if name == "euler" else "flow_shift"): 12.0}
        direct = type(stock).from_config(config)
        for scheduler in (pipe.scheduler, direct, stock):
            scheduler.set_timesteps(4)
        assert torch.equal(pipe.scheduler.sigmas, direct.sigmas)
        assert not torch.equal(pipe.scheduler.sigmas, stock.sigmas)
    assert pipe.scheduler is stock


def test_a_shift_of_what_counts_in_no_flows_is_refused() -> None:
    pipe = Pipe(UniPCMultistepScheduler())
    with (
        pytest.raises(BadInput, match=r"takes no time shift: leave sampling\.shift out"),
        time_shift(pipe, 100, 3.0),
    ):
        pass
