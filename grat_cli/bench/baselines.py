"""The baselines that are windows around each token: neighbourhood attention (`na`) and CLEAR (`clear`).

`na` runs on NATTEN where that is installed, else on FlexAttention, else on torch by tiles of queries; `clear` on
FlexAttention or torch. None of them makes an N×N mask. Text attends everything and is attended by everything.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from grat_cli.bench.dense import Attention
from grat_cli.bench.measure import guarded
from grat_cli.fidelity.variants import Variant, na_starts, size_text
from grat_kernels import Grid, Grouping

# Queries per tile of the torch fallback: larger tiles compute more pairs that are masked, smaller ones have more
# overhead per call.
_TILES: Mapping[int, tuple[int, ...]] = {1: (256,), 2: (16, 16), 3: (4, 8, 8)}
# Tokens of a block of FlexAttention, laid out as a tile of the grid so that few blocks overlap a window.
_FLEX_BLOCK = 128
_FLEX_TILES: Mapping[int, tuple[int, ...]] = {1: (128,), 2: (8, 16), 3: (2, 8, 8)}


@dataclass(frozen=True)
class Window:
    """Which image tokens attend which, on one grid, and where the text lies.

    Attributes:
        kind: `na`: `size[i]` tokens along axis i, centred, shifted inward at borders (as NATTEN does). `clear`: tokens
            nearer than `size[0]`.
        grid: image tokens.
        size: of the window.
        text_len: text tokens.
        text_first: whether they come before the image tokens.
    """

    kind: str
    grid: Grid
    size: tuple[int, ...]
    text_len: int
    text_first: bool

    @classmethod
    def of(cls, variant: Variant, text_len: int, text_first: bool) -> Window:
        """The window of a `na` or `clear` variant."""
        assert variant.window is not None
        return cls(variant.kind, variant.grid, variant.window, text_len, text_first)

    @property
    def tokens(self) -> int:
        """Length of the joint sequence."""
        return self.grid.tokens + self.text_len

    @property
    def image(self) -> slice:
        """Positions of the image tokens in the joint sequence."""
        start = self.text_len if self.text_first else 0
        return slice(start, start + self.grid.tokens)

    @property
    def text(self) -> slice:
        """Positions of the text tokens."""
        start = 0 if self.text_first else self.grid.tokens
        return slice(start, start + self.text_len)

    def axis_costs(self, axis: int, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Costs along an axis, `[Q, K]`: a pair is attended where they sum to less than `limit` over the axes."""
        if self.kind == "clear":
            return (queries[:, None] - keys[None, :]) ** 2
        first = na_starts(self.grid.shape[axis], self.size[axis])[queries][:, None]
        return np.where((keys >= first) & (keys < first + self.size[axis]), 0, self.limit)

    @property
    def limit(self) -> int:
        """See `axis_costs`."""
        return self.size[0] ** 2 if self.kind == "clear" else 1

    def key_range(self, axis: int, first: int, last: int) -> tuple[int, int]:
        """First key and the one after the last that queries first..last attend along an axis."""
        extent = self.grid.shape[axis]
        if self.kind == "clear":
            return max(0, first - self.size[0] + 1), min(extent, last + self.size[0])
        starts = na_starts(extent, self.size[axis])
        return int(starts[first]), int(starts[last]) + self.size[axis]

    def attended_by(self, raster_index: int) -> np.ndarray:
        """Image tokens that an image token attends, `grid.shape` bool, both in raster order."""
        costs = np.zeros((), np.int64)
        for axis, coordinate in enumerate(np.unravel_index(raster_index, self.grid.shape)):
            of_axis = self.axis_costs(axis, np.asarray([coordinate]), np.arange(self.grid.shape[axis]))[0]
            costs = np.add.outer(costs, of_axis)
        return costs < self.limit


@dataclass(frozen=True)
class Baseline:
    """A window, ready to run.

    Attributes:
        kernel: what computes it.
        attention: runs it on query, key and value `[B, N, H, D]`.
        grouping: in whose order `attention` takes the image tokens; None for raster order.
        executed_pairs: query-key pairs that are computed, masked ones included.
    """

    kernel: str
    attention: Attention
    grouping: Grouping | None
    executed_pairs: int

    @property
    def order(self) -> np.ndarray | None:
        """Raster index of each image token in that order; None for raster order."""
        return None if self.grouping is None else self.grouping.order


def baseline_for(window: Window, device: torch.device, dtype: torch.dtype, head_dim: int) -> Baseline:
    """The best that this machine has for a window: NATTEN, FlexAttention or torch, in this order."""
    if window.kind == "na" and natten_obstacle(window, device) is None:
        return natten_baseline(window)
    if device.type == "cuda" and head_dim >= 16:
        return flex_baseline(window, device)
    return torch_baseline(window, device, dtype)


