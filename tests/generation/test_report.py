from __future__ import annotations

import io
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grat_cli.console import run_tables
from grat_cli.estimates.planning import run_forecasts
from grat_cli.estimates.stages import Stage
from grat_cli.generation import report
from grat_cli.generation.report import StageRecord, Surroundings
from grat_cli.generation.request import Request
from grat_cli.generation.selection import select_preset
from grat_cli.generation.timing import StepTiming
from grat_cli.models.catalogue import choose_model
from grat_cli.models.resolution import Resolution
from grat_cli.models.video_size import VideoSize
from grat_cli.presets import Preset

WHEN = datetime(2025, 1, 31, 14, 25, 1, 999, tzinfo=timezone.utc)
SIZES: dict[str, dict[str, int]] = {
    "image": {"width": 128, "height": 64},
    "video": {"width": 128, "height": 64, "frames": 9, "fps": 8},
}


def build(steps: int = 20, medium: Any = "image", **asked: Any) -> dict[str, Any]:
    model = choose_model("demo", medium)
    measures: dict[str, Any] = SIZES[medium]
    size = (VideoSize if model.video else Resolution)(**measures)
    preset = select_preset(model, variant="x", steps=steps)
    (planned,) = run_forecasts(preset, model, size, "float32")
    schedule = planned.schedule
    given: dict[str, Any] = {"prompt": "a fox", "negative_prompt": "a cat", **asked, **measures}
    request = Request(preset=preset, model=model, seeds=(7,), command="grat image 'a fox'", **given)
    surroundings = Surroundings(
        device="cpu",
        device_name="A processor",
        dtype="float32",
        autoencoder_dtype="float32",
        threads=2,
        offload="none",
        offload_reason="chosen by name",
        revision=None,
        memory_kind="resident memory of the process",
    )
    record = StageRecord(
        stage=Stage(0, 128, 64, preset, None, Resolution(128, 64)),
        schedule=schedule,
        text_tokens=24,
        backend="sdpa",
        backend_reason="the fastest on cpu",
        preparation="stock modules: as it was",
        guidance=2.0,
        shift=1.88,
    )
    told = report.build_report(request, 7, surroundings, record, WHEN, 0.6)
    return report.measured(
        told,
        [StepTiming(i, 1000.0 - i, 100.0 + i, 60.0, 40.0 + i, schedule.density_of_step(i)) for i in range(steps)],
        [record.as_dict()],
        {"load": 1234.5678, "text": 9.5, "denoise 0": 5000.0, "decode 0": 60.0, "decode 1": 20.0},
        {"load": 2**30, "denoise 0": 3 * 2**30, "decode 0": 2**29, "decode 1": 2**30},
    )


def shown(renderable: Any, columns: int) -> str:
    file = io.StringIO()
    Console(file=file, width=columns).print(renderable)
    return file.getvalue()


def test_a_report_says_what_made_the_picture() -> None:
    made = build()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["schema"] == "grat.report/1"
    assert made["created"] == "2025-01-31T14:25:01+00:00"
    assert (made["prompt"], made["negative_prompt"], made["seed"]) == ("a fox", "a cat", 7)
    assert (made["width"], made["height"], made["grid"]) == (128, 64, [8, 16])
    assert made["tokens"] == {"image": 128, "text": 24, "total": 152}
    assert made["ideal_speedup"] == 1 / made["density"]
    assert made["backend"] == {
        "requested": "auto",
        "used": "sdpa",
        "reason": "the fastest on cpu",
        "preparation": "stock modules: as it was",
    }
    offloading = made["device"]["offload"], made["device"]["offload_reason"], made["device"]["quantize"]
    assert offloading == ("none", "chosen by name", "none")
    assert made["phases"] == {"load": 1234.568, "text": 9.5, "denoise": 5000.0, "decode": 80.0}
    assert made["memory"] == {"load": 2**30, "denoise": 3 * 2**30, "decode": 2**30}
    assert made["peak_memory_bytes"] == 3 * 2**30
    assert made["sampling"] == {"steps": 20, "guidance": 2.0, "shift": 1.88}
    (stage,) = made["stages"]
    assert (stage["steps"], stage["density"], stage["guidance"]) == (20, made["density"], 2.0)
    assert stage["phases"] == {"denoise": 5000.0, "decode": 60.0}
    assert made["steps"][3] == {
        "index": 3,
        "timestep": 997.0,
        "total_ms": 103.0,
        "attention_ms": 60.0,
        "other_ms": 43.0,
        "density": pytest.approx(made["density"], abs=1e-6),
        "stage": 0,
    }
    assert {"python", "grat", "torch", "diffusers"} <= set(made["versions"])


