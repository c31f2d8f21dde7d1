"""Runs of pictures and videos: against stock diffusers, broken off and taken up again, and how failures end."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import grat, refusal
from PIL import Image
from small_runs import STEPS, Progress, Small, broken_off, generate, goes_on_as_if_whole, names, untimed

from grat_cli.errors import BadInput, CannotWrite, Interrupted, NumericalFailure, OutOfMemory
from grat_cli.files import whole as whole_files
from grat_cli.generation import denoising, finishing
from grat_cli.generation import run as generation
from grat_cli.generation.checkpoint import Run, find_run, read_run
from grat_cli.generation.finishing import decode_run
from grat_cli.generation.request import Request
from grat_cli.generation.stage import StepWatch
from grat_cli.models.loading import LoadedModel

pytestmark = pytest.mark.usefixtures("loaded")
of_videos = pytest.mark.parametrize("small", ["video"], indirect=True)
of_all = pytest.mark.parametrize("small", ["picture", "video", "cascade"], indirect=True)


@of_videos
@pytest.mark.parametrize("size", [(64, 48, 9), (48, 80, 25)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_full_attention_gives_the_stock_frames(
    loaded: Any,
    written: dict[str, np.ndarray],
    small: Small,
    tmp_path: Path,
    size: tuple[int, int, int],
    guidance: float,
) -> None:
    width, height, frames = size
    expected = loaded(
        small.request.prompt,
        negative_prompt="a boat",
        true_cfg_scale=guidance,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        max_sequence_length=small.request.model.text_tokens,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).frames[0]
    for variant in ("full", "x"):
        preset = small.preset(variant, sampling={"steps": STEPS, "guidance": guidance}, schedule={})
        place = tmp_path / variant
        generate(small.of(place, preset=preset, width=width, height=height, frames=frames, negative_prompt="a boat"))
    difference = np.abs(written["full"].astype(float) - expected * 255)
    assert difference.shape == (frames, height, width, 3)
    assert difference.max() <= 2
    assert np.abs(written["x"].astype(float) - expected * 255).max() > 2


def test_progress_and_what_is_reported(written: dict[str, np.ndarray], small: Small, tmp_path: Path) -> None:
    asked = small.of(tmp_path / "a", tmp_path / "b", preset=small.preset(schedule={"dense_steps": 2}))
    progress = Progress()
    first, second = generate(asked, progress)
    steps = [(done, STEPS) for done in range(1, STEPS + 1)]
    assert progress.events == ["load", "text", *["denoise", *steps, "decode", "save"] * 2]
    assert names(tmp_path) == sorted(f"{name}{ending}" for name in "ab" for ending in (".json", small.ending))
    assert (written["a"] != written["b"]).any()
    report = first.report
    assert (report["width"], report["height"], report["seed"]) == (asked.width, asked.height, 7)
    assert report["grid"] == list(asked.grid.shape)
    if asked.frames:
        assert (report["frames"], report["fps"], report["seconds"]) == (9, 8, 1.125)
    assert list(report["phases"]) == list(report["memory"]) == ["load", "text", "denoise", "decode", "save"]
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
    (stage,) = report["stages"]
    assert (stage["number"], stage["width"], stage["height"], stage["steps"]) == (0, asked.width, asked.height, STEPS)


def test_the_same_seed_gives_the_same_frames_whatever_came_before(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path
) -> None:
    generate(small.of(tmp_path / "a", tmp_path / "b"))
    generate(small.of(tmp_path / "c", seeds=(8,)))
    np.testing.assert_array_equal(written["b"], written["c"])


# ---- Broken off and taken up


# Cascades in fp32 alone: bf16 is no different in them, and takes a minute and a half on CPUs that have none.
@pytest.mark.parametrize(
    ("small", "dtype", "guard"),
    [
        *((kind, *how) for kind in ("picture", "video") for how in (("float32", False), ("bfloat16", True))),
        *((kind, "float32", guard) for kind in ("cascade", "cascade of latents") for guard in (False, True)),
    ],
    indirect=["small"],
)
@pytest.mark.parametrize("every", [0, 2])
def test_a_run_that_is_taken_up_ends_as_if_it_had_not_been_broken_off(
    loaded: Any, written: dict[str, np.ndarray], small: Small, tmp_path: Path, dtype: str, guard: bool, every: int
) -> None:
    """In bf16 the timesteps of the pipeline of videos are rounded as well, from the second step on."""
    loaded.to(getattr(torch, dtype))
    asked = small.of(tmp_path / "a-s7", tmp_path / "a-s8", checkpoint_every=every, dtype=dtype)
    made = goes_on_as_if_whole(replace(asked, preset=small.guarded()) if guard else asked, written, tmp_path)
    if guard and len(small.stages) == 1:
        assert {one["step"] for one in made[0].report["guard"]["widened"]} == {2, 4}


@pytest.mark.parametrize("small", ["picture", "cascade"], indirect=True)
@pytest.mark.parametrize("side", [40, 100])
def test_a_run_from_a_picture_goes_on_without_it(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path, side: int
) -> None:
    start, folder = tmp_path / "start.png", tmp_path / "made"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)).save(start)
    asked = small.of(folder / "a-s7", folder / "a-s8", init_image=start, strength=0.6)
    goes_on_as_if_whole(asked, written, folder, starts=(start,))


@of_all
@pytest.mark.parametrize("after", [1, STEPS])
def test_a_run_that_is_taken_up_computes_on_its_own_number_of_threads(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path, after: int
) -> None:
    threads = torch.get_num_threads()
    run, restored = read_run(broken_off(small.of(tmp_path / "a", checkpoint_every=1), after))
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


def test_what_killed_processes_left_beside_an_output_goes_with_the_end(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path
) -> None:
    asked, part = small.of(tmp_path / "a"), f"{'0a' * 8}.part"
    for name in (asked.outputs[0].name, "a.json", "a.latents.safetensors"):
        (tmp_path / f".{name}.{part}").write_bytes(b"half")
    (tmp_path / f".{asked.outputs[0].name}.{'0a' * 8}.lossless").write_bytes(b"half")
    (tmp_path / f".b{small.ending}.{part}").write_bytes(b"of another output")
    generate(asked)
    assert names(tmp_path) == sorted([f".b{small.ending}.{part}", "a.json", f"a{small.ending}"])


@pytest.mark.parametrize(
    ("small", "expected"),
    [("picture", [2, 4, STEPS]), ("video", [2, 4, STEPS]), ("cascade", [2, 3, STEPS])],
    indirect=["small"],
)
def test_checkpoints_come_as_often_as_asked_and_go_with_the_end(
    monkeypatch: pytest.MonkeyPatch,
    written: dict[str, np.ndarray],
    small: Small,
    tmp_path: Path,
    expected: list[int],
) -> None:
    """The last are the latents, kept until the output is written; between two stages there is always one."""
    kept = []
    real = finishing.write_run

    def write_run(run: Run, asked: Request, output: Path) -> Path:
        kept.append(run.done)
        return real(run, asked, output)

    for module in (denoising, finishing):
        monkeypatch.setattr(module, "write_run", write_run)
    generate(small.of(tmp_path / "a", checkpoint_every=2))
    assert kept == expected
    assert names(tmp_path) == sorted(["a.json", f"a{small.ending}"])
    kept.clear()
    generate(small.of(tmp_path / "b", checkpoint_every=0))
    assert kept == [STEPS]
    kept.clear()
    monkeypatch.setattr(denoising, "BETWEEN_CHECKPOINTS_S", 0.0)
    generate(small.of(tmp_path / "c"))
    assert kept == list(range(1, STEPS + 1))


@of_all
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_stay_if_asked_for_and_give_the_same_frames(
    loaded: Any, written: dict[str, np.ndarray], small: Small, tmp_path: Path, dtype: str
) -> None:
    loaded.to(getattr(torch, dtype))
    (made,) = generate(small.of(tmp_path / "a", save_latents=True, checkpoint_every=1, dtype=dtype))
    assert names(tmp_path) == sorted(["a.json", "a.latents.safetensors", f"a{small.ending}"])
    run, asked = read_run(tmp_path / "a.latents.safetensors")
    assert (run.seed, run.done, run.finished) == (7, STEPS, True)
    assert run.latents is not None
    assert run.latents.shape == asked.family.latents_shape(asked.model, asked.grid, called=False)
    again = decode_run(run, asked, tmp_path / f"b{small.ending}", Progress())
    np.testing.assert_array_equal(written["b"], written["a"])
    assert untimed(again.report) == untimed(made.report)
    assert (tmp_path / "a.latents.safetensors").is_file()


def test_what_another_run_kept_is_not_taken_for_this_ones(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path
) -> None:
    generate(small.of(tmp_path / "a", save_latents=True))
    assert broken_off(small.of(tmp_path / "a")).name == "a.checkpoint.safetensors"


@pytest.mark.parametrize("phase", ["load", "text", "denoise"])
def test_ctrl_c_before_the_first_step_leaves_nothing(small: Small, tmp_path: Path, phase: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        generate(small.of(tmp_path / "a"), Progress(at_phase=phase))
    assert names(tmp_path) == []


@pytest.mark.parametrize("phase", ["decode", "save"])
def test_ctrl_c_after_the_last_step_keeps_the_latents(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path, phase: str
) -> None:
    expected = generate(small.of(tmp_path / "c", tmp_path / "d"))
    with pytest.raises(Interrupted) as caught:
        generate(small.of(tmp_path / "a", tmp_path / "a-s8"), Progress(at_phase=phase))
    assert str(caught.value) == f"interrupted; go on with grat resume {tmp_path / 'a.latents.safetensors'}"
    run, restored = read_run(find_run(small.of(tmp_path / "a").outputs[0]))
    made = generate(restored, Progress(), run)
    for name, other in (("a", "c"), ("a-s8", "d")):
        np.testing.assert_array_equal(written[name], written[other])
    assert [untimed(one.report) for one in made] == [untimed(one.report) for one in expected]
    assert not list(tmp_path.glob("*.safetensors"))


def test_other_weights_are_refused(loaded: Any, monkeypatch: pytest.MonkeyPatch, small: Small, tmp_path: Path) -> None:
    run, asked = read_run(broken_off(small.of(tmp_path / "a")))
    monkeypatch.setattr(generation, "load_model", lambda *_, **__: LoadedModel(loaded, "0123abc"))
    with pytest.raises(BadInput, match="begun with revision None of the model, and 0123abc is here"):
        generate(asked, Progress(), run)


def test_a_guarded_run_without_the_state_of_its_guard_is_refused(small: Small, tmp_path: Path) -> None:
    run, asked = read_run(broken_off(small.of(tmp_path / "a", preset=small.preset(guard=0.9))))
    assert run.guard is not None
    with pytest.raises(BadInput, match="what the guard had done is damaged"):
        generate(asked, begun=replace(run, guard=None))


class Killed(BaseException):
    """Ends a run as the end of its process does."""


def killed(*_: object, **__: object) -> None:
    raise Killed


@pytest.mark.parametrize("killed_at", ["report", "tidying up"])
def test_an_output_that_a_killed_process_left_whole_is_tidied_up(
    monkeypatch: pytest.MonkeyPatch, small: Small, tmp_path: Path, killed_at: str
) -> None:
    asked = small.of(tmp_path / "a-s7", tmp_path / "a-s8")
    module, name = (finishing.outputs, "write_json") if killed_at == "report" else (generation, "tidy_up")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(Killed):
            generate(asked)
    output, other = asked.outputs
    left = names(tmp_path)
    assert f"a-s7{small.ending}" in left
    assert "a-s7.latents.safetensors" in left
    assert ("a-s7.json" in left) == (killed_at == "tidying up")
    content = output.read_bytes()

    # One that is not whole, or is another's, is not taken for it.
    for damaged in (content[: len(content) // 2], b"mine"):
        output.write_bytes(damaged)
        assert f"{output} exists: use --overwrite" in refusal("resume", output)
        assert output.read_bytes() == damaged
    output.write_bytes(content)

    result = grat("resume", output)
    assert result.code == 0, result.err
    assert f"{output} is there, whole: what was kept of it is removed" in result.err.replace("\n", "")
    assert [line for line in result.out.splitlines() if line.endswith(small.ending)] == [str(output), str(other)]
    assert output.read_bytes() == content
    assert names(tmp_path) == sorted(f"a-s{seed}{ending}" for seed in (7, 8) for ending in (".json", small.ending))


@pytest.mark.parametrize("state", ["noise_state", "random_state"])
def test_a_random_state_that_is_none_is_refused(small: Small, tmp_path: Path, state: str) -> None:
    run, asked = read_run(broken_off(small.of(tmp_path / "a")))
    with pytest.raises(BadInput, match="the random state of the run is damaged"):
        generate(asked, begun=replace(run, **{state: torch.zeros(3, dtype=torch.uint8)}))


def test_what_another_run_kept_stays_without_overwrite(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path
) -> None:
    kept = [tmp_path / f"a.{what}.safetensors" for what in ("latents", "checkpoint")]
    for path in kept:
        path.write_bytes(b"precious")
    generate(small.of(tmp_path / "a", checkpoint_every=2))
    assert [path.read_bytes() for path in kept] == [b"precious"] * 2
    assert (tmp_path / f"a{small.ending}").is_file()
    generate(small.of(tmp_path / "a", overwrite=True))
    assert names(tmp_path) == sorted(["a.json", f"a{small.ending}"])


@pytest.mark.parametrize("after", [2, STEPS])
def test_a_run_that_goes_on_elsewhere_leaves_its_checkpoint(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path, after: int
) -> None:
    kept = broken_off(small.of(tmp_path / "a"), after)
    run, asked = read_run(kept)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    output = folder / f"b{small.ending}"
    (made,) = generate(replace(asked, outputs=(output,)), begun=run)
    assert made.path == output
    assert names(folder) == sorted(["b.json", output.name])
    assert run.kept == kept
    assert kept.is_file()


# ---- Failures


class NoMemory:
    """An autoencoder that runs out of memory."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")


