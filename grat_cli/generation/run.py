"""A request becomes outputs: the main path is `generate`; its numbered steps are those of `Generator`."""

from __future__ import annotations

import contextlib
import gc
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, CannotWrite, GratError, Interrupted, OutOfMemory
from grat_cli.estimates.stages import Stage
from grat_cli.families.base import Call
from grat_cli.families.guidance import Guidance, choose_guidance
from grat_cli.files import formats, outputs, whole
from grat_cli.files.pictures import read_picture
from grat_cli.generation import report
from grat_cli.generation.checkpoint import LATENTS_ENDING, Run, discard_run, files_of, write_run
from grat_cli.generation.frames import FrameCheck, checked_frames
from grat_cli.generation.preview import Preview, PreviewedSteps
from grat_cli.generation.request import Progress, Request, WritingProgress, check, note_expectations
from grat_cli.generation.stage import Installed, StepWatch, installed, stages_for, upscaled
from grat_cli.generation.timing import Phases, StepRecorder, phase_of
from grat_cli.models.devices import (
    choose_device,
    choose_dtype,
    cpu_threads,
    device_name,
    forget_peak_memory,
    is_out_of_memory,
    peak_memory,
    wait_for,
)
from grat_cli.models.loading import LoadedModel, load_autoencoder, load_model
from grat_cli.models.resolution import Resolution
from grat_cli.models.video_size import VideoSize

if TYPE_CHECKING:
    import torch
    from PIL import Image

BETWEEN_CHECKPOINTS_S = 120.0
SMALLEST_TILE = 64  # side in pixels


@dataclass(frozen=True)
class Made:
    """An output that was written, and the report that lies beside it."""

    path: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class Text:
    """Encoded prompts, in main memory.

    Attributes:
        tensors: embeddings and masks as the pipeline takes them.
        guidances: of each stage.
        lengths: text tokens of the joint sequence in each call of a step, that of the prompt first.
        phases: what encoding took, until an output is made for which it counts.
    """

    tensors: Mapping[str, torch.Tensor]
    guidances: tuple[Guidance, ...]
    lengths: tuple[int, ...]
    phases: Phases


def generate(request: Request, progress: WritingProgress, begun: Run | None = None) -> Iterator[Made]:
    """Makes one output per seed and writes it with its report; the model is loaded once.

    Args:
        request: what to make.
        progress: told how it goes on.
        begun: a run that is taken up; the seeds before its own are left out.

    Raises:
        BadInput: if the request cannot be done, with what to change.
        CannotWrite: if an output cannot be written.
        ModelUnavailable: if the model is missing, gated or damaged.
        OutOfMemory: if the device has too little memory.
        NumericalFailure: if latents turn NaN or infinite, or an output is of one flat colour.
        Interrupted: by Ctrl-C, where something was kept to go on with.
    """
    # 1. Refuse what can be refused before anything is loaded, and finish what is only to be decoded.
    check(request)
    note_expectations(request, progress)
    jobs = list(zip(request.seeds, request.outputs, strict=True))
    if begun is not None:
        take_up(begun, choose_device(request.device), progress)
        jobs = jobs[request.seeds.index(begun.seed) :]
        if begun.finished:
            _, output = jobs.pop(0)
            yield decode_run(begun, request, output, progress)
            tidy_up(begun, request, output, None)
    if not jobs:
        return

    # 2. Load.
    generator = Generator(request, progress, begun)

    # 3. Encode the prompts, once for all seeds.
    text = generator.encode(request)
    generator.release_text_encoders()

    # 4. to 8. Denoise in stages, keep, decode, write, report.
    for number, (seed, output) in enumerate(jobs):
        run = begun if begun is not None and begun.seed == seed else generator.new_run(seed)
        yield generator.make(request, run, output, text, is_last=number == len(jobs) - 1)


