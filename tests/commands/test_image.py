"""`grat image` and `grat info`: once for real with the demo model, and its manners with a stand-in for the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Result, grat, refusal
from painter import Painter
from PIL import Image

from grat_cli.errors import NumericalFailure, OutOfMemory
from grat_cli.generation import report

FOX = ("image", "a red fox in the snow", "--model", "demo")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Two small pictures by the demo model itself."""
    folder = tmp_path_factory.mktemp("real")
    return folder, grat(*FOX, "--res", "128", "--steps", "2", "--seed", "3,5", "--out", folder / "fox.png", "--json")


def test_the_demo_makes_pictures_with_reports(real: tuple[Path, Result]) -> None:
    folder, result = real
    assert result.code == 0, result.err
    assert names(folder) == {"fox-s3.png", "fox-s3.json", "fox-s5.png", "fox-s5.json"}
    planned = grat("plan", "demo-far", "--res", "128", "--steps", "2", "--json").data
    for seed, made in zip((3, 5), result.data["images"], strict=True):
        assert made["file"] == str(folder / f"fox-s{seed}.png")
        written = json.loads((folder / f"fox-s{seed}.json").read_text())
        assert {"file": made["file"], **written} == made
        assert (written["seed"], written["preset"]["name"], len(written["steps"])) == (seed, "demo-far", 2)
        assert (written["grid"], written["tokens"], written["density"]) == (
            *(planned["grid"], planned["tokens"], planned["density"]),
        )
        assert written["density"] < 0.8
        assert written["backend"]["used"] in ("sdpa", "triton")
        assert written["backend"]["preparation"]
        assert set(written["phases"]) == {"load", "text", "denoise", "decode", "save"}
        assert all(0 < step["attention_ms"] <= step["total_ms"] for step in written["steps"])
        with Image.open(made["file"]) as image:
            assert image.size == (128, 128)
    first, second = (np.asarray(Image.open(folder / f"fox-s{seed}.png")) for seed in (3, 5))
    assert (first != second).any()


def test_info_reads_picture_and_report(real: tuple[Path, Result]) -> None:
    folder, _ = real
    whole, inside = (grat("info", folder / f"fox-s3.{suffix}", "--json").data for suffix in ("json", "png"))
    assert whole == json.loads((folder / "fox-s3.json").read_text())
    assert inside == report.provenance(whole)
    assert inside["prompt"] == "a red fox in the snow"
    shown = grat("info", folder / "fox-s3.json").out
    for words in (
        "a red fox in the snow",
        "demo-far",
        "b radius 1, groups 4x4, far 4x4 beyond 1",
        "128x128",
        "denoise ",
    ):
        assert words in shown
    command = grat("info", folder / "fox-s3.png", "--quiet").out
    assert command.startswith("grat image 'a red fox in the snow' --model demo --res 128 --steps 2 --seed 3,5 --out ")


def test_the_default_name_tells_what_the_picture_is(painter: Painter, tmp_path: Path) -> None:
    result = grat(*FOX, "--seed", "7", "--res", "128x64", "--quiet")
    assert (result.code, result.err) == (0, "")
    name = r"grat-\d{8}-\d{6}-a-red-fox-in-the-snow-128x64-b-far-s7"
    assert re.fullmatch(rf"{name}\.png\n", result.out)
    assert names(tmp_path) == {result.out.strip(), result.out.strip().replace(".png", ".json")}


def test_results_go_to_stdout_and_the_rest_to_stderr(painter: Painter) -> None:
    human = grat(*FOX, "--seed", "7", "--steps", "9", "--out", "human.png")
    assert human.out.splitlines()[0] == "human.png"
    assert "median" in human.out
    assert "all 9" in human.out
    assert "save" in human.out
    for words in (
        "demo (chosen by name), 256x256, 9 steps",
        "demo-far: b radius 1",
        "seed 7",
        "a word about it",
        "step 9/9",
    ):
        assert words in human.err
        assert words not in human.out
    machine = grat(*FOX, "--seed", "7", "--out", "machine.png", "--json")
    assert [made["file"] for made in machine.data["images"]] == ["machine.png"]
    quiet = grat(*FOX, "--seed", "7,8", "--out", "quiet.png", "--quiet")
    assert (quiet.out, quiet.err) == ("quiet-s7.png\nquiet-s8.png\n", "")


