"""The backends of span attention: what each can run, and which one `AUTO` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch

from grat_kernels import flex_backend, gluon_backend, sdpa_backend, self_test, trials, triton_backend
from grat_kernels.proven import architecture, is_proven
from grat_kernels.trials import Form, KernelFailure


class Backend(str, Enum):
    """How span attention is computed. `AUTO` picks; a backend chosen by name runs or says why it cannot."""

    AUTO = "auto"
    REFERENCE = "reference"
    SDPA = "sdpa"
    FLEX = "flex"
    TRITON = "triton"
    GLUON = "gluon"


# Backends that say what they need.
MODULES = {
    Backend.SDPA: sdpa_backend,
    Backend.FLEX: flex_backend,
    Backend.TRITON: triton_backend,
    Backend.GLUON: gluon_backend,
}
# Kernels of our own, the fastest first. One launch serves all classes of heads, and each is tried before it is used.
KERNELS = (Backend.GLUON, Backend.TRITON)
# Those that attend blocks chosen by content.
_CHOOSING = (Backend.REFERENCE, Backend.SDPA, Backend.TRITON)


@dataclass(frozen=True)
class Ability:
    """Whether a backend can run, and the reason in words, also where it can. True in a condition where it can."""

    able: bool
    reason: str

    def __bool__(self) -> bool:
        return self.able


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name where it cannot run."""


def can_run(
    backend: Backend | str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    tokens: int | None = None,
    *,
    choosing: bool = False,
) -> Ability:
    """Whether a backend runs on a device for a dtype, head dimension and sequence length; never raises.

    Args:
        backend: a backend by name; for `AUTO` the answer names the choice.
        device: where the tensors lie.
        dtype: dtype of query, key and value.
        head_dim: channels per head.
        tokens: length of the joint sequence, where known: some backends are for small sizes only.
        choosing: whether groups choose by content what they attend (`Plan.chooses`).
    """
    backend, device = Backend(backend), torch.device(device)
    if backend is Backend.AUTO:
        choice, reason = choose_backend(device, dtype, head_dim, choosing=choosing)
        return Ability(True, f"{choice.value}: {reason}")
    if backend is Backend.REFERENCE:
        return Ability(True, "dense masks in fp32, for small sizes")
    obstacle = _obstacle(backend, device, dtype, head_dim, tokens, choosing)
    return Ability(obstacle is None, obstacle or MODULES[backend].DESCRIPTION)


def _obstacle(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None, choosing: bool
) -> str | None:
    """Why a backend cannot run, or None; arguments as for `can_run`."""
    obstacle = MODULES[backend].obstacle(device, dtype, head_dim, tokens)
    if obstacle is None and choosing and backend not in _CHOOSING:
        return "it does not attend blocks chosen by content: use triton or sdpa"
    return obstacle


def choose_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, choosing: bool = False
) -> tuple[Backend, str]:
    """The backend that `AUTO` stands for, and why; arguments as for `can_run`.

    Plain Triton comes before kernels that have never passed on the architecture, and what failed in this process is
    passed over. Triton's interpreter is for tests and never chosen.
    """
    if device.type != "cuda":
        return Backend.SDPA, f"the fastest on {device.type}"
    able, reasons = [], []
    for backend in sorted(KERNELS, key=lambda one: one is not Backend.TRITON and not is_proven(one.value, device)):
        if (failure := trials.failure(backend.value, device)) is not None:
            reasons.append(failure.splitlines()[0])
        elif (obstacle := _obstacle(backend, device, dtype, head_dim, None, choosing)) is not None:
            reasons.append(f"{backend.value} cannot run here: {obstacle}")
        else:
            able.append(backend)
    if not able:
        return Backend.SDPA, "; ".join(reasons)
    if able[0] is Backend.TRITON and len(able) > 1:
        faster = f"{able[1].value} has not passed its tests on {architecture(device)} yet"
        return Backend.TRITON, "; ".join([faster, *reasons])
    return able[0], "; ".join(["the fastest that runs on this device", *reasons])


def tried_backend(forms: Sequence[Form]) -> tuple[Backend, str]:
    """The backend that `AUTO` stands for once kernels were tried, and why; those that fail are passed over.

    Args:
        forms: in which it is to be used, of one device, dtype and head dimension.

    Warns:
        KernelPassedOver: for each kernel that fails, in one line.
    """
    device, dtype, head_dim, *_ = forms[0]
    choosing = any(form.choosing for form in forms)
    while True:
        backend, reason = choose_backend(device, dtype, head_dim, choosing=choosing)
        try:
            check_kernel(backend, forms)
        except KernelFailure as failure:
            trials.pass_over(failure)  # what failed is chosen no more
        else:
            return backend, reason


def check_kernel(backend: Backend | str, forms: Sequence[Form]) -> None:
    """Tries a kernel of ours now, and not at its first use, where the wait would disturb; others need no trial.

    Args:
        backend: any but `AUTO`.
        forms: in which it will be used.

    Raises:
        KernelFailure: if it fails on this machine.
    """
    backend = Backend(backend)
    if backend in KERNELS:
        trials.require(backend.value, forms, comparison_of(backend))


def comparison_of(kernel: Backend | str) -> trials.Test:
    """What compares a kernel of ours with the definition."""
    backend = Backend(kernel)
    return partial(self_test.compare, backend.value, MODULES[backend].attention)