class Generator:
    """A loaded model that makes one output after another. Steps and failures are those of `generate`.

    Attributes:
        stages: of every output.
    """

    def __init__(self, request: Request, progress: WritingProgress, begun: Run | None = None) -> None:
        """Loads the model.

        Args:
            request: what is made first; later ones may differ in prompt, negative prompt, seeds and outputs alone.
            progress: told how it goes on.
            begun: the run that is taken up.
        """
        self._device, self._progress, self._family = choose_device(request.device), progress, request.family
        start = None if begun is not None else read_start(request, progress)
        self._start_size = begun.start_size if begun is not None else start and start.size
        self._picture: Image.Image | torch.Tensor | None = begun.picture if begun is not None else start
        self.stages = stages_for(request, None if self._start_size is None else Resolution(*self._start_size))
        self._common = phases_of(self._device)

        # 2. Load.
        with memory_advice(request, self._device, self.stages[0]):
            progress.phase("load")
            with self._common("load"):
                self._model = load_model(
                    request.model,
                    device=self._device,
                    dtype=choose_dtype(request.dtype, self._device),
                    offload=request.offload,
                    quantize=request.quantize,
                    choose_offload=offload_chooser(request, self._device),
                    image_to_image=self._picture is not None,
                    base=request.base,
                )
            if request.offload == "auto":
                progress.note(f"--offload auto is {self._model.offload}: {self._model.offload_reason}")
        self._pipe = self._model.pipe
        self._family.prepare(self._pipe)
        self._surroundings = surroundings(self._model, self._device)
        if begun is not None:
            begun.refuse_other_weights(self._model.revision)

    @property
    def _lets_go(self) -> bool:
        return self._family.lets_go and self._model.offload == "none"

    @property
    def revision(self) -> str | None:
        """Of the weights; None where they have none."""
        return self._model.revision

    def new_run(self, seed: int) -> Run:
        """A run of which nothing is done."""
        return Run(seed=seed, total=sum(stage.steps for stage in self.stages), start_size=self._start_size)

    def picture(self, request: Request) -> torch.Tensor:
        """Latents `[1, C, h, w]` of the picture that every output starts from, of the size of the first stage."""
        from PIL import Image

        assert self._picture is not None, "a first stage that is no sampling from noise has a picture"
        if isinstance(self._picture, Image.Image):
            self._picture = upscaled(self._pipe, request, self._picture, self.stages[0])
        return self._picture

    def encode(self, request: Request) -> Text:
        """Prompt and negative prompt as the pipeline takes them, for all seeds and stages."""
        # 3. Encode the prompts.
        with memory_advice(request, self._device, self.stages[0]):
            guidances = tuple(
                choose_guidance(self._pipe, request.model, stage.preset, request.negative_prompt)
                for stage in self.stages
            )
            for note in dict.fromkeys(note for guidance in guidances for note in guidance.notes):
                self._progress.note(note)
            self._progress.phase("text")
            phases = phases_of(self._device)
            with phases("text"):
                negative = next((one.negative_prompt for one in guidances if one.negative_prompt is not None), None)
                tensors = self._family.encode_text(self._pipe, request.model, request.prompt, negative)
                lengths = self._family.text_lens(tensors)
                return Text({name: tensor.cpu() for name, tensor in tensors.items()}, guidances, lengths, phases)

    def release_text_encoders(self) -> None:
        """Lets go of what no prompt needs any more, unless it waits in main memory anyway."""
        if self._lets_go:
            release(self._pipe, "text_encoder", "text_encoder_2")

    def make(self, request: Request, run: Run, output: Path, text: Text, *, is_last: bool) -> Made:
        """One output, written with its report.

        Args:
            request: of the prompt.
            run: as far as it has got.
            output: where it goes.
            text: the prompt, encoded.
            is_last: whether the transformer is not needed afterwards.
        """
        # What was loaded and encoded is counted with the first output that follows.
        phases = phases_of(self._device, run)
        phases.take(self._common)
        phases.take(text.phases)
        making = _Making(self, request, run, output, text, phases)
        if not run.done:
            # Of an earlier run, which would be taken for this one's.
            discard_run(output, overwrite=request.overwrite)

        # 4. Denoise in stages, with GRAT attention installed; a checkpoint now and then.
        run = making.denoised()
        if self._lets_go and is_last:
            release(self._pipe, "transformer")

        # 5. Keep the latents until the output is written: decoding is where memory runs out.
        kept = keep_latents(run, request, output, self._progress)

        # 6. to 8. Decode, write, report.
        with kept_latents(kept, request, output, self._progress):
            made = finish(self._pipe, self._device, run, request, output, phases, self._progress)
        self._pipe.maybe_free_model_hooks()
        making.remove_preview()
        tidy_up(run, request, output, kept)
        return made


