"""Products of attention outputs over the steps of a run, against outputs of the whole."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import tiny_flux
import torch
from recorded_calls import STEPS, Keeper, flux_call, hunyuan_call

import grat_cli
from grat_cli.attention.observers import Observers
from grat_cli.attention.output_gram import OutputGramRecorder
from grat_cli.attention.record import observation_preset
from grat_cli.errors import BadInput


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def outputs_of(keeper: Keeper) -> dict[tuple[int, int, int], list[np.ndarray]]:
    """Outputs of valid rows, `[rows, H, D]` of each step, by layer, call of a step and sample."""
    found, calls = defaultdict(list), defaultdict(int)
    for step, inputs in keeper.seen:
        call = calls[step, inputs.layer]
        calls[step, inputs.layer] += 1
        plan = inputs.plan
        for sample in range(len(inputs.query)):
            valid = torch.ones(inputs.key.shape[1], dtype=torch.bool)
            if inputs.text_valid is not None:
                valid[plan.text_start + int(inputs.text_valid[sample]) : plan.text_start + plan.text_len] = False
            query, key, value = (tensor[sample, valid].double() for tensor in (inputs.query, inputs.key, inputs.value))
            mass = (torch.einsum("qhd,khd->hqk", query, key) * inputs.scale).softmax(-1)
            found[inputs.layer, call, sample].append(torch.einsum("hqk,khd->qhd", mass, value).numpy())
    return found


@pytest.mark.parametrize("make", [flux_call, hunyuan_call])
def test_the_gram_of_all_rows_is_that_of_the_outputs(make: Any) -> None:
    pipe, size, chosen, judged, call = make()
    watched = observation_preset(chosen, judged)
    keeper = Keeper()

    def run(observer: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        with grat_cli.install(pipe, watched, **size, observer=observer):
            return pipe(**size, **call, generator=generator, output_type="latent")[0]

    expected_latents = run(keeper)
    layers = max(inputs.layer for _, inputs in keeper.seen) + 1
    recorder = OutputGramRecorder(STEPS, layers, rows=10**6)
    assert torch.equal(run(recorder), expected_latents)  # looking changes nothing
    record = recorder.record()

    of_layers = defaultdict(list)
    for (layer, _, _), of_steps in outputs_of(keeper).items():
        stacked = np.stack(of_steps)
        of_layers[layer].append(np.einsum("srhd,trhd->hst", stacked, stacked) / stacked.shape[1])
    assert record.calls == len(of_layers[0])
    for layer in range(layers):
        wanted = np.mean(of_layers[layer], 0)
        np.testing.assert_allclose(record.gram[layer], wanted, atol=1e-5 * np.abs(wanted).max())


def test_some_rows_are_the_same_ones_at_every_step() -> None:
    pipe, size, chosen, judged, call = flux_call()
    few, all_rows = (OutputGramRecorder(STEPS, tiny_flux.LAYERS, rows=rows) for rows in (6, 10**6))
    with grat_cli.install(pipe, observation_preset(chosen, judged), **size, observer=Observers(few, all_rows)):
        pipe(**size, **call, output_type="latent", generator=torch.Generator().manual_seed(0))
    sampled, whole = few.record().gram, all_rows.record().gram
    # Were they others at each step, products of different steps would be far below the squares.
    own = np.sqrt(np.einsum("lhss->lhs", sampled))
    alike, whole_alike = (
        gram / (root[..., :, None] * root[..., None, :])
        for gram, root in ((sampled, own), (whole, np.sqrt(np.einsum("lhss->lhs", whole))))
    )
    np.testing.assert_allclose(alike, whole_alike, atol=0.2)


def test_what_was_broken_off_is_no_record() -> None:
    with pytest.raises(BadInput, match="not been called"):
        OutputGramRecorder(STEPS, tiny_flux.LAYERS).record()
    pipe, size, chosen, judged, call = flux_call()
    recorder = OutputGramRecorder(STEPS + 1, tiny_flux.LAYERS)
    with grat_cli.install(pipe, observation_preset(chosen, judged), **size, observer=recorder):
        pipe(**size, **call, output_type="latent")
    with pytest.raises(BadInput, match="not run to its end"):
        recorder.record()
