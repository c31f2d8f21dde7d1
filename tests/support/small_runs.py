"""Small runs of pictures and videos, for tests: what is asked for, how far they get, and what of them is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from grat_cli.errors import Interrupted
from grat_cli.estimates.stages import Stage
from grat_cli.files import tensors
from grat_cli.generation import run
from grat_cli.generation.checkpoint import Run, find_run, read_run
from grat_cli.generation.finishing import Made
from grat_cli.generation.request import Request
from grat_cli.generation.stage import stages_for
from grat_cli.generation.timing import StepTiming
from grat_cli.models.catalogue import choose_model
from grat_cli.presets import Preset

STEPS = 5  # of any such run, over all of its stages


class Progress:
    """Keeps what it is told; breaks off after so many steps, or at a phase, if it is to."""

    def __init__(self, after: int | None = None, at_phase: str | None = None) -> None:
        self.events: list[Any] = []
        self.notes: list[str] = []
        self.works: list[str] = []
        self._after, self._at_phase = after, at_phase

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Steps done, and those of their stage."""
        return [event for event in self.events if isinstance(event, tuple)]

    def phase(self, name: str) -> None:
        self.events.append(name)
        if name == self._at_phase:
            raise KeyboardInterrupt

    def step(self, done: int, total: int) -> None:
        self.events.append((done, total))
        if len(self.steps) == self._after:
            raise KeyboardInterrupt

    def work(self, text: str) -> None:
        self.works.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def written(self, count: int) -> None:
        pass


@dataclass(frozen=True)
class Small:
    """A kind of small output. Its grid of tokens is no multiple of its groups.

    Attributes:
        request: but for where outputs go.
        ending: of its files.
    """

    request: Request
    ending: str

    def of(self, *places: Path, **changes: Any) -> Request:
        """A request for an output at each place, which lacks its ending; seeds are 7, 8 and so on."""
        paths = tuple(place.with_name(place.name + self.ending) for place in places)
        return replace(self.request, **{"seeds": tuple(range(7, 7 + len(paths))), "outputs": paths, **changes})

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Of an output from noise."""
        return stages_for(self.request)

    def preset(self, variant: str = "x", **sections: Any) -> Preset:
        """Its preset with other attention or sections."""
        shares = {"share": 2} if variant == "x" else {}
        attention = {"variant": variant, "group": self.request.preset.attention.group, **shares}
        return Preset.model_validate({**self.request.preset.model_dump(), "attention": attention, **sections})

    def guarded(self) -> Preset:
        """With a guard that finds attention too narrow, at every step from the first."""
        attention = {"variant": "b", "group": [1] * (self.request.grid.axes - 1) + [2], "radius": 0}
        return self.preset(guard=1.0, schedule={}, attention=attention)


def picture() -> Small:
    """10 x 12 tokens in groups of 4 x 4, by the demo."""
    return Small(request_of("demo", [4, 4], "png", width=96, height=80), ".png")


def cascade(**highres: Any) -> Small:
    """16 x 16 tokens, by the demo as if it was trained at a quarter of these: three steps small, two large."""
    model = replace(choose_model("demo", medium="image"), native_side=64)
    sections = {"sampling": {"steps": 3, "guidance": 2.0}, "highres": {"dense_below": 0, "strength": 0.6, **highres}}
    return Small(request_of("demo", [3, 3], "png", width=128, height=128, model=model, **sections), ".png")


def video(folder: Path) -> Small:
    """3 x 3 x 4 tokens in groups of 2 x 2 x 2, by `tiny_hunyuan` in a folder."""
    model = choose_model(str(folder), medium="video")
    return Small(request_of("hunyuan", [2, 2, 2], "mp4", width=64, height=48, frames=9, fps=8, model=model), ".mp4")


def request_of(presets: str, group: list[int], format: str, **changes: Any) -> Request:
    chosen: dict[str, Any] = {
        "name": "test",
        "model": presets,
        "attention": {"variant": "x", "group": group, "share": 2},
        "schedule": {"dense_steps": 1},
        "sampling": {"steps": STEPS, "guidance": 2.0},
    }
    sections = {name: changes.pop(name) for name in ("sampling", "highres") if name in changes}
    asked: dict[str, Any] = {"model": choose_model("demo", medium="image"), **changes}
    preset = Preset.model_validate(chosen | sections)
    return Request(prompt="a red boat at night", preset=preset, format=format, device="cpu", **asked)


def generate(asked: Request, progress: Progress | None = None, begun: Run | None = None) -> list[Made]:
    """All outputs of a request."""
    return list(run.generate(asked, progress or Progress(), begun))


def broken_off(asked: Request, after: int = 2) -> Path:
    """What is kept of a run that is broken off after so many steps."""
    with pytest.raises(Interrupted):
        generate(asked, Progress(after))
    return find_run(asked.outputs[0])


def names(folder: Path) -> list[str]:
    """Of the files in a folder."""
    return sorted(os.listdir(folder))


def untimed(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what differs from run to run."""
    costs = ("created", "memory", "peak_memory_bytes", "command", "text")
    steps = [{name: step[name] for name in ("index", "timestep", "density", "stage")} for step in report["steps"]]
    stages = [{**stage, "phases": sorted(stage["phases"])} for stage in report["stages"]]
    same = {name: value for name, value in report.items() if name not in costs}
    return {**same, "phases": sorted(report["phases"]), "steps": steps, "stages": stages}


