"""Every mistake ends in one or two lines that say what to type instead, before anything is loaded."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from command_line import grat, refusal

IMAGE = ("image", "a red fox", "--model", "demo")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("imgae", "a fox"), "no such command 'imgae'. Did you mean 'image'?"),
        (("image",), "missing argument 'PROMPT': see grat image --help"),
        (("image", "a", "red", "fox"), "see grat image --help"),
        (("image", " "), 'the prompt is empty: try grat image "a red fox in the snow"'),
        (("image", "a fox", "--rse", "512"), "grat image has no option --rse: did you mean --res?"),
        (("plan", "--set"), "requires an argument"),
        ((*IMAGE, "--res", "1000"), "--res 1000: sides must be multiples of 16: use 992x992 or 1008x1008"),
        ((*IMAGE, "--res", "huge"), "--res huge: expected a side (1024)"),
        ((*IMAGE, "--seed", "fox"), "--seed fox: expected whole numbers"),
        ((*IMAGE, "--seed", "99999999999999999999"), "seeds go from 0 to 9223372036854775807"),
        ((*IMAGE, "--n", "0"), "--n 0: expected 1 to 1000 pictures"),
        ((*IMAGE, "--steps", "0"), "--steps 0: expected 1 or more"),
        ((*IMAGE, "--steps", "many"), "--steps many: expected a whole number"),
        ((*IMAGE, "--guidance", "nan"), "--guidance nan: expected a number"),
        ((*IMAGE, "--guidance", "-2"), "--guidance -2.0: expected 0 or more"),
        ((*IMAGE, "--preset", "flx-far"), "there is no preset 'flx-far': did you mean flux-far?"),
        ((*IMAGE, "--variant", "faar"), "there is no variant 'faar': did you mean 'far'?"),
        ((*IMAGE, "--preset", "demo-b", "--variant", "far"), "is short for the preset demo-far"),
        ((*IMAGE, "--variant", "x", "--radius", "2"), "--radius 2: radius has no meaning for variant x"),
        ((*IMAGE, "--group", "0"), "--group 0: expected a list of whole numbers from 1 up"),
        ((*IMAGE, "--group", "-4"), "from 1 up"),
        ((*IMAGE, "--group", "big"), "--group big: expected whole numbers such as 16, 16x16 or 4x8x8"),
        ((*IMAGE, "--share", "3", "--variant", "x"), "share 3 is more than the grid's 2 axes"),
        ((*IMAGE, "--set", "attention.radus=2"), "unknown key: did you mean 'radius'?"),
        ((*IMAGE, "--set", "schedule.rules=[{layers: 5-9, variant: full}]"), "the run has 5 layers"),
        ((*IMAGE, "--backend", "tritn"), "--backend tritn: unknown value 'tritn': did you mean 'triton'?"),
        ((*IMAGE, "--device", "gpu"), "--device gpu:"),
        ((*IMAGE, "--dtype", "bf16"), "--dtype bf16: did you mean 'bfloat16'?"),
        ((*IMAGE, "--offload", "all"), "--offload all: choose from none, model, group, sequential, auto"),
        ((*IMAGE, "--strength", "0.5"), "--strength is for image-to-image: add --init-image FILE"),
        ((*IMAGE, "--init-image", "missing.png"), "--init-image missing.png: there is no such file"),
        ((*IMAGE, "--init-image", __file__, "--strength", "1.5"), "--strength 1.5: expected more than 0 and at most 1"),
        ((*IMAGE, "--json", "--quiet"), "--json and --quiet exclude each other"),
        ((*IMAGE, "--out", "fox.bmp"), "pictures are png, jpg, webp or tiff files: use fox.png"),
        ((*IMAGE, "--out", "missing/fox.png"), "the folder missing does not exist"),
        (("plan", "demo-b", "--preset", "demo-x"), "two presets are given"),
        (("plan", "--picture", "pattern.svg"), "use pattern.png"),
        (("presets", "sora"), "there is no preset 'sora'"),
            (("plan", "--model", "hunyuan", "--seconds", "1", "--frames", "9"), "leave one out"),
            (("plan", "flux-b", "--frames", "9"), "preset flux-b is for flux models"),
            (("plan", "--model", "flux-dev", "--frames", "9"), "flux-dev makes images: use it with grat image"),
            (("image", "a fox", "--model", "hunyuan"), "hunyuan makes videos: use it with grat video"),
        (("info", "missing.png"), "cannot read missing.png: no such file"),
        (("info", __file__), "does not say how it was made"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_bad_input(arguments: tuple[str, ...], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert complaint in refusal(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["flux-dve", "missing/folder/deep", "missing.safetensors", "."])
def test_models_that_are_not_there_exit_with_3(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal("image", "a fox", "--model", model, code=3)
    assert list(tmp_path.iterdir()) == []


def test_a_preset_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmodel: demo\nattention:\n  variant: b\n  groop: [4, 4]\n")
    for command in (("presets", path), ("plan", path), ("image", "a fox", "--model", "demo", "--preset", path)):
        assert refusal(*command).startswith(f"{path}:5: attention.groop: unknown key: did you mean 'group'?")


def test_existing_outputs_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    picture, report = tmp_path / "fox.png", tmp_path / "fox.json"
    report.write_text("precious")
    assert "fox.json exists: use --overwrite" in refusal(*IMAGE, "--out", picture)
    seeded = tmp_path / "fox-s8.png"
    seeded.write_text("precious")
    assert "fox-s8.png exists" in refusal(*IMAGE, "--seed", "7,8", "--out", picture)
    assert "fox-s8.png exists" in refusal("plan", "demo-b", "--picture", seeded)
    assert report.read_text() == seeded.read_text() == "precious"


def test_a_backend_that_cannot_run_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grat_cli.generation.run.generate", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr("grat_kernels.triton_backend.obstacle", lambda *_: "there is no GPU")
    message = refusal(*IMAGE, "--backend", "triton")
    assert (
        message == "the triton backend cannot run here: there is no GPU\nUse --backend auto; grat env lists what runs."
    )


def test_a_backend_that_cannot_choose_is_refused_even_where_only_a_later_stage_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grat_cli.generation.run.generate", lambda *_: pytest.fail("too late"))
    path = tmp_path / "staged.yaml"
    path.write_text(
        "name: staged\nmodel: demo\nattention: {variant: b, group: [4, 4]}\nhighres:\n  dense_below: 0\n"
        "  stages: [{attention: {variant: b, group: [4, 4], radius: 0, far: {levels: [{beyond: 0, block: [4, 4]}], "
        "choose: {exact: 8, fine: 8, block: [2, 2]}}}}]\n"
    )
    message = refusal("image", "a fox", "--preset", path, "--res", "512", "--backend", "flex")
    assert message.startswith("the flex backend cannot run here: it does not attend blocks chosen by content")


def test_debug_shows_where_an_error_comes_from() -> None:
    result = grat("plan", "nothing", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.endswith("error: there is no preset 'nothing': grat presets lists them\n")


def test_what_nobody_foresaw_says_so_in_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr("grat_cli.estimates.planning.forecast", fail)
    message = refusal("plan", code=1)
    assert message == "ZeroDivisionError: division by zero\nThis was not foreseen: --debug shows where it happened."


def test_a_warning_is_a_line_that_says_no_more_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: object) -> None:
        warnings.warn("the [gluon] kernel hangs here\x1b[2J", stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr("grat_cli.estimates.planning.forecast", warn)
    shown = warnings.showwarning
    result = grat("plan")
    assert result.err.splitlines()[0] == "the [gluon] kernel hangs here\\x1b[2J"
    assert warnings.showwarning is shown


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("grat_cli.estimates.planning.forecast", interrupt)
    assert refusal("plan", code=130) == "interrupted"
