"""The time shift of a run: how much of its steps is spent at high noise.

Flux shifts its timesteps by the number of image tokens, along a line fitted between 256 and 4,096 tokens. Beyond, a
pipeline extrapolates it: at 8192x8192, mu is about 44, a factor e^44, and all steps but the last are spent in
pure noise. Here the line ends at the model's largest trained shift; a preset's own shift replaces it altogether.
Other pipelines hand their schedulers a shift of their own making, which ends likewise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grat_cli.errors import BadInput


@dataclass(frozen=True)
class GivenShift:
    """What a pipeline hands its scheduler in place of a point on that line.

    Attributes:
        mu: as it comes from the size of a picture.
        ended: the same, or where training ended.
    """

    mu: float
    ended: float


def shift_of(scheduler: Any, image_tokens: int, fixed: float | None, given: GivenShift | None = None) -> float:
    """The factor s in `sigma -> s·sigma / (1 + (s − 1)·sigma)` for a run.

    Args:
        scheduler: of diffusers, for models of flows.
        image_tokens: tokens of the picture.
        fixed: a preset's own shift, or None for the model's.
        given: of a pipeline that makes its own.
    """
    config = scheduler.config
    if fixed is not None:
        return fixed
    if not config.get("use_dynamic_shifting", False):
        return float(config.get(_key(scheduler) or "", 1.0))
    mu = given.ended if given else _mu(config, image_tokens)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _key(scheduler: Any) -> str | None:
    """What a scheduler calls its shift: solvers that were made for other models count in sigmas of flows on demand."""
    config = scheduler.config
    return "shift" if "shift" in config else "flow_shift" if config.get("use_flow_sigmas") else None


def _mu(config: Any, image_tokens: int) -> float:
    """diffusers' `calculate_shift`, on a line that ends where the model's training did."""
    fewest, most, low, high = _line(config)
    return low + (high - low) * (min(image_tokens, most) - fewest) / (most - fewest)


def _line(config: Any) -> tuple[int, int, float, float]:
    """Token counts at the line's ends, and mu there; defaults are those of diffusers' `calculate_shift`."""
    return (
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def extrapolation(scheduler: Any, image_tokens: int, given: GivenShift | None = None) -> str | None:
    """A warning where the pipeline's own shift lies far beyond the fitted line, else None."""
    config = scheduler.config
    fewest, most, low, high = _line(config)
    if given:
        mu, high, is_far = given.mu, round(given.ended, 2), given.mu >= 2 * given.ended
    else:
        mu = low + (high - low) * (image_tokens - fewest) / (most - fewest)
        is_far = low != high and image_tokens > 4 * most
    if not config.get("use_dynamic_shifting", False) or not is_far:
        return None
    return (
        f"at {image_tokens} image tokens the pipeline extrapolates its time shift to mu = {mu:.1f}, far beyond {high}, "
        "and spends nearly all steps in pure noise: `grat_cli.families.time_shift` ends the line where training did"
    )


@contextmanager
def time_shift(pipe: Any, image_tokens: int, fixed: float | None, given: GivenShift | None = None) -> Iterator[float]:
    """While inside, the pipeline's scheduler is a copy with the shift of `shift_of`, which is also what is yielded.

    Raises:
        BadInput: if it takes none, and one is fixed.
    """
    stock = pipe.scheduler
    shift = shift_of(stock, image_tokens, fixed, given)
    config = stock.config
    if fixed is not None or (given and given.ended < given.mu and config.get("use_dynamic_shifting", False)):
        if (key := _key(stock)) is None:
            raise BadInput(f"the model's {type(stock).__name__} takes no time shift: leave sampling.shift out")
        pipe.scheduler = type(stock).from_config(config, use_dynamic_shifting=False, **{key: shift})
    elif (
        not given and config.get("use_dynamic_shifting", False) and image_tokens > config.get("max_image_seq_len", 4096)
    ):
        # A level line: whatever the token count, the pipeline arrives at this mu.
        mu = _mu(config, image_tokens)
        pipe.scheduler = type(stock).from_config(config, base_shift=mu, max_shift=mu)
    try:
        yield shift
    finally:
        pipe.scheduler = stock
