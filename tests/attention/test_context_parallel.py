"""Transformer calls that several ranks share, in processes of their own that talk by gloo.

Each head is computed by one rank from the same numbers in the same order, and everything else acts on each token
alone, so that fp32 gives the same bits; where it does not, it is because products of fewer rows sum in another order.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny_flux
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks, one_after_another
from shared_calls import adapter_of, pictures, predictions, told, until_one_ends
from small_transformers import MODELS

from grat_cli.attention.context_parallel import Shared
from grat_cli.errors import BadInput
from grat_kernels import Block, CrissCross, Full, Grid, Grouping, build_head_plan, build_plan

# Of predictions of about 1: some hundred times fp32's rounding, some thousandth of what a wrong token would change.
TOLERANCE = 2e-5
FUSED = "flux", "hunyuan"  # which a fused kernel prepares, in Triton's interpreter here
CHOICE = {"levels": [{"beyond": 0, "block": [4, 4]}], "choose": {"exact": 2, "fine": 4, "block": [2, 2]}}


def group_of(size: int, rank: int = 0) -> Any:
    return cast(Any, SimpleNamespace(size=lambda: size, rank=lambda: rank))


@pytest.fixture(scope="module")
def of_two() -> list[Any]:
    """What two ranks have each come to: predictions, by stock modules and by the fused kernel, what an observer was
    told, when they knew that one had ended."""
    calls = (predictions, tuple(MODELS)), (predictions, FUSED, 1, True), (told,), (until_one_ends,)
    return on_ranks(2, one_after_another, *calls)


def test_ranks_that_share_calls_predict_what_one_does(of_two: list[Any]) -> None:
    names = tuple(MODELS)
    assert all(adapter_of(name).heads % 2 == 0 for name in names)
    assert any(MODELS[name].grids[0].tokens % 2 for name in names)
    alone = predictions(None, names)
    for by_modules, by_kernel, *_ in of_two:
        for name in names:
            assert float((by_modules[name] - alone[name]).abs().max()) <= TOLERANCE
        for name in FUSED:  # its far field is pooled when all tokens are there
            assert float((by_kernel[name][0] - alone[name][0]).abs().max()) <= TOLERANCE


def test_an_observer_is_told_of_exchanges_and_of_what_is_sent_in_them(of_two: list[Any]) -> None:
    adapter = adapter_of("flux")
    tokens, text, heads = adapter.grid.tokens, tiny_flux.TEXT_TOKENS, adapter.heads
    of_head = 4 * adapter.model.config.attention_head_dim  # bytes of a token's, in fp32
    channels = adapter.model.config.in_channels
    assert tokens % 2
    for rank, (*_, of_rank, _) in enumerate(of_two):
        own, others = (tokens + 1) // 2 - rank, tokens // 2 + rank
        there, back = 3 * own * heads // 2 * of_head, (others + text) * heads // 2 * of_head
        gathered = (tokens + 1) // 2 * channels * 4
        assert of_rank == ["begin", *[there, "attention", back] * adapter.layers, gathered, "end"]


def test_a_rank_learns_within_seconds_that_another_has_ended(of_two: list[Any]) -> None:
    assert max(seconds for *_, seconds in of_two) < 30  # the ranks' timeout is twice that


def test_ranks_that_share_a_run_make_the_picture_of_one() -> None:
    """The demo model has three heads: one a rank, and layers of which they differ, choose, and are carried; or that a
    guard widens; or that a cache takes over, by what all ranks see: what each sees is now above the threshold, now
    below it."""
    preset = {
        "name": "own",
        "model": "demo",
        "attention": {"variant": "b", "group": [4, 4], "radius": 0, "far": CHOICE},
        "schedule": {
            "rules": [{"layers": "1", "heads": "1", "variant": "x", "far": []}],
            "over_steps": [{"reference": [0, 2], "between": "extrapolate", "layers": "0-1"}],
        },
    }
    watched = {"name": "watched", "model": "demo", "attention": {"variant": "b", "group": [4, 4]}, "guard": 0.9}
    cached = {**watched, "guard": 0, "cache": {"kind": "first-block", "threshold": 0.5}}
    presets = (preset, watched, cached)
    alone = pictures(None, presets)
    assert alone[1].widened
    assert any(alone[2].computed)
    for of_rank in on_ranks(3, pictures, presets):
        for made, expected in zip(of_rank, alone, strict=True):
            np.testing.assert_allclose(made.pixels, expected.pixels, rtol=0, atol=TOLERANCE)
            assert (made.widened, made.computed) == (expected.widened, expected.computed)


@given(tokens=st.integers(1, 10_000), size=st.integers(1, 64))
def test_shares_cover_all_tokens_and_are_even(tokens: int, size: int) -> None:
    if tokens < size:
        with pytest.raises(BadInput, match="cannot be shared"):
            Shared.of(group_of(size), tokens)
        return
    shares = [Shared.of(group_of(size, rank), tokens).own for rank in range(size)]
    assert [place for share in shares for place in range(share.start, share.stop)] == list(range(tokens))
    assert max(share.stop - share.start for share in shares) - min(share.stop - share.start for share in shares) <= 1


@pytest.mark.parametrize(("heads", "size", "fitting"), [(6, 4, "1, 2, 3 or 6"), (1, 2, "take 1"), (7, 2, "1 or 7")])
def test_heads_that_cannot_be_shared_are_refused(heads: int, size: int, fitting: str) -> None:
    plan = build_plan(Grouping(Grid((4, 4)), (2, 2)), Full())
    rows = torch.zeros(1, 16 // size, heads, 8)
    shared = Shared.of(group_of(size), 16)
    with pytest.raises(BadInput, match=fitting):
        shared.attention(rows, rows, rows, plan, lambda query, key, value, plan, heads: query)


def test_plans_of_some_heads_are_those_of_their_classes() -> None:
    grouping = Grouping(Grid((8, 8)), (2, 2))
    plan = build_head_plan(((grouping, Block(1)), (grouping, CrissCross(1)), (grouping, Full())), (0, 2, 1, 1, 0, 2))
    assert plan.of_heads(range(2, 4)) is plan.classes[1]
    two = cast(Any, plan.of_heads(range(3, 6)))
    assert [two.classes[number].pattern for number in two.class_of_head] == [CrissCross(1), Block(1), Full()]
    assert two.tokens == plan.tokens
    assert plan.of_heads(range(3, 6)) is two
    assert plan.classes[0].of_heads(range(1, 2)) is plan.classes[0]
