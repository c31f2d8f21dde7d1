"""Videos with a tiny random model: against stock diffusers, broken off and taken up again, and how failures end."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hunyuan
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from grat_cli.errors import BadInput, CannotWrite, Interrupted, NumericalFailure, OutOfMemory
from grat_cli.files import outputs as media
from grat_cli.files import whole as whole_files
from grat_cli.files.checkpoint import CheckpointStore
from grat_cli.generation import video_decoding, video_run
from grat_cli.generation import videos as video_generation
from grat_cli.generation.video_decoding import MadeVideo
from grat_cli.generation.video_request import VideoRequest, check_video, request_data, request_from_data
from grat_cli.generation.video_run import VideoRun, find_run, read_run
from grat_cli.generation.videos import generate_videos
from grat_cli.models.catalogue import ModelChoice, choose_model
from grat_cli.models.loading import LoadedModel
from grat_cli.presets import Preset

WIDTH, HEIGHT, FRAMES, STEPS = 64, 48, 9, 5  # 3 x 3 x 4 tokens: ragged groups of 2
PROMPT = "waves at night"


class Progress:
    """Keeps what it is told; breaks off after a step if it is to."""

    def __init__(self, break_off_after: int | None = None, at_phase: str | None = None) -> None:
        self.events: list[Any] = []
        self.notes: list[str] = []
        self._break_off_after, self._at_phase = break_off_after, at_phase

    def phase(self, name: str) -> None:
        self.events.append(name)
        if name == self._at_phase:
            raise KeyboardInterrupt

    def step(self, done: int, total: int) -> None:
        self.events.append((done, total))
        if done == self._break_off_after:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hunyuan.save(tmp_path_factory.mktemp("tiny") / "hunyuan", guidance_embeds=False)


@pytest.fixture(scope="session")
def model(folder: Path) -> ModelChoice:
    return choose_model(str(folder), medium="video")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline that generations get, to be tampered with."""
    pipe = tiny_hunyuan.pipeline(guidance_embeds=False)
    monkeypatch.setattr(video_generation, "load_model", lambda *_, **__: LoadedModel(pipe, None))
    monkeypatch.setattr(video_generation, "release", lambda *_: None)
    monkeypatch.setattr(video_decoding, "load_autoencoder", lambda *_, **__: pipe)
    return pipe


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Frames by file name, in place of encoded videos."""
    videos: dict[str, np.ndarray] = {}

    def write_video(frames: Iterator[np.ndarray], path: Path, **_: Any) -> None:
        videos[path.name] = np.stack(list(frames))
        path.write_bytes(b"a video")

    monkeypatch.setattr(video_decoding, "write_video", write_video)
    return videos


def preset(variant: str = "x", **sections: Any) -> Preset:
    shares = {"share": 2} if variant == "x" else {}
    return Preset.model_validate(
        {
            "name": "test",
            "model": "hunyuan",
            "attention": {"variant": variant, "group": [2, 2, 2], **shares},
            "schedule": {"dense_steps": 2},
            "sampling": {"steps": STEPS, "guidance": 2.0},
            **sections,
        }
    )


def request(model: ModelChoice, *outputs: Path, **changes: Any) -> VideoRequest:
    seeds = tuple(range(7, 7 + len(outputs)))
    asked = VideoRequest(
        PROMPT, preset(), model, WIDTH, HEIGHT, seeds, frames=FRAMES, fps=8, outputs=outputs, device="cpu"
    )
    return replace(asked, **changes)


def generate(asked: VideoRequest, progress: Progress | None = None, begun: VideoRun | None = None) -> list[MadeVideo]:
    return list(generate_videos(asked, progress or Progress(), begun))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def untimed(report: Any) -> dict[str, Any]:
    """A report without what differs from run to run."""
    costs = ("created", "phases", "memory", "peak_memory_bytes", "steps", "command")
    steps = [(step["index"], step["timestep"], step["density"]) for step in report["steps"]]
    return {name: value for name, value in report.items() if name not in costs} | {"steps": steps}


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT, FRAMES), (48, 80, 25)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_full_attention_gives_the_stock_frames(
    loaded: Any,
    written: dict[str, np.ndarray],
    model: ModelChoice,
    tmp_path: Path,
    size: tuple[int, int, int],
    guidance: float,
) -> None:
    width, height, frames = size
    expected = loaded(
        PROMPT,
        negative_prompt="a boat",
        true_cfg_scale=guidance,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        max_sequence_length=model.text_tokens,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).frames[0]
    for variant in ("full", "x"):
        sampling = {"steps": STEPS, "guidance": guidance}
        asked = request(
            model,
            tmp_path / f"{variant}.mp4",
            preset=preset(variant, sampling=sampling, schedule={}),
            width=width,
            height=height,
            frames=frames,
            negative_prompt="a boat",
        )
        generate(asked)
    difference = np.abs(written["full.mp4"].astype(float) - expected * 255)
    assert difference.shape == (frames, height, width, 3)
    assert difference.max() <= 2
    assert np.abs(written["x.mp4"].astype(float) - expected * 255).max() > 2


def test_progress_and_what_is_reported(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    progress = Progress()
    first, second = generate(request(model, tmp_path / "a.mp4", tmp_path / "b.mp4"), progress)
    steps = [(done, STEPS) for done in range(1, STEPS + 1)]
    assert progress.events == ["load", "text", *["denoise", *steps, "decode", "encode"] * 2]
    assert names(tmp_path) == ["a.json", "a.mp4", "b.json", "b.mp4"]
    assert (written["a.mp4"] != written["b.mp4"]).any()
    report = first.report
    assert (report["width"], report["height"], report["frames"], report["fps"]) == (WIDTH, HEIGHT, FRAMES, 8)
    assert (report["seconds"], report["grid"], report["seed"]) == (1.125, [3, 3, 4], 7)
    assert list(report["phases"]) == list(report["memory"]) == ["load", "text", "denoise", "decode", "encode"]
    assert min(report["phases"].values()) > 0
    assert min(report["memory"].values()) > 50e6
    assert report["peak_memory_bytes"] == max(report["memory"].values())
    assert (second.report["phases"]["load"], second.report["phases"]["text"]) == (0, 0)
    assert [step["index"] for step in report["steps"]] == list(range(STEPS))
    assert report["steps"][0]["timestep"] == 1000
    densities = [step["density"] for step in report["steps"]]
    assert densities[:2] == [1, 1]
    assert max(densities[2:]) < 1
    assert all(0 < step["attention_ms"] <= step["total_ms"] for step in report["steps"])


def test_the_same_seed_gives_the_same_frames_whatever_came_before(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    generate(request(model, tmp_path / "a.mp4", tmp_path / "b.mp4"))
    generate(request(model, tmp_path / "c.mp4", seeds=(8,)))
    np.testing.assert_array_equal(written["b.mp4"], written["c.mp4"])


@pytest.mark.parametrize(("dtype", "guard"), [("float32", None), ("bfloat16", None), ("bfloat16", 1.0)])
@pytest.mark.parametrize("every", [0, 2])
def test_a_run_that_is_taken_up_ends_as_if_it_had_not_been_broken_off(
    loaded: Any,
    written: dict[str, np.ndarray],
    model: ModelChoice,
    tmp_path: Path,
    dtype: str,
    guard: float | None,
    every: int,
) -> None:
    """In bf16 the pipeline's timesteps are rounded as well, from the second step on."""
    loaded.to(getattr(torch, dtype))
    asked = request(model, tmp_path / "a-s7.mp4", tmp_path / "a-s8.mp4", checkpoint_every=every, dtype=dtype)
    if guard is not None:
        attention = {"variant": "b", "group": [1, 1, 2], "radius": 0}
        asked = replace(asked, preset=preset(guard=guard, schedule={}, attention=attention))
    expected = generate(asked)
    whole = dict(written)
    if guard is not None:
        assert {one["step"] for one in expected[0].report["guard"]["widened"]} == {2, 4}
    for after in range(1, STEPS + 1):
        for path in tmp_path.iterdir():
            path.unlink()
        with pytest.raises(Interrupted, match=f"interrupted after step {after} of {STEPS}; go on with grat resume "):
            generate(asked, Progress(break_off_after=after))
        (kept,) = tmp_path.iterdir()
        for named in (kept, tmp_path / "a-s7.mp4"):
            assert find_run(named) == kept
        run, restored = read_run(kept)
        assert restored == asked
        assert run.done == after

        progress = Progress()
        made = generate(restored, progress, run)
        told = [event for event in progress.events if isinstance(event, tuple)]
        assert told == [(done, STEPS) for done in (*range(after + 1, STEPS + 1), *range(1, STEPS + 1))]
        for name, frames in whole.items():
            np.testing.assert_array_equal(written[name], frames)
        assert [untimed(video.report) for video in made] == [untimed(video.report) for video in expected]
        assert names(tmp_path) == ["a-s7.json", "a-s7.mp4", "a-s8.json", "a-s8.mp4"]


