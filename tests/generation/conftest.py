"""Small runs of each kind, with pipelines that may be tampered with, and outputs that are kept in place of written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import tiny_hunyuan
import torch
from small_runs import Small

from grat_cli.generation import finishing, run, stored
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import LoadedModel, load_model


@pytest.fixture(scope="session")
def video_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of videos."""
    return tiny_hunyuan.save(tmp_path_factory.mktemp("model") / "tiny", guidance_embeds=False)


@pytest.fixture(params=["picture", "video"])
def small(request: pytest.FixtureRequest, video_model: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """A kind of small output."""
    if request.param == "video":
        return small_runs.video(video_model)
    if request.param == "picture":
        return small_runs.picture()
    made = small_runs.cascade(upscale="latent" if request.param == "cascade of latents" else "pixel")
    # What is kept of a run says no more of a model than its name.
    side = made.request.model.native_side
    monkeypatch.setattr(
        stored, "choose_model", lambda *args, **options: replace(choose_model(*args, **options), native_side=side)
    )
    return made


@pytest.fixture
def loaded(small: Small, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline that generations get, to be tampered with."""
    if small.request.frames:
        pipe = tiny_hunyuan.pipeline(guidance_embeds=False)
    else:
        pipe = load_model(small.request.model, device=torch.device("cpu"), dtype=torch.float32).pipe
    monkeypatch.setattr(run, "load_model", lambda *_, **__: LoadedModel(pipe, None))
    monkeypatch.setattr(finishing, "load_autoencoder", lambda *_, **__: pipe)
    monkeypatch.setattr(run, "release", lambda *_: None)
    return pipe


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Frames by the stem of the file's name, in place of encoded outputs."""
    made: dict[str, np.ndarray] = {}

    def write_output(frames: Iterator[np.ndarray], path: Path, *_: Any, **__: Any) -> bool:
        made[path.stem] = np.stack(list(frames))
        path.write_bytes(b"an output")
        return True

    monkeypatch.setattr(finishing.formats, "write_output", write_output)
    return made
