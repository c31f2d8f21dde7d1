"""Figures of patterns: every group in the colour of how it is attended, at the scale of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import grat
from PIL import Image

from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.estimates.pattern_figure import EXACT, MEANS, QUERY, UNATTENDED, pattern_figure, query_groups
from grat_cli.presets import Preset
from grat_kernels import Grid

PIXELS_PER_TOKEN = 10  # of groups of 4: the largest that is drawn


def preset(variant: str, group: list[int], **sections: Any) -> Preset:
    attention = {"variant": variant, "group": group, **sections.pop("attention", {})}
    model = "hunyuan" if len(group) == 3 else "flux"
    return Preset.model_validate({"name": "test", "model": model, "attention": attention, **sections})


def drawn(schedule: AttentionSchedule, of: Preset) -> np.ndarray:
    figure = pattern_figure(schedule, of)
    assert figure.mode == "P"
    return np.asarray(figure.convert("RGB")).astype(int)


def is_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (pixels == colour).all(-1)


def panels_at(pixels: np.ndarray, rows: int, columns: int) -> list[tuple[int, int]]:
    """Upper left corners of all panels of so many tokens, in reading order: where blocks of pattern colours begin."""
    grounds = [QUERY, EXACT, UNATTENDED, *(ground for _, ground in MEANS), *(dot for dot, _ in MEANS)]
    coloured = np.any([is_colour(pixels, colour) for colour in grounds], axis=0)
    height, width = rows * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN
    found: list[tuple[int, int]] = []
    for y, x in np.argwhere(coloured):
        inside = any(top <= y < top + height and left <= x < left + width for top, left in found)
        # Swatches of the legend are smaller than any panel.
        if not inside and coloured[y : y + height, x : x + width].mean() > 0.6:
            found.append((int(y), int(x)))
    return found


def expected_colour(level: int, is_query: bool) -> tuple[int, int, int]:
    if is_query:
        return QUERY
    return UNATTENDED if level < 0 else EXACT if level == 0 else MEANS[level - 1][1]


TWO_LEVELS = [{"beyond": 0, "block": [2, 2]}, {"beyond": 1, "block": [4, 4]}]
CHOOSING = {"levels": [{"beyond": 0, "block": [4, 4]}], "choose": {"exact": 3, "fine": 5, "block": [2, 2]}}
CASES = {
    "b": preset("b", [4, 4]),
    "x": preset("x", [4, 4]),
    "far": preset("b", [4, 4], attention={"radius": 0, "far": TWO_LEVELS}),
    "choose": preset("b", [4, 4], attention={"radius": 0, "far": CHOOSING}),
    "planes": preset("x", [4, 4, 4]),
    "lines": preset("x", [4, 4, 4], attention={"share": 2}),
    "far of a video": preset("b", [4, 4, 4], attention={"far": [{"beyond": 1, "block": [2, 2, 2]}]}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_group_has_the_colour_of_how_it_is_attended(case: str) -> None:
    of = CASES[case]
    grid = Grid((9, 9, 14) if len(of.attention.group) == 3 else (18, 23))  # ragged on every axis
    schedule = AttentionSchedule(of, grid, 8)
    (plan,) = schedule.plans
    *_, rows, columns = grid.shape
    pixels = drawn(schedule, of)
    corners = iter(panels_at(pixels, rows, columns))
    for query in query_groups(plan):
        frames = query.levels.reshape(-1, *query.levels.shape[-2:])
        for number, frame in enumerate(frames):
            top, left = next(corners)
            for (row, column), level in np.ndenumerate(frame):
                is_query = (number, row, column)[-len(query.group) :] == query.group
                # The upper left corner of a group has no dot.
                pixel = pixels[top + row * 4 * PIXELS_PER_TOKEN, left + column * 4 * PIXELS_PER_TOKEN]
                assert tuple(pixel) == expected_colour(level, is_query), (query.group, number, row, column)
    assert next(corners, None) is None


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_a_query_group_is_what_the_kernel_gets(case: str) -> None:
    of = CASES[case]
    grid = Grid((9, 9, 14) if len(of.attention.group) == 3 else (18, 23))
    (plan,) = AttentionSchedule(of, grid, 8).plans
    for query in query_groups(plan):
        number = int(np.ravel_multi_index(query.group, plan.grouping.counts))
        spans = plan.spans(number)
        assert query.tokens == sum(span.length for span in spans if span.level == 0) - plan.text_len
        if plan.candidates is None:
            assert query.means == sum(span.length for span in spans if span.level > 0)
            assert query.chosen == 0
        else:
            # Three of 29 other groups token by token, five by four means each, all others by one.
            assert (query.chosen, query.means) == (3 * 16, 5 * 4 + 29 - 8)
        assert np.prod(query.extents) == plan.grouping.sizes[number]


def test_there_is_a_dot_for_every_mean() -> None:
    of = CASES["far"]
    schedule = AttentionSchedule(of, Grid((16, 24)), 8)  # not ragged: all dots of a level are alike
    pixels = drawn(schedule, of)
    corners = panels_at(pixels, 16, 24)
    levels = np.concatenate([query.levels.ravel() for query in query_groups(schedule.plans[0])])
    for level, side in ((1, 2), (2, 4)):
        # A dot is half as wide as its block, which a line of one pixel parts from the next.
        dot_pixels = round(0.5 * (side * PIXELS_PER_TOKEN - 1)) ** 2
        dots = (levels == level).sum() * (4 // side) ** 2
        found = sum(
            is_colour(pixels[top : top + 160, left : left + 240], MEANS[level - 1][0]).sum() for top, left in corners
        )
        assert found == dots * dot_pixels


def test_each_distinct_pattern_of_a_schedule_is_drawn() -> None:
    rules = {"dense_steps": 1, "rules": [{"heads": "0-1", "variant": "b", "radius": 0}]}
    of = preset("x", [4, 4], schedule=rules)
    schedule = AttentionSchedule(of, Grid((18, 23)), 8, steps=4, layers=2, heads=4)
    assert len(schedule.plans) == 3
    pixels = drawn(schedule, of)
    queries = [query for plan in schedule.plans for query in query_groups(plan)]
    assert len(queries) == 5  # of full attention one is enough
    assert len(panels_at(pixels, 18, 23)) == 5
    # One query group in each, and a swatch in the legend.
    areas = [np.prod([extent * PIXELS_PER_TOKEN - 1 for extent in query.extents]) for query in queries]
    assert is_colour(pixels, QUERY).sum() == sum(areas) + 12**2


def test_small_figures_of_large_runs(tmp_path: Path) -> None:
    for arguments in (("flux-far", "--res", "8192"), ("hunyuan-planes", "--res", "720p", "--frames", "129")):
        path = tmp_path / f"{arguments[0]}.png"
        result = grat("plan", *arguments, "--gpu", "h200", "--picture", path, "--quiet")
        assert (result.code, result.out) == (0, f"{path}\n")
        with Image.open(path) as figure:
            assert 700 < figure.width < 1100
            assert figure.height < 600
        assert path.stat().st_size < 60_000
