"""`grat batch --out ADDRESS`: what fsspec knows is filled as a folder is."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from command_line import grat, refusal
from PIL import Image
from small_batches import GENEVAL, SMALL, pixels, write_lines

from grat_cli.files.stores import RemoteStore
from grat_cli.generation import run as generation
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_model(choose_model("demo"), device=torch.device("cpu"), dtype=torch.float32).pipe


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: Any) -> None:
    """In a folder of its own, with one model for all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "load_model", lambda *_, **__: LoadedModel(demo, None))


@pytest.fixture
def memory() -> Iterator[Any]:
    """The files at memory://, which begin empty."""
    found: Any = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


def test_outputs_go_there_once_and_are_those_of_a_folder(memory: Any, cache_of_a_test: Path) -> None:
    write_lines("p.txt", "a red fox", "a blue boat")
    result = grat("batch", "p.txt", *SMALL, "--out", "memory://bucket/a", "--json")
    assert result.code == 0, result.err
    assert result.data["folder"] == "memory://bucket/a"
    made = {one["prompt"]: one for one in result.data["made"]}
    assert sorted(memory.find("/bucket")) == sorted(
        one[kind].removeprefix("memory:/") for one in made.values() for kind in ("file", "report")
    )
    assert not list(Path.cwd().glob("*.png"))
    assert not list((cache_of_a_test / "unfinished").iterdir())
    assert grat("batch", "p.txt", *SMALL, "--out", f"file://{Path.cwd()}/b").code == 0
    for report in Path("b").glob("*.json"):
        with memory.open(made[json.loads(report.read_text())["prompt"]]["file"]) as file:
            np.testing.assert_array_equal(
                np.asarray(Image.open(io.BytesIO(file.read()))), pixels(report.with_suffix(".png"))
            )

    before = {name: memory.modified(name) for name in memory.find("/bucket")}
    write_lines("p.txt", "a red fox", "a blue boat", "a cat")
    again = grat("batch", "p.txt", *SMALL, "--out", "memory://bucket/a")
    assert again.out.splitlines()[-1] == "1 made, 2 there before, 0 failed, in memory://bucket/a"
    assert again.out.startswith("memory://bucket/a/grat-")
    assert {name: memory.modified(name) for name in before} == before


def test_a_report_without_its_output_keeps_its_name(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch that was killed in between; the output need not be made again."""
    write_lines("p.txt", "a red fox")
    arguments = ("batch", "p.txt", *SMALL, "--out", "memory://bucket/a")

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "place", fail)
        assert grat(*arguments).code == 130
    (left,) = memory.find("/bucket")
    with monkeypatch.context() as patch:
        patch.setattr(generation.Generator, "make", fail)
        assert grat(*arguments).code == 0
    assert memory.find("/bucket") == [left, left.replace(".json", ".png")]


def test_layouts_of_evaluators_go_there_too_and_other_outputs_are_not_replaced(memory: Any) -> None:
    write_lines("p.jsonl", GENEVAL[0])
    arguments = ("batch", "p.jsonl", "--layout", "geneval", *SMALL, "--n", "1", "--out", "memory://bucket/a")
    assert grat(*arguments).code == 0
    assert sorted(memory.find("/bucket/a")) == [
        "/bucket/a/00000/metadata.jsonl",
        "/bucket/a/00000/samples/0000.png",
        "/bucket/a/reports/00000-0000.json",
    ]
    assert json.loads(memory.cat_file("/bucket/a/00000/metadata.jsonl")) == GENEVAL[0]
    assert "1 there before" in grat(*arguments).out
    says = "memory://bucket/a/00000/samples/0000.png was made with other options (seed)"
    assert says in refusal(*arguments, "--seed", "5")
    assert grat(*arguments, "--seed", "5", "--overwrite").code == 0
    assert json.loads(memory.cat_file("/bucket/a/reports/00000-0000.json"))["seed"] == 5
    write_lines("p.jsonl", GENEVAL[1])
    says = "memory://bucket/a/00000/metadata.jsonl is of another prompt than line 1 of p.jsonl"
    assert says in refusal(*arguments, "--seed", "5")


def test_what_needs_a_folder_is_refused() -> None:
    write_lines("p.txt", "a red fox")
    arguments = ("batch", "p.txt", "--out", "memory://bucket/a")
    assert "workers of --shard meet in a folder that all see" in refusal(*arguments, *SMALL, "--shard", "1/2")
    assert "a batch goes into a folder: use --out memory://bucket/a" in refusal(
        "batch", "p.txt", *SMALL, "--out", "memory://bucket/a.png"
    )
    assert "frames go to a folder of a machine" in refusal(*arguments, "--model", "hunyuan", "--format", "frames")


def test_an_actor_fills_an_address_and_knows_what_one_before_it_did(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without claims: whoever deals samples out gives each to one actor, and to another when that has died."""
    cluster: Any = pytest.importorskip("grat_cli.generation.cluster", reason="needs Ray: pip install 'grat-cli[ray]'")
    write_lines("p.txt", "a red fox", "a blue boat")
    results: list[str] = []

    def in_this_process(self: Any, batch: Any, samples: Any, progress: Any) -> Iterator[Any]:
        batch, samples = pickle.loads(pickle.dumps((batch, samples)))
        for sample in samples:
            for dies in (True, False, False):
                maker = cluster.Maker()
                assert maker.load(batch, samples, str(Path.cwd()), 1).error is None
                with monkeypatch.context() as patch:
                    if dies:  # between a report and its output
                        patch.setattr(RemoteStore, "place", interrupted)
                    answer = maker.make("a name", sample, None)
                results.append(type(answer.value).__name__)
            yield answer.value

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster.Cluster, "results", in_this_process)
    result = grat("batch", "p.txt", *SMALL, "--out", "memory://bucket/a", "--ray", "local", "--json")
    assert (result.code, result.data["made_by_others"]) == (0, 2), result.err
    assert results == ["NoneType", "MadeHere", "MadeElsewhere"] * 2
    assert sorted(Path(name).suffix for name in memory.find("/bucket")) == [".json", ".json", ".png", ".png"]
