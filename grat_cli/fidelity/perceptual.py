"""LPIPS (arXiv 1801.03924) by the lpips package, where it and its weights are here: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# AlexNet's own layers have nothing left to look at below this side.
SMALLEST_SIDE = 64
# Of torchvision's AlexNet, which the package takes its features from.
_WEIGHTS = "alexnet-owt-7be5be79.pth"


def obstacle() -> str | None:
    """Why there is no LPIPS here, or None where there is."""
    import importlib.util

    if importlib.util.find_spec("lpips") is None:
        return "the package lpips is not installed"
    import torch

    weights = Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS
    return None if weights.is_file() else f"its weights are missing: put torchvision's {_WEIGHTS} into {weights.parent}"


def lpips(first: np.ndarray, second: np.ndarray) -> float | None:
    """The perceptual distance of two pictures, 0 of equal ones; None where it cannot be computed.

    Args:
        first: uint8 `[H, W, 3]`.
        second: of the same size.
    """
    if min(first.shape[:2]) < SMALLEST_SIDE:
        return None
    distance = _distance()
    return None if distance is None else distance(first, second)


@cache
def _distance() -> Callable[[np.ndarray, np.ndarray], float] | None:
    if obstacle() is not None:
        return None
    import torch
    from lpips import LPIPS  # pyright: ignore[reportMissingImports]

    model = LPIPS(net="alex", verbose=False).eval()

    def distance(first: np.ndarray, second: np.ndarray) -> float:
        pictures = (torch.tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1 for picture in (first, second))
        with torch.no_grad():
            return float(model(*pictures))

    return distance
