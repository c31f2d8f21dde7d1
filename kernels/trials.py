"""Kernels are tried before they are used: what is wrong, faults or hangs on a machine is found there, and told.

A compiler, a driver or a GPU that nobody has tried may break a kernel without a sound. So before a kernel's first use
in a process, for each form of it (each is compiled by itself), a small problem is computed and compared with the
definition. Where a kernel has never passed, that is done in a process of its own: after a fault a process can do
nothing more on a device, and what waits for a kernel that hangs waits for ever.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from grat_kernels.proven import is_proven

# What a process takes to begin, and what compiling and computing one form may take after that.
_START_S, _FORM_S = 60.0, 60.0
_PROCESS = "grat_kernels.trial_process"
# Exit codes of a process in which a kernel failed, and which has said how; and of one that found too little memory.
_FAILED, _OUT_OF_MEMORY = 3, 4


class KernelFailure(RuntimeError):
    """A kernel failed its test on this machine; the text says how and where in one line, and in another what to do."""


class KernelPassedOver(UserWarning):
    """A kernel failed its test, and something else computes in its place."""


class Form(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        far: whether the plan has summaries.
        padded: whether text is masked per sample.
        by_head: whether heads attend differently.
        in_place: whether the tensors can be read through tensor descriptors.
        choosing: whether groups choose by content what they attend; of a plan with summaries.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    far: bool = False
    padded: bool = False
    by_head: bool = False
    in_place: bool = True
    choosing: bool = False


Test = Callable[[Form], None]

_passed: set[tuple[str, Form]] = set()
_failures: dict[tuple[str, torch.device], str] = {}


def require(kernel: str, forms: Sequence[Form], test: Test) -> None:
    """Tries a kernel in the forms in which this process has not tried it, which waits for the device.

    Inside a CUDA graph's capture, where nothing may wait, it does nothing and leaves that to the next call.

    Args:
        kernel: by name, as `trial_process` knows it.
        forms: on one device.
        test: raises KernelFailure where the kernel computes wrong results in a form.

    Raises:
        KernelFailure: if the kernel fails in any way, now or earlier in this process.
        OutOfMemoryError: if there is too little memory to try it.
    """
    untried = [form for form in forms if (kernel, form) not in _passed]
    if not untried:
        return
    device = untried[0].device
    if (known := failure(kernel, device)) is not None:
        raise KernelFailure(known)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    try:
        if _is_safe(kernel, device):
            for form in untried:
                _try_here(kernel, form, test)
        else:
            _try_apart(kernel, untried)
    except KernelFailure as error:
        _failures[kernel, device] = str(error)
        raise
    _passed.update((kernel, form) for form in untried)


def failure(kernel: str, device: torch.device) -> str | None:
    """How a kernel failed on a device earlier in this process, as `KernelFailure` says it; None where it did not."""
    return _failures.get((kernel, device))


def pass_over(failure: KernelFailure) -> str:
    """Warns that a kernel failed and another way is taken in its place; its first line."""
    line = str(failure).splitlines()[0]
    warnings.warn(KernelPassedOver(line), stacklevel=3)
    return line


def failed(what: str, device: torch.device) -> KernelFailure:
    """The failure that says what went wrong on a device, where, and what to do."""
    return KernelFailure(
        f"{what} ({', '.join(_machine(device))})\n"
        "Choose another one, such as --backend sdpa, and report this line with what grat env prints."
    )


def _is_safe(kernel: str, device: torch.device) -> bool:
    """Whether no more than wrong results is to be feared: Triton's interpreter raises."""
    return device.type == "cpu" or is_proven(kernel, device)


def _try_here(kernel: str, form: Form, test: Test) -> None:
    try:
        with torch.no_grad(), torch.autocast(form.device.type, enabled=False):
            test(form)
    except (KernelFailure, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of compilers and drivers, of many kinds
        raise failed(f"the {kernel} kernel fails here: {_first_line(error)}", form.device) from error


def _try_apart(kernel: str, forms: Sequence[Form]) -> None:
    """The same in a process of its own, which is ended if it takes too long."""
    device, seconds = forms[0].device, _START_S + _FORM_S * len(forms)
    told = json.dumps([[str(form.device), str(form.dtype).removeprefix("torch."), *form[2:]] for form in forms])
    beside = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": beside, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", _PROCESS, kernel, told]
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise failed(f"the {kernel} kernel hangs here: no result after {seconds:.0f} s", device) from error
    if ended.returncode == _FAILED:
        raise KernelFailure(ended.stdout.strip())
    if ended.returncode == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(ended.stdout.strip())
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        reason = said[-1].strip() if said and ended.returncode > 0 else _name_of(ended.returncode)
        raise failed(f"the {kernel} kernel fails here: {reason}", device)


def try_forms(kernel: str, forms: str, test: Test) -> int:
    """What the process does that `require` starts; its exit code.

    Args:
        kernel: by name.
        forms: as JSON.
        test: as for `require`.
    """
    try:
        for device, dtype, *rest in json.loads(forms):
            _try_here(kernel, Form(torch.device(device), getattr(torch, dtype), *rest), test)
    except KernelFailure as error:
        print(error)
        return _FAILED
    except torch.OutOfMemoryError as error:
        print(error)
        return _OUT_OF_MEMORY
    return 0


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _name_of(code: int) -> str:
    if -code in set(signal.Signals):
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _machine(device: torch.device) -> list[str]:
    """What may be to blame: device, driver, and versions."""
    names = []
    if device.type == "cuda":
        names.append(torch.cuda.get_device_name(device))
        driver = Path("/proc/driver/nvidia/version")
        found = re.search(r"\d+(\.\d+)+", driver.read_text()) if driver.is_file() else None
        names += [f"driver {found[0]}"] if found else []
        names.append(f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}")
    else:
        names.append(f"{device.type} (Triton's interpreter)")
    for package in ("torch", "triton", "grat-cli"):
        try:
            names.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            names.append(f"{package} of no known version")
    return names
