"""`--gpus`: ranks in processes of their own that torch's launcher starts, on a CPU here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import grat, refusal
from PIL import Image

import grat_cli
from grat_cli.generation.world import launch

PROMPT = "a red fox in the snow"
SMALL = ("--model", "demo", "--seed", "2", "--res", "96x80", "--steps", "12", "--device", "cpu")
PATIENCE_S = 240.0


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def begin(*arguments: str) -> subprocess.Popen[str]:
    """`grat` in a process of its own, and in the same package as this one."""
    beside = os.pathsep.join([str(Path(grat_cli.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": beside, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "grat_cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Their process numbers, the first rank's first."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        told = dict(one.split(b"=", 1) for one in environment if b"=" in one)
        if b"RANK" in told:
            found[int(told[b"RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def test_two_gpus_make_the_picture_of_one() -> None:
    """The command line is run once, by the first of them."""
    launched = begin("image", PROMPT, *SMALL, "--out", "two.png", "--gpus", "2", "--json")
    assert grat("image", PROMPT, *SMALL, "--out", "one.png").code == 0
    out, err = launched.communicate(timeout=PATIENCE_S)
    assert launched.returncode == 0, err
    np.testing.assert_array_equal(pixels("two.png"), pixels("one.png"))
    (told,) = json.loads(out)["images"]
    assert told["file"] == "two.png"
    assert (told["ranks"]["cfg"], len(told["ranks"]["each"])) == (2, 2)
    sent = max(one["bytes_per_step"] for one in told["ranks"]["each"])
    assert told["ranks"]["foretold"]["bytes_per_step"] == sent
    assert err.count("2 ranks, cp=1,cfg=2: guidance makes two calls") == 1
    assert err.count("seed 2") == 1
    shown = grat("info", "two.png")
    assert "2 ranks" in shown.out


def test_the_launcher_leaves_signals_as_they_were() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert launch(2, ["--version"]) == (0, None)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="ranks are found by what Linux tells of processes")
def test_a_rank_that_dies_ends_all_and_what_is_done_is_kept() -> None:
    launched = begin("image", PROMPT, *SMALL, "--steps", "400", "--out", "a.png", "--gpus", "3")
    assert launched.stderr is not None
    said = ""
    while not re.search(r"^step \d+/", said, re.MULTILINE):
        line = launched.stderr.readline()
        assert line, said
        said += line
    os.kill(ranks_of(launched)[2], signal.SIGKILL)
    killed = time.monotonic()
    _, err = launched.communicate(timeout=PATIENCE_S)
    assert launched.returncode == 128 + signal.SIGKILL
    assert time.monotonic() - killed < 30  # in which a launcher kills those that hang
    assert "rank 2 was ended by SIGKILL" in err
    step = re.search(r"another rank has ended, after step (\d+) of 400; go on with grat resume (\S+)", err)
    assert step, err
    assert os.listdir() == [step[2]]


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "add --gpus" in refusal("image", PROMPT, *SMALL, "--parallel", "cp=2")
    assert "add --gpus" in refusal("image", PROMPT, *SMALL, "--shard-weights")
    assert "cp=2,cfg=2, or auto" in refusal("image", PROMPT, *SMALL, "--gpus", "2", "--parallel", "tp=2")
    assert "1 or more" in refusal("image", PROMPT, *SMALL, "--gpus", "0")
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "torchrun has started 2" in refusal("image", PROMPT, *SMALL, "--gpus", "3")
    assert "use --gpus 1 or 3" in refusal("image", PROMPT, *SMALL, "--parallel", "cp=2,cfg=1")
    monkeypatch.setenv("RANK", "two")
    assert "RANK is 'two'" in refusal("image", PROMPT, *SMALL)
