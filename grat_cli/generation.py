"""Images from prompts: the main path, which reads from top to bottom in `generate_images`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grat_cli import image_coding
from grat_cli.checkpoints import load_model
from grat_cli.denoising import GenerationRecord, StepWatch, explained_backend_failures, memory_advice
from grat_cli.devices import choose_device, choose_dtype, device_name, forget_peak_memory, peak_memory, wait_for
from grat_cli.generation_request import Progress, check_size
from grat_cli.guidance import Guidance, choose_guidance
from grat_cli.image_request import ImageRequest, note_expectations, read_init_image
from grat_cli.installation import install
from grat_cli.time_shift import time_shift
from grat_cli.timing import Phases, StepRecorder

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class GeneratedImage(GenerationRecord):
    """A picture, and what there is to report about how it was made."""

    image: Image.Image


def generate_images(request: ImageRequest, progress: Progress) -> Iterator[GeneratedImage]:
    """Makes one image per seed; the model is loaded once.

    Raises:
        BadInput: if the request cannot be done, with what to change.
        ModelUnavailable: if the model is missing, gated or damaged.
        OutOfMemory: if the device has too little memory.
        NumericalFailure: if latents turn NaN or infinite, or the picture is one flat colour.
    """
    # 1. What can be refused before anything is loaded.
    check_size(request)
    device = choose_device(request.device)
    dtype = choose_dtype(request.dtype, device)
    init_image = read_init_image(request, progress)
    note_expectations(request, progress)
    size = f"{request.width}x{request.height}"
    phases = Phases(lambda: wait_for(device))
    forget_peak_memory(device)

    with memory_advice(request, device, size):
        # 2. Load.
        progress.phase("load")
        with phases("load"):
            model = load_model(
                request.model,
                device=device,
                dtype=dtype,
                offload=request.offload,
                image_to_image=init_image is not None,
                base=request.base,
            )
        pipe = model.pipe

        # 3. Encode the prompts, once for all seeds.
        guidance = choose_guidance(pipe, request.model, request.preset, request.negative_prompt)
        for note in guidance.notes:
            progress.note(note)
        progress.phase("text")
        with phases("text"):
            text = encode_text(pipe, request, guidance)

    for seed in request.seeds:
        with memory_advice(request, device, size):
            # 4. Denoise with GRAT attention installed.
            progress.phase("denoise")
            recorder, watch = StepRecorder(device), StepWatch(progress)
            token_side = pipe.vae_scale_factor * 2
            image_tokens = (request.height // token_side) * (request.width // token_side)
            with (
                time_shift(pipe, image_tokens, request.preset.sampling.shift) as shift,
                install(
                    pipe, request.preset, height=request.height, width=request.width, observer=recorder
                ) as installation,
            ):
                with phases("denoise"):
                    latents = denoise(pipe, request, text | guidance.arguments, init_image, seed, watch)
                timesteps = pipe.scheduler.timesteps[pipe.scheduler.begin_index or 0 :].tolist()
            watch.raise_if_not_finite()

            # 5. Decode.
            progress.phase("decode")
            with phases("decode"):
                picture = decode(pipe, latents, request)

        # 6. Report.
        memory_bytes, memory_kind = peak_memory(device)
        yield GeneratedImage(
            image=picture,
            seed=seed,
            width=request.width,
            height=request.height,
            phases_ms=dict(phases.phases_ms),
            steps=recorder.steps(timesteps),
            peak_memory_bytes=memory_bytes,
            peak_memory_kind=memory_kind,
            backend=installation.backend.value,
            backend_reason=installation.backend_reason,
            preparation=installation.preparation,
            device=str(device),
            device_name=device_name(device),
            dtype=str(dtype).removeprefix("torch."),
            guidance=guidance.scale,
            shift=shift,
            model_revision=model.revision,
            schedule=installation.last_schedule,
            text_tokens=text["prompt_embeds"].shape[1],
        )
        phases.phases_ms = {"load": 0.0, "text": 0.0}


def encode_text(pipe: Any, request: ImageRequest, guidance: Guidance) -> dict[str, torch.Tensor]:
    """Embeddings of prompt and negative prompt, as the pipelines take them."""
    import torch

    def encode(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings, pooled, _ = pipe.encode_prompt(
            prompt=prompt, prompt_2=None, max_sequence_length=request.model.text_tokens
        )
        return embeddings, pooled

    with torch.no_grad():
        embeddings, pooled = encode(request.prompt)
        text = {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}
        if guidance.negative_prompt is not None:
            embeddings, pooled = encode(guidance.negative_prompt)
            text |= {"negative_prompt_embeds": embeddings, "negative_pooled_prompt_embeds": pooled}
    return text


def denoise(
    pipe: Any,
    request: ImageRequest,
    arguments: dict[str, Any],
    init_image: Image.Image | None,
    seed: int,
    watch: StepWatch,
) -> torch.Tensor:
    """Latents of one image, `[1, image tokens, channels]`."""
    import torch

    if init_image is not None:
        arguments = arguments | {"image": image_coding.encode(pipe, init_image), "strength": request.strength}
    with explained_backend_failures():
        return pipe(
            **arguments,
            height=request.height,
            width=request.width,
            num_inference_steps=request.preset.sampling.steps,
            # Noise is drawn on the CPU, so that a seed gives the same one on every device.
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            callback_on_step_end=watch,
        ).images


def decode(pipe: Any, latents: torch.Tensor, request: ImageRequest) -> Image.Image:
    """The picture of latents `[1, image tokens, channels]`; see `image_coding`."""
    unpacked = pipe._unpack_latents(latents, request.height, request.width, pipe.vae_scale_factor)
    return image_coding.to_picture(pipe, image_coding.decode(pipe, unpacked))
