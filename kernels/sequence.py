"""The joint sequence that attention runs over: image tokens in group order, text and the like around them, summaries.

This module is NumPy alone, as all that plans are made of, so that planning a run needs no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from grat_kernels.geometry import Cell, Grouping, IntArray

if TYPE_CHECKING:
    import torch

_keys = itertools.count(1)


@dataclass(frozen=True)
class Segments:
    """What a joint sequence holds besides its image tokens: runs of tokens that attend all and that all attend.

    Text is one of them; pictures to refer to, which a model appends to the image, may be others.

    Attributes:
        before: tokens of each run ahead of the image tokens, in order.
        after: tokens of each run behind the image tokens, in order.
        text: which run is text, counted over those before and then those after; a sample may use fewer of its tokens
            (`text_valid`). None where there is none.

    Raises:
        ValueError: if a length is negative, or the text is none of the runs.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    text: int | None = None

    def __post_init__(self) -> None:
        runs = (*self.before, *self.after)
        if min(runs, default=0) < 0:
            raise ValueError(f"lengths of runs cannot be negative: {runs}")
        if self.text is not None and not 0 <= self.text < len(runs):
            raise ValueError(f"text is run {self.text} of {len(runs)}, which are counted from 0")

    @classmethod
    def of_text(cls, length: int, first: bool) -> Segments:
        """Text alone, before or after the image tokens."""
        return cls((length,) if first else (), () if first else (length,), 0)

    @property
    def tokens(self) -> int:
        """Tokens of all runs."""
        return sum(self.before) + sum(self.after)


@dataclass(frozen=True)
class Summaries:
    """The blocks behind all summary rows, level by level, blocks in token order within a level.

    Attributes:
        blocks: block size of each level.
        starts: position of each block's first token in the joint sequence, `[rows]`.
        counts: tokens of each block, `[rows]`; a summary's score gets `+ log(count)`.
        offsets: first row of each level, and the number of rows last, `[levels + 1]`.
    """

    blocks: tuple[Cell, ...]
    starts: IntArray
    counts: IntArray
    offsets: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Number of summary rows over all levels."""
        return self.offsets[-1]

    def rows_of(self, level: int) -> slice:
        """Rows of a level, counted from 1."""
        return slice(self.offsets[level - 1], self.offsets[level])


class PlanTensors(NamedTuple):
    """Index tensors on one device: `order`, `inverse` `[image tokens]` int64; `log_counts` `[summary rows]` fp32."""

    order: torch.Tensor
    inverse: torch.Tensor
    log_counts: torch.Tensor


@dataclass(frozen=True, eq=False)
class JointSequence:
    """Image tokens in group order, what stands before and after them, and summaries: what plans are made over.

    Attributes:
        grouping: groups and token order of the image tokens, far blocks included.
        segments: text and other runs of tokens before and after the image tokens.
        summaries: the blocks of the far field.
        key: a number that names the plan in this process while it lives.
    """

    grouping: Grouping
    segments: Segments
    summaries: Summaries
    key: int = field(default_factory=lambda: next(_keys), kw_only=True)
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False, kw_only=True)

    @property
    def image_tokens(self) -> int:
        """Number of image tokens."""
        return self.grouping.grid.tokens

    @property
    def tokens(self) -> int:
        """Length of the joint sequence."""
        return self.image_tokens + self.segments.tokens

    @property
    def image_start(self) -> int:
        """Position of the first image token in the joint sequence."""
        return sum(self.segments.before)

    @property
    def image_stop(self) -> int:
        """Position after the last image token."""
        return self.image_start + self.image_tokens

    @property
    def text_len(self) -> int:
        """Text tokens of the joint sequence."""
        segments = self.segments
        return 0 if segments.text is None else (*segments.before, *segments.after)[segments.text]

    @property
    def text_first(self) -> bool:
        """Whether text comes before the image tokens (Flux) or after them (HunyuanVideo)."""
        return self.segments.text is not None and self.segments.text < len(self.segments.before)

    @property
    def text_start(self) -> int:
        """Position of the first text token in the joint sequence; 0 where there is none."""
        segments = self.segments
        if segments.text is None:
            return 0
        before = sum((*segments.before, *segments.after)[: segments.text])
        return before if self.text_first else self.image_tokens + before

    @property
    def order(self) -> IntArray:
        """`order[i]` is the raster index of the i-th image token in group order."""
        return self.grouping.order

    @property
    def inverse(self) -> IntArray:
        """`inverse[r]` is the position in group order of image token r."""
        return self.grouping.inverse

    def tensors(self, device: torch.device | str) -> PlanTensors:
        """Index tensors on a device, moved once."""
        import torch

        def build() -> PlanTensors:
            log_counts = torch.from_numpy(np.log(self.summaries.counts).astype(np.float32))
            order, inverse = torch.from_numpy(self.order), torch.from_numpy(self.inverse)
            return PlanTensors(*(tensor.to(device) for tensor in (order, inverse, log_counts)))

        return self.cached(("tensors", torch.device(device)), build)

    def cached(self, name: Hashable, build: Callable[[], Any]) -> Any:
        """The value kept under `name`, built on first use: backends keep their forms of the plan here."""
        if name not in self._cache:
            self._cache[name] = build()
        return self._cache[name]