def test_random_seeds_are_always_told(painter: Painter) -> None:
    result = grat(*FOX, "--n", "2", "--out", "fox.png")
    (request,) = painter.requests
    assert (request.save_latents, request.checkpoint_every, request.preview_every) == (False, None, 0)
    assert request.seeds[1] == request.seeds[0] + 1
    assert f"seed {request.seeds[0]}, {request.seeds[1]}" in result.err
    assert result.out.splitlines()[:2] == [f"fox-s{seed}.png" for seed in request.seeds]
    assert all(str(seed) in "\n".join(result.out.splitlines()[2:]) for seed in request.seeds)


def test_options_reach_the_request_and_the_report(painter: Painter, tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    Image.new("RGB", (32, 32)).save(start)
    options = (
        "--res",
        "96x64",
        "--seed",
        "1",
        "--steps",
        "5",
        "--guidance",
        "3",
        "--negative",
        "a cat",
        "--variant",
        "bx",
    )
    more = (
        "--group",
        "2x4",
        "--radius",
        "2",
        "--set",
        "schedule.dense_steps=1",
        "--backend",
        "reference",
        "--device",
        "cpu",
    )
    rest = ("--dtype", "bfloat16", "--offload", "model", "--init-image", start, "--strength", "0.5", "--out", "o.webp")
    last = ("--quality", "80", "--save-latents", "--checkpoint-every", "2", "--preview", "3")
    result = grat(*FOX, *options, *more, *rest, *last, "--json")
    assert result.code == 0, result.err
    (request,) = painter.requests
    assert (request.width, request.height, request.seeds, request.negative_prompt) == (96, 64, (1,), "a cat")
    assert (request.device, request.dtype, request.offload) == ("cpu", "bfloat16", "model")
    assert (request.init_image, request.strength) == (start, 0.5)
    assert (request.format, request.quality, request.save_latents) == ("webp", 80, True)
    assert (request.checkpoint_every, request.preview_every) == (2, 3)
    preset = result.data["images"][0]["preset"]
    assert preset["sampling"] == {"steps": 5, "guidance": 3.0, "shift": None}
    assert (preset["name"], preset["kernel"]["backend"], preset["schedule"]["dense_steps"]) == (
        "demo-bx",
        "reference",
        1,
    )
    assert {key: preset["attention"][key] for key in ("variant", "group", "radius", "share")} == {
        **{"variant": "bx", "group": [2, 4], "radius": 2, "share": 1},
    }


def test_what_a_guard_does_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ("--res", "128", "--steps", "4", "--variant", "b", "--seed", "3")
    result = grat(*FOX, *sizes, "--set", "guard=0.1", "--guard", "0.99", "--out", "fox.png")  # flags win
    assert result.code == 0, result.err
    assert "guard 0.99: layers that keep less of full attention go wider, which takes longer" in result.err
    words = "guard 0.99: 5 of 5 layers went wider from step 3 on (least kept "
    assert words in " ".join(result.out.split())
    made = json.loads(Path("fox.json").read_text())
    assert [(one["step"], one["to"]) for one in made["guard"]["widened"]] == [(2, "b radius 2, groups 4x4")] * 5
    assert made["density"] > made["guard"]["planned_density"]
    for file in ("fox.json", "fox.png"):
        shown = " ".join(grat("info", file).out.split())
        assert words.removeprefix("guard ") in shown
        assert "went wider step 3: layers 0-4 to b radius 2, groups 4x4" in shown
        assert f"density {made['density']:.3f} (" in shown


def test_guards_of_full_attention_and_those_that_are_none(painter: Painter) -> None:
    assert "guard 0.9 has nothing to do: all attention is full" in grat(*FOX, "--variant", "full", "--guard", ".9").err
    grat(*FOX, "--set", "guard=0.8")
    grat(*FOX, "--set", "guard=0.8", "--guard", "0")
    assert [request.preset.guard for request in painter.requests] == [0.9, 0.8, 0]
    for given in ("2", "-0.5"):
        message = refusal(*FOX, "--guard", given)
        assert (
            message
            == f"--guard {float(given)}: expected a share from 0 to 1, such as 0.9, or 0 for none, not {float(given)}"
        )
    assert refusal(*FOX, "--guard", "high") == "--guard high: expected a number"
    assert refusal(*FOX, "--set", "guard=high").startswith("--set guard=high: expected a share from 0 to 1")


def test_metadata_can_be_left_out_of_the_picture(painter: Painter, tmp_path: Path) -> None:
    grat(*FOX, "--out", "with.png")
    grat(*FOX, "--out", "without.png", "--no-metadata")
    assert b"red fox" in (tmp_path / "with.png").read_bytes()
    assert b"red fox" not in (tmp_path / "without.png").read_bytes()
    assert "red fox" in grat("info", "without.png").out  # from the report beside it


def test_overwrite_replaces_picture_and_report(painter: Painter, tmp_path: Path) -> None:
    for seed in (1, 2):
        assert grat(*FOX, "--seed", seed, "--out", "fox.png", "--overwrite").code == 0
    assert json.loads((tmp_path / "fox.json").read_text())["seed"] == 2
    assert grat("info", "fox.png", "--json").data["seed"] == 2
    assert names(tmp_path) == {"fox.png", "fox.json"}


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OutOfMemory("too little memory: try --res 128"), 4),
        (NumericalFailure("NaN: try --dtype float32"), 5),
        (KeyboardInterrupt(), 130),
    ],
    ids=["memory", "NaN", "Ctrl-C"],
)
def test_a_failure_keeps_what_is_done_and_leaves_nothing_half_written(
    painter: Painter, tmp_path: Path, failure: BaseException, code: int
) -> None:
    painter.fails_at_seed[8] = failure
    result = grat(*FOX, "--seed", "7,8,9", "--out", "fox.png")
    assert result.code == code
    assert result.out == "fox-s7.png\n"
    assert result.err.splitlines()[-1] == f"error: {str(failure) or 'interrupted'}"
    assert names(tmp_path) == {"fox-s7.png", "fox-s7.json"}