class _Making:
    """The denoising of one output."""

    def __init__(
        self, generator: Generator, request: Request, run: Run, output: Path, text: Text, phases: Phases
    ) -> None:
        self._generator, self._request, self._output, self._text = generator, request, output, text
        self._phases, self._run = phases, run
        self._device, self._progress = generator._device, generator._progress
        self._pipe, self._family, self._stages = generator._pipe, generator._family, generator.stages
        import torch

        self._noise = torch.Generator("cpu").manual_seed(run.seed)
        if run.noise_state is not None:
            try:
                self._noise.set_state(run.noise_state)
            except (RuntimeError, TypeError) as error:
                raise BadInput("the random state of the run is damaged: start the run anew") from error
        restore_random_state(run.random_state, self._device)
        self._preview = None
        if request.preview_every:
            path = outputs.preview_path(output)
            native = request.model.native_side
            self._preview = Preview(path, request.preview_every, native, self._family, request.overwrite)

    def denoised(self) -> Run:
        """The run with all of its steps done; checkpoints are written beside the output.

        Raises:
            NumericalFailure: if latents turn NaN or infinite, with the first such step.
            Interrupted: by Ctrl-C, where there is a checkpoint to go on from.
        """
        try:
            while True:
                stage = self._stages[self._run.stage]
                with memory_advice(self._request, self._device, stage):
                    if self._run.done_in_stage < stage.steps:
                        self._run_stage(stage)
                    if stage is self._stages[-1]:
                        return self._run
                    self._go_on_to(self._stages[self._run.stage + 1], stage)
        except KeyboardInterrupt:
            if self._run.done:
                self._keep(self._run)
            if kept := self._kept():
                raise Interrupted(
                    f"interrupted after step {self._run.done} of {self._run.total}; "
                    f"go on with {command_for('resume', kept)}"
                ) from None
            raise
        except Exception as error:
            of_this_machine = isinstance(error, OutOfMemory) or not isinstance(error, GratError)
            if of_this_machine and (kept := self._kept()):
                self._progress.note(f"the last checkpoint is kept: {command_for('resume', kept)} goes on")
            raise

    def remove_preview(self) -> None:
        """The output itself is there."""
        if self._preview is not None:
            self._preview.remove()

    def _run_stage(self, stage: Stage) -> None:
        """Runs what is left of a stage's steps."""
        run = self._run
        if run.picture is None and self._stages[0].strength is not None:
            with self._phases(phase_of("encode", 0)):
                run = replace(run, picture=self._generator.picture(self._request))
        first_step = run.done_in_stage
        guidance = self._text.guidances[run.stage]
        recorder, watch = StepRecorder(self._device), StepWatch(self._progress, first_step)
        start = run.picture if run.stage == 0 else run.start
        start = None if start is None else start.to(self._device)
        self._progress.phase("denoise" if stage.number == 0 else f"denoising {stage.size}")
        with installed(
            self._pipe, self._request, stage, start=start, first_step=first_step, observer=recorder
        ) as inside:
            if inside.installation.guard and first_step:
                inside.installation.guard.restore(run.guard or {}, first_step)

            def run_after(done: int, latents: torch.Tensor) -> Run:
                return self._after(run, stage, inside, guidance, watch, recorder, done, latents)

            callback = StepKeeper(
                watch if self._preview is None else PreviewedSteps(self._preview, watch, stage.height, stage.width),
                first_step,
                self._request.checkpoint_every,
                lambda done, latents: self._keep(run_after(done, latents)),
            )
            with self._phases(phase_of("denoise", run.stage)):
                try:
                    latents = self._family.denoise(
                        inside.pipe,
                        Call(
                            width=stage.width,
                            height=stage.height,
                            frames=self._request.frames,
                            steps=stage.preset.sampling.steps,
                            arguments={name: tensor.to(self._device) for name, tensor in self._text.tensors.items()}
                            | guidance.arguments,
                            generator=self._noise,
                            callback=callback,
                            start=start,
                            strength=stage.strength,
                            begun=run.latents if first_step else None,
                            first_step=first_step,
                        ),
                    )
                except KeyboardInterrupt:
                    if (latents := callback.latents) is not None:
                        if callback.done == stage.steps:
                            latents = self._family.spatial(inside.pipe, latents, stage.width, stage.height)
                        self._run = run_after(callback.done, latents)
                    raise
            self._run = run_after(stage.steps, latents)

    def _after(
        self,
        run: Run,
        stage: Stage,
        inside: Installed,
        guidance: Guidance,
        watch: StepWatch,
        recorder: StepRecorder,
        done: int,
        latents: torch.Tensor,
    ) -> Run:
        """The run as it is after so many steps of a stage; waits for the device."""
        watch.raise_if_not_finite()
        before = [step for step in run.steps if step.stage < run.stage]
        own = [step for step in run.steps if step.stage == run.stage]
        scheduler = inside.pipe.scheduler
        timesteps = [step.timestep for step in own] + scheduler.timesteps[scheduler.begin_index or 0 :].tolist()
        # Where a step was broken off, one of its two transformer calls may have been timed.
        timed = recorder.steps(timesteps)[: done - len(own)]
        own += [replace(step, index=len(before) + step.index, stage=run.stage) for step in timed]
        phases_ms, memory_bytes = self._phases.so_far()
        installation, text_tokens = inside.installation, self._text.lengths[0]
        record = report.StageRecord(
            stage=stage,
            schedule=installation.schedule(text_tokens),
            text_tokens=text_tokens,
            backend=installation.backend.value,
            backend_reason=installation.backend_reason,
            preparation=installation.preparation,
            guidance=guidance.scale,
            shift=inside.shift,
            guard=installation.guard and installation.guard.report(),
        )
        steps, stages = (*before, *own), (*run.stages[: run.stage], record.as_dict())
        told = report.build_report(
            self._request,
            run.seed,
            self._generator._surroundings,
            record,
            datetime.now().astimezone(),
            self._stages[0].strength,
        )
        return replace(
            run,
            latents=latents,
            noise_state=self._noise.get_state(),
            random_state=random_state(self._device),
            steps=steps,
            phases_ms=phases_ms,
            memory_bytes=memory_bytes,
            report=report.measured(told, steps, stages, phases_ms, memory_bytes),
            stages=stages,
            guard=installation.guard and installation.guard.state(done),
        )

    def _go_on_to(self, stage: Stage, before: Stage) -> None:
        """From a stage that is done to the start of the next; what there is to go on from is kept first."""
        run = self._run
        assert run.latents is not None, "a stage that is done has latents"
        if self._request.checkpoint_every != 0:
            self._keep(run)
        upscale: Image.Image | torch.Tensor = run.latents
        if before.decoded:
            from PIL import Image

            self._progress.phase("decode")
            with self._phases(phase_of("decode", run.stage)):
                (frame,) = checked_frames([self._family.decode(self._pipe, run.latents)], FrameCheck())
                upscale = Image.fromarray(frame)
        with self._phases(phase_of("encode", run.stage + 1)):
            start = upscaled(self._pipe, self._request, upscale, stage)
        phases_ms, memory_bytes = self._phases.so_far()
        self._run = replace(
            run,
            stage=run.stage + 1,
            latents=None,
            start=start,
            guard=None,
            phases_ms=phases_ms,
            memory_bytes=memory_bytes,
        )

    def _keep(self, run: Run) -> None:
        """Writes a checkpoint. A run does not end because there is no room for one."""
        try:
            write_run(run, self._request, self._output)
        except CannotWrite as error:
            self._progress.note(f"{error}: step {run.done} is not kept")

    def _kept(self) -> Path | None:
        places = (outputs.latents_path(self._output), outputs.checkpoint_path(self._output), self._run.kept)
        return next((path for path in places if path is not None and path.is_file()), None)


