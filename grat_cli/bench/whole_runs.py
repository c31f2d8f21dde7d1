"""`--level image` and `--level video`: whole runs, compared with those of full attention, prompt by prompt.

Two computations of the same attention already give outputs that differ. Full attention on a second backend shows by
how much: the noise floor, beyond which no pattern can come closer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from grat_cli.attention.caching import attached
from grat_cli.attention.carrying import Carrying
from grat_cli.attention.clock import PipelineClock, step_under_way
from grat_cli.attention.observers import Observers
from grat_cli.attention.work import Work
from grat_cli.bench.fidelity import Found, measure_fidelity
from grat_cli.bench.figures import OUTPUTS
from grat_cli.bench.inside_models import Host, Inside, backend_of
from grat_cli.bench.measure import CannotRun, PeakMemory, Progress, Unwatched, memory_words, seconds_text
from grat_cli.bench.record import bench_result
from grat_cli.bench.results import BenchResult, Case, Fidelity, Level, Row
from grat_cli.errors import BadInput, NumericalFailure
from grat_cli.families.cut_prompts import watched
from grat_cli.families.guidance import Guidance, choose_guidance
from grat_cli.families.time_shift import shift_of, time_shift
from grat_cli.fidelity import perceptual
from grat_cli.fidelity.quality import Likeness, likeness, summary
from grat_cli.fidelity.variants import Request, Variant, default_group, size_text, variant_for
from grat_cli.generation.request import Request as Asked
from grat_cli.generation.request import note_expectations, request_for
from grat_cli.generation.selection import select_preset
from grat_cli.generation.single import call_for, frames_of
from grat_cli.generation.stage import StepWatch, explained_backend_failures
from grat_cli.generation.timing import StepRecorder, StepTiming, with_work
from grat_cli.installation import backend_for
from grat_cli.models.catalogue import ModelChoice
from grat_cli.models.devices import choose_device, choose_dtype, is_out_of_memory, wait_for
from grat_cli.models.loading import load_model
from grat_cli.models.weights import AS_THEY_ARE, Weights
from grat_kernels import Backend, Full, Grid, Grouping, can_run

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from grat_cli.attention.adapter import Adapter

NOISE_FLOOR = "noise floor"
VIDEOS_SHOWN, FRAMES_SHOWN = 2, 4
_SCHEDULES = (
    "Of a preset, attention, schedule and backend are taken; sampling is the same for all rows. Its density is the "
    "mean over steps, layers and heads."
)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What to make.

    Attributes:
        model: of `models.choose_model`.
        compare: variants beside full attention, which is always there; one that is already fitted to the grid is taken
            as it is.
        prompts: of the outputs.
        seeds_per_prompt: outputs of each prompt; the n-th output of all has seed n.
        width: in pixels; None for what the model was trained at.
        height: likewise.
        frames: of each video, likewise.
        steps: denoising steps; None for the model's own number.
        guidance: None for the model's own.
        device: as in `--device`.
        dtype: as in `--dtype`.
        backend: of span attention; one chosen by name never falls back.
        noise_backend: of the noise floor; None for that of the patterns, or FlexAttention where they run on torch's
            SDPA as full attention does.
        max_seconds: most time for one row, warm-up included; None for no limit.
        recall: whether to measure what each variant keeps of full attention, which takes further runs of that.
        command: that asked for it, for the record.
        added: LoRAs, in all rows, that of full attention included.
    """

    model: ModelChoice
    compare: tuple[Request | Variant, ...]
    prompts: tuple[str, ...]
    seeds_per_prompt: int = 1
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    noise_backend: str | None = None
    max_seconds: float | None = None
    recall: bool = True
    command: str = ""
    added: Weights = AS_THEY_ARE

    @property
    def orders(self) -> list[tuple[str, int]]:
        """Prompt and seed of each output."""
        return [(prompt, seed) for seed, prompt in enumerate(self.prompts * self.seeds_per_prompt)]

    def asked(self) -> Asked:
        """What is asked of each run: full attention, whose sampling is that of all runs.

        Raises:
            BadInput: if size, steps or guidance do not fit the model, or there is nothing to make.
        """
        if not self.prompts or self.seeds_per_prompt < 1:
            noun = OUTPUTS[self.model.medium]
            raise BadInput(f"there is no {noun} to compare: give at least one prompt and one seed")
        preset = select_preset(self.model, variant="full", steps=self.steps, guidance=self.guidance)
        return request_for(
            self.model, preset, self.prompts[0], width=self.width, height=self.height, frames=self.frames
        )


