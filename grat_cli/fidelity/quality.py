"""How close pictures and videos come to others: SSIM and PSNR by scikit-image, LPIPS where it is; 95 % intervals."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grat_cli.fidelity.perceptual import lpips

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


@dataclass(frozen=True)
class Quality:
    """Similarity of pictures or videos to those of full attention with the same seeds: mean and 95 % half-interval.

    At the level of high resolution it is that of scaled-down pictures to those of the trained size.

    A single one has no interval: there it is None. Figures of a video are means over its frames; `motion` is how much
    successive frames differ, over how much those of full attention do, and None for pictures; `lpips` is None where its
    weights are not here.
    """

    ssim: float
    ssim_interval: float | None
    psnr_db: float
    psnr_interval_db: float | None
    motion: float | None = None
    lpips: float | None = None


@dataclass(frozen=True)
class Likeness:
    """How close one picture or video comes to that of full attention.

    Attributes:
        ssim: 1 for an equal one; of a video the mean over its frames.
        psnr_db: likewise.
        motion: mean absolute difference of successive frames over that of the other video; None for pictures, and
            where the other does not move.
        lpips: perceptual distance (arXiv 1801.03924), 0 for an equal one; None where its weights are not here.
    """

    ssim: float
    psnr_db: float
    motion: float | None = None
    lpips: float | None = None


def compare(references: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> Quality:
    """Similarity of pictures to those of the same prompts and seeds, mean over the pairs.

    Args:
        references: pictures of full attention.
        pictures: pictures of the same prompts and seeds, in the same order.
    """
    import numpy as np

    pairs = [[[np.asarray(one.convert("RGB"))] for one in pair] for pair in zip(references, pictures, strict=True)]
    return summary([likeness(*pair) for pair in pairs])


def likeness(reference: Sequence[np.ndarray], output: Sequence[np.ndarray]) -> Likeness:
    """How close a picture or video comes to another, frame by frame.

    Args:
        reference: frames of the output of full attention, uint8 `[H, W, 3]`; of a picture one.
        output: as many frames of the same size.
    """
    frames = [_likeness(first, second) for first, second in zip(reference, output, strict=True)]
    movement = _movement(reference)
    return Likeness(
        ssim=statistics.mean(frame.ssim for frame in frames),
        psnr_db=statistics.mean(frame.psnr_db for frame in frames),
        motion=_movement(output) / movement if movement else None,
        lpips=mean_of_known([frame.lpips for frame in frames]),
    )


def summary(found: Sequence[Likeness]) -> Quality:
    """The mean over pictures or videos, with 95 % intervals."""
    similarities, ratios = [one.ssim for one in found], [one.psnr_db for one in found]
    return Quality(
        ssim=statistics.mean(similarities),
        ssim_interval=half_interval(similarities),
        psnr_db=statistics.mean(ratios),
        psnr_interval_db=half_interval(ratios),
        motion=mean_of_known([one.motion for one in found]),
        lpips=mean_of_known([one.lpips for one in found]),
    )


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean, by Student's t; None of a single value, which has none."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _likeness(first: np.ndarray, second: np.ndarray) -> Likeness:
    """How close pictures uint8 `[H, W, 3]` come.

    Of identical pictures the PSNR would be infinite: they count as if one value differed by one, the smallest
    difference that 8 bits can show (101 dB at 256x256), so that means stay numbers.
    """
    import numpy as np
    from skimage.metrics import mean_squared_error, structural_similarity

    similarity = float(np.asarray(structural_similarity(first, second, channel_axis=2)))
    error = max(float(mean_squared_error(first, second)), 1 / first.size)
    return Likeness(similarity, 10 * math.log10(255**2 / error), lpips=lpips(first, second))


def _movement(frames: Sequence[np.ndarray]) -> float:
    """Mean absolute difference of successive frames; 0 of a single one."""
    import numpy as np

    changes = [float(np.abs(after.astype(np.int16) - before).mean()) for before, after in itertools.pairwise(frames)]
    return statistics.mean(changes) if changes else 0.0
