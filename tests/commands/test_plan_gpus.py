"""`grat plan` for several GPUs, and for many machines."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from command_line import grat, refusal

FLUX = ("plan", "flux-far", "--res", "2048", "--gpu", "h200")
QWEN = ("plan", "--model", "qwen-image", "--gpu", "h200")


def test_several_gpus_are_told_of_in_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    shown = grat(*QWEN, "--gpus", 4, "--shard-weights", "--fleet", 16)
    assert shown.code == 0
    assert max(map(len, shown.out.splitlines())) <= 60
    assert "…" not in shown.out
    text = " ".join(shown.out.split())
    assert "4 GPUs, cp=4,cfg=1: weights are shared by the ranks of a call" in text
    assert re.search(r"attention [\d.]+ m?s, the rest [\d.]+ m?s, exchange [\d.]+ m?s, weights [\d.]+ m?s ", text)
    assert "over NVLink of 450 GB/s, of which 82% is left for it" in text
    assert "as fast as on one;" in text
    assert "from 11 machines on they wait for each other" in text
    assert "4 x 700 W x" in text
    assert "Times are estimates from data sheets, not measured." in text
    for machines in ("10", "16", "1,000", "100,000"):
        assert any(line.split()[:1] == [machines] for line in shown.out.splitlines())


def test_figures_of_several_gpus_are_in_the_json() -> None:
    data = grat(*QWEN, "--gpus", 4, "--json").data
    gpus, one = data["gpus"], grat(*QWEN, "--json").data
    assert (gpus["count"], gpus["cp"], gpus["cfg"]) == (4, 2, 2)
    assert gpus["link"] == {"kind": "NVLink", "bytes_per_second": 450e9}
    assert len(gpus["exchanged_bytes"]["call"]) == len(gpus["exchanged_bytes"]["run"]) == 2
    seconds = gpus["denoise_seconds"]
    assert gpus["speedup"] == pytest.approx(
        seconds["one"] / sum(seconds[name] for name in ("attention", "rest", "exchange", "weights"))
    )
    assert 1 < gpus["speedup"] < gpus["ceiling"] < 4
    assert (one["gpus"], one["fleet"]) == (None, [])
    phases = {phase["phase"]: phase for phase in data["phases"]}
    alone = {phase["phase"]: phase for phase in one["phases"]}
    assert phases["denoise"]["seconds"] == pytest.approx(alone["denoise"]["seconds"] / gpus["speedup"])
    assert phases["denoise"]["peak_bytes"] < alone["denoise"]["peak_bytes"]
    typed = grat(*QWEN, "--gpus", 4, "--parallel", "cp=4,cfg=1", "--json").data["gpus"]
    assert (typed["cp"], typed["cfg"], typed["reason"]) == (4, 1, "as typed")
    sharded = grat(*QWEN, "--gpus", 4, "--shard-weights", "--offload", "auto", "--json").data
    assert data["gpus"]["gathered_bytes"]["call"] == 0 < sharded["gpus"]["gathered_bytes"]["call"]
    assert sharded["gpus"]["denoise_seconds"]["weights"] > 0
    weights = {phase["phase"]: phase["weights_bytes"] for phase in sharded["phases"]}
    assert weights["denoise"] < alone["denoise"]["weights_bytes"] / 2


def test_a_cascade_is_told_of_as_a_whole() -> None:
    data = grat(*FLUX, "--gpus", 2, "--json").data
    gpus, phases = data["gpus"], {phase["phase"]: phase["seconds"] for phase in data["phases"]}
    assert len(data["stages"]) > 1
    spent = gpus["denoise_seconds"]
    assert sum(spent[name] for name in ("attention", "rest", "exchange", "weights")) == pytest.approx(phases["denoise"])
    run, call = max(gpus["exchanged_bytes"]["run"]), max(gpus["exchanged_bytes"]["call"])
    assert call < run < sum(stage["steps"] for stage in data["stages"]) * call


def test_a_fleet_is_as_many_machines_with_so_many_gpus() -> None:
    alone, four = (grat(*FLUX, "--fleet", 3, *more, "--json").data for more in ((), ("--gpus", 4)))
    assert [each["machines"] for each in four["fleet"]] == [3, 10, 1000, 100_000]
    seconds = sum(phase["seconds"] for phase in four["phases"])
    assert four["fleet"][0]["outputs_per_hour"] == pytest.approx(3 * 3600 / seconds)
    assert four["fleet"][0]["outputs_per_kwh"] == pytest.approx(3.6e6 / (4 * 700 * seconds))
    assert alone["fleet"][0]["outputs_per_hour"] < four["fleet"][0]["outputs_per_hour"]
    assert alone["fleet"][0]["outputs_per_kwh"] > four["fleet"][0]["outputs_per_kwh"]


def test_without_rates_of_the_device_bytes_are_told() -> None:
    shown = grat("plan", "demo-b", "--gpus", 2)
    assert "2 GPUs, cp=1,cfg=2: guidance makes two calls a step" in " ".join(shown.out.split())
    assert "add --gpu h200 or another" in " ".join(shown.out.split())
    # The prediction: 32x32 tokens of 16 numbers.
    told = grat("plan", "demo-b", "--gpus", 2, "--json").data
    assert told["gpus"]["exchanged_bytes"] == {"call": [0], "run": [told["steps"] * 1024 * 16 * 4]}
    assert told["gpus"]["speedup"] is None


def test_more_gpus_than_a_machine_has_are_pointed_out() -> None:
    assert "12 GPUs are more than a machine has" in grat(*FLUX, "--gpus", 12).err
    assert "more than a machine has" not in grat(*FLUX, "--gpus", 8).err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*FLUX, "--gpus", 5), "24 heads cannot be shared by 5 ranks: use --gpus 1, 2, 3, 4, 6, 8, 12 or 24"),
        ((*FLUX, "--gpus", 0), "--gpus 0: expected 1 or more"),
        ((*FLUX, "--gpus", 4, "--parallel", "cp=2"), "--parallel cp=2 is for 2 ranks, not 4: use --gpus 2"),
        ((*FLUX, "--gpus", 4, "--parallel", "cp=2,cfg=2"), "guidance makes no second call here: leave cfg=2 out"),
        ((*FLUX, "--gpus", 4, "--parallel", "tp=4"), "expected such as cp=2,cfg=2, or auto"),
        ((*FLUX, "--parallel", "cp=2"), "--parallel is for several GPUs: add --gpus COUNT"),
        ((*FLUX, "--shard-weights"), "--shard-weights is for several GPUs: add --gpus COUNT"),
        ((*FLUX, "--gpus", 1, "--shard-weights"), "no ranks share a call: leave it out, or share calls by more"),
        ((*FLUX, "--gpus", 2, "--shard-weights", "--quantize", "int8"), "leave one of them out"),
        ((*FLUX, "--fleet", 0), "--fleet 0: expected 1 or more machines"),
        (("plan", "demo-b", "--fleet", 5), "--fleet needs the time of an output: add --gpu h200"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: tuple[object, ...], said: str) -> None:
    assert said in refusal(*arguments)


def test_planning_for_several_gpus_loads_no_torch() -> None:
    arguments = [*map(str, QWEN), "--gpus", "4", "--fleet", "2", "--json"]
    script = (
        f"import sys; from grat_cli.app import run; assert run({arguments!r}) == 0; "
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(made.stdout)["gpus"]["count"] == 4