class StepKeeper:
    """The pipeline's callback after every step: keeps what is done now and then, and has it watched.

    Attributes:
        done: steps of the stage that are done.
        latents: after them; None before the first that this process has done.
    """

    def __init__(
        self, watch: Callable[..., Any], first_step: int, every: int | None, keep: Callable[[int, torch.Tensor], None]
    ) -> None:
        """Counts from a step on.

        Args:
            watch: called first.
            first_step: where this process begins.
            every: steps between two checkpoints, 0 for none; None for one about every two minutes.
            keep: writes one, of steps done and latents.
        """
        self._watch, self._first_step, self._every, self._keep = watch, first_step, every, keep
        self.latents: torch.Tensor | None = None
        self.done, self._kept_at = first_step, monotonic()

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        self.done, self.latents = self._first_step + step + 1, tensors["latents"]
        self._watch(pipe, step, timestep, tensors)
        # After the last step the latents are kept as such.
        if self._is_due() and step + 1 < pipe.num_timesteps:
            self._keep(self.done, self.latents)
            self._kept_at = monotonic()
        return {}

    def _is_due(self) -> bool:
        if self._every is None:
            return monotonic() - self._kept_at >= BETWEEN_CHECKPOINTS_S
        return self._every > 0 and self.done % self._every == 0