def test_the_report_of_a_picture_of_another_program_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    assert "does not say how it was made" in refusal("info", tmp_path / "other.png")
    (tmp_path / "part.json").write_text('{"schema": "grat.report/1", "prompt": "a fox"}')
    assert "is not a whole report of this version" in refusal("info", tmp_path / "part.json")
    assert grat("info", tmp_path / "part.json", "--json").data["prompt"] == "a fox"


def test_an_image_fits_a_narrow_terminal(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    result = grat(*FOX, "--out", "fox.png")
    assert max(map(len, result.out.splitlines())) <= 40
    assert "…" not in result.out
    assert "\x1b" not in result.out + result.err  # no colour where there is no terminal


@pytest.mark.parametrize(("name", "pillow_name"), [("jpg", "JPEG"), ("webp", "WEBP"), ("tiff", "TIFF")])
def test_other_formats_carry_the_same_provenance(name: str, pillow_name: str, painter: Painter, tmp_path: Path) -> None:
    result = grat(*FOX, "--res", "64", "--format", name, "--seed", "3", "--json")
    (made,) = result.data["images"]
    assert made["file"].endswith(f"-s3.{name}")
    with Image.open(made["file"]) as image:
        assert (image.format, image.size) == (pillow_name, (64, 64))
    (tmp_path / made["file"]).with_suffix(".json").unlink()
    found = grat("info", made["file"], "--json").data
    assert (found["prompt"], found["seed"], found["preset"]["name"]) == (FOX[1], 3, made["preset"]["name"])
    assert "phases" not in found
    assert "a red fox in the snow" in grat("info", made["file"]).out
    bare = grat(*FOX, "--res", "64", "--out", f"bare.{name}", "--no-metadata")
    assert bare.code == 0, bare.err
    assert b"grat" not in (tmp_path / f"bare.{name}").read_bytes()


def test_formats_that_do_not_fit_are_refused_before_the_run(painter: Painter) -> None:
    for options, advice in (
        (("--out", "fox.png", "--format", "jpg"), "fox.jpg"),
        (("--format", "jpgg"), "did you mean 'jpg'"),
        (("--quality", "90"), "for jpg and webp"),
        (("--format", "jpg", "--quality", "0"), "1 (smallest) to 100"),
        (("--format", "webp", "--res", "16384x64"), "--format png or tiff"),
        (("--preview", "0"), "--preview 5"),
        (("--checkpoint-every", "-1"), "--checkpoint-every -1: expected steps, 0 for none"),
    ):
        assert advice in refusal(*FOX, *options)
    assert painter.requests == []


def test_previews_are_beside_the_output_until_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    def step(self: Any, done: int, total: int) -> None:
        seen.append({name for name in names(tmp_path) if not name.startswith(".grat-claim-")})
        if len(seen) == 8:
            raise NumericalFailure("NaN")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grat_cli.console.progress.LogProgress.step", step)
    options = ("--res", "64", "--steps", "4", "--seed", "3,5", "--checkpoint-every", "0", "--out", "fox.png")
    assert grat(*FOX, *options, "--preview", "2").code == 5
    first = {"fox-s3.png", "fox-s3.json"}
    assert seen == [set(), set(), *[{"fox-s3.preview.png"}] * 2, first, first, *[first | {"fox-s5.preview.png"}] * 2]
    with Image.open("fox-s5.preview.png") as image:
        assert image.size == (64, 64)


def test_a_preview_takes_the_place_of_nothing(painter: Painter, tmp_path: Path) -> None:
    mine = tmp_path / "fox.preview.png"
    mine.write_bytes(b"precious")
    arguments = (*FOX, "--res", "64", "--seed", "3", "--preview", "2", "--out", "fox.png")
    assert "fox.preview.png exists: use --overwrite" in refusal(*arguments)
    assert (mine.read_bytes(), painter.requests) == (b"precious", [])
    assert grat(*arguments, "--overwrite").code == 0


@pytest.mark.parametrize("kept", ["checkpoint", "latents"])
def test_what_another_run_has_kept_is_refused(painter: Painter, kept: str) -> None:
    path = Path(f"fox.{kept}.safetensors")
    path.write_text("precious")
    assert f"{path} of another run exists: go on with it (grat resume {path}), or use --overwrite" in refusal(
        *FOX, "--res", "64", "--out", "fox.png"
    )
    assert (painter.requests, path.read_text()) == ([], "precious")


def test_what_came_while_a_picture_was_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any, done: int, total: int) -> None:
        (tmp_path / "fox.png").write_bytes(b"of another process")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grat_cli.console.progress.LogProgress.step", step)
    told = grat(*FOX, "--res", "64", "--steps", "1", "--out", "fox.png").err.splitlines()
    assert told[-2:] == [
        "error: cannot write fox.png: it exists: use --overwrite, or another --out",
        "its latents are kept: go on with grat decode fox.latents.safetensors",
    ]
    assert names(tmp_path) == {"fox.png", "fox.latents.safetensors"}
    assert (tmp_path / "fox.png").read_bytes() == b"of another process"
