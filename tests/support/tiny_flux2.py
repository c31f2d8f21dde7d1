"""Tiny random FLUX.2 models of the real diffusers classes, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PIXELS_PER_TOKEN = 16
TEXT_TOKENS, TEXT_CHANNELS = 6, 24
DOUBLE_BLOCKS, SINGLE_BLOCKS = 1, 2
LAYERS = DOUBLE_BLOCKS + SINGLE_BLOCKS
TOKEN_CHANNELS = 16


def transformer(guidance: bool = False, **changes: Any) -> Flux2Transformer2DModel:
    """3 layers, 2 heads of 16, random weights large enough that attention matters to the output."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": TOKEN_CHANNELS,
        "num_layers": DOUBLE_BLOCKS,
        "num_single_layers": SINGLE_BLOCKS,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_CHANNELS,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": guidance,
    }
    model = Flux2Transformer2DModel(**(config | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 if "to_" in name or "add_" in name else 1.5)
            else:  # weights of ones would hide that text took those of the image
                parameter.uniform_(0.5, 1.5)
    return model


def autoencoder() -> AutoencoderKLFlux2:
    """Random, 4 latent channels, 8 pixels per latent, with statistics of its latents that are no identity."""
    torch.manual_seed(1)
    levels: Any = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4, 4, 4, 4),
    }
    vae = AutoencoderKLFlux2(
        **levels, layers_per_block=1, latent_channels=TOKEN_CHANNELS // 4, norm_num_groups=2, sample_size=64
    ).eval()
    statistics: Any = vae.bn
    statistics.running_mean.uniform_(-0.5, 0.5)
    statistics.running_var.uniform_(0.5, 2.0)
    return vae


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As in black-forest-labs/FLUX.2-dev, file scheduler/scheduler_config.json."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, max_shift=1.15, base_shift=0.5)


def pipeline(kind: type[Any] = Flux2KleinPipeline, guidance: bool | None = None, **components: Any) -> Any:
    """A pipeline of FLUX.2 without a text encoder: pass prompt embeddings. dev embeds guidance, klein does not."""
    parts: dict[str, Any] = {
        "scheduler": scheduler(),
        "vae": autoencoder(),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer(kind is Flux2Pipeline if guidance is None else guidance),
    }
    pipe = kind(**(parts | components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompt embeddings as the pipelines take them."""
    generator = torch.Generator().manual_seed(seed)
    return {"prompt_embeds": torch.randn(batch, TEXT_TOKENS, TEXT_CHANNELS, generator=generator)}


def negative_prompt(batch: int = 1) -> dict[str, torch.Tensor]:
    """Random negative prompt embeddings."""
    return {f"negative_{name}": tensor for name, tensor in prompt(batch, seed=9).items()}


def inputs(
    rows: int, columns: int, *, batch: int = 1, references: tuple[tuple[int, int], ...] = (), seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of one transformer call on a grid of `rows` x `columns` tokens.

    Args:
        rows: of image tokens.
        columns: likewise.
        batch: samples.
        references: rows and columns of what the picture refers to.
        seed: of latents and text.
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = [(0, rows, columns), *((10 * number, *sides) for number, sides in enumerate(references, start=1))]
    ids = torch.cat(
        [
            torch.cartesian_prod(*map(torch.arange, (1, high, wide, 1))) + torch.tensor([time, 0, 0, 0])
            for time, high, wide in pictures
        ]
    )
    return {
        "hidden_states": torch.randn(batch, len(ids), TOKEN_CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, TEXT_CHANNELS, generator=generator),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": ids[None].expand(batch, -1, -1),
        "txt_ids": torch.cartesian_prod(*map(torch.arange, (1, 1, 1, TEXT_TOKENS)))[None].expand(batch, -1, -1),
        "return_dict": False,
    }


# Whole pipelines

_ENCODER_LAYERS = 31  # the pipelines take hidden states of the 9th, 18th and 27th, or 10th, 20th and 30th
_WORDS = ("<|endoftext|>", "<|user|>", "<|assistant|>")


def save(folder: Path, kind: type[Any] = Flux2KleinPipeline, is_distilled: bool = False) -> Path:
    """A whole random pipeline in a folder, of dev with Mistral and Pixtral, or of klein with Qwen."""
    torch.manual_seed(2)
    width = TEXT_CHANNELS // 3
    shape: dict[str, Any] = {
        "vocab_size": 256 + len(_WORDS),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": _ENCODER_LAYERS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": width,
    }
    settings: dict[str, Any] = {}
    if kind is Flux2Pipeline:
        pictures = {
            "model_type": "pixtral",
            "hidden_size": width,
            "intermediate_size": width,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "head_dim": width,
        }
        text: Any = {"model_type": "mistral", **shape}
        encoder: Any = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=pictures))
        tokenizer = _tokenizer("{% for message in messages %}<|user|>{{ message.content[0].text[-12:] }}{% endfor %}")
    else:
        settings["is_distilled"] = is_distilled
        encoder = Qwen3ForCausalLM(Qwen3Config(**shape))
        tokenizer = _tokenizer(
            "{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    pipeline(kind, text_encoder=encoder.eval(), tokenizer=tokenizer, **settings).save_pretrained(folder)
    if kind is Flux2Pipeline:  # the processor, which cannot be made without Torchvision, is saved over its tokenizer
        index = json.loads((folder / "model_index.json").read_text())
        index["tokenizer"][1] = "PixtralProcessor"
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _tokenizer(chat_template: str) -> Qwen2Tokenizer:
    """Of single bytes, and words for what templates hold."""
    letters = {letter: number for number, letter in enumerate([*sorted(ByteLevel.alphabet()), *_WORDS])}
    return Qwen2Tokenizer(
        vocab=letters, merges=[], additional_special_tokens=list(_WORDS[1:]), chat_template=chat_template
    )
