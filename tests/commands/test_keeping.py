"""`grat resume` and `grat decode`, of pictures and videos: being killed, interrupted, out of memory, tampered with."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import grat, refusal
from PIL import Image
from safetensors.torch import load_file, save_file
from workers import Worker, begin, instead, needs_fork

from grat_cli.console.progress import LogProgress
from grat_cli.errors import CannotWrite
from grat_cli.families import FAMILIES
from grat_cli.files.tensors import read_about
from grat_cli.files.videos import probe_video
from grat_cli.generation import report

KILLS = int(os.environ.get("GRAT_TEST_KILLS", "3"))
KEPT, LATENTS = Path("a.checkpoint.safetensors"), Path("a.latents.safetensors")

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@dataclass(frozen=True)
class Kind:
    """What is made, and how.

    Attributes:
        medium: picture or video.
        family: of the model.
        small: a command for a small output in four steps.
        long: for one whose steps take a tenth of a second or more, each with a checkpoint; its guard widens layers.
        steps: of the latter, over all of its stages.
        lossless: format that shows every bit.
        formats: two more.
        endings: of files in these three formats.
    """

    medium: str
    family: str
    small: tuple[object, ...]
    long: tuple[object, ...]
    steps: int
    lossless: str
    formats: tuple[str, str]
    endings: tuple[str, str, str]

    def run(self, *options: object) -> Any:
        """The small command with a seed."""
        return grat(*self.small, "--seed", "7", *options)

    def frames(self, name: str) -> list[np.ndarray]:
        """Of a lossless output."""
        path = Path(name + self.endings[0])
        return [np.asarray(Image.open(one)) for one in (sorted(path.iterdir()) if path.is_dir() else [path])]

    def require_equal(self, one: list[np.ndarray], other: str) -> None:
        """Fails unless a lossless output has these frames."""
        np.testing.assert_array_equal(one, self.frames(other))


@pytest.fixture(scope="module", params=["image", "video"])
def kind(request: pytest.FixtureRequest) -> Kind:
    often = ("--seed", "7", "--checkpoint-every", "1")
    if request.param == "image":
        demo = ("image", "a red fox in the snow", "--model", "demo", "--variant", "b")
        staged = ("--res", "384", "--steps", "6", "--set", "highres.strength=0.8", "--guard", "0.99")
        small = (*demo, "--res", "64", "--steps", "4", "--group", "2x2")
        return Kind(
            "image", "flux", small, (*demo, *staged, *often), 11, "png", ("webp", "jpg"), (".png", ".webp", ".jpg")
        )
    sparse = ("--model", request.getfixturevalue("hunyuan"), "--variant", "lines", "--group", "2x2x2")
    waves = ("video", "waves at night", *sparse)
    large = ("--res", "128x96", "--frames", "33", "--steps", "12", "--guard", "0.8", "--format", "frames")
    small = (*waves, "--res", "64x48", "--frames", "9", "--fps", "8", "--steps", "4")
    return Kind(
        "video", "hunyuan", small, (*waves, *large, *often), 12, "frames", ("mp4", "webm"), ("", ".mp4", ".webm")
    )


@pytest.fixture(scope="module")
def whole(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The long output as one process makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        result = grat(*kind.long, "--out", f"whole{kind.endings[0]}", "--json")
        assert result.code == 0, result.err
        return result.data[f"{kind.medium}s"][0], kind.frames("whole")


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


@pytest.mark.parametrize("command", ["image", "video"])
def test_help_says_where_everything_is_kept(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    told = " ".join(re.sub("[│\n]", " ", grat(command, "--help").out).split())
    assert "Keep the latents beside the output, for grat decode." in told
    assert (
        "Keep what is done beside the output, for grat resume; 0 for never. Default: about every two minutes." in told
    )


# ---- Decoding


def test_decode_makes_the_same_output_and_others(kind: Kind) -> None:
    name = f"whole{kind.endings[0]}"
    result = kind.run("--format", kind.lossless, "--out", name, "--save-latents", "--json")
    (made,) = result.data[f"{kind.medium}s"]
    latents = "whole.latents.safetensors"
    assert names() == sorted([name, "whole.json", latents])
    assert str(kind.small[1]) in grat("info", latents).out
    assert "whole.json exists: use --overwrite" in refusal("decode", latents, "--format", kind.formats[0])
    again = f"again{kind.endings[0]}"
    result = grat("decode", latents, "--out", again, "--json")
    assert result.code == 0, result.err
    (decoded,) = result.data[f"{kind.medium}s"]
    kind.require_equal(kind.frames("whole"), "again")
    assert decoded["decoded"]["command"] == f"grat decode {latents} --out {again} --json"
    assert decoded["steps"] == made["steps"]
    changed = {"file": again, "decoded": decoded["decoded"]}
    assert report.provenance(decoded) == report.provenance(made) | changed


def test_decode_takes_options_of_the_medium(kind: Kind) -> None:
    assert kind.run("--out", f"a{kind.endings[1]}", "--save-latents").code == 0
    common = ("--model", kind.small[3], "--device", "cpu", "--dtype", "bfloat16", "--tile", "112", "--quiet")
    if kind.medium == "video":
        given, refused = ("--fps", "4", "--crf", "30"), (("--quality", "80", "pictures"),)
    else:
        given, refused = ("--quality", "80"), (("--crf", "30", "videos"), ("--fps", "4", "videos"))
    for flag, value, noun in refused:
        message = refusal("decode", LATENTS, flag, value, "--out", "other")
        assert message == f"{flag} is for {noun}, and {LATENTS} is none of one: leave it out"
    out = f"b{kind.endings[1]}"
    assert grat("decode", f"a{kind.endings[1]}", "--out", out, *given, *common).out == f"{out}\n"
    told = json.loads(Path("b.json").read_text())
    assert (told["decoded"]["tile"], told["decoded"]["dtype"]) == (112, "bfloat16")
    if kind.medium == "video":
        facts = probe_video(Path(out))
        assert (facts.frames, facts.fps) == (9, 4)
        assert (told["fps"], told["seconds"], told["crf"]) == (4, 2.25, 30)
    else:
        assert grat("decode", LATENTS, "--format", "webp", "--quality", "10", "--out", "c.webp").code == 0
        assert Path("c.webp").stat().st_size < Path(out).stat().st_size
        with Image.open(out) as image:
            assert (image.format, image.size) == ("WEBP", (64, 64))
    assert str(kind.small[1]) in grat("info", out).out


def dying_ffmpeg(folder: Path) -> Path:
    """An ffmpeg that lists its encoders and dies of the first frame."""
    path = folder / "ffmpeg"
    path.write_text(
        '#!/bin/sh\ncase "$*" in *-encoders*) echo " V....D libx264 H.264";; *) head -c 10 >/dev/null; exit 1;; esac\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_latents_outlive_what_ends_a_run_late(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    def full(path: Path, *_: object, **options: object) -> None:
        raise CannotWrite(f"cannot write {path}: no space left on device")

    advice = f"its latents are kept: go on with grat decode {LATENTS}"
    kind.run("--format", kind.lossless, "--out", f"whole{kind.endings[0]}")
    out = f"a{kind.endings[1]}"
    with monkeypatch.context() as patch:
        patch.setattr(type(FAMILIES[kind.family]), "decode", no_memory)
        result = kind.run("--out", out)
        assert result.code == 4
        size = "64x48x9" if kind.medium == "video" else "64x64"
        last, advised = result.err.splitlines()[-2:]
        assert last == f"error: too little memory to decode {size} with {kind.small[3]}"
        assert re.fullmatch(re.escape(advice) + r" --tile \d+", advised)
    with monkeypatch.context() as patch:
        patch.setenv("IMAGEIO_FFMPEG_EXE", str(dying_ffmpeg(tmp_path_factory.mktemp("bin"))))
        patch.setattr("grat_cli.files.pictures.write_whole", full)
        result = kind.run("--out", out, "--overwrite")
        assert (result.code, result.err.splitlines()[-1]) == (2, advice)
    assert names() == sorted([str(LATENTS), f"whole{kind.endings[0]}", "whole.json"])
    command = shlex.split(advised.partition("go on with ")[2])
    assert grat(*command[1:], "--format", kind.lossless, "--quiet").out == f"a{kind.endings[0]}\n"
    kind.require_equal(kind.frames("whole"), "a")


# ---- Processes that end


def stopped(*arguments: object, kept: int) -> Worker:
    """One that runs a command line and has stopped with so many steps kept."""

    def is_kept(*_: object) -> bool:
        return KEPT.is_file() and (read_about(KEPT) or {})["steps_done"] == kept

    worker = begin(*arguments, at_first=instead(LogProgress, "step", when=is_kept))
    worker.wait_until_stopped()
    return worker


def repeatable(made: dict[str, Any]) -> list[Any]:
    """What of a report does not depend on when, where and how fast."""
    kept = {
        name: value for name, value in report.provenance(made).items() if name not in ("file", "created", "command")
    }
    steps = [(step["index"], step["stage"], step["timestep"], step["density"]) for step in made["steps"]]
    return [kept, steps, list(made["phases"]), list(made["memory"]), made["peak_memory_kind"]]


@needs_fork
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_frames(
    kind: Kind, whole: tuple[dict[str, Any], list[np.ndarray]]
) -> None:
    """GRAT_TEST_KILLS says how often."""
    out = f"a{kind.endings[0]}"
    arguments = (*kind.long, "--out", out)
    for step in sorted(random.Random(KILLS).choices(range(1, kind.steps), k=KILLS)):
        stopped(*arguments, kept=step).kill()
        arguments = ("resume", out)
    result = grat("resume", KEPT, "--json")
    assert result.code == 0, result.err
    report_of_whole, frames = whole
    kind.require_equal(frames, "a")
    assert report_of_whole["guard"]["widened"]
    assert repeatable(result.data[f"{kind.medium}s"][0]) == repeatable(report_of_whole)
    assert names() == sorted([out, "a.json"])


@needs_fork
def test_ctrl_c_says_how_to_go_on(kind: Kind, whole: tuple[dict[str, Any], list[np.ndarray]]) -> None:
    worker = stopped(*kind.long, "--out", f"a{kind.endings[0]}", kept=kind.steps - 3)
    worker.signal(signal.SIGINT)
    worker.go_on()
    result = worker.result()
    assert result.code == 130
    match = re.fullmatch(
        rf"error: interrupted after step (\d+) of {kind.steps}; go on with (grat resume {re.escape(str(KEPT))})",
        result.err.splitlines()[-1],
    )
    assert match, result.err
    assert f"{match[1]} of {kind.steps} are done" in grat("info", KEPT).out
    assert "grat resume does the rest" in refusal("decode", KEPT)
    assert grat(*match[2].split()[1:], "--quiet").out == f"a{kind.endings[0]}\n"
    kind.require_equal(whole[1], "a")


@needs_fork
@pytest.mark.parametrize("kind", ["video"], indirect=True)
def test_two_runs_of_one_name_do_not_meet(kind: Kind) -> None:
    worker = stopped(*kind.long, "--out", "a", kept=1)
    assert "of another run exists" in refusal(*kind.long, "--out", "a")
    second = grat(*kind.long, "--out", "a", "--overwrite")
    assert (second.code, "another grat is making a: wait for it" in second.err) == (2, True)
    worker.go_on()
    result = worker.result()
    assert (result.code, result.out.splitlines()[0]) == (0, "a")
    assert names() == ["a", "a.json"]


# ---- Checkpoints


def broken_off(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, *options: object, by: BaseException | None = None
) -> dict[str, Any] | None:
    """Breaks a run off in its third step, and returns what its checkpoint says, if there is one."""

    def step(self: Any, done: int, total: int) -> None:
        if done == 3:
            raise by or KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grat_cli.console.progress.LogProgress.step", step)
        assert kind.run("--out", f"a{kind.endings[1]}", *options).code == (1 if by else 130)
    return read_about(KEPT) if KEPT.is_file() else None


@pytest.mark.parametrize(
    ("options", "seconds", "kept"),
    [((), 0, 2), ((), 120, None), (("--checkpoint-every", "2"), 120, 2), (("--checkpoint-every", "0"), 0, None)],
)
def test_how_often_there_is_a_checkpoint(
    kind: Kind, options: tuple[str, ...], seconds: float, kept: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grat_cli.generation.denoising.BETWEEN_CHECKPOINTS_S", seconds)
    about = broken_off(kind, monkeypatch, *options, by=RuntimeError("not foreseen"))
    assert (about and about["steps_done"]) == kept


@pytest.mark.parametrize("kind", ["image"], indirect=True)
def test_a_run_over_steps_goes_on_with_a_reference_and_says_so(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    about = broken_off(kind, monkeypatch, "--set", "schedule.over_steps={reference: [0, 1]}")
    assert about
    result = grat("resume", KEPT, "--json")
    assert result.code == 0, result.err
    assert "attention that is carried over steps begins with a reference" in " ".join(result.err.split())
    (made,) = result.data["images"]
    densities = [step["density"] for step in made["steps"]]
    done = about["steps_done"]
    assert [density > 0 for density in densities] == [step in (0, 1, done) for step in range(4)]
    assert made["density"] == pytest.approx(np.mean(densities))


def tampered(path: Path, about: dict[str, Any] | None, **request: Any) -> None:
    """Makes a checkpoint say something else."""
    assert about
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path, {"grat": json.dumps({**about, "request": {**about["request"], **request}})})


def test_a_checkpoint_does_not_say_what_is_replaced(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    about, out = broken_off(kind, monkeypatch), f"a{kind.endings[1]}"
    precious = {".bashrc": "alias", "a.json": "mine", ".json": "mine"}
    tampered(KEPT, about, outputs=[".bashrc"], overwrite=True)
    for name, content in precious.items():
        Path(name).write_text(content)
    assert "outputs: " in refusal("resume", KEPT)
    tampered(KEPT, about)
    assert "a.json exists: use --overwrite, or another --out" in refusal("resume", KEPT)
    Path("a.json").rename("b.txt")
    result = grat("resume", KEPT, "--quiet")
    assert (result.code, result.out) == (0, f"{out}\n"), result.err
    assert names() == sorted([".bashrc", ".json", "a.json", out, "b.txt"])
    assert (Path(".bashrc").read_text(), Path(".json").read_text()) == ("alias", "mine")


def test_a_run_goes_on_where_it_is_told(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(kind, monkeypatch)
    _, ending, other = kind.endings
    a, b, c = (f"{name}{ending}" for name in "abc")
    Path(b).write_text("precious")
    assert f"{b} exists: use --overwrite, or another --out" in refusal("resume", a, "--out", b)
    nouns = {"image": "pictures", "video": "videos"}[kind.medium]
    assert f"these {nouns} are {ending[1:]} files" in refusal("resume", a, "--out", f"b{other}")
    assert Path(b).read_text() == "precious"
    assert grat("resume", a, "--out", b, "--overwrite", "--quiet").out == f"{b}\n"
    assert names() == sorted([str(KEPT), "b.json", b])
    Path("c.checkpoint.safetensors").write_bytes(KEPT.read_bytes())
    Path("c.latents.safetensors").write_text("of another run")
    assert "c.latents.safetensors of another run exists" in refusal("resume", "c.checkpoint.safetensors")
    Path("c.latents.safetensors").unlink()
    assert grat("resume", "c.checkpoint.safetensors", "--quiet").out == f"{c}\n"
    assert names() == sorted([str(KEPT), "b.json", b, "c.json", c])


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"format": "exe"}, "format: "),
        ({"format": "tiff"}, "format: tiff is none of videos"),
        ({"format": "gif"}, "format: gif is none of pictures"),
        ({"frames": 10**12}, "frames: "),
        ({"width": 10**7}, "width: "),
        ({"device": "cuda:0; rm"}, "device: "),
        ({"init_image": ""}, "init_image: "),
        ({"model": {"name": "m", "source": "models/m", "kind": "folder"}}, "model.source: not an absolute path"),
    ],
    ids=str,
)
def test_checkpoints_that_ask_for_what_cannot_be_typed_are_refused(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, request_: dict[str, Any], says: str
) -> None:
    if says.endswith("pictures" if kind.medium == "video" else "videos"):
        request_, says = {"format": "exe"}, "format: "
    tampered(KEPT, broken_off(kind, monkeypatch), **request_)
    message = refusal("resume", KEPT)
    assert message.startswith(f"{KEPT} cannot be gone on with: ")
    assert says in message
    assert len(message.splitlines()) == 1
    assert says in refusal("decode", KEPT)


def test_the_model_of_a_checkpoint_is_not_looked_for_elsewhere(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Path("gone").resolve()
    tampered(KEPT, broken_off(kind, monkeypatch), model={"name": "m", "source": str(gone), "kind": "folder"})
    assert f"no model, folder or file is named '{gone}'" in refusal("resume", KEPT, code=3)
