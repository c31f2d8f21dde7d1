"""Step caches of transformers whose calls ranks share, in processes of their own that talk by gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cached_runs import CACHES, Asked, cached_runs, refused_run, shared_means
from diffusers.hooks.faster_cache import FasterCacheConfig
from diffusers.hooks.sea_cache import SeaCacheConfig
from flux_runs import relative_difference
from ranks import on_ranks, one_after_another

# Two predictions differ by up to 2e-5 (`test_context_parallel`). A forecast from the last two, three steps apart, makes
# that up to 7/3 of it, guidance by 3 five times, and all steps together move latents by one prediction.
TOLERANCE = 2e-5 * 7 / 3 * 5
RATIOS_DIFFER = 1e-6  # sums of fp32 in another order

ALL_SHARE = (
    *(Asked("flux", cache) for cache in CACHES),
    # Of what the first half of the tokens says at the second step, 0.823, and what all say, 0.813.
    Asked("flux", "first-block:threshold=0.82"),
    Asked("flux", "mag:calibrate=true"),
    Asked("flux", "first-block", own="before"),
    Asked("flux", "first-block", own="inside"),
    Asked("flux guided", "first-block", guard=0.9),
    Asked("wan", "first-block"),
    Asked("wan", "mag"),
    Asked("hunyuan", "first-block"),  # of the second half 1.04, of all 0.93
    Asked("hunyuan", "taylor"),
    Asked("hunyuan", "pab"),
    Asked("hunyuan", "mag:calibrate=true"),
)
GUIDANCE_SPLIT = tuple(
    Asked("flux guided", cache, mesh={"cfg": 2}) for cache in ("first-block", "taylor", "mag:calibrate=true")
)


REFUSED = (SeaCacheConfig(), FasterCacheConfig(is_guidance_distilled=False, current_timestep_callback=int))


@pytest.fixture(scope="module")
def of_two() -> list[Any]:
    """What two ranks have each come to."""
    refused = [(refused_run, config) for config in REFUSED]
    runs = (cached_runs, ALL_SHARE), (cached_runs, GUIDANCE_SPLIT)
    return on_ranks(2, one_after_another, *runs, (shared_means, True), (shared_means, False), *refused)


def test_ranks_that_share_calls_decide_and_make_what_one_does_with_every_cache(of_two: list[Any]) -> None:
    for number, (asked, alone) in enumerate(zip(ALL_SHARE, cached_runs(None, ALL_SHARE), strict=True)):
        if asked.own != "inside" and not alone.ratios:
            assert any(computed for _, computed in alone.works), "nothing was left out"
        ratios = [of_rank[0][number].ratios for of_rank in of_two]
        assert ratios[0] == ratios[1]
        assert ratios[0] == pytest.approx(alone.ratios, rel=RATIOS_DIFFER)
        for made in (of_rank[0][number] for of_rank in of_two):
            assert made.works == alone.works, asked
            assert relative_difference(made.latents, alone.latents) < TOLERANCE, asked
            assert not made.is_keepable, "a rank has a part of what is kept"


def test_ranks_that_make_a_call_of_guidance_each_decide_about_their_own(of_two: list[Any]) -> None:
    for number, (asked, alone) in enumerate(zip(GUIDANCE_SPLIT, cached_runs(None, GUIDANCE_SPLIT), strict=True)):
        for rank, of_rank in enumerate(of_two):
            made = of_rank[1][number]
            expected = [computed[rank : rank + 1] for _, computed in alone.works]
            assert [computed for _, computed in made.works] == expected, asked
            assert relative_difference(made.latents, alone.latents) < TOLERANCE, asked
            assert made.ratios == (() if rank else alone.ratios), "those of the first call"
            assert not made.is_keepable


def test_a_mean_over_ranks_counts_text_once(of_two: list[Any]) -> None:
    expected = shared_means(None)
    for _, _, text_first, text_last, *_ in of_two:
        for means in (text_first, text_last):
            torch.testing.assert_close(means, expected, rtol=RATIOS_DIFFER, atol=0)
    assert torch.equal(of_two[0][2], of_two[1][2])


def test_a_cache_that_ranks_cannot_share_is_refused_when_the_transformer_is_called(of_two: list[Any]) -> None:
    for _, _, _, _, *refused in of_two:
        for config, says in zip(REFUSED, refused, strict=True):
            assert says.startswith(f"{type(config).__name__} and ranks that share calls do not combine, ")
            assert "disable_cache()" in says
