from __future__ import annotations

import json
import os
import unicodedata
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from grat_cli.errors import BadInput
from grat_cli.files import outputs, pictures
from grat_cli.files.places import typed_path
from grat_cli.files.whole import write_whole

PROVENANCE = {"schema": "grat.report/1", "prompt": "ein Füchslein 🦊", "seed": 7}


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def test_default_names_tell_time_prompt_size_variant_and_seed() -> None:
    name = outputs.default_name(datetime(2025, 1, 31, 14, 25, 1), "A red fox, in the snow!", "256x128", "b-far", 7)
    assert name == "grat-20250131-142501-a-red-fox-in-the-snow-256x128-b-far-s7.png"


def test_names_of_videos_tell_their_frames_and_format() -> None:
    when = datetime(2025, 1, 31, 14, 25, 1)
    stem = "grat-20250131-142501-waves-1280x720x129-x-s7"
    assert outputs.default_name(when, "waves", "1280x720x129", "x", 7, ".mp4") == f"{stem}.mp4"
    assert outputs.default_name(when, "waves", "1280x720x129", "x", 7, "") == stem


@given(prompt=st.text(max_size=80), batch=st.integers(1, 999))
@example(prompt="狐" * 80, batch=999)
@example(prompt="\U00020000" * 80, batch=999)
@example(prompt="🦊", batch=1)
def test_slugs_are_safe_in_any_file_system(prompt: str, batch: int) -> None:
    slug = outputs.slug(prompt)
    assert 0 < len(slug) <= 40
    assert all(one == "-" or unicodedata.category(one)[0] in "LMN" for one in slug)
    assert unicodedata.category(slug[0])[0] in "LN"
    assert not slug.endswith("-")
    assert slug == outputs.slug(slug)
    when, most = datetime(2025, 1, 31, 14, 25, 1), 2**63 - 1
    name = outputs.default_name(when, prompt, "16384x16384x99999", "planes-far", most, f"-{batch}.png")
    assert len(os.fsencode(outputs.checkpoint_path(Path(name)).name)) <= 255


def test_slugs_are_cut_between_words() -> None:
    assert outputs.slug("a quiet harbour at dawn with twenty fishing boats") == "a-quiet-harbour-at-dawn-with-twenty"
    assert outputs.slug("x" * 90) == "x" * 40
    assert outputs.slug("a" * 40 + " fox") == "a" * 40
    assert outputs.slug("!?") == "untitled"


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("狐が走る、夜に", "狐が走る-夜に"),
        ("й ё Лиса", "й-ё-лиса"),
        ("हिन्दी में लोमड़ी", "हिन्दी-में-लोमड़ी"),
        ("한국어 여우", "한국어-여우"),
        ("Füchslein größer İstanbul", "fuchslein-großer-istanbul"),
        ("🦊 in ❄️", "fox-face-in-snowflake"),
        ("👩‍🚀", "woman-rocket"),
    ],
)
def test_slugs_keep_letters_of_any_script(prompt: str, slug: str) -> None:
    found = outputs.slug(prompt)
    assert found == unicodedata.normalize("NFC", slug)


def test_one_name_for_one_picture_and_seeds_in_the_names_of_several(tmp_path: Path) -> None:
    out = tmp_path / "fox.png"
    assert outputs.output_paths(out, ["n"], [7]) == [out]
    assert outputs.output_paths(out, ["n", "m"], [7, 8]) == [tmp_path / "fox-s7.png", tmp_path / "fox-s8.png"]
    assert outputs.output_paths(tmp_path, ["n.png"], [7]) == [tmp_path / "n.png"]
    assert outputs.output_paths(None, ["n.png"], [7]) == [Path("n.png")]
    with pytest.raises(BadInput, match=r"use .*fox\.png"):
        outputs.output_paths(tmp_path / "fox.jpg", ["n"], [7])


