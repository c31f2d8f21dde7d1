"""Positions and scores beyond the trained size: against stock diffusers, and against sums done by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import tiny_flux
import torch
from flux_runs import RELATIVE, NoHostReads, Run, plan_of, raster_mask, relative_difference, run_with, snapshot

from grat_cli.attention.extrapolation import Extrapolation, frequencies, query_scale
from grat_cli.families.flux import FluxAdapter
from grat_kernels import Backend, Block, CrissCross, Far, Full, Grid, Pattern, Union, build_head_plan
from grat_kernels.reference import _dense_definition

TRAINED = (8, 12)
LARGE = Grid((16, 24))  # twice as long on both axes
CHANNELS, THETA = 56, 10000.0  # of Flux, per axis
LAST = CHANNELS // 2 - 1


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Any:
    return tiny_flux.transformer()


def call(model: Any, grid: Grid, pattern: Pattern, extrapolation: Extrapolation | None, **changes: Any) -> torch.Tensor:
    inputs = tiny_flux.inputs(*grid.shape) | changes
    with FluxAdapter(model, grid, extrapolation=extrapolation).attached(run_with(grid, pattern), Backend.SDPA):
        return model(**inputs)[0]


def by_hand(name: str, ratio: float, trained: int, time: float) -> list[float]:
    """Frequencies of one axis, number by number in Python's own floats."""
    result = []
    for index in range(CHANNELS // 2):
        exponent = 2 * index / CHANNELS
        plain = 1 / THETA**exponent
        if name == "ntk":
            result.append(1 / (THETA * ratio ** (CHANNELS / (CHANNELS - 2))) ** exponent)
        elif name == "dype":
            result.append(1 / (THETA * ratio ** (CHANNELS / (CHANNELS - 2) * 2 * time * time)) ** exponent)
        else:
            turns, most = trained * plain / (2 * math.pi), min(32.0, trained / (2 * math.pi))
            kept = min(1.0, max(0.0, (turns - 1) / (most - 1)))
            result.append(kept * plain + (1 - kept) * plain / ratio)
    return result


@pytest.mark.parametrize("name", ["ntk", "yarn", "dype"])
@pytest.mark.parametrize(("ratio", "trained", "time"), [(8.0, 64, 0.9), (2.5, 32, 0.3), (1.3, 512, 1.0)])
def test_frequencies_equal_those_by_hand(name: Any, ratio: float, trained: int, time: float) -> None:
    found = frequencies(CHANNELS, THETA, name, trained, ratio, time)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), by_hand(name, ratio, trained, time), rtol=1e-13)


def test_what_the_methods_do_to_the_highest_and_the_lowest_frequency() -> None:
    plain = frequencies(CHANNELS, THETA, "none", 64, 8.0, 1.0)
    for name in ("ntk", "yarn"):
        found = frequencies(CHANNELS, THETA, name, 64, 8.0, 1.0)  # type: ignore[arg-type]
        assert found[0] == plain[0] == 1
        assert found[LAST] == pytest.approx(plain[LAST] / 8)
    # DyPE begins beyond that and ends with the positions of training.
    assert frequencies(CHANNELS, THETA, "dype", 64, 8.0, 1.0)[LAST] == pytest.approx(plain[LAST] / 8**2)
    assert frequencies(CHANNELS, THETA, "dype", 64, 8.0, math.sqrt(0.5))[LAST] == pytest.approx(plain[LAST] / 8)
    assert torch.equal(frequencies(CHANNELS, THETA, "dype", 64, 8.0, 0.0), plain)


@contextmanager
def another_base(model: Any, factor: float) -> Iterator[None]:
    """Stock positions with another base."""
    before = model.pos_embed.theta
    model.pos_embed.theta = before * factor
    yield
    model.pos_embed.theta = before


