"""A tiny random HunyuanVideo-1.5 of the real diffusers and transformers classes, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5_image2video import (
    HunyuanVideo15ImageToVideoPipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

LAYERS = 2
TEXT_TOKENS, QUOTED_TOKENS, PICTURE_TOKENS = 7, 5, 4
LATENT_CHANNELS = 4
# What the pipeline cuts off before a prompt, and the most tokens of one here, where the real pipeline has 1000.
TEMPLATE_TOKENS, PROMPT_ROOM = 108, 24


def transformer(**changes: Any) -> HunyuanVideo15Transformer3DModel:
    """2 layers, 2 heads of 16, random weights large enough that attention matters to the output."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "in_channels": 2 * LATENT_CHANNELS + 1,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": LAYERS,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "text_embed_2_dim": 16,
        "image_embed_dim": 8,
        "rope_axes_dim": (4, 6, 6),
        "target_size": 64,
        "task_type": "t2v",
    }
    model = HunyuanVideo15Transformer3DModel(**(config | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 if "to_" in name or "add_" in name else 1.5)
    return model


def inputs(
    grid: tuple[int, ...],
    valid: tuple[int, ...] = (TEXT_TOKENS,),
    quoted: tuple[int, ...] | None = None,
    *,
    picture: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of one transformer call on a grid of frames, rows and columns of tokens.

    Args:
        grid: tokens per axis.
        valid: valid tokens of each sample's prompt.
        quoted: likewise of the text that it quotes; None for none.
        picture: whether there is a picture.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def mask(lengths: tuple[int, ...], room: int) -> torch.Tensor:
        return (torch.arange(room)[None, :] < torch.tensor(lengths)[:, None]).float()

    batch = len(valid)
    pictures = normal(batch, PICTURE_TOKENS, 8)
    return {
        "hidden_states": normal(batch, 2 * LATENT_CHANNELS + 1, *grid),
        "timestep": torch.full((batch,), 700.0),
        "encoder_hidden_states": normal(batch, TEXT_TOKENS, 32),
        "encoder_attention_mask": mask(valid, TEXT_TOKENS),
        "encoder_hidden_states_2": normal(batch, QUOTED_TOKENS, 16),
        "encoder_attention_mask_2": mask(quoted or (0,) * batch, QUOTED_TOKENS),
        "image_embeds": pictures if picture else torch.zeros_like(pictures),
        "return_dict": False,
    }


def pipeline(seed: int = 1, *, picture: bool = False, **changes: Any) -> Any:
    """A whole random pipeline: 16 pixels and 4 frames per latent, 4 latent channels.

    Args:
        seed: of all weights but the transformer's.
        picture: whether it starts from one.
        changes: to the transformer's configuration.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    autoencoder: Any = AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8, 8),  # pyright: ignore
        layers_per_block=1,
        scaling_factor=0.5,
    )
    qwen = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    byt5 = T5EncoderModel(
        T5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, vocab_size=384, feed_forward_proj="gated-gelu")
    )
    for module in (qwen, byt5):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    parts: dict[str, Any] = {
        "text_encoder": qwen.eval(),
        "tokenizer": tokenizer,
        "transformer": transformer(task_type="i2v" if picture else "t2v", **changes),
        "vae": autoencoder.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder_2": byt5.eval(),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }
    if picture:
        side = 16
        vision = SiglipVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=side,
            patch_size=side // 2,
        )
        parts["image_encoder"] = SiglipVisionModel(vision).eval()
        parts["feature_extractor"] = SiglipImageProcessorPil(size={"height": side, "width": side})
    pipe = (HunyuanVideo15ImageToVideoPipeline if picture else HunyuanVideo15Pipeline)(**parts)
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = PROMPT_ROOM, 16
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_frame(width: int, height: int) -> Image.Image:
    """A picture of two colours, running into one another."""
    ramp = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), Image.new("L", ramp.size, 90)))


def save(folder: Path, **changes: Any) -> Path:
    """The pipeline in a folder."""
    pipeline(**changes).save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of a few letters; the pipeline's own message is as many tokens as the pipeline cuts off."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<pad>", "<unk>", "<end>", "#", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="<unk>"))  # pyright: ignore
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="right",
    )
    before = "# " * TEMPLATE_TOKENS
    fast.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        f"{before}{{{{ message['content'] }}}} <end>"
        "{% endif %}{% endfor %}"
    )
    return fast
