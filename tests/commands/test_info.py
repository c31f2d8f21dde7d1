"""`grat info` on videos and what lies beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import grat, refusal

from grat_cli.files import outputs
from grat_cli.files.tensors import write_tensors
from grat_cli.files.videos import FORMATS, SUFFIXES, write_video
from grat_cli.presets import load_preset


def provenance() -> dict[str, Any]:
    return {
        "schema": "grat.report/1",
        "created": "2025-01-31T14:25:01+00:00",
        "command": "grat video 'waves = \"at\" night'",
        "prompt": 'waves = "at" night 🌊',
        "negative_prompt": None,
        "seed": 7,
        "width": 64,
        "height": 48,
        "frames": 9,
        "fps": 24,
        "seconds": 0.375,
        "preset": load_preset("hunyuan-lines").model_dump(mode="json"),
        "model": {"name": "demo", "source": "demo", "revision": None},
        "sampling": {"steps": 20, "guidance": 6.0, "shift": 7.0},
        "density": 0.049,
        "ideal_speedup": 20.4,
        "backend": {"used": "sdpa", "reason": "no GPU"},
        "device": {"model": "2 cores", "name": "cpu", "dtype": "float32"},
        "versions": {"grat": "0.1.0"},
    }


def frames(count: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("format", FORMATS)
def test_info_tells_what_made_a_video_and_what_the_file_is(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"waves{SUFFIXES[format]}"
    write_video(frames(), path, fps=24, format=format, provenance=provenance())
    shown = grat("info", path).out
    assert 'waves = "at" night 🌊' in shown
    assert "64x48, 9 frames at 24 per second (0.375 s)" in shown
    assert {"mp4": "h264, 64x48, 9 frames at 24 per second (0.38 s)", "webm": "vp9, 64x48, 9 frames",
            "gif": "gif, 64x48, 9 frames", "frames": "png, 64x48, 9 frames"}[format] in shown  # fmt: skip
    assert grat("info", path, "--json").data == provenance()
    assert grat("info", path, "--quiet").out == provenance()["command"] + "\n"


def test_info_tells_of_a_damaged_video_what_can_be_told(tmp_path: Path) -> None:
    path = tmp_path / "waves.mp4"
    write_video(frames(), path, fps=24, provenance=provenance())
    path.write_bytes(path.read_bytes()[:-10_000])
    told = grat("info", path)
    assert "at night" in told.out.replace('"', "")
    assert "h264" not in told.out
    assert f"{path} is not a whole video" in told.err.replace("\n", "")


@pytest.mark.parametrize("name", ["waves.mp4", "waves.png"])
def test_info_reads_latents_and_checkpoints(name: str, tmp_path: Path) -> None:
    about = provenance() | {"steps_total": 28}
    if name.endswith("png"):
        for key in ("frames", "fps", "seconds"):
            del about[key]
    kept, checkpoint = outputs.latents_path(tmp_path / name), outputs.checkpoint_path(tmp_path / name)
    for path, schema, done in ((kept, "grat.latents/2", 28), (checkpoint, "grat.checkpoint/2", 12)):
        write_tensors(path, {"latents": torch.randn(1, 4, 3, 6, 8)}, about | {"schema": schema, "steps_done": done})
        assert ("64x48, 9 frames" in grat("info", path).out) == name.endswith("mp4")
        assert grat("info", path, "--json").data["schema"] == schema
    assert "12 of 28 are done" in grat("info", checkpoint).out
    assert "are done" not in grat("info", kept).out


def test_info_shows_text_of_others_as_text(tmp_path: Path) -> None:
    evil = "a [/] [red]fox[/red] \x1b]0;title\x07\u202e\x9b"
    about = {**provenance(), "prompt": evil, "command": evil}
    path = tmp_path / "x [final].json"
    outputs.write_json(about, path)
    shown = grat("info", path)
    assert shown.code == 0
    assert r"a [/] [red]fox[/red] \x1b]0;title\x07\u202e\x9b" in shown.out
    assert grat("info", path, "--quiet").out == "a [/] [red]fox[/red] \\x1b]0;title\\x07\\u202e\\x9b\n"
    assert grat("info", path, "--json").data == about
    assert f"cannot read {tmp_path}/x [gone].png" in refusal("info", tmp_path / "x [gone].png")
