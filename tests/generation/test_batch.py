"""`grat batch`: one loaded model, layouts as evaluators read them, and batches that were broken off."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Result, grat, refusal
from PIL import Image
from rich.console import Console
from small_batches import GENEVAL, SMALL, fail_at, files, pixels, write_lines
from workers import begin, instead, needs_fork

from grat_cli.console.output import Output
from grat_cli.console.progress import LiveProgress, batch_text
from grat_cli.families.picture_coding import decode as decode_picture
from grat_cli.files.stores import LocalStore
from grat_cli.files.videos import read_frames
from grat_cli.files.whole import write_whole
from grat_cli.generation import batch_worker
from grat_cli.generation import run as generation
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import LoadedModel, load_model

SMALL_VIDEO = ("--res", "64x48", "--frames", "5", "--fps", "8", "--variant", "lines", "--group", "2x2x2")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Measuring the machine takes longer than the videos.
    monkeypatch.setattr("grat_cli.estimates.time.planned_seconds", lambda *_: 2.0)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_model(choose_model("demo"), device=torch.device("cpu"), dtype=torch.float32).pipe


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, demo: Any) -> list[str]:
    """The models that were loaded; all of them are the demo, loaded once for all tests."""
    names: list[str] = []

    def load(choice: Any, **_: Any) -> LoadedModel:
        names.append(choice.name)
        return LoadedModel(demo, None)

    monkeypatch.setattr(generation, "load_model", load)
    return names


@pytest.fixture(params=["image", "video"])
def small(request: pytest.FixtureRequest, video_model: Path) -> tuple[object, ...]:
    """Model and size of pictures or videos."""
    return ("--model", video_model, *SMALL_VIDEO, "--steps", "2") if request.param == "video" else SMALL


def test_a_batch_makes_the_pictures_of_grat_image_with_one_loaded_model(loads: list[str]) -> None:
    write_lines("p.jsonl", {"prompt": "a red fox", "seed": 3, "n": 2, "tag": "kept"}, {"prompt": "a blue boat"})
    result = grat("batch", "p.jsonl", *SMALL, "--out", "b", "--negative", "snow", "--json")
    assert result.code == 0, result.err
    assert loads == ["demo"]
    data = result.data
    assert (data["layout"], data["folder"], data["skipped"], data["failed"]) == ("plain", "b", 0, [])
    asked = [(made["prompt"], made["negative_prompt"], made["seed"]) for made in data["made"]]
    assert asked == [("a red fox", "snow", 3), ("a red fox", "snow", 4), ("a blue boat", "snow", 0)]
    for number, made in enumerate(data["made"]):
        name = r"b/grat-\d{8}-\d{6}-a-(red-fox|blue-boat)-64x64-b-far-s\d\.png"
        assert re.fullmatch(name, made["file"])
        seed = ("--seed", made["seed"])
        alone = grat("image", made["prompt"], *SMALL, *seed, "--negative", "snow", "--out", f"{number}.png", "--json")
        np.testing.assert_array_equal(pixels(made["file"]), pixels(f"{number}.png"))
        report, expected = json.loads(Path(made["report"]).read_text()), alone.data["images"][0]
        changing = {"created", "command", "phases", "steps", "stages", "memory", "peak_memory_bytes", "file", "batch"}
        assert {name: report[name] for name in report.keys() - changing} == {
            name: expected[name] for name in expected.keys() - changing
        }
        assert list(report["phases"]) == ["load", "text", "denoise", "decode", "save"]
        # What is done once is counted once.
        assert [report["phases"][name] > 0 for name in ("load", "text")] == [number == 0, number != 1]
        assert report["batch"]["place"] == ("line 2" if number == 2 else "line 1")
    assert report["batch"] == {
        "file": "p.jsonl",
        "place": "line 2",
        "sample": 0,
        "layout": "plain",
        "item": {"prompt": "a blue boat"},
    }
    assert "a blue boat" in grat("info", data["made"][2]["file"]).out
    assert "without meaning here" not in result.err


def test_what_to_keep_out_is_that_of_reports_too_and_other_keys_are_named() -> None:
    write_lines("p.jsonl", {"prompt": "a red fox", "negative_prompt": "snow", "steps": 50, "negativ": "rain"})
    result = grat("batch", "p.jsonl", *SMALL, "--out", "b", "--negative", "nothing of that", "--json")
    assert result.code == 0, result.err
    assert result.data["made"][0]["negative_prompt"] == "snow"
    assert "p.jsonl: kept, but without meaning here: steps, negativ" in result.err


def test_a_damaged_file_of_geneval_in_the_way_is_refused() -> None:
    write_lines("p.jsonl", {"prompt": "a red fox", "tag": "colors", "include": []})
    Path("b/00000").mkdir(parents=True)
    Path("b/00000/metadata.jsonl").write_bytes(b"\xff\xfe")
    assert "is of another prompt than line 1" in refusal(
        "batch", "p.jsonl", *SMALL, "--layout", "geneval", "--out", "b"
    )


def test_what_is_there_is_skipped_and_what_is_missing_made(loads: list[str]) -> None:
    write_lines("p.txt", "a red fox", "a blue boat at night", "a red fox")
    arguments = ("batch", "p.txt", *SMALL, "--out", "b", "--n", "2")
    first = grat(*arguments)
    assert "1 of the prompts stand there before" in first.err
    assert first.out.splitlines()[-1] == "4 made, 0 there before, 0 failed, in b"
    assert "4 of 4 done" in first.err
    before = files("b")
    assert len(before) == 8

    nothing = grat(*arguments)
    assert (nothing.code, nothing.out) == (0, "0 made, 4 there before, 0 failed, in b\n")
    assert "4 of them are there already" in nothing.err
    assert (files("b"), loads) == (before, ["demo"])  # nothing was loaded for nothing

    lost = next(name for name in before if name.endswith(".png"))
    Path("b", lost).unlink()
    again = grat(*arguments, "--quiet")
    assert again.out == f"b/{lost}\n"
    after = files("b")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {lost, str(Path(lost).with_suffix(".json"))}
    assert grat(*arguments, "--n", "3", "--json").data["skipped"] == 4


# What evaluation/evaluate_images.py of GenEval does with a folder of images, as far as files are concerned.
def geneval_images(folder: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    for subfolder in os.listdir(folder):
        path = folder / subfolder
        if not path.is_dir() or not subfolder.isdigit():
            continue
        with open(path / "metadata.jsonl") as file:
            metadata = json.load(file)
        for name in os.listdir(path / "samples"):
            image = path / "samples" / name
            if not image.is_file() or not re.match(r"\d+\.png", name):
                continue
            yield metadata, image


def test_geneval_reads_what_it_is_given(loads: list[str]) -> None:
    write_lines("evaluation_metadata.jsonl", *GENEVAL)
    arguments = ("batch", "evaluation_metadata.jsonl", "--layout", "geneval", *SMALL)
    result = grat(*arguments, "--json")
    assert result.code == 0, result.err
    folder = Path(result.data["folder"])
    assert str(folder) == "evaluation_metadata-geneval"
    read = sorted(geneval_images(folder), key=lambda pair: str(pair[1]))
    assert [str(path.relative_to(folder)) for _, path in read] == [
        f"{prompt:05}/samples/{sample:04}.png" for prompt in range(2) for sample in range(4)
    ]
    for number, (metadata, path) in enumerate(read):
        assert metadata == GENEVAL[number // 4]
        assert pixels(path).shape == (64, 64, 3)
        report = json.loads((folder / "reports" / f"{number // 4:05}-{number % 4:04}.json").read_text())
        assert (report["prompt"], report["seed"]) == (metadata["prompt"], number % 4)
        assert report["batch"]["item"] == metadata
    assert {path.name for path in folder.iterdir()} == {"00000", "00001", "reports"}
    assert all(len((folder / name / "metadata.jsonl").read_text().splitlines()) == 1 for name in ("00000", "00001"))


def test_a_folder_of_other_options_is_not_gone_on_with(loads: list[str]) -> None:
    write_lines("g.jsonl", *GENEVAL)
    arguments = ("batch", "g.jsonl", "--layout", "geneval", *SMALL, "--n", "1", "--out", "g")
    assert grat(*arguments).code == 0
    before = files("g")
    first = "g/00000/samples/0000.png was made with other options"
    assert f"{first} (sampling): to go on, give the same" in refusal(*arguments, "--steps", "3")
    assert f"{first} (seed)" in refusal(*arguments, "--seed", "4")
    assert f"{first} (size, attention)" in refusal(*arguments, "--res", "128", "--radius", "2")
    write_lines("g.jsonl", *reversed(GENEVAL))
    assert "g/00000/metadata.jsonl is of another prompt than line 1 of g.jsonl" in refusal(*arguments)
    assert files("g") == before
    Path("g/reports/00000-0000.json").unlink()
    write_lines("g.jsonl", *GENEVAL)
    assert "g/00000/samples/0000.png exists and has no report" in refusal(*arguments)

    result = grat(*arguments, "--overwrite", "--json")  # the other one is as it should be
    assert (len(result.data["made"]), result.data["skipped"]) == (1, 1)
    changed = {name for name, when in files("g").items() if when != before[name]}
    assert changed == {"00000/samples/0000.png", "reports/00000-0000.json"}


def test_a_report_without_its_picture_is_written_again(loads: list[str]) -> None:
    """A process that is killed between the two leaves that."""
    write_lines("g.jsonl", GENEVAL[0])
    arguments = ("batch", "g.jsonl", "--layout", "geneval", *SMALL, "--n", "1", "--out", "g")
    grat(*arguments)
    Path("g/00000/samples/0000.png").unlink()
    assert grat(*arguments, "--json").data["skipped"] == 0
    assert Path("g/00000/samples/0000.png").is_file()


def test_a_numerical_failure_is_told_and_the_rest_goes_on(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("p.jsonl", *({"prompt": f"a {what}", "seed": seed} for seed, what in enumerate(("fox", "cat", "boat"))))
    arguments = ("batch", "p.jsonl", *SMALL, "--out", "b")
    with monkeypatch.context() as patch:
        fail_at(1, patch)
        result = grat(*arguments)
        assert result.code == 5
        assert result.out.splitlines()[-2:] == [
            "2 made, 0 there before, 1 failed, in b",
            "failed: a cat (seed 1): the picture has NaN after decoding: try --dtype float32",
        ]
        error = result.err.split("error: ")[1].splitlines()
        assert re.fullmatch(r"1 of 3 failed: b/grat-.*-a-cat-64x64-b-far-s1\.png", error[0])
        assert error[1] == (
            "the picture has NaN after decoding: try --dtype float32; the same command tries these again"
        )
        assert len(error) == 2
        as_json = grat(*arguments, "--json")
        assert (as_json.code, as_json.data["skipped"], as_json.data["made"]) == (5, 2, [])
        (failed,) = as_json.data["failed"]
        assert (failed["prompt"], failed["seed"]) == ("a cat", 1)
        assert failed["reason"].startswith("the picture has NaN")
    assert not [name for name in files("b") if "cat" in name]
    assert len(files("b")) == 4
    again = grat(*arguments, "--json")
    assert (again.code, again.data["skipped"], len(again.data["made"])) == (0, 2, 1)


def test_ctrl_c_says_how_far_it_got(loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("p.txt", "a red fox", "a blue boat")
    calls = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode_picture(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("grat_cli.families.picture_coding.decode", interrupted)
        result = grat("batch", "p.txt", *SMALL, "--out", "b")
    assert result.code == 130
    assert "interrupted after 1 of 2; the same command goes on with the others" in result.err
    (kept,) = (name for name in files("b") if name.startswith("unfinished"))
    assert kept.endswith(".latents.safetensors")
    assert len(files("b")) == 3
    assert grat("batch", "p.txt", *SMALL, "--out", "b").out.splitlines()[-1] == "1 made, 1 there before, 0 failed, in b"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("none.txt",), "cannot read none.txt"),
        (("p.txt", "--layout", "genevl"), "--layout genevl: did you mean 'geneval'?"),
        (("p.txt", "--layout", "geneval"), "line 1 has no tag and no include"),
        (
            ("p.txt", "--layout", "vbench", "--model", "flux-dev"),
            "--layout vbench is for videos, and flux-dev makes im",
        ),
        (("p.txt", "--layout", "geneval", "--model", "hunyuan"), "--layout geneval is for images, and hunyuan makes v"),
        (("p.txt", "--frames", "5", "--quality", "90"), "--quality is for pictures, and these are videos"),
        (("p.txt", "--layout", "geneval", "--fps", "5"), "--fps is for videos, and these are images"),
        (("g.jsonl", "--layout", "geneval", "--format", "jpg"), "--layout geneval takes png files, not jpg"),
        (("p.txt", "--layout", "vbench", "--format", "webm"), "--layout vbench takes mp4 or gif files, not webm"),
        (("slash.txt", "--layout", "vbench"), "line 1: VBench names videos after their prompts, and 'a/b'"),
        (("p.txt", "--seed", "1,2"), "--seed 1,2: expected a whole number"),
        (("p.txt", "--seed", "-1"), "--seed -1: seeds go from 0"),
        (("p.txt", "--n", "0"), "--n 0: expected 1 to 1000 samples"),
        (("p.txt", "--out", "b.png"), "--out b.png: a batch goes into a folder: use --out b"),
        (("p.txt", "--out", "p.txt"), "--out p.txt: a batch goes into a folder"),
        (("p.txt", "--out", "p.txt/b"), "cannot make the folder p.txt/b"),
        (("p.txt", "--res", "100"), "multiples of 16"),
        (("p.txt", "--checkpoint-every", "-1", "--frames", "5"), "--checkpoint-every -1: expected steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(arguments: tuple[str, ...], says: str) -> None:
    write_lines("p.txt", "a red fox")
    write_lines("slash.txt", "a/b")
    write_lines("g.jsonl", GENEVAL[0])
    model = () if "--model" in arguments else ("--model", "demo")
    assert says in refusal("batch", *arguments, *model)
    assert {path.name for path in Path().iterdir()} == {"p.txt", "slash.txt", "g.jsonl"}


# What vbench/__init__.py of VBench does with a folder of videos and its list of prompts.
def vbench_videos(folder: Path, full_info: list[dict[str, Any]], dimension: str) -> dict[str, list[str]]:
    names = os.listdir(folder)
    postfix = Path(names[0]).suffix
    found = {}
    for prompt in full_info:
        if dimension not in prompt["dimension"]:
            continue
        wanted = [f"{prompt['prompt_en']}-{index}{postfix}" for index in range(5)]
        found[prompt["prompt_en"]] = [name for name in wanted if name in names]
    return found


def test_vbench_reads_what_it_is_given(video_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[tuple[str, ...]] = []
    monkeypatch.setattr(generation, "release", lambda pipe, *parts: released.append(parts))
    long = "ö" * 120
    full_info = [
        {"prompt_en": "waves at night, in super slow motion", "dimension": ["scene"]},
        {"prompt_en": long, "dimension": ["scene", "color"], "auxiliary_info": {"color": "red"}},
        {"prompt_en": "waves at night, in super slow motion", "dimension": ["color"]},
    ]
    Path("VBench_full_info.json").write_text(json.dumps(full_info))
    arguments = ("batch", "VBench_full_info.json", "--layout", "vbench", "--model", video_model, *SMALL_VIDEO)
    arguments = (*arguments, "--steps", "2", "--n", "2", "--out", "v")
    result = grat(*arguments, "--json")
    assert result.code == 0, result.err
    assert result.data["folder"] == "v/videos"
    # Text encoders go before the first video is made, the transformer with the last one.
    assert released == [("text_encoder", "text_encoder_2"), ("transformer",)]
    assert "1 of the prompts stand there before" in result.err
    videos = vbench_videos(Path("v/videos"), full_info, "scene")
    assert videos == {prompt: [f"{prompt}-{index}.mp4" for index in range(2)] for prompt in videos}
    assert len(videos) == 2
    assert {path.name for path in Path("v").iterdir()} == {"videos", "reports"}
    assert {path.suffix for path in Path("v/videos").iterdir()} == {".mp4"}
    assert len(files("v/videos")) == len(files("v/reports")) == 4

    # Loading and reading are counted once, and the videos are those of grat video.
    reports = [json.loads(Path("v/reports", f"{long}-{index}.json").read_text()) for index in range(2)]
    assert [report["phases"]["text"] > 0 for report in reports] == [True, False]
    assert [report["phases"]["load"] > 0 for report in reports] == [False, False]
    assert reports[1]["batch"]["item"] == full_info[1]
    grat("video", long, "--model", video_model, *SMALL_VIDEO, "--steps", "2", "--seed", "1", "--out", "alone.mp4")
    for one, other in zip(read_frames(Path("v/videos", f"{long}-1.mp4")), read_frames(Path("alone.mp4")), strict=True):
        np.testing.assert_array_equal(one, other)

    before = files("v")
    assert grat(*arguments, "--json").data["skipped"] == 4
    assert files("v") == before
    assert "(sampling)" in refusal(*arguments, "--steps", "3")
    assert "(size, frame rate)" in refusal(*arguments, "--frames", "9", "--fps", "9")


def test_an_output_that_fails_leaves_nothing(small: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("p.jsonl", {"prompt": "waves", "seed": 1}, {"prompt": "a boat", "seed": 0})
    fail_at(1, monkeypatch)
    result = grat("batch", "p.jsonl", *small, "--out", "v")
    assert result.code == 5
    assert "failed: waves (seed 1): the picture has NaN after decoding" in result.out
    assert {path.suffix for path in Path("v").iterdir()} in ({".mp4", ".json"}, {".png", ".json"})
    assert all("a-boat" in path.name for path in Path("v").iterdir())


@pytest.mark.parametrize("format_name", ["png", "mp4", "frames"])
def test_an_output_that_is_written_but_not_in_its_place_is_not_made_again(
    video_model: Path, monkeypatch: pytest.MonkeyPatch, format_name: str
) -> None:
    write_lines("p.txt", "a boat")
    small = SMALL if format_name == "png" else ("--model", video_model, *SMALL_VIDEO, "--steps", "2")
    arguments: tuple[object, ...] = ("batch", "p.txt", *small, "--out", "v", "--format", format_name)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "place", interrupted)
        assert grat(*arguments).code == 130
    assert len(list(Path("v/unfinished").iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(generation.Generator, "make", interrupted)
        assert grat(*arguments).code == 0
    (made,) = (path for path in Path("v").iterdir() if path.suffix != ".json")
    assert pixels(made).shape == (64, 64, 3) if format_name == "png" else len(list(read_frames(made))) == 5
    assert {path.name for path in Path("v").iterdir()} == {made.name, f"{made.stem}.json"}


@needs_fork
@pytest.mark.parametrize("layout", ["geneval", "vbench"])
def test_a_batch_that_is_killed_goes_on_where_it_was(video_model: Path, layout: str) -> None:
    """In the middle of an output too, and with the same pixels."""
    small: tuple[object, ...] = ("--model", "demo", "--res", "384", "--steps", "4")  # in two stages
    if layout == "vbench":
        small = ("--model", video_model, "--res", "192x160", "--frames", "17", "--steps", "8")
        small = (*small, "--variant", "lines", "--group", "2x2x2")
    write_lines("p.jsonl", *({"prompt": prompt, "tag": "one", "include": []} for prompt in ("waves", "a boat")))
    arguments = ("batch", "p.jsonl", "--layout", layout, *small, "--n", "1", "--checkpoint-every", "1")
    whole = grat(*arguments, "--out", "whole")
    assert whole.code == 0, whole.err

    arguments = (*arguments, "--out", "killed")
    kept = "unfinished/a-boat-*.checkpoint.safetensors"
    in_the_second = instead(batch_worker.SaidOnce, "step", when=lambda *_: any(Path("killed").glob(kept)))
    worker = begin(*arguments, at_first=in_the_second)
    worker.wait_until_stopped()
    worker.kill()
    outputs = ("00000/samples/0000.png", "00001/samples/0000.png")
    if layout == "vbench":
        outputs = ("videos/waves-0.mp4", "videos/a boat-0.mp4")
    done = {name: when for name, when in files("killed").items() if "unfinished" not in name}
    assert [Path("killed", name).exists() for name in outputs] == [True, False]

    result: Result = grat(*arguments, "--json")
    assert (result.code, result.data["skipped"], len(result.data["made"])) == (0, 1, 1), result.err
    assert re.search(r"a-boat-s0-[0-9a-f]{12} goes on after step [1-8]", result.err)
    assert {name: when for name, when in files("killed").items() if name in done} == done
    read = read_frames if layout == "vbench" else lambda path: [pixels(path)]
    for name in outputs:
        frames = zip(read(Path("killed", name)), read(Path("whole", name)), strict=True)
        assert all((one == other).all() for one, other in frames)
    assert files("killed").keys() == files("whole").keys()


def test_a_terminal_shows_the_time_left_of_the_whole_batch() -> None:
    output, screen = Output(), io.StringIO()
    output.error_console = Console(file=screen, force_terminal=True, width=80)
    with output.progress() as progress:
        assert isinstance(progress, LiveProgress)
        progress.phase("load")
        progress.outputs(0, 3)
        progress.phase("denoise")
        progress.step(1, 2)
        progress.outputs(1, 3)
        progress.waiting(2)
    shown = screen.getvalue()
    assert "waiting for 2 that other workers make" in shown
    assert "0 of 3" in shown
    assert re.search(r"1 of 3 done, 0\.\d s each, \d s left", shown)


def test_times_are_told_in_whole_words() -> None:
    assert batch_text(1, 3, 4.06) == "1 of 3 done, 4.1 s each, 8 s left"
    assert batch_text(10, 553, 75.0) == "10 of 553 done, 1:15 each, 11:18:45 left"


def test_parts_of_files_with_long_names_fit_the_file_system(tmp_path: Path) -> None:
    path = tmp_path / ("ö" * 125 + ".mp4")
    write_whole(path, lambda file: file.write(b"whole"))
    assert path.read_bytes() == b"whole"
    assert [kept.name for kept in tmp_path.iterdir()] == [path.name]


def test_samples_are_made_from_the_pictures_of_their_entries(loads: list[str]) -> None:
    Path("in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save("in/a.png")
    for name, box in {"left.png": (0, 0, 32, 64), "right.png": (32, 0, 64, 64)}.items():
        white = Image.new("L", (64, 64))
        white.paste(255, box)
        white.save(Path("in") / name)
    boat = {"prompt": "a blue boat", "init_image": "a.png"}
    write_lines(
        "in/p.jsonl", {"prompt": "a blue boat"}, boat | {"mask": "left.png"}, boat | {"mask": "right.png"}, boat
    )
    small = (*SMALL, "--steps", "4")
    result = grat("batch", "in/p.jsonl", *small, "--out", "b", "--json")
    assert result.code == 0, result.err
    assert loads == ["demo"]
    made = [one["file"] for one in result.data["made"]]
    start = ("--init-image", "in/a.png")
    given = [(), *((*start, "--mask", f"in/{name}.png") for name in ("left", "right")), start]
    for number, (file, more) in enumerate(zip(made, given, strict=True)):
        alone = grat("image", "a blue boat", *small, "--seed", 0, *more, "--out", f"{number}.png")
        assert alone.code == 0, alone.err
        np.testing.assert_array_equal(pixels(file), pixels(f"{number}.png"))
    assert len({pixels(file).tobytes() for file in made}) == 4
    again = grat("batch", "in/p.jsonl", *small, "--out", "b", "--json").data
    assert (again["made"], again["skipped"]) == ([], 4)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"init_image": "none.png"}, "p.jsonl, line 2: --init-image none.png: there is no such file"),
        ({"reference": ["a.png"]}, "p.jsonl, line 2: demo takes no --reference: give --model "),
        ({"mask": {"rle": 3}}, "p.jsonl, line 2: mask must be the name of a picture, not "),
        ({"control": ["a.png"]}, "p.jsonl, line 2: control must be the name of a picture, not "),
    ],
)
def test_pictures_of_entries_that_do_not_fit_are_refused_with_their_place(item: dict[str, Any], says: str) -> None:
    Image.new("RGB", (64, 64)).save("a.png")
    write_lines("p.jsonl", '{"prompt": "a fox"}', {"prompt": "a boat"} | item)
    assert says in refusal("batch", "p.jsonl", *SMALL)
