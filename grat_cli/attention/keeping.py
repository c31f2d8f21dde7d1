"""Where tensors are kept between steps: on their device as they are, there in 8 bits, or in main memory."""

from __future__ import annotations

from typing import Protocol

import torch

from grat_cli.presets.over_steps import Keep


class Kept(Protocol):
    """A tensor that is kept.

    Attributes:
        nbytes: that it takes.
    """

    nbytes: int

    def get(self) -> torch.Tensor:
        """It, on its device and in its dtype; it must not be changed."""
        ...

    def plus(self, slope: Kept | None, factor: float) -> torch.Tensor:
        """It, and a multiple of another; what is returned must not be changed."""
        ...

    def fetch(self) -> None:
        """Sets it out, to be there when it is asked for."""
        ...


def kept(keep: Keep, tensor: torch.Tensor, *, of_slope: bool = False, room: Kept | None = None) -> Kept:
    """Keeps a tensor.

    Args:
        keep: where; see `presets.over_steps.Carrying`.
        tensor: what, which nobody changes from now on.
        of_slope: whether it is a slope.
        room: one that is no longer needed, whose place may be taken.
    """
    return _OnDevice(tensor)


class _OnDevice:
    """As it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.nbytes = tensor.nbytes

    def get(self) -> torch.Tensor:
        return self._tensor

    def plus(self, slope: Kept | None, factor: float) -> torch.Tensor:
        return self._tensor if slope is None else torch.add(self._tensor, slope.get(), alpha=factor)

    def fetch(self) -> None:
        pass
