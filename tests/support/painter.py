"""Stands in for the model behind `grat image`, `video` and `batch`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import numpy as np

from grat_cli.estimates.planning import architecture_for, schedule_for
from grat_cli.files import formats, outputs
from grat_cli.generation import report
from grat_cli.generation.finishing import Made
from grat_cli.generation.request import Request
from grat_cli.generation.stage import stages_for
from grat_cli.generation.timing import StepTiming
from grat_cli.models.resolution import Resolution
from grat_cli.models.video_size import VideoSize

SURROUNDINGS = report.Surroundings(
    device="cpu",
    device_name="An easel",
    dtype="float32",
    autoencoder_dtype="float32",
    threads=2,
    offload="none",
    offload_reason="as asked for",
    revision=None,
    memory_kind="memory",
)


class Painter:
    """Plain noise from the seed, everything else as a request says; takes the place of `run.generate`.

    Attributes:
        requests: as they came.
        fails_at_seed: what is raised in place of the output of a seed.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.fails_at_seed: dict[int, BaseException] = {}

    def __call__(self, request: Request, progress: Any, begun: object = None, world: object = None) -> Iterator[Made]:
        self.requests.append(request)
        for seed, path in zip(request.seeds, request.outputs, strict=True):
            progress.phase("denoise")
            steps = request.preset.sampling.steps
            for step in range(steps):
                progress.step(step + 1, steps)
            if seed in self.fails_at_seed:
                raise self.fails_at_seed[seed]
            progress.note("a word about it")
            made = self._report(request, seed)
            shape = request.frames or 1, request.height, request.width, 3
            formats.write_output(
                np.random.default_rng(seed).integers(0, 256, shape, np.uint8),
                path,
                request.format,
                fps=request.fps,
                quality=request.quality,
                provenance=report.provenance(made) if request.metadata else None,
                overwrite=request.overwrite,
            )
            outputs.write_json(made, outputs.report_path(path), overwrite=request.overwrite)
            yield Made(path, made)

    @staticmethod
    def _report(request: Request, seed: int) -> dict[str, Any]:
        size: Resolution | VideoSize = Resolution(request.width, request.height)
        if request.frames and request.fps:
            size = VideoSize(request.width, request.height, request.frames, request.fps)
        schedule = schedule_for(request.preset, architecture_for(request.model), size)
        stage = stages_for(request)[-1]
        record = report.StageRecord(
            stage=stage,
            schedule=schedule,
            text_tokens=24,
            backend="sdpa",
            backend_reason="it paints",
            preparation="stock modules: as it was",
            guidance=2.0,
            shift=1.5,
        )
        steps = [StepTiming(i, 1.0, 10.0, 5.0, 5.0, schedule.density_of_step(i)) for i in range(stage.steps)]
        told = report.build_report(request, seed, SURROUNDINGS, record, datetime.now(timezone.utc), request.strength)
        phases_ms = {"load": 1.0, "text": 1.0, "denoise 0": 10.0 * stage.steps, "decode 0": 1.0, "save": 1.0}
        return report.measured(told, steps, [record.as_dict()], phases_ms, dict.fromkeys(phases_ms, 2**20))