# ---- The end of the path


def decode_run(
    run: Run, request: Request, output: Path, progress: WritingProgress, tile: int | None = None, command: str = ""
) -> Made:
    """Makes the output of latents; of the model only the autoencoder is loaded.

    Args:
        run: with all of its steps done, taken up from a file.
        request: model, device, and how to write the output.
        output: where.
        progress: told how it goes on.
        tile: side in pixels of the tiles that are decoded one by one, None for the autoencoder's own.
        command: the command line that asks for it, where it is not that of the run; for the report.

    Raises:
        BadInput, ModelUnavailable, OutOfMemory, NumericalFailure, Interrupted: as for `generate`.
    """
    device = choose_device(request.device)
    phases = phases_of(device, run)
    with kept_latents(run.kept or outputs.latents_path(output), request, output, progress, tile):
        progress.phase("load")
        with phases("load"):
            pipe = load_autoencoder(
                request.model, device=device, dtype=choose_dtype(request.dtype, device), base=request.base
            )
        request.family.prepare(pipe, tile)
        if command:
            run = replace(run, report={**run.report, **_decoded(request, tile, command)})
        return finish(pipe, device, run, request, output, phases, progress, tile)


def _decoded(request: Request, tile: int | None, command: str) -> dict[str, Any]:
    """What a report says of an output that was not decoded by the run itself."""
    of_video = {}
    if request.frames and request.fps:
        seconds = round(request.frames / request.fps, 3)
        of_video = {"fps": request.fps, "seconds": seconds, "format": request.format, "crf": request.quality}
    return {
        **of_video,
        "decoded": {
            "command": command,
            "model": request.model.source,
            "device": request.device,
            "dtype": request.dtype,
            "tile": tile,
        },
    }


