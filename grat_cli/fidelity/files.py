"""The files of a watched run: all in one folder, each written whole, the data last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grat_cli.families import Medium
from grat_cli.fidelity.attend import Attended, Seen
from grat_cli.fidelity.figures import as_data
from grat_cli.fidelity.overlays import frames_of, marked, sheets
from grat_cli.fidelity.page import Shown, as_html, plots
from grat_cli.files import outputs as media
from grat_cli.files.formats import SUFFIXES, write_output
from grat_cli.files.whole import write_whole
from grat_cli.pages.plots import alone

if TYPE_CHECKING:
    from grat_cli.generation.request import Request

DATA, PAGE = "attend.json", "index.html"
PLOTS = ("distance", "recall-by-step", "error-by-step", "recall-by-layer", "error-by-layer", "heads")
_SHEETS = ("layers", "heads")
_MARKED_SIDE = 720
_OUTPUTS: Mapping[Medium, tuple[str, str]] = {"image": ("picture", "png"), "video": ("video", "mp4")}
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
    attended: Attended,
    request: Request,
    folder: Path,
    command: str,
    created: datetime,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes everything, and returns what stands in the data file.

    Args:
        attended: the result.
        request: that it was made of.
        folder: that it goes to; made where it is missing.
        command: the command line as typed.
        created: when the run began.
        overwrite: whether files that are there may be replaced.

    Raises:
        CannotWrite: if a file cannot be written.
    """
    grid, video = request.grid, request.model.video
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
        write_output(
            seen.output,
            folder / name,
            _OUTPUTS[request.model.medium][1],
            fps=request.fps,
            provenance=provenance,
            overwrite=overwrite,
        )
        _write_maps(seen, folder / f"maps{suffix}.npz", overwrite)
        frames = frames_of(seen, grid, None if video is None else video.frames_per_latent)
        places = seen.queries.queries
        # Of a video the frame of the first query; all are marked where they stand in their own.
        own = places[0][0] if grid.axes == 3 else 0
        picture = marked(frames[own], grid, places, _MARKED_SIDE)
        media.write_png(picture, folder / f"queries{suffix}.png", None, overwrite=overwrite)
        of_queries = [sheets(seen, grid, frames, number, suffix) for number in range(len(places))]
        for sheet in (sheet for of_query in of_queries for sheet in of_query):
            media.write_png(sheet.draw(), folder / f"{sheet.name}.png", None, overwrite=overwrite)
        shown.append(Shown(seen.seed, picture, of_queries))
    for name, plot in drawn.items():
        media.write_text(alone(plot), folder / f"{name}.svg", overwrite=overwrite)
    media.write_text(as_html(attended, data, drawn, shown), folder / PAGE, overwrite=overwrite)
    media.write_json(data, folder / DATA, overwrite=overwrite)
    return data


def _suffix(seed: int, several: bool) -> str:
    return f"-s{seed}" if several else ""


def _output_name(medium: Medium, suffix: str) -> str:
    return f"{_OUTPUTS[medium][0]}{suffix}{SUFFIXES[_OUTPUTS[medium][1]]}"


def _write_maps(seen: Seen, path: Path, overwrite: bool) -> None:
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
    write_whole(path, lambda file: np.savez_compressed(file, **arrays), overwrite=overwrite)
