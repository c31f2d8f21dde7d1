"""Pictures that `grat image`, `video` and `plan` are given: how they reach the request, and what is refused."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
from command_line import grat, refusal
from painter import Painter
from PIL import Image

BOAT = ("image", "a red boat at night")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in {"a.png": (640, 480), "m.png": (640, 480), "small.png": (64, 64), "tiny.png": (8, 200)}.items():
        Image.new("RGB", size, "white").save(name)
    Path("torn.png").write_bytes(Path("a.png").read_bytes()[:20])


def test_pictures_reach_the_request(painter: Painter) -> None:
    sizes = ("--res", "96", "--steps", "2", "--seed", "1", "--model", "demo")
    assert grat(*BOAT, *sizes, "--init-image", "a.png", "--mask", "m.png", "--out", "b.png").code == 0
    (request,) = painter.requests
    assert (request.init_image, request.mask, request.strength) == (Path("a.png"), Path("m.png"), None)
    assert (request.kinds, request.handed) == ({"start", "mask"},) * 2


def test_what_a_model_cannot_do_names_the_models_that_can() -> None:
    dev = (*BOAT, "--model", "flux-dev")
    assert refusal(*dev, "--control", "a.png") == (
        "flux-dev takes no --control: give --model one of flux-canny, flux-depth, or leave it out"
    )
    assert "flux-dev takes no --reference: give --model " in refusal(*dev, "--reference", "a.png")
    assert "flux-kontext" in refusal(*dev, "--reference", "a.png")
    both = ("--init-image", "a.png", "--mask", "m.png")
    assert "flux-kontext takes no --init-image: give --model one of flux-dev, flux-schnell, flux-fill, demo" in refusal(
        *BOAT, "--model", "flux-kontext", *both
    ).replace("\n", " ")
    assert refusal("video", "waves", "--model", "demo", "--init-image", "a.png").startswith(
        "demo takes no --init-image"
    )


def test_what_a_model_needs_is_asked_for() -> None:
    fill = (*BOAT, "--model", "flux-fill")
    needs = "flux-fill needs --init-image FILE and --mask FILE: add "
    assert refusal(*fill) == f"{needs}--init-image FILE and --mask FILE, or choose another --model"
    assert refusal(*fill, "--init-image", "a.png") == f"{needs}--mask FILE, or choose another --model"
    assert refusal(*BOAT, "--model", "flux-depth") == (
        "flux-depth needs --control FILE: add --control FILE, or choose another --model"
    )


@pytest.mark.parametrize(
    ("model", "given", "says"),
    [
        (
            "flux-dev",
            "--mask m.png",
            "--mask says where a picture is made anew: add the picture with --init-image FILE",
        ),
        (
            "flux-dev",
            "--init-image a.png --mask small.png",
            "--mask small.png is 64x64, and --init-image a.png 640x480",
        ),
        ("flux-dev", "--init-image torn.png", "torn.png cannot be read as a picture"),
        ("flux-dev", "--init-image none.png", "--init-image none.png: there is no such file"),
        ("flux-dev", "--init-image a.png --mask none.png", "--mask none.png: there is no such file"),
        ("flux-canny", "--control torn.png", "torn.png cannot be read as a picture"),
        ("flux-kontext", "--reference a.png --reference m.png", "flux-kontext refers to one picture at once, not 2"),
        ("flux-kontext", "--reference tiny.png", "is 8x200: flux-kontext takes pictures of 16 pixels a side and more"),
        ("flux-kontext", "--reference a.png --strength 0.5", "--strength is for image-to-image: add --init-image FILE"),
        ("flux-fill", "--init-image a.png --mask m.png --strength 0.5", "--strength is for a picture that is redone"),
        ("flux-fill", "--init-image a.png --mask m.png --negative rain", "flux-fill takes no negative prompt"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(model: str, given: str, says: str) -> None:
    assert says in refusal(*BOAT, "--model", model, *given.split())


def test_plans_count_the_tokens_of_references() -> None:
    plan = ("plan", "--model", "flux-kontext", "--json")
    plain, referring = grat(*plan).data, grat(*plan, "--reference", "a.png").data
    assert plain["tokens"] == {"image": 4096, "text": 512, "total": 4608}
    # 640x480 is nearest in shape to 1184x880.
    assert referring["tokens"] == {"image": 4096, "text": 512, "references": 74 * 55, "total": 4608 + 74 * 55}
    assert referring["density"] > plain["density"]
    assert referring["steps"] == 28
    assert "+ 512 text + 4,070 of references" in grat(*plan[:-1], "--reference", "a.png").out


def test_plans_of_pictures_from_pictures_have_the_stages_of_the_run() -> None:
    plan = ("plan", "--model", "flux-dev", "--res", "4096", "--json")
    sizes = {
        name: [(stage["width"], stage["strength"]) for stage in grat(*plan, *given).data["stages"]]
        for name, given in {
            "noise": (),
            "redone": ("--init-image", "a.png"),
            "under a mask": ("--init-image", "a.png", "--mask", "m.png", "--strength", "0.8"),
        }.items()
    }
    assert sizes["noise"][0] == (1024, None)
    assert sizes["redone"] == sizes["noise"][1:]
    assert sizes["under a mask"] == [(4096, 0.8)]
    assert "flux-fill needs" in refusal("plan", "--model", "flux-fill", "--json")


def test_reports_and_info_name_the_pictures() -> None:
    sizes = ("--res", "96x80", "--steps", "2", "--seed", "1", "--model", "demo")
    assert grat(*BOAT, *sizes, "--init-image", "a.png", "--mask", "m.png", "--out", "b.png").code == 0
    told = [
        {"kind": "start", "file": "a.png", "width": 96, "height": 80},
        {"kind": "mask", "file": "m.png", "width": 96, "height": 80},
    ]
    made = json.loads(Path("b.json").read_text())
    for picture in made["pictures"]:
        content = Path(picture["file"]).read_bytes()
        assert (picture.pop("bytes"), picture.pop("sha256")) == (len(content), sha256(content).hexdigest())
    assert (made["pictures"], made["init_image"], made["strength"]) == (told, "a.png", 1.0)
    shown = " ".join(grat("info", "b.png").out.split())
    assert "start a.png (96x80), mask m.png (96x80)" in shown
