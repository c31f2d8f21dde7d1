"""What the README tells people to type, typed."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import grat
from PIL import Image

import grat_cli
from grat_cli.app import app
from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.presets import load_preset
from grat_kernels import Grid

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]
COMMANDS = [shlex.split(line, comments=True) for line in SHELL if line.startswith("grat ")]
# These load weights that cannot be had everywhere: their options are parsed, nothing is run.
MAKERS = ("image", "video")
NEEDS_WEIGHTS = [command for command in COMMANDS if command[1] in MAKERS and {"--offload", "--model"} & set(command)]
NEEDS_WEIGHTS = [command for command in NEEDS_WEIGHTS if "demo" not in command]
RESUMED = {command[2] for command in COMMANDS if command[1] == "resume"}
RUNNABLE = [command for command in COMMANDS if command not in NEEDS_WEIGHTS]


# What makes a command quick and leaves it whole: the last of several values counts.
QUICK = {
    "image": ["--steps", "2", "--model", "demo", "--overwrite"],
    "video": ["--steps", "1", "--model", "demo", "--frames", "5", "--res", "64p"],
    "batch": ["--steps", "1", "--model", "demo", "--n", "1"],
    "attend": ["--steps", "2", "--res", "128", "--rows", "8", "--overwrite"],
    "tune": [
        *("--steps", "2", "--res", "160", "--stretches", "1", "--rows", "8", "--check", "1", "--runs", "1"),
        *("--target-density", "0.3", "--overwrite"),
    ],
}
# What `grat batch` is given, one prompt of each kind.
PROMPT_FILES = {
    "prompts.txt": "a red fox",
    "evaluation_metadata.jsonl": '{"tag": "colors", "include": [{"class": "boat"}], "prompt": "a boat"}',
    "VBench_full_info.json": '[{"prompt_en": "snow falling", "dimension": ["scene"]}]',
}
QUICK_BENCH = {
    "attention": ["--grid", "12x20", "--heads", "1", "--reps", "1", "--overwrite"],
    "step": ["--grid", "4x4", "--text", "8", "--compare", "full,grat-b", "--reps", "1", "--overwrite"],
    "image": ["--res", "128", "--steps", "2", "--prompts", "1", "--compare", "full,grat-b", "--overwrite"],
    "video": [
        *("--res", "64x64", "--frames", "5", "--steps", "1", "--prompts", "1"),
        *("--compare", "full,b", "--overwrite"),
    ],
    "highres": ["--res", "384", "--steps", "2", "--prompts", "1", "--overwrite"],
}


def _level(command: list[str]) -> str:
    return command[command.index("--level") + 1] if "--level" in command else "attention"


def test_the_two_commands_are_make_targets() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    makes = [line.split()[1] for line in SHELL if line.startswith("make ")]
    assert makes[:2] == ["demo", "test"]
    mentioned = re.findall(r"`make ([a-z-]+)`", README)
    assert set(makes) | set(mentioned) <= set(targets)


def test_every_command_that_needs_no_weights_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(RUNNABLE) >= 8
    first = grat("image", "a red fox", "--model", "demo", "--steps", "1", "--out", "demo.png")
    assert first.code == 0, first.err
    with Image.open("demo.png") as made:
        Image.new("L", made.size, 255).save("mask.png")
    for name, text in PROMPT_FILES.items():
        Path(name).write_text(text)
    for command in RUNNABLE:
        if command[1] == "tune":
            command = [*command[:2], "2", *command[3:]]  # prompts, of which each takes as long
        quick = QUICK_BENCH[_level(command)] if command[1] == "bench" else QUICK.get(command[1], [])
        quick = [*quick, *(["--frames", "5", "--res", "64p"] if "vbench" in command else [])]
        if command[1] in MAKERS and RESUMED & set(command):
            _break_off([*command[1:], *quick], monkeypatch)
            continue
        result = grat(*command[1:], *quick)
        assert result.code == 0, f"{shlex.join(command)}: {result.err}"
        assert result.out.strip() or "--gpus" in command  # which other processes print


def _break_off(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts what is then resumed after its first step."""

    def step(self: object, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grat_cli.console.progress.LogProgress.step", step)
        result = grat(*arguments)
    assert result.code == 130
    assert "go on with grat resume" in result.err


def test_the_wings_are_those_of_the_contract_in_its_order() -> None:
    items = re.findall(r"^- ((?:`[a-z]+`(?:, )?)+):", README, re.MULTILINE)
    listed = [name for item in items for name in _quoted(item)]
    layers = re.findall(r'"grat_cli\.([a-z]+)"', (ROOT / "pyproject.toml").read_text().partition("\nlayers = [")[2])
    assert listed == sorted(listed, key=layers.index)
    assert sorted(listed) == sorted(path.parent.name for path in (ROOT / "grat_cli").glob("*/__init__.py"))


def test_files_that_developers_are_sent_to_exist() -> None:
    section = README.partition("## For developers")[2]
    paths = [name for name in _quoted(section) if "/" in name and "NAME" not in name]
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).exists(), path


