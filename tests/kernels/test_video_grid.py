"""The true grid of 720p with 129 frames, 33x45x80 tokens, which no group of 4x8x8 divides: every variant by itself.

One head of 16 channels, and rows of the output against the definition over all of their keys in fp64: at the corners
of the video, in ragged groups, in the text, and at random.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from grat_cli.estimates.planning import architecture_for, schedule_for
from grat_cli.families import preset_variants
from grat_cli.generation.selection import select_preset
from grat_cli.models.catalogue import choose_model
from grat_cli.models.video_size import VideoSize
from grat_kernels import Backend, Plan, span_attention

TEXT, HEAD_DIM, SHAPE, GROUP = 256, 16, (33, 45, 80), (4, 8, 8)
COUNTS = (9, 6, 10)
HUNYUAN = choose_model("hunyuan", "video")
# Sums of up to 119,056 products in fp32, in whatever order a backend takes: far below, and far above rounding.
TOLERANCE = 2e-5


def plan_of(variant: str, radius: str | None = None) -> Plan:
    """The plan that the shipped preset gives HunyuanVideo at 1280x720 with 129 frames."""
    preset = select_preset(HUNYUAN, variant=variant, radius=radius)
    (plan,) = schedule_for(preset, architecture_for(HUNYUAN), VideoSize(1280, 720, 129, 24)).plans
    return plan


def attended(variant: str, query: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Which groups the group at coordinates `query` attends token by token, `[groups]`; not by the project's code."""
    apart = np.abs(groups - query)
    block = np.asarray((apart <= 1).all(1))
    share = (apart == 0).sum(1)
    if variant == "sta":  # the window shifts inward at borders
        centre = np.clip(query, 1, np.asarray(COUNTS) - 2)
        return np.asarray((np.abs(groups - centre) <= 1).all(1))
    patterns: dict[str, Any] = {
        "full": np.ones(len(groups), bool),
        "b": block,
        "b 1x2x2": (apart <= (1, 2, 2)).all(1),
        "planes": share >= 1,
        "lines": share >= 2,
        "bx": block | (share >= 2),
        "far": block,
    }
    return patterns[variant]


