"""A request becomes outputs: the main path is `generate`; its numbered steps are those of `Generator`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from grat_cli.errors import INTERRUPTED, GratError, Interrupted, RankLost
from grat_cli.families import cut_prompts
from grat_cli.families.cut_prompts import watched
from grat_cli.families.guidance import choose_guidance
from grat_cli.files import whole
from grat_cli.generation.checkpoint import Run, discard_run, files_of
from grat_cli.generation.denoising import Denoising, Studio, Text
from grat_cli.generation.finishing import (
    Made,
    decode_run,
    decoded,
    keep_latents,
    kept_latents,
    tidy_up,
    written,
    written_already,
)
from grat_cli.generation.inputs import (
    known_before,
    known_files,
    read_pictures,
    read_start,
    reference_tokens,
    refuse_sizes,
)
from grat_cli.generation.known_texts import KnownTexts, negative_of
from grat_cli.generation.machine import memory_advice, offload_chooser, phases_of, release, surroundings
from grat_cli.generation.request import Progress, Request, WritingProgress, check, note_expectations
from grat_cli.generation.sharing import Shard
from grat_cli.generation.stage import refuse_cache, stages_for, upscaled
from grat_cli.generation.world import World, followed
from grat_cli.models.compiling import compile_blocks, require_compile
from grat_cli.models.devices import (
    can_compute_on,
    choose_device,
    choose_dtype,
    cpu_threads,
)
from grat_cli.models.loading import load_model
from grat_cli.models.resolution import Resolution
from grat_cli.models.sharding import require_sharding
from grat_cli.models.text_cache import Embedded, laid_out
from grat_cli.models.weight_files import WeightFile

if TYPE_CHECKING:
    import torch
    from PIL import Image


def generate(
    request: Request, progress: WritingProgress, begun: Run | None = None, world: World | None = None
) -> Iterator[Made]:
    """Makes one output per seed and writes it with its report; the model is loaded once.

    Args:
        request: what to make.
        progress: told how it goes on.
        begun: a run that is taken up; the seeds before its own are left out.
        world: the ranks that make the outputs together, all of which call this; None for one process alone.

    Yields:
        Each output that this process has written: where ranks make them together, the first one does.

    Raises:
        BadInput: if the request cannot be done, with what to change.
        CannotWrite: if an output cannot be written.
        ModelUnavailable: if the model is missing, gated or damaged.
        OutOfMemory: if the device has too little memory.
        NumericalFailure: if latents turn NaN or infinite, or an output is of one flat colour.
        Interrupted: by Ctrl-C, where something was kept to go on with.
        RankLost: if another rank has ended.
    """
    if world is not None:
        request = world.for_this_rank(request)
    # 1. Refuse what can be refused before anything is loaded, and finish what is only to be decoded.
    check(request)
    note_expectations(request, progress)
    jobs = list(zip(request.seeds, request.outputs, strict=True))
    if begun is not None:
        take_up(begun, choose_device(request.device), progress, world)
        if request.preset.cache and begun.done_in_stage and (world or "ranks" in begun.report):
            progress.note("what the cache kept is not known to several ranks: it begins with nothing kept")
        jobs = jobs[request.seeds.index(begun.seed) :]
        if begun.finished:
            _, output = jobs.pop(0)
            if world is None or world.leads:
                yield written_already(begun, request, output) or decode_run(begun, request, output, progress)
                tidy_up(begun, request, output, None)
    if not jobs:
        return

    # 2. Load.
    generator = Generator(request, progress, begun, world=world)

    # 3. Encode the prompts, once for all seeds.
    text = generator.encode(request)
    generator.release_text_encoders()

    # 4. to 8. Denoise in stages, keep, decode, write, report.
    for number, (seed, output) in enumerate(jobs):
        run = begun if begun is not None and begun.seed == seed else generator.new_run(seed)
        made = generator.make(request, run, output, text, is_last=number == len(jobs) - 1)
        if made is not None:
            yield made


_FIRST_SPEAKS_S = 3.0


def follow(here: Shard, progress: WritingProgress) -> int:
    """Makes, as one of the ranks but the first, what that one says; returns an exit code.

    Raises:
        GratError: for what goes wrong on this rank, which it names.
    """
    try:
        try:
            request, begun, world = followed(here)
            for _ in generate(request, progress, begun, world):
                pass
            world.leave()
        except RankLost:  # which is for the one that was lost to explain, or for the first
            return RankLost.exit_code
        except GratError as error:
            # Where the first one fails alike, the launcher ends this one meanwhile, and it is said once.
            time.sleep(_FIRST_SPEAKS_S)
            raise type(error)(f"rank {here.rank - 1}: {error}") from error
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


# What of a pipeline no output needs any more once its prompt is encoded, or its latents are made.
_ENCODERS, _TRANSFORMERS = ("text_encoder", "text_encoder_2"), ("transformer", "transformer_2")


class Generator:
    """A loaded model that makes one output after another. Steps and failures are those of `generate`.

    Attributes:
        stages: of the outputs of a request.
    """

    def __init__(
        self,
        request: Request,
        progress: WritingProgress,
        begun: Run | None = None,
        later: Sequence[Request] = (),
        world: World | None = None,
    ) -> None:
        """Loads the model.

        Args:
            request: what is made first; later ones may differ in prompt, negative prompt, seeds and outputs alone, and
                with `take` in the pictures that they are made from.
            progress: told how it goes on.
            begun: the run that is taken up.
            later: what is made afterwards, as far as it is known: where the texts of all are, no encoder is loaded.
            world: the ranks that make the outputs together; None for one process alone.
        """
        self._world = world
        self._device, self._progress, self._family = choose_device(request.device), progress, request.family
        self._picture: Image.Image | torch.Tensor | None
        self._read(request, begun)
        refuse_cache(request)
        self._common = phases_of(self._device)
        texts = [(one, negative_of(one, self.stages)) for one in (request, *later)]
        self._texts = KnownTexts(texts, self._device, progress)
        self._load(request, self._texts.look)
        if begun is not None:
            self.refuse_other_weights(begun)

    def _load(self, request: Request, are_texts_known: Callable[..., bool] | None = None) -> None:
        # 2. Load.
        progress = self._progress
        cache = request.preset.cache and request.preset.cache.kind
        if request.compile:
            require_compile(self._device, request.offload, cache)
        if self._world is not None and self._world.shards_weights:
            require_sharding(request.offload, compiled=request.compile)
        with memory_advice(request, self._device, self.stages[0]):
            progress.phase("load")
            with self._common("load"):
                self._model = load_model(
                    request.model,
                    device=self._device,
                    dtype=choose_dtype(request.dtype, self._device),
                    offload=request.offload,
                    choose_offload=offload_chooser(request, self._device, self._reference_tokens(request)),
                    pictures=request.kinds,
                    weights=request.weights,
                    are_texts_known=are_texts_known,
                    shard_over=self._world and self._world.shares_weights,
                )
            if request.offload == "auto":
                progress.note(f"--offload auto is {self._model.offload}: {self._model.offload_reason}")
            for note in self._model.notes:
                progress.note(note)
        self._pipe = self._model.pipe
        if request.compile:
            require_compile(self._device, self._model.offload, cache)  # which auto may have chosen
            compile_blocks(self._family.transformers(self._pipe))
        self._family.prepare(self._pipe)
        told = surroundings(self._model, self._device, self._world and self._world.parallel)
        picture, known, world = self._latents_of_picture, self._known, self._world
        self._studio = Studio(self._pipe, self._device, progress, self.stages, told, picture, known, world)

    def _read(self, request: Request, begun: Run | None = None) -> None:
        """Pictures and stages of a request; of a run that is taken up, as they were."""
        self._taken = _files(request)
        if begun is not None:
            self._pictures, self._picture, self._start_size = begun.pictures, begun.picture, begun.start_size
            self._known = known_before(begun.report)
        else:
            refuse_sizes(request)
            self._known = known_files(request)
            start = read_start(request, self._progress)
            self._pictures = read_pictures(request, self._progress)
            self._picture, self._start_size = start, start and start.size
        self.stages = stages_for(request, None if self._start_size is None else Resolution(*self._start_size))

    def take(self, request: Request) -> None:
        """Reads the pictures of what is encoded or made next, where they are others than before."""
        if _files(request) != self._taken:
            self._read(request)
            self._studio = replace(self._studio, stages=self.stages, known=self._known)

    @property
    def _lets_go(self) -> bool:
        return self._family.lets_go and self._model.offload == "none"

    def refuse_other_weights(self, run: Run) -> None:
        """Raises BadInput if a run was begun with other weights than these."""
        told = [lora.told() for lora in self._model.loras]
        run.refuse_other_weights(self._model.revision, self._model.files, told)

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """That the weights were read from, but for those that the revision tells of."""
        return self._model.files

    def new_run(self, seed: int) -> Run:
        """A run of which nothing is done."""
        total = sum(stage.steps for stage in self.stages)
        return Run(seed=seed, total=total, start_size=self._start_size, pictures=self._pictures)

    def _reference_tokens(self, request: Request) -> int:
        return reference_tokens(request, [picture.size for picture in self._pictures.references])

    def _latents_of_picture(self, request: Request) -> torch.Tensor:
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
                text, known = self._texts.find(request, negative), True
                if text is None:
                    text, known = self._encoded(request, negative), False
                    self._texts.keep(request, negative, text)
                for note in text.notes:
                    self._progress.note(note)
                lengths = self._family.text_lens(text.tensors)
                return Text(text.tensors, guidances, lengths, phases, known)

    def _encoded(self, request: Request, negative: str | None) -> Embedded:
        """By the encoders."""
        if self._texts.all_known:  # but for one that nobody told of before
            self._load(request)
        pipe = self._family.pipeline_for(self._pipe, request.handed)
        with watched(pipe, self._family.longest_text(pipe, request.model)) as cuts:
            tensors = self._family.encode_text(pipe, request.model, request.prompt, negative, self._pictures)
        notes = cut_prompts.notes(cuts, request.prompt, negative)
        return Embedded(laid_out(tensors), tuple(notes))

    def release_text_encoders(self) -> None:
        """Lets go of what no prompt needs any more, unless it waits in main memory anyway."""
        if self._lets_go:
            release(self._pipe, *(name for name in _ENCODERS if getattr(self._pipe, name, None) is not None))

    def make(self, request: Request, run: Run, output: Path, text: Text, *, is_last: bool) -> Made | None:
        """One output, written with its report; None on a rank that leaves writing to the first.

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
        making = Denoising(self._studio, request, run, output, text, phases)
        world, steps_before = self._world, len(run.steps)
        writes = world is None or world.leads
        if not run.done and writes:
            # Of an earlier run, which would be taken for this one's.
            discard_run(output, overwrite=request.overwrite)

        try:
            # 4. Denoise in stages, with GRAT attention installed; a checkpoint now and then.
            run = making.denoised()
            if self._lets_go and is_last:
                release(self._pipe, *(name for name in _TRANSFORMERS if getattr(self._pipe, name, None) is not None))

            # 5. Keep the latents until the output is written: decoding is where memory runs out.
            kept = keep_latents(run, request, output, self._progress) if writes else None

            # 6. to 8. Decode, write, report.
            with kept_latents(kept, request, output, self._progress):
                if world is not None and (told := world.told(run.steps[steps_before:])):
                    run = replace(run, report={**run.report, "ranks": told})
                ranks = world and world.group
                pixels = decoded(self._pipe, self._device, run, request, phases, self._progress, ranks=ranks)
                made = written(self._pipe, pixels, run, request, output, phases, self._progress) if writes else None
        except (KeyboardInterrupt, Interrupted):
            making.remove_preview()  # what is kept to go on from makes previews of its own
            raise
        self._pipe.maybe_free_model_hooks()
        if writes:
            making.remove_preview()
            tidy_up(run, request, output, kept)
        return made


