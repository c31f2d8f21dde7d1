from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from grat_cli.errors import BadInput, CannotWrite
from grat_cli.files import outputs
from grat_cli.files import whole as whole_files
from grat_cli.files.checkpoint import SCHEMA, CheckpointStore
from grat_cli.files.latents import save_latents

ABOUT = {"prompt": "waves", "width": 256, "steps": 20}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "waves.checkpoint.safetensors")


def latents_of(step: int, side: int = 6) -> torch.Tensor:
    return torch.randn(1, 4, 3, side, side, generator=torch.Generator().manual_seed(step))


def random_state(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    torch.rand(step + 1, generator=generator)
    return generator.get_state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_run_stands_where_it_stood(dtype: torch.dtype, store: CheckpointStore) -> None:
    latents, state = latents_of(3).to(dtype), random_state(3)
    timings = [{"index": step, "total_ms": step + 0.5} for step in range(3)]
    store.write(3, latents, state, ABOUT, timings)
    found = store.read(shape=(1, 4, 3, 6, 6))
    assert found.step == 3
    assert found.latents.dtype == dtype
    assert torch.equal(found.latents, latents)
    assert found.step_timings == timings
    assert {key: found.about[key] for key in ABOUT} == ABOUT
    assert found.about["schema"] == SCHEMA
    drawn, expected = torch.Generator(), torch.Generator()
    assert found.generator_state is not None
    drawn.set_state(found.generator_state)
    expected.set_state(state)
    assert torch.equal(torch.rand(9, generator=drawn), torch.rand(9, generator=expected))


def test_the_newest_one_is_kept_and_removed_at_the_end(store: CheckpointStore) -> None:
    for step in (1, 2):
        store.write(step, latents_of(step), None, ABOUT)
    found = store.read()
    assert (found.step, found.generator_state, found.step_timings) == (2, None, [])
    assert outputs.read_provenance(store.path)["steps_done"] == 2
    leftover = store.path.with_name(f".{store.path.name}.{'0a' * 8}.part")
    other = store.path.with_name(f".other.checkpoint.safetensors.{'0a' * 8}.part")
    for part in (leftover, other):
        part.write_bytes(b"half")
    with whole_files.part_of(store.path) as being_written:
        store.remove()
        assert sorted(os.listdir(store.path.parent)) == sorted([other.name, being_written.name])
    store.remove()
    with pytest.raises(BadInput, match="no such file"):
        store.read()


def test_other_files_and_versions_are_refused(store: CheckpointStore) -> None:
    def about(**changes: Any) -> dict[str, str]:
        return {"grat": json.dumps({"schema": SCHEMA, "steps_done": 1, "step_timings": []} | changes)}

    whole = {"latents": latents_of(1)}
    for tensors, metadata, message in (
        (whole, None, "is not a checkpoint of grat"),
        (whole, about(schema="grat.checkpoint/2"), "format grat.checkpoint/2, .* reads grat.checkpoint/1"),
        (whole, about(schema="other/1"), "is not a checkpoint of grat: it says other/1"),
        ({"other": latents_of(1)}, about(), "not a whole checkpoint"),
        (whole, about(steps_done="1"), "not a whole checkpoint"),
        (whole, about(steps_done=-1), "not a whole checkpoint"),
        (whole, about(step_timings=None), "not a whole checkpoint"),
        (whole | {"generator_state": torch.zeros(3)}, about(), "not a whole checkpoint"),
    ):
        store.path.unlink(missing_ok=True)
        save_file(tensors, store.path, metadata)
        with pytest.raises(BadInput, match=message):
            store.read()
    save_latents(store.path, latents_of(1), ABOUT, overwrite=True)
    with pytest.raises(BadInput, match="is not a checkpoint of grat: it says"):
        store.read()
    store.path.write_text("text")
    with pytest.raises(BadInput, match="not a safetensors file, or it is damaged"):
        store.read()
    store.write(1, latents_of(1), None, ABOUT, overwrite=True)
    with pytest.raises(
        BadInput, match=r"of another run: its latents are \[1, 4, 3, 6, 6\], this run's are \[1, 4, 3, 6, 8\]"
    ):
        store.read(shape=(1, 4, 3, 6, 8))


def test_a_file_cut_off_anywhere_is_refused(store: CheckpointStore) -> None:
    store.write(1, latents_of(1), random_state(1), ABOUT)
    whole = store.path.read_bytes()
    for length in (0, 7, 8, 100, 600, len(whole) - 1):
        store.path.write_bytes(whole[:length])
        with pytest.raises(BadInput, match="damaged"):
            store.read()


# For each number it reads, a process of its own writes checkpoints from there on as fast as it can, each with content
# that follows from its step, until it is killed.
_WRITERS = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from grat_cli.files.checkpoint import CheckpointStore
from test_checkpoint import ABOUT, latents_of, random_state
import safetensors.torch
store = CheckpointStore(Path(sys.argv[1]))
for line in sys.stdin:
    step = int(line)
    writer = os.fork()
    while not writer:
        step += 1
        store.write(step, latents_of(step, 160), random_state(step), ABOUT, list(range(step)), overwrite=True)
        os.write(1, b"%d\\n" % step)
    os.write(1, b"writer %d\\n" % writer)
    os.waitpid(writer, 0)
    print("killed", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(store: CheckpointStore) -> None:
    store.write(0, latents_of(0, 160), random_state(0), ABOUT)
    moments = random.Random(0)
    step = 0
    with subprocess.Popen(
        [sys.executable, "-c", _WRITERS, store.path, Path(__file__).parent],
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
            found = store.read(shape=(1, 4, 3, 160, 160))
            assert found.step in (told[-1], told[-1] + 1)
            assert torch.equal(found.latents, latents_of(found.step, 160))
            assert found.generator_state is not None
            assert torch.equal(found.generator_state, random_state(found.step))
            assert found.step_timings == list(range(found.step))
            step = found.step
    store.remove()
    assert os.listdir(store.path.parent) == [store.path.name]  # another process wrote it


_FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from grat_cli.errors import CannotWrite
from grat_cli.files.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
store.write(1, torch.ones(1, 4, 3, 6, 6), None, {})
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        store.write(2, torch.zeros(1, 4, 3, 60, 60), None, {})
    except CannotWrite as error:
        print(error, store.read().step)
"""


def test_a_full_disk_keeps_the_old_one_and_says_so(store: CheckpointStore) -> None:
    limits = ("0", "100", "5000", "150000")
    done = subprocess.run([sys.executable, "-c", _FULL_DISK, store.path, *limits], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == f"cannot write {store.path}: file too large 1\n" * len(limits)
    assert os.listdir(store.path.parent) == [store.path.name]


def test_content_and_name_are_on_the_disk_before_it_returns(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content first, then the name, then the folder that has it."""
    calls: list[str] = []
    sync, replace, link = os.fsync, os.replace, os.link

    def fsync(descriptor: int) -> None:
        calls.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")
        sync(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    def name(source: Path, target: Path) -> None:
        calls.append("link")
        link(source, target)

    monkeypatch.setattr(whole_files.os, "fsync", fsync)
    monkeypatch.setattr(whole_files.os, "replace", rename)
    monkeypatch.setattr(whole_files.os, "link", name)
    store.write(1, latents_of(1), None, ABOUT)
    store.write(2, latents_of(2), None, ABOUT)
    assert calls == ["sync file", "link", "sync folder", "sync file", "replace", "sync folder"]


def test_a_failing_disk_keeps_the_old_one(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(1, latents_of(1), None, ABOUT)

    def fails(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(whole_files.os, "fsync", fails)
    with pytest.raises(CannotWrite, match="input/output error"):
        store.write(2, latents_of(2), None, ABOUT)
    assert store.read().step == 1
    assert os.listdir(store.path.parent) == [store.path.name]
