"""Outputs that several ranks make together are those of one process, also where another number of ranks goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import tiny_hunyuan
from PIL import Image
from ranks import on_ranks
from shared_runs import Asked, runs
from small_runs import Progress, Small, generate

from grat_cli.files.videos import read_frames
from grat_cli.generation.checkpoint import find_run, read_run

FAR = {"variant": "b", "group": [4, 4], "radius": 0, "far": [{"beyond": 0, "block": [2, 2]}]}
BY_HEADS = {"rules": [{"layers": "1", "heads": "1", "variant": "full", "far": []}]}
CARRIED = {"over_steps": [{"reference": [0, 2], "between": "extrapolate"}]}


def demo(**sections: Any) -> Small:
    """The demo's small picture with other attention."""
    small = small_runs.picture()
    request = replace(
        small.request,
        preset=small.request.preset.model_validate(
            {**small.request.preset.model_dump(), "attention": FAR, "schedule": {}, **sections}
        ),
    )
    return replace(small, request=request)


KINDS = {
    "far, by heads": demo(schedule=BY_HEADS),
    "carried": demo(schedule=CARRIED),
    "guarded": replace(
        small_runs.picture(), request=replace(small_runs.picture().request, preset=small_runs.picture().guarded())
    ),
    "cached": demo(cache={"kind": "first-block", "threshold": 0.5}),
    "cascade": small_runs.cascade(),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Small]:
    """Those, and a video by a small HunyuanVideo, which has two heads."""
    return {**KINDS, "video": small_runs.video(tiny_hunyuan.save(tmp_path_factory.mktemp("model")))}


def shown(small: Small, path: Path) -> np.ndarray:
    """Pixels of an output."""
    if small.request.frames is None:
        with Image.open(path) as image:
            return np.asarray(image)
    return np.stack([*read_frames(path)])


@pytest.fixture(scope="module")
def alone(kinds: dict[str, Small], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Of each kind, by one process."""
    folder = tmp_path_factory.mktemp("alone")
    made = {name: generate(small.of(folder / name)) for name, small in kinds.items()}
    return {name: shown(kinds[name], one.path) for name, (one,) in made.items()}


BROKEN_OFF = ("guarded", "far, by heads")


@pytest.mark.parametrize(("ranks", "cfg", "left_out"), [(2, 2, None), (3, 1, "video")])
def test_ranks_make_what_one_makes(
    kinds: dict[str, Small], alone: dict[str, np.ndarray], tmp_path: Path, ranks: int, cfg: int, left_out: str | None
) -> None:
    """The demo has three heads, and guidance; the video is made by ranks that share calls. Runs that are broken off are
    gone on with by one process."""
    made = {name: small for name, small in kinds.items() if name != left_out}
    whole = [Asked(small.of(tmp_path / name), 1 if name == "video" else cfg) for name, small in made.items()]
    broken = [Asked(kinds[name].of(tmp_path / f"broken {name}"), cfg, stop=3) for name in BROKEN_OFF]
    reports, *others = on_ranks(ranks, runs, [*whole, *broken])
    assert not any(any(of_rank) for of_rank in others)
    for (name, small), of_output in zip(made.items(), reports, strict=False):
        np.testing.assert_array_equal(shown(small, tmp_path / f"{name}{small.ending}"), alone[name])
        (told,) = of_output
        assert told["ranks"]["count"] == len(told["ranks"]["each"]) == ranks
        sent = [step["exchanged_bytes"] for step in told["steps"]]
        assert told["ranks"]["each"][0]["bytes_per_step"] == round(sum(sent) / len(sent)) > 0
    for name in BROKEN_OFF:
        run, request = read_run(find_run(tmp_path / f"broken {name}.png"))
        assert run.report["ranks"]["count"] == ranks
        progress = Progress()
        (one,) = generate(request, progress, run)
        assert "begun on" in "".join(progress.notes)
        assert "ranks" not in one.report
        np.testing.assert_array_equal(shown(kinds[name], one.path), alone[name])
    assert {path.suffix for path in tmp_path.iterdir()} <= {".png", ".mp4", ".json"}