def mask_row(window: Window, order: np.ndarray | None, position: int) -> torch.Tensor | None:
    """What the query at a position attends, `[N]` bool in the order of the sequence; None for everything."""
    if window.text.start <= position < window.text.stop:
        return None
    index = position - window.image.start
    attended = window.attended_by(index if order is None else int(order[index])).reshape(-1)
    row = torch.ones(window.tokens, dtype=torch.bool)
    row[window.image] = torch.from_numpy(attended if order is None else attended[order])
    return row


# NATTEN


def natten_obstacle(window: Window, device: torch.device) -> str | None:
    """Why NATTEN cannot compute a neighbourhood here, or None."""
    if importlib.util.find_spec("natten") is None:
        return "the package natten is not installed"
    if device.type != "cuda":
        return f"NATTEN's kernels are for CUDA devices, not {device.type}"
    if window.grid.axes > 3:
        return f"NATTEN takes up to three axes, not {window.grid.axes}"
    return None


def natten_baseline(window: Window, stride: tuple[int, ...] | None = None) -> Baseline:
    """Neighbourhood attention by NATTEN 0.21 or newer, text by its additional keys; text queries by torch.

    Args:
        stride: queries per axis that share a window (generalised neighbourhood attention); None for 1.
    """

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        import natten  # pyright: ignore[reportMissingImports]

        grid_shape = window.grid.shape
        image = (tensor[:, window.image].unflatten(1, grid_shape) for tensor in (query, key, value))
        text = (
            {"additional_keys": key[:, window.text], "additional_values": value[:, window.text]}
            if window.text_len
            else {}
        )
        run = guarded(
            "NATTEN",
            lambda: getattr(natten, f"na{window.grid.axes}d")(
                *image, kernel_size=window.size, stride=stride or 1, **text
            ),
        )
        attended = run()
        return _with_text_queries(window, attended.flatten(1, window.grid.axes), query, key, value)

    return Baseline("NATTEN", attention, None, window.tokens * math.prod(window.size))


