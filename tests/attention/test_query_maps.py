"""Where single queries look, against softmax over all keys in raster order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from recorded_calls import STEPS, Keeper, flux_call, hunyuan_call

import grat_cli
from grat_cli.attention import recall
from grat_cli.attention.observers import Observers
from grat_cli.attention.query_record import MOST_CELLS, CallCounter, QueryRecorder, map_cell
from grat_cli.attention.recall import BINS, even_distances, query_maps
from grat_cli.attention.record import observation_preset
from grat_kernels import Block, Full, Grid, Grouping, build_plan
from grat_kernels.geometry import cell_counts

HEADS, HEAD_DIM, TEXT = 3, 8, 5
SHAPES = [((9, 7), (4, 2)), ((3, 5, 6), (2, 2, 2)), ((1, 1), (4, 2))]


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("shape", "group"), SHAPES)
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("valid", [None, 2])
@pytest.mark.parametrize("budget", [recall._BUDGET_BYTES, 1])
def test_maps_are_softmax_over_all_keys_in_raster_order(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    group: tuple[int, ...],
    text_first: bool,
    valid: int | None,
    budget: int,
) -> None:
    monkeypatch.setattr(recall, "_BUDGET_BYTES", budget)
    grid = Grid(shape)
    plan = build_plan(Grouping(grid, group), Block(1), TEXT, text_first)
    generator = torch.Generator().manual_seed(0)
    # Drawn in raster order, text last: the naive result needs no plan.
    query, key = (2 * torch.randn(grid.tokens + TEXT, HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    scores = torch.einsum("qhd,khd->qhk", query, key).double() / HEAD_DIM**0.5
    if valid is not None:
        scores[..., grid.tokens + valid :] = -torch.inf
    expected = scores.softmax(-1)

    image, text = torch.from_numpy(plan.order), torch.arange(grid.tokens, grid.tokens + TEXT)
    joint = torch.cat([text, image] if text_first else [image, text])
    asked = np.unique([0, grid.tokens // 2, grid.tokens - 1])
    one = (1,) * grid.axes
    found = query_maps(query[joint], key[joint], plan, asked, one, text_valid=valid)
    assert found.image.shape == (len(asked), HEADS, *shape)
    maps = expected[asked, :, : grid.tokens].unflatten(2, shape)
    torch.testing.assert_close(found.image.double(), maps, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.text.double(), expected[asked, :, grid.tokens :].sum(-1), atol=1e-6, rtol=1e-5)
    # Rounding errors of a sum in fp32 grow with the number of keys at most.
    bound = (grid.tokens + TEXT) * torch.finfo(torch.float32).eps
    assert (found.image.flatten(2).sum(-1) + found.text - 1).abs().max() <= bound

    cell = (*one[:-2], 2, 2)
    pooled = query_maps(query[joint], key[joint], plan, asked, cell, text_valid=valid).image
    assert tuple(pooled.shape[2:]) == cell_counts(grid, cell)
    corner = maps[..., :2, :2].sum((-1, -2))
    torch.testing.assert_close(pooled[..., 0, 0].double(), corner, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [flux_call, hunyuan_call])
def test_the_record_is_of_the_queries_asked_for(make: Any) -> None:
    """Against what each attention of the run was computed from."""
    pipe, size, chosen, judged, call = make()
    call = call | ({"prompt": ["waves at night"]} if "prompt" in call else {})
    watched = observation_preset(chosen, judged)
    with grat_cli.install(pipe, watched, **size) as installation:
        grid = installation.grid
    queries = [(0,) * grid.axes, tuple(extent // 2 for extent in grid.shape)]
    keeper, counter = Keeper(), CallCounter()
    layers, heads = 3, 2
    recorder = QueryRecorder(queries, grid, (0, 2), layers, heads)
    with grat_cli.install(pipe, watched, **size, observer=Observers(keeper, recorder, counter)):
        pipe(**size, **call, generator=torch.Generator().manual_seed(0), output_type="latent")
    record = recorder.record()
    assert counter.calls == STEPS
    assert counter.text_tokens == keeper.seen[0][1].plan.text_len
    assert record.maps.shape == (2, 2, layers, *grid.shape)

    over_steps = np.zeros((2, layers, heads, *grid.shape[-2:]))
    for step, inputs in keeper.seen:
        if step == 1:
            continue
        at, plan = (0, 2).index(step), inputs.plan
        image = slice(plan.image_start, plan.image_start + plan.image_tokens)
        for number, place in enumerate(queries):
            raster = int(np.ravel_multi_index(place, grid.shape))
            row = plan.image_start + int(np.flatnonzero(plan.order == raster)[0])
            scores = torch.einsum("hd,khd->hk", inputs.query[0, row], inputs.key[0]).double() * inputs.scale
            if inputs.text_valid is not None:
                scores[:, plan.text_start + int(inputs.text_valid[0]) : plan.text_start + plan.text_len] = -torch.inf
            mass = scores.softmax(-1).numpy()
            expected = np.zeros((heads, grid.tokens))
            expected[:, plan.order] = mass[:, image]
            expected = expected.reshape(heads, *grid.shape)
            np.testing.assert_allclose(record.maps[number, at, inputs.layer], expected.mean(0), atol=1e-6)
            text = 1 - mass[:, image].sum(-1).mean()
            np.testing.assert_allclose(record.text[number, at, inputs.layer], text, atol=1e-6)
            over_steps[number, inputs.layer] += (expected if grid.axes == 2 else expected[:, place[0]]) / 2
    np.testing.assert_allclose(record.head_maps, over_steps, atol=1e-6)


def test_of_two_calls_in_a_step_the_first_is_kept() -> None:
    """The pipelines call with the prompt first, then without, where guidance is true."""
    pipe, size, chosen, judged, call = flux_call()
    watched = observation_preset(chosen, judged)
    unguided = {"prompt_embeds": call["prompt_embeds"], "pooled_prompt_embeds": call["pooled_prompt_embeds"]}
    negative = {f"negative_{name}": tensor + 1 for name, tensor in unguided.items()}

    def maps(**more: Any) -> np.ndarray:
        recorder = QueryRecorder([(3, 3)], Grid((10, 7)), (0,), 3, 2)
        with grat_cli.install(pipe, watched, **size, observer=recorder):
            generator = torch.Generator().manual_seed(0)
            pipe(**size, **call, **more, generator=generator, output_type="latent")
        return recorder.record().maps

    np.testing.assert_array_equal(maps(), maps(true_cfg_scale=2.0, **negative))


def test_maps_stay_small_and_keep_frames_apart() -> None:
    assert map_cell(Grid((64, 64))) == (1, 1)
    assert map_cell(Grid((512, 512))) == (4, 4)
    assert map_cell(Grid((33, 45, 80)))[0] == 1
    for grid in (Grid((512, 300)), Grid((33, 45, 80)), Grid((1, 1))):
        assert np.prod(cell_counts(grid, map_cell(grid))) <= MOST_CELLS


def test_maps_of_heads_are_coarser_where_there_are_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grat_cli.attention.query_record.MOST_CELLS_OF_HEADS", 12)
    pipe, size, chosen, judged, call = flux_call()
    recorder = QueryRecorder([(3, 3)], Grid((10, 7)), (0, 1), 3, 2)
    with grat_cli.install(pipe, observation_preset(chosen, judged), **size, observer=recorder):
        pipe(**size, **call, generator=torch.Generator().manual_seed(0), output_type="latent")
    record = recorder.record()
    assert (record.cell, record.head_cell, record.head_maps.shape[-2:]) == ((1, 1), (3, 3), (4, 3))
    exact = record.maps.mean(1)  # over steps
    coarse = record.head_maps.mean(2)
    np.testing.assert_allclose(coarse[..., 0, 0], exact[..., :3, :3].sum((-1, -2)), atol=1e-6)
    np.testing.assert_allclose(coarse[..., 3, 2], exact[..., 9:, 6:].sum((-1, -2)), atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 7), (3, 5, 6), (1, 1), (1, 8)])
def test_even_distances_are_those_of_all_pairs(shape: tuple[int, ...]) -> None:
    places = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), 1)
    apart = np.sqrt(((places[:, None] - places[None]) ** 2).sum(-1))
    diagonal = max(1.0, np.sqrt(sum((extent - 1) ** 2 for extent in shape)))
    expected = np.bincount((apart / diagonal * BINS).astype(int).clip(max=BINS - 1).ravel(), minlength=BINS)
    np.testing.assert_allclose(even_distances(Grid(shape)), expected / apart.size, atol=1e-12)


def test_even_distances_are_what_even_attention_records() -> None:
    plan = build_plan(Grouping(Grid((9, 7)), (4, 2)), Full(), TEXT)
    query, key, value = (torch.zeros(plan.tokens, 1, HEAD_DIM) for _ in range(3))
    every = recall.sample_positions(plan, plan.image_tokens)
    found = recall.row_statistics(query, key, value + 1, [plan], every).distances[0]
    np.testing.assert_allclose(found / found.sum(), even_distances(Grid((9, 7))), atol=1e-6)
