"""`--level image`: whole runs with pictures, compared with those of full attention from the same prompts and seeds.

Two computations of the same attention already give pictures that differ. Full attention on a second backend shows by
how much: the noise floor, beyond which no pattern can come closer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import datetime
from statistics import median
from typing import TYPE_CHECKING, Any

from grat_cli.bench.inside_models import Host, Inside, backend_for
from grat_cli.bench.measure import CannotRun, PeakMemory, Progress, Unwatched, memory_words, seconds_text
from grat_cli.bench.quality import compare
from grat_cli.bench.results import BenchResult, Case, Row
from grat_cli.bench.variants import Request, Variant, default_group, size_text, variant_for
from grat_cli.checkpoints import load_model
from grat_cli.demo.evaluation import SHEET_PROMPTS
from grat_cli.denoising import StepWatch
from grat_cli.devices import choose_device, choose_dtype, device_name, is_out_of_memory, wait_for
from grat_cli.environment import versions
from grat_cli.errors import BadInput, NumericalFailure
from grat_cli.generation import decode, denoise, encode_text, tile_large_pictures
from grat_cli.generation_request import check_size
from grat_cli.guidance import Guidance, choose_guidance
from grat_cli.image_request import ImageRequest, note_expectations
from grat_cli.installation import step_under_way
from grat_cli.models import ModelChoice
from grat_cli.presets import resolve_preset
from grat_cli.selection import select_preset
from grat_cli.time_shift import shift_of, time_shift
from grat_cli.timing import StepRecorder, StepTiming
from grat_kernels import Backend, Full, Grid, Grouping, can_run

if TYPE_CHECKING:
    import torch
    from PIL import Image

# The sample sheet's prompts without the last one, and five more.
PROMPTS: tuple[str, ...] = (
    *SHEET_PROMPTS[:-1],
    "a red car in the desert",
    "a white house at night",
    "a brown fox at dusk",
    "a green boat at sea",
    "a yellow flower in the snow",
)
NOISE_FLOOR = "noise floor"


@dataclass(frozen=True)
class ImageSettings:
    """What to make pictures of.

    Attributes:
        model: of `models.choose_model`.
        compare: variants beside full attention, which is always there; one that is already fitted to the grid is taken
            as it is.
        prompts: of the pictures.
        seeds_per_prompt: pictures of each prompt; the n-th picture of all has seed n.
        width: in pixels; None for what the model was trained at.
        height: likewise.
        steps: denoising steps; None for the model's own number.
        guidance: None for the model's own.
        device: as in `--device`.
        dtype: as in `--dtype`.
        backend: of span attention; one chosen by name never falls back.
        noise_backend: of the noise floor; None for that of the patterns, or FlexAttention where they run on torch's
            SDPA as full attention does.
        max_seconds: most time for one row, warm-up included; None for no limit.
        command: that asked for it, for the record.
    """

    model: ModelChoice
    compare: tuple[Request | Variant, ...]
    prompts: tuple[str, ...] = PROMPTS[:4]
    seeds_per_prompt: int = 1
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    noise_backend: str | None = None
    max_seconds: float | None = None
    command: str = ""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a benchmark.

    Attributes:
        rows: name of each variant that was not skipped, and its pictures.
        column_titles: prompt and seed of each picture of a row.
    """

    rows: list[tuple[str, list[Image.Image]]]
    column_titles: list[str]


