"""What ranks that share an output are foretold to send each other: against what the code sends, and the arithmetic."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from sent_bytes import sent, small
from shared_calls import STEPS
from small_transformers import MODELS

from grat_cli.attention.context_parallel import Shared
from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import BadInput
from grat_cli.estimates.planning import Forecast, architecture_for, forecast
from grat_cli.estimates.ranks import Exchange, bytes_of_step
from grat_cli.families import family_of_transformer
from grat_cli.models.catalogue import choose_model
from grat_cli.models.parallel import Parallel
from grat_cli.models.resolution import Resolution
from grat_cli.presets import Preset
from grat_kernels import Full, Grid, Grouping, Segments, build_plan

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
    made = []
    for rank in range(ranks):
        group = cast(Any, SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank))
        shared, Counted.sent = Counted.of(group, tokens), 0
        rows = torch.zeros(samples, shared.counts[rank] + text, heads, WIDE)
        shared.attention(rows, rows, rows, plan, lambda query, key, value, plan, heads: query)
        made.append(Counted.sent)
    without = exchange.of_call(0)
    assert made == [one - other for one, other in zip(exchange.of_call(1), without, strict=True)]
    assert set(without) == {max(exchange.counts) * 3 * 4 * samples * (ranks - 1)}


@pytest.mark.parametrize(("ranks", "parallel"), [(2, Parallel(1, 2)), (3, Parallel(3))])
def test_ranks_send_what_is_foretold(ranks: int, parallel: Parallel) -> None:
    """In calls of small transformers of all families; and in a run of the demo model, whose layers are computed,
    carried over steps, or carried beside a base that is computed."""
    beside = {"reference": [0, 2], "between": "residual", "base": {"radius": 0}, "layers": "3"}
    preset = {
        "name": "own",
        "model": "demo",
        "sampling": {"steps": STEPS, "guidance": DEMO_FLUX.guidance},
        "attention": {"variant": "b", "group": [4, 4], "radius": 1},
        "schedule": {"over_steps": [{"reference": [0, 2], "layers": "0-1"}, beside]},
    }
    run = forecast_of(preset)
    assert run.calls_per_step == 2
    by_step = [bytes_of_step(run, parallel, step) for step in range(STEPS)]
    assert len({*by_step}) == (2 if parallel.cp > 1 else 1)
    measured = on_ranks(ranks, sent, tuple(MODELS), preset, {"cp": parallel.cp, "cfg": parallel.cfg})
    assert [rank.in_run for rank in measured] == list(map(sum, zip(*by_step, strict=True))) * parallel.cfg
    foretold = list(zip(*(sent_in_call(name, ranks) for name in MODELS), strict=True))
    assert [(tuple(rank.in_calls), tuple(rank.counted)) for rank in measured] == [(each, each) for each in foretold]


def sent_in_call(name: str, ranks: int) -> tuple[int, ...]:
    """Foretold of each rank in a call of the small transformer of a family."""
    kind, model = MODELS[name], small(name, ranks)
    adapter = kind.adapter(model, kind.grids[1])
    inputs = kind.inputs(adapter.grid)
    family = family_of_transformer(model)
    assert family is not None
    shape = family.transformer_shape(model.config)
    text, samples = adapter.read(dict(inputs)), len(inputs["hidden_states"])
    exchange = Exchange.of(shape, adapter.grid.tokens + text.references, text.longest, ranks, 4, samples)
    return exchange.of_call(adapter.layers)


def forecast_of(preset: dict[str, Any]) -> Forecast:
    """Of the demo model as `pictures` calls it."""
    model = choose_model("demo")
    return forecast(Preset.model_validate(preset), "demo", architecture_for(model), Resolution(128, 120), "float32")
