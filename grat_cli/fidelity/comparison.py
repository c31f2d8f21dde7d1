"""Pictures and videos that exist, compared one by one: files with files, or folders with folders of the same names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grat_cli.errors import BadInput
from grat_cli.fidelity.quality import Likeness, likeness
from grat_cli.files import pictures, videos
from grat_cli.files.outputs import FIRST_FRAME
from grat_cli.files.pictures import read_picture
from grat_cli.files.videos import read_frames

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_VIDEO_SUFFIXES = tuple(filter(None, videos.SUFFIXES.values()))
FRAMES_SHOWN = 4
# Differences are shown so many times as large, or those that matter could not be seen.
AMPLIFIED = 4


@dataclass(frozen=True)
class Pair:
    """Two files to compare.

    Attributes:
        name: what both are called, or the first one's name.
        first: the reference.
        second: compared with it.
    """

    name: str
    first: Path
    second: Path


@dataclass(frozen=True)
class Compared:
    """A pair, how alike its members are, and what can be shown of them.

    Attributes:
        pair: what was compared.
        likeness: of the second to the first.
        frames: of each; 1 for pictures.
        shown: pictures of the first, of the second, and of their amplified difference: one for pictures, some evenly
            spread frames for videos.
    """

    pair: Pair
    likeness: Likeness
    frames: int
    shown: tuple[list[Image.Image], list[Image.Image], list[Image.Image]]


def pairs_of(first: Path, second: Path) -> tuple[list[Pair], list[str]]:
    """What there is to compare.

    Args:
        first: a picture, a video, a folder of frames, or a folder of pictures and videos.
        second: likewise.

    Returns:
        The pairs by name, and the names that only one folder has.

    Raises:
        BadInput: if one is missing, one is a folder and the other is not, or the folders have no name in common.
    """
    for path in (first, second):
        if not path.exists():
            raise BadInput(f"cannot compare {path}: no such file")
    if _is_one(first) and _is_one(second):
        return [Pair(first.name, first, second)], []
    if _is_one(first) or _is_one(second):
        raise BadInput(f"{first} and {second} cannot be compared: give two files, or two folders")
    ours, theirs = (
        {entry.name: entry for entry in sorted(folder.iterdir()) if _is_one(entry)} for folder in (first, second)
    )
    common = [name for name in ours if name in theirs]
    if not common:
        raise BadInput(
            f"{first} and {second} have no picture or video of the same name: name them alike, or compare two files"
        )
    return [Pair(name, ours[name], theirs[name]) for name in common], sorted(ours.keys() ^ theirs.keys())


def _is_one(path: Path) -> bool:
    """Whether a path is one picture or video, and not a folder of them."""
    if path.is_dir():
        return (path / FIRST_FRAME).is_file()
    return path.suffix.lower() in pictures.SUFFIXES + _VIDEO_SUFFIXES


def compare_pair(pair: Pair) -> Compared:
    """How alike two pictures or two videos are.

    Raises:
        BadInput: if one cannot be read, or they differ in size or number of frames.
    """
    first, second = (list(_frames(path)) for path in (pair.first, pair.second))
    sizes = [f"{frames[0].shape[1]}x{frames[0].shape[0]}" for frames in (first, second)]
    if sizes[0] != sizes[1]:
        raise BadInput(f"{pair.first} is {sizes[0]} and {pair.second} is {sizes[1]}: sizes must agree to be compared")
    if len(first) != len(second):
        raise BadInput(
            f"{pair.first} has {len(first)} frames and {pair.second} has {len(second)}: compare as many of each"
        )
    return Compared(pair, likeness(first, second), len(first), _shown(first, second))


def _frames(path: Path) -> Iterator[np.ndarray]:
    if path.is_dir() or path.suffix.lower() in _VIDEO_SUFFIXES:
        yield from read_frames(path)
        return
    import numpy as np

    yield np.asarray(read_picture(path))


def _shown(
    first: list[np.ndarray], second: list[np.ndarray]
) -> tuple[list[Image.Image], list[Image.Image], list[Image.Image]]:
    import numpy as np
    from PIL import Image

    count = min(FRAMES_SHOWN, len(first))
    places = [round(number * (len(first) - 1) / max(1, count - 1)) for number in range(count)]
    differences = [
        np.abs(first[place].astype(np.int16) - second[place]).max(2).clip(max=255 // AMPLIFIED) * AMPLIFIED
        for place in places
    ]
    return (
        [Image.fromarray(first[place]) for place in places],
        [Image.fromarray(second[place]) for place in places],
        [Image.fromarray(difference.astype(np.uint8), "L") for difference in differences],
    )
