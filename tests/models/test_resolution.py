from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.errors import BadInput
from grat_cli.generation.seeds import LARGEST_SEED, resolve_seeds
from grat_cli.models.resolution import LARGEST_SIDE, Resolution, parse_resolution

MULTIPLE = 16


def parse(text: str | None) -> Resolution:
    return parse_resolution(text, 1024, MULTIPLE)


@pytest.mark.parametrize(
    ("text", "width", "height", "computed"),
    [
        (None, 1024, 1024, False),
        ("8192", 8192, 8192, False),
        ("4096x2048", 4096, 2048, False),
        ("4096×2048", 4096, 2048, False),
        (" 512X768 ", 512, 768, False),
        ("1k", 1024, 1024, True),
        ("2K", 2048, 2048, True),
        ("4k", 4096, 4096, True),
        ("8k", 8192, 8192, True),
        ("1mp", 1024, 1024, True),
        ("4mp", 2048, 2048, True),
        ("1:1", 1024, 1024, True),
        ("16:9", 1360, 768, True),
        ("16:9@4mp", 2736, 1536, True),
        ("9:16@4mp", 1536, 2736, True),
        ("2:1@2k", 2896, 1456, True),
        ("1:1@512", 512, 512, True),
    ],
)
def test_forms(text: str | None, width: int, height: int, computed: bool) -> None:
    assert parse(text) == Resolution(width, height, computed)


@given(st.integers(1, LARGEST_SIDE // MULTIPLE), st.integers(1, LARGEST_SIDE // MULTIPLE))
def test_typed_multiples_are_taken_as_they_are(columns: int, rows: int) -> None:
    size = Resolution(columns * MULTIPLE, rows * MULTIPLE)
    assert parse(str(size)) == size


@given(st.integers(MULTIPLE, LARGEST_SIDE - MULTIPLE), st.integers(MULTIPLE, LARGEST_SIDE - MULTIPLE))
def test_other_sizes_are_refused_with_valid_ones_around_them(width: int, height: int) -> None:
    if width % MULTIPLE == 0 and height % MULTIPLE == 0:
        width += 1
    with pytest.raises(BadInput, match="multiples of 16") as caught:
        parse(f"{width}x{height}")
    offers = re.findall(r"(\d+)x(\d+)", str(caught.value).partition("use ")[2])
    assert offers
    for offer in offers:
        offered = parse("x".join(offer))
        assert abs(offered.width - width) < MULTIPLE
        assert abs(offered.height - height) < MULTIPLE


@given(st.integers(1, 32), st.integers(1, 32), st.integers(1, 32))
def test_ratios_keep_shape_and_area_up_to_half_a_multiple(across: int, down: int, megapixels: int) -> None:
    resolution = parse(f"{across}:{down}@{megapixels}mp")
    area = megapixels * 1024 * 1024
    assert abs(resolution.width - math.sqrt(area * across / down)) <= MULTIPLE / 2
    assert abs(resolution.height - math.sqrt(area * down / across)) <= MULTIPLE / 2
    assert resolution.width % MULTIPLE == resolution.height % MULTIPLE == 0


NOT_SIZES = [
    *("", "big", "-512", "512x", "x512", "512x512x512", "5 12", "1e3", "1024.0", "٥١٢", "9" * 5000, "4mpx"),
    *("0", "15", "99999", "0k", "0.00mp", "40k"),
    *("16:0", "0:9@1mp", "16:9@", "16:9@big", "16:9@4:3", "1:9999@1k"),
]


@pytest.mark.parametrize("text", NOT_SIZES)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--res "):
        parse(text)


@given(st.text(alphabet="0123456789kmpx:@. -", max_size=12) | st.text(max_size=8))
def test_any_text_is_a_valid_size_or_bad_input(text: str) -> None:
    try:
        resolution = parse(text)
    except BadInput:
        return
    assert min(resolution.width, resolution.height) >= MULTIPLE
    assert max(resolution.width, resolution.height) <= LARGEST_SIDE


def test_seeds_come_from_the_list_or_count_up_from_the_first() -> None:
    assert resolve_seeds("7", None) == (7,)
    assert resolve_seeds("1,2, 5", None) == (1, 2, 5)
    assert resolve_seeds("1,2,5", 3) == (1, 2, 5)
    assert resolve_seeds("7", 4) == (7, 8, 9, 10)
    assert resolve_seeds("0", 1) == (0,)
    assert resolve_seeds(str(LARGEST_SEED), 1) == (LARGEST_SEED,)


def test_random_seeds_are_consecutive_and_differ_between_runs() -> None:
    first, second, third = resolve_seeds(None, 3)
    assert (second, third) == (first + 1, first + 2)
    assert len({resolve_seeds(None, None) for _ in range(8)}) > 1


@pytest.mark.parametrize(
    ("text", "count", "complaint"),
    [
        ("-1", None, "whole numbers"),
        ("1.5", None, "whole numbers"),
        ("", None, "whole numbers"),
        ("1,,2", None, "whole numbers"),
        ("²", None, "whole numbers"),
        (str(LARGEST_SEED + 1), None, "seeds go from 0"),
        ("9" * 5000, None, "seeds go from 0"),
        (str(LARGEST_SEED), 2, "largest seed"),
        ("1,1", None, "same seed twice"),
        ("1,2,3", 2, "leave out --n"),
        ("1", 0, "expected 1 to"),
        ("1", -3, "expected 1 to"),
    ],
)
def test_seeds_out_of_range_or_in_conflict_are_refused(text: str, count: int | None, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        resolve_seeds(text, count)
