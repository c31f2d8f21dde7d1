from __future__ import annotations

from pathlib import Path

import pytest
import tiny_hunyuan
from painter import Painter


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Measuring the machine takes longer than small videos.
    monkeypatch.setattr("grat_cli.estimates.time.planned_seconds", lambda *_: 2.0)


@pytest.fixture
def painter(in_an_empty_folder: None, monkeypatch: pytest.MonkeyPatch) -> Painter:
    """In place of every model."""
    painter = Painter()
    monkeypatch.setattr("grat_cli.generation.run.generate", painter)
    return painter


@pytest.fixture(scope="session")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of videos, of random weights."""
    return tiny_hunyuan.save(tmp_path_factory.mktemp("model") / "tiny", guidance_embeds=False)
