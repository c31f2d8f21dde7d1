"""What a trained video model can do: its loss on scenes it never saw, and strips of frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from grat_cli.demo import DEMO_HUNYUAN
from grat_cli.demo.moving.clips import NATIVE, draw_shard, encode_captions
from grat_cli.demo.shards import HELD_OUT_SEED

if TYPE_CHECKING:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

SAMPLE_PROMPTS = (
    "waves at night",
    "waves",
    "a red boat sailing at sunset",
    "a white boat at night",
    "a sun rising over the hills",
    "sunrise over the sea",
    "a blue ball bouncing",
    "a yellow ball bouncing at sunset",
    "snow falling in the forest",
    "snow falling at night",
)
FRAMES_SHOWN = 5


def held_out_losses(pipe: HunyuanVideoPipeline, count: int, sigmas: Sequence[float]) -> dict[str, list[float]]:
    """Return the mean squared error of the velocity on held-out clips, by caption (own, another's, none) and sigma."""
    clips = draw_shard(pipe, 0, NATIVE[0], HELD_OUT_SEED, count)
    latents = clips.latents.float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    empty = [part.expand(count, *part.shape[1:]) for part in encode_captions(pipe, [""])]
    own = [clips.prompt, clips.valid, clips.pooled]
    captions = {"own": own, "another's": [part.roll(1, 0) for part in own], "no": empty}
    losses = {}
    for name, (prompt, valid, pooled) in captions.items():
        losses[name] = []
        for sigma in sigmas:
            with torch.no_grad():
                velocity: Any = pipe.transformer(
                    hidden_states=torch.lerp(latents, noise, sigma),
                    timestep=torch.full((count,), sigma * 1000),
                    encoder_hidden_states=prompt,
                    encoder_attention_mask=valid,
                    pooled_projections=pooled,
                    return_dict=False,
                )
            losses[name].append((velocity[0] - (noise - latents)).square().mean().item())
    return losses


def draw_samples(pipe: HunyuanVideoPipeline, prompts: Sequence[str], steps: int, guidance: float) -> Image.Image:
    """Return a sheet with one row per prompt: frames of a sample, evenly spread over its time."""
    width, height = DEMO_HUNYUAN.width, DEMO_HUNYUAN.height
    sheet = Image.new("RGB", (width * FRAMES_SHOWN, height * len(prompts)))
    pipe.set_progress_bar_config(disable=True)
    for row, prompt in enumerate(prompts):
        result: Any = pipe(
            prompt,
            negative_prompt="",
            true_cfg_scale=guidance,
            height=height,
            width=width,
            num_frames=DEMO_HUNYUAN.frames,
            num_inference_steps=steps,
            max_sequence_length=DEMO_HUNYUAN.text_tokens,
            generator=torch.Generator().manual_seed(row),
            output_type="pil",
        )
        frames = result.frames[0]
        for column in range(FRAMES_SHOWN):
            frame = frames[column * (len(frames) - 1) // (FRAMES_SHOWN - 1)]
            sheet.paste(frame, (column * width, row * height))
    return sheet
