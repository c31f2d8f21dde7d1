"""Pictures of a pattern in a terminal: what one group attends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from grat_kernels import Plan

if TYPE_CHECKING:
    from rich.text import Text

QUERY, EXACT, NOT_ATTENDED = "Q", "#", "."
_MOST_ROWS = 32
_GAP = "  "  # between frames of a video
_STYLES = {QUERY: "bold yellow", EXACT: "green", NOT_ATTENDED: "dim"}


def marks(plan: Plan) -> npt.NDArray[np.str_]:
    """One character per group of the grid: the query group in the middle, and how it attends the others."""
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
    """The pattern with a legend, scaled down to fit so many columns; of a video one picture per frame of groups."""
    from rich.text import Text

    frames = _frames(plan)
    # Two columns per group, because characters are about twice as tall as wide.
    factor = max(1, -(-frames.shape[1] // _MOST_ROWS), -(-2 * frames.shape[2] // columns))
    scaled = [_scaled_down(frame, factor) for frame in frames]
    abreast = max(1, (columns + len(_GAP)) // (2 * scaled[0].shape[1] + len(_GAP)))
    picture = Text()
    for first in range(0, len(scaled), abreast):
        beside = scaled[first : first + abreast]
        if first:
            picture.append("\n")
        for row in range(len(beside[0])):
            for number, frame in enumerate(beside):
                picture.append(_GAP if number else "")
                for character in frame[row]:
                    picture.append(f"{character} ", style=_STYLES.get(str(character), "blue"))
            picture.append("\n")
    legend = [f"{QUERY} query group", f"{EXACT} attended token by token"]
    legend += [f"{number} {words}" for number, words in enumerate(far_words(plan), start=1)]
    if (frames == NOT_ATTENDED).any():
        legend.append(f"{NOT_ATTENDED} not attended")
    if factor > 1:
        legend.append(f"each mark is {factor}x{factor} groups, the closest attention among them")
    if len(frames) > 1:
        legend.append("one picture per group of frames, in the order of time")
    picture.append("\n".join(legend))
    return picture


def far_words(plan: Plan) -> list[str]:
    """How the blocks of each far level are attended, such as `through means of 4x4 tokens`."""
    words = [f"through means of {_sizes_text(level.block)} tokens" for level in plan.pattern.far_levels]
    if plan.candidates is not None:
        # Those that there are to choose from may be fewer than are wanted.
        exact, fine, _ = plan.candidates.counts.max(0).tolist()
        within = _sizes_text(plan.candidates.choice.block)
        parts = [*([f"{exact} token by token"] if exact else []), *([f"{fine} by {within}"] if fine else [])]
        words[0] += f"; by content {' and '.join(parts) or 'none'} instead"
    return words


def _sizes_text(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _frames(plan: Plan) -> npt.NDArray[np.str_]:
    """The marks as frames of rows and columns; of an image one frame."""
    characters = marks(plan)
    return characters.reshape(-1, *characters.shape[-2:])


def _scaled_down(characters: npt.NDArray[np.str_], factor: int) -> npt.NDArray[np.str_]:
    """One character for `factor x factor` groups: the query group if it is among them, else the closest attention."""
    closeness = [QUERY, EXACT, *(str(level) for level in range(1, 10)), NOT_ATTENDED]
    rank = np.searchsorted(np.sort(closeness), characters)
    order = np.asarray([closeness.index(character) for character in np.sort(closeness)])[rank]
    padding = [(0, -extent % factor) for extent in order.shape]
    padded = np.pad(order, padding, constant_values=len(closeness) - 1)
    rows, columns = (extent // factor for extent in padded.shape)
    return np.asarray(closeness)[padded.reshape(rows, factor, columns, factor).min(axis=(1, 3))]
