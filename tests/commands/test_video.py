"""`grat video` with a tiny random model: options, messages, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import grat, refusal
from painter import Painter

from grat_cli.files.videos import probe_video
from grat_cli.models.catalogue import choose_model

SIZE = ("--res", "64x48", "--frames", "9", "--fps", "8")
SPARSE = ("--variant", "lines", "--group", "2x2x2")

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(scope="module")
def waves(hunyuan: Path) -> tuple[object, ...]:
    return ("video", "waves at night", "--model", hunyuan, *SIZE, *SPARSE, "--steps", "4")


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def test_videos_with_reports(waves: tuple[object, ...]) -> None:
    result = grat(*waves, "--seed", "3,5", "--out", "waves.mp4", "--json")
    assert result.code == 0, result.err
    assert names() == ["waves-s3.json", "waves-s3.mp4", "waves-s5.json", "waves-s5.mp4"]
    planned = grat("plan", *waves[2:], "--json").data
    for seed, made in zip((3, 5), result.data["videos"], strict=True):
        assert made["file"] == f"waves-s{seed}.mp4"
        assert {"file": made["file"], **json.loads(Path(f"waves-s{seed}.json").read_text())} == made
        assert (made["seed"], made["preset"]["name"], len(made["steps"])) == (seed, "hunyuan-lines", 4)
        assert made["grid"] == planned["grid"] == [3, 3, 4]
        assert made["density"] < 0.9
        assert list(made["phases"]) == ["load", "text", "denoise", "decode", "save"]
        assert set(made["phases"]) - set(made["memory"]) == (set() if seed == 3 else {"load", "text"})
        assert made["command"].startswith("grat video 'waves at night' --model ")
        facts = probe_video(Path(made["file"]))
        assert (facts.width, facts.height, facts.frames, facts.fps, facts.codec) == (64, 48, 9, 8, "h264")


def test_what_is_told_before_and_after(waves: tuple[object, ...]) -> None:
    result = grat(
        *waves[:4], "--res", "64x48", "--frames", "8", *SPARSE, "--steps", "4", "--seed", "7", "--out", "w.mp4"
    )
    first, *rest = result.out.splitlines()
    assert first == "w.mp4"
    for words in ("all 4", "denoise", "save", "peak memory: load"):
        assert words in "\n".join(rest)
    told = result.err.splitlines()
    assert "a folder of that name), 64x48, 9 frames at 24 per second" in told[0]
    assert "8 frames are rounded up to 9" in told[1]
    assert told[2:5] == [
        "hunyuan-lines: x share 2, groups 2x2x2, 4 steps",
        "seed 7",
        "planned time: about 2 s",
    ]
    assert told.index("loading") > 4
    assert told[-1] == "saving"
    quiet = grat(*waves, "--seed", "7,8", "--out", "q.mp4", "--quiet")
    assert (quiet.out, quiet.err) == ("q-s7.mp4\nq-s8.mp4\n", "")


def test_the_default_name_tells_what_the_video_is(waves: tuple[object, ...]) -> None:
    result = grat(*waves, "--seed", "7", "--quiet")
    name = r"grat-\d{8}-\d{6}-waves-at-night-64x48x9-lines-s7"
    assert re.fullmatch(rf"{name}\.mp4\n", result.out)
    assert names() == [result.out.strip().replace(".mp4", ".json"), result.out.strip()]


def test_options_reach_the_request(waves: tuple[object, ...], painter: Painter) -> None:
    more = ("--guidance", "3", "--negative", "a boat", "--share", "1", "--set", "schedule.dense_steps=1")
    rest = ("--backend", "reference", "--device", "cpu", "--dtype", "bfloat16", "--offload", "model", "--crf", "30")
    last = ("--save-latents", "--checkpoint-every", "2", "--overwrite", "--no-metadata", "--out", "o.webm", "--n", "2")
    assert grat(*waves, "--seed", "1", *more, *rest, *last).code == 0
    assert grat(*waves[:4], "--aspect", "9:16", "--res", "48p", "--seconds", "0.9", "--format", "frames").code == 0
    first, second = painter.requests
    assert (first.seeds, first.negative_prompt, first.fps, first.frames) == ((1, 2), "a boat", 8, 9)
    assert (first.device, first.dtype, first.offload) == ("cpu", "bfloat16", "model")
    assert (first.format, first.quality, first.save_latents, first.checkpoint_every) == ("webm", 30, True, 2)
    assert (first.overwrite, first.metadata) == (True, False)
    assert [path.name for path in first.outputs] == ["o-s1.webm", "o-s2.webm"]
    sampling, attention = first.preset.sampling, first.preset.attention
    assert (sampling.steps, sampling.guidance, attention.share, attention.group) == (4, 3, 1, (2, 2, 2))
    assert (first.preset.kernel.backend, first.preset.schedule.dense_steps) == ("reference", 1)
    assert (second.width, second.height, second.frames, second.format) == (48, 80, 25, "frames")
    assert (second.checkpoint_every, second.quality, second.outputs[0].suffix) == (None, None, "")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--res", "huge"), "--res huge: expected 720p"),
        (("--res", "65x48"), "multiples of 16"),
        (("--aspect", "wide", "--res", "48p"), "--aspect wide: expected a ratio"),
        (("--seconds", "2"), "--seconds and --frames both say"),
        (("--fps", "0"), "--fps 0"),
        (("--format", "avi"), "--format avi"),
        (("--out", "waves.avi"), "--out waves.avi: videos are mp4, webm or gif files"),
        (("--out", "waves.gif", "--format", "mp4"), "waves.gif"),
        (("--crf", "99"), "--crf 99: expected 1"),
        (("--checkpoint-every", "-1"), "--checkpoint-every -1: expected steps, 0 for none"),
        (("--guard", "2"), "--guard 2.0: expected a share from 0 to 1, such as 0.9, or 0 for none, not 2.0"),
        (("--variant", "planse"), "there is no variant 'planse': did you mean 'planes'?"),
        (("--preset", "flux-x"), "preset flux-x is for flux models"),
        (("--device", "gpu"), "--device gpu:"),
        (("--json", "--quiet"), "--json and --quiet exclude each other"),
        (("--out", "missing/waves.mp4"), "the folder missing does not exist"),
        (("--rse", "48p"), "grat video has no option --rse: did you mean --res?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(waves: tuple[object, ...], options: tuple[str, ...], complaint: str) -> None:
    given = [word for word in waves if word not in SPARSE or not {"--variant", "--preset"} & set(options)]
    assert complaint in refusal(*given, *options)
    assert names() == []


def test_other_refusals(waves: tuple[object, ...]) -> None:
    assert "the prompt is empty: try grat video" in refusal("video", " ")
    assert "use it with grat image" in refusal("video", "waves", "--model", "flux-dev")
    refusal("video", "waves", "--model", "missing/folder/deep", code=3)
    for path in ("w.json", "v.checkpoint.safetensors"):
        Path(path).write_text("precious")
    assert "w.json exists: use --overwrite" in refusal(*waves, "--out", "w.mp4")
    assert "go on with it (grat resume v.checkpoint.safetensors), or use --overwrite" in refusal(
        *waves, "--out", "v.mp4"
    )
    assert "there is nothing to go on with" in refusal("resume", "other.mp4")
    assert "v.checkpoint.safetensors is not a safetensors file" in refusal("resume", "v.mp4")
    assert "there is nothing to go on with" in refusal("decode", "other.latents.safetensors")
    assert "--tile 50: expected a multiple of 16 from 64 up" in refusal("decode", "v.mp4", "--tile", "50")


@pytest.mark.parametrize("format_name", ["gif", "webm", "frames"])
def test_formats(waves: tuple[object, ...], format_name: str) -> None:
    result = grat(*waves, "--seed", "7", "--format", format_name, "--quiet")
    assert result.code == 0, result.err
    facts = probe_video(Path(result.out.strip()))
    assert (facts.width, facts.height, facts.frames) == (64, 48, 9)


def test_metadata_is_in_the_file_unless_left_out(waves: tuple[object, ...]) -> None:
    grat(*waves, "--seed", "7", "--out", "with.mp4")
    grat(*waves, "--seed", "7", "--out", "without.mp4", "--no-metadata")
    assert b"waves at night" in Path("with.mp4").read_bytes()
    assert b"waves at night" not in Path("without.mp4").read_bytes()
    for name in ("with.json", "without.json"):
        Path(name).unlink()
    shown = grat("info", "with.mp4").out
    for words in ("waves at night", "64x48, 9 frames at 8 per second (1.12 s)", "hunyuan-lines", "x share 2"):
        assert words in shown
    refusal("info", "without.mp4")


def test_the_model_that_is_chosen_is_told(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    demo = choose_model("demo", medium="video")
    result = grat("video", "waves", "--seed", "7")
    assert result.err.startswith("demo (no CUDA device is present), 256x144, 33 frames at 24 per second\n")
    assert painter.requests[0].model.source == demo.source