def _with_text_queries(
    window: Window, image_output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The output of the whole sequence, from that of the image tokens."""
    if not window.text_len:
        return image_output
    output = torch.empty_like(query)
    output[:, window.image] = image_output
    output[:, window.text] = _attend(query[:, window.text], key, value)
    return output


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of `[B, Q, H, D]` to `[B, K, H, D]`, with what is added to the scores, `[Q, K]`."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


# torch, by tiles


def torch_baseline(window: Window, device: torch.device, dtype: torch.dtype) -> Baseline:
    """Tile after tile of queries over the box of keys around it, with a mask for what lies outside of each window.

    Tiles at the same distance from the borders share a mask; there are a few masks for each axis.
    """
    grid = window.grid
    masks: dict[object, torch.Tensor] = {}
    # Per axis: slices of queries and of keys, and the costs of their pairs.
    axes = []
    for axis, extent in enumerate(grid.shape):
        pieces = []
        for start in range(0, extent, _TILES[grid.axes][axis]):
            stop = min(start + _TILES[grid.axes][axis], extent)
            low, high = window.key_range(axis, start, stop - 1)
            costs = window.axis_costs(axis, np.arange(start, stop), np.arange(low, high))
            pieces.append((slice(start, stop), slice(low, high), costs))
        axes.append(pieces)
    tiles = []
    for pieces in itertools.product(*axes):
        queries, keys, costs = zip(*pieces, strict=True)
        name = tuple((part.shape, part.tobytes()) for part in costs)
        if name not in masks:
            masks[name] = _tile_mask(costs, window, device, dtype)
        tiles.append((queries, keys, masks[name]))
    executed = sum(mask.numel() for *_, mask in tiles) + window.text_len * window.tokens

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        image_output = output[:, window.image].unflatten(1, grid.shape)
        image_query, image_key, image_value = (
            tensor[:, window.image].unflatten(1, grid.shape) for tensor in (query, key, value)
        )
        text_key, text_value = key[:, window.text], value[:, window.text]
        every: tuple[slice, ...] = (slice(None),)
        for queries, keys, mask in tiles:
            tile = image_query[every + queries]
            tile_key = torch.cat([text_key, image_key[every + keys].flatten(1, grid.axes)], dim=1)
            tile_value = torch.cat([text_value, image_value[every + keys].flatten(1, grid.axes)], dim=1)
            attended = _attend(tile.flatten(1, grid.axes), tile_key, tile_value, mask)
            image_output[every + queries] = attended.unflatten(1, tile.shape[1:-2])
        if window.text_len:
            output[:, window.text] = _attend(query[:, window.text], key, value)
        return output

    tile = size_text(_TILES[grid.axes])
    return Baseline(f"torch SDPA, tiles of {tile}", attention, None, executed)


def _tile_mask(costs: tuple[np.ndarray, ...], window: Window, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of a tile, `[queries, text + keys]`: 0 where attended, -inf elsewhere."""
    total = np.zeros((), np.int64)
    for of_axis in costs:
        total = np.add.outer(total, of_axis)
    # Axes are (query, key, query, key, ...): all queries first.
    total = total.transpose([*range(0, total.ndim, 2), *range(1, total.ndim, 2)])
    queries = math.prod(total.shape[: len(costs)])
    attended = (total < window.limit).reshape(queries, -1)
    mask = torch.zeros(queries, window.text_len + attended.shape[1], dtype=dtype)
    mask[:, window.text_len :].masked_fill_(torch.from_numpy(~attended), -math.inf)
    return mask.to(device)


# FlexAttention


def flex_baseline(window: Window, device: torch.device) -> Baseline:
    """FlexAttention over image tokens in tiles of 128, so that few blocks of 128x128 pairs overlap a window."""
    grouping = Grouping(window.grid, _FLEX_TILES[window.grid.axes])
    coordinates = np.stack(np.unravel_index(grouping.order, window.grid.shape), axis=1)
    partial, full = _flex_blocks(window, coordinates)
    executed = int(partial.sum() + full.sum()) * _FLEX_BLOCK**2
    block_mask = _flex_mask(window, coordinates, partial, full, device)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return _flex_attention(device.type)(*heads_first, block_mask=block_mask).transpose(1, 2)

    return Baseline("FlexAttention", attention, grouping, executed)


@lru_cache(maxsize=2)
def _flex_attention(device_type: str) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention


def _flex_blocks(window: Window, coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks that a mask must be applied to, and blocks that are attended whole, `[blocks, blocks]` bool each.

    From the box around each block's tokens: never too few blocks, and few too many, because a block is a tile.
    """
    blocks = -(-window.tokens // _FLEX_BLOCK)
    block_of_image = np.arange(window.image.start, window.image.stop) // _FLEX_BLOCK
    text_in_block = np.bincount(np.arange(window.text.start, window.text.stop) // _FLEX_BLOCK, minlength=blocks)
    has_image, has_text = np.bincount(block_of_image, minlength=blocks) > 0, text_in_block > 0
    nearest, farthest = np.zeros((blocks, blocks), np.int64), np.zeros((blocks, blocks), np.int64)
    for axis, extent in enumerate(window.grid.shape):
        low, high = np.full(blocks, extent), np.full(blocks, -1)
        np.minimum.at(low, block_of_image, coordinates[:, axis])
        np.maximum.at(high, block_of_image, coordinates[:, axis])
        low, high = np.where(has_image, low, 0), np.where(has_image, high, 0)
        if window.kind == "clear":
            gap = np.maximum(low[None] - high[:, None], low[:, None] - high[None])
            nearest += np.maximum(gap, 0) ** 2
            farthest += np.maximum(high[None] - low[:, None], high[:, None] - low[None]) ** 2
        else:
            starts = na_starts(extent, window.size[axis])
            first, last = starts[low][:, None], starts[high][:, None]
            outside = (high[None] < first) | (low[None] >= last + window.size[axis])
            inside = (low[None] >= last) & (high[None] < first + window.size[axis])
            nearest += outside * window.limit
            farthest += ~inside * window.limit
    some, whole = nearest < window.limit, farthest < window.limit
    only_text = has_text & ~has_image
    whole = (whole & ~has_text[:, None] & ~has_text[None]) | only_text[:, None] | only_text[None]
    some |= has_text[:, None] | has_text[None]
    return some & ~whole, whole


def _flex_mask(
    window: Window, coordinates: np.ndarray, partial: np.ndarray, full: np.ndarray, device: torch.device
) -> object:
    from torch.nn.attention.flex_attention import BlockMask

    padded = np.zeros((window.tokens, window.grid.axes), np.int32)
    padded[window.image] = coordinates
    is_text = np.zeros(window.tokens, np.bool_)
    is_text[window.text] = True
    text = torch.from_numpy(is_text).to(device)
    of_axis = [torch.from_numpy(padded[:, axis].copy()).to(device) for axis in range(window.grid.axes)]
    starts = [
        torch.from_numpy(na_starts(extent, size)[padded[:, axis]].astype(np.int32)).to(device)
        for axis, (extent, size) in enumerate(zip(window.grid.shape, window.size, strict=False))
        if window.kind == "na"
    ]

    def in_neighbourhood(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        inside = [
            (coordinate[key] >= start[query]) & (coordinate[key] < start[query] + size)
            for coordinate, start, size in zip(of_axis, starts, window.size, strict=True)
        ]
        return text[query] | text[key] | reduce(operator.and_, inside)

    def in_disc(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        squared = sum((coordinate[query] - coordinate[key]) ** 2 for coordinate in of_axis)
        return text[query] | text[key] | (squared < window.limit)

    def rows(selected: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        indices = np.argsort(~selected, axis=1, kind="stable").astype(np.int32)
        counts = selected.sum(1).astype(np.int32)
        return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(indices)[None, None].to(device)

    return BlockMask.from_kv_blocks(
        *rows(partial),
        *rows(full),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=in_disc if window.kind == "clear" else in_neighbourhood,
        seq_lengths=(window.tokens, window.tokens),
    )
