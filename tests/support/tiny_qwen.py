"""A tiny random Qwen-Image of the real diffusers and transformers classes, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

PIXELS_PER_TOKEN = 16
TEXT_CHANNELS = 32
LAYERS = 3
# As the models' own scheduler is set, Qwen/Qwen-Image, scheduler/scheduler_config.json.
SCHEDULE: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
_SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)


def transformer(**changes: Any) -> QwenImageTransformer2DModel:
    """3 layers, 2 heads of 16, random weights large enough that attention matters to the output."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": LAYERS,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_CHANNELS,
        "axes_dims_rope": (4, 6, 6),
    }
    model = QwenImageTransformer2DModel(**(config | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 if "to_" in name or "add_" in name else 1.5)
    return model


def autoencoder(channels: int = 4) -> AutoencoderKLQwenImage:
    """Random, 4 latent channels, 8 pixels per latent."""
    torch.manual_seed(1)
    scales: Any = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 1.0, 2.0]}
    return AutoencoderKLQwenImage(base_dim=channels, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **scales).eval()


def pipeline(kind: type[Any] = QwenImagePipeline, **components: Any) -> Any:
    """A pipeline without text encoder: pass prompt embeddings."""
    parts: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        "vae": autoencoder(),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer(),
    }
    if "Edit" in kind.__name__:
        parts["processor"] = None
    pipe = kind(**(parts | components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompt embeddings of samples of such lengths, padded to the longest, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    embeddings = torch.randn(len(lengths), max(lengths), TEXT_CHANNELS, generator=generator)
    return {"prompt_embeds": embeddings, "prompt_embeds_mask": mask.long()}


def negative_prompt(*lengths: int) -> dict[str, torch.Tensor]:
    """Random negative prompt embeddings."""
    return {f"negative_{name}": tensor for name, tensor in prompt(*lengths, seed=9).items()}


def inputs(grid: tuple[int, ...], *lengths: int, references: tuple[tuple[int, int], ...] = ()) -> dict[str, Any]:
    """Keyword arguments of one transformer call on a grid of rows and columns of tokens.

    Args:
        grid: of the image.
        lengths: valid text tokens of each sample, 7 of one by default.
        references: grids of pictures to refer to.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = lengths or (7,)
    text = prompt(*lengths)
    shapes = [(1, *grid), *((1, *reference) for reference in references)]
    tokens = sum(rows * columns for _, rows, columns in shapes)
    return {
        "hidden_states": torch.randn(len(lengths), tokens, 16, generator=generator),
        "encoder_hidden_states": text["prompt_embeds"],
        "encoder_hidden_states_mask": text["prompt_embeds_mask"],
        "timestep": torch.full((len(lengths),), 0.7),
        "img_shapes": [shapes] * len(lengths),
        "return_dict": False,
    }


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise of large spots."""
    spots = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int, height: int) -> Image.Image:
    """White in its right half."""
    halves = np.zeros((height, width), np.uint8)
    halves[:, width // 2 :] = 255
    return Image.fromarray(halves)


def tokenizer() -> Qwen2Tokenizer:
    """A token for each byte, and the special ones."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made: Any = Qwen2Tokenizer(vocab=letters, merges=[])
    made.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    return made


def text_encoder(words: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers for text and one for pictures, random."""
    torch.manual_seed(2)
    number = words.convert_tokens_to_ids
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": TEXT_CHANNELS,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": len(words),
                "max_position_embeddings": 4096,
                "rope_parameters": {
                    "type": "default",
                    "rope_type": "default",
                    "mrope_section": [2, 3, 3],
                    "rope_theta": 1e6,
                },
                "bos_token_id": None,
                "eos_token_id": words.eos_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": TEXT_CHANNELS,
                "fullatt_block_indexes": [0],
            },
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save(folder: Path, edits: str | None = None) -> Path:
    """A whole pipeline in a folder, with text encoder and tokenizer.

    Args:
        folder: where.
        edits: class of a pipeline that edits, in whose layout the files lie; None for a `QwenImagePipeline`.
    """
    words = tokenizer()
    pipeline(tokenizer=words, text_encoder=text_encoder(words)).save_pretrained(folder)
    if edits:
        index = json.loads((folder / "model_index.json").read_text())
        index |= {"_class_name": edits, "processor": ["transformers", "Qwen2VLProcessor"]}
        (folder / "model_index.json").write_text(json.dumps(index))
        (folder / "processor").mkdir()
        seen = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
        seen |= {"temporal_patch_size": 2, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16}
        (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(seen))
    return folder