def exact_row(
    variant: str, coordinates: np.ndarray | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Attention of one query, in raster order and fp64; `coordinates` of its token, or None for text.

    Args:
        variant: what is attended.
        coordinates: frame, row and column of the token.
        query: `[D]`.
        key: `[N, D]`, video in raster order and then text.
        value: likewise.
    """
    tokens = np.stack(np.unravel_index(np.arange(math.prod(SHAPE)), SHAPE), axis=1)
    groups = tokens // GROUP
    near = np.ones(len(tokens), bool)
    if coordinates is not None:
        near = attended(variant, coordinates // GROUP, groups)
    selected = torch.from_numpy(np.concatenate([near, np.ones(TEXT, bool)]))
    keys, values, bias = key[selected], value[selected], torch.zeros(int(selected.sum()), dtype=torch.float64)
    if variant == "far" and coordinates is not None:
        # What is not attended counts as the means of its blocks of 4x4x4, each as often as it has tokens.
        number, rest = numbered(tokens[~near] // 4), torch.from_numpy(np.flatnonzero(~near))
        (key_means, counts), (value_means, _) = means_of(key[rest], number), means_of(value[rest], number)
        keys, values = torch.cat([keys, key_means]), torch.cat([values, value_means])
        bias = torch.cat([bias, counts.log()])
    return (keys @ query / math.sqrt(HEAD_DIM) + bias).softmax(0) @ values


def means_of(source: torch.Tensor, number: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Means `[K, D]` of the video tokens of each number, and how many there are, `[K]`."""
    index = torch.from_numpy(number)
    counts = torch.bincount(index).double()
    sums = torch.zeros(len(counts), HEAD_DIM, dtype=torch.float64).index_add_(0, index, source[: len(number)])
    return sums / counts[:, None], counts


def numbered(cells: np.ndarray) -> np.ndarray:
    """One number for each cell that has tokens, in raster order, for every token; of coordinates `[N, 3]`."""
    return np.unique(np.ravel_multi_index(tuple(cells.T), tuple(cells.max(0) + 1)), return_inverse=True)[1]


def chosen_row(
    coordinates: np.ndarray, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, exact: int, fine: int
) -> torch.Tensor:
    """As `exact_row`, where a group of 4x8x8 chooses from blocks of 4x4x4 by their means of 4x2x2 tokens.

    Args:
        coordinates: of the query's token.
        query: of all tokens, `[N, D]`.
        key: likewise.
        value: likewise.
        exact: so many blocks with the highest scores are attended token by token.
        fine: the next so many by means of 4x2x2.
    """
    tokens = np.stack(np.unravel_index(np.arange(math.prod(SHAPE)), SHAPE), axis=1)
    group = (tokens // GROUP == coordinates // GROUP).all(1)
    block, cell = numbered(tokens // (4, 4, 4)), numbered(tokens // (4, 2, 2))
    (cell_keys, cell_counts), (cell_values, _) = means_of(key, cell), means_of(value, cell)
    (block_keys, block_counts), (block_values, _) = means_of(key, block), means_of(value, block)
    mean_query = query[: len(tokens)][group].mean(0) / math.sqrt(HEAD_DIM)

    scores = torch.full((len(block_counts),), -math.inf, dtype=torch.float64)
    block_of_cell = np.zeros(len(cell_counts), np.int64)
    block_of_cell[cell] = block
    for number in np.setdiff1d(block, block[group]):
        cells = np.flatnonzero(block_of_cell == number)
        logits = cell_keys[cells] @ mean_query + cell_counts[cells].log()
        share = cell_counts[cells] / block_counts[number]
        values, mean = cell_values[cells], block_values[number]
        deviation = (share @ (values - mean).square().sum(1)).sqrt()
        spread = ((logits.softmax(0) - share) @ values).norm() + 0.1 * deviation + 0.001 * mean.norm()
        scores[number] = logits.logsumexp(0) + spread.log()
    order = scores.argsort(descending=True).numpy()
    # Where two scores are equal but for rounding, fp32 may choose either.
    assert all(scores[order[last - 1]] - scores[order[last]] > 1e-5 for last in (exact, exact + fine))

    near = group | np.isin(block, order[:exact])
    finer = np.isin(np.arange(len(block_counts)), order[exact : exact + fine])
    coarse = np.setdiff1d(np.arange(len(block_counts)), np.concatenate([block[near], np.flatnonzero(finer)]))
    cells = np.flatnonzero(finer[block_of_cell])
    selected = torch.from_numpy(np.concatenate([near, np.ones(TEXT, bool)]))
    keys = torch.cat([key[selected], cell_keys[cells], block_keys[coarse]])
    values = torch.cat([value[selected], cell_values[cells], block_values[coarse]])
    counts = torch.cat([torch.ones(int(selected.sum())), cell_counts[cells], block_counts[coarse]])
    row = int(np.ravel_multi_index(tuple(coordinates), SHAPE))
    return (keys @ query[row] / math.sqrt(HEAD_DIM) + counts.log()).softmax(0) @ values


def sampled_tokens() -> list[int]:
    """Raster indices of corners of the video, of the last full and the first ragged groups, and at random."""
    places = [(0, 0, 0), (32, 44, 79), (0, 44, 0), (32, 0, 79), (31, 39, 79), (32, 40, 40), (16, 20, 40), (3, 7, 8)]
    drawn = np.random.default_rng(0).integers(0, math.prod(SHAPE), 6)
    return [int(np.ravel_multi_index(place, SHAPE)) for place in places] + drawn.tolist()


def largest_error(variant: str, plan: Plan, output: torch.Tensor, raster: torch.Tensor, rows: list[int]) -> float:
    """Of rows of the output, which are given in the kernel's order, where text starts after the video."""
    query, key, value = raster.double()
    video = math.prod(SHAPE)
    errors = []
    for row in rows:
        place = None if row >= video else np.asarray(np.unravel_index(row, SHAPE))
        exact = exact_row(variant, place, query[row], key, value)
        position = row if row >= video else int(plan.inverse[row])
        errors.append(float((output[position].double() - exact).abs().max()))
    return max(errors)


@pytest.fixture(scope="module")
def raster() -> torch.Tensor:
    """Query, key and value of one head, `[3, N, D]`, video in raster order and then text; scores of a few units."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, math.prod(SHAPE) + TEXT, HEAD_DIM, generator=generator)
        * torch.tensor([2.0, 1.0, 1.0])[:, None, None]
    )


@pytest.mark.parametrize("variant", ["b", "b 1x2x2", "lines", "bx", "sta", "far"])
def test_a_variant_equals_the_definition(variant: str, raster: torch.Tensor) -> None:
    plan = plan_of(*variant.split())
    assert plan.grouping.counts == COUNTS
    assert sorted(plan.order.tolist()) == list(range(math.prod(SHAPE)))
    order = torch.from_numpy(np.concatenate([plan.order, math.prod(SHAPE) + np.arange(TEXT)]))
    query, key, value = raster[:, order, None, :].unsqueeze(1)
    output = span_attention(query, key, value, plan, backend=Backend.SDPA)[0, :, 0]
    rows = [*sampled_tokens(), math.prod(SHAPE), math.prod(SHAPE) + TEXT - 1]
    assert largest_error(variant, plan, output, raster, rows) < TOLERANCE
    # The rows can tell variants apart: by another's definition they are wrong.
    other = "lines" if variant != "lines" else "b"
    assert largest_error(other, plan, output, raster, rows[:2]) > 100 * TOLERANCE


@pytest.mark.parametrize("variant", ["full", "planes"])
def test_dense_variants_list_the_keys_of_the_definition(variant: str) -> None:
    """These attend a third of all pairs or more, which would take minutes: here their lists of keys are compared."""
    plan = plan_of(variant)
    positions = np.asarray(plan.order)
    groups = np.stack(np.unravel_index(positions, SHAPE), axis=1) // GROUP
    for run in plan.query_runs:
        listed = np.zeros(plan.tokens, bool)
        for span in plan.span_lists[run.span_list]:
            assert span.level == 0
            assert not listed[span.start : span.stop].any()
            listed[span.start : span.stop] = True
        assert listed[len(groups) :].all()
        if run.start >= len(groups):  # text attends everything
            assert listed.all()
            continue
        members = np.unique(groups[run.start : run.start + run.length], axis=0)
        assert len(members) == 1 or variant == "full"
        assert np.array_equal(listed[: len(groups)], attended(variant, members[0], groups))


def test_choice_by_content_equals_the_definition(raster: torch.Tensor) -> None:
    plan = plan_of("fast")
    order = torch.from_numpy(np.concatenate([plan.order, math.prod(SHAPE) + np.arange(TEXT)]))
    query, key, value = raster[:, order, None, :].unsqueeze(1)
    output = span_attention(query, key, value, plan, backend=Backend.SDPA)[0, :, 0].double()
    for row in sampled_tokens()[::2]:
        place = np.asarray(np.unravel_index(row, SHAPE))
        exact = chosen_row(place, *raster.double(), exact=64, fine=128)
        assert float((output[int(plan.inverse[row])] - exact).abs().max()) < TOLERANCE
        fewer = chosen_row(place, *raster.double(), exact=63, fine=128)
        assert float((fewer - exact).abs().max()) > 10 * TOLERANCE
    text = math.prod(SHAPE)
    assert largest_error("full", plan, output, raster, [text, text + TEXT - 1]) < TOLERANCE


def test_every_shipped_variant_is_tested_here() -> None:
    assert set(preset_variants()["hunyuan"]) == {"b", "lines", "bx", "sta", "far", "full", "planes", "fast"}
