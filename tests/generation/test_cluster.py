"""`grat batch --ray`: actors that die make every output once, with the pixels of one process alone."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Result, grat, refusal
from small_batches import SMALL, pixels, write_lines

from grat_cli.console.worker_table import WorkerRow

cluster: Any = pytest.importorskip("grat_cli.generation.cluster", reason="needs Ray: pip install 'grat-cli[ray]'")
ray, makers = cluster.ray, pytest.importorskip("cluster_makers")


@pytest.fixture(scope="module")
def cluster_of_two() -> Iterator[None]:
    """A Ray on this machine for all tests: it takes seconds to start. Its actors have the paths of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        before = signal.getsignal(signal.SIGTERM)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
        signal.signal(signal.SIGTERM, before)
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(cluster_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors without a model, and fewer deaths."""
    monkeypatch.setattr(cluster, "MOST_DEATHS", 2)
    monkeypatch.setattr(cluster, "Maker", makers.QuickMaker)


def ray_batch(*prompts: str, workers: int = 2, code: int = 0) -> Result:
    write_lines("p.txt", *prompts)
    result = grat("batch", "p.txt", *SMALL, "--out", "b", "--ray", "local", "--workers", workers, "--json")
    assert result.code == code, result.err
    return result


def by_request(folder: str) -> dict[tuple[str, int], np.ndarray]:
    """Pixels by prompt and seed; fails where one is there twice, or without its report."""
    reports = [path for path in Path(folder).iterdir() if path.suffix == ".json"]
    told = [json.loads(path.read_text()) for path in reports]
    found = {
        (one["prompt"], one["seed"]): pixels(path.with_suffix(".png")) for one, path in zip(told, reports, strict=True)
    }
    assert len(list(Path(folder).iterdir())) == 2 * len(found)
    return found


def test_an_actor_that_is_killed_costs_nothing_but_time(cluster_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"a {what}" for what in ("red fox", "blue boat", "green tree", "cat", "bird", "sun")]
    rows: list[WorkerRow] = []
    over = cluster._Driver._over

    def kill(driver: Any, hired: Any, name: str, result: Any) -> Any:
        if len(list(Path("b").glob("*.png"))) >= 3 and not rows:  # it has begun with the next one
            rows.append(hired.row)
            os.kill(hired.row.process, signal.SIGKILL)
        return over(driver, hired, name, result)

    with monkeypatch.context() as patch:
        patch.setattr(cluster._Driver, "_over", kill)
        result = ray_batch(*prompts)
    assert len(result.data["made"]) == len(prompts)
    assert (result.data["made_by_others"], result.data["failed"], rows[0].doing) == (0, [], "gone")
    assert f"worker {rows[0].number} died: its process was killed, or crashed; another one makes grat-" in result.err
    assert grat("batch", "p.txt", *SMALL, "--out", "alone").code == 0
    ours, alone = by_request("b"), by_request("alone")
    assert ours.keys() == alone.keys()
    for request, picture in alone.items():
        np.testing.assert_array_equal(ours[request], picture)
    # What is there is skipped, by either way, before Ray is needed.
    again = grat("batch", "p.txt", *SMALL, "--out", "alone", "--ray", "nowhere", "--json")
    assert (again.code, again.data["skipped"], again.data["workers"]) == (0, len(prompts), [])


def test_what_fails_and_what_kills_fails_alone(quick: None) -> None:
    result = ray_batch("a fox", "deadly", "a boat", "unforeseen", "made before", workers=1, code=5)
    assert {one["prompt"] for one in result.data["made"]} == {"a fox", "a boat", "made before"}
    assert result.data["made_by_others"] == 0
    assert {(one["prompt"], one["reason"]) for one in result.data["failed"]} == {
        ("deadly", "2 workers died while they made it"),
        ("unforeseen", "ValueError: nobody thought of that"),
    }
    assert [row["doing"] for row in result.data["workers"]] == ["gone"] * 3 + [""]
    assert result.err.count("said once") == 1
    assert not Path("b/unfinished").exists()


def test_what_no_sample_is_to_blame_for_ends_the_batch(quick: None) -> None:
    write_lines("p.txt", "a fox", "too large", "a boat")
    assert refusal("batch", "p.txt", *SMALL, "--out", "b", "--ray", "local", "--workers", 1, "--json", code=4).endswith(
        "the device has too little memory"
    )
    assert not Path("b/unfinished").exists()


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """A shell's background jobs ignore Ctrl-C, and so would tests that run there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_an_interrupted_batch_has_what_was_begun_kept(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    over = cluster._Driver._over

    def interrupt(*arguments: Any) -> Any:
        threading.Timer(1.0, signal.raise_signal, [signal.SIGINT]).start()  # when it has begun with the next one
        return over(*arguments)

    monkeypatch.setattr(cluster._Driver, "_over", interrupt)
    result = ray_batch("a fox", "endless", workers=1, code=130)
    assert "interrupted after 1 of 2; the same command goes on with the others" in result.err
    assert [path.suffix for path in Path("b").iterdir()] == [".kept"]


def test_other_versions_and_actors_without_a_model_are_told_of(
    cluster_of_two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines("p.txt", "a fox")
    arguments = ("batch", "p.txt", *SMALL, "--out", "b", "--ray", "local", "--workers", 1, "--json")
    monkeypatch.setattr(cluster, "Maker", makers.OtherMaker)
    assert "elsewhere has grat 0.0.1, and this machine " in refusal(*arguments)
    monkeypatch.setattr(cluster, "Maker", makers.MakerWithoutModel)
    monkeypatch.setattr(cluster, "_MOST_FAILED_STARTS", 2)
    assert refusal(*arguments, code=1) == (
        "2 workers in a row died before they had the model: its process was killed, or crashed"
    )
