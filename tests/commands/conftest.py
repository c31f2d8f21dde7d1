from __future__ import annotations

from pathlib import Path

import pytest
from painter import Painter


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Painter:
    """In place of every model; the current folder is empty, and nothing of the machine is measured."""
    monkeypatch.chdir(tmp_path)
    painter = Painter()
    monkeypatch.setattr("grat_cli.generation.run.generate", painter)
    monkeypatch.setattr("grat_cli.estimates.time.planned_seconds", lambda *_: 2.0)
    return painter
