"""Tensors larger than the machine's memory, of which only the touched pages take any."""

from __future__ import annotations

import math
import mmap

import torch

# Linux's MAP_NORESERVE, which the mmap module names from Python 3.13 on: pages count when they are touched.
_MAP_NORESERVE = 0x4000


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of zeros in untouched memory: a page of it takes memory once it is written."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    # Pages of 2 MiB would take 500 times the memory for a row here and there.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
