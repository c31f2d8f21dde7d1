"""What is recorded of a run with full attention, against masses computed from what the run attended."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_flux
import torch
from recall_cases import dense_mask
from recorded_calls import STEPS, Keeper, flux_call, hunyuan_call

import grat_cli
from grat_cli.attention.recall import BINS
from grat_cli.attention.record import AttentionRecorder, observation_preset
from grat_cli.errors import BadInput
from grat_kernels import Grouping, build_plan


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("make", [flux_call, hunyuan_call])
def test_the_record_of_all_queries_is_the_mass_under_each_mask(make: Any) -> None:
    pipe, size, chosen, judged, call = make()
    watched = observation_preset(chosen, judged)

    def run(observer: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        with grat_cli.install(pipe, watched, **size, observer=observer) as installation:
            result = pipe(**size, **call, generator=generator, output_type="latent")[0]
        assert installation.last_schedule.density == 1
        return result

    keeper = Keeper()
    expected_latents = run(keeper)
    layers, heads = max(inputs.layer for _, inputs in keeper.seen) + 1, keeper.seen[0][1].query.shape[2]
    recorder = AttentionRecorder(judged, STEPS, layers, heads, rows=10**6)
    assert torch.equal(run(recorder), expected_latents)  # looking changes nothing
    record = recorder.record()

    masses = np.zeros((STEPS, layers, heads, 3))
    texts = np.zeros((STEPS, layers, heads))
    for step, inputs in keeper.seen:
        full = inputs.plan
        image = slice(full.image_start, full.image_start + full.image_tokens)
        for sample in range(len(inputs.query)):
            scores = torch.einsum("qhd,khd->hqk", inputs.query[sample], inputs.key[sample]).double() * inputs.scale
            if inputs.text_valid is not None:
                scores[..., full.text_start + int(inputs.text_valid[sample]) : full.text_start + full.text_len] = -1e9
            mass = scores.softmax(-1)[:, image]
            texts[step, inputs.layer] += (1 - mass[..., image].sum(-1).mean(-1).numpy()) / len(inputs.query)
            for number, one in enumerate(judged[:3]):
                grouping = Grouping(full.grouping.grid, one.group, full.grouping.cells)
                mask = torch.from_numpy(dense_mask(build_plan(grouping, one.pattern(), full.text_len, full.text_first)))
                kept = (mass[..., image] * mask).sum(-1).mean(-1).numpy()
                masses[step, inputs.layer, :, number] += kept / len(inputs.query)
    np.testing.assert_allclose(record.text, texts, atol=1e-5)
    np.testing.assert_allclose(record.image[..., :3], masses, atol=1e-5)
    np.testing.assert_allclose(record.recall[..., 0], 1, atol=1e-5)
    np.testing.assert_allclose(record.error[..., 0], 0, atol=1e-10)
    np.testing.assert_allclose(record.distances.sum(-1), 1 - texts, atol=1e-5)
    assert (record.error[..., 3] < record.error[..., 1]).mean() > 0.5  # means of what is far away help
    assert (record.error[..., 4] < record.error[..., 3]).mean() > 0.5  # and to tell some of that by content
    assert (record.image[..., 4] > record.image[..., 1]).all()
    assert (record.loss[..., 1] > 0).all()
    np.testing.assert_allclose(record.loss[..., 0], 0, atol=1e-10)
    assert record.densities[0] == 1
    assert (np.diff(record.densities[[1, 3, 2, 0]]) > 0).all()


def test_only_the_steps_asked_for_are_looked_at() -> None:
    pipe, size, chosen, judged, call = flux_call()
    recorder = AttentionRecorder(judged, STEPS, tiny_flux.LAYERS, 2, rows=8, recorded=[1])
    with grat_cli.install(pipe, observation_preset(chosen, judged), **size, observer=recorder):
        pipe(**size, **call, output_type="latent")
    record = recorder.record()
    np.testing.assert_array_equal(
        record.queries, [[0] * tiny_flux.LAYERS, [8] * tiny_flux.LAYERS, [0] * tiny_flux.LAYERS]
    )
    assert record.distances.shape == (STEPS, tiny_flux.LAYERS, 2, BINS)
    assert record.image_deviation[1, :, :, 1].min() > 0


def test_runs_that_are_not_full_are_refused() -> None:
    pipe, size, chosen, judged, call = flux_call()
    recorder = AttentionRecorder(judged, STEPS, tiny_flux.LAYERS, 2)
    with pytest.raises(BadInput, match="no attention was recorded"):
        recorder.record()
    sparse = chosen.model_copy(update={"schedule": chosen.schedule.model_copy(update={"dense_steps": 0})})
    with (
        grat_cli.install(pipe, sparse, **size, observer=recorder),
        pytest.raises(BadInput, match="of runs with full attention"),
    ):
        pipe(**size, **call, output_type="latent")
