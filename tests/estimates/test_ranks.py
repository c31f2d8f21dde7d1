"""What ranks that share an output are foretold to send each other: against what the code sends, and the arithmetic."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.attention.context_parallel import Shared
from grat_cli.errors import BadInput
from grat_cli.estimates.ranks import Exchange
from grat_kernels import Full, Grid, Grouping, build_plan
from grat_kernels.plan import Segments

WIDE = 4  # channels of a head


class Counted(Shared):
    """Shares of a rank that sends nothing, and counts the bytes that it would send to others."""

    sent = 0

    def _exchanged(self, sent: torch.Tensor, to_each: list[int], from_each: list[int]) -> torch.Tensor:
        rows = sum(count for rank, count in enumerate(to_each) if rank != self.rank)
        type(self).sent += rows * sent[0].numel() * sent.element_size()
        return sent.new_zeros((sum(from_each), *sent.shape[1:]))


@given(
    sides=st.tuples(st.integers(1, 6), st.integers(1, 7)),
    text=st.integers(0, 5),
    ranks=st.integers(1, 4),
    heads_of_rank=st.integers(1, 2),
    samples=st.integers(1, 2),
    text_first=st.booleans(),
)
def test_an_attention_sends_what_is_foretold(
    sides: tuple[int, int], text: int, ranks: int, heads_of_rank: int, samples: int, text_first: bool
) -> None:
    tokens, heads = sides[0] * sides[1], ranks * heads_of_rank
    shape = cast(Any, SimpleNamespace(width=heads * WIDE, predicted_channels=3))
    if tokens < ranks:
        with pytest.raises(BadInput, match="cannot be shared"):
            Exchange.of(shape, tokens, text, ranks, 4)
        return
    exchange = Exchange.of(shape, tokens, text, ranks, 4, samples)
    plan = build_plan(Grouping(Grid(sides), (2, 2)), Full(), segments=Segments.of_text(text, text_first))
    sent = []
    for rank in range(ranks):
        group = cast(Any, SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank))
        shared, Counted.sent = Counted.of(group, tokens), 0
        rows = torch.zeros(samples, shared.counts[rank] + text, heads, WIDE)
        shared.attention(rows, rows, rows, plan, lambda query, key, value, plan, heads: query)
        sent.append(Counted.sent)
    without = exchange.of_call(0)
    assert sent == [one - other for one, other in zip(exchange.of_call(1), without, strict=True)]
    assert set(without) == {max(exchange.counts) * 3 * 4 * samples * (ranks - 1)}