@dataclass(frozen=True)
class Pictures:
    """What the contact sheet of a benchmark shows: pictures, or frames of videos.

    Attributes:
        rows: name of each variant that was not skipped, and its pictures.
        column_titles: what each picture of a row shows: prompt, seed, and of a video the frame.
    """

    rows: list[tuple[str, list[Image.Image]]]
    column_titles: list[str]


def compare_runs(settings: RunSettings, progress: Progress | None = None) -> tuple[BenchResult, Pictures]:
    """Makes every output with every variant, interleaved, and compares them.

    Raises:
        BadInput: if the settings do not fit one another, or a backend by name cannot run here.
        ModelUnavailable: if the model is missing, gated or damaged.
    """
    progress = progress or Unwatched()
    request = settings.asked()
    grid = request.grid
    level: Level = request.model.medium

    # 1. What can be refused before a model is loaded.
    variants = [variant_for(Request("full", "full", {}), grid)]
    steps = request.preset.sampling.steps
    for item in settings.compare:
        variant = item if isinstance(item, Variant) else variant_for(item, grid)
        if variant.grid != grid:
            raise BadInput(f"{variant.name} is for {size_text(variant.grid.shape)} tokens, not {size_text(grid.shape)}")
        if variant.steps is not None and variant.steps >= steps:
            raise BadInput(f"{variant.name}: expected fewer steps than the {steps} of all others")
        if variant.role != "full":
            variants.append(variant)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)

    # 2. The model, and the prompts as it reads them.
    progress.phase("loading the model")
    model = load_model(request.model, device=device, dtype=dtype, weights=settings.added)
    for note in model.notes:
        progress.note(note)
    studio = _Studio(model.pipe, request, settings, device, progress)

    # 3. What computes each row.
    tokens = grid.tokens + studio.text_len
    head_dim = model.pipe.transformer.config.attention_head_dim
    kind = device, dtype, head_dim, tokens
    backend, why = backend_for(settings.backend, *kind, choosing=False)
    transformer, *others = request.family.transformers(model.pipe)
    host = Host(transformer, request.family, studio.text_len, backend, device, dtype, steps, tuple(others))
    entries = [
        _Entry.of(variant, replace(host, backend=backend_of(variant, settings.backend, *kind))) for variant in variants
    ]
    for entry in entries:
        studio.try_cache(entry, host.adapters(grid))
    entries.append(_Entry.of(*noise_floor(host, grid, settings.noise_backend, head_dim, tokens)))
    full, *others = entries

    # 4. Outputs: all variants of one, then all of the next, so that a machine that slows down slows all of them.
    progress.phase("warming up")
    for entry in entries:
        studio.warm_up(entry)
    progress.phase(f"making {OUTPUTS[level]}s")
    done, total = 0, len(entries) * len(studio.orders)
    for number in range(len(studio.orders)):
        turn = number % len(entries)
        for entry in entries[turn:] + entries[:turn]:
            studio.make(entry, number)
            done += 1
            progress.step(done, total)
        studio.compare(entries, full, number)

    # 5. What the patterns keep of full attention, beside what that makes of the outputs.
    kept = None
    if settings.recall and full.skipped is None:
        kept = _fidelity(
            model.pipe, request, host, [entry for entry in others if entry.skipped is None], studio, progress
        )

    # 6. What came out.
    noun, by = f"{OUTPUTS[level]}s", "frame by frame " if request.frames else ""
    compared = (
        f"{noun.capitalize()} are compared {by}with its {noun} of the same prompts and seeds: "
        f"mean and 95 % interval by Student's t over the {noun}."
    )
    rows = [entry.row(full, steps) for entry in (full, *others)]
    result = bench_result(
        level,
        [Case(request.title, grid.shape, studio.text_len, tuple(rows))],
        device=device,
        dtype=dtype,
        settings={
            "model": request.model.name,
            "model_revision": model.revision,
            **({"loras": [lora.told() for lora in model.loras]} if model.loras else {}),
            "prompts": list(settings.prompts),
            "seeds": [seed for _, seed in studio.orders],
            "steps": steps,
            "guidance": studio.guidance.scale,
            "shift": shift_of(
                model.pipe.scheduler,
                grid.tokens,
                request.preset.sampling.shift,
                request.family.given_shift(model.pipe, grid.tokens, steps),
            ),
            "width": request.width,
            "height": request.height,
            **({"frames": request.frames, "fps": request.fps} if request.frames else {}),
            "layers": host.adapter(grid).layers,
            "backend": backend.value,
            "backend_reason": why,
            "max_seconds": settings.max_seconds,
            **({"recall": kept.sampled} if kept and kept.sampled else {}),
        },
        command=settings.command,
        notes=(
            f"Times are of the whole denoising of a {OUTPUTS[level]}; text encoders and autoencoder are left out.",
            f"{request.family.about_stock(request.model)} {compared}",
            "The noise floor is full attention on another backend: differences no larger than its own mean nothing.",
            *([_SCHEDULES] if any(variant.preset for variant in variants) else []),
            *(kept.notes if kept else []),
            *([f"There is no LPIPS: {missing}."] if (missing := perceptual.obstacle()) else []),
            memory_words(device),
        ),
    )
    titles = [
        title
        for number, (prompt, seed) in enumerate(studio.orders)
        for title in titles_of(number, request.frames or 1, prompt, seed)
    ]
    made = [(entry.variant.name, entry.shown) for entry in entries if entry.skipped is None]
    return result, Pictures(made, titles)