@pytest.mark.parametrize("after", [1, STEPS])
def test_a_run_that_is_taken_up_computes_on_its_own_number_of_threads(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path, after: int
) -> None:
    asked = request(model, tmp_path / "a.mp4", checkpoint_every=1)
    threads = torch.get_num_threads()
    with pytest.raises(Interrupted):
        generate(asked, Progress(break_off_after=after))
    run, restored = read_run(find_run(tmp_path / "a.mp4"))
    assert run.report["device"]["threads"] == threads
    torch.set_num_threads(threads + 1)
    try:
        progress = Progress()
        (made,) = generate(restored, progress, run)
        assert torch.get_num_threads() == threads
        assert any(f"goes on with as many, not {threads + 1}" in note for note in progress.notes)
        assert made.report["device"]["threads"] == threads
    finally:
        torch.set_num_threads(threads)


def test_what_killed_processes_left_beside_a_video_goes_with_the_end(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    for name in ("a.mp4", "a.json", "a.latents.safetensors"):
        (tmp_path / f".{name}.{'0a' * 8}.part").write_bytes(b"half")
    (tmp_path / f".a.mp4.{'0a' * 8}.lossless").write_bytes(b"half")
    (tmp_path / f".b.mp4.{'0a' * 8}.part").write_bytes(b"of another video")
    generate(request(model, tmp_path / "a.mp4"))
    assert ".b.mp4" in names(tmp_path)[0]
    assert names(tmp_path)[1:] == ["a.json", "a.mp4"]


def test_checkpoints_come_as_often_as_asked_and_go_with_the_end(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    kept = []
    real = video_generation.write_run

    def write_run(run: VideoRun, asked: VideoRequest, output: Path) -> Path:
        kept.append(run.done)
        return real(run, asked, output)

    monkeypatch.setattr(video_generation, "write_run", write_run)
    generate(request(model, tmp_path / "a.mp4", checkpoint_every=2))
    assert kept == [2, 4, STEPS]  # the last are the latents, kept until the video is written
    assert names(tmp_path) == ["a.json", "a.mp4"]


def test_latents_stay_if_asked_for(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    generate(request(model, tmp_path / "a.mp4", save_latents=True, checkpoint_every=1))
    assert names(tmp_path) == ["a.json", "a.latents.safetensors", "a.mp4"]
    run, _ = read_run(tmp_path / "a.latents.safetensors")
    assert (run.seed, run.done) == (7, STEPS)
    assert run.latents is not None
    assert run.latents.shape == (1, 4, 3, 6, 8)


def test_what_another_run_kept_is_not_taken_for_this_ones(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    generate(request(model, tmp_path / "a.mp4", save_latents=True))
    with pytest.raises(Interrupted):
        generate(request(model, tmp_path / "a.mp4"), Progress(break_off_after=2))
    assert find_run(tmp_path / "a.mp4").name == "a.checkpoint.safetensors"


def test_ctrl_c_before_the_first_step_leaves_nothing(loaded: Any, model: ModelChoice, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        generate(request(model, tmp_path / "a.mp4"), Progress(at_phase="text"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("phase", ["decode", "encode"])
def test_ctrl_c_after_the_last_step_keeps_the_latents(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path, phase: str
) -> None:
    asked = request(model, tmp_path / "a.mp4", tmp_path / "a-s8.mp4")
    expected = generate(replace(asked, outputs=(tmp_path / "c.mp4", tmp_path / "d.mp4")))
    with pytest.raises(Interrupted, match=r"grat resume .*a\.latents\.safetensors"):
        generate(asked, Progress(at_phase=phase))
    run, restored = read_run(find_run(tmp_path / "a.mp4"))
    made = generate(restored, Progress(), run)
    for name, other in (("a.mp4", "c.mp4"), ("a-s8.mp4", "d.mp4")):
        np.testing.assert_array_equal(written[name], written[other])
    assert [untimed(video.report) for video in made] == [untimed(video.report) for video in expected]
    assert not list(tmp_path.glob("*.safetensors"))


class NoMemory:
    """An autoencoder that runs out of memory."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")


def test_latents_outlive_a_decoder_without_memory(
    monkeypatch: pytest.MonkeyPatch,
    loaded: Any,
    written: dict[str, np.ndarray],
    model: ModelChoice,
    tmp_path: Path,
) -> None:
    asked = request(model, tmp_path / "a.mp4")
    generate(replace(asked, outputs=(tmp_path / "whole.mp4",)))
    with monkeypatch.context() as patch:
        patch.setattr(loaded.vae, "decode", NoMemory())
        with pytest.raises(OutOfMemory, match=r"grat decode .*a\.latents\.safetensors --tile 128$"):
            generate(asked)
    kept = tmp_path / "a.latents.safetensors"
    run, restored = read_run(kept)
    made = video_decoding.decode_run(run, kept, restored, tmp_path / "a.mp4", Progress())
    np.testing.assert_array_equal(written["a.mp4"], written["whole.mp4"])
    assert made.report["frames"] == FRAMES


def test_latents_outlive_an_encoder_that_fails(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, model: ModelChoice, tmp_path: Path
) -> None:
    for error, expected in [
        (CannotWrite("cannot write a.mp4: no space left on device"), CannotWrite),
        (ZeroDivisionError("a mistake"), ZeroDivisionError),
    ]:

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        progress = Progress()
        monkeypatch.setattr(video_decoding, "write_video", fail)
        with pytest.raises(expected) as caught:
            generate(request(model, tmp_path / "a.mp4"), progress)
        advice = f"its latents are kept: go on with grat decode {tmp_path / 'a.latents.safetensors'}"
        assert advice in (str(caught.value) if expected is CannotWrite else progress.notes[-1])
        assert names(tmp_path) == ["a.latents.safetensors"]


def test_a_full_disk_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    """Neither checkpoints nor latents can be written; the video is made all the same."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    progress = Progress()
    with monkeypatch.context() as patch:
        patch.setattr(whole_files.os, "fsync", full)
        generate(request(model, tmp_path / "a.mp4", checkpoint_every=2), progress)
    assert [note.partition(": ")[2] for note in progress.notes] == [
        "no space left on device: step 2 is not kept",
        "no space left on device: step 4 is not kept",
        "no space left on device: its latents are not kept until the video is written",
    ]
    assert names(tmp_path) == ["a.json", "a.mp4"]


def test_where_the_output_has_no_room_latents_are_kept_elsewhere(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, model: ModelChoice, tmp_path: Path
) -> None:
    real, elsewhere = video_generation.write_run, tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr(video_generation.tempfile, "tempdir", str(elsewhere))
    work = tmp_path / "work"
    work.mkdir()

    def write_run(run: VideoRun, asked: VideoRequest, output: Path) -> Path:
        if output.parent == work:
            raise CannotWrite(f"cannot write {output.name}: no space left on device")
        return real(run, asked, output)

    def full(*_: Any, **__: Any) -> None:
        raise CannotWrite("cannot write a.mp4: no space left on device")

    monkeypatch.setattr(video_generation, "write_run", write_run)
    with monkeypatch.context() as patch:
        patch.setattr(video_decoding, "write_video", full)
        with pytest.raises(CannotWrite) as caught:
            generate(request(model, work / "a.mp4"))
    (kept,) = elsewhere.glob("grat-*/a.latents.safetensors")
    advice = f"its latents are kept: go on with grat decode {kept} --out {work / 'a.mp4'}"
    assert str(caught.value).splitlines()[1] == advice
    assert read_run(kept)[0].done == STEPS
    kept.unlink()
    kept.parent.rmdir()
    generate(request(model, work / "a.mp4"))
    assert names(elsewhere) == []
    assert names(work) == ["a.json", "a.mp4"]


def test_a_full_disk_leaves_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, model: ModelChoice, tmp_path: Path
) -> None:
    writes = []

    def full_after_the_first(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 2:  # the file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_files.os, "fsync", full_after_the_first)
    monkeypatch.setattr(loaded.vae, "decode", NoMemory())
    with pytest.raises(OutOfMemory, match=r"its last checkpoint is kept: go on with grat resume .*a\.checkpoint"):
        generate(request(model, tmp_path / "a.mp4", checkpoint_every=2))
    assert read_run(find_run(tmp_path / "a.mp4"))[0].done == 2


@pytest.mark.parametrize("every", [0, 1])
def test_the_first_step_that_is_not_finite_is_named(
    loaded: Any, model: ModelChoice, tmp_path: Path, every: int
) -> None:
    calls = []

    def spoil(module: Any, args: Any, output: Any) -> Any:
        calls.append(module)
        return (output[0] * float("nan"),) if len(calls) == 5 else output  # two calls per step

    loaded.transformer.register_forward_hook(spoil)
    progress = Progress()
    with pytest.raises(NumericalFailure, match=f"NaN or infinite at step 3 of {STEPS}"):
        generate(request(model, tmp_path / "a.mp4", checkpoint_every=every), progress)
    last = STEPS if not every else 3
    assert progress.events[-1] == (last, STEPS)  # seen at the checkpoint, hours before the end
    assert names(tmp_path) == (["a.checkpoint.safetensors"] if every else [])


def test_memory_that_runs_out_in_the_middle_leaves_the_last_checkpoint(
    loaded: Any, model: ModelChoice, tmp_path: Path
) -> None:
    calls = []

    def run_out(module: Any, args: Any, output: Any) -> None:
        calls.append(module)
        if len(calls) == 7:  # in the fourth step
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    loaded.transformer.register_forward_hook(run_out)
    progress = Progress()
    with pytest.raises(OutOfMemory, match=r"too little memory for 64x48x9 with .*: try a smaller --res such as 32x16$"):
        generate(request(model, tmp_path / "a.mp4", checkpoint_every=2), progress)
    assert progress.notes == [
        f"the last checkpoint is kept: grat resume {tmp_path / 'a.checkpoint.safetensors'} goes on"
    ]
    assert read_run(find_run(tmp_path / "a.mp4"))[0].done == 2


def test_frames_of_nan_or_one_colour_are_a_failure(loaded: Any, model: ModelChoice, tmp_path: Path) -> None:
    layer = [module for module in loaded.vae.decoder.modules() if isinstance(module, torch.nn.Conv3d)][-1]
    torch.nn.init.zeros_(layer.weight)
    with pytest.raises(NumericalFailure, match=r"one flat colour(.|\n)*its latents are kept"):
        generate(request(model, tmp_path / "a.mp4"))
    torch.nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(NumericalFailure, match="NaN or infinity after decoding"):
        generate(request(model, tmp_path / "a.mp4"))
    assert names(tmp_path) == ["a.latents.safetensors"]


def test_denoising_never_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    """Between the first and the last step no tensor's value is asked for."""
    asked_for: list[str] = []
    inside = [False]
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)

        def spied(self: torch.Tensor, *args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            if inside[0]:
                asked_for.append(name)
            return real(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, spied)

    class Watching(Progress):
        def step(self, done: int, total: int) -> None:
            inside[0] = done < total

    generate(request(model, tmp_path / "a.mp4"), Watching())
    assert asked_for == []


def test_a_video_can_be_decoded_in_smaller_tiles(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    generate(request(model, tmp_path / "a.mp4", width=160, height=96, save_latents=True))
    kept = tmp_path / "a.latents.safetensors"
    run, asked = read_run(kept)
    video_decoding.decode_run(run, kept, asked, tmp_path / "tiled.mp4", Progress(), tile=64)
    whole, tiled = written["a.mp4"].astype(float), written["tiled.mp4"].astype(float)
    assert loaded.vae.tile_sample_stride_width == 48
    # An untrained decoder that normalises over a tile shows something else in each.
    assert whole.shape == tiled.shape
    assert 0 < np.abs(whole - tiled).mean() < np.abs(whole - whole.mean()).mean()


def test_a_guarded_run_without_the_state_of_its_guard_is_refused(
    loaded: Any, model: ModelChoice, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        generate(request(model, tmp_path / "a.mp4", preset=preset(guard=0.9)), Progress(break_off_after=2))
    run, asked = read_run(find_run(tmp_path / "a.mp4"))
    assert run.guard is not None
    with pytest.raises(BadInput, match="what the guard had done is damaged"):
        generate(asked, begun=replace(run, guard=None))


def test_other_weights_are_refused(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, model: ModelChoice, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        generate(request(model, tmp_path / "a.mp4"), Progress(break_off_after=2))
    run, asked = read_run(find_run(tmp_path / "a.mp4"))
    monkeypatch.setattr(video_generation, "load_model", lambda *_, **__: LoadedModel(loaded, "0123abc"))
    with pytest.raises(BadInput, match="begun with revision None of the model, and 0123abc is here"):
        generate(asked, Progress(), run)


def test_requests_come_back_from_data(model: ModelChoice, tmp_path: Path) -> None:
    asked = request(model, tmp_path / "a.mp4", tmp_path / "b.mp4", crf=20, format="mp4", negative_prompt="a boat")
    place = tmp_path / "elsewhere" / "c-s8"
    moved = request_from_data(request_data(asked), place, 8)
    outputs = (tmp_path / "elsewhere" / "c-s7.mp4", tmp_path / "elsewhere" / "c-s8.mp4")
    assert moved == replace(asked, outputs=outputs)
    # Former versions wrote where outputs go, and what they may replace: a file does not decide that.
    former = request_data(replace(asked, overwrite=True)) | {"outputs": ["../.bashrc", "/etc/b"], "overwrite": True}
    assert request_from_data(former, place, 8) == moved


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"model": None}, "model: "),
        ({"model": {"name": "x", "source": "x/../y", "kind": "folder"}}, "model.source: not an absolute path"),
        ({"model": {"name": "x", "source": "owner/name", "kind": "file"}}, "model.source: not an absolute path"),
        ({"model": {"name": "demo", "source": "owner/name", "kind": "hub"}}, "was a hub and is a folder here"),
        ({"base": "../parts"}, "base: neither an absolute path"),
        ({"seeds": "x"}, "seeds: "),
        ({"seeds": [7, 7]}, "seeds: one is missing, or there twice"),
        ({"seeds": [9]}, "seeds: one is missing"),
        ({"seeds": [7, 2**63]}, "seeds.1: "),
        ({"frames": "nine"}, "frames: "),
        ({"frames": 10**9 + 1}, "frames: "),
        ({"width": 2**40}, "width: "),
        ({"fps": 0}, "fps: "),
        ({"preset": {}}, "preset.name: "),
        ({"format": "exe"}, "format: "),
        ({"device": "gpu\x1b[31m"}, "device: "),
        ({"dtype": "float8"}, "dtype: "),
        ({"offload": "all"}, "offload: "),
        ({"metadata": "no"}, "metadata: "),
        ({"prompt": "x" * 2**21}, "prompt: "),
        ({"unknown\n\x1b": 1}, r"unknown\\n\\x1b: "),
    ],
)
def test_stored_requests_are_held_to_what_may_be_typed(
    model: ModelChoice, tmp_path: Path, damage: dict[str, Any], says: str
) -> None:
    data = request_data(request(model, tmp_path / "a.mp4")) | damage
    with pytest.raises(BadInput, match=f"^the request is damaged, or of another version of grat: .*{says}") as caught:
        request_from_data(data, tmp_path / "a", 7)
    assert len(str(caught.value).splitlines()) == 1
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"seed": -1},
        {"steps": []},
        {"steps": [{"index": 0}]},
        {"phases": {"load": float("nan")}},
        {"phases": {"load": "long"}},
        {"memory": {"load": -1}},
        {"peak_memory_kind": 5},
        {"guard_state": [1]},
        {"device": {"threads": 10**6}},
        {"model": []},
        {"request": None},
    ],
    ids=str,
)
def test_stored_runs_are_held_to_what_a_run_writes(
    loaded: Any, model: ModelChoice, tmp_path: Path, damage: dict[str, Any]
) -> None:
    with pytest.raises(Interrupted):
        generate(request(model, tmp_path / "a.mp4"), Progress(break_off_after=2))
    store = CheckpointStore(tmp_path / "a.checkpoint.safetensors")
    found = store.read()
    damaged = json.dumps({**found.about, **damage})
    with safe_open(store.path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    store.path.unlink()
    save_file(tensors, store.path, {"grat": damaged})
    with pytest.raises(BadInput, match="cannot be gone on with: ") as caught:
        read_run(store.path)
    assert len(str(caught.value).splitlines()) == 1


def test_latents_of_another_shape_than_the_request_are_refused(loaded: Any, model: ModelChoice, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        generate(request(model, tmp_path / "a.mp4"), Progress(break_off_after=2))
    store = CheckpointStore(tmp_path / "a.checkpoint.safetensors")
    found = store.read()
    for latents in (found.latents[:, :, :2], found.latents[..., :4], found.latents[0]):
        store.write(2, latents, found.generator_state, found.about, found.step_timings)
        with pytest.raises(BadInput, match=r"of another version of grat: its latents are \["):
            read_run(store.path)
    store.write(2, found.latents, torch.zeros(3, dtype=torch.uint8), found.about, found.step_timings)
    run, asked = read_run(store.path)
    with pytest.raises(BadInput, match="the random state of the run is damaged"):
        generate(asked, begun=run)


def test_what_another_run_kept_stays_without_overwrite(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    kept = [tmp_path / f"a.{what}.safetensors" for what in ("latents", "checkpoint")]
    for path in kept:
        path.write_bytes(b"precious")
    generate(request(model, tmp_path / "a.mp4", checkpoint_every=2))
    assert [path.read_bytes() for path in kept] == [b"precious"] * 2
    assert (tmp_path / "a.mp4").is_file()
    generate(request(model, tmp_path / "a.mp4", overwrite=True))
    assert names(tmp_path) == ["a.json", "a.mp4"]


def test_a_run_that_goes_on_elsewhere_leaves_its_checkpoint(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    for after in (2, STEPS):
        with pytest.raises(Interrupted):
            generate(request(model, tmp_path / "a.mp4"), Progress(break_off_after=after))
        run, asked = read_run(find_run(tmp_path / "a.mp4"))
        folder = tmp_path / f"b{after}"
        folder.mkdir()
        (made,) = generate(replace(asked, outputs=(folder / "b.mp4",)), begun=run)
        assert made.path == folder / "b.mp4"
        assert names(folder) == ["b.json", "b.mp4"]
        assert run.kept is not None
        assert run.kept.is_file()
        run.kept.unlink()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": 10}, "must be a multiple of 4 and one more, not 10: use 9 or 13"),
        ({"frames": 0}, "use 1 or 5"),
        ({"width": 60}, "multiples of 16, not 60x48"),
        ({"fps": 0}, "must be 1 or more, not 0"),
        ({"seeds": (1, 2)}, "2 seeds need as many outputs, not 1"),
        ({"checkpoint_every": -1}, "must be 0 or more"),
        ({"model": choose_model("demo")}, "demo makes images"),
    ],
)
def test_videos_that_cannot_be_made_are_refused(
    model: ModelChoice, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        check_video(replace(request(model, tmp_path / "a.mp4"), **changes))


def test_files_that_are_no_runs_are_refused(
    loaded: Any, written: dict[str, np.ndarray], model: ModelChoice, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="nothing to go on with"):
        find_run(tmp_path / "a.mp4")
    generate(request(model, tmp_path / "a.mp4", save_latents=True))
    kept = media.latents_path(tmp_path / "a.mp4")
    run, _ = read_run(kept)
    assert run.latents is not None
    video_run.save_latents(kept, run.latents, {"prompt": PROMPT}, overwrite=True)
    with pytest.raises(BadInput, match="it is damaged, or of another version of grat"):
        read_run(kept)
