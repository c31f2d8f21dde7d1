"""Runs with compiled blocks: what they report, take up again and refuse. Compiled is for dynamo's own `eager` backend
here, which traces and generates no code, for the sake of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import Progress, Small, broken_off, generate
from torch._dynamo.utils import counters

from grat_cli.errors import BadInput
from grat_cli.generation.checkpoint import read_run, request_data, request_from_data
from grat_cli.generation.timing import Phases, StepRecorder, while_compiling
from grat_cli.models import compiling


@pytest.fixture(autouse=True)
def _traced_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import torch.fx.experimental._config as shapes

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    dynamo: Any = torch._dynamo.config
    settings: Any = shapes
    with dynamo.patch(recompile_limit=dynamo.recompile_limit), settings.patch(use_duck_shape=settings.use_duck_shape):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("small", ["cascade"], indirect=True)
def test_a_compiled_cascade_is_the_same_and_tells_what_compiling_took(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path
) -> None:
    (plain,) = generate(small.of(tmp_path / "plain"))
    progress = Progress()
    (made,) = generate(small.of(tmp_path / "compiled", compile=True), progress)
    np.testing.assert_array_equal(written["compiled"], written["plain"])
    # The stages differ in size, and small sizes are those of heads by chance: one form serves all.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]

    first, second = made.report["stages"]
    assert first["phases"]["compile"] > 0
    assert "compile" not in second["phases"]
    assert "compile" not in plain.report["phases"]
    assert made.report["device"]["compile"] is True
    assert plain.report["device"]["compile"] is False
    # Tracing takes seconds, and steps milliseconds.
    assert all(step["total_ms"] < made.report["phases"]["compile"] / 2 for step in made.report["steps"])
    assert made.report["phases"]["denoise"] < made.report["phases"]["compile"]
    assert [note for note in progress.notes if "compiles the transformer's blocks" in note]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("small", ["cascade"], indirect=True)
def test_a_compiled_run_that_is_taken_up_compiles_again_and_ends_the_same(
    written: dict[str, np.ndarray], small: Small, tmp_path: Path
) -> None:
    generate(small.of(tmp_path / "whole"))
    asked = small.of(tmp_path / "a-s7", compile=True)
    kept = broken_off(asked, 4)
    torch._dynamo.reset()
    counters.clear()
    run, restored = read_run(kept)
    assert restored == asked
    (made,) = generate(restored, begun=run)
    assert counters["stats"]["unique_graphs"] == 3
    np.testing.assert_array_equal(written["a-s7"], written["whole"])
    assert made.report["stages"][1]["phases"]["compile"] > 0


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("small", ["video"], indirect=True)
def test_videos_are_compiled_as_well(written: dict[str, np.ndarray], small: Small, tmp_path: Path) -> None:
    generate(small.of(tmp_path / "plain", preset=small.guarded()))
    (made,) = generate(small.of(tmp_path / "compiled", preset=small.guarded(), compile=True))
    np.testing.assert_array_equal(written["compiled"], written["plain"])
    assert made.report["guard"]["widened"]
    assert made.report["phases"]["compile"] > 0


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("small", ["picture"], indirect=True)
def test_what_a_compiler_fails_at_is_told(monkeypatch: pytest.MonkeyPatch, small: Small, tmp_path: Path) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiling, "BACKEND", fail)
    with pytest.raises(BadInput, match=r"cannot be compiled here: .*no such instruction.*; leave --compile out"):
        generate(small.of(tmp_path / "a", compile=True))
    assert not list(tmp_path.iterdir())


def test_where_weights_come_and_go_in_the_midst_of_blocks_compiling_is_refused() -> None:
    cuda = torch.device("cuda")
    for offload in ("group", "sequential"):
        with pytest.raises(BadInput, match=f"--compile with --offload {offload}: .*; use --offload model or none"):
            compiling.require_compile(cuda, offload)
    for cache in ("mag", "taylor", "pab", "faster"):
        with pytest.raises(BadInput, match=f"--compile with --cache {cache}: .*; use --cache first-block, or leave"):
            compiling.require_compile(cuda, cache=cache)
    compiling.require_compile(torch.device("cpu"), "none", "first-block")
    with pytest.raises(BadInput, match="the run is on mps: leave it out"):
        compiling.require_compile(torch.device("mps"))


def test_without_a_compiler_on_a_cpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(BadInput, match=r"needs a C\+\+ compiler on a CPU, such as g\+\+"):
        compiling.require_compile(torch.device("cpu"))


def test_where_it_will_not_pay_it_says_so() -> None:
    assert "hardly win that back" in compiling.expectation(4096 * 28)
    assert "hardly" not in compiling.expectation(262_144 * 28)


def test_time_of_compiling_is_counted_apart() -> None:
    clock, recorder, phases = [], StepRecorder(), Phases()
    function = torch.compile(lambda x: x + 1, backend="eager")

    def tell(milliseconds: float) -> None:
        clock.append(milliseconds)
        phases.set_apart("compile 0", milliseconds)
        recorder.leave_out(milliseconds)

    with phases("denoise 0"), while_compiling(lambda: clock.append(0.0), tell):
        recorder.begin_call(0, 1.0)
        with recorder.attention():
            pass
        function(torch.ones(2))
        recorder.end_call()
        function(torch.ones(2))
    function(torch.ones(2, dtype=torch.float64))
    waited, took = clock  # once each: neither for the second call, nor outside
    assert waited == 0
    assert took > 0
    assert phases.phases_ms["compile 0"] == took
    (step,) = recorder.steps([1.0])
    assert 0 <= step.total_ms < took
    assert phases.phases_ms["denoise 0"] >= step.total_ms


@pytest.mark.parametrize("small", ["picture"], indirect=True)
def test_a_checkpoint_without_a_word_of_compiling_is_one_without(small: Small, tmp_path: Path) -> None:
    asked = small.of(tmp_path / "a-s7", compile=True)
    data = request_data(asked)
    assert request_from_data(data, tmp_path / "a-s7", 7) == asked
    del data["compile"]
    assert request_from_data(data, tmp_path / "a-s7", 7) == replace(asked, compile=False)
    with pytest.raises(BadInput, match="the request is damaged"):
        request_from_data(data | {"compile": "yes"}, tmp_path / "a-s7", 7)
