"""Pictures of a watched run: where single queries look, laid over the picture or over frames of the video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from grat_cli.fidelity.attend import Seen
from grat_cli.pages.contact_sheet import draw
from grat_kernels import Grid
from grat_kernels.geometry import cell_sizes

if TYPE_CHECKING:
    from PIL.Image import Image

# Stations of matplotlib's "inferno" (van der Walt and Smith, CC0), at equal distances: brighter is more, in grey too.
_COLOURS = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], float)
_MARK, _MARK_EDGE = (64, 224, 255), (0, 0, 0)
_DIMMED = 0.35
_FRAMES_SHOWN = 6
_SIDES = {"layers": 224, "heads": 160, "many heads": 112}
_MANY_HEADS = 8


@dataclass(frozen=True)
class Sheet:
    """Pictures of one query side by side.

    Attributes:
        name: of its file, without suffix.
        heading: what it shows.
        caption: how to read it.
        rows: name and pictures of each row.
        column_titles: of the columns.
        captions: below each picture.
    """

    name: str
    heading: str
    caption: str
    rows: list[tuple[str, list[Image]]]
    column_titles: list[str]
    captions: list[list[str]]
    longest_side: int

    def draw(self, most_rows: int | None = None, most_columns: int | None = None) -> Image:
        """The sheet, or so many of its rows and columns, evenly chosen."""
        rows = evenly(len(self.rows), most_rows)
        columns = evenly(len(self.column_titles), most_columns)
        return draw(
            [(self.rows[row][0], [self.rows[row][1][column] for column in columns]) for row in rows],
            [self.column_titles[column] for column in columns],
            [[self.captions[row][column] for column in columns] for row in rows],
            longest_side=self.longest_side,
        )


def evenly(count: int, most: int | None) -> list[int]:
    """Indices below `count`, at most so many, evenly spread, first and last included."""
    if most is None or count <= most:
        return list(range(count))
    if most == 1:
        return [0]
    return sorted({round(number * (count - 1) / (most - 1)) for number in range(most)})


def frames_of(seen: Seen, grid: Grid, frames_per_latent: int | None) -> list[Image]:
    """The picture of each frame of tokens; of a picture, the picture itself.

    Args:
        seen: the output.
        grid: image tokens.
        frames_per_latent: frames of the video that a frame of tokens after the first stands for; the middle one of
            them is taken. None for a picture.
    """
    from PIL import Image

    if frames_per_latent is None:
        return [Image.fromarray(seen.output[0])]
    places = [max(0, frames_per_latent * (frame - 1) + 1 + frames_per_latent // 2) for frame in range(grid.shape[0])]
    places[0] = 0
    return [Image.fromarray(seen.output[min(place, len(seen.output) - 1)]) for place in places]


def marked(picture: Image, grid: Grid, queries: Sequence[tuple[int, ...]], longest_side: int) -> Image:
    """The picture with the queries' tokens outlined and numbered from 1, no larger than a side."""
    from PIL import ImageDraw, ImageFont

    shown = _fitted(picture, longest_side)
    pen, font = ImageDraw.Draw(shown), ImageFont.load_default(max(12, longest_side // 22))
    for number, query in enumerate(queries, start=1):
        box = _outline(shown, grid, query)
        _mark(shown, box)
        pen.text((box[2] + 4, box[1] - 2), str(number), _MARK, font, stroke_width=2, stroke_fill=_MARK_EDGE)
    return shown


def top_of_scale(maps: np.ndarray, even: np.ndarray) -> float:
    """The brightest mass of some maps, in multiples of even attention: 10, 20, 50, 100 and so on.

    One cell in two hundred may lie above.

    Args:
        maps: mass on each cell, `[..., *cells]`.
        even: what it would be if all image tokens were attended alike, `[*cells]`.
    """
    wanted, size = float(np.quantile(maps / even, 0.995)), 10.0
    while True:
        for factor in (1, 2, 5):
            if factor * size >= wanted:
                return factor * size
        size *= 10


def overlay(
    picture: Image,
    mass: np.ndarray,
    even: np.ndarray,
    cell: tuple[int, ...],
    sides: tuple[int, ...],
    top: float,
    longest_side: int,
) -> Image:
    """A map over a picture: nothing where attention is at most even, brightest where it is `top` times as strong.

    Args:
        picture: what the tokens show.
        mass: on each cell, `[rows, columns]`.
        even: what it would be if all image tokens were attended alike, `[rows, columns]`.
        cell: rows and columns of tokens per cell.
        sides: rows and columns of tokens.
        top: see `top_of_scale`.
        longest_side: of the result, in pixels.
    """
    from PIL import Image

    shown = _fitted(picture, longest_side)
    strength = np.clip(np.log10(np.maximum(mass / even, 1e-9)) / np.log10(top), 0, 1)
    of_tokens = strength.repeat(cell[0], 0).repeat(cell[1], 1)[: sides[0], : sides[1]]
    layer = Image.fromarray(of_tokens.astype(np.float32)).resize(shown.size, Image.Resampling.NEAREST)
    alpha = np.asarray(layer)[..., None]
    stations = np.linspace(0, 1, len(_COLOURS))
    colour = np.stack([np.interp(alpha[..., 0], stations, _COLOURS[:, channel]) for channel in range(3)], -1)
    grey = np.asarray(shown.convert("L"), np.float32)[..., None]
    # Dark pictures are lifted, so that what the tokens show can be seen in any.
    grey *= _DIMMED * 255 / max(1.0, float(np.quantile(grey, 0.99)))
    grey = grey.clip(max=255 * _DIMMED)
    # Weak attention hardly covers the picture, strong attention nearly hides it.
    cover = 0.9 * np.sqrt(alpha)
    return Image.fromarray((grey * (1 - cover) + colour * cover).round().astype(np.uint8))


def sheets(seen: Seen, grid: Grid, frames: Sequence[Image], query: int, suffix: str = "") -> list[Sheet]:
    """Where one query looks: by layer and step (of videos by layer and frame), and by layer and head.

    Args:
        seen: the output.
        grid: image tokens.
        frames: of `frames_of`.
        query: its number, counted from 0.
        suffix: of the file names, where there are several outputs.
    """
    record, place = seen.queries, seen.queries.queries[query]
    even = _even_mass(grid, record.cell)
    sides = grid.shape[-2], grid.shape[-1]
    own = place[0] if grid.axes == 3 else 0
    even_frame, cell = even.reshape(-1, *even.shape[-2:])[0], record.cell[-2:]
    even_of_heads = _even_mass(Grid(sides), record.head_cell) * math.prod(sides) / grid.tokens
    top = top_of_scale(record.maps[query], even)
    top_of_heads = top_of_scale(record.head_maps[query], even_of_heads)

    def scale(top: float) -> str:
        return f"Brightness is attention over even attention, from 1 (dark) to {top:g} (bright), logarithmic."

    heads = record.head_maps.shape[2]
    side = _SIDES["heads" if heads <= _MANY_HEADS else "many heads"]
    # Large pictures are scaled down once, not for every map.
    small = [_fitted(frame, max(_SIDES.values())) for frame in frames]

    def drawn(mass: np.ndarray, frame: int) -> Image:
        return outlined(overlay(small[frame], mass, even_frame, cell, sides, top, _SIDES["layers"]), frame)

    def drawn_of_head(mass: np.ndarray) -> Image:
        return outlined(overlay(small[own], mass, even_of_heads, record.head_cell, sides, top_of_heads, side), own)

    def outlined(shown: Image, frame: int) -> Image:
        if frame == own:
            _mark(shown, _outline(shown, grid, place))
        return shown

    names = [f"layer {layer}" for layer in range(record.maps.shape[2])]
    if grid.axes == 2:
        pictures = [[drawn(mass, 0) for mass in of_layer] for of_layer in record.maps[query].swapaxes(0, 1)]
        by_layer = Sheet(
            f"query-{query + 1}-layers{suffix}",
            "by layer and step",
            f"Mean over heads. {scale(top)}",
            list(zip(names, pictures, strict=True)),
            [f"step {step}" for step in record.steps],
            [[f"text {share:.0%}" for share in of_layer] for of_layer in record.text[query].T],
            _SIDES["layers"],
        )
    else:
        chosen = sorted({*evenly(grid.shape[0], _FRAMES_SHOWN), own})
        maps = record.maps[query].mean(0)  # [L, *cells]
        by_layer = Sheet(
            f"query-{query + 1}-layers{suffix}",
            "by layer and frame",
            "Mean over heads and recorded steps; frames are those of tokens, each with its share of attention. "
            + scale(top),
            [
                (name, [drawn(of_layer[frame], frame) for frame in chosen])
                for name, of_layer in zip(names, maps, strict=True)
            ],
            [f"frame {frame}{' (its own)' if frame == own else ''}" for frame in chosen],
            [[f"{of_layer[frame].sum():.0%}" for frame in chosen] for of_layer in maps],
            _SIDES["layers"],
        )
    by_head = Sheet(
        f"query-{query + 1}-heads{suffix}",
        "by layer and head",
        f"Mean over the recorded steps{', in its own frame' if grid.axes == 3 else ''}. {scale(top_of_heads)}",
        [
            (name, [drawn_of_head(mass) for mass in of_layer])
            for name, of_layer in zip(names, record.head_maps[query], strict=True)
        ],
        [f"head {head}" for head in range(heads)],
        [[f"text {share:.0%}" for share in of_layer] for of_layer in record.head_text[query]],
        side,
    )
    return [by_layer, by_head]


def _even_mass(grid: Grid, cell: tuple[int, ...]) -> np.ndarray:
    """Mass on each cell if all image tokens were attended alike, and no text, `[*cells]`."""
    counts = tuple(-(-extent // size) for extent, size in zip(grid.shape, cell, strict=True))
    return cell_sizes(grid, cell).reshape(counts) / grid.tokens


def _fitted(picture: Image, longest_side: int) -> Image:
    """A copy, scaled to a longest side; up only by whole factors, so that pixels stay square."""
    from PIL import Image

    shown = picture.convert("RGB").copy()
    longest = max(shown.size)
    if longest > longest_side:
        shown.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    elif (factor := longest_side // longest) > 1:
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    return shown


def _outline(picture: Image, grid: Grid, query: Sequence[int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a query's token in a picture, 7 pixels wide at least."""
    row, column = query[-2], query[-1]
    high, wide = picture.height / grid.shape[-2], picture.width / grid.shape[-1]
    half_high, half_wide = max(3.0, high / 2), max(3.0, wide / 2)
    middle = (column + 0.5) * wide, (row + 0.5) * high
    return (
        round(middle[0] - half_wide),
        round(middle[1] - half_high),
        round(middle[0] + half_wide),
        round(middle[1] + half_high),
    )


def _mark(picture: Image, box: tuple[int, int, int, int]) -> None:
    from PIL import ImageDraw

    pen = ImageDraw.Draw(picture)
    left, top, right, bottom = box
    pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline=_MARK_EDGE)
    pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_MARK)
