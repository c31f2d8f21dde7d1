"""What `make gpu` does, rehearsed without a GPU: kernels that hang, fault or are wrong cost their own rows alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import run_all
from bench_kernels import CASES, REHEARSAL
from run_all import Report, Step, run_steps

from grat_cli.bench.results import BenchResult
from grat_cli.fidelity.variants import parse_variants

FORMS = json.dumps([["cpu", "float32", 16, False, False, False, True, False]])


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setattr(run_all, "LEAST_S", 1.0)
    return tmp_path


def trial(kernel: str, fault: str, seconds: float = 90) -> Step:
    command = ("env", f"GRAT_TEST_FAULT={fault}", sys.executable, "-m", "broken_kernels", "triton", FORMS)
    return Step(kernel, "trial", "trial", command, seconds)


def timing(kernel: str, out: Path, fault: str = "faults", call: int = -1) -> Step:
    """Where one of its calls faults, those of the trial counted."""
    options = ("--device", "cpu", "--dtype", "float16", "--heads", "1", "--repetitions", "1", "--peers", "")
    where = ("--case", REHEARSAL, "--backend", "triton", "--out", str(out / f"{kernel}.json"))
    faults = ("env", f"GRAT_TEST_FAULT={fault}", f"GRAT_TEST_CALL={call}")
    return Step(kernel, "timing", "timing", (*faults, sys.executable, "-m", "broken_bench", *options, *where), 120)


def rows(path: Path) -> list[str]:
    (case,) = BenchResult.from_json(path.read_text()).cases
    assert all(row.times_ms for row in case.rows)
    return [row.name for row in case.rows]


@pytest.mark.slow
def test_each_fault_costs_its_own_rows(out: Path) -> None:
    steps = [
        trial("triton", "none"),
        trial("hangs", "hangs", seconds=12),
        trial("faults", "faults"),
        trial("is wrong", "is_wrong"),
        Step("triton", "tests", "tests", (sys.executable, "-c", "print('1 passed')"), 30),
        *(timing(kernel, out) for kernel in ("hangs", "faults", "is wrong")),
        # Two calls of the trial, and of each row a warm-up and one that is timed: this is within the second row.
        timing("faults late", out, call=5),
        timing("triton", out),
    ]
    report = Report(out, {"gpu": "none", "architecture": "sm_00", "triton": "3.7", "torch": "2", "date": "today"})
    assert not run_steps(steps, report, seconds=600)
    left_out = "left out: it failed its trial"
    assert [outcome.what for outcome in report.outcomes] == [
        "passed",
        "hung: ended after 12 s",
        "failed: SIGSEGV",
        "failed: exit code 3",
        "passed",
        *[left_out] * 3,
        "failed: SIGSEGV",
        "passed",
    ]
    first, *others = (f"{name}:group=4x4 (triton)" for name in ("grat-x", "grat-b"))
    assert rows(out / "faults late.json") == ["full", first]
    assert rows(out / "triton.json") == ["full", first, *others]
    summary = (out / "summary.md").read_text()
    assert "| hangs | trial | hung: ended after 12 s | 12 |  |" in summary
    assert f"| is wrong | timing | {left_out} | 0 |  |" in summary
    proofs = [line for line in summary.splitlines() if line.startswith("Proof(")]
    assert proofs == ['Proof("triton", "sm_00", "3.7", "2", "none", "today"),']
    log = (out / "log.txt").read_text()
    assert "==== is wrong: trial\nthe triton kernel computes wrong results here" in log


def test_when_time_is_up_no_step_is_begun_and_the_one_under_way_is_ended(out: Path) -> None:
    sleep = (sys.executable, "-c", "import time; print('asleep', flush=True); time.sleep(600)")
    steps = [Step(kernel, "trial", "trial", sleep, 500) for kernel in ("one", "two")]
    report = Report(out, {})
    assert not run_steps(steps, report, seconds=4)
    first, second = report.outcomes
    assert first.what.startswith("hung: ended after ")
    assert (first.said, second.what) == ("asleep", "left out: no time")
    assert first.seconds < 30


def test_there_are_tests_and_timings_of_every_kernel() -> None:
    steps = run_all.steps_here(Path("out"))
    for kernel in run_all.KERNELS:
        assert {"trial", "tests"} <= {step.kind for step in steps if step.kernel == kernel}
        for device, dtype, head_dim, *kinds in json.loads(run_all.forms(kernel)):
            assert (device, dtype) == ("cuda:0", "bfloat16")
            assert head_dim in (64, 128)
            assert len(kinds) == 5
    for case, (compare, _) in run_all.CASES.items():
        assert all(request.name in CASES[case].compare.split(",") for request in parse_variants(compare))
