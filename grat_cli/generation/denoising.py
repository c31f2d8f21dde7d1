"""The denoising of one output, stage by stage; what is done is kept now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import TYPE_CHECKING, Any

from grat_cli.console.run_tables import step_text
from grat_cli.errors import BadInput, CannotWrite, GratError, Interrupted, OutOfMemory, RankLost
from grat_cli.estimates.memory import DTYPE_BYTES
from grat_cli.estimates.over_steps import kept_bytes, over_steps_data
from grat_cli.estimates.stages import Stage
from grat_cli.families.base import Call
from grat_cli.families.guidance import Guidance
from grat_cli.families.resumption import remembered
from grat_cli.files import outputs
from grat_cli.generation import inputs, report
from grat_cli.generation.checkpoint import Run, write_run
from grat_cli.generation.frames import FrameCheck, checked_frames
from grat_cli.generation.preview import Preview, PreviewedSteps
from grat_cli.generation.request import Request, WritingProgress
from grat_cli.generation.stage import Installed, StepWatch, installed, upscaled
from grat_cli.generation.timing import Phases, StepRecorder, StepTiming, phase_of, while_compiling, with_work
from grat_cli.generation.world import World, end_undisturbed
from grat_cli.models import compiling
from grat_cli.models.devices import is_out_of_memory, wait_for
from grat_cli.presets.caches import Mag

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from grat_cli.attention.cache_states import Snapshot

from grat_cli.generation.finishing import command_for
from grat_cli.generation.machine import memory_advice

BETWEEN_CHECKPOINTS_S = 120.0


@dataclass(frozen=True)
class Text:
    """Encoded prompts, in main memory.

    Attributes:
        tensors: embeddings and masks as the pipeline takes them.
        guidances: of each stage.
        lengths: text tokens of the joint sequence in each call of a step, that of the prompt first.
        phases: what encoding took, until an output is made for which it counts.
        known: whether they have been encoded before, and are from the cache of texts.
    """

    tensors: Mapping[str, torch.Tensor]
    guidances: tuple[Guidance, ...]
    lengths: tuple[int, ...]
    phases: Phases
    known: bool = False


@dataclass(frozen=True)
class Studio:
    """A loaded model, and what all of its outputs have in common.

    Attributes:
        pipe: the pipeline.
        device: where it runs.
        progress: told how it goes on.
        stages: of every output.
        surroundings: for reports.
        picture: latents `[1, C, h, w]` of the picture that every output of a request starts from, where the first stage
            is no sampling from noise.
        known: what the files of its pictures are known by.
        world: the ranks that make each output together; None for one process alone.
    """

    pipe: Any
    device: torch.device
    progress: WritingProgress
    stages: tuple[Stage, ...]
    surroundings: report.Surroundings
    picture: Callable[[Request], torch.Tensor]
    known: inputs.Known
    world: World | None = None


class Denoising:
    """The denoising of one output."""

    def __init__(self, studio: Studio, request: Request, run: Run, output: Path, text: Text, phases: Phases) -> None:
        import torch

        self._studio, self._request, self._output, self._text = studio, request, output, text
        self._phases, self._run = phases, run
        self._device, self._progress = studio.device, studio.progress
        self._pipe, self._family, self._stages = studio.pipe, request.family, studio.stages

        self._noise = torch.Generator("cpu").manual_seed(run.seed)
        if run.noise_state is not None:
            try:
                self._noise.set_state(run.noise_state)
            except (RuntimeError, TypeError) as error:
                raise BadInput("the random state of the run is damaged: start the run anew") from error
        if request.handed:  # which are encoded once more, with the same noise
            self._noise.manual_seed(run.seed)
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
                raise Interrupted(f"interrupted {self._stands}; go on with {command_for('resume', kept)}") from None
            raise
        except RankLost:
            end_undisturbed()
            if self._run.done:
                self._keep(self._run)
            if kept := self._kept():
                raise RankLost(
                    f"another rank has ended, {self._stands}; go on with {command_for('resume', kept)}"
                ) from None
            raise
        except Exception as error:
            of_this_machine = isinstance(error, OutOfMemory) or not isinstance(error, GratError)
            if of_this_machine and (kept := self._kept()):
                self._progress.note(f"the last checkpoint is kept: {command_for('resume', kept)} goes on")
            raise

    @property
    def _stands(self) -> str:
        return f"after step {self._run.done} of {self._run.total}"

    def remove_preview(self) -> None:
        """The output itself is there, or is made another time."""
        if self._preview is not None:
            self._preview.remove()

    def _run_stage(self, stage: Stage) -> None:
        """Runs what is left of a stage's steps."""
        run = self._run
        if run.picture is None and self._stages[0].strength is not None and not self._request.handed:
            with self._phases(phase_of("encode", 0)):
                run = replace(run, picture=self._studio.picture(self._request))
        first_step = run.done_in_stage
        guidance = self._text.guidances[run.stage]
        recorder = StepRecorder(self._device)
        start = run.picture if run.stage == 0 else run.start
        start = None if start is None else start.to(self._device)
        self._progress.phase("denoise" if stage.number == 0 else f"denoising {stage.size}")
        with installed(
            self._pipe,
            self._request,
            stage,
            start=start,
            first_step=first_step,
            observer=recorder,
            parallel=self._studio.world and self._studio.world.mesh,
        ) as inside:
            if inside.installation.guard and first_step:
                inside.installation.guard.restore(run.guard or {}, first_step)
            caches = inside.installation.caches if stage.preset.cache else None
            if caches and first_step and not self._begins_empty(run):
                caches.restore(*(run.cache or ((), {})))
            watch = StepWatch(self._progress, first_step, partial(self._tell_work, stage, inside))

            def run_after(
                done: int, latents: torch.Tensor, history: Mapping[str, torch.Tensor], kept: Snapshot | None
            ) -> Run:
                after = self._after(run, stage, inside, guidance, watch, recorder, done, latents)
                if done == stage.steps:
                    return after
                # What a rank's cache keeps is of its tokens alone: another number of ranks begins with an empty one.
                is_keepable = caches is None or kept is not None or self._studio.world is not None
                return replace(after, history=history, cache=kept and kept.data(), is_keepable=is_keepable)

            callback = StepKeeper(
                watch if self._preview is None else PreviewedSteps(self._preview, watch, stage.height, stage.width),
                first_step,
                self._request.checkpoint_every,
                lambda *kept: self._keep(run_after(*kept)),
                caches.snapshot if caches else lambda: None,
            )
            with self._phases(phase_of("denoise", run.stage)), self._compiling(recorder):
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
                            pictures=run.pictures,
                            begun=run.latents if first_step else None,
                            first_step=first_step,
                            history=run.history,
                        ),
                    )
                except (KeyboardInterrupt, RankLost) as error:
                    if isinstance(error, RankLost):
                        end_undisturbed()
                    if (latents := callback.latents) is not None:
                        if callback.done == stage.steps:
                            latents = self._family.spatial(inside.pipe, latents, stage.width, stage.height)
                        self._run = run_after(callback.done, latents, callback.history, callback.cache)
                    raise
                except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
                    from grat_kernels import BackendUnavailable, KernelFailure

                    of_kernels = isinstance(error, BackendUnavailable | KernelFailure)
                    if caches and caches.is_restored and not (of_kernels or is_out_of_memory(error)):
                        raise BadInput("what the cache had kept does not fit the run: start it anew") from error
                    raise
            self._run = run_after(stage.steps, latents, {}, None)

    def _begins_empty(self, run: Run) -> bool:
        """Whether a cache that goes on with a run keeps nothing yet, because ranks have a part of the tokens each."""
        return self._studio.world is not None or (run.cache is None and "ranks" in run.report)

    @contextmanager
    def _compiling(self, recorder: StepRecorder) -> Iterator[None]:
        """While inside, what compiling takes is a phase of its own, and no part of the steps that wait for it."""
        if not self._request.compile:
            yield
            return

        def compiled(milliseconds: float) -> None:
            self._phases.set_apart(phase_of("compile", self._run.stage), milliseconds)
            recorder.leave_out(milliseconds)

        with compiling.explained_failures(), while_compiling(lambda: wait_for(self._device), compiled):
            yield

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
        installation = inside.installation
        timed = with_work(recorder.steps(timesteps)[: done - len(own)], installation.work, installation.carrying)
        own += [replace(step, index=len(before) + step.index, stage=run.stage) for step in timed]
        phases_ms, memory_bytes = self._phases.so_far()
        text_tokens = self._text.lengths[0]
        schedule = installation.schedule(text_tokens, installation.references)
        cache, caches = stage.preset.cache, installation.caches
        record = report.StageRecord(
            stage=stage,
            schedule=schedule,
            text_tokens=text_tokens,
            reference_tokens=installation.references,
            backend=installation.backend.value,
            backend_reason=installation.backend_reason,
            preparation=installation.preparation,
            guidance=guidance.scale,
            shift=inside.shift,
            guard=installation.guard and installation.guard.report(),
            cache=report.cache_data(cache, own, schedule.layers, schedule.density, caches.ratios if caches else ())
            if cache
            else None,
            over_steps=self._over_steps(run, inside, guidance, own),
            density=fmean(step.density for step in own) if installation.work and own else None,
        )
        steps, stages = (*before, *own), (*run.stages[: run.stage], record.as_dict())
        told = report.build_report(
            self._request,
            run.seed,
            self._studio.surroundings,
            record,
            datetime.now().astimezone(),
            self._stages[0].strength,
            inputs.told(self._request, run.pictures, run.start_size, self._studio.known),
            text_known=self._text.known,
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
            cache=None,
            is_keepable=True,
        )

    def _over_steps(
        self, run: Run, inside: Installed, guidance: Guidance, own: Sequence[StepTiming]
    ) -> dict[str, Any] | None:
        """What is told of a stage whose attention is carried over steps; None where it is not.

        Args:
            run: as it was taken up.
            inside: what runs it.
            guidance: of the stage.
            own: steps of the stage that are done.
        """
        installation, request = inside.installation, self._request
        if (carrying := installation.carrying) is None:
            return None
        lengths = self._text.lengths[: 1 if guidance.negative_prompt is None else 2]
        schedules = [installation.schedule(length, installation.references) for length in lengths]
        surroundings, shape = self._studio.surroundings, self._family.transformer_shape(inside.pipe.transformer.config)
        foretold = kept_bytes(
            schedules,
            shape,
            DTYPE_BYTES[surroundings.dtype],
            on_cpu=self._device.type == "cpu",
            whole=not request.compile,
        )
        before = (run.stages[run.stage].get("over_steps") if len(run.stages) > run.stage else None) or {}
        kept = max(carrying.most_kept_bytes, before.get("kept_bytes") or 0)
        return over_steps_data((step.over_steps for step in own), schedules[0], kept, foretold.total)

    def _tell_work(self, stage: Stage, inside: Installed, step: int) -> None:
        """What of a step was computed, where it may have taken over something from those before."""
        work, carrying, cache = inside.installation.work, inside.installation.carrying, stage.preset.cache
        if work and (done := work.of_step(step)):
            kind = carrying and carrying.kind_of_step(step)
            self._progress.work(step_text(done.computed, cache and cache.skipped, kind, work.layers))

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
                world = self._studio.world
                decoded = self._family.decode(self._pipe, run.latents, ranks=world and world.group)
                (frame,) = checked_frames([decoded], FrameCheck(self._pipe.vae.dtype))
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
        """Writes a checkpoint, on the first of several ranks. A run does not end because there is no room for one."""
        if not self._writes:
            return
        if not run.is_keepable:
            measures = isinstance(cache := self._request.preset.cache, Mag) and cache.calibrate
            why = "a run that measures ratios" if measures else "a cache that keeps so much"
            self._progress.note(f"{why} has no checkpoint within a stage: step {run.done} is not kept")
            return
        try:
            write_run(run, self._request, self._output)
        except CannotWrite as error:
            self._progress.note(f"{error}: step {run.done} is not kept")

    @property
    def _writes(self) -> bool:
        return self._studio.world is None or self._studio.world.leads

    def _kept(self) -> Path | None:
        if not self._writes:
            return None
        places = (outputs.latents_path(self._output), outputs.checkpoint_path(self._output), self._run.kept)
        return next((path for path in places if path is not None and path.is_file()), None)


