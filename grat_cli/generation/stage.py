"""One stage of an output: from noise, an upscaled picture, or what is done of it, to latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grat_cli.attention.extrapolation import Extrapolation
from grat_cli.errors import BadInput, NumericalFailure, steadier
from grat_cli.estimates.stages import Stage, stages_of
from grat_cli.families.base import NO_PICTURES, PictureKind
from grat_cli.families.time_shift import time_shift
from grat_cli.generation.low_resolution_guidance import low_resolution_guidance
from grat_cli.generation.request import Progress, Request
from grat_cli.installation import Installation, install
from grat_cli.models.devices import wait_for

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch.distributed.device_mesh import DeviceMesh

    from grat_cli.attention.adapter import CallObserver
    from grat_cli.models.resolution import Resolution


def stages_for(request: Request, start: Resolution | None = None) -> tuple[Stage, ...]:
    """The stages of a request's outputs; `start` is the size of the picture that they redo."""
    return stages_of(
        request.preset,
        request.model,
        request.width,
        request.height,
        start=start,
        strength=request.strength,
        handed=request.handed,
    )


@dataclass(frozen=True)
class Installed:
    """A pipeline that is ready for a stage.

    Attributes:
        pipe: that starts from noise, or from a picture, as the stage does.
        shift: effective time shift, a factor.
        installation: what runs inside it.
    """

    pipe: Any
    shift: float
    installation: Installation


def refuse_cache(request: Request) -> None:
    """Makes sure, before weights are loaded, that the model can have the cache of a request.

    Raises:
        BadInput: with the reason if it cannot.
    """
    if (cache := request.preset.cache) is None:
        return
    import torch

    # What is imported while tensors are made without data has none for good.
    from diffusers.hooks import mag_cache  # noqa: F401

    from grat_cli.attention import caching

    family = request.family
    try:
        config, kind = family.transformer_config(request.model), family.transformer_class()
        # What decides are the classes of its blocks, not how many there are.
        few = {name: value for name, value in family.with_blocks(config, (2, 2)).items() if name in config}
        with torch.device("meta"):
            small = kind.from_config(few)
        blocks = family.adapter(small, request.grid).blocks
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ArithmeticError):
        return  # loading will say what is wrong with it
    caching.refuse(small, blocks, cache, family.mag_ratios(config))


@contextmanager
def installed(
    pipe: Any,
    request: Request,
    stage: Stage,
    *,
    start: torch.Tensor | None = None,
    first_step: int = 0,
    observer: CallObserver | None = None,
    parallel: DeviceMesh | None = None,
) -> Iterator[Installed]:
    """While inside, a pipeline runs a stage with its attention, time shift and guidance.

    Args:
        pipe: a loaded pipeline.
        request: of the output.
        stage: to be run.
        start: latents that it starts from; None for noise, and where the pipeline is given pictures.
        first_step: steps of it that are done.
        observer: told of transformer calls and attentions.
        parallel: ranks that run it together, as for `install`.

    Raises:
        BadInput: if attention or schedule do not fit the stage, or its backend cannot run.
        NumericalFailure: if a kernel computes wrong results on this machine.
    """
    family = request.family
    redone: frozenset[PictureKind] = NO_PICTURES if start is None else frozenset({"start"})
    pipe = family.pipeline_for(pipe, request.handed or redone)
    size = request.installed_size | {"height": stage.height, "width": stage.width}
    tokens = request.model.grid(stage.width, stage.height, request.frames).tokens
    sampling = stage.preset.sampling
    with (
        time_shift(pipe, tokens, sampling.shift, family.given_shift(pipe, tokens, sampling.steps)) as shift,
        _guided(pipe, request, stage, start),
        install(
            pipe,
            stage.preset,
            **size,
            steps=stage.steps,
            first_step=first_step,
            observer=observer,
            extrapolation=_extrapolation(request, stage),
            parallel=parallel,
        ) as installation,
        explained_backend_failures(),
    ):
        yield Installed(pipe, shift, installation)


def _guided(pipe: Any, request: Request, stage: Stage, start: torch.Tensor | None) -> AbstractContextManager[None]:
    """Low-resolution guidance of a stage that has it."""
    if start is None or not stage.low_resolution_guidance:
        return nullcontext()
    scale = stage.width // start.shape[-1]  # pixels per latent
    trained = stage.trained.height // scale, stage.trained.width // scale
    return low_resolution_guidance(request.family, pipe, start, trained, stage.low_resolution_guidance)