def _quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def _understood(command: list[str]) -> dict[str, Any]:
    """The parameters of a command line, by name."""
    group = typer.main.get_command(app)
    return group.commands[command[1]].make_context(command[1], command[2:]).params  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", NEEDS_WEIGHTS, ids=shlex.join)
def test_commands_for_large_models_are_understood(command: list[str]) -> None:
    assert _understood(command)["prompt"] == "a fox"


def test_commands_for_several_cards_are_understood() -> None:
    rows = "".join(re.findall(r"^\| (?:one card|several cards|several machines|beforehand).*$", README, re.MULTILINE))
    shown = [shlex.split(re.sub(r"^torchrun .* -m grat_cli", "grat", text)) for text in _quoted(rows)]
    commands = [command for command in shown if command[0] == "grat"]
    assert len(commands) == 8
    for command in commands:
        assert _understood(command)


def test_the_table_of_presets_states_the_planned_work() -> None:
    rows = re.findall(r"^\| `((flux|hunyuan)-[a-z-]+)`.*\| ([0-9/.]+) \|$", README, re.MULTILINE)
    assert len(rows) == 16
    for name, family, work in rows:
        grid, text, layers = (Grid((512, 512)), 512, 57) if family == "flux" else (Grid((33, 45, 80)), 256, 60)
        preset = load_preset(name)
        steps = preset.sampling.steps
        schedule = AttentionSchedule(preset, grid, text, text_first=family == "flux", steps=steps, layers=layers)
        stated = work.partition("/")[2] or "1"
        assert f"{schedule.ideal_speedup:.{1 if '.' in stated else 0}f}" == stated, name


def test_the_presets_shown_are_valid(tmp_path: Path) -> None:
    schedules = []
    for number, shown in enumerate(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)):
        path = tmp_path / f"preset-{number}.yaml"
        path.write_text(shown)
        preset = load_preset(str(path))
        schedules.append(AttentionSchedule(preset, Grid((128, 128)), 512, text_first=True, steps=28, layers=57))
    by_rules, by_content = schedules
    assert by_rules.plan(2, 30).density == by_rules.plan(10, 1).density == 1.0
    assert by_rules.plan(3, 2).density < 0.5
    computed = [step for step in range(28) if by_content.density_of_step(step)]
    assert computed == [0, 3, 7, 13, 19, 24]


def test_the_python_examples_call_what_exists() -> None:
    shown = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    calls = [
        node
        for node in ast.walk(ast.parse(shown))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "install"
    ]
    assert len(calls) == 4
    for call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}
        arguments = {name: eval(value, {"Grid": Grid, "mesh": None}) for name, value in given.items()}
        inspect.signature(grat_cli.install).bind("pipe", **arguments)
        load_preset(arguments["preset"])


def test_files_that_the_readme_points_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).is_file(), target
