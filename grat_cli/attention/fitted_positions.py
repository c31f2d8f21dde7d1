"""Rotary positions fitted to a larger grid than a model was trained on, in place of its own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import maybe_adjust_dtype_for_device

from grat_cli.attention.extrapolation import Extrapolation, frequencies
from grat_kernels import Grid


class FittedPositions(torch.nn.Module):
    """Stands in for a transformer's `pos_embed` of three axes, of which the first is 0 for all tokens.

    Angles are worked out per row and per column, in float64 as in stock, and handed to the tokens; nothing waits for
    the device.
    """

    def __init__(self, stock: Any, extrapolation: Extrapolation, grid: Grid) -> None:
        """Prepares.

        Args:
            stock: the transformer's own, with its `theta` and `axes_dim`.
            extrapolation: how frequencies are fitted.
            grid: rows and columns of image tokens.
        """
        super().__init__()
        rows, columns = grid.shape
        self._stock, self._extrapolation, self._sides = stock, extrapolation, (rows, columns)
        self._made_for: tuple[Any, ...] = ()
        self._cosines = self._sines = torch.empty(0)

    def prepare(self, order: torch.Tensor, text_len: int, timestep: torch.Tensor, step: int) -> None:
        """Makes the tables of the image tokens for a call, unless the last ones serve.

        Args:
            order: raster index of each image token of the call, of those that this rank has, in its order.
            text_len: text tokens before them, whose rows are left open.
            timestep: of the call, `[B]`, from 1 in noise to 0; one for all.
            step: its number; positions that depend on time are made anew at each.
        """
        wanted = (order.data_ptr(), order.device, text_len, step if self._extrapolation.positions == "dype" else None)
        if self._made_for == wanted:
            return
        idle, *turning = self._stock.axes_dim
        unturned = torch.ones(len(order), idle, device=order.device)
        cosines, sines = [unturned], [torch.zeros_like(unturned)]
        dtype = maybe_adjust_dtype_for_device(torch.float64, order.device)
        places = order // self._sides[1], order % self._sides[1]
        ratios = self._extrapolation.ratios(self._sides)
        for axis, (channels, place) in enumerate(zip(turning, places, strict=True)):
            turns = frequencies(
                channels,
                self._stock.theta,
                self._extrapolation.positions if ratios[axis] > 1 else "none",
                self._extrapolation.trained_grid[axis],
                ratios[axis],
                timestep[0],
                device=order.device,
                dtype=dtype,
            )
            angles = torch.outer(torch.arange(self._sides[axis], dtype=dtype, device=order.device), turns)
            cosines.append(angles.cos().float().repeat_interleave(2, dim=1)[place])
            sines.append(angles.sin().float().repeat_interleave(2, dim=1)[place])
        text = torch.empty(text_len, sum(self._stock.axes_dim), device=order.device)
        self._cosines, self._sines = (torch.cat([text, torch.cat(parts, dim=1)]) for parts in (cosines, sines))
        self._made_for = wanted

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[text + image, D]` fp32 for positions `[text + image, 3]`, those of text as in stock."""
        text_len = self._made_for[2]
        # The tables are large, 1 GB at a million tokens: the rows of the text are filled in, the rest stays.
        self._cosines[:text_len], self._sines[:text_len] = self._stock(ids[:text_len])
        return self._cosines, self._sines
