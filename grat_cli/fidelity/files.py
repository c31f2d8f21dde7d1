"""The files of a watched run: all in one folder, each written whole, the data last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grat_cli.fidelity.attend import Attended, Seen
from grat_cli.fidelity.figures import as_data
from grat_cli.fidelity.overlays import frames_of, marked, sheets
from grat_cli.fidelity.page import Shown, as_html, plots
from grat_cli.files import outputs as media
from grat_cli.files.whole import write_whole
from grat_cli.models.catalogue import Medium
from grat_cli.pages.plots import alone

if TYPE_CHECKING:
    from grat_cli.generation.makers import PictureMaker, VideoMaker

DATA, PAGE = "attend.json", "index.html"
PLOTS = ("distance", "recall-by-step", "error-by-step", "recall-by-layer", "error-by-layer", "heads")
_SHEETS = ("layers", "heads")
_MARKED_SIDE = 720
# What the picture or video itself says of how it was made.
_PROVENANCE = ("schema", "created", "command", "prompt", "seeds", "preset", "model", "device", "versions")


def paths_in(folder: Path, medium: Medium, seeds: Sequence[int], queries: int) -> list[Path]:
    """All files that a run may write.

    Args:
        folder: of the run.
        medium: what it makes.
        seeds: one output each.
        queries: whose attention is drawn.
    """
    names = [DATA, PAGE, *(f"{name}.svg" for name in PLOTS)]
    for seed in seeds:
        suffix = _suffix(seed, len(seeds) > 1)
        names += [_output_name(medium, suffix), f"queries{suffix}.png", f"maps{suffix}.npz"]
        names += [f"query-{number + 1}-{kind}{suffix}.png" for number in range(queries) for kind in _SHEETS]
    return [folder / name for name in names]


def write(
    attended: Attended, maker: PictureMaker | VideoMaker, folder: Path, command: str, created: datetime
) -> dict[str, Any]:
    """Writes everything, and returns what stands in the data file.

    Args:
        attended: the result.
        maker: that made it.
        folder: that it goes to; made where it is missing.
        command: the command line as typed.
        created: when the run began.

    Raises:
        CannotWrite: if a file cannot be written.
    """
    request, grid = maker.request, maker.grid
    video = request.model.video
    several = len(attended.seen) > 1
    drawn = plots(attended, grid)
    outputs = [_output_name(request.model.medium, _suffix(seen.seed, several)) for seen in attended.seen]
    files = {
        "page": PAGE,
        "outputs": outputs,
        "plots": [f"{name}.svg" for name in drawn],
        "queries": [f"queries{_suffix(seen.seed, several)}.png" for seen in attended.seen],
        "maps": [f"maps{_suffix(seen.seed, several)}.npz" for seen in attended.seen],
    }
    data = as_data(attended, request, grid, command=command, created=created, files=files)
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for seen, name in zip(attended.seen, outputs, strict=True):
        suffix = _suffix(seen.seed, several)
        provenance = {key: data[key] for key in _PROVENANCE} | {"seed": seen.seed}
        _write_output(seen, folder / name, getattr(request, "fps", None), provenance)
        _write_maps(seen, folder / f"maps{suffix}.npz")
        frames = frames_of(seen, grid, None if video is None else video.frames_per_latent)
        places = seen.queries.queries
        # Of a video the frame of the first query; all are marked where they stand in their own.
        own = places[0][0] if grid.axes == 3 else 0
        picture = marked(frames[own], grid, places, _MARKED_SIDE)
        media.write_png(picture, folder / f"queries{suffix}.png", None)
        of_queries = [sheets(seen, grid, frames, number, suffix) for number in range(len(places))]
        for sheet in (sheet for of_query in of_queries for sheet in of_query):
            media.write_png(sheet.draw(), folder / f"{sheet.name}.png", None)
        shown.append(Shown(seen.seed, picture, of_queries))
    for name, plot in drawn.items():
        media.write_text(alone(plot), folder / f"{name}.svg")
    media.write_text(as_html(attended, data, drawn, shown), folder / PAGE)
    media.write_json(data, folder / DATA)
    return data


def _suffix(seed: int, several: bool) -> str:
    return f"-s{seed}" if several else ""


def _output_name(medium: Medium, suffix: str) -> str:
    return f"video{suffix}.mp4" if medium == "video" else f"picture{suffix}.png"


def _write_output(seen: Seen, path: Path, fps: int | None, provenance: Mapping[str, Any]) -> None:
    if isinstance(seen.output, list):
        from grat_cli.files.videos import write_video

        assert fps is not None, "videos have a rate"
        write_video(seen.output, path, fps=fps, provenance=provenance)
    else:
        media.write_png(seen.output, path, provenance)


def _write_maps(seen: Seen, path: Path) -> None:
    """The maps as NumPy keeps arrays; their names are those of `query_record.QueryRecord`."""
    record = seen.queries
    arrays = {
        "queries": np.array(record.queries),
        "steps": np.array(record.steps),
        "cell": np.array(record.cell),
        "head_cell": np.array(record.head_cell),
        "maps": record.maps,
        "text": record.text.astype(np.float32),
        "head_maps": record.head_maps,
        "head_text": record.head_text.astype(np.float32),
    }
    write_whole(path, lambda file: np.savez_compressed(file, **arrays))
