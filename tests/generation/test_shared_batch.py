"""`grat batch --shard`: workers that die, stall, fail or race make every output once, with the pixels of one alone."""

from __future__ import annotations

import functools
import json
import multiprocessing
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import grat, refusal
from PIL import Image
from small_batches import GENEVAL, SMALL, fail_at, files, pixels, write_lines
from workers import begin, instead, needs_fork, wait_until

from grat_cli.files.claims import Claim, Claims
from grat_cli.files.stores import LocalStore
from grat_cli.generation import batch_worker
from grat_cli.generation import run as generation
from grat_cli.models import devices
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_model(choose_model("demo"), device=torch.device("cpu"), dtype=torch.float32).pipe


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: Any) -> None:
    """In a folder of its own, with one model for all tests, and claims that are dead after a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "load_model", lambda *_, **__: LoadedModel(demo, None))
    monkeypatch.setattr(batch_worker, "Claims", functools.partial(Claims, beat_s=0.1, silent_s=1.0))
    monkeypatch.setattr("grat_cli.generation.sharing.POLL_S", 0.05)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def outputs(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("*.png"))


def by_request(folder: str) -> dict[tuple[str, int], np.ndarray]:
    """Pixels by prompt and seed; fails where one is there twice, or without its report, or the other way round."""
    reports = [path for path in Path(folder).rglob("*.json") if path.name != "metadata.jsonl"]
    told = [json.loads(path.read_text()) for path in reports]
    if Path(folder, "reports").is_dir():
        pictures = [Path(folder, path.stem[:5], "samples", f"{path.stem[6:]}.png") for path in reports]
    else:
        pictures = [path.with_suffix(".png") for path in reports]
    assert sorted(pictures) == outputs(folder)
    found = {(one["prompt"], one["seed"]): pixels(path) for one, path in zip(told, pictures, strict=True)}
    assert len(found) == len(pictures)
    return found


def require_same(folder: str, alone: str) -> None:
    ours, expected = by_request(folder), by_request(alone)
    assert ours.keys() == expected.keys()
    for request, picture in expected.items():
        np.testing.assert_array_equal(ours[request], picture)
    assert not Path(folder, "unfinished").exists()


@needs_fork
@pytest.mark.parametrize("layout", ["plain", "geneval"])
def test_workers_of_which_one_is_killed_make_everything_once(layout: str) -> None:
    write_lines("p.jsonl", *GENEVAL)
    arguments = ("batch", "p.jsonl", "--layout", layout, *SMALL, "--n", "4", "--json")
    assert grat(*arguments, "--out", "alone").code == 0
    arguments = (*arguments, "--out", "b", "--shard")
    hang = instead(generation, "written", lambda: time.sleep(3600))  # with its latents kept
    killed = begin(*arguments, "1/4", at_first=hang)
    wait_until(lambda: list(Path("b").glob("unfinished/*.latents.safetensors")), killed)
    others = [begin(*arguments, f"{rank}/4") for rank in (2, 3, 3)]  # two begin with the same part
    wait_until(lambda: len(outputs("b")) >= 2, others[0])
    killed.signal(signal.SIGKILL)
    results = [other.result() for other in others]
    assert [result.code for result in results] == [0] * 3
    made = [one["file"] for result in results for one in result.data["made"]]
    assert len(made) == len(set(made)) == 8
    assert set(made) == {str(path) for path in outputs("b")}
    for result in results:
        assert len(result.data["made"]) + result.data["made_by_others"] + result.data["skipped"] == 8
    told = "".join(result.err for result in results)
    assert "goes on after step 2" in told
    assert "waiting for 1 that other workers make" in told
    require_same("b", "alone")
    again = grat(*arguments, "4/4")
    assert (again.code, again.data["skipped"], again.data["made"]) == (0, 8, [])


_PLACES: dict[str, tuple[Any, str]] = {
    "denoising": (batch_worker.SaidOnce, "step"),
    "before its report": (LocalStore, "write"),
    "before its output": (LocalStore, "place"),
}


@needs_fork
@pytest.mark.parametrize(
    ("layout", "place"), [*(("plain", place) for place in _PLACES), ("geneval", "before its output")]
)
def test_a_worker_that_was_suspended_replaces_nothing_and_adds_nothing(layout: str, place: str) -> None:
    """Wherever it was: also between its last look at its claim and what it does then."""
    write_lines("p.jsonl", GENEVAL[0])
    arguments = ("batch", "p.jsonl", "--layout", layout, *SMALL, "--n", "2", "--json")
    assert grat(*arguments, "--out", "alone").code == 0
    arguments = (*arguments, "--out", "b", "--shard")
    stalled = begin(*arguments, "1/1", at_first=instead(*_PLACES[place]))
    stalled.wait_until_stopped()
    time.sleep(1)  # names of the plain layout hold the second
    result = grat(*arguments, "1/1")
    assert (result.code, len(result.data["made"])) == (0, 2), result.err
    before = files("b")
    stalled.go_on()
    woken = stalled.result()
    assert (woken.code, woken.data["made"], woken.data["made_by_others"]) == (0, [], 2), woken.err
    assert files("b") == before
    require_same("b", "alone")


@needs_fork
def test_nor_does_one_that_may_overwrite() -> None:
    write_lines("p.jsonl", GENEVAL[0])
    arguments = ("batch", "p.jsonl", "--layout", "geneval", *SMALL, "--n", "1", "--json", "--out", "b")
    assert grat(*arguments, "--seed", "5").code == 0
    before = files("b")
    arguments = (*arguments, "--overwrite", "--shard", "1/1")
    stalled = begin(*arguments, at_first=instead(LocalStore, "place"))
    stalled.wait_until_stopped()
    # Its report is there, and the output that this one told of.
    Path("b/reports/00000-0000.json").unlink()
    assert len(grat(*arguments).data["made"]) == 1
    after = files("b")
    assert after["00000/samples/0000.png"] != before["00000/samples/0000.png"]
    stalled.go_on()
    woken = stalled.result()
    assert (woken.code, woken.data["made_by_others"]) == (0, 1), woken.err
    assert files("b") == after


def test_an_interrupted_worker_lets_go_of_its_claim_and_another_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("p.txt", "a red fox", "a blue boat")
    arguments = ("batch", "p.txt", *SMALL, "--out", "b", "--shard")

    with monkeypatch.context() as patch:
        patch.setattr("grat_cli.families.picture_coding.decode", interrupted)
        result = grat(*arguments, "2/2")
    assert result.code == 130
    assert "interrupted after 0 of 2; the same command goes on with the others" in result.err
    (kept,) = files("b")
    assert re.fullmatch(r"unfinished/a-blue-boat-.*\.latents\.safetensors", kept)
    other = grat(*arguments, "1/2")
    assert other.out.splitlines()[-1] == "2 made, 0 made by others, 0 there before, 0 failed, in b"
    assert re.search(r"a-blue-boat-s0-[0-9a-f]{12} goes on after step 2", other.err)
    assert not Path("b/unfinished").exists()


@needs_fork
def test_what_fails_is_tried_once_and_again_another_time(monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("p.jsonl", *({"prompt": f"a {what}", "seed": seed} for seed, what in enumerate(("fox", "cat", "boat"))))
    arguments = ("batch", "p.jsonl", *SMALL, "--out", "b")
    together = multiprocessing.get_context("fork").Barrier(3)
    with monkeypatch.context() as patch:
        fail_at(1, patch)
        load = instead(generation, "load_model", together.wait)
        workers = [begin(*arguments, "--json", "--shard", f"{rank}/3", at_first=load) for rank in (1, 2, 3)]
        results = [worker.result() for worker in workers]
    for result in results:
        assert result.code == 5
        (failed,) = result.data["failed"]
        assert failed["prompt"] == "a cat"
        assert failed["reason"] == "the picture has NaN after decoding: try --dtype float32"
    assert sum("decoding" in result.err for result in results) == 3  # each tells
    assert sorted(len(result.data["made"]) for result in results) in ([0, 0, 2], [0, 1, 1])
    assert [path.suffix for path in Path("b/unfinished").iterdir()] == [".failed"]

    again = grat(*arguments, "--shard", "1/1")
    assert again.out.splitlines()[-1] == "1 made, 0 made by others, 2 there before, 0 failed, in b"
    assert not Path("b/unfinished").exists()


def test_a_picture_that_is_spoilt_meanwhile_fails_alone_and_a_batch_without_workers_tries_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_lines("p.txt", "a red fox", "a blue boat")
    arguments = ("batch", "p.txt", *SMALL, "--out", "b")
    take, calls = generation.Generator.take, []

    def spoilt(self: Any, request: Any) -> None:
        calls.append(request)
        if len(calls) == 3:  # after those of both texts
            raise batch_worker.BadInput("cannot read a.png: it is damaged")
        take(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(generation.Generator, "take", spoilt)
        result = grat(*arguments, "--shard", "1/2")
    assert result.code == 5
    assert "1 made, 0 made by others, 0 there before, 1 failed, in b" in result.out
    assert "failed: a red fox (seed 0): cannot read a.png: it is damaged" in result.out
    assert [path.suffix for path in Path("b/unfinished").iterdir()] == [".failed"]
    assert grat(*arguments).out.splitlines()[-1] == "1 made, 1 there before, 0 failed, in b"
    assert not Path("b/unfinished").exists()


def test_a_disk_that_is_full_ends_a_worker_and_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("p.txt", "a red fox")
    arguments = ("batch", "p.txt", *SMALL, "--out", "b", "--shard", "1/1")

    def full(*_: Any, **__: Any) -> None:
        raise batch_worker.CannotWrite("cannot write it: no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "place", full)
        assert refusal(*arguments).startswith("cannot write it: no space left on device")
    assert {path.suffix for path in Path("b/unfinished").iterdir()} == {".png", ".json"}
    with monkeypatch.context() as patch:
        patch.setattr(generation.Generator, "make", full)
        assert grat(*arguments).code == 0
    assert not Path("b/unfinished").exists()


def test_metadata_that_another_worker_writes_at_that_moment_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("p.jsonl", GENEVAL[0])
    arguments = ("batch", "p.jsonl", "--layout", "geneval", *SMALL, "--n", "1")
    write = LocalStore.write

    def late(store: LocalStore, text: str, path: Path, **options: Any) -> None:
        if path.name == "metadata.jsonl":
            path.write_text(text if others == "the same" else "{}\n")
        write(store, text, path, **options)

    monkeypatch.setattr(LocalStore, "write", late)
    others = "the same"
    assert grat(*arguments, "--out", "b", "--shard", "1/2").code == 0
    assert json.loads(Path("b/00000/metadata.jsonl").read_text()) == GENEVAL[0]
    others = "another"
    assert "00000/metadata.jsonl: it exists" in refusal(*arguments, "--out", "c", "--shard", "1/2")


def test_what_a_batch_alone_made_leaves_no_claim_of_a_dead_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("p.txt", "a red fox")
    arguments = ("batch", "p.txt", *SMALL, "--out", "b")
    with monkeypatch.context() as patch:
        patch.setattr(Claim, "__exit__", lambda *_: None)
        patch.setattr(LocalStore, "place", interrupted)
        assert grat(*arguments, "--shard", "1/1").code == 130
    assert len(list(Path("b/unfinished").glob("*.claim"))) == 1
    assert grat(*arguments).code == 0
    assert not Path("b/unfinished").exists()


def test_samples_that_reports_cannot_tell_apart_are_refused() -> None:
    for number, folder in enumerate(("x", "y")):
        Path(folder).mkdir()
        Image.new("RGB", (64, 64), (number, 0, 0)).save(f"{folder}/a.png")
    write_lines("p.jsonl", *({"prompt": "a fox", "init_image": f"{folder}/a.png"} for folder in ("x", "y")))
    arguments = ("batch", "p.jsonl", *SMALL, "--out", "b")
    says = (
        "line 1 and line 2 ask for the same, with pictures of the same names: rename one, or leave out --shard or --ray"
    )
    assert says in refusal(*arguments, "--shard", "1/2")
    assert len(grat(*arguments, "--json").data["made"]) == 2


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ("3/2", "--shard 3/2: expected a part from 1 to the number of parts"),
        ("two", "--shard two: expected a part such as 2/8 (the second of eight), or auto"),
        ("auto", "--shard auto: neither torchrun (RANK, WORLD_SIZE) nor a Slurm array"),
    ],
)
def test_what_is_no_part_is_refused(shard: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    write_lines("p.txt", "a red fox")
    assert says in refusal("batch", "p.txt", *SMALL, "--out", "b", "--shard", shard)
    assert not Path("b").exists()


def test_workers_of_torchrun_take_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    write_lines("p.txt", "a red fox")
    result = grat("batch", "p.txt", *SMALL, "--out", "b", "--shard", "auto", "--json")
    assert (result.code, len(result.data["made"])) == (0, 1), result.err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    named = [devices.device_of_worker(name, 5) for name in ("auto", "cuda", "cuda:0", "cpu")]
    assert named == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert devices.device_of_worker("auto", None) == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the launcher shows each worker its own
    assert devices.device_of_worker("auto", 5) == "auto"


def test_workers_of_torchrun_have_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines("p.jsonl", *GENEVAL)
    for name, value in {"MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "add --shard auto" in refusal("batch", "p.jsonl", *SMALL)
