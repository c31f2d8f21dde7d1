"""What making pictures and making videos have in common: the record of a run, watching its steps, and its failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, NumericalFailure, OutOfMemory
from grat_cli.generation.request import GenerationRequest, Progress
from grat_cli.generation.timing import StepTiming
from grat_cli.models.devices import device_name, is_out_of_memory

if TYPE_CHECKING:
    import torch

    from grat_cli.attention.schedule import AttentionSchedule


@dataclass(frozen=True, kw_only=True)
class GenerationRecord:
    """What there is to report about how a picture or video was made.

    Attributes:
        phases_ms: load and text are 0 for all but the first output of a request.
        steps: timing of every denoising step.
        peak_memory_bytes: up to the end of this output.
        peak_memory_kind: what was measured, in words.
        backend: how attention was computed, never `auto`.
        backend_reason: why.
        preparation: what normalised, rotated and joined queries and keys before attention, and why.
        autoencoder_dtype: of the autoencoder, which may differ from the transformer's.
        threads: CPU threads where the device is a CPU, which results depend on in their last bits; else None.
        offload: which weights waited in main memory, never `auto`.
        offload_reason: why.
        guidance: effective guidance scale, or None.
        shift: effective time shift, a factor.
        model_revision: commit of the weights on the hub, or None.
        schedule: which attention ran when.
        text_tokens: length of the text in the joint sequence.
        guard: of `guard.RecallGuard.report`, None without a guard.
    """

    seed: int
    width: int
    height: int
    phases_ms: dict[str, float]
    steps: list[StepTiming]
    peak_memory_bytes: int
    peak_memory_kind: str
    backend: str
    backend_reason: str
    preparation: str | None
    offload: str = "none"
    offload_reason: str = "chosen by name"
    device: str
    device_name: str
    dtype: str
    autoencoder_dtype: str
    threads: int | None
    guidance: float | None
    shift: float
    model_revision: str | None
    schedule: AttentionSchedule
    text_tokens: int
    guard: dict[str, Any] | None = None


class StepWatch:
    """The pipeline's callback after every step: tells progress, and collects without waiting whether all is finite.

    Args:
        progress: to be told.
        first_step: where the run begins; later than 0 where an interrupted one is resumed.
    """

    def __init__(self, progress: Progress, first_step: int = 0) -> None:
        self._progress = progress
        self._first_step, self._steps = first_step, first_step
        self._finite: list[torch.Tensor] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        self._finite.append(tensors["latents"].isfinite().all())
        self._steps = self._first_step + pipe.num_timesteps
        self._progress.step(self._first_step + step + 1, self._steps)
        return {}

    def raise_if_not_finite(self) -> None:
        """Raises NumericalFailure with the first step whose latents were not finite; waits for the device."""
        import torch

        finite = torch.stack(self._finite).tolist() if self._finite else []
        if not all(finite):
            first = self._first_step + finite.index(False) + 1
            raise NumericalFailure(
                f"latents turned NaN or infinite at step {first} of {self._steps}: "
                "try --dtype float32 or bfloat16, or another --backend"
            )


@contextmanager
def explained_backend_failures() -> Iterator[None]:
    """Around a pipeline call: what a backend refuses is bad input, what it computes wrongly a numerical failure."""
    from grat_kernels import BackendUnavailable, KernelMismatch

    try:
        yield
    except BackendUnavailable as error:
        raise BadInput(f"{error}; use --backend auto") from error
    except KernelMismatch as error:
        raise NumericalFailure(str(error)) from error


@contextmanager
def memory_advice(request: GenerationRequest, device: torch.device, size: str) -> Iterator[None]:
    """Turns running out of memory into OutOfMemory with what would help.

    Args:
        request: what is made.
        device: where.
        size: of the output, in words.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        unit = request.model.size_multiple
        smaller = "x".join(str(max(unit, side // (2 * unit) * unit)) for side in (request.width, request.height))
        advice = [f"a smaller --res such as {smaller}"]
        if device.type != "cpu":
            advice += [f"--offload {kind}" for kind in ("model", "group", "sequential") if kind != request.offload]
        raise OutOfMemory(
            f"{device_name(device)} has too little memory for {size} with {request.model.name}: "
            f"try {' or '.join(advice)}"
        ) from error
