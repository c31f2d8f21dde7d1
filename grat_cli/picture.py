"""Pictures of a pattern: what one group attends, as text or as an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from grat_kernels import Plan

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.text import Text

QUERY, EXACT, NOT_ATTENDED = "Q", "#", "."
_MOST_ROWS = 32
_STYLES = {QUERY: "bold yellow", EXACT: "green", NOT_ATTENDED: "dim"}
_COLOURS = {QUERY: (242, 163, 38), EXACT: (32, 106, 93), NOT_ATTENDED: (236, 236, 232)}
_FAR_COLOURS = ((120, 178, 164), (174, 209, 200), (208, 227, 221))


def marks(plan: Plan) -> npt.NDArray[np.str_]:
    """One character per group of a two-axis grid: the query group in the middle, and how it attends the others."""
    grouping = plan.grouping
    query = np.asarray([[count // 2 for count in grouping.counts]], np.int64)
    levels = plan.pattern.levels(query, grouping.coordinates, grouping.counts)[0].reshape(grouping.counts)
    characters = np.full(levels.shape, NOT_ATTENDED)
    characters[levels == 0] = EXACT
    for level in range(1, len(plan.summaries.offsets)):
        characters[levels == level] = str(level)
    characters[tuple(query[0])] = QUERY
    return characters


def text_picture(plan: Plan, columns: int) -> Text:
    """The pattern with a legend, scaled down to fit so many columns."""
    from rich.text import Text

    characters = marks(plan)
    # Two columns per group, because characters are about twice as tall as wide.
    factor = max(1, -(-characters.shape[0] // _MOST_ROWS), -(-2 * characters.shape[1] // columns))
    picture = Text()
    for row in _scaled_down(characters, factor):
        for character in row:
            picture.append(f"{character} ", style=_STYLES.get(str(character), "blue"))
        picture.append("\n")
    legend = [f"{QUERY} query group", f"{EXACT} attended token by token"]
    for number, level in enumerate(plan.pattern.far_levels, start=1):
        legend.append(f"{number} through means of {'x'.join(map(str, level.block))} tokens")
    if (characters == NOT_ATTENDED).any():
        legend.append(f"{NOT_ATTENDED} not attended")
    if factor > 1:
        legend.append(f"each mark is {factor}x{factor} groups, the closest attention among them")
    picture.append("\n".join(legend))
    return picture


def image_picture(plan: Plan) -> Image:
    """The pattern as an image, one square per group."""
    from PIL import Image

    characters = marks(plan)
    side = max(4, min(32, 1024 // max(characters.shape)))
    cells = np.empty((*characters.shape, 3), np.uint8)
    for character in np.unique(characters):
        far = str(character).isdigit()
        colour = _FAR_COLOURS[min(int(character), len(_FAR_COLOURS)) - 1] if far else _COLOURS[str(character)]
        cells[characters == character] = colour
    pixels = cells.repeat(side, axis=0).repeat(side, axis=1)
    pixels[::side], pixels[:, ::side] = 255, 255  # thin lines between the groups
    return Image.fromarray(pixels)


def _scaled_down(characters: npt.NDArray[np.str_], factor: int) -> npt.NDArray[np.str_]:
    """One character for `factor x factor` groups: the query group if it is among them, else the closest attention."""
    closeness = [QUERY, EXACT, *(str(level) for level in range(1, 10)), NOT_ATTENDED]
    rank = np.searchsorted(np.sort(closeness), characters)
    order = np.asarray([closeness.index(character) for character in np.sort(closeness)])[rank]
    padding = [(0, -extent % factor) for extent in order.shape]
    padded = np.pad(order, padding, constant_values=len(closeness) - 1)
    rows, columns = (extent // factor for extent in padded.shape)
    return np.asarray(closeness)[padded.reshape(rows, factor, columns, factor).min(axis=(1, 3))]