@of_all
def test_latents_outlive_a_decoder_without_memory(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, written: dict[str, np.ndarray], small: Small, tmp_path: Path
) -> None:
    generate(small.of(tmp_path / "whole"))
    asked = small.of(tmp_path / "a")
    decode, sides = loaded.vae.decode, []

    def decode_or_fail(latents: torch.Tensor, *args: Any, **options: Any) -> Any:
        sides.append(latents.shape[-1])
        # Between stages it decodes.
        return decode(latents, *args, **options) if latents.shape[-1] < asked.width // 4 else NoMemory()()

    with monkeypatch.context() as patch:
        patch.setattr(loaded.vae, "decode", decode_or_fail if len(small.stages) > 1 else NoMemory())
        advice = rf"grat decode .*a\.latents\.safetensors --tile {asked.family.tile // 2}$"
        with pytest.raises(OutOfMemory, match=advice):
            generate(asked)
    run, restored = read_run(tmp_path / "a.latents.safetensors")
    made = decode_run(run, restored, asked.outputs[0], Progress())
    np.testing.assert_array_equal(written["a"], written["whole"])
    assert made.report.get("frames") == asked.frames


def test_latents_outlive_an_encoder_that_fails(monkeypatch: pytest.MonkeyPatch, small: Small, tmp_path: Path) -> None:
    for error, expected in [
        (CannotWrite("cannot write a.mp4: no space left on device"), CannotWrite),
        (ZeroDivisionError("a mistake"), ZeroDivisionError),
    ]:

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        progress = Progress()
        monkeypatch.setattr(finishing.formats, "write_output", fail)
        with pytest.raises(expected) as caught:
            generate(small.of(tmp_path / "a"), progress)
        advice = f"its latents are kept: go on with grat decode {tmp_path / 'a.latents.safetensors'}"
        assert advice in (str(caught.value) if expected is CannotWrite else progress.notes[-1])
        assert names(tmp_path) == ["a.latents.safetensors"]


