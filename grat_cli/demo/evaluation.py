"""What a demo pipeline has learned: its loss on scenes it never saw, and a sheet of pictures to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.architecture import TOKEN_PIXELS
from grat_cli.demo.picture_flow import image_positions
from grat_cli.demo.scenes import draw_scene
from grat_cli.demo.shards import HELD_OUT_SEED, EncodedScenes, encode_scenes

if TYPE_CHECKING:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

SHEET_PROMPTS = (
    "a red fox in the snow",
    "a blue boat at night",
    "a yellow house in the forest",
    "a purple car in the city",
    "a white cat in a meadow",
    "an orange balloon in the sky",
    "a green tree in the desert",
    "a pink flower on the grass",
    "a black rabbit at sunset",
    "an orange fish on the sea",
    "a blue bird in the woods",
    "a yellow sun in the sky",
)
SHEET_COLUMNS = 4
SHEET_GAP = 4


def flow_loss(pipe: FluxPipeline, scenes: EncodedScenes, sigma: float, seed: int = 0) -> float:
    """Return the mean squared error of the predicted velocity at one noise level."""
    noise = torch.randn(scenes.latents.shape, generator=torch.Generator().manual_seed(seed))
    rows = round(scenes.latents.shape[1] ** 0.5)
    with torch.no_grad():
        velocity = pipe.transformer(
            hidden_states=torch.lerp(scenes.latents, noise, sigma),
            timestep=torch.full((len(scenes),), sigma),
            pooled_projections=scenes.pooled,
            encoder_hidden_states=scenes.prompt,
            txt_ids=torch.zeros(scenes.prompt.shape[1], 3),
            img_ids=image_positions(rows),
            return_dict=False,
        )[0]
    return (velocity - (noise - scenes.latents)).square().mean().item()


def held_out_losses(pipe: FluxPipeline, side: int, count: int, sigmas: tuple[float, ...]) -> dict[str, list[float]]:
    """Return the loss at each noise level on scenes that training never draws.

    Keys say which caption the model was given: each scene's own ("right"), another scene's ("wrong") or "empty".
    """
    scenes = [draw_scene(HELD_OUT_SEED + number, side) for number in range(count)]
    captions = [scene.caption for scene in scenes]
    given = {"right": captions, "wrong": captions[1:] + captions[:1], "empty": [""] * count}
    losses = {}
    for name, chosen in given.items():
        encoded = encode_scenes(pipe, scenes, chosen)
        losses[name] = [flow_loss(pipe, encoded, sigma) for sigma in sigmas]
    return losses


def use_positions_of(pipe: FluxPipeline, side: int) -> None:
    """Make the pipeline draw at `side` pixels with the positions that training uses there."""
    if side != DEMO_FLUX.native_side:
        positions = image_positions(side // TOKEN_PIXELS)
        pipe._prepare_latent_image_ids = lambda *_: positions  # pyright: ignore[reportAttributeAccessIssue]


def draw_samples(
    pipe: FluxPipeline,
    side: int = DEMO_FLUX.native_side,
    steps: int = DEMO_FLUX.steps,
    guidance: float = DEMO_FLUX.guidance,
    prompts: tuple[str, ...] = SHEET_PROMPTS,
) -> Image.Image:
    """Return a sheet of one picture per prompt, the number of the prompt being its seed."""
    use_positions_of(pipe, side)
    pipe.set_progress_bar_config(disable=True)
    pitch = side + SHEET_GAP
    rows = -(-len(prompts) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * pitch - SHEET_GAP, rows * pitch - SHEET_GAP))
    for number, prompt in enumerate(prompts):
        result: Any = pipe(
            prompt,
            negative_prompt="",
            true_cfg_scale=guidance,
            height=side,
            width=side,
            num_inference_steps=steps,
            max_sequence_length=DEMO_FLUX.text_tokens,
            generator=torch.Generator().manual_seed(number),
        )
        sheet.paste(result.images[0], (number % SHEET_COLUMNS * pitch, number // SHEET_COLUMNS * pitch))
    return sheet