def test_steps_tell_of_exchanges_where_ranks_shared_them() -> None:
    step = StepTiming(0, 1000.0, 10.0, 5.0, 3.0, 1.0, exchange_ms=2.0, exchanged_bytes=640)
    (told,) = report.measured({"sampling": {}}, [step], [], {}, {})["steps"]
    assert (told["exchange_ms"], told["exchanged_bytes"]) == (2.0, 640)


def test_pictures_and_videos_say_what_only_they_have() -> None:
    picture, video = build(init_image=Path("a.png")), build(medium="video", format="mp4", quality=20)
    of_picture, of_video = {"init_image", "strength"}, {"frames", "fps", "seconds", "format", "crf"}
    assert set(picture) - of_picture == set(video) - of_video
    assert (picture["init_image"], picture["strength"]) == ("a.png", 0.6)
    assert (build()["init_image"], build()["strength"]) == (None, None)
    assert {name: video[name] for name in of_video} == {
        **{"frames": 9, "fps": 8, "seconds": 1.125},
        **{"format": "mp4", "crf": 20},
    }
    assert (video["grid"], video["tokens"]["image"]) == ([3, 4, 8], 96)


@pytest.mark.parametrize("medium", SIZES)
def test_the_preset_in_a_report_is_whole(medium: Any) -> None:
    made = build(medium=medium)
    expected = select_preset(choose_model("demo", medium), variant="x", steps=20)
    assert Preset.model_validate(made["preset"]) == expected


@pytest.mark.parametrize("medium", SIZES)
def test_what_the_run_cost_stays_out_of_the_output(medium: Any) -> None:
    made = build(medium=medium)
    inside = report.provenance(made)
    assert {"phases", "steps", "text", "peak_memory_bytes", "peak_memory_kind", "memory"} == set(made) - set(inside)
    assert inside["stages"] == [{name: value for name, value in made["stages"][0].items() if name != "phases"}]
    assert inside["preset"] == made["preset"]


@pytest.mark.parametrize("columns", [40, 80])
def test_the_table_shows_first_median_last_and_sum_whole(columns: int) -> None:
    rows = [line.split() for line in shown(run_tables.timing_table(build()), columns).splitlines() if line.strip()]
    table = {row[0]: row[1:] for row in rows}
    assert table["step"] == ["time", "attention", "share", "density"]
    density = table["first"][-1]
    assert table["first"] == ["100", "ms", "60", "ms", "60%", density]
    assert table["median"][:2] == ["110", "ms"]
    assert table["last"] == ["119", "ms", "60", "ms", "50%", density]
    assert table["all"] == ["20", "2.19", "s", "1.20", "s", "55%", density]


def test_few_steps_are_all_shown_and_pictures_get_a_line_each() -> None:
    labels = [line.split()[0] for line in shown(run_tables.timing_table(build(3)), 80).splitlines() if line.strip()]
    assert [label for label in labels if label.isalnum()] == ["step", "1", "2", "3", "all"]
    pictures = shown(run_tables.pictures_table([build(3), build(3)]), 40)
    assert pictures.count("303 ms") == 2


def test_phases_and_times_for_people() -> None:
    assert run_tables.phases_line(build()) == "load 1.23 s, text 9.5 ms, denoise 5.00 s, decode 80 ms"
    assert [run_tables.milliseconds_text(value) for value in (0.04, 9.96, 999.4, 12_345)] == [
        "0.0 ms",
        "10.0 ms",
        "999 ms",
        "12.3 s",
    ]
