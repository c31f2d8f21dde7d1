"""Images from prompts: the main path, which reads from top to bottom in `generate_images`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grat_cli.checkpoints import load_model
from grat_cli.denoising import GenerationRecord, memory_advice
from grat_cli.devices import (
    choose_device,
    choose_dtype,
    cpu_threads,
    device_name,
    forget_peak_memory,
    peak_memory,
    wait_for,
)
from grat_cli.generation_request import Progress, check_size
from grat_cli.guidance import choose_guidance
from grat_cli.highres import stages_of
from grat_cli.image_request import ImageRequest, note_expectations, read_init_image
from grat_cli.resolution import Resolution
from grat_cli.staged_generation import StageRecord, Studio, numbered, total_phases
from grat_cli.timing import Phases

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
    import torch

    # 1. What can be refused before anything is loaded.
    check_size(request)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    init_image = read_init_image(request, progress)
    stages = stages_of(
        request.preset,
        request.model,
        request.width,
        request.height,
        start=None if init_image is None else Resolution(*init_image.size),
        strength=request.strength,
    )
    note_expectations(request, progress)
    phases = Phases(lambda: wait_for(device))
    forget_peak_memory(device)

    with memory_advice(request, device, stages[0].size):
        # 2. Load.
        progress.phase("load")
        with phases("load"):
            model = load_model(
                request.model,
                device=device,
                dtype=dtype,
                offload=request.offload,
                quantize=request.quantize,
                tokens=(request.width // request.model.token_side) * (request.height // request.model.token_side),
                image_to_image=init_image is not None,
                base=request.base,
            )
        if request.offload == "auto":
            progress.note(f"--offload auto is {model.offload}: {model.offload_reason}")
        studio = Studio(model.pipe, device, progress)

        # 3. Encode the prompts, once for all seeds and stages.
        guidances = [
            choose_guidance(model.pipe, request.model, stage.preset, request.negative_prompt) for stage in stages
        ]
        for note in dict.fromkeys(note for guidance in guidances for note in guidance.notes):
            progress.note(note)
        progress.phase("text")
        with phases("text"):
            given = [guidance.negative_prompt for guidance in guidances if guidance.negative_prompt is not None]
            text = encode_text(model.pipe, request, given[0] if given else None)

    for seed in request.seeds:
        # Noise is drawn on the CPU, so that a seed gives the same one on every device.
        generator = torch.Generator("cpu").manual_seed(seed)
        before, picture, records = init_image, None, []
        for stage, guidance in zip(stages, guidances, strict=True):
            with memory_advice(request, device, stage.size):
                # 4. Denoise with GRAT attention installed, from noise or from what came before, upscaled.
                before, record = studio.run(stage, text, guidance, before, generator, request.previews.get(seed))
                records.append(record)

                # 5. Decode, unless latents are upscaled.
                if stage.decoded:
                    before = picture = studio.decode(before, record)

        # 6. Report.
        last = records[-1]
        assert picture is not None, "the last stage is decoded"
        memory_bytes, memory_kind = peak_memory(device)
        yield GeneratedImage(
            image=picture,
            seed=seed,
            width=request.width,
            height=request.height,
            phases_ms=phases.phases_ms | total_phases(records),
            steps=numbered(records),
            stages=tuple(records),
            peak_memory_bytes=memory_bytes,
            peak_memory_kind=memory_kind,
            backend=last.installation.backend.value,
            backend_reason=last.installation.backend_reason,
            preparation=last.installation.preparation,
            device=str(device),
            device_name=device_name(device),
            dtype=str(dtype).removeprefix("torch."),
            autoencoder_dtype=str(model.pipe.vae.dtype).removeprefix("torch."),
            threads=cpu_threads(device),
            guidance=last.guidance,
            shift=last.shift,
            model_revision=model.revision,
            offload=model.offload,
            offload_reason=model.offload_reason,
            schedule=last.installation.last_schedule,
            text_tokens=text["prompt_embeds"].shape[1],
            guard=last.guard,
        )
        phases.phases_ms = {"load": 0.0, "text": 0.0}


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