def run_image_level(settings: ImageSettings, progress: Progress | None = None) -> tuple[BenchResult, Pictures]:
    """Makes every picture with every variant, interleaved, and compares them.

    Raises:
        BadInput: if the settings do not fit one another, or a backend by name cannot run here.
        ModelUnavailable: if the model is missing, gated or damaged.
    """
    progress = progress or Unwatched()

    # 1. What can be refused before a model is loaded.
    request = _request(settings)
    check_size(request)
    grid = Grid((request.height // request.model.token_side, request.width // request.model.token_side))
    variants = [variant_for(Request("full", "full", {}), grid)]
    for item in settings.compare:
        variant = item if isinstance(item, Variant) else variant_for(item, grid)
        if variant.grid != grid:
            raise BadInput(f"{variant.name} is for {size_text(variant.grid.shape)} tokens, not {size_text(grid.shape)}")
        if variant.kind != "full":
            variants.append(variant)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)

    # 2. The model, and the prompts as it reads them.
    progress.phase("loading the model")
    model = load_model(request.model, device=device, dtype=dtype)
    painter = _Painter(model.pipe, request, settings, grid, device, progress)

    # 3. What computes each row.
    tokens = grid.tokens + painter.text_len
    head_dim = model.pipe.transformer.config.attention_head_dim
    backend, why = backend_for(settings.backend, device, dtype, head_dim, tokens)
    host = Host(model.pipe.transformer, "flux", painter.text_len, backend, device, dtype)
    entries = [_Entry.of(variant, host) for variant in variants]
    entries.append(_noise_floor(host, grid, settings.noise_backend, head_dim, tokens))

    # 4. Pictures: all variants of one, then all of the next, so that a machine that slows down slows all of them.
    progress.phase("warming up")
    for entry in entries:
        painter.warm_up(entry)
    progress.phase("making pictures")
    done, total = 0, len(entries) * len(painter.orders)
    for number in range(len(painter.orders)):
        turn = number % len(entries)
        for entry in entries[turn:] + entries[:turn]:
            painter.paint(entry, number)
            done += 1
            progress.step(done, total)

    # 5. What came out.
    full, *others = entries
    rows = [full.row(full), *(entry.row(full) for entry in others)]
    result = BenchResult(
        level="image",
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=settings.command,
        device=str(device),
        device_name=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        versions=versions(),
        settings={
            "model": request.model.name,
            "model_revision": model.revision,
            "prompts": list(settings.prompts),
            "seeds": [seed for _, seed in painter.orders],
            "steps": request.preset.sampling.steps,
            "guidance": painter.guidance.scale,
            "shift": shift_of(model.pipe.scheduler, grid.tokens, request.preset.sampling.shift),
            "width": request.width,
            "height": request.height,
            "layers": host.adapter(grid).layers,
            "backend": backend.value,
            "backend_reason": why,
            "max_seconds": settings.max_seconds,
        },
        cases=(Case(f"{request.width}x{request.height} pixels", grid.shape, painter.text_len, tuple(rows)),),
        notes=(
            "Times are of the whole denoising of a picture; text encoders and autoencoder are left out.",
            "Full attention is stock diffusers. Pictures are compared with its pictures of the same prompts and seeds: "
            "mean and 95 % interval by Student's t over the pictures.",
            "The noise floor is full attention on another backend: differences no larger than its own mean nothing.",
            memory_words(device),
        ),
    )
    titles = [f"{prompt}, seed {seed}" for prompt, seed in painter.orders]
    made = [(entry.variant.name, entry.pictures) for entry in entries if entry.skipped is None]
    return result, Pictures(made, titles)


def _request(settings: ImageSettings) -> ImageRequest:
    """What is asked of each run; the prompt is replaced from picture to picture."""
    if not settings.prompts or settings.seeds_per_prompt < 1:
        raise BadInput("there is no picture to compare: give at least one prompt and one seed")
    model = settings.model
    preset = select_preset(model, variant="full", steps=settings.steps, guidance=settings.guidance)
    return ImageRequest(
        settings.prompts[0],
        preset,
        model,
        settings.width or model.native_side,
        settings.height or model.native_side,
        seeds=(),
    )


@dataclass
class _Entry:
    """A row while it is being made.

    Attributes:
        inside: what computes it; None where it is skipped from the start.
        skipped: why it is skipped, None where it is not.
        pictures: one per order.
        times_ms: of the denoising of each picture.
        steps: timings of the steps of each picture.
        peak_memory_bytes: of a denoising run.
    """

    variant: Variant
    inside: Inside | None
    skipped: str | None = None
    pictures: list[Image.Image] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    steps: list[list[StepTiming]] = field(default_factory=list)
    peak_memory_bytes: int | None = None

    @classmethod
    def of(cls, variant: Variant, host: Host) -> _Entry:
        """The entry of a variant."""
        try:
            return cls(variant, host.inside(variant))
        except CannotRun as reason:
            return cls(variant, None, str(reason))

    def row(self, full: _Entry) -> Row:
        """The finished row, given the entry of full attention."""
        variant = self.variant
        known: dict[str, Any] = {"reach_tokens": variant.reach()}
        if self.inside is not None:
            known["density"] = self.inside.density
        if self.skipped is not None or self.inside is None:
            return Row(variant.name, variant.role, variant.description, **known, skipped=self.skipped)
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
            attention_ms=median([sum(step.attention_ms for step in steps) for steps in self.steps]),
            step_times_ms=tuple(
                median([step.total_ms for step in one_step]) for one_step in zip(*self.steps, strict=True)
            ),
            quality=compare(full.pictures, self.pictures) if compared else None,
        )


