"""`--cache` and `cache:` from the command line to report, picture and screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import grat, refusal
from PIL import Image

FOX = ("image", "a red fox in the snow", "--model", "demo", "--res", "96x80", "--steps", "5", "--seed", "3")


def test_a_cache_is_told_of_in_report_picture_and_on_the_screen(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    shown = grat(
        "presets", "demo-far", "--set", "cache={kind: taylor, cache_interval: 2, disable_cache_before_step: 2}"
    )
    path.write_text(shown.out)
    assert "cache: {kind: taylor, cache_interval: 2," in grat("presets", path).out
    made = grat(*FOX, "--preset", path, "--out", tmp_path / "fox.png")
    assert made.code == 0, made.err
    assert (
        "cache taylor, cache_interval 2, disable_cache_before_step 2: what steps do not compute is forecast" in made.err
    )
    words = " ".join(made.out.split() + made.err.split())
    assert "cache taylor: 3 of 5 steps computed whole; in steps 3, 5 all layers forecast; density" in words
    report = json.loads((tmp_path / "fox.json").read_text())
    assert report["cache"]["steps"] == [
        {"steps": "0-1, 3", "count": 3, "computed": None},
        {"steps": "2, 4", "count": 2, "computed": ["", ""]},
    ]
    for file in ("fox.png", "fox.json"):
        told = " ".join(grat("info", tmp_path / file).out.split())
        assert "cache taylor: 3 of 5 steps computed whole; in steps 3, 5 all layers forecast" in told
    plain = grat(*FOX, "--preset", path, "--cache", "none", "--out", tmp_path / "plain.png")
    assert plain.code == 0, plain.err
    assert "cache" not in json.loads((tmp_path / "plain.json").read_text())
    with Image.open(tmp_path / "fox.png") as with_cache, Image.open(tmp_path / "plain.png") as without:
        assert with_cache.tobytes() != without.tobytes()


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        ("tailor", "--cache tailor: did you mean 'taylor'?"),
        ("taylor:interval=3", "taylor has no 'interval': did you mean 'cache_interval'?"),
        ("mag", "run once with --cache mag:calibrate=true"),
    ],
)
def test_caches_that_cannot_be_are_refused_in_a_line(cache: str, says: str, tmp_path: Path) -> None:
    assert says in refusal(*FOX, "--cache", cache, "--out", tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_the_memory_of_a_cache() -> None:
    plain, cached = (
        grat("plan", "flux-far", "--res", "1024", "--gpu", "h200", "--json", *more).data
        for more in ((), ("--set", "cache=taylor"))
    )
    peaks = [
        next(phase["peak_bytes"] for phase in plan["phases"] if phase["phase"] == "denoise") for plan in (plain, cached)
    ]
    assert peaks[1] - peaks[0] == pytest.approx(2 * 57 * 4608 * 3072 * 2)
