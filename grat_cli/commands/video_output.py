"""What the commands of videos have in common: where videos may go, making them one by one, and telling of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.console.output import Output, bytes_text
from grat_cli.errors import BadInput
from grat_cli.files import outputs as media
from grat_cli.files.whole import claimed
from grat_cli.generation import report
from grat_cli.generation.video_request import VideoRequest
from grat_cli.generation.video_run import VideoRun

if TYPE_CHECKING:
    from grat_cli.generation.video_decoding import MadeVideo

# Runs planned to be shorter are begun anew where they are broken off.
CHECKPOINTS_FROM_S = 300.0
BETWEEN_CHECKPOINTS_S = 120.0


def checkpoint_interval(planned_s: float, steps: int) -> int:
    """Steps between checkpoints, where nobody says how many.

    Args:
        planned_s: how long a video is planned to take.
        steps: its denoising steps.

    Returns:
        As many as take two minutes, one at least; 0 for a run that is planned under five minutes.
    """
    if planned_s < CHECKPOINTS_FROM_S:
        return 0
    return max(1, int(BETWEEN_CHECKPOINTS_S / (planned_s / steps)))


def refuse_unwritable(paths: Sequence[Path], *, overwrite: bool, own: Sequence[Path] = ()) -> None:
    """Makes sure, before any work is done, that videos and what lies beside them can be written.

    Args:
        paths: of the videos.
        overwrite: whether files that are there may be replaced.
        own: files of the run itself, which goes on.

    Raises:
        BadInput: if something exists that may not be overwritten, or cannot be written.
    """
    media.refuse_unwritable([*paths, *map(media.report_path, paths)], overwrite=overwrite)
    goes_on = set(map(os.path.abspath, own))
    for path in paths:
        for kept in (media.checkpoint_path(path), media.latents_path(path)):
            if os.path.lexists(kept) and os.path.abspath(kept) not in goes_on and not overwrite:
                raise BadInput(f"{kept} of another run exists: go on with it (grat resume {kept}), or use --overwrite")


def make_videos(request: VideoRequest, output: Output, begun: VideoRun | None = None) -> None:
    """Makes the videos of a request, names each as soon as it is written, and shows what they took."""
    from grat_cli.generation.videos import generate_videos

    videos: list[MadeVideo] = []
    with claimed(request.outputs), output.progress() as progress:
        for video in generate_videos(request, progress, begun):
            videos.append(video)
            output.line(str(video.path))
    show_videos(videos, output)


def show_videos(videos: Sequence[MadeVideo], output: Output) -> None:
    """What videos took, for people and machines."""
    reports = [video.report for video in videos]
    output.data({"videos": [{"file": str(video.path), **video.report} for video in videos]})
    if len(reports) == 1:
        output.show(report.timing_table(reports[0]), report.phases_line(reports[0]), memory_line(reports[0]))
    else:
        output.show(report.pictures_table(reports))
    output.show(*report.guard_lines(reports))


def memory_line(made: Mapping[str, Any]) -> str:
    """For example `peak memory: load 1.2 GiB, text 1.3 GiB, denoise 2.5 GiB (resident memory of the process)`."""
    peaks = ", ".join(f"{name} {bytes_text(count)}" for name, count in made["memory"].items())
    return f"peak memory: {peaks} ({made['peak_memory_kind']})"
