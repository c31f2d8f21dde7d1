"""Runs that are kept in files: whole at any moment, and held to what a run writes and to what may be typed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import STEPS, Progress, Small, broken_off, generate, names, run_after, tamper, untimed

from grat_cli.errors import BadInput
from grat_cli.files import outputs, tensors
from grat_cli.files import whole as whole_files
from grat_cli.files.pictures import read_picture
from grat_cli.files.tensors import write_tensors
from grat_cli.generation import checkpoint
from grat_cli.generation.checkpoint import (
    discard_run,
    find_run,
    read_run,
    write_run,
)
from grat_cli.generation.finishing import decode_run
from grat_cli.generation.request import Request, check
from grat_cli.generation.stored import request_data, request_from_data
from grat_cli.models.catalogue import choose_model

FOLDERS = Path(__file__).parent, Path(__file__).parents[1] / "support"  # for processes that import from here
of_cascades = pytest.mark.parametrize("small", ["cascade"], indirect=True)


def written_after(asked: Request, done: int, **changes: Any) -> Path:
    """What is written of a run that was not computed."""
    return write_run(replace(run_after(asked, done), **changes), asked, asked.outputs[0])


# ---- Written and read


GUARD = {
    "widened": [],
    "lowest": [1, 2, [0.5, 0.5, None, 1]],
    "measured": {},
    "doubled": [],
    "least_carried": None,
    "carried": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_run_stands_where_it_stood(small: Small, tmp_path: Path, dtype: torch.dtype) -> None:
    asked = small.of(tmp_path / "a")
    run = run_after(asked, 3)
    assert run.latents is not None
    run = replace(run, latents=run.latents.to(dtype), guard=GUARD)
    kept = write_run(run, asked, asked.outputs[0])
    found, restored = read_run(kept)
    assert (kept.name, restored) == ("a.checkpoint.safetensors", asked)
    plain = {"latents", "noise_state", "random_state", "kept"}
    assert {name: value for name, value in vars(found).items() if name not in plain} == {
        name: value for name, value in vars(run).items() if name not in plain
    }
    assert found.kept == kept
    assert found.latents is not None
    assert run.latents is not None
    assert found.latents.dtype == dtype
    assert torch.equal(found.latents, run.latents)
    assert found.noise_state is not None
    drawn, expected = torch.Generator(), torch.Generator()
    drawn.set_state(found.noise_state)
    assert run.noise_state is not None
    expected.set_state(run.noise_state)
    assert torch.equal(torch.rand(9, generator=drawn), torch.rand(9, generator=expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latents_take_the_place_of_the_checkpoint_exactly(small: Small, tmp_path: Path, dtype: torch.dtype) -> None:
    asked = small.of(tmp_path / "a")
    written_after(asked, 3)
    run = run_after(asked, STEPS)
    assert run.latents is not None
    half = run.latents.to(dtype)
    kept = write_run(replace(run, latents=half), asked, asked.outputs[0])
    assert names(tmp_path) == [kept.name] == ["a.latents.safetensors"]
    found, _ = read_run(kept)
    assert found.latents is not None
    assert run.latents is not None
    assert (found.finished, found.latents.dtype) == (True, torch.float32)
    assert torch.equal(found.latents.to(dtype), half)


def test_the_newest_one_is_kept_and_removed_at_the_end(small: Small, tmp_path: Path) -> None:
    asked = small.of(tmp_path / "a")
    for done in (1, 2):
        kept = written_after(asked, done)
    assert read_run(kept)[0].done == len(outputs.read_provenance(kept)["state"]["steps"]) == 2
    leftover = kept.with_name(f".{kept.name}.{'0a' * 8}.part")
    other = kept.with_name(f".other.checkpoint.safetensors.{'0a' * 8}.part")
    for part in (leftover, other):
        part.write_bytes(b"half")
    with whole_files.part_of(kept) as being_written:
        discard_run(asked.outputs[0])
        assert names(tmp_path) == sorted([other.name, being_written.name])
    discard_run(asked.outputs[0])
    with pytest.raises(BadInput, match="no such file"):
        read_run(kept)


# For each number it reads, a process of its own writes checkpoints from there on as fast as it can, each with content
# that follows from its step, until it is killed.
_WRITERS = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[2:]
from small_runs import run_after
from grat_cli.generation.checkpoint import write_run
from test_checkpoint import long_run
asked = long_run(Path(sys.argv[1]))
for line in sys.stdin:
    done = int(line)
    writer = os.fork()
    while not writer:
        done += 1
        write_run(run_after(asked, done), asked, asked.outputs[0])
        os.write(1, b"%d\\n" % done)
    print("writer", writer, flush=True)
    os.waitpid(writer, 0)
    print("killed", flush=True)
"""


