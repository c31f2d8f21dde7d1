"""Videos from prompts: the main path is `generate_videos`; its numbered steps are those of `VideoGenerator`."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grat_cli.errors import CannotWrite, GratError, Interrupted
from grat_cli.families.guidance import Guidance, choose_guidance
from grat_cli.families.time_shift import time_shift
from grat_cli.files.outputs import checkpoint_path, latents_path
from grat_cli.generation import report
from grat_cli.generation.denoising import GenerationRecord, StepWatch, explained_backend_failures, memory_advice
from grat_cli.generation.request import Progress
from grat_cli.generation.timing import Phases, StepRecorder
from grat_cli.generation.video_decoding import (
    MadeVideo,
    command_for,
    decode_run,
    finish_video,
    kept_latents,
    phases_of,
    use_tiles,
)
from grat_cli.generation.video_request import VideoRequest, check_video, note_expectations
from grat_cli.generation.video_run import VideoRun, discard_run, write_run
from grat_cli.installation import install
from grat_cli.models.devices import choose_device, choose_dtype, cpu_threads, device_name, peak_memory
from grat_cli.models.loading import LoadedModel, load_model

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
    note_expectations(request, progress)
    device = choose_device(request.device)
    jobs = list(zip(request.seeds, request.outputs, strict=True))
    if begun is not None:
        take_threads(begun, device, progress)
        jobs = jobs[request.seeds.index(begun.seed) :]
        if begun.done == request.preset.sampling.steps:
            _, output = jobs.pop(0)
            yield decode_run(begun, latents_path(output), request, output, progress)
            tidy_up(begun, request, output, latents_path(output))
            begun = None
    if not jobs:
        return
    run = begun or VideoRun(seed=jobs[0][0])
    phases = phases_of(run, device)

    # 2. Load.
    generator = VideoGenerator(request, phases, progress)
    run.refuse_other_weights(generator.revision)

    # 3. Encode the prompts, once for all seeds.
    text = generator.encode(request, phases)
    generator.release_text_encoders()

    # 4. to 6. Denoise, keep the latents; decode, encode and report.
    for number, (seed, output) in enumerate(jobs):
        if number:
            run = VideoRun(seed=seed, phases_ms={"load": 0.0, "text": 0.0})
            phases = phases_of(run, device)
        yield generator.make(request, run, output, text, phases, is_last=number == len(jobs) - 1)


@dataclass(frozen=True)
class VideoText:
    """Encoded prompts, in main memory.

    Attributes:
        tensors: embeddings and masks as the pipeline takes them.
        guidance: how strongly they steer.
    """

    tensors: Mapping[str, torch.Tensor]
    guidance: Guidance


class VideoGenerator:
    """A loaded model that makes one video after another. Steps and failures are those of `generate_videos`.

    Attributes:
        revision: of the weights, None where they have none.
    """

    def __init__(self, request: VideoRequest, phases: Phases, progress: Progress) -> None:
        """Loads the model.

        Args:
            request: what is made first; later ones may differ in prompt, negative prompt, seeds and outputs alone.
            phases: of the first run.
            progress: told how it goes on.
        """
        self._device, self._progress = choose_device(request.device), progress
        # 2. Load.
        with memory_advice(request, self._device, request.size):
            progress.phase("load")
            with phases("load"):
                self._model = load_model(
                    request.model,
                    device=self._device,
                    dtype=choose_dtype(request.dtype, self._device),
                    offload=request.offload,
                    quantize=request.quantize,
                    base=request.base,
                )
            if request.offload == "auto":
                progress.note(f"--offload auto is {self._model.offload}: {self._model.offload_reason}")
        self._pipe = self._model.pipe
        use_tiles(self._pipe.vae)
        self.revision = self._model.revision

    def encode(self, request: VideoRequest, phases: Phases) -> VideoText:
        """Prompt and negative prompt as the pipeline takes them, for all seeds."""
        # 3. Encode the prompts.
        with memory_advice(request, self._device, request.size):
            guidance = choose_guidance(self._pipe, request.model, request.preset, request.negative_prompt)
            for note in guidance.notes:
                self._progress.note(note)
            self._progress.phase("text")
            with phases("text"):
                tensors = encode_text(self._pipe, request, guidance)
                return VideoText({name: tensor.cpu() for name, tensor in tensors.items()}, guidance)

    def release_text_encoders(self) -> None:
        """Lets go of what no prompt needs any more, unless it waits in main memory anyway."""
        if self._model.offload == "none":
            release(self._pipe, "text_encoder", "text_encoder_2")

    def make(
        self,
        request: VideoRequest,
        run: VideoRun,
        output: Path,
        text: VideoText,
        phases: Phases,
        *,
        is_last: bool,
    ) -> MadeVideo:
        """One video, written with its report.

        Args:
            request: of the prompt.
            run: as far as it has got.
            output: where the video goes.
            text: the prompt, encoded.
            phases: of the run.
            is_last: whether the transformer is not needed afterwards.
        """
        pipe = self._pipe

        # 4. Denoise with GRAT attention installed; a checkpoint now and then.
        if not run.done:
            discard_run(output)  # of an earlier run, which would be taken for this one's
        if run.done < request.preset.sampling.steps:
            self._progress.phase("denoise")
            with memory_advice(request, self._device, request.size):
                run = denoise(
                    pipe,
                    request,
                    run,
                    output,
                    text={name: tensor.to(self._device) for name, tensor in text.tensors.items()},
                    guidance=text.guidance,
                    model=self._model,
                    device=self._device,
                    phases=phases,
                    progress=self._progress,
                )
        if self._model.offload == "none" and is_last:
            release(pipe, "transformer")

        # 5. Keep the latents until the video is written: decoding is where memory runs out.
        kept = keep_latents(run, request, output, self._progress)

        # 6. Decode, encode, report.
        with kept_latents(kept, request, output, self._progress):
            made = finish_video(pipe.vae, self._device, run, request, output, phases, self._progress)
        pipe.maybe_free_model_hooks()
        tidy_up(run, request, output, kept)
        return made


def encode_text(pipe: Any, request: VideoRequest, guidance: Guidance) -> dict[str, torch.Tensor]:
    """Embeddings and masks of prompt and negative prompt, as the pipeline takes them."""
    import torch

    def encode(prompt: str, prefix: str) -> dict[str, torch.Tensor]:
        embeddings, pooled, mask = pipe.encode_prompt(prompt=prompt, max_sequence_length=request.model.text_tokens)
        return {
            f"{prefix}prompt_embeds": embeddings,
            f"{prefix}pooled_prompt_embeds": pooled,
            f"{prefix}prompt_attention_mask": mask,
        }

    with torch.no_grad():
        text = encode(request.prompt, "")
        if guidance.negative_prompt is not None:
            text |= encode(guidance.negative_prompt, "negative_")
    return text


def release(pipe: Any, *parts: str) -> None:
    """Lets go of parts of a pipeline that are not needed any more, so that the device has their memory."""
    import torch

    for part in parts:
        setattr(pipe, part, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def denoise(
    pipe: Any,
    request: VideoRequest,
    run: VideoRun,
    output: Path,
    *,
    text: dict[str, torch.Tensor],
    guidance: Guidance,
    model: LoadedModel,
    device: torch.device,
    phases: Phases,
    progress: Progress,
) -> VideoRun:
    """The run with all of its steps done; checkpoints are written beside the output.

    Raises:
        NumericalFailure: if latents turn NaN or infinite, with the first such step.
        Interrupted: by Ctrl-C, where there is a checkpoint to go on from.
    """

    steps = request.preset.sampling.steps
    text_tokens = int(text["prompt_attention_mask"].sum(1).max())
    recorder, watch = StepRecorder(device), StepWatch(progress, run.done)
    restore_random_state(run.random_state, device)

    with (
        time_shift(pipe, request.video_tokens, request.preset.sampling.shift) as shift,
        install(
            pipe,
            request.preset,
            height=request.height,
            width=request.width,
            num_frames=request.frames,
            first_step=run.done,
            steps=steps,
            observer=recorder,
        ) as installation,
        taken_up(pipe, run, device),
        explained_backend_failures(),
    ):
        if installation.guard and run.done:
            installation.guard.restore(run.guard or {}, run.done)

        def run_after(done: int, latents: torch.Tensor) -> VideoRun:
            """The run as it is after so many steps; waits for the device."""
            watch.raise_if_not_finite()
            timesteps = [step.timestep for step in run.steps] + pipe.scheduler.timesteps.tolist()
            phases_ms, memory_bytes = phases.so_far()
            record = GenerationRecord(
                seed=run.seed,
                width=request.width,
                height=request.height,
                phases_ms=phases_ms,
                # Where a step was broken off, one of its two transformer calls may have been timed.
                steps=[*run.steps, *recorder.steps(timesteps)][:done],
                peak_memory_bytes=max(memory_bytes.values()),
                peak_memory_kind=peak_memory(device)[1],
                backend=installation.backend.value,
                backend_reason=installation.backend_reason,
                preparation=installation.preparation,
                offload=model.offload,
                offload_reason=model.offload_reason,
                device=str(device),
                device_name=device_name(device),
                dtype=str(pipe.transformer.dtype).removeprefix("torch."),
                autoencoder_dtype=str(pipe.vae.dtype).removeprefix("torch."),
                threads=cpu_threads(device),
                guidance=guidance.scale,
                shift=shift,
                model_revision=model.revision,
                schedule=installation.schedule(text_tokens),
                text_tokens=text_tokens,
                guard=installation.guard and installation.guard.report(),
            )
            return replace(
                run,
                latents=latents,
                steps=tuple(record.steps),
                phases_ms=phases_ms,
                memory_bytes=memory_bytes,
                random_state=random_state(device),
                guard=installation.guard and installation.guard.state(done),
                report=report.measured(
                    report.build_video_report(request, record, datetime.now().astimezone()), phases_ms, memory_bytes
                ),
            )

        def keep(done: int, latents: torch.Tensor) -> None:
            """Writes a checkpoint. A run does not end because there is no room for one."""
            try:
                write_run(run_after(done, latents), request, output)
            except CannotWrite as error:
                progress.note(f"{error}: step {done} is not kept")

        callback = StepKeeper(watch, run.done, request.checkpoint_every, keep)
        try:
            with phases("denoise"):
                latents = call_pipeline(
                    pipe, request, text | guidance.arguments, run.seed, callback, first_step=run.done
                )
        except KeyboardInterrupt:
            callback.keep_last()
            kept = [path for path in (latents_path(output), checkpoint_path(output)) if path.is_file()]
            if not kept:
                raise
            raise Interrupted(
                f"interrupted after step {callback.done} of {steps}; go on with {command_for('resume', kept[0])}"
            ) from None
        except Exception as error:
            if not isinstance(error, GratError) and checkpoint_path(output).is_file():
                progress.note(f"the last checkpoint is kept: {command_for('resume', checkpoint_path(output))} goes on")
            raise
        return run_after(steps, latents)


def call_pipeline(
    pipe: Any,
    request: VideoRequest,
    arguments: Mapping[str, Any],
    seed: int,
    callback: Callable[..., dict[str, Any]],
    first_step: int = 0,
) -> torch.Tensor:
    """Latents `[1, C, T, H, W]` of one video, from a step of the whole run on.

    Args:
        pipe: a HunyuanVideoPipeline.
        request: size and number of steps.
        arguments: embeddings of the text, and guidance.
        seed: of the noise.
        callback: after every step.
        first_step: where to begin.
    """
    import torch

    steps = request.preset.sampling.steps
    return pipe(
        **arguments,
        sigmas=np.linspace(1.0, 0.0, steps + 1)[first_step:-1],  # the pipeline's own, from here on
        # Noise is drawn on the CPU, so that a seed gives the same one on every device.
        generator=torch.Generator("cpu").manual_seed(seed),
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        output_type="latent",
        callback_on_step_end=callback,
    ).frames


class StepKeeper:
    """The pipeline's callback after every step: keeps what is done now and then, and has it watched.

    Attributes:
        done: steps of the whole run that are done.
    """

    def __init__(
        self, watch: StepWatch, first_step: int, every: int, keep: Callable[[int, torch.Tensor], None]
    ) -> None:
        """Counts from a step on.

        Args:
            watch: called first.
            first_step: where this process begins.
            every: steps between two checkpoints, 0 for none.
            keep: writes one, of steps done and latents.
        """
        self._watch, self._first_step, self._every, self._keep = watch, first_step, every, keep
        self._latents: torch.Tensor | None = None
        self.done = first_step

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        self.done, self._latents = self._first_step + step + 1, tensors["latents"]
        self._watch(pipe, step, timestep, tensors)
        # After the last step the latents are kept as such.
        if self._every and self.done % self._every == 0 and step + 1 < pipe.num_timesteps:
            self._keep(self.done, self._latents)
            self._latents = None
        return {}

    def keep_last(self) -> None:
        """Keeps the latest step that was finished, unless it has been kept."""
        if self._latents is not None:
            self._keep(self.done, self._latents)


def take_threads(run: VideoRun, device: torch.device, progress: Progress) -> None:
    """Computes on as many CPU threads as a run was begun with: on others sums are rounded in another order."""
    import torch

    threads, here = run.report.get("device", {}).get("threads"), cpu_threads(device)
    if threads and here and threads != here:
        progress.note(f"the run was begun on {threads} CPU threads, and goes on with as many, not {here}")
        torch.set_num_threads(threads)


@contextmanager
def taken_up(pipe: Any, run: VideoRun, device: torch.device) -> Iterator[None]:
    """While inside, the pipeline begins with the latents of a run that has begun.

    Given as an argument it would turn them, and the first timestep with them, to fp32; after the first step of a run
    both are in the transformer's dtype.
    """
    if run.latents is None:
        yield
        return
    latents = run.latents.to(device, pipe.transformer.dtype)
    pipe.prepare_latents = lambda *arguments, **options: latents
    try:
        yield
    finally:
        del pipe.prepare_latents


def random_state(device: torch.device) -> torch.Tensor:
    """The state of a device's generator."""
    import torch

    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def restore_random_state(state: torch.Tensor | None, device: torch.device) -> None:
    """Sets a device's generator to a state of `random_state`, if there is one."""
    import torch

    if state is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif state is not None:
        torch.set_rng_state(state)