def test_a_full_disk_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, written: dict[str, np.ndarray], small: Small, tmp_path: Path
) -> None:
    """Neither checkpoints nor latents can be written; the output is made all the same."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    progress = Progress()
    with monkeypatch.context() as patch:
        patch.setattr(whole_files.os, "fsync", full)
        generate(small.of(tmp_path / "a", checkpoint_every=2), progress)
    assert [note.partition(": ")[2] for note in progress.notes] == [
        "no space left on device: step 2 is not kept",
        "no space left on device: step 4 is not kept",
        "no space left on device: its latents are not kept until the output is written",
    ]
    assert names(tmp_path) == sorted(["a.json", f"a{small.ending}"])


def test_where_the_output_has_no_room_latents_are_kept_elsewhere(
    monkeypatch: pytest.MonkeyPatch, small: Small, tmp_path: Path
) -> None:
    real, elsewhere, work = finishing.write_run, tmp_path / "tmp", tmp_path / "work"
    elsewhere.mkdir()
    work.mkdir()
    monkeypatch.setattr(finishing.tempfile, "tempdir", str(elsewhere))

    def write_run(run: Run, asked: Request, output: Path) -> Path:
        if output.parent == work:
            raise CannotWrite(f"cannot write {output.name}: no space left on device")
        return real(run, asked, output)

    def full(*_: Any, **__: Any) -> None:
        raise CannotWrite("cannot write a.mp4: no space left on device")

    for module in (denoising, finishing):
        monkeypatch.setattr(module, "write_run", write_run)
    asked = small.of(work / "a")
    with monkeypatch.context() as patch:
        patch.setattr(finishing.formats, "write_output", full)
        with pytest.raises(CannotWrite) as caught:
            generate(asked)
    (kept,) = elsewhere.glob("grat-*/a.latents.safetensors")
    advice = f"its latents are kept: go on with grat decode {kept} --out {asked.outputs[0]}"
    assert str(caught.value).splitlines()[1] == advice
    assert read_run(kept)[0].done == STEPS
    kept.unlink()
    kept.parent.rmdir()
    generate(asked)
    assert names(elsewhere) == []
    assert names(work) == sorted(["a.json", asked.outputs[0].name])


def test_a_full_disk_leaves_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, loaded: Any, small: Small, tmp_path: Path
) -> None:
    writes = []

    def full_after_the_first(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) > 2:  # the file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_files.os, "fsync", full_after_the_first)
    monkeypatch.setattr(loaded.vae, "decode", NoMemory())
    asked = small.of(tmp_path / "a", checkpoint_every=2)
    with pytest.raises(OutOfMemory, match=r"its last checkpoint is kept: go on with grat resume .*a\.checkpoint"):
        generate(asked)
    assert read_run(find_run(asked.outputs[0]))[0].done == 2


@of_all
@pytest.mark.parametrize("every", [0, 1])
def test_the_first_step_that_is_not_finite_is_named(loaded: Any, small: Small, tmp_path: Path, every: int) -> None:
    calls = []

    def spoil(module: Any, args: Any, output: Any) -> Any:
        calls.append(module)
        return (output[0] * float("nan"),) if len(calls) == 5 else output  # two calls per step

    loaded.transformer.register_forward_hook(spoil)
    progress = Progress()
    steps = small.stages[0].steps
    with pytest.raises(NumericalFailure, match=f"NaN or infinite at step 3 of {steps}: try another --backend$"):
        generate(small.of(tmp_path / "a", checkpoint_every=every), progress)
    assert progress.events[-1] == (3, steps)  # hours before the end
    assert names(tmp_path) == (["a.checkpoint.safetensors"] if every else [])


@pytest.mark.parametrize(
    ("small", "says"),
    [
        ("picture", "96x80 with .*: try a smaller --res such as 48x32$"),
        ("video", "64x48x9 with .*: try a smaller --res such as 32x16$"),
        ("cascade", "128x128 with .*: try a smaller --res such as 64x64$"),
    ],
    indirect=["small"],
)
def test_memory_that_runs_out_in_the_middle_leaves_the_last_checkpoint(
    loaded: Any, small: Small, tmp_path: Path, says: str
) -> None:
    calls = []

    def run_out(module: Any, args: Any, output: Any) -> None:
        calls.append(module)
        if len(calls) == 7:  # in the fourth step
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    loaded.transformer.register_forward_hook(run_out)
    progress, asked = Progress(), small.of(tmp_path / "a", checkpoint_every=2)
    with pytest.raises(OutOfMemory, match=f"too little memory for {says}"):
        generate(asked, progress)
    assert progress.notes == [
        f"the last checkpoint is kept: grat resume {tmp_path / 'a.checkpoint.safetensors'} goes on"
    ]
    assert read_run(find_run(asked.outputs[0]))[0].done == (2 if len(small.stages) == 1 else small.stages[0].steps)


@pytest.mark.parametrize(
    ("small", "says"),
    [("picture", "the picture has NaN after decoding"), ("video", "NaN or infinity after decoding")],
    indirect=["small"],
)
def test_frames_of_nan_or_one_colour_are_a_failure(loaded: Any, small: Small, tmp_path: Path, says: str) -> None:
    kinds = torch.nn.Conv2d, torch.nn.Conv3d
    layer = [module for module in loaded.vae.decoder.modules() if isinstance(module, kinds)][-1]
    torch.nn.init.zeros_(layer.weight)
    with pytest.raises(NumericalFailure, match=r"one flat colour(.|\n)*its latents are kept"):
        generate(small.of(tmp_path / "a"))
    torch.nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(NumericalFailure, match=rf"{says}(.|\n)*its latents are kept"):
        generate(small.of(tmp_path / "a"))
    assert names(tmp_path) == ["a.latents.safetensors"]


def test_what_turned_nan_is_told_after_each_step_with_what_may_help() -> None:
    for dtype, advice in ((torch.bfloat16, "--dtype float32, or another"), (torch.float32, "another")):
        pipe = SimpleNamespace(num_timesteps=3, transformer=SimpleNamespace(dtype=dtype))
        watch = StepWatch(progress := Progress(), 4)
        watch(pipe, 0, None, {"latents": torch.zeros(1)})
        with pytest.raises(NumericalFailure, match=rf"at step 6 of 7: try {advice} --backend$"):
            watch(pipe, 1, None, {"latents": torch.tensor([torch.inf])})
        assert progress.steps == [(5, 7), (6, 7)]


@pytest.mark.parametrize("small", ["picture", "cascade"], indirect=True)
@pytest.mark.parametrize("stop", [{"after": 4}, {"at_phase": "save"}])
def test_a_run_that_is_broken_off_leaves_no_preview(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path, stop: dict[str, Any]
) -> None:
    asked = small.of(tmp_path / "a", preview_every=1)
    seen: list[bool] = []

    class Watching(Progress):
        def step(self, done: int, total: int) -> None:
            seen.append((tmp_path / "a.preview.png").is_file())
            super().step(done, total)

    with pytest.raises(Interrupted):
        generate(asked, Watching(**stop))
    assert any(seen)
    assert len(names(tmp_path)) == 1
    run, again = read_run(find_run(asked.outputs[0]))
    generate(again, None, run)
    assert names(tmp_path) == ["a.json", "a.png"]


@of_all
def test_denoising_never_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, written: dict[str, np.ndarray], small: Small, tmp_path: Path
) -> None:
    """Between the first and the last step of a stage no tensor's value is asked for."""
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

    generate(small.of(tmp_path / "a"), Watching())
    assert asked_for == []


def test_outputs_can_be_decoded_in_smaller_tiles(
    loaded: Any, written: dict[str, np.ndarray], small: Small, tmp_path: Path
) -> None:
    generate(small.of(tmp_path / "a", width=160, height=96, save_latents=True))
    run, asked = read_run(tmp_path / "a.latents.safetensors")
    decode_run(run, asked, tmp_path / f"tiled{small.ending}", Progress(), tile=64 if asked.frames else 112)
    whole, tiled = written["a"].astype(float), written["tiled"].astype(float)
    assert whole.shape == tiled.shape
    if not asked.frames:
        assert np.abs(whole - tiled).max() <= 1  # a decoder of convolutions alone gives what the whole would
        return
    assert loaded.vae.tile_sample_stride_width == 48
    # An untrained decoder that normalises over a tile shows something else in each.
    assert 0 < np.abs(whole - tiled).mean() < np.abs(whole - whole.mean()).mean()