def long_run(place: Path) -> Request:
    """Of many steps, and of latents that take a while to be written."""
    small = small_runs.picture()
    many = small.preset(sampling={"steps": 10_000}, highres={"mode": "off"})
    return small.of(place, preset=many, width=512, height=512, overwrite=True)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    asked = long_run(tmp_path / "a")
    kept = written_after(asked, 1)
    moments = random.Random(0)
    step = 1
    with subprocess.Popen(
        [sys.executable, "-c", _WRITERS, tmp_path / "a", *FOLDERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(10):
            print(step, file=process.stdin, flush=True)
            told, writer = [step], None
            while writer is None or len(told) == 1:
                line = process.stdout.readline()
                if line.startswith("writer"):
                    writer = int(line.split()[1])
                else:
                    told.append(int(line))
            time.sleep(moments.uniform(0, 0.06))
            os.kill(writer, signal.SIGKILL)
            while (line := process.stdout.readline()) != "killed\n":
                told.append(int(line))
            # What was reported as written is there, or the one after it.
            found, restored = read_run(kept)
            assert replace(restored, overwrite=True) == asked
            assert found.done in (told[-1], told[-1] + 1)
            expected = run_after(asked, found.done)
            for name in ("latents", "noise_state", "random_state"):
                assert torch.equal(getattr(found, name), getattr(expected, name))
            assert found.steps == expected.steps
            step = found.done
    discard_run(asked.outputs[0])
    assert names(tmp_path) == [kept.name]  # another process wrote it


_FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:4]
from small_runs import run_after
from test_checkpoint import long_run
from grat_cli.errors import CannotWrite
from grat_cli.generation.checkpoint import read_run, write_run
asked = long_run(Path(sys.argv[1]))
kept = write_run(run_after(asked, 1), asked, asked.outputs[0])
for limit in map(int, sys.argv[4:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_run(run_after(asked, 2), asked, asked.outputs[0])
    except CannotWrite as error:
        print(error, read_run(kept)[0].done)
"""


def test_a_full_disk_keeps_the_old_one_and_says_so(tmp_path: Path) -> None:
    limits = ("0", "100", "5000", "150000")
    command = [sys.executable, "-c", _FULL_DISK, tmp_path / "a", *FOLDERS, *limits]
    done = subprocess.run(command, capture_output=True, text=True)
    kept = tmp_path / "a.checkpoint.safetensors"
    assert done.stderr == ""
    assert done.stdout == f"cannot write {kept}: file too large 1\n" * len(limits)
    assert names(tmp_path) == [kept.name]


def test_a_large_picture_of_the_demo_goes_on_in_its_second_stage(tmp_path: Path) -> None:
    """With the model as it is, loaded anew for each process, and pictures in files."""
    small = small_runs.cascade()
    demo = choose_model("demo", medium="image")
    asked = small.of(tmp_path / "a", model=demo, width=512, height=512, checkpoint_every=1)
    whole = replace(asked, outputs=(tmp_path / "whole.png",), save_latents=True)
    (expected,) = generate(whole)
    assert [stage["width"] for stage in expected.report["stages"]] == [256, 512]
    run, restored = read_run(broken_off(asked, after=4))
    assert (run.stage, run.done, run.done_in_stage) == (1, 4, 1)
    (made,) = generate(restored, Progress(), run)
    run, restored = read_run(find_run(tmp_path / "whole.png"))
    again = decode_run(run, restored, tmp_path / "again.png", Progress())
    pixels = [np.asarray(read_picture(path)) for path in (expected.path, made.path, again.path)]
    assert (pixels[0] == pixels[1]).all()
    assert (pixels[0] == pixels[2]).all()
    assert untimed(expected.report) == untimed(made.report) == untimed(again.report)


# ---- Requests


def test_requests_come_back_from_data(small: Small, tmp_path: Path) -> None:
    asked = small.of(tmp_path / "a", tmp_path / "b", quality=20, negative_prompt="a boat", strength=0.5)
    place = tmp_path / "elsewhere" / "c-s8"
    moved = request_from_data(request_data(replace(asked, overwrite=True)), place, 8)
    assert moved == replace(asked, outputs=small.of(place.with_name("c-s7"), place).outputs)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"model": None}, "model: "),
        ({"model": {"name": "x", "source": "x/../y", "kind": "folder"}}, "model.source: not an absolute path"),
        ({"model": {"name": "x", "source": "owner/name", "kind": "file"}}, "model.source: not an absolute path"),
        ({"model": {"name": "demo", "source": "owner/name", "kind": "hub"}}, "was a hub and is a folder here"),
        ({"weights": {"base": "../parts"}}, "base: neither an absolute path"),
        ({"seeds": "x"}, "seeds: "),
        ({"seeds": [7, 7]}, "seeds: one is missing, or there twice"),
        ({"seeds": [9]}, "seeds: one is missing"),
        ({"seeds": [7, 2**63]}, "seeds.1: "),
        ({"frames": "nine"}, "frames: "),
        ({"frames": 10**9 + 1}, "frames: "),
        ({"width": 2**40}, "width: "),
        ({"fps": 0}, "fps: "),
        ({"preset": {}}, "preset.name: "),
        ({"format": "exe"}, "format: "),
        ({"quality": 10**9}, "quality: "),
        ({"strength": 0}, "strength: "),
        ({"strength": float("nan")}, "strength: "),
        ({"init_image": ""}, "init_image: "),
        ({"device": "gpu\x1b[31m"}, "device: "),
        ({"dtype": "float8"}, "dtype: "),
        ({"offload": "all"}, "offload: "),
        ({"metadata": "no"}, "metadata: "),
        ({"checkpoint_every": -1}, "checkpoint_every: "),
        ({"prompt": "x" * 2**21}, "prompt: "),
        # Where outputs go and what they may replace is typed, and no file decides it.
        ({"outputs": ["/etc/passwd"]}, "outputs: "),
        ({"overwrite": True}, "overwrite: "),
        ({"unknown\n\x1b": 1}, r"unknown\\n\\x1b: "),
    ],
)
def test_stored_requests_are_held_to_what_may_be_typed(
    small: Small, tmp_path: Path, damage: dict[str, Any], says: str
) -> None:
    data = request_data(small.of(tmp_path / "a")) | damage
    with pytest.raises(BadInput, match=f"^the request is damaged, or of another version of grat: .*{says}") as caught:
        request_from_data(data, tmp_path / "a", 7)
    assert len(str(caught.value).splitlines()) == 1
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(("small", "format"), [("picture", "mp4"), ("video", "png")], indirect=["small"])
def test_a_stored_format_of_the_other_medium_is_refused(small: Small, tmp_path: Path, format: str) -> None:
    data = request_data(small.of(tmp_path / "a"))
    with pytest.raises(BadInput, match=f"format: {format} is none of {'videos' if format == 'png' else 'pictures'}"):
        request_from_data(data | {"format": format}, tmp_path / "a", 7)
    with pytest.raises(BadInput, match="format: "):
        request_from_data(data | {"frames": 9 if format == "mp4" else None}, tmp_path / "a", 7)


@pytest.mark.parametrize(
    ("small", "changes", "says"),
    [
        ("video", {"frames": 10}, "must be a multiple of 4 and one more, not 10: use 9 or 13"),
        ("video", {"frames": 0}, "use 1 or 5"),
        ("video", {"fps": 0}, "must be 1 or more, not 0"),
        ("video", {"model": choose_model("demo", medium="image")}, "demo makes images"),
        ("video", {"width": 60}, "multiples of 16, not 60x48"),
        ("picture", {"width": 60}, "multiples of 16, not 60x80"),
        ("picture", {"strength": 1.5}, r"strength must lie above 0 and at most at 1, not 1\.5"),
        *((kind, {"seeds": (1, 2)}, "2 seeds need as many outputs, not 1") for kind in ("picture", "video")),
        *((kind, {"checkpoint_every": -1}, "must be 0 or more") for kind in ("picture", "video")),
    ],
    indirect=["small"],
)
def test_outputs_that_cannot_be_made_are_refused(
    small: Small, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        check(small.of(tmp_path / "a", **changes))


# ---- Damage


def refused(kept: Path, says: str = "") -> None:
    """A file that is not gone on with, for a reason in one line."""
    with pytest.raises(BadInput, match=f"cannot be gone on with: .*{says}") as caught:
        read_run(kept)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


STEP = {
    "index": 2,
    "timestep": 500.0,
    "total_ms": 1.0,
    "attention_ms": 0.5,
    "other_ms": 0.5,
    "density": 1.0,
    "stage": 0,
}
HUGE = 10**400


@pytest.mark.parametrize(
    "damage",
    [
        {"seed": -1},
        {"seed": HUGE},
        {"peak_memory_kind": 5},
        {"guard": [1]},
        {"guard": {"bar": 1.0, "layers": 3, "planned_density": None, "lowest": {}, "widened": []}},
        {"device": {"threads": 10**6}},
        {"model": []},
        {"sampling": None},
        {"density": "low"},
        {"request": None},
        {"request": {"width": 160, "height": 160}},
        {"state": None},
        {"state": {"steps": []}},
        {"state": {"steps": [{"index": 0}]}},
        {"state": {"steps": [STEP] * (STEPS + 1)}},
        {"state": {"steps": [STEP, {**STEP, "stage": 1}]}},
        {"state": {"steps": [STEP, {**STEP, "stage": -1}]}},
        {"state": {"steps": [STEP, {**STEP, "total_ms": HUGE}]}},
        {"state": {"steps": [STEP, {**STEP, "index": HUGE}]}},
        {"state": {"steps": [STEP, {**STEP, "exchange_ms": -1.0}]}},
        {"state": {"steps": [STEP, {**STEP, "exchanged_bytes": HUGE}]}},
        {"state": {"phases": {"load": "long"}}},
        {"state": {"phases": {"load": 1e300}}},
        {"state": {"memory": {"load": -1}}},
        {"state": {"memory": {"load": HUGE}}},
        {"state": {"guard": [1]}},
        {"state": {"start_size": [0, 5]}},
        {"state": {"start_size": [2**40, 5]}},
        {"state": {"stages": [{}]}},
        {"state": {"stages": []}},
        {"state": {"more": 1}},
    ],
    ids=lambda damage: str(damage)[:60],
)
def test_stored_runs_are_held_to_what_a_run_writes(small: Small, tmp_path: Path, damage: dict[str, Any]) -> None:
    kept = written_after(small.of(tmp_path / "a"), 2)
    read_run(kept)
    tamper(kept, **damage)
    refused(kept)


def test_numbers_that_are_none_are_refused(small: Small, tmp_path: Path) -> None:
    kept = written_after(small.of(tmp_path / "a"), 2)
    tamper(kept, state={"phases": {"load": float("nan")}})
    with pytest.raises(BadInput, match="damaged"):
        read_run(kept)


@pytest.fixture
def two_stages(small: Small, loaded: Any, tmp_path: Path) -> Path:
    """What is kept of a cascade in its second stage."""
    return broken_off(small.of(tmp_path / "a"), after=4)


@of_cascades
@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"stage": 2}, "at stage 3 of 2"),
        ({"stage": 0}, "at stage 1"),
        ({"stage": -1}, "stage: "),
        ({"stage": HUGE}, "stage: "),
        ({"stage": "1"}, "stage: "),
        ({"steps": [STEP] * 4}, "at stage 2"),
        ({"steps": [STEP] * 2 + [{**STEP, "stage": 1}]}, "stage 1 has 2 steps done of 3"),
        ({"steps": [STEP] * 3 + [{**STEP, "stage": 1}] * 3}, "stage 2 has 3 steps done"),
        ({"steps": [STEP] * 3 + [{**STEP, "stage": 1}, {**STEP, "stage": 2}]}, "stage 3 has 1 steps done"),
        ({"start_size": [64, 64]}, ""),
        ({"stages": [{}, {}]}, "number: "),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_stage_that_is_not_the_runs_own_is_refused(two_stages: Path, state: dict[str, Any], says: str) -> None:
    tamper(two_stages, state=state)
    refused(two_stages, says)


@of_cascades
def test_stages_of_another_run_are_refused(two_stages: Path) -> None:
    stages = [dict(stage) for stage in read_run(two_stages)[0].stages]
    for number, field, value in [(0, "steps", 4), (1, "width", 64), (0, "density", HUGE), (1, "guard", 1)]:
        told = [stage | ({field: value} if stage["number"] == number else {}) for stage in stages]
        tamper(two_stages, state={"stages": told})
        refused(two_stages)
    tamper(two_stages, state={"stages": stages})
    read_run(two_stages)


@of_cascades
@pytest.mark.parametrize("name", ["latents", "start"])
def test_tensors_of_another_stage_are_refused(two_stages: Path, name: str) -> None:
    tensor = getattr(read_run(two_stages)[0], name)
    small_ones = {"latents": tensor[:, :64], "start": tensor[..., :16, :16]}
    others = [small_ones[name], tensor[..., :-1], tensor[0], tensor[:0], tensor.to(torch.int32), torch.zeros(()), None]
    for other in others:
        tamper(two_stages, {name: other})
        refused(two_stages, f"its {name} is " if other is not None else f"it has no {name}")
    tamper(two_stages, {name: tensor})
    read_run(two_stages)


def test_tensors_of_another_shape_than_the_request_are_refused(small: Small, tmp_path: Path) -> None:
    for done in (2, STEPS):
        kept = written_after(small.of(tmp_path / f"a{done}"), done)
        found, asked = read_run(kept)
        assert found.latents is not None
        whole = found.latents
        others = [whole[:, :-1], whole[..., :-1], whole[0], whole[:, :0], torch.cat([whole, whole]), whole.bool()]
        if asked.frames:
            others.append(whole[:, :, :2])
        for latents in others:
            tamper(kept, {"latents": latents})
            refused(kept, r"its latents is \[")
        tamper(kept, {"latents": None})
        refused(kept, "it has no latents")
        # What the run of another size, or from a picture, would have.
        tamper(kept, {"latents": whole, "picture": whole.clone()})
        refused(kept, "its picture is ")
        tamper(kept, {"latents": whole, "picture": None, "start": whole.clone()})
        refused(kept, "its start is ")
        tamper(kept, {"start": None})
        read_run(kept)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda latents: latents.long(), r"torch\.int64"),
        (lambda latents: latents.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda latents: latents.to(torch.complex64), "torch.complex64"),
        (lambda latents: latents * torch.nan, "its latents is not finite"),
        (lambda latents: latents.index_fill(-1, torch.tensor(2), torch.inf), "its latents is not finite"),
        (lambda latents: latents + 1e30, "its latents has numbers beyond 1,000,000"),
    ],
)
@pytest.mark.parametrize("done", [2, STEPS])
def test_latents_that_no_run_has_are_refused(
    small: Small, tmp_path: Path, done: int, change: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    kept = written_after(small.of(tmp_path / "a"), done)
    latents = read_run(kept)[0].latents
    assert latents is not None
    tamper(kept, {"latents": change(latents)})
    refused(kept, says)


def guard_state(**changes: Any) -> dict[str, Any]:
    widening = {"step": 2, "layer": 1, "measured_step": 0, "kept": 0.4, "recall": 0.4, "error": None, "width": 1}
    measured = {"1": [[0, 0.5, 0.5, None, 0]]}
    doubling = {"step": 2, "section": 0, "measured_step": 0, "kept": 0.5, "layer": 1, "least": 0.4, "references": [3]}
    return {
        "widened": [widening | {"to": "full"}],
        "lowest": [0, 1, [0.4, 0.4, None, 0]],
        "measured": measured,
        "doubled": [doubling],
        "least_carried": [0, 0, 0.5],
        "carried": {"1": [[0, 0.75]]},
        **changes,
    }


@pytest.mark.parametrize(
    "damage",
    [
        {"widened": [{}]},
        {"widened": [{**guard_state()["widened"][0], "width": 3}]},
        {"widened": [{**guard_state()["widened"][0], "layer": HUGE}]},
        {"lowest": [0, 1]},
        {"lowest": [0, 1, [[], 0.4, None, 0]]},
        {"measured": {"x": []}},
        {"doubled": [{**guard_state()["doubled"][0], "references": [HUGE]}]},
        {"least_carried": [0, 0]},
        {"carried": {"1": [[0]]}},
        {"measured": {"1": [[0, "0.5", 0.5, None, 0]]}},
        {"more": 1},
    ],
    ids=str,
)
def test_guards_that_no_run_had_are_refused(small: Small, tmp_path: Path, damage: dict[str, Any]) -> None:
    kept = written_after(small.of(tmp_path / "a"), 2, guard=guard_state())
    assert read_run(kept)[0].guard == guard_state()
    tamper(kept, state={"guard": guard_state(**damage)})
    refused(kept, "guard")


@pytest.mark.parametrize("name", ["noise_state", "random_state"])
def test_random_states_that_would_be_read_beyond_their_end_are_refused(small: Small, tmp_path: Path, name: str) -> None:
    """torch takes them, and draws numbers from the memory that follows."""
    kept = written_after(small.of(tmp_path / "a"), 2)
    state = torch.Generator().manual_seed(0).get_state()
    for left, seeded, following in ((624, 1, 624), (600, 1, 600), (100, 1, 2**63), (0, 1, 625), (1, 0, 0)):
        head = torch.frombuffer(bytearray(struct.pack("<QiiQ", 1, left, seeded, following)), dtype=torch.uint8)
        tamper(kept, {name: torch.cat([head, state[24:]])})
        refused(kept, f"its {name.replace('_', ' ')} is none")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 2**16 - 1), min_size=1, max_size=9))
def test_whatever_was_drawn_the_random_state_is_taken(drawn: list[int]) -> None:
    generator = torch.Generator().manual_seed(7)
    for count in drawn:
        torch.rand(count, generator=generator)
        assert checkpoint._is_random_state(generator.get_state())


@pytest.mark.parametrize("name", ["noise_state", "random_state"])
def test_random_states_that_are_none_are_refused(small: Small, tmp_path: Path, name: str) -> None:
    kept = written_after(small.of(tmp_path / "a"), 2)
    for state in (None, torch.zeros(3), torch.zeros(3, 3, dtype=torch.uint8)):
        tamper(kept, {name: state})
        refused(kept, f"its {name.replace('_', ' ')} is none")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
) | st.sampled_from([HUGE, -HUGE, 2**63, 1e308, "/dev/zero", "\x1b[31m", "[/]", "\udcff", "x" * 10_000])


def paths_in(value: Any) -> Iterator[tuple[str | int, ...]]:
    """Of each value within plain data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield (key,)
        yield from ((key, *path) for path in paths_in(below))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_file_says_it_is_read_or_refused(small: Small, tmp_path: Path, data: st.DataObject) -> None:
    kept = written_after(small.of(tmp_path / "a", overwrite=True), 2, guard=guard_state())
    told = tensors.read_about(kept)
    assert told is not None
    *above, last = data.draw(st.sampled_from(list(paths_in(told))))
    section: Any = told
    for part in above:
        section = section[part]
    section[last] = data.draw(VALUES)
    tamper(kept, **{name: None for name in told} | told)
    with contextlib.suppress(BadInput):
        run, asked = read_run(kept)
        write_run(run, asked, asked.outputs[0])  # all that was taken can be written


def test_files_that_are_no_runs_are_refused(small: Small, tmp_path: Path) -> None:
    asked = small.of(tmp_path / "a")
    with pytest.raises(BadInput, match="nothing to go on with"):
        find_run(asked.outputs[0])
    for folder in (".", "/"):
        with pytest.raises(BadInput, match="is a folder: give a checkpoint or latents in it"):
            find_run(Path(folder))
    kept = written_after(asked, 2)
    latents = kept.with_name("a.latents.safetensors")
    latents.write_bytes(kept.read_bytes())
    with pytest.raises(BadInput, match=r"is not a latents file of grat: it says grat\.checkpoint/2"):
        read_run(latents)
    tamper(latents, schema="grat.latents/2")
    refused(latents, f"2 of {STEPS} steps are done, and it has no checkpoint")
    write_tensors(latents, {"latents": torch.zeros(1)}, {"schema": "grat.latents/2", "prompt": "waves"}, overwrite=True)
    refused(latents, "it is damaged, or of another version of grat")
