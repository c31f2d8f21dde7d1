"""Videos from prompts: the main path, which reads from top to bottom in `generate_videos`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grat_cli import report
from grat_cli.checkpoints import load_model
from grat_cli.denoising import GenerationRecord, StepWatch, explained_backend_failures, memory_advice
from grat_cli.devices import choose_device, choose_dtype, device_name, peak_memory
from grat_cli.errors import BadInput, Interrupted
from grat_cli.generation_request import Progress
from grat_cli.guidance import Guidance, choose_guidance
from grat_cli.installation import install
from grat_cli.latents_file import latents_path
from grat_cli.run_checkpoint import checkpoint_path
from grat_cli.time_shift import time_shift
from grat_cli.timing import StepRecorder
from grat_cli.video_decoding import MadeVideo, command_for, decode_run, finish_video, kept_latents, phases_of, use_tiles
from grat_cli.video_request import VideoRequest, check_video
from grat_cli.video_run import VideoRun, write_run

if TYPE_CHECKING:
    import torch


def generate_videos(request: VideoRequest, progress: Progress, begun: VideoRun | None = None) -> Iterator[MadeVideo]:
    """Makes one video per seed and writes it with its report; the model is loaded once.

    Args:
        request: what to make.
        progress: told how it goes on.
        begun: a run that is taken up; the seeds before its own are left out.

    Raises:
        BadInput: if the request cannot be done or a file not be written, with what to change.
        ModelUnavailable: if the model is missing, gated or damaged.
        OutOfMemory: if the device has too little memory.
        NumericalFailure: if latents turn NaN or infinite, or the frames are of one flat colour.
        Interrupted: by Ctrl-C, where something was kept to go on with.
    """
    # 1. What can be refused before anything is loaded, and what is only to be decoded.
    check_video(request)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    jobs = list(zip(request.seeds, request.outputs, strict=True))
    if begun is not None:
        jobs = jobs[request.seeds.index(begun.seed) :]
        if begun.done == request.preset.sampling.steps:
            _, output = jobs.pop(0)
            yield decode_run(begun, latents_path(output), request, output, progress)
            tidy_up(output, request)
            begun = None
    if not jobs:
        return
    run = begun or VideoRun(seed=jobs[0][0])
    phases = phases_of(run, device)

    with memory_advice(request, device, request.size):
        # 2. Load.
        progress.phase("load")
        with phases("load"):
            model = load_model(request.model, device=device, dtype=dtype, offload=request.offload, base=request.base)
        pipe = model.pipe
        use_tiles(pipe.vae)
        run.refuse_other_weights(model.revision)

        # 3. Encode the prompts, once for all seeds.
        guidance = choose_guidance(pipe, request.model, request.preset, request.negative_prompt)
        for note in guidance.notes:
            progress.note(note)
        progress.phase("text")
        with phases("text"):
            text = encode_text(pipe, request, guidance)
        if request.offload == "none":
            release(pipe, "text_encoder", "text_encoder_2")

    for number, (seed, output) in enumerate(jobs):
        if number:
            run = VideoRun(seed=seed, phases_ms={"load": 0.0, "text": 0.0})
            phases = phases_of(run, device)

        # 4. Denoise with GRAT attention installed; a checkpoint now and then.
        progress.phase("denoise")
        with memory_advice(request, device, request.size):
            denoising = Denoising(pipe, request, run, device, model.revision, guidance, text, output)
            run = denoising.run_to_the_end(phases, progress)
        if request.offload == "none" and number == len(jobs) - 1:
            release(pipe, "transformer")

        # 5. Keep the latents until the video is written, which is where memory and disk run out.
        kept = keep_latents(run, request, output, progress)

        # 6. Decode, encode, report.
        with kept_latents(kept, request, progress):
            made = finish_video(pipe.vae, run.latents, run, request, output, phases, progress)
        pipe.maybe_free_model_hooks()
        tidy_up(run, request, output)
        yield made
