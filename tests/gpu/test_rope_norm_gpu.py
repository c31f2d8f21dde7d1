"""The compiled kernel that normalises, rotates, joins and pools, against torch in fp64, on a CUDA device.

Needs torch, triton, numpy and pytest, and no downloads: `make gpu`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from grat_kernels import Block, CrissCross, Far, Grid, Grouping, Plan, Union, build_plan, rope_norm, span_attention
from grat_kernels.rope_norm import Joined, Norms, Projections
from grat_kernels.summaries import summarise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
# Text apart as in double blocks; rotated as in Flux.
LAYOUTS = pytest.mark.parametrize(
    ("apart", "text_rotated"),
    [(True, True), (False, True), (True, False), (False, False)],
    ids=["Flux double", "Flux single", "HunyuanVideo double", "HunyuanVideo single"],
)
PYRAMID = Far([(0, (2, 2)), (1, (4, 4)), (2, (16, 16))])
PLANS = {
    "no far field": build_plan(Grouping(Grid((45, 52)), (16, 16)), Block(1), 77),
    "far field": build_plan(Grouping(Grid((45, 50)), (16, 16)), Union(Block(0), Far([(0, (4, 4))])), 13),
    "far pyramid": build_plan(Grouping(Grid((45, 50)), (16, 16)), Union(Block(0), PYRAMID), 20, False),
    "video": build_plan(
        Grouping(Grid((7, 21, 18)), (4, 8, 8)), Union(CrissCross(2), Far([(0, (1, 2, 2)), (1, (2, 4, 4))])), 250, False
    ),
    "no text": build_plan(Grouping(Grid((31, 33)), (8, 8)), Union(Block(0), Far([(0, (8, 8))]))),
    "one token": build_plan(Grouping(Grid((1, 1)), (2, 2)), Union(Block(0), Far([(0, (1, 1))])), 1, False),
}


class Problem:
    """Random arguments of `rope_norm`."""

    def __init__(
        self, plan: Plan, dtype: torch.dtype, apart: bool, text_rotated: bool, batch: int, heads: int, head_dim: int
    ) -> None:
        generator = torch.Generator(DEVICE).manual_seed(plan.tokens + head_dim)
        self.plan = plan

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        def projections(rows: int) -> Projections:
            made = (random(batch, rows, heads, head_dim) * random(batch, rows, heads, 1).exp() for _ in range(3))
            return Projections(*(tensor.to(dtype) for tensor in made))

        apart = apart and plan.text_len > 0
        self.image = projections(plan.image_tokens if apart else plan.tokens)
        self.text = projections(plan.text_len) if apart else None
        self.norms = Norms(random(head_dim).to(dtype), random(head_dim).to(dtype), 1e-6)
        self.text_norms = Norms(random(head_dim).to(dtype), random(head_dim).to(dtype), 1e-3) if apart else None
        angles = random(plan.tokens if text_rotated else plan.image_tokens, head_dim // 2) * 4
        angles = angles.repeat_interleave(2, dim=1)
        self.rotation = angles.cos(), angles.sin()

    def run(self, fused: bool, change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> Joined:
        """The result, of projections that `change` lays out in another way or casts."""
        image, text = (part and Projections(*map(change, part)) for part in (self.image, self.text))
        assert image is not None
        return rope_norm.rope_norm(
            image, self.norms, self.rotation, self.plan, text=text, text_norms=self.text_norms, fused=fused
        )


def assert_exact_but_for_rounding(problem: Problem, result: Joined) -> None:
    """Computed in fp32 and rounded once, as tests/test_rope_norm.py derives; means of what was rounded."""
    exact = problem.run(False, torch.Tensor.double)
    information = torch.finfo(problem.image.query.dtype)
    half_unit = information.eps / 2
    for tensor, truth in ((result.query, exact.query), (result.key, exact.key)):
        # |a cos| + |b sin| is at most the length of the pair, which rotation keeps.
        pairs = truth.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*truth.shape[:3], -1, 2).flatten(-2)
        error = (truth.shape[3] / 2 + 12) * 2.0**-24 * pairs
        assert ((tensor - truth).abs() <= error + half_unit * (truth.abs() + error + information.tiny)).all()
        assert tensor.is_contiguous()
    assert torch.equal(result.value.double(), exact.value)
    if not problem.plan.summaries.rows:
        assert result.summaries is None
        return
    assert result.summaries is not None
    most = int(problem.plan.summaries.counts.max())
    for means, tokens in zip(result.summaries, (result.key, result.value), strict=True):
        truth = summarise(tokens.double(), problem.plan)
        error = (most + 2) * 2.0**-24 * summarise(tokens.double().abs(), problem.plan)
        assert ((means - truth).abs() <= error + half_unit * (truth.abs() + error + information.tiny)).all()


def assert_same_bits(result: Joined, expected: Joined) -> None:
    pairs = zip((*result[:3], *(result.summaries or ())), (*expected[:3], *(expected.summaries or ())), strict=True)
    for tensor, other in pairs:
        assert torch.equal(tensor, other)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("name", PLANS)
def test_equals_fp64(name: str, apart: bool, text_rotated: bool, dtype: torch.dtype) -> None:
    problem = Problem(PLANS[name], dtype, apart, text_rotated, batch=2, heads=5, head_dim=128)
    assert_exact_but_for_rounding(problem, problem.run(True))


@DTYPES
@pytest.mark.parametrize("head_dim", [2, 16, 64, 80, 96, 256])
@pytest.mark.parametrize("heads", [1, 24])
def test_head_dimensions(head_dim: int, heads: int, dtype: torch.dtype) -> None:
    problem = Problem(PLANS["far pyramid"], dtype, True, True, 1, heads, head_dim)
    assert_exact_but_for_rounding(problem, problem.run(True))


def _inside_a_larger_one(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN all around."""
    batch, tokens, heads, head_dim = tensor.shape
    shape = (batch + 2, tokens + 8, heads + 2, head_dim + 16)
    larger = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
    larger[1:-1, 4:-4, 1:-1, 8:-8] = tensor
    return larger[1:-1, 4:-4, 1:-1, 8:-8]