def test_videos_go_where_pictures_would(tmp_path: Path) -> None:
    out = tmp_path / "waves.webm"
    assert outputs.output_paths(out, ["n"], [7], ".webm") == [out]
    assert outputs.output_paths(out, ["n", "m"], [7, 8], ".webm") == [
        tmp_path / "waves-s7.webm",
        tmp_path / "waves-s8.webm",
    ]
    assert outputs.output_paths(tmp_path, ["n.webm"], [7], ".webm") == [tmp_path / "n.webm"]
    with pytest.raises(BadInput, match=r"these videos are webm files: use .*waves\.webm, or an existing folder"):
        outputs.output_paths(tmp_path / "waves.avi", ["n"], [7], ".webm")
    # A folder of frames may have any name, and all of it is its name.
    folder = tmp_path / "waves.v2"
    assert outputs.output_paths(folder, ["n"], [7], "") == [folder]
    assert outputs.output_paths(folder, ["n", "m"], [7, 8], "")[1] == tmp_path / "waves.v2-s8"


def test_a_folder_that_is_typed_with_a_slash_is_one_before_it_is_there(tmp_path: Path) -> None:
    out = typed_path(f"{tmp_path}/sub/", "--out")
    paths = outputs.output_paths(out, ["n.png"], [7])
    assert paths == [tmp_path / "sub" / "n.png"]
    with pytest.raises(BadInput, match=r"the folder .*sub does not exist: create it first \(mkdir -p "):
        outputs.refuse_unwritable(paths, overwrite=False)
    assert outputs.output_paths(out, ["n"], [7], "") == [tmp_path / "sub"]  # of frames
    assert outputs.output_paths(typed_path(f"{tmp_path}/sub", "--out"), ["n"], [7], "") == [tmp_path / "sub"]
    tmp_path.joinpath("sub").mkdir()
    assert outputs.output_paths(out, ["n"], [7], "") == [tmp_path / "sub" / "n"]


@pytest.mark.parametrize("text", ["https://example.org/a.png", "s3://bucket/a.png", "", "a\0b", "x" * 256, "é/" * 1400])
def test_what_can_be_no_path_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--init-image "):
        typed_path(text, "--init-image")


