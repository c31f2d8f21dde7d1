"""`bench_kernels` with a Triton kernel that hangs or faults at one of its calls: GRAT_TEST_FAULT, GRAT_TEST_CALL."""

from __future__ import annotations

import os
import sys
from typing import Any

import broken_kernels
from bench_kernels import main

from grat_kernels import triton_backend

if __name__ == "__main__":
    intact, fault = triton_backend.attention, getattr(broken_kernels, os.environ["GRAT_TEST_FAULT"])
    calls = 0

    def attention(*arguments: Any, **options: Any) -> Any:
        global calls
        calls += 1
        return (fault if calls == int(os.environ["GRAT_TEST_CALL"]) else intact)(*arguments, **options)

    triton_backend.attention = attention
    sys.exit(main(sys.argv[1:]))