def finish(
    pipe: Any,
    device: torch.device,
    run: Run,
    request: Request,
    output: Path,
    phases: Phases,
    progress: WritingProgress,
    tile: int | None = None,
) -> Made:
    """Decodes latents, writes the output and its report.

    Args:
        pipe: with an autoencoder.
        device: where it runs.
        run: with all of its steps done.
        request: how to write the output.
        output: where.
        phases: of the run so far.
        progress: told how it goes on.
        tile: side in pixels of the tiles that are decoded one by one, None for the family's own.

    Raises:
        NumericalFailure: if there are NaN, or all is of one colour.
        CannotWrite: if the output cannot be written.
    """
    # 6. Decode.
    progress.phase("decode")
    with phases(phase_of("decode", run.stage)):
        assert run.latents is not None, "a run whose steps are done has latents"
        pixels = request.family.decode(pipe, run.latents.to(device), tile)

    # 7. Write.
    progress.phase("save")
    check = FrameCheck()
    with phases("save"):
        inside = report.provenance(run.report) if request.metadata else None
        whole = formats.write_output(
            checked_frames([pixels], check),
            output,
            request.format,
            fps=request.fps,
            quality=request.quality,
            provenance=inside,
            overwrite=request.overwrite,
            written=progress.written,
        )
    if inside and not whole:
        progress.note(f"{output} has no room for how it was made: that is in {outputs.report_path(output).name}")
    for note in check.finish():
        progress.note(note)

    # 8. Report.
    made = report.measured(run.report, run.steps, run.stages, phases.phases_ms, phases.memory_bytes)
    outputs.write_json(made, outputs.report_path(output), overwrite=request.overwrite)
    return Made(output, made)


def keep_latents(run: Run, request: Request, output: Path, progress: WritingProgress) -> Path | None:
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
        progress.note(f"{reason}: its latents are not kept until the output is written")
        checkpoint = outputs.checkpoint_path(output)
        return checkpoint if checkpoint.is_file() else None
    progress.note(f"{reason}: until the output is written, its latents are in {kept}")
    return kept


@contextmanager
def kept_latents(
    kept: Path | None, request: Request, output: Path, progress: WritingProgress, tile: int | None = None
) -> Iterator[None]:
    """Makes whatever goes wrong between denoising and the end say how to go on from what is kept.

    Args:
        kept: latents, or a checkpoint where they could not be written, or None where nothing could.
        request: what is made.
        output: where.
        progress: told where an unforeseen error passes.
        tile: side in pixels of the tiles in use, None for the autoencoder's own.
    """
    try:
        yield
    except KeyboardInterrupt:
        if kept is None:
            raise
        raise Interrupted(f"interrupted; go on with {command_for('resume', kept)}") from None
    except Exception as error:
        if kept is None:
            advice = ""
        elif kept.name.endswith(LATENTS_ENDING):
            advice = f"its latents are kept: go on with {command_for('decode', kept)}"
            if kept.parent != output.parent:
                advice += f" --out {shlex.quote(str(output))}"
        else:
            advice = f"its last checkpoint is kept: go on with {command_for('resume', kept)}"
        if is_out_of_memory(error):
            if advice:
                advice = f"\n{advice} --tile {max(SMALLEST_TILE, (tile or request.family.tile) // 2)}"
            raise OutOfMemory(
                f"too little memory to decode {request.size} with {request.model.name}{advice}"
            ) from error
        if not advice:
            raise
        if isinstance(error, GratError):
            raise type(error)(f"{'; '.join(str(error).splitlines())}\n{advice}") from error
        progress.note(advice)
        raise


def tidy_up(run: Run, request: Request, output: Path, kept: Path | None) -> None:
    """Removes what was kept until the output was written, but latents that are asked for."""
    discard_run(output, latents=not request.save_latents)
    if request.save_latents and not outputs.latents_path(output).is_file():  # there may be room now
        write_run(run, request, output)
    if kept is not None and kept.parent != output.parent:  # in a folder of temporary files
        whole.remove(kept)
        with contextlib.suppress(OSError):
            kept.parent.rmdir()


def command_for(name: str, path: Path) -> str:
    """A command line that goes on from a file."""
    return f"grat {name} {shlex.quote(str(path))}"


# ---- What the steps need


