"""Images from prompts: the main path is `generate_images`; its numbered steps are those of `ImageGenerator`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grat_cli.estimates.stages import stages_of
from grat_cli.families.guidance import Guidance, choose_guidance
from grat_cli.generation.denoising import GenerationRecord, memory_advice
from grat_cli.generation.image_request import ImageRequest, note_expectations, read_init_image
from grat_cli.generation.request import Progress, check_size
from grat_cli.generation.stage_run import StageRecord, Studio, numbered, total_phases
from grat_cli.generation.timing import Phases
from grat_cli.models.devices import (
    choose_device,
    choose_dtype,
    cpu_threads,
    device_name,
    forget_peak_memory,
    peak_memory,
    wait_for,
)
from grat_cli.models.loading import load_model
from grat_cli.models.resolution import Resolution

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class GeneratedImage(GenerationRecord):
    """A picture, and what there is to report about how it was made.

    Attributes:
        stages: what was run, first to last; steps and phases of the record are those of all of them.
    """

    image: Image.Image
    stages: tuple[StageRecord, ...] = ()


def generate_images(request: ImageRequest, progress: Progress) -> Iterator[GeneratedImage]:
    """Makes one image per seed; the model is loaded once. Large ones take several stages, see `highres`.

    Raises:
        BadInput: if the request cannot be done, with what to change.
        ModelUnavailable: if the model is missing, gated or damaged.
        OutOfMemory: if the device has too little memory.
        NumericalFailure: if latents turn NaN or infinite, or the picture is one flat colour.
    """
    # 1. and 2. Refuse what cannot be done, and load.
    note_expectations(request, progress)
    generator = ImageGenerator(request, progress)

    # 3. Encode the prompts, once for all seeds and stages.
    text = generator.encode(request)

    # 4. to 6. Denoise, decode, report.
    for seed in request.seeds:
        yield generator.make(request, text, seed)


@dataclass(frozen=True)
class ImageText:
    """Encoded prompts.

    Attributes:
        tensors: embeddings as the pipelines take them.
        guidances: of each stage.
    """

    tensors: dict[str, torch.Tensor]
    guidances: list[Guidance]


class ImageGenerator:
    """A loaded model that makes one picture after another.

    Steps and failures are those of `generate_images`.
    """

    def __init__(self, request: ImageRequest, progress: Progress) -> None:
        """Refuses what cannot be done, and loads the model.

        Args:
            request: what is made first; later ones may differ in prompt, negative prompt, seeds and previews alone.
            progress: told how it goes on.
        """
        # 1. What can be refused before anything is loaded.
        check_size(request)
        self._progress = progress
        self._device = device = choose_device(request.device)
        self._dtype = choose_dtype(request.dtype, device)
        self._init_image = read_init_image(request, progress)
        self._stages = stages_of(
            request.preset,
            request.model,
            request.width,
            request.height,
            start=None if self._init_image is None else Resolution(*self._init_image.size),
            strength=request.strength,
        )
        self._phases = Phases(lambda: wait_for(device))
        forget_peak_memory(device)

        # 2. Load.
        with memory_advice(request, device, self._stages[0].size):
            progress.phase("load")
            with self._phases("load"):
                self._model = load_model(
                    request.model,
                    device=device,
                    dtype=self._dtype,
                    offload=request.offload,
                    quantize=request.quantize,
                    image_to_image=self._init_image is not None,
                    base=request.base,
                )
            if request.offload == "auto":
                progress.note(f"--offload auto is {self._model.offload}: {self._model.offload_reason}")
        self._studio = Studio(self._model.pipe, device, progress)

    def encode(self, request: ImageRequest) -> ImageText:
        """Prompt and negative prompt as the pipelines take them, for all seeds and stages."""
        # 3. Encode the prompts.
        pipe = self._model.pipe
        with memory_advice(request, self._device, self._stages[0].size):
            guidances = [
                choose_guidance(pipe, request.model, stage.preset, request.negative_prompt) for stage in self._stages
            ]
            for note in dict.fromkeys(note for guidance in guidances for note in guidance.notes):
                self._progress.note(note)
            self._progress.phase("text")
            with self._phases("text"):
                given = [guidance.negative_prompt for guidance in guidances if guidance.negative_prompt is not None]
                return ImageText(encode_text(pipe, request, given[0] if given else None), guidances)

    def make(self, request: ImageRequest, text: ImageText, seed: int) -> GeneratedImage:
        """One picture.

        Args:
            request: of the prompt.
            text: the prompt, encoded.
            seed: of the noise.
        """
        # Noise is drawn on the CPU, so that a seed gives the same one on every device.
        import torch

        generator = torch.Generator("cpu").manual_seed(seed)
        before, picture, records = self._init_image, None, []
        for stage, guidance in zip(self._stages, text.guidances, strict=True):
            with memory_advice(request, self._device, stage.size):
                # 4. Denoise with GRAT attention installed, from noise or from what came before, upscaled.
                preview = request.previews.get(seed)
                before, record = self._studio.run(stage, text.tensors, guidance, before, generator, preview)
                records.append(record)

                # 5. Decode, unless latents are upscaled.
                if stage.decoded:
                    before = picture = self._studio.decode(before, record)

        # 6. Report. What was loaded and encoded is counted with the first picture that follows.
        last = records[-1]
        assert picture is not None, "the last stage is decoded"
        memory_bytes, memory_kind = peak_memory(self._device)
        phases_ms = self._phases.phases_ms | total_phases(records)
        self._phases.phases_ms = {"load": 0.0, "text": 0.0}
        return GeneratedImage(
            image=picture,
            seed=seed,
            width=request.width,
            height=request.height,
            phases_ms=phases_ms,
            steps=numbered(records),
            stages=tuple(records),
            peak_memory_bytes=memory_bytes,
            peak_memory_kind=memory_kind,
            backend=last.installation.backend.value,
            backend_reason=last.installation.backend_reason,
            preparation=last.installation.preparation,
            device=str(self._device),
            device_name=device_name(self._device),
            dtype=str(self._dtype).removeprefix("torch."),
            autoencoder_dtype=str(self._model.pipe.vae.dtype).removeprefix("torch."),
            threads=cpu_threads(self._device),
            guidance=last.guidance,
            shift=last.shift,
            model_revision=self._model.revision,
            offload=self._model.offload,
            offload_reason=self._model.offload_reason,
            schedule=last.installation.last_schedule,
            text_tokens=text.tensors["prompt_embeds"].shape[1],
            guard=last.guard,
        )


def encode_text(pipe: Any, request: ImageRequest, negative_prompt: str | None) -> dict[str, torch.Tensor]:
    """Embeddings of prompt and negative prompt, as the pipelines take them.

    Args:
        pipe: a pipeline of Flux.
        request: whose prompt is taken.
        negative_prompt: of `guidance.Guidance`: None where the transformer is called once per step.
    """
    import torch

    def encode(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, pooled, _ = pipe.encode_prompt(
            prompt=prompt, prompt_2=None, max_sequence_length=request.model.text_tokens
        )
        return embeddings, pooled

    with torch.no_grad():
        embeddings, pooled = encode(request.prompt)
        text = {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}
        if negative_prompt is not None:
            embeddings, pooled = encode(negative_prompt)
            text |= {"negative_prompt_embeds": embeddings, "negative_pooled_prompt_embeds": pooled}
    return text
