"""`--level highres`: pictures larger than the model was trained at, compared with the base of the cascade.

A large picture of the same prompt and seed has no reference but the small one that the model makes well. So every
picture is scaled down to that size and compared with it: a cascade keeps what the base shows; from noise, large
pictures repeat and blur.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from grat_cli.bench.measure import Progress, Unwatched
from grat_cli.bench.record import bench_result
from grat_cli.bench.results import BenchResult, Case, Row
from grat_cli.bench.whole_runs import Pictures
from grat_cli.errors import BadInput
from grat_cli.estimates.stages import Stage, stages_of, uses_highres
from grat_cli.families.cut_prompts import watched
from grat_cli.families.guidance import choose_guidance
from grat_cli.fidelity.quality import Likeness, likeness, summary
from grat_cli.fidelity.variants import MODES
from grat_cli.generation.request import request_for
from grat_cli.generation.single import call_for, frames_of
from grat_cli.generation.stage import StepWatch, installed, upscaled
from grat_cli.generation.timing import StepRecorder
from grat_cli.models.catalogue import ModelChoice
from grat_cli.models.devices import choose_device, choose_dtype
from grat_cli.models.loading import load_model
from grat_cli.models.weights import AS_THEY_ARE, Weights
from grat_cli.presets import HighResolution, Preset

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class HighresSettings:
    """What to make.

    Attributes:
        model: of `models.choose_model`.
        preset: resolved; its `highres` section is that of the cascade.
        width: in pixels.
        height: likewise.
        compare: of `variants.MODES`.
        prompts: of the pictures; the n-th has seed n.
        device: as in `--device`.
        dtype: as in `--dtype`.
        command: that asked for it, for the record.
        added: LoRAs, in all rows.
    """

    model: ModelChoice
    preset: Preset
    width: int
    height: int
    prompts: tuple[str, ...]
    compare: tuple[str, ...] = tuple(MODES)
    device: str = "auto"
    dtype: str = "auto"
    command: str = ""
    added: Weights = AS_THEY_ARE


@dataclass
class _Entry:
    """A row while it is being made."""

    name: str
    stages: tuple[Stage, ...]
    pictures: list[Image.Image] = field(default_factory=list)
    found: list[Likeness] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)
    density: float = 1.0
    kernel: str = ""

    def row(self) -> Row:
        """What was measured; of several stages the density of the last, and the time of all of them."""
        sizes = " → ".join(f"{stage.size} ({stage.steps} steps)" for stage in self.stages)
        what = MODES.get(self.name, "What the model makes as it was trained, with full attention.")
        return Row(
            self.name,
            "full" if self.name == BASE else "pattern" if self.name == "cascade" else "baseline",
            f"{what} {sizes}; {self.stages[-1].preset.attention.summary}",
            kernel=self.kernel,
            density=self.density,
            times_ms=tuple(self.times_ms),
            quality=summary(self.found) if self.found else None,
        )


def run_highres_level(settings: HighresSettings, progress: Progress | None = None) -> tuple[BenchResult, Pictures]:
    """Makes every picture in every way, and compares them with the bases.

    Raises:
        BadInput: if the settings do not fit one another.
        ModelUnavailable: if the model is missing, gated or damaged.
    """
    progress = progress or Unwatched()

    # 1. What can be refused before a model is loaded.
    entries = _entries(settings)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)

    # 2. The model.
    progress.phase("loading the model")
    loaded = load_model(settings.model, device=device, dtype=dtype, weights=settings.added)
    for note in loaded.notes:
        progress.note(note)

    # 3. All pictures of one prompt, then all of the next.
    progress.phase("making pictures")
    done, total = 0, len(entries) * len(settings.prompts)
    for seed, prompt in enumerate(settings.prompts):
        for entry in entries:
            _make(entry, loaded.pipe, device, settings, prompt, seed)
            done += 1
            progress.step(done, total)
        base = entries[0].pictures[-1]
        for entry in entries[1:]:
            entry.found.append(likeness([np.asarray(base)], [_scaled_down(entry.pictures[-1], base)]))

    # 4. What came out.
    last = entries[-1].stages[-1]
    side = settings.model.token_side
    case = Case(
        f"{last.size} pixels",
        (last.height // side, last.width // side),
        settings.model.text_tokens,
        tuple(entry.row() for entry in entries),
    )
    result = bench_result(
        "highres",
        [case],
        device=device,
        dtype=dtype,
        settings={
            "model": settings.model.name,
            "model_revision": loaded.revision,
            **({"loras": [lora.told() for lora in loaded.loras]} if loaded.loras else {}),
            "preset": settings.preset.name,
            "prompts": list(settings.prompts),
            "seeds": list(range(len(settings.prompts))),
            "steps": settings.preset.sampling.steps,
            "width": last.width,
            "height": last.height,
        },
        command=settings.command,
        notes=(
            "Pictures are scaled down to the base's size (Lanczos) and compared with the base of the same prompt and "
            "seed: mean and 95 % interval by Student's t over the pictures.",
            "Times are of the whole denoising of all stages; text encoders and autoencoder are left out.",
        ),
    )
    titles = [f"{prompt}, seed {seed}" for seed, prompt in enumerate(settings.prompts)]
    return result, Pictures([(entry.name, entry.pictures) for entry in entries], titles)


def _entries(settings: HighresSettings) -> list[_Entry]:
    """The base, then what is compared with it."""
    if not settings.prompts:
        raise BadInput("there is no picture to compare: give at least one prompt")
    entries = []
    for mode in settings.compare:
        section = settings.preset.highres or HighResolution()
        preset = settings.preset.model_copy(update={"highres": section.model_copy(update={"mode": mode})})
        if mode != "off" and not uses_highres(preset, settings.model, settings.width, settings.height):
            raise BadInput(
                f"{settings.model.name} makes {settings.width}x{settings.height} as it is: give a larger --res"
            )
        entries.append(_Entry(mode, stages_of(preset, settings.model, settings.width, settings.height)))
    cascade = settings.preset.model_copy(update={"highres": HighResolution()})
    base = stages_of(cascade, settings.model, settings.width, settings.height)[:1]
    return [_Entry(BASE, base), *entries]


def _make(entry: _Entry, pipe: Any, device: torch.device, settings: HighresSettings, prompt: str, seed: int) -> None:
    """One picture of an entry, stage by stage, as `generation.run` makes it."""
    request = request_for(settings.model, settings.preset, prompt, width=settings.width, height=settings.height)
    generator = torch.Generator("cpu").manual_seed(seed)
    before: Any = None
    spent = 0.0
    for stage in entry.stages:
        guidance = choose_guidance(pipe, settings.model, stage.preset, None)
        with watched(pipe):
            text = request.family.encode_text(pipe, settings.model, prompt, guidance.negative_prompt)
        start = None if before is None else upscaled(pipe, request, before, stage)
        recorder, watch = StepRecorder(device), StepWatch(Unwatched())
        with installed(pipe, request, stage, start=start, observer=recorder) as inside:
            call = replace(
                call_for(request, seed, text | guidance.arguments, watch, stage.preset.sampling.steps),
                width=stage.width,
                height=stage.height,
                generator=generator,
                start=start,
                strength=stage.strength,
            )
            before = request.family.denoise(inside.pipe, call)
            timed = recorder.steps([0.0] * stage.steps)
        watch.raise_if_not_finite()
        spent += sum(step.total_ms for step in timed)
        if stage.decoded:
            before = Image.fromarray(frames_of(pipe, request, before)[0])
    entry.pictures.append(before)
    entry.times_ms.append(spent)
    entry.density = inside.installation.last_schedule.density
    entry.kernel = inside.installation.backend.value


def _scaled_down(picture: Image.Image, base: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize(base.size, Image.Resampling.LANCZOS))
