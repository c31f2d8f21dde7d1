"""What the guard measures on a CUDA device, against the same on the CPU; and that the host waits for none of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from grat_cli.attention.adapter import AttentionInputs
from grat_cli.attention.online_recall import measure, sample_rows
from grat_kernels import Block, Far, Grid, Grouping, HeadPlan, Plan, Union, build_head_plan, build_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS, HEADS, HEAD_DIM, TEXT = 32, 4, 128, 77
ORDER = Grouping(Grid((45, 52)), (16, 16), ((16, 16), (4, 4)))
FAR = Union(Block(0), Far([(0, (4, 4))]))
PLANS = {
    "plain": build_plan(ORDER, Block(1), TEXT),
    "far": build_plan(ORDER, FAR, TEXT, False),
    "heads": build_head_plan(((ORDER, Block(1)), (ORDER, FAR)), (0, 1, 1, 0), TEXT),
}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Operations that make the host wait for the device are errors."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def inputs_of(plan: Plan | HeadPlan) -> AttentionInputs:
    generator = torch.Generator().manual_seed(plan.tokens)
    shape = (2, plan.tokens, HEADS, HEAD_DIM)
    query, key, value = (torch.randn(shape, generator=generator).bfloat16() for _ in range(3))
    return AttentionInputs(0, 2 * query, key, value, plan, HEAD_DIM**-0.5, torch.tensor([TEXT, 9], dtype=torch.int32))


def on_device(inputs: AttentionInputs) -> AttentionInputs:
    assert inputs.text_valid is not None
    moved = {name: getattr(inputs, name).to(CUDA) for name in ("query", "key", "value", "text_valid")}
    return inputs._replace(**moved)


@pytest.mark.parametrize("name", PLANS)
def test_the_figures_are_those_of_the_cpu_and_nothing_waits(name: str) -> None:
    plan = PLANS[name]
    inputs = inputs_of(plan)
    moved = on_device(inputs)
    measure(moved, sample_rows(plan, ROWS, 0, CUDA))  # the first one moves the plan's tables
    with no_waiting():
        found = measure(moved, sample_rows(plan, ROWS, 1, CUDA))
    expected = measure(inputs, sample_rows(plan, ROWS, 1, CPU))
    # Sums of so many fp32 terms in another order.
    rounding = plan.tokens * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found.cpu(), expected, atol=rounding, rtol=0, equal_nan=True)


def test_figures_come_to_the_host_by_themselves() -> None:
    pytest.importorskip("pydantic")
    from grat_cli.attention.guard import _Call
    from grat_cli.attention.ranks import ALONE

    call = _Call()
    figures = torch.tensor([[0.5, 0.25, 0.125], [0.75, 0.5, torch.nan]], device=CUDA)
    with no_waiting():
        for layer, row in enumerate(figures):
            call.add(layer, layer, row)
        call.send(ALONE)
    assert [tuple(one) for one in call.read().measured.values()] == [(0.5, 0.25, 0.125, 0), (0.75, 0.5, None, 1)]