def _extrapolation(request: Request, stage: Stage) -> Extrapolation | None:
    """How positions and scores are fitted to a stage; None where they stay as they are."""
    if stage.positions == "none" and not stage.proportional_attention:
        return None
    trained = request.model.grid(stage.trained.width, stage.trained.height).shape
    return Extrapolation((trained[0], trained[1]), stage.positions, stage.proportional_attention)


@contextmanager
def explained_backend_failures() -> Iterator[None]:
    """Around a pipeline call: what a backend refuses is bad input, what it computes wrongly a numerical failure."""
    from grat_kernels import BackendUnavailable, KernelFailure

    try:
        yield
    except BackendUnavailable as error:
        raise BadInput(f"{error}; use --backend auto") from error
    except KernelFailure as error:
        raise NumericalFailure(str(error)) from error


def upscaled(pipe: Any, request: Request, before: Image.Image | torch.Tensor, stage: Stage) -> torch.Tensor:
    """Latents `[1, C, h, w]` of the size of a stage.

    Args:
        pipe: a loaded pipeline.
        request: of the output.
        before: picture or latents of any size.
        stage: that starts from them.
    """
    from PIL import Image

    if isinstance(before, Image.Image):
        resized = before.resize((stage.width, stage.height), Image.Resampling.LANCZOS)
        return request.family.encode(pipe, resized)
    from torch.nn import functional

    scale = pipe.vae_scale_factor
    size = stage.height // scale, stage.width // scale
    return functional.interpolate(before.float(), size, mode="bicubic", antialias=True).to(before.dtype)


class StepWatch:
    """The pipeline's callback after every step: tells progress, and ends a run whose latents are not finite.

    It waits for nothing: on a GPU the answer comes one or two steps later, and the rest need not be run.

    Args:
        progress: to be told.
        first_step: where the stage begins; later than 0 where an interrupted one is resumed.
        before: called ahead of telling that a step is done.
    """

    def __init__(
        self, progress: Progress, first_step: int = 0, before: Callable[[int], None] = lambda step: None
    ) -> None:
        self._progress, self._before = progress, before
        self._first_step, self._steps = first_step, first_step
        self._finite: _FiniteSteps | None = None
        self._dtype: torch.dtype | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        latents = tensors["latents"]
        if self._finite is None:
            self._finite = _FiniteSteps(latents.device, pipe.num_timesteps)
            self._dtype = getattr(getattr(pipe, "transformer", None), "dtype", latents.dtype)
            self._steps = self._first_step + pipe.num_timesteps
        self._finite.add(latents)
        self._before(self._first_step + step)
        self._progress.step(self._first_step + step + 1, self._steps)
        self._refuse(self._finite.first_not(wait=False))
        return {}

    def raise_if_not_finite(self) -> None:
        """Raises NumericalFailure with the first step whose latents were not finite; waits for the device."""
        if self._finite is not None:
            self._refuse(self._finite.first_not(wait=True))

    def _refuse(self, step: int | None) -> None:
        if step is not None:
            raise NumericalFailure(
                f"latents turned NaN or infinite at step {self._first_step + step + 1} of {self._steps}: "
                f"{steadier(self._dtype, 'another --backend')}"
            )


class _FiniteSteps:
    """Whether the latents of each step are finite: answers on their way from the device to the host."""

    def __init__(self, device: torch.device, steps: int) -> None:
        import torch

        self._device = device
        self._answers = torch.zeros(steps, dtype=torch.bool, pin_memory=device.type == "cuda")
        # Of the same memory: reading it asks no tensor for its value.
        self._read = self._answers.numpy()
        self._arrived: list[torch.cuda.Event] = []
        self._sent = self._seen = 0

    def add(self, latents: torch.Tensor) -> None:
        """The latents after the next step."""
        import torch

        self._answers[self._sent].copy_(latents.isfinite().all(), non_blocking=True)
        self._sent += 1
        if self._device.type == "cuda":
            self._arrived.append(torch.cuda.Event())
            self._arrived[-1].record(torch.cuda.current_stream(self._device))

    def first_not(self, *, wait: bool) -> int | None:
        """The first step, counted from 0, whose latents are known not to be finite; None where there is none.

        Args:
            wait: for all that were added; else only what is known already counts.
        """
        if wait:
            wait_for(self._device)
        while self._seen < self._sent and (wait or self._is_known(self._seen)):
            if not self._read[self._seen]:
                return self._seen
            self._seen += 1
        return None

    def _is_known(self, step: int) -> bool:
        if self._device.type == "cuda":
            return self._arrived[step].query()
        return self._device.type == "cpu"
