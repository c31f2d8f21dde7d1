"""The parts of the demo's video pipeline, built from diffusers' and transformers' own classes.

Everything is seeded: the text encoders are never trained, so the same seed must give the same ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.demo.architecture import build_clip_encoder, build_clip_tokenizer
from grat_cli.demo.moving.scenes import known_words

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

LATENT_CHANNELS = 8
TOKEN_PIXELS = 16  # the autoencoder's 8 pixels times patches of 2
FRAMES_PER_LATENT = 4
PROMPT_CHANNELS = 64
POOLED_CHANNELS = 64
HEAD_CHANNELS = 64
TIME_SHIFT = 3.0  # of the scheduler; HunyuanVideo has 7 for its 118,800 tokens
CLIP_TOKENS = 77  # what the pipeline pads to, whatever the encoder
BEGIN, START_HEADER, END_HEADER, END_TURN = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def build_llama_tokenizer() -> Any:
    """Return a Llama tokenizer of whole words that splits the pipeline's prompt template into as many as Llama 3's.

    The pipeline cuts the first 95 tokens of "template + prompt" off: the template in Llama 3's tokens. Here the
    template has 95 tokens too, so that a stock pipeline call works as it stands.
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<unk>", BEGIN, START_HEADER, END_HEADER, END_TURN]
    template, length = str(DEFAULT_PROMPT_TEMPLATE["template"]), int(DEFAULT_PROMPT_TEMPLATE["crop_start"])
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("isolated")])
    instructions = re.sub(r"<\|\w+\|>|\{\}", " ", template.partition("{}")[0])
    words = [word for word, _ in splitter.pre_tokenize_str(instructions.lower())]
    specials_in_template = len(re.findall(r"<\|\w+\|>", template.partition("{}")[0]))
    missing = length - 1 - specials_in_template - len(words)  # one is the beginning of the text
    # What is missing comes from writing the longest words in two pieces.
    longest = sorted(set(words) - set(known_words()), key=lambda word: (-len(word), word))
    once = [word for word in longest if words.count(word) == 1][:missing]
    pieces = [piece for word in once for piece in (word[:4], "##" + word[4:])]
    vocabulary = dict.fromkeys([*specials, *known_words(), *(word for word in words if word not in once), *pieces])
    tokenizer = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>")  # pyright: ignore
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, specials.index(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END_TURN,
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=512,
    )


def build_llama_encoder(tokenizer: Any) -> Any:
    """Return a random Llama of four layers, of which the pipeline reads the output of the second."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=PROMPT_CHANNELS,
            intermediate_size=2 * PROMPT_CHANNELS,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        # The usual 0.02 would leave words a whisper beside what the transformer adds to them.
        for name, parameter in encoder.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 1.0 if "embed_tokens" in name else parameter.shape[1] ** -0.5)
    return encoder.eval()


def build_autoencoder() -> AutoencoderKLHunyuanVideo:
    """Return an untrained autoencoder: [B, 3, 4k+1, H, W] to [B, 8, k+1, H/8, W/8] and back.

    One normalisation group: with several, each loses the mean of its channels, and on flat art that is the colour.
    No attention in the middle: its cost grows with the square of a tile.
    """
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 32, 32),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def build_transformer() -> HunyuanVideoTransformer3DModel:
    """Return an untrained transformer, modulation and output starting at zero (DiT)."""
    import torch
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=3,
        attention_head_dim=HEAD_CHANNELS,
        num_layers=1,
        num_single_layers=4,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=PROMPT_CHANNELS,
        pooled_projection_dim=POOLED_CHANNELS,
        rope_axes_dim=(16, 24, 24),
    )
    for name, parameter in transformer.named_parameters():
        if name.startswith("proj_out") or ("norm" in name and ".linear." in name) or name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
    return transformer


def build_pipeline(seed: int = 0) -> HunyuanVideoPipeline:
    """Return an untrained pipeline in fp32; the same seed gives the same weights."""
    import torch
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(seed)
    llama_tokenizer = build_llama_tokenizer()
    clip_tokenizer = build_clip_tokenizer(known_words(), CLIP_TOKENS)
    pipe = HunyuanVideoPipeline(
        text_encoder=build_llama_encoder(llama_tokenizer),
        tokenizer=llama_tokenizer,
        transformer=build_transformer(),
        vae=build_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT),
        text_encoder_2=build_clip_encoder(clip_tokenizer, POOLED_CHANNELS, CLIP_TOKENS),
        tokenizer_2=clip_tokenizer,
    )
    # The model is shipped in bf16: what is never trained is rounded now, so that training sees what users run.
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.to(torch.bfloat16).float()
    return pipe


def load_pipeline(folder: Path) -> HunyuanVideoPipeline:
    """Load a pipeline folder in fp32."""
    import torch
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

    return HunyuanVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
