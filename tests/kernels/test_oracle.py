"""Reference, sdpa and Triton against an oracle that knows token coordinates alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import coordinate_oracle as oracle
import numpy as np
import pytest
import torch
from coordinate_oracle import Scene
from hypothesis import given, settings
from hypothesis import strategies as st

from grat_kernels import (
    Backend,
    Block,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    Pattern,
    Plan,
    SlidingTile,
    Union,
    build_plan,
    span_attention,
    triton_backend,
)
from grat_kernels.tile_configs import TileConfig

Attend = Callable[..., torch.Tensor]
HEAD_DIMS = [8, 16, 40, 64, 72, 128, 256]
LARGEST = 60_000  # 16 bits hold little more
# In the interpreter a kernel's time goes by its operations, so tiles are larger where there is more text.
TILES, LARGE_TILES = TileConfig(32, 32, 16, 1, 1, "pointers"), TileConfig(64, 128, 128, 1, 1, "pointers")


def by_reference(*arguments: Any) -> torch.Tensor:
    return span_attention(*arguments, backend=Backend.REFERENCE)


def by_sdpa(*arguments: Any) -> torch.Tensor:
    return span_attention(*arguments, backend=Backend.SDPA)


def by_triton(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, text_valid: torch.Tensor | None
) -> torch.Tensor:
    # Not by `span_attention`, which would test the kernel anew for every head dimension.
    config = TILES if plan.text_len < 64 else LARGE_TILES
    scale = 1 / math.sqrt(query.shape[3])
    return triton_backend.attention(query, key, value, plan, text_valid, scale, config=config)


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu tests the compiled kernel")
BACKENDS = {"reference": by_reference, "sdpa": by_sdpa, "triton": by_triton}
EACH = pytest.mark.parametrize("name", ["reference", "sdpa", pytest.param("triton", marks=interpreted)])


def pattern_of(scene: Scene) -> Pattern:
    makers: dict[str, Callable[..., Pattern]] = {"full": Full, "b": Block, "x": CrissCross, "sta": SlidingTile}
    patterns = [makers[kind](*settings) for kind, *settings in scene.near]
    patterns += [Far(scene.far)] if scene.far else []
    return patterns[0] if len(patterns) == 1 else Union(*patterns)


def plan_of(scene: Scene) -> Plan:
    return build_plan(Grouping(Grid(scene.shape), scene.group), pattern_of(scene), scene.text, scene.text_first)


def judge(
    attend: Attend,
    scene: Scene,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    amplitude: float = 1.0,
    text_valid: tuple[int, ...] | None = None,
    heads: int = 1,
) -> None:
    """Fails unless rounding explains how far an output is from the oracle's, number by number."""
    plan = plan_of(scene)
    batch = 1 if text_valid is None else len(text_valid)
    generator = torch.Generator().manual_seed(head_dim + scene.tokens)
    shape = (3, batch, scene.tokens, heads, head_dim)
    raster = ((2 * torch.rand(shape, generator=generator) - 1) * amplitude).to(dtype)
    order = np.arange(scene.tokens)
    order[plan.image_start : plan.image_stop] = scene.first + plan.order
    given = None if text_valid is None else torch.tensor(text_valid)
    query, key, value = raster[:, :, torch.from_numpy(order)]
    output = attend(query, key, value, plan, given).double().numpy()
    for sample, head in np.ndindex(batch, heads):
        valid = scene.text if text_valid is None else text_valid[sample]
        query, key, value = raster[:, sample, :, head].double().numpy()
        answer = oracle.attend(scene, query, key, value, valid, head_dim**-0.5, str(dtype).removeprefix("torch."))
        off = np.abs(output[sample, :, head] - answer.output[order])
        assert (off <= answer.error[order]).all(), (off / answer.error[order]).max()