@given(st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8"), max_size=300))
def test_paths_are_what_was_typed_or_refused(text: str) -> None:
    try:
        path = typed_path(text, "--out")
    except BadInput:
        assert not text or "://" in text or max(len(part.encode()) for part in text.split("/")) > 255
        return
    assert path == Path(text)
    path.is_dir()  # does not raise


@pytest.mark.parametrize("seeds", [[7], [7, 8]])
def test_names_leave_room_for_what_is_kept_beside_them(seeds: list[int], tmp_path: Path) -> None:
    longest = 255 - len(".checkpoint.safetensors") - (len("-s7") if len(seeds) > 1 else 0)
    for stem in ("x" * longest, "é" * (longest // 2)):
        for path in outputs.output_paths(tmp_path / f"{stem}.png", [], seeds):
            outputs.checkpoint_path(path).touch()
    with pytest.raises(BadInput, match="make it 1 bytes shorter"):
        outputs.output_paths(tmp_path / f"{'x' * (longest + 1)}.png", [], seeds)


def test_what_lies_beside_an_output_has_its_name() -> None:
    for output in ("a/waves.mp4", "a/waves.WEBM", "a/waves"):
        assert outputs.report_path(Path(output)) == Path("a/waves.json")
        assert outputs.latents_path(Path(output)) == Path("a/waves.latents.safetensors")
        assert outputs.checkpoint_path(Path(output)) == Path("a/waves.checkpoint.safetensors")
    assert outputs.report_path(Path("waves.v2")) == Path("waves.v2.json")
    assert outputs.report_path(Path("fox.png")) == Path("fox.json")


def test_the_report_beside_a_converted_picture_is_found(tmp_path: Path, picture: Image.Image) -> None:
    picture.save(tmp_path / "fox.jpg")
    outputs.write_json(PROVENANCE, tmp_path / "fox.json")
    assert outputs.read_provenance(tmp_path / "fox.jpg") == PROVENANCE


def test_prompts_that_are_no_text_are_kept_too(tmp_path: Path, picture: Image.Image) -> None:
    """The shell hands over any bytes; those that are no UTF-8 become lone surrogates."""
    odd = {**PROVENANCE, "prompt": "f\udcfcchslein"}
    outputs.write_png(picture, tmp_path / "fox.png", odd)
    outputs.write_json(odd, tmp_path / "odd.json")
    assert outputs.read_provenance(tmp_path / "fox.png") == outputs.read_provenance(tmp_path / "odd.json") == odd
    assert "🦊" in pictures.json_text(PROVENANCE)


def test_pictures_come_back_with_their_provenance(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "fox.png"
    outputs.write_png(picture, path, PROVENANCE)
    assert outputs.read_provenance(path) == PROVENANCE
    with Image.open(path) as reloaded:
        assert json.loads(reloaded.info["grat"]) == PROVENANCE  # other programs find it as well
        np.testing.assert_array_equal(np.asarray(reloaded), np.asarray(picture))
    assert os.listdir(tmp_path) == ["fox.png"]


def test_without_provenance_the_report_beside_the_picture_is_read(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "fox.png"
    outputs.write_png(picture, path, None)
    assert b"grat" not in path.read_bytes()
    with pytest.raises(BadInput, match=r"no fox\.json beside it"):
        outputs.read_provenance(path)
    outputs.write_json({**PROVENANCE, "steps": []}, outputs.report_path(path))
    assert outputs.read_provenance(path)["steps"] == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "fox.png"
    outputs.write_png(picture, path, None)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        outputs.write_json({"seed": float("nan")}, path)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["fox.png"]


def test_existing_and_unwritable_outputs_are_refused_beforehand(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    outputs.refuse_unwritable([path], overwrite=False)
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"precious")
    with pytest.raises(BadInput, match="--overwrite"):
        outputs.refuse_unwritable([path], overwrite=False)
    outputs.refuse_unwritable([path], overwrite=True)
    assert path.read_bytes() == b"precious"
    with pytest.raises(BadInput, match="mkdir -p"):
        outputs.refuse_unwritable([tmp_path / "missing" / "fox.png"], overwrite=False)
    with pytest.raises(BadInput, match="is a folder"):
        outputs.refuse_unwritable([tmp_path], overwrite=True)
    with pytest.raises(BadInput, match="cannot write"):
        outputs.refuse_unwritable([tmp_path / f"{'x' * 300}.png"], overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_without_permission_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="permission denied"):
        outputs.refuse_unwritable([tmp_path / "fox.png"], overwrite=False)
    tmp_path.chmod(0o700)


def test_folders_that_take_no_files_are_refused() -> None:
    with pytest.raises(BadInput, match="cannot write"):
        outputs.refuse_unwritable([Path("/proc/fox.png")], overwrite=False)


def test_damaged_provenance_is_told_from_none(tmp_path: Path, picture: Image.Image) -> None:
    path = tmp_path / "fox.png"
    outputs.write_png(picture, path, PROVENANCE)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"seed": 7', b'"seed": 8'))
    with pytest.raises(BadInput, match="damaged"):
        outputs.read_provenance(path)
    path.write_bytes(whole[:40])
    with pytest.raises(BadInput, match="does not say how it was made"):
        outputs.read_provenance(path)
    for name, content in (("a.json", "{"), ("b.json", "[]"), ("c.json", '{"schema": "other/1"}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(BadInput, match="not a report of grat"):
            outputs.read_provenance(tmp_path / name)
    with pytest.raises(BadInput, match="no such file"):
        outputs.read_provenance(tmp_path / "missing.png")


@given(content=st.binary(max_size=200))
def test_any_file_after_a_png_signature_is_read_or_refused(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(BadInput):
        outputs.read_provenance(path)
