"""A tiny random HunyuanVideo of the real diffusers and transformers classes, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
    DEFAULT_PROMPT_TEMPLATE as PICTURE_TEMPLATE,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import HunyuanVideoImageToVideoPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TEXT_TOKENS = 7
TEXT_ROOM = 95 + 256  # the pipeline's own template and the longest prompt
DOUBLE_BLOCKS, SINGLE_BLOCKS = 1, 2
LAYERS = DOUBLE_BLOCKS + SINGLE_BLOCKS
PATCH = 2


def transformer(**changes: Any) -> HunyuanVideoTransformer3DModel:
    """3 layers, 2 heads of 16, random weights large enough that attention matters to the output."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": DOUBLE_BLOCKS,
        "num_single_layers": SINGLE_BLOCKS,
        "num_refiner_layers": 1,
        "patch_size": PATCH,
        "patch_size_t": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 24,
        "rope_axes_dim": (4, 6, 6),
    }
    model = HunyuanVideoTransformer3DModel(**(config | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 if "to_" in name or "add_" in name else 1.5)
    return model


def inputs(grid: tuple[int, ...], valid: tuple[int, ...] = (TEXT_TOKENS,), seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one transformer call on a grid of frames, rows and columns of tokens.

    Args:
        grid: tokens per axis.
        valid: valid text tokens of each sample.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    frames, rows, columns = grid
    batch = len(valid)
    mask = torch.arange(TEXT_TOKENS)[None, :] < torch.tensor(valid)[:, None]
    return {
        "hidden_states": torch.randn(batch, 4, frames, rows * PATCH, columns * PATCH, generator=generator),
        "timestep": torch.full((batch,), 700),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 32, generator=generator),
        "encoder_attention_mask": mask.float(),
        "pooled_projections": torch.randn(batch, 24, generator=generator),
        "guidance": torch.full((batch,), 6000.0),
        "return_dict": False,
    }


def pipeline(seed: int = 1, **changes: Any) -> HunyuanVideoPipeline:
    """A whole random pipeline: 8 pixels and 4 frames per latent, 4 latent channels.

    Args:
        seed: of all weights but the transformer's.
        changes: to the transformer's configuration.
    """
    torch.manual_seed(seed)
    # Typed as Any: stubs of diffusers want the very classes of the real checkpoint.
    tokenizer: Any = _tokenizer(TEXT_ROOM)
    clip_tokenizer: Any = _tokenizer(77)
    blocks: Any = (4, 4, 4, 4)
    autoencoder = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=blocks,
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=0.5,
    )
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=TEXT_ROOM,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=24,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=None,
            eos_token_id=clip_tokenizer.eos_token_id,
        )
    )
    for module in (llama, clip):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    pipe = HunyuanVideoPipeline(
        text_encoder=llama.eval(),
        tokenizer=tokenizer,
        transformer=transformer(**changes),
        vae=autoencoder.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder_2=clip.eval(),
        tokenizer_2=clip_tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_from_picture(seed: int = 1, condition: str = "token_replace") -> HunyuanVideoImageToVideoPipeline:
    """Likewise of image-to-video by token replacement, or by `latent_concat`."""
    parts = pipeline(seed, image_condition_type=condition, in_channels=9 if condition == "latent_concat" else 4)
    tokenizer: Any = _picture_tokenizer()
    llama: Any = parts.text_encoder.config.to_dict()
    side = 48  # 24 x 24 patches: as many tokens as the pipeline's own template has for a picture
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=side, patch_size=2
    )
    torch.manual_seed(seed)
    llava: Any = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**{**llama, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    llava.config.pad_token_id = tokenizer.pad_token_id
    for parameter in llava.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pipe = HunyuanVideoImageToVideoPipeline(
        text_encoder=llava.eval(),
        tokenizer=tokenizer,
        transformer=parts.transformer,
        vae=parts.vae,
        scheduler=parts.scheduler,
        text_encoder_2=parts.text_encoder_2,
        tokenizer_2=parts.tokenizer_2,
        image_processor=processor,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(folder: Path, **changes: Any) -> Path:
    """The pipeline in a folder."""
    pipeline(**changes).save_pretrained(folder)
    return folder


def _tokenizer(length: int) -> PreTrainedTokenizerFast:
    """Whole words of a few letters; the pipeline's own template is as many tokens as the pipeline cuts off."""
    template, cut = str(DEFAULT_PROMPT_TEMPLATE["template"]), int(DEFAULT_PROMPT_TEMPLATE["crop_start"])
    return _words(length, [(template.partition("{}")[0], "# " * cut)])


def _picture_tokenizer() -> PreTrainedTokenizerFast:
    """Likewise for the template of image-to-video: a picture and three ends of headers, where the pipeline has them."""
    template, cut = str(PICTURE_TEMPLATE["template"]), int(PICTURE_TEMPLATE["crop_start"])
    place, header = int(PICTURE_TEMPLATE["image_emb_start"]), "<|end_header_id|>"
    before, _, after = template.partition("{}")
    told = ["#"] * cut
    told[3], told[place], told[-2] = header, "<image>", header
    return _words(1024, [(before, " ".join(told) + " "), (after, f" # # # {header} #")], header, "<image>")


def _words(length: int, templates: list[tuple[str, str]], *special: str) -> PreTrainedTokenizerFast:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<pad>", "<unk>", "<end>", "#", *letters, *(f"##{letter}" for letter in letters), *special]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="<unk>"))  # pyright: ignore
    tokenizer.normalizer = normalizers.Sequence(
        [*(normalizers.Replace(old, new) for old, new in templates), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=length,
    )
