"""Videos from a first frame, by every family that takes one: from a folder and a file, broken off and taken up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_runs
import tiny_hunyuan
import tiny_hunyuan15
import tiny_wan
import torch
from PIL import Image
from small_runs import Progress, Small, broken_off, generate, untimed

from grat_cli.files import outputs
from grat_cli.generation.checkpoint import read_run
from grat_cli.models.catalogue import choose_model


def _saved(kind: str, folder: Path) -> None:
    if kind.startswith("wan"):
        tiny_wan.save(folder, kind.removeprefix("wan "))
        return
    pipe: Any = tiny_hunyuan.pipeline_from_picture() if kind == "hunyuan" else tiny_hunyuan15.pipeline(picture=True)
    pipe.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["hunyuan", "hunyuan15", "wan picture", "wan two pictures", "wan timed"])
def test_a_run_from_a_first_frame_that_is_taken_up_ends_like_an_unbroken_one(kind: str, tmp_path: Path) -> None:
    _saved(kind, tmp_path / "model")
    picture = tmp_path / "first.png"
    tiny_hunyuan15.first_frame(192, 160).save(picture)
    request = small_runs.request_of(
        kind.partition(" ")[0],
        [2, 2, 2],
        "mp4",
        width=96,
        height=96 if kind == "wan timed" else 80,
        frames=9,
        fps=8,
        model=choose_model(str(tmp_path / "model"), medium="video"),
        init_image=picture,
        negative_prompt="snow",
    )
    small = Small(request, ".mp4")
    (made,) = generate(small.of(tmp_path / "whole", save_latents=True))
    asked = small.of(tmp_path / "broken", save_latents=True)
    begun, stored = read_run(broken_off(asked))
    picture.unlink()  # a run that goes on has it
    (resumed,) = generate(replace(stored, outputs=asked.outputs), Progress(), begun)
    first, second = (read_run(outputs.latents_path(one.path))[0].latents for one in (made, resumed))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert untimed(resumed.report) == untimed(made.report)
    (told,) = made.report["pictures"]
    assert (told["kind"], told["file"]) == ("start", "first.png")

    tiny_hunyuan15.first_frame(160, 192).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(picture)
    (other,) = generate(small.of(tmp_path / "other", save_latents=True))
    latents = read_run(outputs.latents_path(other.path))[0].latents
    assert latents is not None
    assert not torch.equal(latents, first)
