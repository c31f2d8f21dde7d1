"""`grat_kernels.trial_process` with a kernel that hangs, faults, raises, or is wrong, as GRAT_TEST_FAULT says."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from grat_kernels import trial_process, triton_backend


def hangs(*_: Any, **__: Any) -> Any:
    time.sleep(3600)


def faults(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


def raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("CUDA error: an illegal memory access\nCUDA kernel errors might be ...")


def finds_no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")


def exits(*_: Any, **__: Any) -> Any:
    os._exit(77)


def is_wrong(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros_like(query)


if __name__ == "__main__":
    fault = os.environ["GRAT_TEST_FAULT"]
    if fault != "none":
        triton_backend.attention = globals()[fault]
    sys.exit(trial_process.main(*sys.argv[1:]))
