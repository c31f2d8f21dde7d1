"""The parts of the demo's pipeline, built from diffusers' and transformers' own classes.

Everything is seeded: the text encoders are never trained, so the same seed must give the same ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.scenes import known_words

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

LATENT_CHANNELS = 4
TOKEN_PIXELS = 8  # the autoencoder's 4 pixels times the pipeline's 2x2 packing
PROMPT_CHANNELS = 128
POOLED_CHANNELS = 64
HEAD_CHANNELS = 64
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_PUNCTUATION = "'-.,"


def build_clip_tokenizer(words: list[str], length: int) -> Any:
    """Return a byte-level CLIP tokenizer for texts of `length` tokens that holds every one of `words` as one token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=CLIP_END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=[],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = dict(model["vocab"])
    # The trainer leaves out final bytes that end no known word; without them unknown words would be lost.
    for piece in [*(byte + "</w>" for byte in alphabet), CLIP_START, CLIP_END]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    options: dict[str, Any] = {"vocab": vocabulary, "merges": merges}
    return CLIPTokenizer(**options, model_max_length=length)


def build_t5_tokenizer() -> Any:
    """Return a T5 tokenizer with one piece per known word, and single characters for all others.

    A general tokenizer class, because T5's own drops the lower-casing when it is reloaded.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -4.0) for word in known_words()]
    pieces += [(character, -9.0) for character in "abcdefghijklmnopqrstuvwxyz0123456789" + T5_PUNCTUATION]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=DEMO_FLUX.text_tokens,
    )


def build_clip_encoder(tokenizer: Any, channels: int, length: int) -> Any:
    """Return a random CLIP text encoder of so many channels for texts of `length` tokens.

    Its pooled output depends on the caption.

    With the default initialisation the state at the end token hardly does, so its weights are drawn larger.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=channels,
            intermediate_size=2 * channels,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=length,
            projection_dim=channels,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim != 2:
                continue
            if "embedding" in name:
                deviation = 0.1 if "position" in name else 1.0
            else:
                deviation = (2.0 if "v_proj" in name or "out_proj" in name else 1.0) * parameter.shape[1] ** -0.5
            parameter.normal_(0.0, deviation)
    return encoder.eval()


def build_t5_encoder(tokenizer: Any) -> Any:
    """Return a random T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=PROMPT_CHANNELS,
            d_kv=32,
            d_ff=2 * PROMPT_CHANNELS,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
            use_cache=False,
        )
    ).eval()


def build_autoencoder() -> AutoencoderTiny:
    """Return an untrained autoencoder: [B, 3, H, W] to [B, 4, H/4, W/4] and back."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_transformer() -> FluxTransformer2DModel:
    """Return an untrained transformer of 3.8 million parameters, modulation and output starting at zero (DiT)."""
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=HEAD_CHANNELS,
        num_attention_heads=3,
        joint_attention_dim=PROMPT_CHANNELS,
        pooled_projection_dim=POOLED_CHANNELS,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    for name, parameter in transformer.named_parameters():
        if name.startswith("proj_out") or ("norm" in name and ".linear." in name) or name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the flow-matching scheduler with Flux's shift by token count."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """Return an untrained pipeline in fp32; the same seed gives the same weights."""
    import torch
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    torch.manual_seed(seed)
    length = DEMO_FLUX.text_tokens
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(known_words(), length), build_t5_tokenizer()
    return FluxPipeline(
        scheduler=build_scheduler(),
        vae=build_autoencoder(),  # pyright: ignore[reportArgumentType]
        text_encoder=build_clip_encoder(clip_tokenizer, POOLED_CHANNELS, length),
        tokenizer=clip_tokenizer,
        text_encoder_2=build_t5_encoder(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(),
    )


def load_pipeline(folder: Path) -> FluxPipeline:
    """Load a pipeline folder in fp32, which is what a CPU computes fastest at this size.

    Loads what `FluxPipeline.from_pretrained` loads, part by part: that would warn that the autoencoder is not an
    `AutoencoderKL`, though an `AutoencoderTiny` has everything the pipeline asks of it.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast, T5EncoderModel

    def load(loader: Any, part: str, **options: Any) -> Any:
        return loader.from_pretrained(folder, subfolder=part, local_files_only=True, **options)

    return FluxPipeline(
        scheduler=load(FlowMatchEulerDiscreteScheduler, "scheduler"),
        vae=load(AutoencoderTiny, "vae").float(),
        text_encoder=load(CLIPTextModel, "text_encoder", dtype=torch.float32),
        tokenizer=load(CLIPTokenizer, "tokenizer"),
        text_encoder_2=load(T5EncoderModel, "text_encoder_2", dtype=torch.float32),
        tokenizer_2=load(PreTrainedTokenizerFast, "tokenizer_2"),
        transformer=load(FluxTransformer2DModel, "transformer").float(),
    )


def save_pipeline(pipe: Any, folder: Path, *, half: bool) -> None:
    """Write a pipeline folder of either demo in place of what was there; `half` stores the weights in bf16."""
    import torch

    if half:
        pipe = pipe.to(torch.bfloat16)
    pipe.vae.to(memory_format=torch.contiguous_format)
    # Loaded weights may still be read from the folder's files, so they are only replaced once all is written.
    partial = folder.with_name(folder.name + ".partial")
    pipe.save_pretrained(partial)
    # Drop how the parts were loaded, and an entry that AutoencoderTiny writes but warns about when it reads it.
    for configuration in (partial / "model_index.json", *partial.glob("*/*config.json")):
        entries = json.loads(configuration.read_text())
        for entry in ("_name_or_path", "is_local", "local_files_only"):
            entries.pop(entry, None)
        if entries.get("_class_name") == "AutoencoderTiny":
            entries.pop("block_out_channels", None)
        configuration.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