def read_start(request: Request, progress: Progress) -> Image.Image | None:
    """The picture to start from, cut to the request's shape but of its own size; None for noise.

    Raises:
        BadInput: if it cannot be read.
    """
    if request.init_image is None:
        return None
    from PIL import Image, ImageOps

    picture = read_picture(request.init_image)
    if picture.width * request.height != picture.height * request.width:
        progress.note(
            f"{request.init_image.name} is {picture.width}x{picture.height}: "
            f"its middle is cut out in the shape of {request.width}x{request.height}"
        )
    # The largest size in that shape that the picture holds, and no larger than what is asked for.
    scale = min(picture.width / request.width, picture.height / request.height, 1.0)
    size = max(1, round(request.width * scale)), max(1, round(request.height * scale))
    return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)


def take_up(run: Run, device: torch.device, progress: Progress) -> None:
    """Makes a run's files this process's own, and computes on as many CPU threads as it was begun with: on others sums
    are rounded in another order."""
    import torch

    for kept in files_of(run):
        whole.adopt(kept)
    threads, here = run.report.get("device", {}).get("threads"), cpu_threads(device)
    if threads and here and threads != here:
        progress.note(f"the run was begun on {threads} CPU threads, and goes on with as many, not {here}")
        torch.set_num_threads(threads)


def phases_of(device: torch.device, run: Run | None = None) -> Phases:
    """Phases that add to those of a run that is taken up."""
    phases = Phases(lambda: wait_for(device), lambda: forget_peak_memory(device), lambda: peak_memory(device)[0])
    if run is not None:
        phases.phases_ms, phases.memory_bytes = dict(run.phases_ms), dict(run.memory_bytes)
    return phases


def surroundings(model: LoadedModel, device: torch.device) -> report.Surroundings:
    """Where a model runs, and in which form."""
    return report.Surroundings(
        device=str(device),
        device_name=device_name(device),
        dtype=str(model.pipe.transformer.dtype).removeprefix("torch."),
        autoencoder_dtype=str(model.pipe.vae.dtype).removeprefix("torch."),
        threads=cpu_threads(device),
        offload=model.offload,
        offload_reason=model.offload_reason,
        revision=model.revision,
        memory_kind=peak_memory(device)[1],
    )


def offload_chooser(request: Request, device: torch.device) -> Callable[[Any], tuple[str, str]]:
    """What `--offload auto` stands for with a loaded pipeline: by the memory that the run is foretold to need."""

    def choose(pipe: Any) -> tuple[str, str]:
        from grat_cli.estimates.fitting import offload_for
        from grat_cli.estimates.planning import run_forecasts

        size: Resolution | VideoSize = Resolution(request.width, request.height)
        if request.frames and request.fps:
            size = VideoSize(request.width, request.height, request.frames, request.fps)
        dtype = str(choose_dtype(request.dtype, device)).removeprefix("torch.")
        runs = run_forecasts(request.preset, request.model, size, dtype)
        return offload_for(pipe, request.model, runs, device, quantize=request.quantize)

    return choose


def release(pipe: Any, *parts: str) -> None:
    """Lets go of parts of a pipeline that are not needed any more, so that the device has their memory."""
    import torch

    for part in parts:
        setattr(pipe, part, None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random_state(device: torch.device) -> torch.Tensor:
    """The state of a device's generator."""
    import torch

    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def restore_random_state(state: torch.Tensor | None, device: torch.device) -> None:
    """Sets a device's generator to a state of `random_state`, if there is one; BadInput if it is none."""
    import torch

    if state is None:
        return
    try:
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
    except (RuntimeError, TypeError) as error:
        raise BadInput("the random state of the run is damaged: start the run anew") from error


@contextmanager
def memory_advice(request: Request, device: torch.device, stage: Stage | None = None) -> Iterator[None]:
    """Turns running out of memory into OutOfMemory with what would help.

    Args:
        request: what is made.
        device: where.
        stage: that is under way; None for the whole output.
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
        size = request.size if stage is None or request.frames else stage.size
        raise OutOfMemory(
            f"{device_name(device)} has too little memory for {size} with {request.model.name}: "
            f"try {' or '.join(advice)}"
        ) from error
