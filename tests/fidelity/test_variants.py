"""Names of --compare and --peers: what they mean on a grid, and how mistakes are answered."""

from __future__ import annotations

import contextlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.errors import BadInput
from grat_cli.fidelity.variants import (
    NAMES,
    clear_pairs,
    default_group,
    na_pairs,
    na_starts,
    na_window_near,
    parse_peers,
    parse_variants,
    variant_for,
)
from grat_cli.presets import Preset, load_preset, preset_yaml, resolve_preset
from grat_kernels import Block, CrissCross, Far, Full, Grid, Grouping, SlidingTile, Union, build_plan
from grat_kernels.analysis import reach

FLUX_4K, VIDEO = Grid((256, 256)), Grid((33, 45, 80))


@pytest.mark.parametrize(
    ("text", "kind", "summary"),
    [
        ("full+first-block", "full", "first-block"),
        ("far+taylor:cache_interval=3:max_order=2", "grat-far", "taylor, cache_interval 3, max_order 2"),
        ("grat-b:radius=2+pab:timesteps=100-900", "grat-b", "pab, timesteps 100-900"),
        ("demo-far+mag:calibrate=true", "preset", "mag, calibrate true"),
    ],
)
def test_names_may_have_a_cache(text: str, kind: str, summary: str) -> None:
    [request] = parse_variants(text, "image")
    assert request.cache is not None
    assert (request.name, request.kind, request.cache.summary) == (text, kind, summary)
    found = variant_for(request, Grid((32, 32)))
    assert found.cache == request.cache
    assert found.description.endswith(f"; cache {summary}")
    plain = variant_for(parse_variants(text.rpartition("+")[0], "image")[0], Grid((32, 32)))
    assert (found.grouping, found.pattern, found.preset) == (plain.grouping, plain.pattern, plain.preset)


