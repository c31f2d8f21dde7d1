"""Similarity of pictures: against the definitions, and where they would not be numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from grat_cli.fidelity.quality import Likeness, compare, half_interval, likeness, summary


def of_pictures(reference: Image.Image, picture: Image.Image) -> Likeness:
    return likeness(*([np.asarray(one.convert("RGB"))] for one in (reference, picture)))


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


def frames(*brightness: int) -> list[np.ndarray]:
    return [np.full((16, 16, 3), value, np.uint8) for value in brightness]


def test_a_video_is_as_close_as_its_frames_are_on_average() -> None:
    full, other = [[np.asarray(picture(seed)) for seed in seeds] for seeds in ((0, 1, 2), (0, 4, 5))]
    each = [
        of_pictures(Image.fromarray(first), Image.fromarray(second)) for first, second in zip(full, other, strict=True)
    ]
    found = likeness(full, other)
    assert found.ssim == pytest.approx(np.mean([one.ssim for one in each]))
    assert found.psnr_db == pytest.approx(np.mean([one.psnr_db for one in each]))
    assert found.ssim < 0.5
    assert likeness(full, full).ssim == pytest.approx(1)


def test_motion_is_the_change_from_frame_to_frame_beside_that_of_the_other_video() -> None:
    assert likeness(frames(100, 110, 90), frames(50, 55, 51)).motion == pytest.approx((5 + 4) / (10 + 20))
    assert likeness(frames(100, 110), frames(7, 7)).motion == 0
    assert likeness(frames(100, 100), frames(7, 9)).motion is None
    assert likeness(frames(100), frames(7)).motion is None


def test_a_summary_takes_each_video_as_one() -> None:
    found = summary([Likeness(0.9, 30.0, 1.2), Likeness(0.7, 20.0), Likeness(0.8, 25.0, 0.6)])
    assert (found.ssim, found.psnr_db, found.motion) == pytest.approx((0.8, 25, 0.9))
    assert found.ssim_interval == half_interval([0.9, 0.7, 0.8])
    assert summary([Likeness(0.9, 30.0)]).motion is None
