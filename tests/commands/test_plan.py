"""`grat plan`, `grat presets`, `grat env`, and the face of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import grat
from PIL import Image

from grat_cli.estimates.pattern_figure import EXACT, QUERY, UNATTENDED
from grat_cli.presets import load_preset, preset_names, preset_yaml
from grat_kernels import Backend, Block, Far, Grid, Grouping, Union, build_plan
from grat_kernels.analysis import reach, tile_efficiency


def picture_of(text: str) -> list[str]:
    """The rows of marks in the output of `grat plan`."""
    return [line.replace(" ", "") for line in text.splitlines() if re.fullmatch(r"([Q#.\d] )+", line)]


def test_plan_agrees_with_the_plan_that_the_kernels_get() -> None:
    data = grat("plan", "flux-far", "--res", "8192", "--json").data
    plan = build_plan(Grouping(Grid((512, 512)), (16, 16)), Union(Block(1), Far([(1, (8, 8))])), 512, True)
    assert data["schema"] == "grat.plan/1"
    assert (data["width"], data["height"], data["grid"], data["groups"]) == (8192, 8192, [512, 512], [32, 32])
    assert data["tokens"] == {"image": 262144, "text": 512, "total": 262656}
    assert data["density"] == pytest.approx(plan.density)
    assert data["tile_efficiency"] == tile_efficiency(plan, 128, 128)
    assert data["reach_tokens"] == reach(plan)
    # 4 N^2 heads head_dim is 848 TFLOP per call.
    assert data["attention_flop_per_step"]["full"] == 57 * 4 * 262656**2 * 24 * 128
    assert data["attention_flop_per_step"]["planned"] == pytest.approx(57 * 4 * 24 * 128 * plan.attended_pairs)
    assert data["qkvo_bytes"] == 4 * 262656 * 24 * 128 * 2


def test_guidance_of_the_demo_runs_the_transformer_twice() -> None:
    once, twice = (grat("plan", "demo-b", "--guidance", scale, "--json").data for scale in (1, 2))
    flop = "attention_flop_per_step"
    assert twice[flop]["full"] == 2 * once[flop]["full"] == 2 * 5 * 4 * 1048**2 * 3 * 64


def test_plan_shows_rows_before_columns_and_what_a_group_attends() -> None:
    shown = grat("plan", "demo-far", "--res", "256x128").out
    assert "512 image (16 rows x 32) + 24 text" in shown
    assert "32 (4 rows x 8)" in shown
    assert picture_of(shown) == ["11111111", "111###11", "111#Q#11", "111###11"]
    assert "1 through means of 4x4 tokens" in shown
    assert "not attended" not in shown


CHOOSING = (
    "--set",
    "attention.radius=0",
    "--set",
    "attention.far={levels: [{beyond: 0, block: [4, 4]}], choose: {exact: 8, fine: 32, block: [2, 2]}}",
)


def test_plan_shows_what_is_chosen_by_content_and_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plan = build_plan(Grouping(Grid((32, 32)), (4, 4)), Union(Block(0), Far([(0, (4, 4))], (8, 32, (2, 2)))), 24, True)
    data = grat("plan", "demo-far", *CHOOSING, "--json").data
    assert data["density"] == pytest.approx(plan.density)
    work = data["work"]
    assert work == pytest.approx(plan.parts.over(1048**2)._asdict())
    assert work["pairs"] + work["text"] + work["selection"] == pytest.approx(data["density"])
    assert work["selection"] > 0
    assert data["preset"]["attention"]["far"]["choose"]["exact"] == 8
    shown = grat("plan", "demo-far", *CHOOSING).out
    assert max(map(len, shown.splitlines())) <= 80
    assert "far 4x4 beyond 0, of which 8 exact and 32 by 2x2" in re.sub(r"\s+", " ", shown)
    assert f"selection {work['selection']:.4f}" in re.sub(r"\s+", " ", shown)
    assert picture_of(shown) == [*["11111111"] * 4, "1111Q111", *["11111111"] * 3]
    assert "1 through means of 4x4 tokens; by content 8 token by token and 32 by 2x2 instead" in shown


def test_plan_of_a_schedule_averages_over_the_run() -> None:
    data = grat("plan", "demo-b", "--set", "schedule.dense_steps=0.5", "--json").data
    densities = sorted((plan["density"], plan["share"]) for plan in data["plans"])
    assert densities[1] == (1.0, 0.5)
    assert data["density"] == pytest.approx((densities[0][0] + 1) / 2)
    assert "density 1.0000 in 50%" in grat("plan", "demo-b", "--set", "schedule.dense_steps=0.5").out.replace("\n", " ")


@pytest.mark.parametrize("columns", [40, 80])
def test_everything_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = grat("plan", "flux-x", "--res", "8192").out
    assert max(map(len, shown.splitlines())) <= columns
    assert len(picture_of(shown)) == (16 if columns == 40 else 32)
    assert "…" not in shown
    for command in (("presets",), ("presets", "demo")):
        assert max(map(len, grat(*command).out.splitlines())) <= columns


def test_a_scaled_picture_keeps_what_is_closest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = picture_of(grat("plan", "flux-far", "--res", "8192").out)
    assert rows[8] == "1111111#Q1111111"  # groups 15 to 17 of 32, two by two
    assert rows[7] == "1111111##1111111"
    assert rows[9] == "1" * 16


def test_plan_draws_into_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pattern.png"
    result = grat("plan", "demo-x", "--picture", path, "--quiet")
    assert (result.code, result.out) == (0, f"{path}\n")
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 16) or ()}
    assert {QUERY, EXACT, UNATTENDED} <= colours
    assert "use --overwrite" in grat("plan", "demo-x", "--picture", path).err


def test_plan_takes_the_model_from_the_preset_and_the_preset_from_the_model() -> None:
    assert grat("plan", "demo-b", "--json").data["model"] == "demo"
    assert grat("plan", "--json").data["model"] == "flux-dev"
    assert grat("plan", "--model", "demo", "--json").data["preset"]["name"] == "demo-far"
    assert grat("plan", "--variant", "b-wide", "--json").data["preset"]["name"] == "flux-b-wide"
    mixed = grat("plan", "demo-b", "--model", "flux-dev", "--quiet")
    assert mixed.out.strip() == f"{grat('plan', 'demo-b', '--model', 'flux-dev', '--json').data['density']:.6f}"
    assert "made for demo models" in grat("plan", "demo-b", "--model", "flux-dev").err


# What design and paper claim of 720p with 129 frames: 33x45x80 tokens in groups of 4x8x8, 256 tokens of text.
@pytest.mark.parametrize(("variant", "density"), [("planes", 0.345), ("lines", 0.049), ("b", 0.047), ("full", 1.0)])
def test_plan_of_a_video(variant: str, density: float) -> None:
    data = grat("plan", "--model", "hunyuan", "--res", "720p", "--frames", "129", "--variant", variant, "--json").data
    assert (data["width"], data["height"], data["frames"], data["fps"]) == (1280, 720, 129, 24)
    assert (data["grid"], data["groups"]) == ([33, 45, 80], [9, 6, 10])
    assert data["tokens"] == {"image": 118800, "text": 256, "total": 119056}
    assert data["density"] == pytest.approx(density, abs=0.003)
    assert data["attention_flop_per_step"]["full"] == 60 * 4 * 119056**2 * 24 * 128
    assert (data["steps"], data["layers"], data["dtype"]) == (50, 60, "bfloat16")


def test_a_radius_per_axis_counts_groups_of_frames_rows_and_columns() -> None:
    data = grat("plan", "--model", "hunyuan", "--variant", "b", "--radius", "1x2x2", "--json").data
    plan = build_plan(Grouping(Grid((33, 45, 80)), (4, 8, 8)), Block((1, 2, 2)), 256, text_first=False)
    assert data["density"] == pytest.approx(plan.density)


def test_options_of_videos_plan_a_video() -> None:
    assert grat("plan", "--seconds", "5", "--json").data["model"] == "hunyuan"
    assert grat("plan", "--variant", "lines", "--json").data["preset"]["name"] == "hunyuan-lines"
    result = grat("plan", "hunyuan-b", "--seconds", "5", "--aspect", "9:16", "--res", "540p")
    assert "544x960 pixels, 121 frames, 5.04 s" in result.out
    assert "63,240 video (31 frames x 60 rows x 34) + 256 text" in result.out
    assert "120 frames (5 s at 24 per second) are rounded up to 121" in result.err
    assert "540p is 544x960" in result.err


def test_plan_of_a_video_shows_every_frame_of_groups() -> None:
    arguments = ("plan", "--res", "256x144", "--frames", "33", "--variant", "lines", "--group", "4x4x4")
    shown = picture_of(re.sub(r" {3}", " ", grat(*arguments).out))  # three frames of 3x4 groups, side by side
    assert shown == ["......#.....", "..#.##Q#..#.", "......#....."]


def test_presets_are_listed_shown_and_checked(tmp_path: Path) -> None:
    listed = grat("presets").out
    assert all(f" {name} " in f" {listed}" for name in preset_names())
    assert grat("presets", "--quiet").out.split() == preset_names()
    assert [preset["name"] for preset in grat("presets", "--json").data] == preset_names()
    path = tmp_path / "mine.yaml"
    path.write_text(grat("presets", "flux-far").out)
    assert load_preset(str(path)) == load_preset("flux-far")
    assert grat("presets", path).out.strip() == preset_yaml(load_preset("flux-far")).strip()
    assert grat("presets", "flux-far", "--set", "attention.radius=2", "--json").data["attention"]["radius"] == 2


def test_presets_of_the_demo_come_with_its_vocabulary() -> None:
    listed = grat("presets", "demo").out
    assert "fox" in listed
    assert "in the snow" in listed
    assert "flux-far" not in listed


def test_env_says_what_runs_here_and_why_not() -> None:
    data = grat("env", "--json").data
    assert {backend["name"] for backend in data["backends"]} == {backend.value for backend in Backend}
    assert all(backend["reason"] for backend in data["backends"])
    assert data["devices"][-1]["name"] == "cpu"
    assert data["versions"]["torch"]
    shown = grat("env").out
    for name in ("python", "torch", "diffusers", "ffmpeg", "sdpa", "triton"):
        assert re.search(rf"^{name} +\S", shown, re.MULTILINE)
    able = {backend["name"] for backend in data["backends"] if backend["able"]}
    assert set(grat("env", "--quiet").out.split()) == able


def test_help_and_version() -> None:
    for command in ((), ("image",), ("plan",), ("presets",), ("env",), ("info",)):
        result = grat(*command, "--help")
        assert (result.code, result.err) == (0, "")
        assert "Usage: grat" in result.out
    assert grat().out == grat("--help").out
    assert re.fullmatch(r"grat \d+\.\d+\S*\n", grat("--version").out)
    assert "--install-completion" in grat("--help").out
