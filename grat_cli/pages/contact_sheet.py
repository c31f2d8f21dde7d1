"""Pictures side by side: one row per variant, one column per prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grat_cli.pages.html import plain

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

_GROUND, _INK, _SOFT = (255, 255, 255), (27, 31, 36), (87, 96, 106)
_SMALLEST_CELL = 112
_TITLE_LINES = 3


def draw(
    rows: list[tuple[str, list[Image]]],
    column_titles: list[str],
    captions: Sequence[Sequence[str | None]] | None = None,
    *,
    longest_side: int = 320,
) -> Image:
    """The contact sheet.

    Pictures are scaled down to fit their cells, never up. A row may have fewer pictures than there are titles.

    Args:
        rows: name and pictures of each variant, full attention first.
        column_titles: prompts; wrapped, and cut after three lines.
        captions: per row and picture, what stands below it, such as `SSIM 0.897`.
        longest_side: of a cell, in pixels.

    Raises:
        ValueError: if there is no picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not any(pictures for _, pictures in rows):
        raise ValueError("a contact sheet needs at least one picture")
    # 1. Sizes, as multiples of the text's, which grows with the cells.
    size = max(12, min(22, longest_side // 20))
    font, small = ImageFont.load_default(size), ImageFont.load_default(max(11, size - 2))
    line, gap, margin = round(1.35 * size), round(0.6 * size), round(1.5 * size)
    scaled = [(plain(name), [_fitting(picture, longest_side) for picture in pictures]) for name, pictures in rows]
    columns = max(len(column_titles), *(len(pictures) for _, pictures in scaled))
    every = [picture for _, pictures in scaled for picture in pictures]
    width = max(_SMALLEST_CELL, *(picture.width for picture in every))
    names = [_wrapped(name, font, 11 * size, 4) for name, _ in scaled]
    name_width = max(font.getlength(part) for parts in names for part in parts)
    titles = [_wrapped(plain(title), font, width, _TITLE_LINES) for title in column_titles]
    caption_height = line if captions and any(caption for row in captions for caption in row) else 0
    heights = [
        max([line * len(parts), *(picture.height for picture in pictures)])
        for parts, (_, pictures) in zip(names, scaled, strict=True)
    ]

    # 2. The sheet.
    left = margin + round(name_width) + 2 * gap
    top = margin + line * max(map(len, titles), default=0) + gap
    sheet = Image.new(
        "RGB",
        (
            left + columns * (width + gap) - gap + margin,
            top + sum(heights) + len(rows) * (caption_height + gap) + margin,
        ),
        _GROUND,
    )
    pen = ImageDraw.Draw(sheet)
    for column, parts in enumerate(titles):
        # Titles of fewer lines stand just above their pictures too.
        start = top - gap - line * len(parts)
        for number, part in enumerate(parts):
            pen.text((left + column * (width + gap), start + number * line), part, _INK, font)

    # 3. The rows.
    for index, ((_, pictures), parts, height) in enumerate(zip(scaled, names, heights, strict=True)):
        start = top + (height - line * len(parts)) // 2
        for number, part in enumerate(parts):
            pen.text((margin, start + number * line), part, _INK, font)
        for column, picture in enumerate(pictures):
            at = left + column * (width + gap)
            sheet.paste(picture, (at, top))
            if caption := _caption(captions, index, column):
                shown = _cut(plain(caption), small, width)
                pen.text((at, top + picture.height + line // 8), shown, _SOFT, small)
        top += height + caption_height + gap
    return sheet


def _fitting(picture: Image, longest_side: int) -> Image:
    """The picture on white, no larger than a cell."""
    from PIL import Image

    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (*_GROUND, 255))
        picture = Image.alpha_composite(ground, picture)
    picture = picture.convert("RGB")  # a copy where it changes nothing
    picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return picture


def _caption(captions: Sequence[Sequence[str | None]] | None, row: int, column: int) -> str | None:
    if captions is None or row >= len(captions) or column >= len(captions[row]):
        return None
    return captions[row][column]


def _wrapped(content: str, font: FreeTypeFont | ImageFont, width: float, most: int) -> list[str]:
    """The text in at most so many lines; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    words = content.split()
    while words and len(lines) < most:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        last = len(lines) == most - 1
        lines.append(_cut(" ".join(words if last else words[:taken]), font, width))
        words = words[taken:]
    return lines or [""]


def _cut(content: str, font: FreeTypeFont | ImageFont, width: float) -> str:
    if font.getlength(content) <= width:
        return content
    longest = bisect_right(range(1, len(content) + 1), width, key=lambda length: font.getlength(content[:length] + "…"))
    return content[:longest].rstrip() + "…"
