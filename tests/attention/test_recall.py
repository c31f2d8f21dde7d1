"""Recall and output error on sampled queries, against dense masks and against the definition of span attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recall_cases import (
    CHOOSING,
    FAR,
    GRIDS,
    HEAD_DIM,
    HEADS,
    TEXT,
    WITH_REFERENCES,
    dense_mask,
    exact_mask,
    plan_of,
    tensors,
)

from grat_cli.attention import recall
from grat_cli.attention.recall import BINS, row_statistics, sample_positions
from grat_kernels import Block, CrissCross, Full, Grid, Pattern, Segments, span_attention


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("segments", [Segments.of_text(TEXT, True), Segments.of_text(TEXT, False), WITH_REFERENCES])
@pytest.mark.parametrize("pattern", [Full(), Block(0), Block(1), CrissCross(1)])
def test_recall_is_the_mass_under_the_mask(grid: Grid, segments: Segments, pattern: Pattern) -> None:
    plan = plan_of(grid, pattern, segments=segments)
    query, key, value = tensors(plan.tokens)
    positions = sample_positions(plan, plan.image_tokens)
    found = row_statistics(query, key, value, [plan], positions)

    mass = (torch.einsum("qhd,khd->hqk", query, key).double() / HEAD_DIM**0.5).softmax(-1)
    image = slice(plan.image_start, plan.image_start + plan.image_tokens)
    mask = torch.from_numpy(dense_mask(plan))
    expected = (mass[:, image, image] * mask).sum(-1).T
    torch.testing.assert_close(found.kept[0].image.double(), expected, atol=1e-6, rtol=1e-5)
    text = mass[:, image].sum(-1).T - mass[:, image, image].sum(-1).T
    torch.testing.assert_close(found.text.double(), text, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.distances.sum(1).double(), (1 - text).mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("segments", [Segments.of_text(TEXT, False), WITH_REFERENCES])
@pytest.mark.parametrize("rows", [9, 1000])
def test_recall_of_what_is_chosen_is_the_mass_on_the_tokens_of_the_chosen_blocks(segments: Segments, rows: int) -> None:
    """Each head chooses for a whole group, of which a few queries may be sampled."""
    plan = plan_of(Grid((9, 7)), CHOOSING, segments=segments)
    tensors_ = tensors(plan.tokens)
    positions = sample_positions(plan, rows, seed=2)
    found = row_statistics(*tensors_, [plan], positions).kept[0]
    image = slice(plan.image_start, plan.image_stop)
    mass = (torch.einsum("qhd,khd->hqk", *tensors_[:2]) / HEAD_DIM**0.5).softmax(-1)
    mask = exact_mask(plan, *tensors_)
    expected = (mass * mask)[:, positions, image].sum(-1).T
    torch.testing.assert_close(found.image, expected, atol=1e-6, rtol=1e-5)
    assert len({tuple(of_head.tolist()) for of_head in mask[:, positions[0]]}) > 1  # heads differ


@pytest.mark.parametrize("pattern", [Full(), Block(1), CrissCross(1), FAR, CHOOSING])
def test_the_error_is_that_of_span_attention(pattern: Pattern) -> None:
    grid = Grid((9, 7))
    plan = plan_of(grid, pattern, cells=((2, 2), (1, 2)))
    full = plan_of(grid, Full(), cells=((2, 2), (1, 2)))
    query, key, value = tensors(plan.tokens, seed=1)
    positions = sample_positions(plan, 20, seed=3)
    found = row_statistics(query, key, value, [full, plan], positions)
    of_pattern, of_full = (
        span_attention(query[None], key[None], value[None], used, backend="reference")[0, positions]
        for used in (plan, full)
    )
    expected = (of_pattern - of_full).norm(dim=-1) / of_full.norm(dim=-1)
    # Outputs of fp32 products, a difference of which is taken: errors of a few ulps over the outputs' length.
    torch.testing.assert_close(found.kept[1].error, expected, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(found.output, of_full.norm(dim=-1))
    assert found.kept[0].error.max() < 2e-6
    if pattern is FAR:
        near = row_statistics(query, key, value, [plan_of(grid, Block(0), cells=((2, 2), (1, 2)))], positions).kept[0]
        torch.testing.assert_close(found.kept[1].image, near.image)  # summaries are no tokens
        assert found.kept[1].error.mean() < near.error.mean()


@pytest.mark.parametrize("pattern", [Block(1), CHOOSING])
def test_heads_are_taken_in_parts_where_memory_is_short(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(Grid((9, 7)), pattern)
    query, key, value = tensors(plan.tokens)
    positions = sample_positions(plan, 10)
    whole = row_statistics(query, key, value, [plan], positions)
    monkeypatch.setattr(recall, "_BUDGET_BYTES", 1)
    parts = row_statistics(query, key, value, [plan], positions)
    for one, other in (
        (whole.text, parts.text),
        (whole.distances, parts.distances),
        *zip(*(w.kept[0] for w in (whole, parts)), strict=True),
    ):
        torch.testing.assert_close(one, other)


def test_distances_are_binned_over_the_diagonal() -> None:
    plan = plan_of(Grid((9, 7)), Full())
    query, key, value = (torch.zeros(plan.tokens, HEADS, HEAD_DIM) for _ in range(3))
    value += 1
    corner = np.array([plan.image_start + int(plan.inverse[0])])
    found = row_statistics(query, key, value, [plan], corner)  # equal mass everywhere
    rows, columns = np.indices((9, 7))
    bins = np.minimum((np.hypot(rows, columns) / np.hypot(8, 6) * BINS).astype(int), BINS - 1)
    expected = np.bincount(bins.ravel(), minlength=BINS) / plan.tokens
    np.testing.assert_allclose(found.distances, np.tile(expected, (HEADS, 1)), rtol=1e-5)


def test_sampled_recall_lies_in_the_interval_of_its_sample() -> None:
    """Means over sampled queries, against the mean over all, within four standard errors of drawing without return."""
    plan = plan_of(Grid((24, 20)), Block(1))
    query, key, value = tensors(plan.tokens, seed=2)
    every = row_statistics(query, key, value, [plan], sample_positions(plan, plan.image_tokens)).kept[0].image
    for seed in range(5):
        some = row_statistics(query, key, value, [plan], sample_positions(plan, 64, seed)).kept[0].image
        standard_error = every.std(0) * ((1 - 64 / len(every)) / 64) ** 0.5
        assert ((some.mean(0) - every.mean(0)).abs() < 4 * standard_error).all()


def test_positions_are_image_tokens_none_twice() -> None:
    for text_first in (True, False):
        plan = plan_of(Grid((9, 7)), Full(), text_first)
        positions = sample_positions(plan, 30)
        assert len(set(positions.tolist())) == 30
        assert positions.min() >= plan.image_start
        assert positions.max() < plan.image_start + plan.image_tokens
        assert len(sample_positions(plan, 1000)) == plan.image_tokens
        assert sample_positions(plan, 30, seed=1).tolist() != positions.tolist()
