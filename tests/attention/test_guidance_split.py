"""Guidance whose two calls are made by two ranks, in processes of their own that talk by gloo."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from ranks import on_ranks
from shared_calls import GUIDED, latents, pictures, pictures_and_latents

from grat_cli.attention.guidance_split import GuidanceSplit
from grat_cli.errors import BadInput

# Of latents of about 1: some hundred times fp32's rounding, some thousandth of what a wrong token would change.
TOLERANCE = 2e-5
CARRIED = {"over_steps": [{"reference": [0, 2], "between": "extrapolate", "layers": "0-1"}]}
FAR = {"variant": "b", "group": [4, 4], "far": [{"beyond": 1, "block": [2, 2]}]}


def preset(**sections: Any) -> dict[str, Any]:
    return {"name": "own", "model": "demo", "attention": FAR, **sections}


def test_two_ranks_make_the_picture_of_one() -> None:
    """To the bit: each call is computed by one rank as it is by one alone. Families call their transformers in ways of
    their own."""
    presets = (
        preset(),
        preset(schedule=CARRIED),
        preset(attention={"variant": "b", "group": [4, 4]}, guard=0.9),
        preset(schedule=CARRIED, guard=0.99),
    )
    names = tuple(GUIDED)
    expected = pictures(None, presets), latents(None, names)
    assert expected[0][2].widened
    for made in on_ranks(2, pictures_and_latents, presets, names, {"cfg": 2}):
        for one, other in zip(made[0], expected[0], strict=True):
            np.testing.assert_array_equal(one.pixels, other.pixels)
            assert one.widened == other.widened
        for name in names:
            torch.testing.assert_close(made[1][name], expected[1][name], rtol=0, atol=0)


def test_four_ranks_split_guidance_and_share_its_calls() -> None:
    names = ("Qwen-Image", "Wan A14B")
    alone = latents(None, names)
    for of_rank in on_ranks(4, latents, names, {"cfg": 2, "cp": 2}):
        for name in names:
            torch.testing.assert_close(of_rank[name], alone[name], rtol=0, atol=TOLERANCE)


class Steps:
    """A clock that is told where it is."""

    step = 0
    laid_out = torch.arange(4)

    def current_step(self) -> int:
        return self.step

    def timesteps(self) -> tuple[torch.Tensor, int]:
        return self.laid_out, self.step


@pytest.fixture
def clock() -> Any:
    return Steps()


def split_of(rank: int, clock: Any) -> GuidanceSplit:
    return GuidanceSplit(cast(Any, SimpleNamespace(rank=lambda: rank)), clock)


def test_each_rank_makes_one_of_two_calls(clock: Steps) -> None:
    first, second = split_of(0, clock), split_of(1, clock)
    for clock.step in range(3):
        assert [first.takes(), first.takes()] == [True, False]
        assert [second.takes(), second.takes()] == [False, True]
    clock.laid_out, clock.step = torch.arange(4), 0  # another run
    assert first.takes()


@pytest.mark.parametrize(("calls", "said"), [(1, "one call"), (3, "more than two")])
def test_other_numbers_of_calls_are_refused(clock: Steps, calls: int, said: str) -> None:
    split = split_of(1, clock)

    def call() -> None:
        for clock.step in range(2):
            for _ in range(calls):
                split.takes()

    with pytest.raises(BadInput, match=said):
        call()
