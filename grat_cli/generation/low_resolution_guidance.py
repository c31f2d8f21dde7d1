"""Drawing a picture's low frequencies towards those of a smaller one while it is denoised.

After I-Max (arXiv 2410.07536), which guides a large picture by its projection to the size that the model knows: at each
step the clean latents that the model predicts are moved towards the upscaled earlier picture, in what a picture of the
trained size can hold and no more. Finer detail is the model's alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grat_cli.attention.clock import step_under_way

if TYPE_CHECKING:
    import torch

    from grat_cli.families import Family


@contextmanager
def low_resolution_guidance(
    family: Family, pipe: Any, reference: torch.Tensor, trained: tuple[int, int], weight: float
) -> Iterator[None]:
    """While inside, the pipeline's scheduler is told a velocity that leads towards `reference`.

    That is linear in the velocity, so it comes to the same before and after classifier-free guidance.

    Args:
        family: of the model.
        pipe: a pipeline of it, with the scheduler that it will run with.
        reference: latents `[1, C, h, w]` of the upscaled picture.
        trained: rows and columns of latents at the trained size.
        weight: 0 leaves the prediction alone, 1 replaces its low frequencies.
    """
    scheduler = pipe.scheduler
    stock_step = scheduler.step
    rows, columns = reference.shape[2:]
    scale = pipe.vae_scale_factor

    def step(velocity: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Indexed by a plain integer, so nothing waits for the device.
        sigma = scheduler.sigmas[(scheduler.begin_index or 0) + step_under_way(scheduler)]
        predicted = family.spatial(pipe, sample - sigma * velocity, columns * scale, rows * scale)
        missing = low_frequencies(reference.to(predicted) - predicted, trained)
        return stock_step(
            velocity - weight / sigma * family.as_called(pipe, missing), timestep, sample, *args, **kwargs
        )

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step  # the instance's; the class has the stock one


def low_frequencies(latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What remains of latents `[1, C, h, w]` after averaging down to `size` and back."""
    from torch.nn import functional

    small = functional.interpolate(latents.float(), size, mode="area")
    return functional.interpolate(small, latents.shape[2:], mode="bilinear").to(latents.dtype)