def _fidelity(
    pipe: Any, request: Asked, host: Host, entries: Sequence[_Entry], studio: _Studio, progress: Progress
) -> Found | None:
    """Gives entries their fidelity; None where there is nothing to measure, or where measuring failed."""
    variants = [
        entry.variant
        for entry in entries
        if entry.variant.role != "noise floor" and entry.variant.cache is None and entry.variant.kind != "full"
    ]
    if not variants:
        return None
    progress.phase("measuring recall")
    try:
        found = measure_fidelity(pipe, request, host, variants, studio.orders, progress)
    except Exception as error:
        if not isinstance(error, NumericalFailure) and not is_out_of_memory(error):
            raise
        reason = "out of memory" if is_out_of_memory(error) else str(error)
        found = Found({}, {variant.name: reason for variant in variants}, None)
    for entry in entries:
        entry.fidelity = found.of_variant.get(entry.variant.name)
    for note in found.notes:
        progress.note(note)
    return found


@dataclass
class _Entry:
    """A row while it is being made.

    Attributes:
        inside: what computes it; None where it is skipped from the start.
        skipped: why it is skipped, None where it is not.
        not_finite: whether because of NaN, or because nothing but one colour is shown.
        output: the one made last, until it is compared.
        shown: pictures for the contact sheet.
        found: how close each output comes to that of full attention.
        times_ms: of the denoising of each output.
        steps: timings of the steps of each output.
        peak_memory_bytes: of a denoising run.
        fidelity: what it keeps of full attention, None where that was not measured.
        adapters: of the transformers, where steps take over something from those before.
    """

    variant: Variant
    inside: Inside | None
    skipped: str | None = None
    not_finite: bool = False
    output: Any = None
    shown: list[Image.Image] = field(default_factory=list)
    found: list[Likeness] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    steps: list[list[StepTiming]] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    fidelity: Fidelity | None = None
    adapters: tuple[Adapter, ...] = ()

    @classmethod
    def of(cls, variant: Variant, host: Host | str) -> _Entry:
        """The entry of a variant inside a host; or with the reason why there is none."""
        if isinstance(host, str):
            return cls(variant, None, host)
        try:
            return cls(variant, host.inside(variant))
        except CannotRun as reason:
            return cls(variant, None, str(reason))

    @property
    def over_steps(self) -> bool:
        """Whether attention is carried over steps."""
        return self.variant.preset is not None and bool(self.variant.preset.schedule.over_steps)

    def row(self, full: _Entry, steps: int) -> Row:
        """The finished row, given the entry of full attention, and how many steps that takes."""
        variant = self.variant
        known: dict[str, Any] = {"reach_tokens": variant.reach()}
        if variant.preset is not None:
            known["preset"] = variant.preset.model_dump(mode="json")
        if self.inside is not None:
            known["density"] = self.inside.density
            if self.inside.work is not None and self.variant.cache is None:
                known["work"] = self.inside.work._asdict()
        if self.variant.cache is not None:
            known["cache"] = self.variant.cache.model_dump(mode="json")
        if self.adapters and self.steps:
            known["density"] = mean([step.density for one_run in self.steps for step in one_run])
            known["steps_computed"] = mean([sum(map(_is_computed, one_run)) for one_run in self.steps])
        if variant.steps is not None and self.inside is not None:
            known["density"] *= variant.steps / steps
            known.setdefault("steps_computed", float(variant.steps))
        if self.skipped is not None or self.inside is None:
            known |= {"skipped": self.skipped, "not_finite": self.not_finite}
            return Row(variant.name, variant.role, variant.description, **known)
        compared = self is not full and full.skipped is None
        return Row(
            variant.name,
            variant.role,
            variant.description,
            **known,
            kernel=self.inside.kernel,
            times_ms=tuple(self.times_ms),
            speedup=median(full.times_ms) / median(self.times_ms) if full.skipped is None else None,
            peak_memory_bytes=self.peak_memory_bytes,
            attention_ms=median([sum(step.attention_ms for step in one_run) for one_run in self.steps]),
            step_times_ms=tuple(
                median([step.total_ms for step in one_step]) for one_step in zip(*self.steps, strict=True)
            ),
            quality=summary(self.found) if compared else None,
            fidelity=self.fidelity,
        )


