"""Attention over more tokens than a model was trained on: rotary positions, and the scale of scores.

Far positions turn low frequencies beyond every angle of training, so frequencies are lowered until the picture's side
spans what the trained side did. And softmax over more keys is flatter, so scores are scaled up with the logarithm of
the number of keys. Nothing here is used at the trained size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from grat_cli.attention.layer import Scaling
from grat_cli.presets import PositionsName
from grat_kernels import HeadPlan, Plan
from grat_kernels.analysis import tokens_behind

if TYPE_CHECKING:
    import torch

# YaRN's own bounds (arXiv 2309.00071, section 3.2), in turns over the trained length.
_FEWEST_TURNS, _MOST_TURNS = 1.0, 32.0
# DyPE's own (arXiv 2510.20766): at time t, 1 in pure noise, the exponent is 2·t².
_DYPE_SCALE, _DYPE_EXPONENT = 2.0, 2.0


@dataclass(frozen=True)
class Extrapolation:
    """What is fitted.

    Attributes:
        trained_grid: rows and columns of image tokens that the model was trained on.
        positions: `none`; or how rotary frequencies of an axis are lowered where it is longer than that, by the ratio:
            `ntk` the lowest by all of it, the highest not at all, others in between (the "NTK-aware" base of YaRN's
            section 3.1); `yarn` those with less than one turn over the trained length by all of it, the highest not at
            all, others in between ("NTK-by-parts", arXiv 2309.00071, section 3.2); `dype` as `ntk`, more than that in
            noise and ever less as the picture clears up (arXiv 2510.20766).
        proportional_attention: whether each query's scores are scaled by `query_scale`.
    """

    trained_grid: tuple[int, int]
    positions: PositionsName = "none"
    proportional_attention: bool = False

    def ratios(self, grid: tuple[int, int]) -> tuple[float, float]:
        """How much longer each axis is than the trained one; 1 where it is not longer."""
        rows, columns = (max(1.0, length / trained) for length, trained in zip(grid, self.trained_grid, strict=True))
        return rows, columns

    def moves(self, grid: tuple[int, int]) -> bool:
        """Whether positions on a grid differ from those of the stock model."""
        return self.positions != "none" and max(self.ratios(grid)) > 1


def frequencies(
    channels: int,
    theta: float,
    positions: PositionsName,
    trained: int,
    ratio: float,
    time: torch.Tensor | float,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rotary frequencies of one axis, `[channels / 2]`, in radians per token.

    YaRN's scaling of the softmax (its section 3.4) is left out: `query_scale` is there for that.

    Args:
        channels: of a head that turn with this axis.
        theta: base of the model's frequencies.
        positions: how they are fitted.
        trained: tokens along the axis in training.
        ratio: how many times longer the axis is now.
        time: of the step, from 1 in noise to 0; only `dype` asks.
        device: of the result.
        dtype: of the result; float64 by default.
    """
    import torch

    dtype = dtype or torch.float64
    exponents = torch.arange(0, channels, 2, dtype=dtype, device=device) / channels
    if positions == "yarn":
        plain = theta**-exponents
        turns = trained / (2 * math.pi) * plain
        # A picture's side has fewer turns than a long text: the highest frequency, one radian per token, stays.
        most = min(_MOST_TURNS, trained / (2 * math.pi))
        kept = ((turns - _FEWEST_TURNS) / max(most - _FEWEST_TURNS, 1e-6)).clamp(0, 1)
        return plain * (kept + (1 - kept) / ratio)
    # With this base the lowest frequency, of exponent 1 - 2/channels, is lowered by the ratio exactly.
    growth = ratio ** (channels / (channels - 2)) if positions != "none" and channels > 2 else 1.0
    if positions == "dype":
        time = torch.as_tensor(time, dtype=dtype, device=device)
        return (theta * growth ** (_DYPE_SCALE * time**_DYPE_EXPONENT)) ** -exponents
    return (theta * growth) ** -exponents


def query_scale(plan: Plan, trained_tokens: int) -> npt.NDArray[np.float64]:
    """Factors on the scores of each query, beside the usual 1/√D, `[N]`: √(log_L n) for n keys and a trained length L.

    Entropy of attention then stays about what it was in training (arXiv 2306.08645; per query as in CLEAR, arXiv
    2412.16112). A summary counts as the tokens that it stands for: log of their number is added to its score after
    the scaling, so that it weighs as much as that many equal keys whatever the scale is.

    Args:
        plan: what attends what.
        trained_tokens: image and text tokens that the model was trained on together.
    """
    of_list = np.sqrt(np.log(tokens_behind(plan)) / math.log(trained_tokens))
    factors = np.empty(plan.tokens)
    for run in plan.query_runs:
        factors[run.start : run.start + run.length] = of_list[run.span_list]
    return factors


def proportional_scaling(plan: Plan | HeadPlan, trained_image_tokens: int, device: torch.device) -> Scaling:
    """`query_scale` as a layer takes it, for a model trained on so many image tokens; made once a plan and device."""
    trained = trained_image_tokens + plan.segments.tokens

    def build() -> Scaling:
        import torch

        of_class = np.stack([query_scale(member, trained) for member in plan.classes], axis=1)
        factors = of_class[:, plan.class_of_head] if isinstance(plan, HeadPlan) else of_class
        if (factors == factors[0, 0]).all():
            return Scaling(float(factors[0, 0]))
        return Scaling(1.0, torch.from_numpy(factors).float().to(device)[:, :, None])

    return plan.cached(("scaling", trained, device), build)
