"""What several GPUs are foretold to make of a run, and what many machines."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.estimates.components import components_of
from grat_cli.estimates.fitting import judge
from grat_cli.estimates.fleet import (
    BEAT_S,
    OPERATIONS_OF_CLAIM,
    STORE_OPERATIONS,
    STORE_RATE,
    TOLERATED,
    Fleet,
)
from grat_cli.estimates.hardware import GPUS, LINK_SHARE, Device
from grat_cli.estimates.planning import Forecast, run_forecasts
from grat_cli.estimates.ranks import bytes_of_step, density_on_ranks, exchange_of
from grat_cli.estimates.several_gpus import SeveralGpus, several_gpus
from grat_cli.estimates.time import denoise_seconds, estimate_for
from grat_cli.files import claims
from grat_cli.generation.selection import select_preset
from grat_cli.models.catalogue import choose_model
from grat_cli.models.parallel import Parallel
from grat_cli.models.resolution import Resolution

FLUX, QWEN = choose_model("flux-dev"), choose_model("qwen-image")
H100 = GPUS["h100"]


def runs_of(model: Any = FLUX, side: int = 2048, **flags: Any) -> list[Forecast]:
    return run_forecasts(select_preset(model, **flags), model, Resolution(side, side))


def made_by(parallel: Parallel, model: Any = FLUX, device: Device = H100, **flags: Any) -> SeveralGpus:
    runs, components = runs_of(model), components_of(model)
    execution = judge(runs, components, model, device, parallel=parallel, **flags).execution
    return several_gpus(runs, components, execution, device)


def test_attention_is_divided_and_text_is_not() -> None:
    """Where nothing is exchanged the speed-up falls short of the number of GPUs by what all of them compute: the text,
    and the weights that they read."""
    four = made_by(Parallel(4))
    assert four.one is not None
    assert four.several is not None
    assert four.several.attention == pytest.approx(four.one.attention / 4)
    assert four.one.rest / 4 < four.several.rest < four.one.rest / 2
    assert four.speedup is not None
    assert four.ceiling is not None
    assert 2 < four.speedup < four.ceiling < 4
    alone = made_by(Parallel(1))
    assert alone.one == alone.several
    assert (alone.speedup, alone.ceiling, alone.of_steps) == (1.0, 1.0, (0,))


def test_an_exchange_takes_its_bytes_over_the_link() -> None:
    slower = replace(H100, nvlink=H100.nvlink and H100.nvlink / 2)
    usual, slow = (made_by(Parallel(2), device=device) for device in (H100, slower))
    assert usual.of_steps == slow.of_steps
    assert usual.several is not None
    assert slow.several is not None
    assert H100.nvlink is not None
    moving = max(usual.of_steps) / (LINK_SHARE * H100.nvlink)
    assert slow.several.exchange - usual.several.exchange == pytest.approx(moving, rel=1e-3)
    assert slow.several._replace(exchange=0) == usual.several._replace(exchange=0)


def test_calls_of_guidance_are_made_at_once() -> None:
    """Each half has half of the calls, with more tokens in each, and sends less."""
    split, shared = made_by(Parallel(2, 2), QWEN), made_by(Parallel(4), QWEN)
    assert (len(split.of_call), len(shared.of_call)) == (2, 4)
    assert max(split.of_steps) < max(shared.of_steps)
    assert split.speedup is not None
    assert shared.speedup is not None
    assert split.speedup > shared.speedup
    pair = made_by(Parallel(1, 2), QWEN)
    run = runs_of(QWEN)[-1]
    assert pair.of_call == (0,)
    assert bytes_of_step(run, Parallel(1, 2), 0) == (exchange_of(run, Parallel(1)).of_guidance,)
    assert pair.several is not None
    assert pair.one is not None
    assert pair.several.attention + pair.several.rest == pytest.approx((pair.one.attention + pair.one.rest) / 2)


def test_shared_weights_are_gathered_in_every_call_and_take_less_memory() -> None:
    runs, components = runs_of(), components_of(FLUX)
    whole, share = (
        judge(runs, components, FLUX, H100, parallel=Parallel(4), shards_weights=shards) for shards in (False, True)
    )
    made = denoise_seconds(runs[-1], components, share.execution, H100)
    assert made is not None
    assert H100.nvlink is not None
    weights = 2 * components.transformer.parameters
    steps = runs[-1].schedule.steps
    assert made.weights == pytest.approx(steps * 0.75 * weights / (LINK_SHARE * H100.nvlink))
    spared = whole.memory.peak - share.memory.peak
    assert spared == pytest.approx(0.75 * weights - 2 * 2 * components.transformer.largest_block)
    tight = judge(runs, components, FLUX, GPUS["l40s"], parallel=Parallel(4), at_size=lambda size: runs)
    assert tight.fits
    tight = judge(runs, components, FLUX, GPUS["5090"], parallel=Parallel(4), at_size=lambda size: runs)
    assert (tight.fits, tight.advice) == (False, "try --shard-weights")


def test_ranks_wait_for_the_one_whose_heads_attend_most() -> None:
    rules = "schedule.rules=[{heads: 0-5, variant: full}]"
    run = runs_of(side=1024, variant="b", set_items=(rules,))[-1]
    schedule = run.schedule
    assert density_on_ranks(schedule, 0, 1) == pytest.approx(schedule.density_of_step(0))
    assert schedule.density_of_step(0) < density_on_ranks(schedule, 0, 2) < 1
    assert density_on_ranks(schedule, 0, 4) == 1


def test_without_rates_bytes_are_told_alone() -> None:
    unknown = made_by(Parallel(2), device=Device("new", "Imaginary 1", 2**40))
    assert (unknown.speedup, unknown.ceiling, unknown.link) == (None, None, None)
    assert unknown.of_steps == made_by(Parallel(2)).of_steps
    assert "add --gpu h200" in unknown.lines[1]


def test_cards_without_nvlink_reach_each_other_by_pcie() -> None:
    assert GPUS["4090"].peers == ("PCIe", 32e9)
    assert GPUS["b200"].peers == ("NVLink", 900e9)
    assert all(gpu.peers and gpu.power for gpu in GPUS.values())


def test_all_phases_but_denoising_are_those_of_one() -> None:
    run, components = runs_of()[-1], components_of(FLUX)
    one, four = (
        estimate_for(run, components, judge([run], components, FLUX, H100, parallel=parallel).execution, H100)
        for parallel in (Parallel(1), Parallel(4))
    )
    assert one is not None
    assert four is not None
    assert {name for name in one if one[name] != four[name]} == {"denoise"}


# ---- Fleets


def test_a_claim_takes_as_many_operations_as_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def counting(name: str) -> Any:
        stock = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counted.append(name)
            return stock(*args, **kwargs)

        return call

    of_folder = claims.Claims(tmp_path)
    for name in ("stat", "lstat", "listdir", "scandir", "open", "mkdir", "rmdir", "rename", "unlink", "utime"):
        monkeypatch.setattr(os, name, counting(name))
    with of_folder.take("item") or pytest.fail("nobody has it"):
        pass
    monkeypatch.undo()
    assert OPERATIONS_OF_CLAIM / 2 < len(counted) <= OPERATIONS_OF_CLAIM, counted


FLEETS = st.builds(
    Fleet,
    workers=st.integers(1, 1_000_000),
    gpus=st.integers(1, 8),
    seconds=st.floats(0.1, 1e5),
    weights=st.floats(1e6, 1e12),
    power=st.floats(50, 1500),
)


@given(FLEETS)
def test_fleets_grow_until_something_breaks(fleet: Fleet) -> None:
    twice = replace(fleet, workers=2 * fleet.workers)
    assert twice.outputs_per_hour == pytest.approx(2 * fleet.outputs_per_hour)
    assert twice.outputs_per_kwh == fleet.outputs_per_kwh
    assert twice.looking == pytest.approx(4 * fleet.looking)
    assert twice.loading >= fleet.loading
    last = replace(fleet, workers=fleet.most_with_claims)
    assert "--ray" not in last.breaks or last.workers == 1
    assert "--ray" in replace(fleet, workers=fleet.most_with_claims + 2).breaks
    assert "copy" not in replace(fleet, workers=fleet.most_with_store).breaks
    assert "copy" in replace(fleet, workers=fleet.most_with_store + 1).breaks


def test_the_arithmetic_of_a_fleet() -> None:
    fleet = Fleet(workers=1000, gpus=4, seconds=60.0, weights=30e9, power=700)
    assert fleet.outputs_per_hour == 60_000
    assert fleet.outputs_per_kwh == pytest.approx(1000 / (4 * 700 / 60))
    assert fleet.loading == pytest.approx(1000 * 30e9 / STORE_RATE)
    assert fleet.looking == pytest.approx(1000 * 1000 * 8 / STORE_OPERATIONS / 60)
    assert fleet.claiming == pytest.approx(1000 * (18 / 60 + 0.1))
    assert BEAT_S == claims.BEAT_S
    assert fleet.breaks == "weights: keep a copy on each, claims: use --ray"
    assert replace(fleet, workers=10).breaks == "nothing"
    assert replace(fleet, power=None).outputs_per_kwh is None
    assert len(replace(fleet, power=None).lines) == 2
    assert fleet.most_with_claims**2 == pytest.approx(TOLERATED * STORE_OPERATIONS * 60 / 8, rel=0.01)
