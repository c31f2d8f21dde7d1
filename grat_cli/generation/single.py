"""Outputs that are made from noise at one size and looked at, not written: for benchmarks, `attend` and `tune`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grat_cli.estimates.stages import Stage
from grat_cli.families.base import Call
from grat_cli.families.cut_prompts import notes, watched
from grat_cli.families.guidance import choose_guidance
from grat_cli.generation.frames import FrameCheck, checked_frames
from grat_cli.generation.request import Progress, Request
from grat_cli.generation.stage import StepWatch, installed
from grat_cli.installation import Installation
from grat_cli.models.resolution import Resolution
from grat_cli.presets import Preset

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import torch

    from grat_cli.attention.adapter import CallObserver


def call_for(
    request: Request,
    seed: int,
    arguments: Mapping[str, Any],
    callback: Callable[..., dict[str, Any]],
    steps: int | None = None,
) -> Call:
    """The pipeline call for one output from noise.

    Args:
        request: of the output.
        seed: of its noise.
        arguments: text and guidance.
        callback: after every step.
        steps: in place of the preset's.
    """
    import torch

    return Call(
        width=request.width,
        height=request.height,
        frames=request.frames,
        steps=request.preset.sampling.steps if steps is None else steps,
        arguments=arguments,
        generator=torch.Generator("cpu").manual_seed(seed),
        callback=callback,
    )


def latents_of(
    pipe: Any,
    request: Request,
    preset: Preset,
    prompt: str,
    seed: int,
    progress: Progress,
    observer: CallObserver | None = None,
) -> tuple[torch.Tensor, Installation]:
    """Latents of one output, made from noise with a preset installed; and what was installed.

    Args:
        pipe: a loaded pipeline, which the family has prepared.
        request: of the output; prompt and preset are replaced.
        preset: attention, schedule and sampling; its `highres` section is not applied.
        prompt: what the output shows.
        seed: of its noise.
        progress: told of the steps.
        observer: as for `install`.

    Raises:
        BadInput: if preset and size do not fit.
        NumericalFailure: if latents turn NaN or infinite.
    """
    request = replace(request, prompt=prompt, preset=preset)
    guidance = choose_guidance(pipe, request.model, preset, request.negative_prompt)
    with watched(pipe, request.family.longest_text(pipe, request.model)) as cuts:
        text = request.family.encode_text(pipe, request.model, prompt, guidance.negative_prompt)
    for note in notes(cuts, prompt, guidance.negative_prompt):
        progress.note(note)
    watch = StepWatch(progress)
    size = Resolution(request.width, request.height)
    stage = Stage(0, size.width, size.height, preset, strength=None, trained=size)
    with installed(pipe, request, stage, observer=observer) as inside:
        latents = request.family.denoise(inside.pipe, call_for(request, seed, text | guidance.arguments, watch))
    watch.raise_if_not_finite()
    return latents, inside.installation


def frames_of(pipe: Any, request: Request, latents: torch.Tensor) -> list[np.ndarray]:
    """The frames of latents, uint8 `[H, W, 3]`; a picture has one.

    Raises:
        NumericalFailure: if there are NaN, or nothing is shown.
    """
    return list(checked_frames([request.family.decode(pipe, latents)], FrameCheck(pipe.vae.dtype)))
