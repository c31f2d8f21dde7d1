"""Tiny random models of Wan, of the real diffusers and transformers classes, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_TOKENS = 512  # which stock cross-attention counts on where there are pictures
LAYERS = 2
CHANNELS = 4
KINDS = ("text", "two", "timed", "picture", "two pictures")
"""As Wan 2.1, 2.2 A14B, 2.2 TI2V-5B, 2.1 I2V and 2.2 I2V A14B."""


def transformer(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """2 layers, 2 heads of 12, random weights large enough that attention matters to the output."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": LAYERS,
        "rope_max_seq_len": 64,
    }
    model = WanTransformer3DModel(**(config | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(5 if "to_q" in name or "to_k" in name else 2)
    return model


def inputs(grid: tuple[int, ...], batch: int = 1, *, timed: bool = False, channels: int = CHANNELS) -> dict[str, Any]:
    """Keyword arguments of one transformer call on a grid of frames, rows and columns of tokens."""
    generator = torch.Generator().manual_seed(0)
    frames, rows, columns = grid
    timesteps = torch.full((batch,), 700)
    if timed:
        timesteps = torch.randint(0, 999, (batch, frames * rows * columns), generator=generator)
    return {
        "hidden_states": torch.randn(batch, channels, frames, 2 * rows, 2 * columns, generator=generator),
        "timestep": timesteps,
        "encoder_hidden_states": torch.randn(batch, 7, 16, generator=generator),
        "return_dict": False,
    }


def pipeline(kind: str = "text", seed: int = 1, **changes: Any) -> Any:
    """A whole random pipeline of one of `KINDS`: 8 pixels, or 16, and 4 frames per latent, 4 latent channels.

    Args:
        kind: of model.
        seed: of all weights.
        changes: to the pipeline's arguments.
    """
    torch.manual_seed(seed)
    from_picture, timed = "picture" in kind, kind == "timed"
    tokenizer: Any = _tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    own: dict[str, Any] = {"in_channels": 2 * CHANNELS + 4} if from_picture else {}
    if kind == "picture":
        own |= {"image_dim": 12, "added_kv_proj_dim": 24}
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": encoder.eval(),
        "vae": autoencoder(timed),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        "transformer": transformer(seed, **own),
        "expand_timesteps": timed,
    }
    if "two" in kind:
        parts |= {"transformer_2": transformer(seed + 1, **own), "boundary_ratio": 0.7}
    if kind == "picture":
        vision = CLIPVisionConfig(
            hidden_size=12, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        parts |= {
            "image_encoder": CLIPVisionModel(vision).eval(),
            "image_processor": CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        }
    pipe = (WanImageToVideoPipeline if from_picture else WanPipeline)(**(parts | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoencoder(coarse: bool = False, base: int = 4) -> AutoencoderKLWan:
    """Of 8 pixels per latent; of 16 if `coarse`, as that of TI2V-5B; with so many channels at its finest level."""
    own: dict[str, Any] = {}
    if coarse:
        own = {
            "decoder_base_dim": base + 2,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        }
    own["latents_mean"] = torch.linspace(-0.3, 0.4, CHANNELS).tolist()
    own["latents_std"] = torch.linspace(0.5, 2, CHANNELS).tolist()
    return AutoencoderKLWan(
        base_dim=base,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        **own,
    ).eval()


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """A picture to start from."""
    pixels = torch.randint(0, 255, (height // 8, width // 8, 3), generator=torch.Generator().manual_seed(2))
    return Image.fromarray(pixels.byte().numpy()).resize((width, height))


def save(folder: Path, kind: str = "text", **changes: Any) -> Path:
    """The pipeline in a folder."""
    pipeline(kind, **changes).save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of a few letters, in any language."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<pad>", "<unk>", "<end>", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="<unk>"))  # pyright: ignore
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=TEXT_TOKENS,
    )
