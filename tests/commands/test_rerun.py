"""`grat rerun`: the same pixels once more, or with other options, from what outputs say of themselves."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import grat, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from grat_cli.errors import BadInput
from grat_cli.families.base import ModelChoice
from grat_cli.files.pictures import FORMATS as PICTURE_FORMATS
from grat_cli.files.pictures import write_picture
from grat_cli.generation.repeating import read_repeatable
from grat_cli.models.catalogue import KNOWN_MODELS

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
FOX = ("image", "a red fox", "--model", "demo", "--res", "96x80", "--steps", "2")


def pixels(path: object) -> np.ndarray:
    return np.asarray(Image.open(str(path)))


def made(*arguments: object) -> list[dict[str, Any]]:
    """The reports of what a command line makes."""
    result = grat(*arguments, "--json")
    assert result.code == 0, result.err
    return next(value for value in result.data.values() if isinstance(value, list))


def changed_report(path: str, asked: object = None, **changes: Any) -> str:
    """A report in which something is another: of what is asked for, or of the rest."""
    told = json.loads(Path(path).read_text())
    if isinstance(asked, dict):
        asked = {**told["asked"], **asked}
    Path("changed.json").write_text(json.dumps({**told, **({} if asked is None else {"asked": asked}), **changes}))
    return "changed.json"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff", ".json"])
def test_a_picture_of_any_format_is_repeated_to_the_same_pixels(suffix: str) -> None:
    first = "fox.png" if suffix == ".json" else f"fox{suffix}"
    quality = ("--quality", "80") if suffix in (".jpg", ".webp") else ()
    made(*FOX, "--seed", 3, "--out", first, *quality)
    (again,) = made("rerun", f"fox{suffix}")
    assert Path(again["file"]).name.startswith("grat-")
    assert Path(again["file"]).suffix == Path(first).suffix
    np.testing.assert_array_equal(pixels(again["file"]), pixels(first))
    told = json.loads(Path("fox.json").read_text())
    same = ("prompt", "seed", "width", "height", "preset", "asked", "sampling", "density")
    assert {name: again[name] for name in same} == {name: told[name] for name in same}


def test_one_of_several_seeds_is_repeated_alone_and_others_by_their_number() -> None:
    made(*FOX, "--seed", "3,4", "--out", "fox.png")
    (again,) = made("rerun", "fox-s4.png", "--out", "again.png")
    np.testing.assert_array_equal(pixels("again.png"), pixels("fox-s4.png"))
    assert again["seed"] == 4
    assert [one["seed"] for one in made("rerun", "fox-s4.png", "--n", 2, "--out", "more.png")] == [4, 5]
    np.testing.assert_array_equal(pixels("more-s4.png"), pixels("fox-s4.png"))


@pytest.mark.parametrize(
    "changes",
    [
        ("--seed", "9"),
        ("--steps", "3"),
        ("--variant", "b"),
        ("--res", "48x80"),
        ("--negative", "a boat", "--guidance", "3"),
        ("--preset", "demo-x", "--guard", "0.9"),
        ("--set", "schedule.dense_steps=1", "--backend", "reference", "--dtype", "bfloat16"),
        ("--radius", "2"),
    ],
)
def test_what_is_changed_is_as_if_it_had_been_typed_the_first_time(changes: tuple[str, ...]) -> None:
    made(*FOX, "--seed", 3, "--out", "fox.png")
    made("rerun", "fox.png", *changes, "--out", "changed.png")
    first = tuple(str(word) for word in (*FOX, "--seed", 3))
    for flag, value in zip(changes[::2], changes[1::2], strict=True):
        if flag in first:
            first = (*first[: first.index(flag)], *first[first.index(flag) + 2 :])
        first = (*first, flag, value)
    made(*first, "--out", "typed.png")
    np.testing.assert_array_equal(pixels("changed.png"), pixels("typed.png"))
    assert pixels("changed.png").tobytes() != pixels("fox.png").tobytes()
    told = [json.loads(Path(f"{name}.json").read_text()) for name in ("changed", "typed")]
    assert told[0]["preset"] == told[1]["preset"]


def test_another_prompt_is_shown(tmp_path: Path) -> None:
    made(*FOX, "--seed", 3, "--out", "fox.png")
    made("rerun", "fox.png", "--prompt", "a blue boat", "--out", "boat.png")
    made("image", "a blue boat", *FOX[2:], "--seed", 3, "--out", "typed.png")
    np.testing.assert_array_equal(pixels("boat.png"), pixels("typed.png"))


def test_a_variant_of_another_preset_keeps_what_was_typed_besides() -> None:
    made(*FOX, "--seed", 3, "--guidance", "2.5", "--backend", "reference", "--out", "fox.png")
    (again,) = made("rerun", "fox.png", "--variant", "x")
    preset = again["preset"]
    assert (preset["name"], preset["attention"]["variant"]) == ("demo-x", "x")
    assert (preset["sampling"]["steps"], preset["sampling"]["guidance"]) == (2, 2.5)
    assert preset["kernel"]["backend"] == "reference"


def test_a_cascade_is_repeated_with_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    smaller: dict[str, ModelChoice] = {"demo": replace(KNOWN_MODELS["image"]["demo"], native_side=64)}
    monkeypatch.setitem(KNOWN_MODELS, "image", {**KNOWN_MODELS["image"], **smaller})  # pyright: ignore
    steps = ("--set", "highres.steps=2", "--set", "highres.strength=0.6")
    made(*FOX[:4], "--res", "128", "--steps", 2, *steps, "--seed", 3, "--out", "fox.png")
    (again,) = made("rerun", "fox.png", "--out", "again.png")
    assert [stage["width"] for stage in again["stages"]] == [64, 128]
    np.testing.assert_array_equal(pixels("again.png"), pixels("fox.png"))


def test_a_batch_item_is_repeated_as_a_single_picture() -> None:
    Path("in").mkdir()
    Path("in/prompts.jsonl").write_text('{"prompt": "a red fox"}\n{"prompt": "a blue boat", "seed": 7}\n')
    small = ("--model", "demo", "--res", "64", "--steps", "2")
    paths = [one["file"] for one in made("batch", "in/prompts.jsonl", *small, "--out", "out")]
    for number, path in enumerate(paths):
        (again,) = made("rerun", path, "--out", f"{number}.png")
        np.testing.assert_array_equal(pixels(f"{number}.png"), pixels(path))
        assert "batch" not in again


def test_a_video_is_repeated_and_made_longer(hunyuan: Path) -> None:
    shutil.copytree(hunyuan, "tiny")
    size = ("--res", "64x48", "--frames", 5, "--fps", 8, "--steps", 2, "--seed", 3)
    made("video", "waves", "--model", hunyuan, *size, "--out", "waves.mp4")
    for named in ("waves.mp4", "waves.json"):
        (again,) = made("rerun", named)
        assert Path(again["file"]).read_bytes()[4:8] == b"ftyp"
        assert frames_of(again["file"]) == frames_of("waves.mp4")
    (longer,) = made("rerun", "waves.mp4", "--frames", 9, "--format", "gif")
    assert (longer["frames"], longer["fps"], Path(longer["file"]).suffix) == (9, 8, ".gif")


def frames_of(path: object) -> bytes:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)
    return b"".join(reader)


# ---- Files that it was made from, and what else is no more as it was


def test_pictures_are_found_by_name_and_known_by_what_is_in_them() -> None:
    for folder in ("then", "elsewhere"):
        Path(folder).mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save("then/start.png")
    made(*FOX, "--seed", 3, "--init-image", "then/start.png", "--strength", "0.6", "--out", "then/fox.png")
    made("rerun", "then/fox.png", "--out", "beside.png")
    np.testing.assert_array_equal(pixels("beside.png"), pixels("then/fox.png"))

    shutil.move("then/fox.png", "elsewhere/fox.png")
    missing = refusal("rerun", "elsewhere/fox.png")
    assert "was made from start.png, which is neither beside it nor in this folder" in missing
    assert "give it with --init-image FILE" in missing
    Image.new("RGB", (64, 64)).save("start.png")
    assert "start.png is another file: give it with --init-image FILE" in refusal("rerun", "elsewhere/fox.png")
    made("rerun", "elsewhere/fox.png", "--init-image", "then/start.png", "--out", "given.png")
    np.testing.assert_array_equal(pixels("given.png"), pixels("then/../beside.png"))
    shutil.copy("then/start.png", "start.png")
    made("rerun", "elsewhere/fox.png", "--out", "here.png")
    np.testing.assert_array_equal(pixels("here.png"), pixels("beside.png"))


def test_a_model_in_a_folder_is_found_by_name_or_asked_for(hunyuan: Path) -> None:
    size = ("--res", "64x48", "--frames", 5, "--steps", 1, "--seed", 3)
    made("video", "waves", "--model", hunyuan, *size, "--out", "waves.mp4")
    message = refusal("rerun", "waves.mp4")
    assert f"made by the model {hunyuan.name}, which is neither beside it nor in this folder" in message
    assert "--model FOLDER" in message
    made("rerun", "waves.mp4", "--model", hunyuan, "--out", "again.mp4")
    assert frames_of("again.mp4") == frames_of("waves.mp4")


def test_no_folder_is_told_of() -> None:
    """But for the name of the file itself."""
    secret = Path("secret folder").absolute()
    secret.mkdir()
    Image.new("RGB", (64, 64), "red").save(secret / "start.png")
    started = ("--init-image", secret / "start.png", "--out", secret / "fox.png")
    made(*FOX, "--seed", 3, *started, "--save-latents")
    made("decode", secret / "fox.latents.safetensors", f"--out={secret / 'decoded.png'}")
    for name in ("fox", "decoded"):
        inside = Image.open(secret / f"{name}.png").text["grat"]  # pyright: ignore
        for text in (inside, (secret / f"{name}.json").read_text()):
            assert "secret" not in text
            assert str(Path.cwd()) not in text
    command = json.loads((secret / "fox.json").read_text())["command"]
    assert command.startswith("grat image 'a red fox' --model demo")
    assert "--init-image start.png --out fox.png --save-latents" in command


def test_what_differs_is_said_beforehand() -> None:
    made(*FOX, "--seed", 3, "--out", "fox.png")
    assert "other" not in grat("rerun", "fox.png", "--out", "a.png").err
    told = json.loads(Path("fox.json").read_text())
    device = {**told["device"], "name": "cuda:0", "model": "a card", "dtype": "bfloat16", "threads": None}
    file = changed_report("fox.json", versions={**told["versions"], "torch": "1.0", "torchao": "2"}, device=device)
    said = " ".join(grat("rerun", file, "--out", "b.png").err.split())
    now = told["versions"]
    assert (
        f"other versions: torch 1.0 then, {now['torch']} now, torchao 2 then, {now['torchao'] or 'missing'} now" in said
    )
    assert "another device: a card (cuda:0) then" in said
    assert "another dtype: bfloat16 then, float32 now" in said
    assert said.index("other versions") < said.index("loading")


def test_as_many_threads_compute_as_then(monkeypatch: pytest.MonkeyPatch) -> None:
    made(*FOX, "--seed", 3, "--out", "fox.png")
    told = json.loads(Path("fox.json").read_text())
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    said = grat("rerun", changed_report("fox.json", device={**told["device"], "threads": 3}), "--out", "b.png").err
    assert "it was made on 3 CPU threads: as many are used, not 1" in " ".join(said.split())
    assert set_to == [3]


# ---- What is refused


def test_the_file_itself_is_never_replaced() -> None:
    made(*FOX, "--seed", 3, "--out", "fox.png")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    for named in ("fox.png", "fox.json", Path("fox.png").absolute()):
        for out in ("fox.png", "fox.jpg", "./fox.webp"):
            message = refusal("rerun", named, "--out", out, "--overwrite")
            assert "is what is repeated, and stays as it is: use another --out" in message
    assert before == {path.name: path.read_bytes() for path in Path().iterdir()}


def test_what_says_too_little_is_refused_with_what_to_do() -> None:
    made(*FOX, "--seed", 3, "--save-latents", "--out", "fox.png")
    assert "grat resume or grat decode" in refusal("rerun", "fox.latents.safetensors")
    told = json.loads(Path("fox.json").read_text())
    del told["asked"]
    Path("old.json").write_text(json.dumps(told))
    assert "made by an older grat" in refusal("rerun", "old.json")
    Image.new("RGB", (8, 8)).save("plain.png")
    assert "does not say how it was made" in refusal("rerun", "plain.png")
    assert "cannot read none.png" in refusal("rerun", "none.png")


def test_options_of_the_other_medium_are_refused(hunyuan: Path) -> None:
    made(*FOX, "--seed", 3, "--out", "fox.png")
    for option in (("--frames", 5), ("--aspect", "1:1"), ("--crf", 20)):
        assert f"{option[0]} is for videos, and fox.png is none" in refusal("rerun", "fox.png", *option)
    assert "makes videos" in refusal("rerun", "fox.png", "--model", hunyuan)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": -1}, "seeds.0: "),
        ({"seed": "3"}, "seeds.0: "),
        ({"width": 10**9}, "width: "),
        ({"width": 63}, "multiples of"),
        ({"asked": []}, "asked: "),
        ({"prompt": None}, "prompt: "),
        ({"device": {}}, "device.name: "),
        ({"asked": {"init_image": "../secret.png"}}, "pictures: they are not those of the request"),
        ({"pictures": [{"kind": "start", "file": "../x.png"}]}, "the name of a file alone"),
        ({"asked": "fox"}, "asked: "),
        ({"asked": {"device": "cuda:x"}}, "device: "),
        ({"asked": {"weights": {"base": "../x"}}}, "neither a name nor a hub id"),
        ({"asked": {"more": 1}}, "more: "),
    ],
)
def test_damaged_and_hostile_reports_are_refused(changes: dict[str, Any], says: str) -> None:
    made(*FOX, "--seed", 3, "--out", "fox.png")
    assert says in refusal("rerun", changed_report("fox.json", **changes))


@pytest.mark.parametrize("source", ["../secret", "/etc", "a/b", "..", ".", "x\x1b[2J", "a\\b", ""])
def test_a_name_in_a_report_is_only_a_name(source: str) -> None:
    made(*FOX, "--seed", 3, "--out", "fox.png")
    told = json.loads(Path("fox.json").read_text())
    for kind in ("folder", "file") if source == "a/b" else ("folder", "file", "hub"):
        asked = {**told["asked"], "model": {"name": source, "source": source, "kind": kind}}
        Path("hostile.json").write_text(json.dumps({**told, "asked": asked}))
        message = refusal("rerun", "hostile.json")
        assert "cannot be repeated" in message
        assert "\x1b" not in message


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_report_is_taken_unread(data: st.DataObject) -> None:
    """Whatever stands in one of its fields, it is a refusal or the same kind of data."""
    told = json.loads(_a_report())
    names = sorted(told["asked"].keys() | (told.keys() - {"schema"}))
    name = data.draw(st.sampled_from(names))
    value = data.draw(any_json)
    (told["asked"] if name in told["asked"] else told)[name] = value
    Path("any.json").write_text(json.dumps(told))
    with contextlib.suppress(BadInput):
        read_repeatable(Path("any.json"))


_report: list[str] = []


def _a_report() -> str:
    if not _report:
        made(*FOX, "--seed", 3, "--out", "any.png")
        _report.append(Path("any.json").read_text())
    return _report[0]


def test_provenance_without_room_in_the_file_is_read_from_the_report_beside_it() -> None:
    made(*FOX, "--seed", 3, "--no-metadata", "--out", "fox.png")
    (again,) = made("rerun", "fox.png", "--out", "again.png")
    assert again["seed"] == 3
    picture = Image.open("fox.png")
    write_picture(picture, Path("bare.png"), PICTURE_FORMATS["png"], None)
    assert "does not say how it was made" in refusal("rerun", "bare.png")


def test_attention_that_is_carried_over_steps_is_repeated_and_told() -> None:
    (first,) = made(*FOX[:-1], 4, "--set", "schedule.over_steps.reference=[0,2]", "--out", "fox.png")
    (again,) = made("rerun", "fox.png", "--out", "again.png")
    np.testing.assert_array_equal(pixels("again.png"), pixels("fox.png"))
    assert again["preset"] == first["preset"]
    assert again["over_steps"] == first["over_steps"]
    for place in ("fox.png", "fox.json"):
        shown = " ".join(grat("info", place).out.split())
        assert "over steps 2 reference steps of 4 (1, 3), attention carried to the others; kept " in shown