def _is_computed(step: StepTiming) -> bool:
    """Whether a step took over nothing."""
    return not step.computed and step.over_steps in (None, "reference")


def noise_floor(host: Host, grid: Grid, name: str | None, head_dim: int, tokens: int) -> tuple[Variant, Host | str]:
    """Full attention on a second backend: the variant, and what computes it or why nothing does.

    Raises:
        BadInput: if one chosen by name cannot run here.
    """
    group = default_group(grid)
    words = "full attention by another kernel: what rounding alone changes"
    variant = Variant(NOISE_FLOOR, "full-list", "noise floor", words, grid, Grouping(grid, group), Full())
    reasons = []
    # Full attention is torch's SDPA. Best is the patterns' own backend, then any other for real sizes.
    choices = [name] if name else [host.backend.value, Backend.FLEX.value]
    for choice in choices:
        if choice == Backend.SDPA.value and not name:
            continue
        ability = can_run(choice, host.device, host.dtype, head_dim, tokens)
        if ability:
            return variant, replace(host, backend=Backend(choice))
        if name:
            raise BadInput(f"the {choice} backend cannot make a noise floor here: {ability.reason}")
        reasons.append(f"{choice}: {ability.reason}")
    return variant, f"there is no second backend ({'; '.join(reasons)})"


def frames_shown(number: int, count: int) -> list[int]:
    """Frames of the n-th output that the contact sheet shows: of a picture its only one, of a video some, evenly spread
    over its time; none of those that the sheet has no room for."""
    if count > 1 and number >= VIDEOS_SHOWN:
        return []
    shown = min(FRAMES_SHOWN, count)
    return [round(place * (count - 1) / max(1, shown - 1)) for place in range(shown)]


