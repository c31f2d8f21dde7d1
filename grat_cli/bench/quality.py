"""How close pictures come to others: SSIM and PSNR by scikit-image, with 95 % intervals over the pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grat_cli.bench.results import Quality

if TYPE_CHECKING:
    from PIL import Image


def compare(references: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> Quality:
    """Similarity of pictures to those of the same prompts and seeds, mean over the pairs.

    Of identical pictures the PSNR would be infinite: they count as if one value differed by one, the smallest
    difference that 8 bits can show (101 dB at 256x256), so that means stay numbers.

    Args:
        references: pictures of full attention.
        pictures: pictures of the same prompts and seeds, in the same order.
    """
    import numpy as np
    from skimage.metrics import mean_squared_error, structural_similarity

    similarities, ratios = [], []
    for reference, picture in zip(references, pictures, strict=True):
        first, second = np.asarray(reference.convert("RGB")), np.asarray(picture.convert("RGB"))
        similarities.append(float(np.asarray(structural_similarity(first, second, channel_axis=2))))
        error = max(float(mean_squared_error(first, second)), 1 / first.size)
        ratios.append(10 * math.log10(255**2 / error))
    return Quality(
        ssim=statistics.mean(similarities),
        ssim_interval=half_interval(similarities),
        psnr_db=statistics.mean(ratios),
        psnr_interval_db=half_interval(ratios),
    )


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean, by Student's t; None of a single value, which has none."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
