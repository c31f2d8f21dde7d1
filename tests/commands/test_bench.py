"""`grat bench`: what it measures by default and on request, what it writes, and how it answers mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import grat, refusal
from PIL import Image

from grat_cli.bench import attention_level, step_level, whole_runs
from grat_cli.bench.results import BenchResult, Case, Row
from grat_cli.bench.step_level import StepSettings
from grat_cli.bench.whole_runs import Pictures, RunSettings
from grat_cli.commands.bench import complete_compare, complete_peers
from grat_cli.fidelity.prompts import built_in_prompts
from grat_cli.fidelity.variants import NAMES, PEERS, SHORT_NAMES
from grat_cli.presets import preset_names
from grat_kernels import Block, Grid, Grouping, build_plan
from grat_kernels.analysis import reach

PROMPTS, VIDEO_PROMPTS = built_in_prompts("image"), built_in_prompts("video")
TINY = ("--grid", "12x14", "--text", 3, "--heads", 1, "--head-dim", 16, "--reps", 2, "--device", "cpu")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def a_result(level: Any) -> BenchResult:
    rows = (Row("full", "full", "all", times_ms=(4.0, 5.0)), Row("grat-b", "pattern", "near", times_ms=(1.0, 2.0)))
    case = Case("12x14 tokens", (12, 14), 3, rows)
    return BenchResult(level, "2026-01-01T00:00:00", "grat bench", "cpu", "CPU", "float32", {}, {}, (case,))


class Measured(list[Any]):
    """Stands in for the measurement and remembers what it was asked for."""

    def attention(self, requests: Any, sizes: Any, **options: Any) -> BenchResult:
        self.append({"requests": [request.name for request in requests], "sizes": sizes, **options})
        return a_result("attention")

    def step(self, settings: StepSettings, progress: Any) -> BenchResult:
        self.append(settings)
        return a_result("step")

    def whole(self, settings: RunSettings, progress: Any) -> tuple[BenchResult, Pictures]:
        self.append(settings)
        if settings.model.medium == "video":
            return a_result("video"), Pictures([("full", []), ("b", [])], [])
        red = Image.new("RGB", (40, 30), "red")
        return a_result("image"), Pictures([("full", [red]), ("grat-b", [red])], ["a fox, seed 0"])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    stand_in = Measured()
    monkeypatch.setattr(attention_level, "run_attention_level", stand_in.attention)
    monkeypatch.setattr(step_level, "run_step_level", stand_in.step)
    monkeypatch.setattr(whole_runs, "compare_runs", stand_in.whole)
    return stand_in


# For real


def test_it_prints_a_table_and_writes_json_markdown_and_a_page(tmp_path: Path) -> None:
    done = grat("bench", "--compare", "full,na,grat-b", *TINY, "--peers", "flex,sage", "--out", "mine")
    assert done.code == 0, done.err
    # Wrapping, if any, is no business of this test.
    shown = " ".join(done.out.split())
    for words in (
        "12x14 tokens",
        "full (torch SDPA)",
        "na",
        "grat-b",
        "flex (grat-b)",
        "sageattention is not installed",
    ):
        assert words in shown
    assert done.out.splitlines()[-3:] == ["mine.json", "mine.md", "mine.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html", "mine.json", "mine.md"]
    result = BenchResult.from_json(Path("mine.json").read_text())
    assert (result.schema, result.level, result.device, result.dtype) == ("grat.bench/1", "attention", "cpu", "float32")
    assert result.command.startswith("grat bench --compare full,na,grat-b")
    [case] = result.cases
    assert (case.grid, case.text_len) == ((12, 14), 3)
    assert [row.name for row in case.rows] == ["full", "na", "grat-b", "flex (grat-b)"]
    plan = build_plan(Grouping(Grid((12, 14)), (2, 2)), Block(1), 3, True)
    assert case.rows[2].density == plan.density
    assert case.rows[2].reach_tokens == reach(plan)
    assert all(len(row.times_ms) == 2 for row in case.rows)
    assert [absent.name for absent in result.absent] == ["sage"]
    assert "grat-b" in Path("mine.md").read_text()
    assert Path("mine.html").read_text().startswith("<!doctype html>")


def test_json_is_the_file_and_nothing_else_and_quiet_prints_names() -> None:
    done = grat("bench", "--compare", "full,grat-x", *TINY, "--json", "--out", "a")
    assert done.data == json.loads(Path("a.json").read_text())
    quiet = grat("bench", "--compare", "full", *TINY, "--quiet", "--out", "b")
    assert (quiet.out.split(), quiet.err) == (["b.json", "b.md", "b.html"], "")


def test_a_row_that_would_take_too_long_is_skipped_and_says_so() -> None:
    done = grat(
        "bench",
        "--grid",
        "256x256",
        "--heads",
        1,
        "--max-seconds",
        1,
        "--compare",
        "full",
        "--device",
        "cpu",
        "--out",
        "a",
    )
    assert done.code == 0
    [row] = BenchResult.from_json(Path("a.json").read_text()).cases[0].rows
    assert "(--max-seconds)" in str(row.skipped)
    assert "more than 1.0 s" in " ".join(done.out.split())
    assert "full is skipped" in done.err


# What is asked for


def test_defaults_of_a_cpu(measured: Measured) -> None:
    assert grat("bench", "--device", "cpu").code == 0
    [asked] = measured
    assert asked["requests"] == ["full", "na", "grat-b"]
    [size] = asked["sizes"]
    assert (size.title, size.grid.shape, size.text_len, size.text_first) == ("128x128 tokens", (128, 128), 512, True)
    assert (asked["heads"], asked["head_dim"], asked["repetitions"]) == (4, 64, 5)
    assert (asked["dtype"], asked["backends"], asked["peers"]) == (torch.float32, ("auto",), ())
    assert asked["max_seconds"] == 60


def test_defaults_of_a_gpu(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grat_cli.models.devices.choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr("grat_cli.models.devices.choose_dtype", lambda name, device: torch.bfloat16)
    assert grat("bench").code == 0
    [asked] = measured
    [size] = asked["sizes"]
    assert (size.title, size.grid.shape, size.text_len) == ("4096x4096 pixels", (256, 256), 512)
    assert (asked["heads"], asked["head_dim"], asked["repetitions"]) == (24, 128, 20)


def test_sizes_by_pixels_and_by_tokens(measured: Measured) -> None:
    assert grat("bench", "--res", "1024,2048x1024", "--grid", "9x7,33x45x80", "--out", "a").code == 0
    assert grat("bench", "--res", "1024", "--grid", "33x45x80", "--text", 0, "--out", "b").code == 0
    found = [[(size.title, size.grid.shape, size.text_len) for size in asked["sizes"]] for asked in measured]
    assert found[0] == [
        ("1024x1024 pixels", (64, 64), 512),
        ("2048x1024 pixels", (64, 128), 512),
        ("9x7 tokens", (9, 7), 512),
        ("33x45x80 tokens", (33, 45, 80), 256),
    ]
    assert [text for *_, text in found[1]] == [0, 0]
    assert not measured[0]["sizes"][3].text_first


def test_a_step_is_asked_for(measured: Measured) -> None:
    step = ("bench", "--level", "step")
    assert grat(*step, "--model", "demo", "--res", "512", "--grid", "32x48", "--reps", 3, "--out", "a").code == 0
    assert grat(*step, "--model", "hunyuan", "--layers", "2,4", "--compare", "full,na", "--out", "b").code == 0
    demo, hunyuan = measured
    assert (demo.model, demo.grids, demo.repetitions) == ("demo", ((64, 64), (32, 48)), 3)
    assert [request.name for request in demo.compare] == ["grat-b", "grat-far"]
    assert (hunyuan.grids, hunyuan.layers, hunyuan.repetitions) == ((), (2, 4), StepSettings.repetitions)
    assert [request.name for request in hunyuan.compare] == ["na"]
    assert hunyuan.command == "grat bench --level step --model hunyuan --layers 2,4 --compare full,na --out b"


def test_pictures_are_asked_for_and_laid_side_by_side(measured: Measured, tmp_path: Path) -> None:
    done = grat("bench", "--level", "image", "--model", "demo", "--res", "128x64", "--prompts", 2, "--out", "pictures")
    assert done.code == 0, done.err
    [asked] = measured
    assert (asked.model.name, asked.width, asked.height, asked.prompts) == ("demo", 128, 64, PROMPTS[:2])
    assert [request.name for request in asked.compare] == ["grat-b", "grat-x", "grat-far"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json", ".md", ".png"]
    assert json.loads(Path("pictures.json").read_text())["contact_sheet"] == "pictures.png"
    assert "data:image/png" in Path("pictures.html").read_text()
    Path("prompts.txt").write_text("a cat\n\n a dog \n")
    assert grat("bench", "--level", "image", "--model", "demo", "--prompts", "prompts.txt").code == 0
    assert measured[1].prompts == ("a cat", "a dog")


def test_videos_are_asked_for(measured: Measured, tmp_path: Path) -> None:
    video = ("bench", "--level", "video", "--model", "demo")
    done = grat(*video, "--res", "192x96", "--frames", 14, "--steps", 7, "--prompts", 4, "--out", "a")
    assert done.code == 0, done.err
    assert grat(*video, "--compare", "full,lines,na", "--out", "b").code == 0
    asked, usual = measured
    assert (asked.model.medium, asked.width, asked.height, asked.frames, asked.steps) == ("video", 192, 96, 17, 7)
    assert (asked.prompts, usual.prompts) == (VIDEO_PROMPTS[:4], VIDEO_PROMPTS[:3])
    assert [request.name for request in asked.compare] == ["planes", "lines", "b", "bx", "far"]
    assert (usual.width, usual.height, usual.frames, usual.steps) == (256, 144, 33, None)
    assert [request.name for request in usual.compare] == ["lines", "na"]
    assert "14 frames are rounded up to 17" in done.err
    # No frames, no sheet.
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".html", ".json", ".json", ".md", ".md"]


def test_where_the_results_go(measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert grat("bench", "--out", "folder").code == 0
    assert grat("bench", "--out", "results.v2").code == 0
    assert grat("bench", "--out", "named.html").code == 0
    assert grat("bench").code == 0
    names = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.md"))]
    assert re.fullmatch(r"folder/grat-bench-\d{8}-\d{6}-attention\.md", names[0])
    assert re.fullmatch(r"grat-bench-\d{8}-\d{6}-attention\.md", names[1])
    assert names[2:] == ["named.md", "results.v2.md"]


def test_nothing_is_overwritten_and_nothing_measured_in_vain(measured: Measured) -> None:
    Path("mine.md").write_text("precious")
    assert "mine.md exists: use --overwrite" in refusal("bench", "--out", "mine")
    assert "the folder nowhere does not exist" in refusal("bench", "--out", "nowhere/mine")
    assert measured == []
    assert grat("bench", "--out", "mine", "--overwrite").code == 0
    assert Path("mine.md").read_text() != "precious"


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--level", "steps"), "did you mean 'step'"),
        (("--compare", "grat-c"), "did you mean 'grat-"),
        (("--peers", "natte"), "did you mean 'natten'"),
        (("--compare", "grat-b:radius=1x1x1", "--grid", "9x9"), "--compare grat-b:radius=1x1x1 on 9x9 tokens"),
        (("--grid", "128"), "--grid 128: expected image tokens per axis"),
        (("--grid", "0x4"), "--grid 0x4: expected image tokens per axis"),
        (("--grid", "4x4,"), "--grid : expected image tokens per axis"),
        (("--res", "1000"), "--res 1000: sides must be multiples of 16"),
        (("--reps", "0"), "--reps 0: expected 1 or more"),
        (("--reps", "many"), "--reps many: expected a whole number"),
        (("--text", "-1"), "--text -1: expected 0 or more"),
        (("--max-seconds", "0"), "--max-seconds 0: expected more than 0"),
        (("--device", "gpu"), "--device gpu"),
        (("--dtype", "int8"), "--dtype int8"),
        (("--backend", "tritn"), "did you mean 'triton'"),
        (("--heads", "4", "--level", "step"), "--heads says nothing to --level step: it is for attention"),
        (("--grid", "4x4", "--level", "image"), "it is for attention and step"),
        (("--model", "demo"), "--model says nothing to --level attention"),
        (("--level", "step", "--model", "dem"), "did you mean 'demo'"),
        (("--level", "step", "--model", "demo", "--layers", "3"), "--layers 3: demo has up to 1 double and 4 single"),
        (("--level", "step", "--model", "hunyuan", "--res", "1024"), "give hunyuan tokens, such as --grid 33x45x80"),
        (("--level", "image", "--prompts", "0"), f"there are {len(PROMPTS)} built-in prompts"),
        (("--level", "image", "--prompts", "missing.txt"), "expected a count or a text file"),
        (("--level", "image", "--model", "demo", "--res", "128,256"), "makes pictures of one size"),
        (("--level", "video", "--model", "flux-dev"), "flux-dev makes images"),
        (("--level", "image", "--model", "hunyuan"), "hunyuan makes videos"),
        (("--level", "video", "--model", "demo", "--res", "480p,720p"), "makes videos of one size"),
        (("--level", "video", "--model", "demo", "--res", "720"), "--res 720: expected 720p"),
        (("--level", "video", "--model", "demo", "--frames", "0"), "--frames 0: expected 1 to"),
        (
            ("--level", "video", "--model", "demo", "--prompts", "99"),
            f"there are {len(VIDEO_PROMPTS)} built-in prompts",
        ),
        (("--level", "video", "--grid", "9x9x16"), "it is for attention and step"),
        (("--level", "video", "--compare", "line"), "did you mean 'lines'"),
        (("--level", "image", "--model", "demo", "--compare", "lines"), "lines are for videos"),
        (("--level", "image", "--frames", "9"), "--frames says nothing to --level image: it is for video"),
        (("--level", "step", "--steps", "9"), "--steps says nothing to --level step: it is for image and video"),
        (("--level", "image", "--steps", "0"), "--steps 0: expected 1 or more"),
        (("--json", "--quiet"), "--json and --quiet exclude each other"),
    ],
)
def test_mistakes_are_answered_in_a_line_or_two(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    assert words in refusal("bench", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_backend_by_name_runs_or_says_why_not() -> None:
    flex = ("bench", "--device", "cpu", "--backend", "flex", "--grid", "129x128", "--text", "0")
    assert "16512 tokens are more than" in refusal(*flex)
    done = grat("bench", "--backend", "reference", "--compare", "grat-b", *TINY, "--out", "a", "--json")
    assert done.data["cases"][0]["rows"][0]["kernel"] == "reference"


def test_completion_continues_a_list() -> None:
    assert complete_compare("") == [*NAMES, *SHORT_NAMES, *preset_names()]
    assert complete_compare("full,grat-b") == ["full,grat-b", "full,grat-bx"]
    assert complete_compare("full,fu") == ["full,full-list"]
    assert complete_peers("natten,") == [f"natten,{name}" for name in PEERS if name != "natten"]


def test_help_and_mistakes_load_no_torch() -> None:
    code = """
import sys
from grat_cli.app import run
codes = [run(["bench", *arguments]) for arguments in (
    ["--help"], ["--compare", "z"], ["--peers", "x"], ["--level", "x"], ["--out", "no/where"], ["--heads", "0"],
)]
print(codes, file=sys.stderr)
sys.exit(codes != [0, 2, 2, 2, 2, 2] or bool({"torch", "diffusers", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "full-list" in done.stdout
