"""All that needs a GPU, in minutes: every kernel is tried, tested and timed in processes of its own.

    make gpu OUT=folder

A kernel that hangs, faults or is wrong costs its own rows alone: where it fails its trial, its tests and timings are
left out. After each step the folder holds what is known by then: `summary.md`, `bench.json`, `bench.md` and `log.txt`.
Needs torch, triton, numpy, pytest and hypothesis; with pytest-xdist tests run eight at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

KERNELS = ("triton", "gluon", "rope_norm")
# What a step is of that is of no kernel alone.
ALL = "all"
_IMAGE = "full,grat-b:radius=2,grat-b,grat-x,grat-far:block=8x8,full-list"
_VIDEO = "full,grat-b,grat-x:share=2,grat-x:share=1,full-list"
# What is timed, and how often: each row takes dense attention as many times as well, which at 8192x8192 pixels is a
# second a call, besides the search for the fastest. The shortest first, so that something is known early.
CASES = {
    "flux-4096": (_IMAGE, 20),
    "hunyuan-720p": (_VIDEO, 10),
    "flux-8192": (_IMAGE, 3),
    "flux-2048": (_IMAGE, 20),
}
HERE = Path(__file__).parent
# Under what is left of the time no step is begun.
LEAST_S = 10.0


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        kernel: that it is about.
        kind: a trial that fails leaves the kernel's other steps out.
        title: what it does.
        command: its arguments.
        seconds: it is ended after so many.
    """

    kernel: str
    kind: Literal["trial", "tests", "timing", "sanitizer"]
    title: str
    command: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What came of a step: `passed`, or in a few words what did not; the last line that it printed."""

    step: Step
    what: str
    seconds: float = 0.0
    said: str = ""


@dataclass
class Report:
    """What is known so far, in a folder."""

    out: Path
    facts: dict[str, str]
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Writes it down, and prints it."""
        self.outcomes.append(outcome)
        step = outcome.step
        print(f"{step.kernel}: {step.title}: {outcome.what} ({outcome.seconds:.0f} s)", flush=True)
        (self.out / "summary.md").write_text("\n".join(self._lines()) + "\n")

    def passed(self, kernel: str) -> bool:
        """Whether a kernel passed its trial and its tests."""
        own = [outcome for outcome in self.outcomes if outcome.step.kernel == kernel]
        return {"trial", "tests"} <= {outcome.step.kind for outcome in own if outcome.what == "passed"}

    def failed_trial(self, kernel: str) -> bool:
        """Whether a kernel is not to be used any more."""
        trials = [outcome for outcome in self.outcomes if outcome.step.kind == "trial"]
        return any(trial.step.kernel == kernel and trial.what != "passed" for trial in trials)

    def _lines(self) -> Iterator[str]:
        yield from ("# Kernels on this GPU", "")
        yield from (f"- {name}: {value}" for name, value in self.facts.items())
        yield from ("", "| kernel | step | outcome | seconds | last line |", "| --- | --- | --- | ---: | --- |")
        for outcome in self.outcomes:
            said = outcome.said.replace("|", "\\|")
            yield f"| {outcome.step.kernel} | {outcome.step.title} | {outcome.what} | {outcome.seconds:.0f} | {said} |"
        if passed := [kernel for kernel in KERNELS if self.passed(kernel)]:
            yield from ("", "Passed their tests; rows for `kernels/proven.py`:", "", "```python")
            for kernel in passed:
                facts = [self.facts.get(name, "") for name in ("architecture", "triton", "torch", "gpu", "date")]
                yield f"Proof({', '.join(map(json.dumps, [kernel, *facts]))}),"
            yield "```"
        if (self.out / "bench.md").is_file():
            yield from ("", (self.out / "bench.md").read_text())


