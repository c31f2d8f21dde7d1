"""Similarity of pictures: against the definitions, and where they would not be numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from grat_cli.bench.quality import compare, half_interval


def picture(seed: int, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def shifted(image: Image.Image, by: int) -> Image.Image:
    return Image.fromarray((np.asarray(image).astype(int) // 2 + by).astype(np.uint8))


def test_psnr_is_that_of_the_squared_error() -> None:
    grey = [Image.new("RGB", (16, 16), (100, 100, 100))] * 2
    lighter = [Image.new("RGB", (16, 16), (100 + step, 100 + step, 100 + step)) for step in (5, 10)]
    found = compare(grey, lighter)
    expected = [20 * math.log10(255 / step) for step in (5, 10)]
    assert found.psnr_db == pytest.approx(np.mean(expected))
    # Student's t for one degree of freedom, 97.5 %: tan(.475 pi).
    half = math.tan(0.475 * math.pi) * abs(expected[0] - expected[1]) / 2
    assert found.psnr_interval_db == pytest.approx(half)


def test_identical_pictures_have_finite_figures() -> None:
    pictures = [picture(seed) for seed in range(3)]
    found = compare(pictures, pictures)
    assert found.ssim == pytest.approx(1)
    assert found.ssim_interval == pytest.approx(0)
    one_step = pictures[0].copy()
    red, green, blue = one_step.getpixel((0, 0))  # type: ignore[misc]
    one_step.putpixel((0, 0), (red ^ 1, green, blue))
    assert found.psnr_db == pytest.approx(compare(pictures[:1], [one_step]).psnr_db)


def test_closer_pictures_score_higher() -> None:
    full = [shifted(picture(seed), 0) for seed in range(3)]
    near, far = compare(full, [shifted(picture(seed), 2) for seed in range(3)]), compare(full, [picture(9)] * 3)
    assert near.ssim > far.ssim
    assert near.psnr_db > far.psnr_db


def test_a_single_picture_has_no_interval() -> None:
    found = compare([picture(0)], [picture(1)])
    assert found.ssim_interval is None
    assert found.psnr_interval_db is None
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)


def test_as_many_pictures_as_references() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([picture(0)], [])