def _files(request: Request) -> tuple[object, ...]:
    return request.init_image, request.mask, request.control, request.references


def take_up(run: Run, device: torch.device, progress: Progress, world: World | None = None) -> None:
    """Makes a run's files this process's own, and computes on as many CPU threads as it was begun with: on others sums
    are rounded in another order, as they are on another number of ranks, of which each has threads of its own."""
    for kept in files_of(run) if world is None or world.leads else ():
        whole.adopt(kept)
    before, now = run.report.get("ranks", {}).get("count", 1), 1 if world is None else world.parallel.ranks
    if before != now:
        progress.note(
            f"the run was begun on {before} rank{'s' * (before > 1)}, and goes on with {now}: sums may be rounded in "
            "another order"
        )
    if max(before, now) > 1:
        return
    threads, here = run.report.get("device", {}).get("threads"), cpu_threads(device)
    if threads and here and not can_compute_on(threads):
        progress.note(
            f"the run was begun on {threads} CPU threads, which is too many for this machine: it goes on with {here}, "
            "and sums may be rounded in another order"
        )
    elif compute_on(threads, device):
        progress.note(f"the run was begun on {threads} CPU threads, and goes on with as many, not {here}")


def compute_on(threads: int | None, device: torch.device) -> bool:
    """Computes on so many CPU threads, if the device is a CPU; returns whether these are others than before."""
    import torch

    here = cpu_threads(device)
    if not threads or not here or threads == here or not can_compute_on(threads):
        return False
    torch.set_num_threads(threads)
    return True