def _part_of_a_projection(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as the middle third of a fused projection's output."""
    return torch.stack([torch.full_like(tensor, torch.nan), tensor, tensor], dim=2)[:, :, 1]


def _off_by_one(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an address that allows no wide loads."""
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return buffer[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("layout", [_inside_a_larger_one, _part_of_a_projection, _off_by_one])
@pytest.mark.parametrize("apart", [True, False], ids=["double", "single"])
def test_layouts_give_the_same_result(layout: Callable[[torch.Tensor], torch.Tensor], apart: bool) -> None:
    problem = Problem(PLANS["far field"], torch.bfloat16, apart, True, 2, 3, 128)
    assert_exact_but_for_rounding(problem, problem.run(True, layout))


def test_strides_of_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free memory")
    problem = Problem(PLANS["far field"], torch.bfloat16, False, True, 2, 2, 64)

    def distant(tensor: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(2**31 + 2**24, dtype=torch.bfloat16, device=DEVICE)
        return torch.as_strided(buffer, tensor.shape, (2**31 + 2**20, 128, 64, 1)).copy_(tensor)

    assert_same_bits(problem.run(True, distant), problem.run(True))


@pytest.mark.parametrize("apart", [True, False], ids=["double", "single"])
def test_a_large_image_is_exact_and_bit_reproducible(apart: bool) -> None:
    """4096 x 4096 pixels, 24 heads of 128."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory")
    plan = build_plan(Grouping(Grid((256, 256)), (16, 16)), Union(Block(1), Far([(1, (4, 4)), (3, (16, 16))])), 512)
    problem = Problem(plan, torch.bfloat16, apart, True, 1, 24, 128)
    first = problem.run(True)
    for _ in range(3):
        assert_same_bits(problem.run(True), first)
    assert_exact_but_for_rounding(problem, first)


def test_the_host_never_waits() -> None:
    problem = Problem(PLANS["far pyramid"], torch.bfloat16, True, True, 1, 4, 128)
    first = problem.run(True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = problem.run(True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(again, first)


def test_it_is_chosen_and_compiles_into_one_graph() -> None:
    chosen, reason = rope_norm.choose(torch.device(DEVICE), torch.bfloat16, 128)
    assert chosen, reason
    problem = Problem(PLANS["far field"], torch.bfloat16, True, True, 1, 4, 128)

    def block() -> torch.Tensor:
        query, key, value, summaries = problem.run(True)
        return span_attention(query, key, value, problem.plan, summaries=summaries)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(block, fullgraph=True)(), block())