def pictures_of(number: int, frames: Sequence[np.ndarray]) -> list[Image.Image]:
    """What the contact sheet shows of the n-th output."""
    from PIL import Image

    return [Image.fromarray(frames[place]) for place in frames_shown(number, len(frames))]


def titles_of(number: int, count: int, prompt: str, seed: int) -> list[str]:
    """Of `pictures_of`, for an output of so many frames."""
    own = f"{prompt}, seed {seed}"
    if count == 1:
        return [own]
    return [
        f"{own}, frame {place + 1}" if place == 0 else f"frame {place + 1}" for place in frames_shown(number, count)
    ]


class _Studio:
    """A pipeline, and what it is to make.

    Attributes:
        orders: prompt and seed of each output.
        text_len: text tokens of the joint sequence, of the longest prompt.
        guidance: of all runs.
    """

    def __init__(
        self, pipe: Any, request: Asked, settings: RunSettings, device: torch.device, progress: Progress
    ) -> None:
        self._pipe, self._request = pipe, request
        self._device, self._progress, self._max_seconds = device, progress, settings.max_seconds
        self._noun = OUTPUTS[request.model.medium]
        request.family.prepare(pipe)
        self.guidance: Guidance = choose_guidance(pipe, request.model, request.preset, None)
        self._texts: dict[str, dict[str, Any]] = {}
        for prompt in dict.fromkeys(settings.prompts):
            note_expectations(replace(request, prompt=prompt), progress)
            with watched(pipe):
                self._texts[prompt] = request.family.encode_text(
                    pipe, request.model, prompt, self.guidance.negative_prompt
                )
        self.orders = settings.orders
        lengths = {prompt: request.family.text_lens(text) for prompt, text in self._texts.items()}
        self.text_len: int = max(max(found) for found in lengths.values())
        # Kernels are compiled, and plans are made, for each length of text.
        firsts = {lengths[prompt]: number for number, (prompt, _) in reversed(list(enumerate(self.orders)))}
        self._trials = sorted(firsts.values())

    def _steps_of(self, entry: _Entry) -> int:
        return entry.variant.steps or self._request.preset.sampling.steps

    def try_cache(self, entry: _Entry, adapters: tuple[Adapter, ...]) -> None:
        """Makes sure, before anything is timed, that the transformers can have the cache of an entry."""
        if not (entry.variant.cache or entry.over_steps) or entry.skipped is not None:
            return
        entry.adapters = adapters
        try:
            with self._cached(entry, Work(adapters[0].layers)):
                pass
        except BadInput as reason:
            entry.skipped, entry.inside = str(reason), None
            self._progress.note(f"{entry.variant.name} is skipped: {entry.skipped}")

    @contextmanager
    def _cached(self, entry: _Entry, work: Work) -> Iterator[None]:
        """While inside, the transformers have the cache of an entry, if it has one."""
        if entry.variant.cache is None:
            yield
            return
        family, pipe = self._request.family, self._pipe
        transformers = family.transformers(pipe)
        ratios = family.mag_ratios(entry.adapters[0].model.config)
        clock = PipelineClock(pipe)
        cache, over_steps = entry.variant.cache, entry.over_steps
        with attached(transformers, entry.adapters, cache, clock, ratios, work.clear, over_steps=over_steps):
            yield

    def warm_up(self, entry: _Entry) -> None:
        """One step of each kind, in which compilers and caches do their work; a second round tells whether there is
        time for all."""
        if entry.inside is None:
            return
        trial_steps = entry.inside.trial_steps

        def attempt() -> None:
            began = time.monotonic()
            with PeakMemory(self._device) as memory:
                for number in self._trials:
                    self._denoised(entry, number, trial_steps)
            if memory.extra_bytes is not None:
                held = self._request.family.transformers(self._pipe)
                weights = sum(parameter.nbytes for one in held for parameter in one.parameters())
                entry.peak_memory_bytes = weights + memory.extra_bytes
            if self._max_seconds is None:
                return
            _, trial_ms, _ = self._denoised(entry, 0, trial_steps)
            spent = time.monotonic() - began
            steps = self._steps_of(entry)
            seconds = spent + trial_ms / 1000 / len(trial_steps) * steps * len(self.orders)
            if seconds > self._max_seconds:
                count = len(self.orders)
                raise CannotRun(
                    f"{count} {self._noun}{'s' if count > 1 else ''} would take about {seconds_text(seconds)}, "
                    f"more than {seconds_text(self._max_seconds)} (--max-seconds)"
                )

        self._attempt(entry, attempt)

    def make(self, entry: _Entry, number: int) -> None:
        """Makes one output of an entry, unless it is skipped."""

        def attempt() -> None:
            latents, milliseconds, steps = self._denoised(entry, number)
            entry.output = frames_of(self._pipe, self._request, latents)
            entry.shown += pictures_of(number, entry.output)
            entry.times_ms.append(milliseconds)
            entry.steps.append(steps)

        if entry.skipped is None:
            self._attempt(entry, attempt)

    def compare(self, entries: list[_Entry], full: _Entry, number: int) -> None:
        """Compares the outputs of one prompt and seed, and lets go of them: videos are large."""
        for entry in entries:
            if entry is not full and entry.skipped is None and full.skipped is None:
                entry.found.append(likeness(full.output, entry.output))
        for entry in entries:
            entry.output = None

    def _attempt(self, entry: _Entry, attempt: Any) -> None:
        """Runs something for an entry, which is skipped where it fails for a reason that is its own."""
        try:
            attempt()
        except (CannotRun, NumericalFailure) as error:
            entry.skipped, entry.not_finite = str(error), isinstance(error, NumericalFailure)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            entry.skipped = "out of memory"
        if entry.skipped is not None:
            self._progress.note(f"{entry.variant.name} is skipped: {entry.skipped}")

    def _denoised(
        self, entry: _Entry, number: int, trial_steps: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, float, list[StepTiming]]:
        """Latents of one output, the milliseconds that all of its steps took, and the timing of each.

        Args:
            entry: the row.
            number: of the output.
            trial_steps: for a trial, the steps whose attention is run, in as many steps.

        Raises:
            NumericalFailure: if they are not finite.
        """
        assert entry.inside is not None
        pipe, device = self._pipe, self._device
        prompt, seed = self.orders[number]
        arguments = self._texts[prompt] | self.guidance.arguments
        recorder, watch = StepRecorder(device), StepWatch(Unwatched())

        def step() -> int:
            under_way = step_under_way(pipe.scheduler)
            return under_way if trial_steps is None else trial_steps[under_way]

        steps = self._steps_of(entry) if trial_steps is None else len(trial_steps)
        call = call_for(self._request, seed, arguments, watch, steps)
        tokens, sampling = self._request.grid.tokens, self._request.preset.sampling
        # Counted where steps are those of the whole run; a trial computes all of its few.
        work = Work(entry.adapters[0].layers) if entry.adapters and trial_steps is None else None
        with ExitStack() as stack:
            shift = self._request.family.given_shift(pipe, tokens, call.steps)
            stack.enter_context(time_shift(pipe, tokens, sampling.shift, shift))
            carrying = stack.enter_context(Carrying(PipelineClock(pipe)).served()) if entry.over_steps else None
            stack.enter_context(entry.inside.attach(Observers(work, recorder) if work else recorder, step, carrying))
            if work:
                stack.enter_context(self._cached(entry, work))
            wait_for(device)
            began = time.perf_counter()
            with explained_backend_failures():
                latents = self._request.family.denoise(pipe, call)
            wait_for(device)
            milliseconds = (time.perf_counter() - began) * 1000
            timesteps = pipe.scheduler.timesteps.tolist()
        watch.raise_if_not_finite()
        # Those of a trial bear numbers of the whole run.
        return latents, milliseconds, [] if trial_steps else with_work(recorder.steps(timesteps), work, carrying)
