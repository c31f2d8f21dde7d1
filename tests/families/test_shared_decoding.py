"""Tiles that several ranks share, in processes of their own that talk by gloo.

Each tile is made by one rank from the same numbers in the same order, and put together by all alike: the same bits.
"""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from shared_tiles import CASES, decoded, decoded_and_told

from grat_cli.families.shared_decoding import tiles_over_ranks


@pytest.mark.parametrize(("count", "names"), [(2, ("flux", "wan")), (3, tuple(CASES))])
def test_ranks_that_share_tiles_have_the_pixels_of_one(count: int, names: tuple[str, ...]) -> None:
    alone = decoded(None, names)
    every, told = zip(*on_ranks(count, decoded_and_told, names), strict=True)
    assert all("NaN after decoding" in one for one in told), "all end where one tile has NaN"
    for name in names:
        for of_rank in every:
            assert torch.equal(of_rank[name].pixels, alone[name].pixels), name
            assert of_rank[name].own == alone[name].own == []
        calls = [of_rank[name].calls for of_rank in every]
        if name == "whole":
            assert set(calls) == {alone[name].calls}
        else:
            assert sum(calls) == alone[name].calls, name
            assert max(calls) - min(calls) <= CASES[name].apart, name
    if count == 3:
        assert sum(of_rank["AutoencoderKLFlux2"].calls == 0 for of_rank in every) == 1  # of two tiles


def test_one_rank_alone_decodes_as_ever() -> None:
    autoencoder = CASES["AutoencoderKL"].make()
    stock = vars(autoencoder).copy()
    with tiles_over_ranks(autoencoder, None):
        assert vars(autoencoder) == stock