class StepKeeper:
    """The pipeline's callback after every step: keeps what is done now and then, and has it watched.

    Attributes:
        done: steps of the stage that are done.
        latents: after them; None before the first that this process has done.
        history: what the scheduler remembers after them, of `resumption.remembered`.
        cache: what a cache keeps after them; None without one, and where it is too much.
    """

    def __init__(
        self,
        watch: Callable[..., Any],
        first_step: int,
        every: int | None,
        keep: Callable[[int, torch.Tensor, Mapping[str, torch.Tensor], Snapshot | None], None],
        snapshot: Callable[[], Snapshot | None] = lambda: None,
    ) -> None:
        """Counts from a step on.

        Args:
            watch: called first.
            first_step: where this process begins.
            every: steps between two checkpoints, 0 for none; None for one about every two minutes.
            keep: writes one, of steps done, latents, history and what a cache keeps.
            snapshot: gives the latter.
        """
        self._snapshot = snapshot
        self.cache: Snapshot | None = None
        self._watch, self._first_step, self._every, self._keep = watch, first_step, every, keep
        self.latents: torch.Tensor | None = None
        self.history: Mapping[str, torch.Tensor] = {}
        self.done, self._kept_at = first_step, monotonic()

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        latents = tensors["latents"]
        self.done, self.latents, self.history = (
            self._first_step + step + 1,
            latents,
            remembered(pipe.scheduler, latents),
        )
        # A step that is broken off changes what a cache keeps, but not this.
        self.cache = self._snapshot()
        self._watch(pipe, step, timestep, tensors)
        # After the last step the latents are kept as such.
        if self._is_due() and step + 1 < pipe.num_timesteps:
            self._keep(self.done, latents, self.history, self.cache)
            self._kept_at = monotonic()
        return {}

    def _is_due(self) -> bool:
        if self._every is None:
            return monotonic() - self._kept_at >= BETWEEN_CHECKPOINTS_S
        return self._every > 0 and self.done % self._every == 0


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