def _noise_floor(host: Host, grid: Grid, name: str | None, head_dim: int, tokens: int) -> _Entry:
    """Full attention on a second backend.

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
            return _Entry.of(
                variant, Host(host.transformer, host.family, host.text_len, Backend(choice), host.device, host.dtype)
            )
        if name:
            raise BadInput(f"the {choice} backend cannot make a noise floor here: {ability.reason}")
        reasons.append(f"{choice}: {ability.reason}")
    return _Entry(variant, None, f"there is no second backend ({'; '.join(reasons)})")


class _Painter:
    """A pipeline, and the pictures that it is to make.

    Attributes:
        orders: prompt and seed of each picture.
        text_len: text tokens of the joint sequence.
        guidance: of all pictures.
    """

    def __init__(
        self,
        pipe: Any,
        request: ImageRequest,
        settings: ImageSettings,
        grid: Grid,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._pipe, self._request, self._grid = pipe, request, grid
        self._device, self._progress, self._max_seconds = device, progress, settings.max_seconds
        tile_large_pictures(pipe, request)
        self.guidance: Guidance = choose_guidance(pipe, request.model, request.preset, None)
        self._texts = {}
        for prompt in dict.fromkeys(settings.prompts):
            asked = self._asked(prompt)
            note_expectations(asked, progress)
            self._texts[prompt] = encode_text(pipe, asked, self.guidance)
        self.orders = [(prompt, seed) for seed, prompt in enumerate(settings.prompts * settings.seeds_per_prompt)]
        self.text_len: int = self._texts[settings.prompts[0]]["prompt_embeds"].shape[1]

    def warm_up(self, entry: _Entry) -> None:
        """One step, in which compilers and caches do their work; a second one tells whether there is time for all."""
        if entry.inside is None:
            return

        def attempt() -> None:
            began = time.monotonic()
            with PeakMemory(self._device) as memory:
                self._denoised(entry, 0, steps=1)
            if memory.extra_bytes is not None:
                weights = sum(parameter.nbytes for parameter in self._pipe.transformer.parameters())
                entry.peak_memory_bytes = weights + memory.extra_bytes
            if self._max_seconds is None:
                return
            _, one_step_ms, _ = self._denoised(entry, 0, steps=1)
            spent = time.monotonic() - began
            steps = self._request.preset.sampling.steps
            seconds = spent + one_step_ms / 1000 * steps * len(self.orders)
            if seconds > self._max_seconds:
                raise CannotRun(
                    f"{len(self.orders)} pictures would take about {seconds_text(seconds)}, "
                    f"more than {seconds_text(self._max_seconds)} (--max-seconds)"
                )

        self._attempt(entry, attempt)

    def paint(self, entry: _Entry, number: int) -> None:
        """Makes one picture of an entry, unless it is skipped."""

        def attempt() -> None:
            latents, milliseconds, steps = self._denoised(entry, number)
            picture = decode(self._pipe, latents, self._request)
            entry.pictures.append(picture)
            entry.times_ms.append(milliseconds)
            entry.steps.append(steps)

        if entry.skipped is None:
            self._attempt(entry, attempt)

    def _attempt(self, entry: _Entry, attempt: Any) -> None:
        """Runs something for an entry, which is skipped where it fails for a reason that is its own."""
        try:
            attempt()
        except (CannotRun, NumericalFailure) as error:
            entry.skipped = str(error)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            entry.skipped = "out of memory"
        if entry.skipped is not None:
            self._progress.note(f"{entry.variant.name} is skipped: {entry.skipped}")

    def _denoised(
        self, entry: _Entry, number: int, steps: int | None = None
    ) -> tuple[torch.Tensor, float, list[StepTiming]]:
        """Latents of one picture, the milliseconds that all of its steps took, and the timing of each.

        Raises:
            NumericalFailure: if they are not finite.
        """
        assert entry.inside is not None
        pipe, device = self._pipe, self._device
        prompt, seed = self.orders[number]
        arguments = self._texts[prompt] | self.guidance.arguments
        recorder, watch = StepRecorder(device), StepWatch(Unwatched())
        with (
            time_shift(pipe, self._grid.tokens, self._request.preset.sampling.shift),
            entry.inside.attach(recorder, lambda: step_under_way(pipe.scheduler)),
        ):
            wait_for(device)
            began = time.perf_counter()
            latents = denoise(pipe, self._asked(prompt, steps), arguments, None, seed, watch)
            wait_for(device)
            milliseconds = (time.perf_counter() - began) * 1000
            timesteps = pipe.scheduler.timesteps.tolist()
        watch.raise_if_not_finite()
        return latents, milliseconds, recorder.steps(timesteps)

    def _asked(self, prompt: str, steps: int | None = None) -> ImageRequest:
        """The request of one picture, with fewer steps for a trial."""
        preset = self._request.preset if steps is None else resolve_preset(self._request.preset, steps=steps)
        return replace(self._request, prompt=prompt, preset=preset)