def goes_on_as_if_whole(
    asked: Request, written: dict[str, np.ndarray], folder: Path, starts: tuple[Path, ...] = ()
) -> list[Made]:
    """Breaks a run of two seeds off after each of the first one's steps and at each phase between, and takes it up.

    Args:
        asked: for outputs `a-s7` and `a-s8` in the folder.
        written: of the fixture.
        folder: with nothing else in it.
        starts: files that are gone when a run is taken up.

    Returns:
        What it makes.
    """
    kept_starts = {path: path.read_bytes() for path in starts}
    told = Progress()
    expected = generate(asked, told)
    whole, steps = dict(written), told.steps
    total = len(steps) // 2
    first = told.events[told.events.index(steps[0]) : told.events.index("save") - 1]
    phases = [event for event in first if isinstance(event, str)]
    stops: list[dict[str, Any]] = [{"after": after} for after in range(1, total + 1)] + [
        {"at_phase": phase} for phase in phases
    ]
    for stop in stops:
        for path in folder.iterdir():
            path.unlink()
        for path, content in kept_starts.items():
            path.write_bytes(content)
        broken = Progress(**stop)
        with pytest.raises(Interrupted) as caught:
            generate(asked, broken)
        done = len(broken.steps)
        (kept,) = folder.iterdir()
        assert str(caught.value) == f"interrupted after step {done} of {total}; go on with grat resume {kept}"
        for path in starts:
            path.unlink()
        for named in (kept, asked.outputs[0]):
            assert find_run(named) == kept
        run, restored = read_run(kept)
        assert restored == asked
        assert run.done == done

        written.clear()
        progress = Progress()
        made = generate(restored, progress, run)
        assert progress.steps == steps[done:]
        assert written.keys() == whole.keys()
        for name, frames in whole.items():
            np.testing.assert_array_equal(written[name], frames)
        assert [untimed(one.report) for one in made] == [untimed(one.report) for one in expected]
        endings = (".json", asked.outputs[0].suffix)
        assert names(folder) == sorted(f"a-s{seed}{ending}" for seed in (7, 8) for ending in endings)
    return expected


def tamper(kept: Path, held: Mapping[str, torch.Tensor | None] | None = None, **about: Any) -> None:
    """Changes a kept run; of `request` and `state` the fields that are given, and None takes a tensor away."""
    told = tensors.read_about(kept)
    assert told is not None
    for name in ("request", "state"):
        if isinstance(about.get(name), dict):
            about[name] = told[name] | about[name]
    with safe_open(kept, "pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    changed = {name: tensor for name, tensor in {**whole, **(held or {})}.items() if tensor is not None}
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, kept, {"grat": json.dumps(told | about)})


def run_after(asked: Request, done: int) -> Run:
    """A run of one stage that was not computed: all that it has follows from the number of steps done."""
    (stage,) = stages_for(asked)
    drawn = torch.Generator().manual_seed(done)
    shape = asked.family.latents_shape(asked.model, asked.grid, called=done < stage.steps)
    size = {"width": asked.width, "height": asked.height}
    return Run(
        seed=asked.seeds[0],
        total=stage.steps,
        latents=torch.randn(shape, generator=drawn),
        noise_state=drawn.get_state(),
        random_state=drawn.get_state(),
        steps=tuple(
            StepTiming(step, 1000.0 - step, step + 0.5, 0.25, step, 0.5, exchange_ms=0.25, exchanged_bytes=step)
            for step in range(done)
        ),
        phases_ms={"load": 1.5},
        memory_bytes={"load": 3},
        report={
            "schema": "grat.report/1",
            "seed": asked.seeds[0],
            "prompt": asked.prompt,
            "device": {"threads": 1},
            "model": {"revision": None},
            "sampling": {},
            "density": 0.5,
            "guard": None,
            "peak_memory_kind": "none",
        },
        stages=({"number": 0, **size, "steps": stage.steps, "density": 0.5, "guard": None},),
    )
