"""Tiny random Flux models of the real diffusers classes, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import load_model

PIXELS_PER_TOKEN = 8
TEXT_TOKENS = 6
DOUBLE_BLOCKS, SINGLE_BLOCKS = 1, 2
LAYERS = DOUBLE_BLOCKS + SINGLE_BLOCKS


def transformer(guidance: bool = False, **changes: Any) -> FluxTransformer2DModel:
    """3 layers, 2 heads of 16, random weights large enough that attention matters to the output."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": DOUBLE_BLOCKS,
        "num_single_layers": SINGLE_BLOCKS,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": guidance,
    }
    model = FluxTransformer2DModel(**(config | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 if "to_" in name or "add_" in name else 1.5)
    return model


def autoencoder() -> AutoencoderTiny:
    """Random, 4 latent channels, 4 pixels per latent."""
    torch.manual_seed(1)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    ).eval()


def autoencoder_of_distributions() -> AutoencoderKL:
    """Random, of the same size, of which pipelines draw latents."""
    torch.manual_seed(1)
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "shift_factor": 0.1,
        "scaling_factor": 0.4,
    }
    return AutoencoderKL(**config).eval()


def pipeline(kind: type[Any] = FluxPipeline, guidance: bool = False, **components: Any) -> Any:
    """A `FluxPipeline` or `FluxImg2ImgPipeline` without text encoders: pass prompt embeddings."""
    parts: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": autoencoder(),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "transformer": transformer(guidance),
    }
    pipe = kind(**(parts | components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(folder: Path, kind: type[Any], channels: int = 16) -> Path:
    """A pipeline in a folder, whose transformer reads so many channels: text encoders of the demo, all else random."""
    demo = load_model(choose_model("demo"), device=torch.device("cpu"), dtype=torch.float32).pipe
    parts = {name: part for name, part in demo.components.items() if name.startswith(("text", "token", "sched"))}
    widths = {"joint_attention_dim": 128, "pooled_projection_dim": 64}
    own = transformer(guidance=True, in_channels=channels, out_channels=16, **widths)
    kind(**parts, vae=autoencoder_of_distributions(), transformer=own).save_pretrained(folder)
    return folder


def image_to_image() -> FluxImg2ImgPipeline:
    """A tiny `FluxImg2ImgPipeline`."""
    return pipeline(FluxImg2ImgPipeline)


def prompt(batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompt embeddings as the pipelines take them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(batch, TEXT_TOKENS, 32, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, 32, generator=generator),
    }


def negative_prompt(batch: int = 1) -> dict[str, torch.Tensor]:
    """Random negative prompt embeddings."""
    return {f"negative_{name}": tensor for name, tensor in prompt(batch, seed=9).items()}


def inputs(rows: int, columns: int, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one transformer call on a grid of `rows` x `columns` tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, rows * columns, 16, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 32, generator=generator),
        "pooled_projections": torch.randn(batch, 32, generator=generator),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": FluxPipeline._prepare_latent_image_ids(batch, rows, columns, "cpu", torch.float32),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "return_dict": False,
    }
