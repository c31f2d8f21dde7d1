"""Transformer calls that several ranks share, in processes of their own that talk by gloo."""

from __future__ import annotations

import pytest
from ranks import on_ranks
from shared_calls import predictions
from small_transformers import MODELS


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_that_share_a_call_predict_what_one_does(count: int) -> None:
    names = tuple(name for name, kind in MODELS.items() if kind.adapter(kind.make(), kind.grids[0]).heads % count == 0)
    print(names)
    alone = predictions(None, names)
    for of_rank in on_ranks(count, predictions, names):
        for name in names:
            print(name, (of_rank[name] - alone[name]).abs().max())