@pytest.mark.parametrize(("name", "power"), [("ntk", 1.0), ("dype", 2 * 0.7**2)])
def test_fitted_positions_equal_stock_ones_with_another_base(model: Any, name: Any, power: float) -> None:
    channels = 6  # of both axes of the tiny model
    with another_base(model, 2 ** (channels / (channels - 2) * power)):
        expected = model(**tiny_flux.inputs(*LARGE.shape))[0]
    result = call(model, LARGE, Full(), Extrapolation(TRAINED, name))
    assert relative_difference(result, expected) < RELATIVE
    unfitted = model(**tiny_flux.inputs(*LARGE.shape))[0]
    assert relative_difference(result, unfitted) > 0.01, "positions make no difference: the test shows nothing"


@pytest.mark.parametrize("grid", [Grid(TRAINED), Grid((5, 12))])
@pytest.mark.parametrize("name", ["none", "ntk", "yarn", "dype"])
def test_at_the_trained_size_and_below_nothing_changes(model: Any, grid: Grid, name: Any) -> None:
    expected = call(model, grid, Full(), None)
    assert torch.equal(call(model, grid, Full(), Extrapolation(TRAINED, name)), expected)


def test_each_axis_has_its_own_ratio_and_patterns_share_the_positions(model: Any) -> None:
    grid = Grid((8, 24))  # rows as in training, columns twice
    axes = model.pos_embed.axes_dim
    rows = torch.outer(torch.arange(8.0).double(), frequencies(axes[1], THETA, "none", 8, 1.0, 0.0))
    columns = torch.outer(torch.arange(24.0).double(), frequencies(axes[2], THETA, "ntk", 12, 2.0, 0.0))
    angles = torch.cat(
        [torch.zeros(8, 24, axes[0] // 2), rows[:, None].expand(-1, 24, -1), columns[None].expand(8, -1, -1)], dim=-1
    ).reshape(-1, sum(axes) // 2)
    seen = []
    plan = plan_of(grid, Block(0))
    with FluxAdapter(model, grid, extrapolation=Extrapolation(TRAINED, "ntk")).attached(
        run_with(grid, Block(0)), Backend.SDPA
    ):
        model.pos_embed.register_forward_hook(lambda module, args, tables: seen.append(tables))
        model(**tiny_flux.inputs(*grid.shape))
    ((cosines, sines),) = seen
    expected = angles[torch.from_numpy(plan.order)].repeat_interleave(2, dim=1)
    assert torch.equal(cosines[tiny_flux.TEXT_TOKENS :], expected.cos().float())
    assert torch.equal(sines[tiny_flux.TEXT_TOKENS :], expected.sin().float())
    assert (cosines[: tiny_flux.TEXT_TOKENS] == 1).all()


def test_leaving_restores_the_positions(model: Any) -> None:
    before, positions = snapshot(model), model.pos_embed
    expected = model(**tiny_flux.inputs(*LARGE.shape))[0]
    adapter = FluxAdapter(model, LARGE, extrapolation=Extrapolation(TRAINED, "yarn", True))
    with suppress(InterruptedError), adapter.attached(run_with(LARGE, Block(0)), Backend.SDPA):
        assert model.pos_embed is not positions
        model(**tiny_flux.inputs(*LARGE.shape))
        raise InterruptedError
    assert model.pos_embed is positions
    assert snapshot(model) == before
    assert torch.equal(model(**tiny_flux.inputs(*LARGE.shape))[0], expected)


def test_positions_that_depend_on_time_never_wait_for_the_device(model: Any) -> None:
    inputs = tiny_flux.inputs(*LARGE.shape)
    run = run_with(LARGE, Block(1))
    results = []
    with FluxAdapter(model, LARGE, extrapolation=Extrapolation(TRAINED, "dype", True)).attached(run, Backend.SDPA):
        model(**inputs)
        with NoHostReads():
            for step, time in ((1, 0.5), (1, 0.5), (2, 0.1)):
                run.step = step
                results.append(model(**inputs | {"timestep": torch.full((1,), time)})[0])
    assert torch.equal(results[0], results[1])
    expected = call(model, LARGE, Block(1), Extrapolation(TRAINED, "dype", True), timestep=torch.full((1,), 0.1))
    assert torch.equal(results[2], expected)


PATTERNS = {
    "full": Full(),
    "b": Block(1),
    "x": CrissCross(1),
    "b-far": Union(Block(0), Far([(0, (2, 2)), (1, (4, 4))])),
    "x-far": Union(CrissCross(1), Far([(1, (4, 4))])),
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_keys_are_counted_as_the_dense_definition_has_them(pattern: Pattern) -> None:
    plan = plan_of(Grid((10, 15)), pattern, ((4, 4), (2, 2)))  # ragged groups and blocks
    _, bias = _dense_definition(plan)  # a bias of log c for each key that stands for c
    keys = np.exp(bias).sum(1)
    expected = np.sqrt(np.log(keys) / np.log(100))
    np.testing.assert_allclose(query_scale(plan, 100), expected, rtol=1e-12)


@contextmanager
def scaled_queries(model: Any, factors: torch.Tensor) -> Iterator[None]:
    """Stock attention with a factor on each query, `[text + image, 1 or H]` in raster order."""
    text = tiny_flux.TEXT_TOKENS
    handles = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        joint = block.attn.added_kv_proj_dim is None
        of_image = factors if joint else factors[text:]

        def scale(module: Any, args: Any, output: torch.Tensor, by: torch.Tensor = of_image) -> torch.Tensor:
            return output * by[:, :, None]

        handles.append(block.attn.norm_q.register_forward_hook(scale))
        if not joint:
            handles.append(
                block.attn.norm_added_q.register_forward_hook(
                    lambda module, args, output: output * factors[:text, :, None]
                )
            )
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("pattern", "radius", "cross"), [(Full(), 99, False), (Block(1), 1, False), (CrissCross(1), None, True)]
)
@pytest.mark.parametrize("fused", [False, True])
def test_proportional_attention_equals_stock_attention_with_scaled_queries(
    model: Any, pattern: Pattern, radius: int | None, cross: bool, fused: bool
) -> None:
    inputs = tiny_flux.inputs(*LARGE.shape)
    mask = raster_mask(LARGE, radius, cross)
    trained = math.prod(TRAINED) + tiny_flux.TEXT_TOKENS
    factors = (mask.sum(1).double().log() / math.log(trained)).sqrt().float()
    with scaled_queries(model, factors[:, None]):
        expected = model(**inputs, joint_attention_kwargs={"attention_mask": mask})[0]
    adapter = FluxAdapter(model, LARGE, fused=fused, extrapolation=Extrapolation(TRAINED, proportional_attention=True))
    with adapter.attached(run_with(LARGE, pattern), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE
    unscaled = model(**inputs, joint_attention_kwargs={"attention_mask": mask})[0]
    assert relative_difference(result, unscaled) > 1e-3, "the scale makes no difference: the test shows nothing"


def test_proportional_attention_counts_the_keys_of_each_head(model: Any) -> None:
    inputs = tiny_flux.inputs(*LARGE.shape)
    grouping = plan_of(LARGE, Full()).grouping
    plan = build_head_plan(
        ((grouping, Block(1)), (grouping, CrissCross(1))), (1, 0), tiny_flux.TEXT_TOKENS, text_first=True
    )
    masks = torch.stack([raster_mask(LARGE, None, True), raster_mask(LARGE, 1, False)])
    trained = math.prod(TRAINED) + tiny_flux.TEXT_TOKENS
    factors = (masks.sum(2).double().log() / math.log(trained)).sqrt().float().T  # [N, H]
    with scaled_queries(model, factors):
        expected = model(**inputs, joint_attention_kwargs={"attention_mask": masks[None]})[0]
    adapter = FluxAdapter(model, LARGE, fused=False, extrapolation=Extrapolation(TRAINED, proportional_attention=True))
    with adapter.attached(Run(lambda step, layer: plan), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE
