"""`grat video`, `resume` and `decode` with a tiny random model: options, messages, exit codes, and being killed."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hunyuan
import torch
from command_line import Result, grat, refusal
from PIL import Image
from safetensors.torch import load_file, save_file

from grat_cli.commands import video_output
from grat_cli.files.videos import probe_video
from grat_cli.generation import video_decoding
from grat_cli.models.catalogue import choose_model

KILLS = int(os.environ.get("GRAT_TEST_KILLS", "3"))
SIZE = ("--res", "64x48", "--frames", "9", "--fps", "8")
SPARSE = ("--variant", "lines", "--group", "2x2x2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hunyuan.save(tmp_path_factory.mktemp("model") / "tiny", guidance_embeds=False)


@pytest.fixture(scope="module")
def waves(model: Path) -> tuple[object, ...]:
    return ("video", "waves at night", "--model", model, *SIZE, *SPARSE, "--steps", "4")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Measuring the machine takes longer than the videos.
    monkeypatch.setattr("grat_cli.estimates.time.planned_seconds", lambda *_: 2.0)


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
        assert list(made["phases"]) == ["load", "text", "denoise", "decode", "encode"]
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
    for words in ("all 4", "denoise", "encode", "peak memory: load"):
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
    assert told[-1] == "writing the video"
    quiet = grat(*waves, "--seed", "7,8", "--out", "q.mp4", "--quiet")
    assert (quiet.out, quiet.err) == ("q-s7.mp4\nq-s8.mp4\n", "")


def test_the_default_name_tells_what_the_video_is(waves: tuple[object, ...]) -> None:
    result = grat(*waves, "--seed", "7", "--quiet")
    name = r"grat-\d{8}-\d{6}-waves-at-night-64x48x9-lines-s7"
    assert re.fullmatch(rf"{name}\.mp4\n", result.out)
    assert names() == [result.out.strip().replace(".mp4", ".json"), result.out.strip()]


def test_options_reach_the_request(waves: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Any] = []
    monkeypatch.setattr(video_output, "make_videos", lambda request, output: requests.append(request))
    more = ("--guidance", "3", "--negative", "a boat", "--share", "1", "--set", "schedule.dense_steps=1")
    rest = ("--backend", "reference", "--device", "cpu", "--dtype", "bfloat16", "--offload", "model", "--crf", "30")
    last = ("--save-latents", "--checkpoint-every", "2", "--overwrite", "--no-metadata", "--out", "o.webm", "--n", "2")
    assert grat(*waves, "--seed", "1", *more, *rest, *last).code == 0
    assert grat(*waves[:4], "--aspect", "9:16", "--res", "48p", "--seconds", "0.9", "--format", "frames").code == 0
    first, second = requests
    assert (first.seeds, first.negative_prompt, first.fps, first.frames) == ((1, 2), "a boat", 8, 9)
    assert (first.device, first.dtype, first.offload) == ("cpu", "bfloat16", "model")
    assert (first.format, first.crf, first.save_latents, first.checkpoint_every) == ("webm", 30, True, 2)
    assert (first.overwrite, first.metadata) == (True, False)
    assert [path.name for path in first.outputs] == ["o-s1.webm", "o-s2.webm"]
    sampling, attention = first.preset.sampling, first.preset.attention
    assert (sampling.steps, sampling.guidance, attention.share, attention.group) == (4, 3, 1, (2, 2, 2))
    assert (first.preset.kernel.backend, first.preset.schedule.dense_steps) == ("reference", 1)
    assert (second.width, second.height, second.frames, second.format) == (48, 80, 25, "frames")
    assert (second.checkpoint_every, second.crf, second.outputs[0].suffix) == (0, None, "")


@pytest.mark.parametrize(("planned_s", "steps", "every"), [(299, 50, 0), (300, 50, 20), (6000, 50, 1), (60000, 50, 1)])
def test_checkpoints_of_long_runs(planned_s: float, steps: int, every: int) -> None:
    assert video_output.checkpoint_interval(planned_s, steps) == every


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


def test_decode_makes_the_same_video_and_others(waves: tuple[object, ...], model: Path) -> None:
    made = grat(*waves, "--seed", "7", "--format", "frames", "--out", "whole", "--save-latents", "--json").data[
        "videos"
    ][0]
    latents = "whole.latents.safetensors"
    assert "waves at night" in grat("info", latents).out
    assert "whole.json exists: use --overwrite" in refusal("decode", latents, "--format", "mp4")
    result = grat("decode", latents, "--out", "again", "--json")
    assert result.code == 0, result.err
    (again,) = result.data["videos"]
    for one, other in zip(sorted(Path("whole").iterdir()), sorted(Path("again").iterdir()), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
    assert again["decoded"]["command"] == f"grat decode {latents} --out again --json"
    for name in ("prompt", "seed", "preset", "steps", "density", "command", "frames"):
        assert again[name] == made[name]
    more = ("--model", model, "--device", "cpu", "--dtype", "bfloat16", "--fps", "4", "--tile", "64", "--crf", "30")
    assert grat("decode", "whole", "--out", "slow.mp4", *more, "--quiet").out == "slow.mp4\n"
    facts = probe_video(Path("slow.mp4"))
    assert (facts.frames, facts.fps) == (9, 4)
    report = json.loads(Path("slow.json").read_text())
    assert (report["fps"], report["seconds"], report["crf"], report["decoded"]["tile"]) == (4, 2.25, 30, 64)


def dying_ffmpeg(folder: Path) -> Path:
    """An ffmpeg that lists its encoders and dies of the first frame."""
    path = folder / "ffmpeg"
    path.write_text(
        '#!/bin/sh\ncase "$*" in *-encoders*) echo " V....D libx264 H.264";; *) head -c 10 >/dev/null; exit 1;; esac\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_latents_outlive_what_ends_a_run_late(
    waves: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    advice = "its latents are kept: go on with grat decode a.latents.safetensors"
    grat(*waves, "--seed", "7", "--format", "frames", "--out", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(video_decoding, "decode", no_memory)
        result = grat(*waves, "--seed", "7", "--out", "a.mp4")
        assert result.code == 4
        assert result.err.splitlines()[-2:] == [
            f"error: too little memory to decode 64x48x9 with {waves[3]}",
            f"{advice} --tile 128",
        ]
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(dying_ffmpeg(tmp_path_factory.mktemp("bin"))))
        result = grat(*waves, "--seed", "7", "--out", "a.mp4", "--overwrite")
        assert result.code == 2
        assert result.err.splitlines()[-1] == advice
    assert names() == ["a.latents.safetensors", "whole", "whole.json"]
    assert grat("decode", "a.latents.safetensors", "--format", "frames", "--quiet").out == "a\n"
    for one, other in zip(sorted(Path("whole").iterdir()), sorted(Path("a").iterdir()), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def begin(arguments: tuple[object, ...], **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grat_cli", *map(str, arguments)]
    # As many threads as the tests' own process has: sums over another number of them round differently.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def long_run(model: Path, out: str) -> tuple[object, ...]:
    """A run whose steps take about a tenth of a second, each with a checkpoint; its guard widens some layers."""
    size = ("--res", "192x160", "--frames", "33", *SPARSE, "--steps", "12", "--seed", "7", "--guard", "0.8")
    return (
        "video",
        "waves at night",
        "--model",
        model,
        *size,
        "--format",
        "frames",
        "--out",
        out,
        "--checkpoint-every",
        "1",
    )


def wait_for_step(run: subprocess.Popen[str], step: int) -> None:
    """Returns when a run has kept so many steps."""
    from grat_cli.files.tensors import read_about

    path = Path("killed.checkpoint.safetensors")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.is_file() and (about := read_about(path)) and about["steps_done"] >= step:
            return
        assert run.poll() is None, run.communicate()
        time.sleep(0.005)
    raise TimeoutError


def frames(folder: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_frames(model: Path) -> None:
    """GRAT_TEST_KILLS says how often."""
    whole = grat(*long_run(model, "whole"), "--json").data["videos"][0]
    steps = sorted(random.Random(KILLS).choices(range(1, 12), k=KILLS))
    arguments = long_run(model, "killed")
    for step in steps:
        run = begin(arguments)
        wait_for_step(run, step)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        run.communicate()
        arguments = ("resume", "killed")
    result: Result = grat("resume", "killed.checkpoint.safetensors", "--json")
    assert result.code == 0, result.err
    for one, other in zip(frames("whole"), frames("killed"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert whole["guard"]["widened"]
    (made,) = result.data["videos"]
    changing = {"file", "created", "command", "phases", "memory", "peak_memory_bytes", "steps"}
    assert {name: value for name, value in made.items() if name not in changing} == {
        name: value for name, value in whole.items() if name not in changing
    }
    assert [(step["index"], step["timestep"]) for step in made["steps"]] == [
        (step["index"], step["timestep"]) for step in whole["steps"]
    ]
    assert {"killed", "killed.json", "whole", "whole.json"} == set(names())


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C is no signal")
def test_ctrl_c_says_how_to_go_on(model: Path) -> None:
    # A shell's background jobs ignore Ctrl-C, and so would a run that tests begin from there.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    run = begin(long_run(model, "killed"), preexec_fn=heed)
    wait_for_step(run, 2)
    run.send_signal(signal.SIGINT)
    _, told = run.communicate(timeout=300)
    assert run.returncode == 130
    match = re.fullmatch(
        r"error: interrupted after step (\d+) of 12; go on with grat resume killed\.checkpoint\.safetensors",
        told.splitlines()[-1],
    )
    assert match, told
    shown = grat("info", "killed.checkpoint.safetensors").out
    assert f"{match[1]} of 12 are done" in shown
    assert "grat resume does the rest" in refusal("decode", "killed.checkpoint.safetensors")


def interrupted_run(waves: tuple[object, ...], out: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Leaves a checkpoint of the third step beside an output, and returns what it says."""
    from grat_cli.files.tensors import read_about

    def step(self: Any, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grat_cli.console.progress.LogProgress.step", step)
        assert grat(*waves, "--seed", "7", "--out", out).code == 130
    about = read_about(Path(out).with_suffix(".checkpoint.safetensors"))
    assert about is not None
    return about


def tampered(path: Path, about: dict[str, Any], **request: Any) -> None:
    """Makes a checkpoint say something else."""
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path, {"grat": json.dumps({**about, "request": {**about["request"], **request}})})


def test_a_checkpoint_does_not_say_what_is_replaced(waves: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    about = interrupted_run(waves, "a.mp4", monkeypatch)
    kept, precious = Path("a.checkpoint.safetensors"), {".bashrc": "alias", "a.json": "mine", ".json": "mine"}
    tampered(kept, about, outputs=[".bashrc"], overwrite=True)
    for name, content in precious.items():
        Path(name).write_text(content)
    assert "a.json exists: use --overwrite, or another --out" in refusal("resume", kept)
    Path("a.json").rename("b.txt")
    result = grat("resume", kept, "--quiet")
    assert (result.code, result.out) == (0, "a.mp4\n"), result.err
    assert names() == [".bashrc", ".json", "a.json", "a.mp4", "b.txt"]
    assert (Path(".bashrc").read_text(), Path(".json").read_text()) == ("alias", "mine")


def test_a_run_goes_on_where_it_is_told(waves: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_run(waves, "a.mp4", monkeypatch)
    Path("b.mp4").write_text("precious")
    assert "b.mp4 exists: use --overwrite, or another --out" in refusal("resume", "a.mp4", "--out", "b.mp4")
    assert "these videos are mp4 files" in refusal("resume", "a.mp4", "--out", "b.webm")
    assert Path("b.mp4").read_text() == "precious"
    assert grat("resume", "a.mp4", "--out", "b.mp4", "--overwrite", "--quiet").out == "b.mp4\n"
    assert names() == ["a.checkpoint.safetensors", "b.json", "b.mp4"]
    Path("c.checkpoint.safetensors").write_bytes(Path("a.checkpoint.safetensors").read_bytes())
    Path("c.latents.safetensors").write_text("of another run")
    assert "c.latents.safetensors of another run exists" in refusal("resume", "c.checkpoint.safetensors")
    Path("c.latents.safetensors").unlink()
    assert grat("resume", "c.checkpoint.safetensors", "--quiet").out == "c.mp4\n"
    assert names() == ["a.checkpoint.safetensors", "b.json", "b.mp4", "c.json", "c.mp4"]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"format": "exe"}, "format: "),
        ({"frames": 10**12}, "frames: "),
        ({"device": "cuda:0; rm"}, "device: "),
        ({"model": {"name": "m", "source": "models/m", "kind": "folder"}}, "model.source: not an absolute path"),
    ],
    ids=str,
)
def test_checkpoints_that_ask_for_what_cannot_be_typed_are_refused(
    waves: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, request_: dict[str, Any], says: str
) -> None:
    kept = Path("a.checkpoint.safetensors")
    tampered(kept, interrupted_run(waves, "a.mp4", monkeypatch), **request_)
    message = refusal("resume", kept)
    assert message.startswith(f"{kept} cannot be gone on with: ")
    assert says in message
    assert len(message.splitlines()) == 1
    assert says in refusal("decode", kept)


def test_the_model_of_a_checkpoint_is_not_looked_for_elsewhere(
    waves: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, gone = Path("a.checkpoint.safetensors"), Path("gone").resolve()
    tampered(
        kept, interrupted_run(waves, "a.mp4", monkeypatch), model={"name": "m", "source": str(gone), "kind": "folder"}
    )
    assert f"no model, folder or file is named '{gone}'" in refusal("resume", kept, code=3)


def test_two_runs_of_one_name_do_not_meet(model: Path) -> None:
    run = begin(long_run(model, "killed"))
    wait_for_step(run, 1)
    assert "of another run exists" in refusal(*long_run(model, "killed"))
    second = grat(*long_run(model, "killed"), "--overwrite")
    assert (second.code, "another grat is making killed: wait for it" in second.err) == (2, True)
    out, _ = run.communicate(timeout=300)
    assert (run.returncode, out.splitlines()[0]) == (0, "killed")
    assert names() == ["killed", "killed.json"]


def test_the_model_that_is_chosen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Any] = []
    monkeypatch.setattr(video_output, "make_videos", lambda request, output: requests.append(request))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    demo = choose_model("demo", medium="video")
    result = grat("video", "waves", "--seed", "7")
    assert result.err.startswith("demo (no CUDA device is present), 256x144, 33 frames at 24 per second\n")
    assert requests[0].model.source == demo.source
