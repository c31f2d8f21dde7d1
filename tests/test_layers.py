"""Imports go down the wings only, and what must start fast loads no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_imports_go_down_the_wings_only(capsys: pytest.CaptureFixture[str]) -> None:
    """The contracts of pyproject.toml; what breaks one is printed."""
    from importlinter.cli import lint_imports

    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


def test_every_wing_says_what_it_is_and_has_its_layer() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for folder in (path.parent for path in (ROOT / "grat_cli").glob("*/__init__.py")):
        assert f'"grat_cli.{folder.name}"' in text
        assert (folder / "__init__.py").read_text().startswith('"""')


def test_only_families_and_commands_of_one_medium_tell_models_apart() -> None:
    """A new family is one file: nothing else asks which one it has, or whether that makes pictures or videos."""
    asking = re.compile(r"family (==|!=)|medium ==|\.video is None|isinstance\(request, VideoRequest")
    may = ("families/", "demo/", "commands/image.py", "commands/video.py")
    package = ROOT / "grat_cli"
    found = [
        f"{name}:{number}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        if not (name := path.relative_to(package).as_posix()).startswith(may)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if asking.search(line)
    ]
    assert found == []


# One process for all: each command runs after the others, so whatever one of them loads shows up.
_LIGHT_COMMANDS = """
import sys
from grat_cli.app import run
codes = [run(arguments) for arguments in (
    ["--help"], ["image", "--help"], ["--version"], ["presets"], ["presets", "demo"], ["presets", "flux-far"],
    ["plan", "flux-x", "--res", "8192"], ["plan", "demo-far", "--json"], ["plan", "--model", "flux-schnell"],
    ["bench", "--help"], ["video", "--help"], ["resume", "--help"], ["decode", "--help"],
    ["info", "missing.png"], ["image", ""], ["bench", "--compare", "grat-c"],
    ["batch", "--help"], ["batch", "none.txt"],
    ["video", ""], ["video", "waves", "--model", "demo", "--res", "huge"], ["resume", "a.mp4"], ["decode", "a.mp4"],
    ["image", "a fox", "--model", "demo", "--res", "1000"], ["attend", ""],
    ["attend", "a fox", "--model", "demo", "--patterns", "na"],
)]
heavy = {"torch", "diffusers", "transformers", "triton"} & set(sys.modules)
print(codes, sorted(heavy), file=sys.stderr)
sys.exit(codes != [0] * 13 + [2] * 3 + [0] + [2] * 8 or bool(heavy))
"""


def test_commands_that_need_no_model_load_no_torch(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LIGHT_COMMANDS], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Q query group" in done.stdout


def test_the_public_package_loads_no_torch_either() -> None:
    code = "import grat_cli, grat_kernels, sys; grat_kernels.build_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
