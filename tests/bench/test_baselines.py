"""The baselines of the benchmark against their definition, written out token by token."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grat_cli.bench.baselines import Window, flex_baseline, mask_row, natten_obstacle, torch_baseline
from grat_cli.fidelity.variants import clear_pairs, na_pairs
from grat_kernels import Grid

CPU = torch.device("cpu")


def definition(window: Window) -> torch.Tensor:
    """Which position attends which, `[N, N]`, image tokens in raster order, straight from the papers.

    NATTEN's window: `size` tokens that hold the query in their middle unless the border is nearer (arXiv 2204.07143,
    section 3). CLEAR: tokens nearer than the window (arXiv 2412.16112).
    """
    attended = torch.ones(window.tokens, window.tokens, dtype=torch.bool)
    tokens = list(itertools.product(*map(range, window.grid.shape)))
    image = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            if window.kind == "clear":
                image[i, j] = sum((a - b) ** 2 for a, b in zip(query, key, strict=True)) < window.size[0] ** 2
                continue
            inside = True
            for a, b, extent, size in zip(query, key, window.grid.shape, window.size, strict=True):
                first = a - size // 2
                if first < 0:
                    first = 0
                if first + size > extent:
                    first = extent - size
                inside &= first <= b < first + size
            image[i, j] = inside
    attended[window.image, window.image] = image
    return attended


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[3])
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


@st.composite
def windows(draw: st.DrawFn, most_tokens: int = 260) -> Window:
    kind = draw(st.sampled_from(["na", "clear"]))
    axes = 2 if kind == "clear" else draw(st.sampled_from([1, 2, 3]))
    shape: list[int] = []
    for _ in range(axes):
        shape.append(draw(st.integers(1, min(23, max(1, most_tokens // math.prod(shape))))))
    if kind == "clear":
        size = (draw(st.integers(1, 9)),)
    else:
        size = tuple(draw(st.sampled_from([width for width in range(1, extent + 1, 2)])) for extent in shape)
    return Window(kind, Grid(tuple(shape)), size, draw(st.sampled_from([0, 1, 7, 130])), draw(st.booleans()))


@settings(max_examples=60)
@given(windows())
def test_tiles_of_torch_are_the_definition(window: Window) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, window.tokens, 2, 16, dtype=torch.float64) for _ in range(3))
    baseline = torch_baseline(window, CPU, torch.float64)
    expected = dense(query, key, value, definition(window))
    torch.testing.assert_close(baseline.attention(query, key, value), expected, rtol=1e-12, atol=1e-12)
    assert baseline.order is None
    assert definition(window).sum() <= baseline.executed_pairs <= window.tokens**2


@settings(max_examples=25)
@given(windows(most_tokens=400))
def test_blocks_of_flex_attention_are_the_definition(window: Window) -> None:
    torch.manual_seed(0)
    raster = [torch.randn(1, window.tokens, 1, 16, dtype=torch.float32) for _ in range(3)]
    baseline = flex_baseline(window, CPU)
    assert baseline.order is not None
    tiled = []
    for tensor in raster:
        moved = tensor.clone()
        moved[:, window.image] = tensor[:, window.image][:, torch.from_numpy(baseline.order)]
        tiled.append(moved)
    query, key, value = raster
    expected = dense(query, key, value, definition(window))
    expected[:, window.image] = expected[:, window.image][:, torch.from_numpy(baseline.order)]
    torch.testing.assert_close(baseline.attention(*tiled), expected, rtol=1e-4, atol=1e-5)
    assert definition(window).sum() <= baseline.executed_pairs


@given(windows(most_tokens=120), st.booleans())
def test_rows_of_the_mask_and_counted_pairs_are_the_definition(window: Window, tiled: bool) -> None:
    order = flex_baseline(window, CPU).order if tiled else None
    expected = definition(window)
    positions = np.arange(window.tokens)
    if order is not None:
        positions[window.image] = window.image.start + order
    expected = expected[positions][:, positions]
    for position in range(window.tokens):
        row = mask_row(window, order, position)
        assert torch.equal(torch.ones_like(expected[0]) if row is None else row, expected[position])
    count = na_pairs if window.kind == "na" else clear_pairs
    assert expected[window.image, window.image].sum() == count(window.grid, window.size)


def test_every_query_of_a_neighbourhood_has_as_many_keys() -> None:
    window = Window("na", Grid((9, 14)), (5, 7), 0, True)
    assert set(definition(window).sum(1).tolist()) == {35}


def test_blocks_far_from_a_window_are_never_computed() -> None:
    window = Window("na", Grid((64, 128)), (9, 17), 128, True)
    # A tile of 8x16 with its window touches 3x3 tiles of 64; text is one block of 65.
    assert flex_baseline(window, CPU).executed_pairs <= 128**2 * (64 * (9 + 1) + 65)


@pytest.mark.parametrize(("kind", "device", "words"), [("na", "cpu", "natten is not installed")])
def test_natten_says_what_is_missing(kind: str, device: str, words: str) -> None:
    assert words in str(natten_obstacle(Window(kind, Grid((8, 8)), (3, 3), 0, True), torch.device(device)))
