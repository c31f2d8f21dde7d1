"""Random attention problems, and how far from exact a kernel may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from grat_kernels import (
    Block,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    Pattern,
    Plan,
    Segments,
    SlidingTile,
    Union,
    build_plan,
    reference,
)


@dataclass(frozen=True)
class Problem:
    """A plan and what else a call of span attention needs."""

    plan: Plan
    batch: int
    heads: int
    head_dim: int
    text_valid: tuple[int, ...] | None
    seed: int

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """query, key, value `[B, N, H, D]` and text_valid `[B]`."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.plan.tokens, self.heads, self.head_dim)
        query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
        return query, key, value, None if self.text_valid is None else torch.tensor(self.text_valid)


def groupings(max_tokens: int = 300) -> st.SearchStrategy[Grouping]:
    """Ragged 2-D and 3-D grids with groups that need not divide them."""

    @st.composite
    def build(draw: st.DrawFn) -> Grouping:
        axes = draw(st.sampled_from([2, 3]))
        side = {2: 24, 3: 9}[axes]
        shape: list[int] = []
        for _ in range(axes):
            room = max_tokens // max(1, _product(shape))
            shape.append(draw(st.integers(1, max(1, min(side, room)))))
        group = tuple(draw(st.sampled_from([1, 2, 3, 4, 6, 8])) for _ in range(axes))
        return Grouping(Grid(tuple(shape)), group)

    return build()


def patterns(grouping: Grouping) -> st.SearchStrategy[Pattern]:
    """Every kind of pattern, with and without far levels, that fits a grouping."""
    axes = grouping.grid.axes
    radius = st.integers(0, 2)
    near = st.one_of(
        st.just(Full()),
        st.builds(Block, radius),
        st.builds(Block, st.tuples(*[radius] * axes)),
        st.builds(CrissCross, st.integers(1, axes)),
        st.builds(lambda reach, share: Union(Block(reach), CrissCross(share)), radius, st.integers(1, axes)),
        st.builds(SlidingTile, st.sampled_from([1, 3])),
        st.builds(SlidingTile, st.tuples(*[st.sampled_from([1, 3])] * axes)),
    )
    divisors = [[size for size in (1, 2, 3, 4, 6, 8) if group % size == 0] for group in grouping.group]

    @st.composite
    def with_far(draw: st.DrawFn) -> Pattern:
        fine = tuple(draw(st.sampled_from(sizes)) for sizes in divisors)
        coarse = tuple(
            draw(st.sampled_from([size for size in sizes if size % inner == 0]))
            for sizes, inner in zip(divisors, fine, strict=True)
        )
        beyond = draw(st.integers(0, 1))
        levels = (
            [(beyond, fine)] if draw(st.booleans()) else [(beyond, fine), (beyond + draw(st.integers(1, 2)), coarse)]
        )
        return Union(draw(near), Far(levels))

    return st.one_of(near, with_far())


@st.composite
def segments(draw: st.DrawFn) -> Segments:
    """Runs of tokens before and after the image, text alone as often as others."""
    length = st.sampled_from([0, 1, 7, 24])
    if draw(st.booleans()):
        return Segments.of_text(draw(length), draw(st.booleans()))
    before, after = (tuple(draw(st.lists(length, max_size=2))) for _ in range(2))
    runs = len(before) + len(after)
    return Segments(before, after, draw(st.sampled_from([None, *range(runs)])))


@st.composite
def plans(draw: st.DrawFn, max_tokens: int = 300) -> Plan:
    grouping = draw(groupings(max_tokens))
    return build_plan(grouping, draw(patterns(grouping)), segments=draw(segments()))


@st.composite
def problems(draw: st.DrawFn, max_tokens: int = 200) -> Problem:
    plan = draw(plans(max_tokens))
    batch = draw(st.integers(1, 2))
    text_valid = None
    if plan.text_len and draw(st.booleans()):
        text_valid = tuple(draw(st.integers(0, plan.text_len)) for _ in range(batch))
    return Problem(
        plan, batch, draw(st.integers(1, 3)), draw(st.sampled_from([32, 64])), text_valid, draw(st.integers(0, 99))
    )


def defined_by_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plans: Sequence[Plan],
    text_valid: torch.Tensor | None,
    scale: float,
    summaries: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The definition's output `[B, N, H, D]` in float64, where each head has a plan of its own, `[H]`."""
    outputs = []
    for head, plan in enumerate(plans):
        own = slice(head, head + 1)
        wide_query, wide_key, wide_value = (tensor[:, :, own].double() for tensor in (query, key, value))
        pair = (summaries[0][:, :, own], summaries[1][:, :, own]) if summaries else None
        outputs.append(
            reference.attention(
                wide_query, wide_key, wide_value, plan, text_valid, scale, torch.float64, summaries=pair
            )
        )
    return torch.cat(outputs, dim=2)


def error_bound(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> float:
    """Largest error of an attention output that rounding can explain, for standard arithmetic in the tensors' dtype.

    With u the unit roundoff of the accumulator (fp32 at best) and w that of the dtype (weights and output are rounded
    to it), a score of D products is off by at most D·u·scale·Σ|q||k| (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1), to which exp2 and the summary bias add a few u of the score; weights change by e^(2δ)-1;
    the sum over n keys adds n·u, and rounding the weights and the output 2·w, all relative to max|v|. Summaries are
    means rounded to the dtype: their scores are off by w·scale·Σ|q||k| more.
    """
    accumulate = 2.0**-24
    working = torch.finfo(query.dtype).eps / 2
    head_dim, keys = query.shape[3], key.shape[1]
    products = scale * float((query.abs().amax((0, 1, 2)) * key.abs().amax((0, 1, 2))).double().sum())
    largest_score = scale * float(query.double().norm(dim=3).max() * key.double().norm(dim=3).max()) + 10
    score_error = head_dim * accumulate * products + working * products + 8 * accumulate * largest_score
    weight_error = float(torch.expm1(torch.tensor(2 * score_error, dtype=torch.float64)))
    return (weight_error + keys * accumulate + 3 * working) * float(value.double().abs().max())


def _product(factors: list[int]) -> int:
    result = 1
    for factor in factors:
        result *= factor
    return result