def keep_latents(run: VideoRun, request: VideoRequest, output: Path, progress: Progress) -> Path | None:
    """Writes the latents of a run beside its output, in place of the checkpoint.

    Where there is no room, they go to a folder of temporary files, and that is said.

    Returns:
        The file to go on from: the latents, the checkpoint where there is room for them nowhere, or None.
    """
    try:
        return write_run(run, request, output)
    except CannotWrite as error:
        reason = str(error)
    folder = Path(tempfile.mkdtemp(prefix="grat-"))
    try:
        kept = write_run(run, request, folder / output.name)
    except CannotWrite:
        folder.rmdir()
        progress.note(f"{reason}: its latents are not kept until the video is written")
        checkpoint = checkpoint_path(output)
        return checkpoint if checkpoint.is_file() else None
    progress.note(f"{reason}: until the video is written, its latents are in {kept}")
    return kept


def tidy_up(run: VideoRun, request: VideoRequest, output: Path, kept: Path | None) -> None:
    """Removes what was kept until the video was written, but latents that are asked for."""
    discard_run(output, latents=not request.save_latents)
    if request.save_latents and not latents_path(output).is_file():  # there may be room now
        write_run(run, request, output)
    if kept is not None and kept.parent != output.parent:
        shutil.rmtree(kept.parent, ignore_errors=True)
