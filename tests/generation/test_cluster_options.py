"""`grat batch --ray`: what is refused, and that nothing of Ray is needed without it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import refusal
from small_batches import SMALL, write_lines

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install 'grat-cli[ray]'")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--ray", "local", "--shard", "1/2"), "--ray and --shard exclude each other"),
        (("--ray", "local", "--device", "cuda:1"), "--device cuda:1: workers of --ray get a GPU each"),
        (("--ray", "local", "--workers", "0"), "--workers 0: expected 1 to"),
        (("--workers", "2"), "--workers 2 is for --ray"),
    ],
)
def test_what_contradicts_itself_is_refused(options: tuple[str, ...], says: str) -> None:
    write_lines("p.txt", "a fox")
    assert says in refusal("batch", "p.txt", *SMALL, "--out", "b", *options)
    assert not Path("b").exists()


@needs_ray
def test_a_cluster_that_is_not_there_is_told_of_soon() -> None:
    write_lines("p.txt", "a fox")
    arguments = ("batch", "p.txt", *SMALL, "--out", "b", "--ray")
    assert "--ray 127.0.0.1:1: nothing answers there" in refusal(*arguments, "127.0.0.1:1")
    assert "give a --model" in refusal("batch", "p.txt", "--ray", "127.0.0.1:1", code=3)


def test_ray_is_imported_with_its_option_alone() -> None:
    write_lines("p.txt", "a fox")
    code = """
import sys
from grat_cli.app import run
codes = [run(arguments) for arguments in (["--help"], ["batch", "--help"], ["batch", "p.txt", *sys.argv[1:]])]
sys.exit(codes != [0, 0, 0] or "ray" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, *SMALL, "--out", "b"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    write_lines("p.txt", "a fox")
    assert refusal("batch", "p.txt", *SMALL, "--ray", "local") == (
        "--ray needs Ray, which is not installed: pip install 'grat-cli[ray]'"
    )