def steps_here(out: Path) -> list[Step]:
    """What is done on a GPU, in order."""
    python, at_once = sys.executable, ("-n", "8", "--max-worker-restart", "16") if find_spec("xdist") else ()
    pytest = (python, "-m", "pytest", "--confcutdir", str(HERE), *at_once, "-rfE", "--tb=short", str(HERE))
    own = {"triton": "test_kernels_gpu and not gluon", "gluon": "gluon", "rope_norm": "rope_norm"}
    steps = [
        Step(kernel, "trial", "trial", (python, "-m", "grat_kernels.trial_process", kernel, forms(kernel)), 90)
        for kernel in KERNELS
    ]
    steps += [
        Step(kernel, "tests", "tests", (*pytest, "-k", f"{words} and not sanitizer"), 150)
        for kernel, words in own.items()
    ]
    others = "not test_kernels_gpu and not gluon and not rope_norm"
    steps.append(Step(ALL, "tests", "other tests", (*pytest, "-k", others), 60))
    bench = (python, str(HERE / "bench_kernels.py"), "--out", str(out / "bench.json"), "--peers", "")
    steps += [
        Step(
            kernel,
            "timing",
            f"timing of {case}",
            (*bench, "--case", case, "--backend", kernel, "--compare", compare, "--repetitions", str(repetitions)),
            120,
        )
        for case, (compare, repetitions) in CASES.items()
        for kernel in ("triton", "gluon")
    ]
    steps += [
        Step(kernel, "sanitizer", "sanitizer", (*pytest, "-k", f"{kernel} and sanitizer"), 150)
        for kernel in ("triton", "gluon")
    ]
    return steps


def forms(kernel: str) -> str:
    """The forms that models use, as `grat_kernels.trial_process` takes them."""
    kinds = [(False, False, False), (True, False, False), (True, True, False), (False, False, True)]
    if kernel == "rope_norm":
        kinds = kinds[:1]
    # Device, dtype, head dimension; far, padded, by head, in place, choosing.
    found = [["cuda:0", "bfloat16", dim, *kind, True, False] for dim in (128, 64) for kind in kinds]
    if kernel == "triton":
        found.append(["cuda:0", "bfloat16", 128, True, False, False, True, True])
    return json.dumps(found)


def run_steps(steps: Sequence[Step], report: Report, seconds: float) -> bool:
    """Runs steps one after another for at most so many seconds; whether all passed."""
    deadline = time.monotonic() + seconds
    for step in steps:
        left = deadline - time.monotonic()
        if report.failed_trial(step.kernel):
            report.add(Outcome(step, "left out: it failed its trial"))
        elif left < LEAST_S:
            report.add(Outcome(step, "left out: no time"))
        else:
            report.add(run_step(step, report.out / "log.txt", min(left, step.seconds)))
    return all(outcome.what == "passed" for outcome in report.outcomes)


def run_step(step: Step, log: Path, seconds: float) -> Outcome:
    """Runs one, whose output goes to the log's end, and ends all of its processes where it takes longer."""
    with log.open("ab") as file:
        file.write(f"\n==== {step.kernel}: {step.title}\n".encode())
        file.flush()
        began, begins = time.monotonic(), file.tell()
        process = subprocess.Popen(
            step.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            what = "passed" if code == 0 else f"failed: {_ended(code)}"
        except subprocess.TimeoutExpired:
            what = f"hung: ended after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what it has left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log.open("rb") as file:
        file.seek(begins)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return Outcome(step, what, time.monotonic() - began, lines[-1][:200] if lines else "")


def _ended(code: int) -> str:
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"


def facts_here() -> dict[str, str]:
    """What the figures depend on, in a process of its own: this one never touches the device."""
    program = (
        "import torch; from grat_kernels.proven import architecture; device = torch.device('cuda', 0);"
        "print(torch.cuda.get_device_name(device)); print(architecture(device)); print(torch.__version__)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if told.returncode:
        raise SystemExit(f"this needs a CUDA device: {told.stderr.strip().splitlines()[-1]}")
    names: dict[str, str] = dict(zip(("gpu", "architecture", "torch"), told.stdout.splitlines(), strict=True))
    query = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    with contextlib.suppress(OSError):
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        names[query] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    try:
        names["triton"] = ".".join(version("triton").split(".")[:2])
    except PackageNotFoundError:
        names["triton"] = "none"
    return names | {"date": time.strftime("%Y-%m-%d")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all steps; 1 where one of them did not pass."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of summary.md and the rest")
    parser.add_argument("--seconds", type=float, default=540, help="most for all steps together")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this one; repeatable")
    parser.add_argument("--kind", action="append", choices=("trial", "tests", "timing", "sanitizer"), help="only these")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    steps = [
        step
        for step in steps_here(chosen.out)
        if step.kernel in (chosen.kernel or (*KERNELS, ALL)) and (not chosen.kind or step.kind in chosen.kind)
    ]
    passed = run_steps(steps, Report(chosen.out, facts_here()), chosen.seconds)
    print(chosen.out / "summary.md")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
