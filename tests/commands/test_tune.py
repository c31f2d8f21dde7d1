"""`grat tune` as people type it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import grat

from grat_cli.presets import load_preset

TUNE = ("tune", "1", "--model", "demo", "--res", "96", "--steps", "2", "--stretches", "2", "--rows", "8")


def test_a_preset_is_made_that_a_picture_is_then_made_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = grat(*TUNE, "--target-density", "0.4", "--check", "1", "--runs", "2", "--json")
    assert done.code == 0, done.err
    told = done.data
    assert told["preset"] == "demo-tuned-d0.4.yaml"
    preset = load_preset(told["preset"])
    assert preset.evidence is not None
    assert preset.evidence.density == told["density"] <= 0.4001
    assert told["over_steps"]["runs"] <= 4
    assert "over_steps" in done.out
    assert preset.evidence.target == "density of 0.4"

    # Another target from the same observations, for people.
    again = grat(*TUNE, "--target-recall", "0.7", "--check", "0", "--out", "wide.yaml")
    assert again.code == 0, again.err
    assert "observing" not in again.err
    assert "all of them, as chosen" in again.out
    assert load_preset("wide.yaml").evidence is not None

    made = grat("image", "a red fox", "--model", "demo", "--res", "96", "--steps", "2", "--preset", told["preset"])
    assert made.code == 0, made.err
    shown = grat("presets", told["preset"])
    assert shown.code == 0
    assert "tables" in shown.out
    other = grat("plan", told["preset"], "--model", "flux-dev")
    assert other.code == 2
    assert "it was made for another one" in other.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one target"),
        (("--target-density", "0.2", "--target-recall", "0.9"), "give one target"),
        (("--target-density", "1.5"), "expected a share above 0 and up to 1"),
        (("--target-density", "0.2", "--stretches", "9"), "has no 9 stretches"),
        (("--target-density", "0.2", "--rows", "1"), "--rows 1: expected 2 to 1,000,000"),
        (("--target-density", "0.2", "--out", "preset.json"), "use preset.yaml"),
        (("--target-density", "0.01"), "no choice of these patterns has a density of 0.01"),
        (("--target-density", "0.2", "--group", "3x3x3"), "expected one size or 2"),
        (("--target-density", "0.2", "--references", "8-4"), "--references 8-4: expected a count of steps such as 6"),
        (("--target-density", "0.2", "--references", "six"), "--references six: expected a count of steps such as 6"),
        (("--target-density", "0.2", "--references", "2", "--no-over-steps"), "has no meaning with --no-over-steps"),
        (("--target-recall", "0.8", "--max-kept", "2"), "--max-kept has no meaning with --target-recall"),
        (("--target-density", "0.2", "--max-kept", "0"), "--max-kept 0: expected gibibytes above 0"),
        (("--target-density", "0.2", "--keep", "disk"), "--keep disk"),
        (("--target-recall", "0.8", "--keep", "fp8"), "--keep has no meaning with --target-recall"),
        (("--target-density", "0.2", "--references", "3"), "--references 3: the run has 2 steps"),
        (("--target-density", "0.2", "--steps", "101"), "use --steps 100 at most, or --no-over-steps"),
        (("--target-density", "0.2", "--steps", "1"), "a run of 1 steps has no 2 stretches"),
        (("--target-density", "0.2", "--runs", "-1"), "--runs -1: expected 0 to 1,000,000"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = grat(*TUNE, *arguments)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not list(tmp_path.glob("*.yaml"))


def test_prompts_are_a_count_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("0", "999", "missing.txt"):
        done = grat("tune", given, "--model", "demo", "--target-density", "0.3")
        assert done.code == 2
        assert given in done.err