@st.composite
def scenes(draw: st.DrawFn, most: int, texts: tuple[int, ...]) -> Scene:
    """Groups of one token among them, and larger ones than the grid."""
    axes = draw(st.integers(1, 3))
    shape: list[int] = []
    for _ in range(axes):
        shape.append(draw(st.integers(1, max(1, min(9 if axes > 1 else 40, most // math.prod(shape))))))
    group = tuple(draw(st.sampled_from([1, 1, 2, 3, 4, 6, 48])) for _ in shape)
    sizes = st.integers(0, 2)
    near = draw(
        st.lists(
            st.one_of(
                st.just(("full",)),
                st.tuples(st.just("b"), st.tuples(*[sizes] * axes)),
                st.tuples(st.just("x"), st.integers(1, axes)),
                st.tuples(st.just("sta"), st.tuples(*[sizes.map(lambda size: 2 * size + 1)] * axes)),
            ),
            max_size=2,
        )
    )
    far: list[tuple[int, tuple[int, ...]]] = []
    outer = group
    for beyond in draw(st.sampled_from([(), (0,), (1,), (0, 2)] if near else [(0,), (1,), (0, 1)]))[::-1]:
        outer = tuple(
            draw(st.sampled_from([size for size in (1, 2, 3, 4, 6, 48) if side % size == 0])) for side in outer
        )
        far.insert(0, (beyond, outer))
    return Scene(tuple(shape), group, tuple(near), tuple(far), draw(st.sampled_from(texts)), draw(st.booleans()))


def sees_nothing(scene: Scene) -> bool:
    """Whether a group attends no image token, itself or through a mean."""
    places = {oracle.cell(place, scene.group) for place in np.ndindex(scene.shape)}
    return any(all(oracle.level(scene, a, b) is None for b in places) for a in places)


@st.composite
def problems(draw: st.DrawFn, most: int, texts: tuple[int, ...]) -> tuple[Scene, int, dict[str, Any]]:
    """What `judge` takes; of scenes that no plan is refused for."""
    scene = draw(scenes(most, texts).filter(lambda scene: scene.text or not sees_nothing(scene)))
    dtype, amplitude = draw(
        st.sampled_from([(torch.float32, 1.0), (torch.float32, 1e15), (torch.float16, 3.0), (torch.float16, LARGEST)])
    )
    valid = draw(st.none() | st.tuples(*[st.integers(0, scene.text)] * draw(st.integers(1, 2)))) if scene.text else None
    others = {"dtype": dtype, "amplitude": amplitude, "text_valid": valid, "heads": draw(st.integers(1, 2))}
    return scene, draw(st.sampled_from(HEAD_DIMS)), others


@pytest.mark.parametrize("name", ["reference", "sdpa"])
@settings(max_examples=60)
@given(problem=problems(90, (0, 1, 7, 40, 512)))
def test_backends_equal_the_oracle(name: str, problem: tuple[Scene, int, dict[str, Any]]) -> None:
    scene, head_dim, others = problem
    judge(BACKENDS[name], scene, head_dim, **others)


@interpreted
@settings(max_examples=15)
@given(problem=problems(40, (0, 1, 7)))
def test_triton_equals_the_oracle(problem: tuple[Scene, int, dict[str, Any]]) -> None:
    scene, head_dim, others = problem
    judge(by_triton, scene, head_dim, **others)


CASES = {
    "groups of one token": Scene((5, 9), (1, 1), (("b", (1, 2)),), text=7),
    "a group larger than the grid": Scene((5, 9), (16, 16), (("b", (0, 0)),), text=7, text_first=False),
    "long text": Scene((6, 7), (4, 4), (("x", 1),), ((0, (2, 4)),), text=512),
    "a pyramid": Scene((12, 13), (4, 4), (("b", (0, 0)),), ((0, (2, 2)), (1, (4, 4))), text=3),
    "lines of a video": Scene((3, 5, 6), (2, 3, 2), (("x", 2), ("b", (0, 0, 1))), text=9, text_first=False),
    "sliding tiles": Scene((7, 11), (2, 2), (("sta", (3, 1)),)),
    "means alone": Scene((9, 6), (3, 3), (), ((1, (3, 1)),), text=5),
}


@EACH
@pytest.mark.parametrize(("dtype", "amplitude"), [(torch.float32, 1.0), (torch.float16, LARGEST)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_known_kinds_equal_the_oracle(case: str, dtype: torch.dtype, amplitude: float, name: str) -> None:
    text = CASES[case].text
    judge(BACKENDS[name], CASES[case], 64, dtype=dtype, amplitude=amplitude, text_valid=(text // 3,))


@EACH
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 96])
def test_every_head_dimension_equals_the_oracle(head_dim: int, name: str) -> None:
    judge(BACKENDS[name], Scene((5, 9), (3, 4), (("b", (1, 1)),), ((1, (3, 2)),), text=5), head_dim)


@EACH
def test_queries_without_any_key_get_zeros(name: str) -> None:
    """No group is far from the one in the middle, and the second sample has no text."""
    scene = Scene((3, 5), (1, 2), (), ((1, (1, 1)),), text=2)
    plan = plan_of(scene)
    query, key, value = torch.randn(3, 2, scene.tokens, 1, 16, generator=torch.Generator().manual_seed(0))
    output = BACKENDS[name](query, key, value, plan, torch.tensor([2, 0]))
    alone = [oracle.cell(place, scene.group) == (1, 1) for place in np.ndindex(scene.shape)]
    of_middle = output[1, plan.image_start :][torch.tensor(alone)[torch.from_numpy(plan.order)]]
    assert of_middle.shape[0] == 2
    assert (of_middle == 0).all()
    judge(BACKENDS[name], scene, 16, text_valid=(2, 0))


@settings(max_examples=100)
@given(scene=scenes(60, (0, 3)))
def test_plans_are_refused_where_a_group_has_no_key_for_certain(scene: Scene) -> None:
    if sees_nothing(scene) and not scene.text:
        with pytest.raises(ValueError, match="nothing to attend"):
            plan_of(scene)
    else:
        plan_of(scene)


@settings(max_examples=60)
@given(scene=scenes(40, (0,)))
def test_the_oracle_is_what_patterns_say_of_groups(scene: Scene) -> None:
    grouping = Grouping(Grid(scene.shape), scene.group)
    levels = pattern_of(scene).levels(grouping.coordinates, grouping.coordinates, grouping.counts)
    places = [tuple(place) for place in grouping.coordinates.tolist()]
    expected = [[-1 if (level := oracle.level(scene, a, b)) is None else level for b in places] for a in places]
    np.testing.assert_array_equal(levels, expected)