@pytest.mark.parametrize(
    ("text", "level", "says"),
    [
        ("far+tailor", "image", r"--compare far with tailor: did you mean 'taylor'\?"),
        ("far+", "image", "choose from full"),
        ("+taylor", "image", "a name is empty"),
        ("far+taylor:interval=3", "image", "taylor has no 'interval': did you mean 'cache_interval'"),
        ("far+taylor:cache_interval=1", "video", "cache_interval: expected 2 or more, not 1"),
        ("na+taylor", "image", "na is compared without a cache: give na alone"),
        ("far+taylor", "step", "caches are for --level image and video.*give far alone"),
        ("far+taylor,far+taylor", "image", "twice"),
    ],
)
def test_caches_that_do_not_fit_are_refused(text: str, level: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse_variants(text, level)


def test_a_file_may_have_a_plus_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "b+c.yaml"
    path.write_text(preset_yaml(load_preset("demo-b")))
    [plain, cached] = parse_variants(f"{path},{path}+pab", "image")
    assert (plain.cache, cached.cache and cached.cache.kind) == (None, "pab")
    assert plain.preset == cached.preset == load_preset("demo-b")


def test_a_preset_brings_its_own_cache(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(preset_yaml(resolve_preset(load_preset("demo-b"), cache="taylor")))
    [own, other, none] = parse_variants(f"{path},{path}+pab,{path}+none", "image")
    assert [request.cache and request.cache.kind for request in (own, other, none)] == ["taylor", "pab", None]


@given(st.text(alphabet="fartylob+:=-,.x0123456789 ", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(BadInput):
        parse_variants(f"far+{text}", "image")


def variant(text: str, grid: Grid = FLUX_4K):
    [request] = parse_variants(text)
    return variant_for(request, grid)


@pytest.mark.parametrize(
    ("text", "grid", "group", "pattern"),
    [
        ("grat-b", FLUX_4K, (16, 16), Block(1)),
        ("grat-b:radius=2", FLUX_4K, (16, 16), Block(2)),
        ("grat-b:radius=1x2:group=8", FLUX_4K, (8, 8), Block((1, 2))),
        ("grat-x", VIDEO, (4, 8, 8), CrissCross(1)),
        ("grat-x:share=2", VIDEO, (4, 8, 8), CrissCross(2)),
        ("grat-bx:radius=0:share=1", FLUX_4K, (16, 16), Union(Block(0), CrissCross(1))),
        ("grat-far", FLUX_4K, (16, 16), Union(Block(1), Far([(1, (8, 8))]))),
        ("grat-far", VIDEO, (4, 8, 8), Union(Block(1), Far([(1, (4, 4, 4))]))),
        ("grat-far:radius=0:block=4x4:group=8x8", FLUX_4K, (8, 8), Union(Block(0), Far([(0, (4, 4))]))),
        ("grat-choose", FLUX_4K, (16, 16), Union(Block(0), Far([(0, (8, 8))], (8, 32, (4, 4))))),
        ("grat-choose", Grid((32, 32)), (4, 4), Union(Block(0), Far([(0, (4, 4))], (8, 32, (2, 2))))),
        ("grat-choose", VIDEO, (4, 8, 8), Union(Block(0), Far([(0, (4, 4, 4))], (16, 64, (4, 2, 2))))),
        ("grat-choose:block=2x1x1", VIDEO, (4, 8, 8), Union(Block(0), Far([(0, (2, 1, 1))], (16, 64, (1, 1, 1))))),
        (
            "choose:exact=4:fine=0:radius=1:block=16:means=4x8",
            FLUX_4K,
            (16, 16),
            Union(Block(1), Far([(1, (16, 16))], (4, 0, (4, 8)))),
        ),
        ("sta:window=5", FLUX_4K, (16, 16), SlidingTile(5)),
        ("full-list", FLUX_4K, (16, 16), Full()),
        ("b:radius=2", FLUX_4K, (16, 16), Block(2)),
        ("x", FLUX_4K, (16, 16), CrissCross(1)),
        ("bx", FLUX_4K, (16, 16), Union(Block(1), CrissCross(1))),
        ("far", FLUX_4K, (16, 16), Union(Block(1), Far([(1, (8, 8))]))),
    ],
)
def test_patterns(text: str, grid: Grid, group: tuple[int, ...], pattern: object) -> None:
    found = variant(text, grid)
    assert (found.name, found.pattern, found.grouping) == (text, pattern, Grouping(grid, group))
    plan = build_plan(Grouping(grid, group), found.pattern or Full(), 512)
    assert found.attended_pairs(512, True) == plan.attended_pairs
    assert found.reach() == reach(plan)


WITHOUT_SECTION = ("full", "full-list", "na", "clear", "grat-heads")


@pytest.mark.parametrize("text", [name for name in NAMES if name not in WITHOUT_SECTION])
def test_the_attention_section_is_one_of_presets_and_means_the_same(text: str) -> None:
    found = variant(text)
    attention = {**(found.attention or {})}
    preset = Preset.model_validate({"name": "x", "model": "flux", "attention": attention, "sampling": {"steps": 1}})
    assert preset.attention.pattern() == found.pattern
    assert found.grouping is not None
    assert preset.attention.group == found.grouping.group


def test_what_is_chosen_is_said_in_words() -> None:
    found = variant("choose:exact=4", Grid((32, 32)))
    assert found.description == (
        "each group itself; by content 4 blocks of 4x4 token by token and 32 by means of 2x2, all others by one mean "
        "each, groups of 4x4"
    )
    assert found.reach() == pytest.approx(31 * 2**0.5)  # any block may be chosen
    assert variant("choose:exact=0", Grid((32, 32))).reach() == pytest.approx(3 * 2**0.5)


def test_groups_are_halved_on_short_axes() -> None:
    assert default_group(FLUX_4K) == (16, 16)
    assert default_group(Grid((64, 256))) == (8, 16)
    assert default_group(VIDEO) == (4, 8, 8)
    assert default_group(Grid((1, 5))) == (1, 1)
    far = variant("grat-far", Grid((64, 64)))
    assert (far.grouping, far.pattern) == (Grouping(Grid((64, 64)), (8, 8)), Union(Block(1), Far([(1, (4, 4))])))


@pytest.mark.parametrize("name", ["planes", "lines", "b", "bx", "far", "sta"])
def test_short_names_on_videos_are_the_presets(name: str) -> None:
    found, preset = variant(name, VIDEO), load_preset(f"hunyuan-{name}")
    assert found.grouping == Grouping(VIDEO, preset.attention.group)
    assert found.pattern == preset.attention.pattern()


def test_short_names_keep_what_they_fix() -> None:
    small = Grid((9, 9, 16))
    assert variant("lines:group=3", small).grouping == Grouping(small, (3, 3, 3))
    with pytest.raises(BadInput, match="lines has no parameter 'share'"):
        parse_variants("lines:share=1")
    with pytest.raises(BadInput, match="planes are for videos"):
        variant("planes", FLUX_4K)


def test_groups_of_small_videos_leave_something_out() -> None:
    demo, text = Grid((9, 9, 16)), 8
    found = {name: variant(name, demo) for name in ("b", "lines", "bx", "planes")}
    assert all(one.grouping == Grouping(demo, (2, 2, 4)) for one in found.values())
    densities = [one.attended_pairs(text, False) / (demo.tokens + text) ** 2 for one in found.values()]
    assert densities == pytest.approx([0.203, 0.138, 0.265, 0.538], abs=0.001)


def test_full_knows_no_groups() -> None:
    full = variant("full")
    assert (full.pattern, full.attended_pairs(512, True)) == (None, (65536 + 512) ** 2)
    assert full.reach() == math.hypot(255, 255)


grids = st.one_of(
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
).map(Grid)


@given(grids, st.data())
def test_pairs_and_reach_of_windows_are_counted_exactly(grid: Grid, data: st.DataObject) -> None:
    tokens = np.asarray(list(itertools.product(*map(range, grid.shape))))
    offsets = tokens[:, None] - tokens[None]
    if grid.axes == 2:
        radius = data.draw(st.integers(1, 9))
        near = (offsets**2).sum(-1) < radius**2
        assert clear_pairs(grid, (radius,)) == near.sum()
        clear = variant(f"clear:window={radius}", grid)
        assert clear.reach() == pytest.approx(np.sqrt((offsets**2).sum(-1)[near].max()))
        assert clear.attended_pairs(3, True) == near.sum() + 2 * 3 * grid.tokens + 9

    widths = tuple(data.draw(st.sampled_from(range(1, extent + 1, 2))) for extent in grid.shape)
    inside = np.ones((grid.tokens, grid.tokens), np.bool_)
    for axis, (extent, width) in enumerate(zip(grid.shape, widths, strict=True)):
        first = na_starts(extent, width)[tokens[:, axis]][:, None]
        inside &= (tokens[None, :, axis] >= first) & (tokens[None, :, axis] < first + width)
    assert na_pairs(grid, widths) == inside.sum()
    na = variant(f"na:window={'x'.join(map(str, widths))}", grid)
    assert na.window == widths
    assert na.reach() >= np.sqrt((offsets**2).sum(-1)[inside].max())


@given(grids)
def test_default_windows_are_as_dense_as_grat_b_as_far_as_whole_numbers_allow(grid: Grid) -> None:
    target = variant("grat-b", grid).attended_pairs(0, True)
    if grid.axes == 2:
        radius = (variant("clear", grid).window or (0,))[0]
        distance = abs(clear_pairs(grid, (radius,)) - target)
        assert all(distance <= abs(clear_pairs(grid, (other,)) - target) for other in (max(1, radius - 1), radius + 1))
    window = variant("na", grid).window or ()
    for width, extent in zip(window, grid.shape, strict=True):
        assert 1 <= width <= extent
        assert width % 2 == 1 or width == extent


@pytest.mark.parametrize(("grid", "limit"), [(Grid((128, 128)), 0.01), (Grid((512, 512)), 0.01), (VIDEO, 0.06)])
def test_density_of_na_is_near_that_of_grat_b_on_real_grids(grid: Grid, limit: float) -> None:
    na, block = (variant(name, grid).attended_pairs(0, True) for name in ("na", "grat-b"))
    assert abs(na / block - 1) < limit


def test_a_window_near_all_keys_is_the_grid() -> None:
    assert na_window_near(Grid((4, 30)), 120) == (4, 30)
    assert na_window_near(Grid((4, 30)), 100) == (4, 25)


def test_clear_says_that_it_has_two_axes() -> None:
    assert variant("clear", VIDEO).obstacle == "CLEAR is defined on two axes, not 3"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grat_b", "did you mean 'grat-b'"),
        ("full,ful", "did you mean 'full'"),
        ("", "a name is empty"),
        ("full,,na", "a name is empty"),
        ("na,na", "names na twice"),
        ("na:widow=3", "did you mean 'window'"),
        ("full:group=4", "full has no parameter 'group': choose from steps"),
        ("full:steps=2x2", "steps is one number, such as steps=10"),
        ("grat-b:radius", "expected radius=2"),
        ("grat-b:radius=-1", "expected radius=2"),
        ("grat-b:radius=1:radius=2", "radius is given twice"),
        ("grat-x:share=1x1", "share is one number"),
        ("grat-choose:exact=8x8", "exact is one number, such as exact=8"),
        ("grat-choose:exact=few", "expected exact=8"),
        ("choose:mean=2x2", "choose has no parameter 'mean': did you mean 'means'"),
    ],
)
def test_mistakes_in_names(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        parse_variants(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("na:window=4", "odd number of tokens"),
        ("na:window=3x3x3", "has 3 numbers, the grid has 2 axes"),
        ("clear:window=3x3", "one radius"),
        ("clear:window=0", "one radius"),
        ("grat-b:radius=1x1x1", "the grid has 2 axes"),
        ("grat-b:group=0", "positive"),
        ("grat-x:share=3", "share 3 is more than the grid's 2 axes"),
        ("grat-far:block=5x5", "do not nest"),
        ("grat-choose:block=5x5", "do not nest in groups"),
        ("grat-choose:means=3x3", "blocks of .3, 3. do not nest in those of .8, 8. that are chosen from"),
        ("grat-choose:exact=0:fine=0", "not both 0|both 0"),
        ("grat-choose:block=1", "blocks of 1x1 have no means within them: give a larger block"),
        ("sta:window=2", "odd positive number"),
    ],
)
def test_mistakes_on_a_grid_name_what_was_typed(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words) as error:
        variant(text)
    assert str(error.value).startswith(f"--compare {text} on 256x256 tokens: ")


def test_several_names_in_order() -> None:
    names = [request.name for request in parse_variants("grat-b, full,na:window=3")]
    assert names == ["grat-b", "full", "na:window=3"]


def test_peers() -> None:
    assert parse_peers("flex,natten,flex") == ("flex", "natten")
    with pytest.raises(BadInput, match="did you mean 'flashinfer'"):
        parse_peers("flashinfr")
