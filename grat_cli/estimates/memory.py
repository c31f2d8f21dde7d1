"""How much memory each phase of a run needs at its peak, by arithmetic alone.

What is counted is what the code really allocates: weights, and at the moments that matter the tensors that are alive at
once, in stock diffusers 0.42.1 and in grat's own adapters. What a moment holds is listed where it is computed. Guidance
with two transformer calls runs them one after the other, and takes one more prediction. Not counted: Python and its
libraries, the driver of a GPU, and what an allocator holds back; `hardware.Device` keeps room for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from grat_cli.estimates.components import AutoencoderShape, Components, TextEncoderShape, TransformerShape
from grat_cli.models.video_size import VideoSize
from grat_cli.presets.schema import chunk_for
from grat_kernels import Plan

Phase = Literal["text", "encode", "denoise", "decode", "save"]
OffloadKind = Literal["none", "model", "group", "sequential"]
OFFLOAD_KINDS = ("none", "model", "group", "sequential")
PHASES: tuple[Phase, ...] = ("text", "encode", "denoise", "decode", "save")

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes per weight of a quantized matrix, scales included: one fp32 scale per row of int8 and fp8, which is next to
# nothing, and one per 64 weights of nf4 (QLoRA, arXiv 2305.14314, section 3).
QUANTIZED_BYTES: Mapping[str, float] = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}

# Side in pixels of the tiles that large pictures are decoded in, and rows of pixels that are turned to 8 bits at once.
PICTURE_TILE, PICTURE_BAND = 1024, 1024
# As `time_estimate` has them: tiles and windows of frames of AutoencoderKLHunyuanVideo, in pixels and latents.
VIDEO_TILE, VIDEO_WINDOW, VIDEO_WINDOW_STEP = 256, 5, 3

# sdpa_backend's own bounds on keys and values gathered at once.
_CPU_GATHER, _DEVICE_GATHER = 1 << 20, 256 << 20
# torch's attention on a CPU keeps for each thread a tile of scores and of outputs in fp32, of 256 queries and 512 keys
# (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
_SCORE_TILE = 256, 512
# torch convolves fp32 on a CPU by way of columns, 27 numbers for each of a kernel of 3x3x3, where channels x frames x
# rows are no more than this, and else by oneDNN (ConvParams::use_mkldnn, aten/src/ATen/native/Convolution.cpp).
_SMALL_CONVOLUTION = 20_480


@dataclass(frozen=True)
class Execution:
    """How a run uses its device.

    Attributes:
        dtype: of the transformer's weights and activations.
        on_cpu: whether it runs on the CPU.
        offload: which weights are on the device when: `none` all; `model` one part at a time; `group` two blocks;
            `sequential` one layer.
        quantize: `none`, or how matrices of the transformer and of large text encoders are stored.
        chunk_tokens: feed-forward in chunks of so many tokens; `auto`, or None for never.
        tile: side in pixels of the tiles that are decoded one by one; None for the default.
        kernel: whether attention is one of grat's own kernels, and what prepares it the fused one.
        autoencoder_dtype: where it differs.
        text_dtype: likewise.
        threads: of a CPU.
    """

    dtype: str = "bfloat16"
    on_cpu: bool = False
    offload: OffloadKind = "none"
    quantize: str = "none"
    chunk_tokens: int | Literal["auto"] | None = "auto"
    tile: int | None = None
    kernel: bool = True
    autoencoder_dtype: str | None = None
    text_dtype: str | None = None
    threads: int = 1

    @property
    def element(self) -> int:
        """Bytes of an activation of the transformer."""
        return DTYPE_BYTES[self.dtype]

    @property
    def autoencoder_element(self) -> int:
        """Bytes of an activation of the autoencoder."""
        return DTYPE_BYTES[self.autoencoder_dtype or self.dtype]

    @property
    def fused(self) -> bool:
        """Whether norms, rotation and joining are one kernel: not where hooks move the norms' weights."""
        return self.kernel and not self.on_cpu and self.offload in ("none", "model")

    def chunk(self, image_tokens: int) -> int | None:
        """Tokens that blocks take at once, but for attention; None for all."""
        return chunk_for(self.chunk_tokens, image_tokens)


@dataclass(frozen=True)
class PhaseMemory:
    """What a phase needs.

    Attributes:
        phase: its name.
        weights: bytes of weights on the device.
        activations: bytes of all else at the peak.
        moment: what is happening then.
    """

    phase: Phase
    weights: float
    activations: float
    moment: str

    @property
    def peak(self) -> float:
        """Bytes on the device."""
        return self.weights + self.activations


@dataclass(frozen=True)
class RunMemory:
    """What a run needs.

    Attributes:
        phases: in order.
        offloaded: bytes of weights that wait in main memory where the run is on a GPU.
    """

    phases: tuple[PhaseMemory, ...]
    offloaded: float = 0.0

    @property
    def largest(self) -> PhaseMemory:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> float:
        """Bytes on the device at the peak of the run."""
        return self.largest.peak


@dataclass(frozen=True)
class Pixels:
    """Size of what comes out, in pixels and frames."""

    width: int
    height: int
    frames: int = 1

    @classmethod
    def of(cls, size: object) -> Pixels:
        """Of a `Resolution` or `VideoSize`."""
        return cls(size.width, size.height, size.frames if isinstance(size, VideoSize) else 1)  # pyright: ignore

    @property
    def count(self) -> int:
        """Numbers in three channels."""
        return 3 * self.width * self.height * self.frames


def run_memory(
    components: Components,
    size: Pixels,
    plans: Iterable[Plan],
    execution: Execution,
    *,
    guided_twice: bool = False,
    encodes: bool = False,
) -> RunMemory:
    """What a run needs, or one stage of a run over several sizes.

    Args:
        components: parts of the pipeline.
        size: of the picture or video.
        plans: the attention plans of all steps and layers, or of the stage's.
        execution: how it uses its device.
        guided_twice: whether guidance takes a second transformer call per step.
        encodes: whether the stage begins with a picture, which is encoded.
    """
    weights = component_weights(components, execution)
    of_video = components.autoencoder.kind == "video"
    decoding = _peak_of(decode_moments(components.autoencoder, size, execution))
    denoising = _peak_of(denoise_moments(components, list(plans), execution, guided_twice))
    saving = _peak_of(save_moments(size, execution))
    resident = _resident(weights, components, execution)
    phases = [PhaseMemory("text", resident["text"], *_peak_of(_text_moments(components, execution)))]
    if encodes:
        encoding = _peak_of(encode_moments(components.autoencoder, size, execution))
        phases.append(PhaseMemory("encode", resident["autoencoder"], *encoding))
    phases.append(PhaseMemory("denoise", resident["denoise"], *denoising))
    phases.append(PhaseMemory("decode", resident["decode"], *decoding))
    if execution.on_cpu:
        phases.append(PhaseMemory("save", resident["decode"], *saving))
    elif of_video:
        pass  # frames are written one by one, from main memory
    offloaded = 0.0 if execution.offload == "none" or execution.on_cpu else sum(weights.values())
    return RunMemory(tuple(phases), offloaded)


def _peak_of(moments: Mapping[str, float]) -> tuple[float, str]:
    moment = max(moments, key=lambda name: moments[name])
    return moments[moment], moment


# ---- Weights


def component_weights(components: Components, execution: Execution) -> dict[str, float]:
    """Bytes of the weights of `text`, `transformer` and `autoencoder`."""
    quantized = QUANTIZED_BYTES.get(execution.quantize)
    text_element = DTYPE_BYTES[execution.text_dtype or execution.dtype]
    return {
        "text": sum(_encoder_weights(encoder, execution) for encoder in components.text_encoders)
        if quantized
        else components.text_parameters * text_element,
        "transformer": _quantized(components.transformer, execution.element, quantized)
        if quantized
        else components.transformer.parameters * execution.element,
        "autoencoder": components.autoencoder.parameters * execution.autoencoder_element,
    }


# A text encoder with more weights than this is quantized with the transformer.
_LARGE_ENCODER = 10**9


def _encoder_weights(encoder: TextEncoderShape, execution: Execution) -> float:
    element = DTYPE_BYTES[execution.text_dtype or execution.dtype]
    quantized = QUANTIZED_BYTES[execution.quantize]
    return encoder.parameters * (quantized if encoder.parameters > _LARGE_ENCODER else element)


def _quantized(transformer: TransformerShape, element: int, quantized: float) -> float:
    """Matrices of the blocks are quantized, what is outside of them is not."""
    blocks = transformer.parameters - transformer.other_parameters
    return blocks * quantized + transformer.other_parameters * element


def _resident(weights: Mapping[str, float], components: Components, execution: Execution) -> dict[str, float]:
    """Bytes of weights on the device in each phase."""
    everything = sum(weights.values())
    encoders = [_encoder_bytes(encoder, execution) for encoder in components.text_encoders]
    if execution.offload == "none" or execution.on_cpu:
        if components.autoencoder.kind != "video":
            return dict.fromkeys(("text", "autoencoder", "denoise", "decode"), everything)
        # Of a video what is done with is let go of: text encoders after the text, the transformer after denoising.
        denoise = weights["transformer"] + weights["autoencoder"]
        return {"text": everything, "autoencoder": denoise, "denoise": denoise, "decode": weights["autoencoder"]}
    if execution.offload == "model":
        return {
            "text": max(encoders),
            "autoencoder": weights["autoencoder"],
            "denoise": weights["transformer"],
            "decode": weights["autoencoder"],
        }
    transformer = components.transformer
    share = weights["transformer"] / transformer.parameters
    block = max(
        transformer.double_parameters if transformer.double_blocks else 0,
        transformer.single_parameters if transformer.single_blocks else 0,
    )
    layers = [encoder.layers for encoder in components.text_encoders]
    one_layer = max(size / (count + 1) for size, count in zip(encoders, layers, strict=True))
    if execution.offload == "group":
        # The block at work and the one that is on its way, what is outside of blocks, and the autoencoder.
        return {
            "text": 2 * one_layer + weights["autoencoder"],
            "autoencoder": weights["autoencoder"],
            "denoise": (2 * block + transformer.other_parameters) * share + weights["autoencoder"],
            "decode": weights["autoencoder"],
        }
    # One module at a time: at most the largest matrix, a single block's output or a feed-forward's.
    matrix = (5 if transformer.single_blocks else 4) * transformer.width**2
    return {
        "text": max(encoder.width * 32_128 for encoder in components.text_encoders) * execution.element,
        "autoencoder": 0.0,
        "denoise": max(matrix, 6 * transformer.width**2) * share,
        "decode": 9 * max(components.autoencoder.channels) ** 2 * execution.autoencoder_element,
    }


def _encoder_bytes(encoder: TextEncoderShape, execution: Execution) -> float:
    if execution.quantize in QUANTIZED_BYTES:
        return _encoder_weights(encoder, execution)
    return encoder.parameters * DTYPE_BYTES[execution.text_dtype or execution.dtype]


# ---- Text


def _text_moments(components: Components, execution: Execution) -> dict[str, float]:
    """The largest layer of the largest encoder."""
    element = DTYPE_BYTES[execution.text_dtype or execution.dtype]

    def layer(encoder: TextEncoderShape) -> float:
        hidden = encoder.tokens * encoder.width * element
        # Hidden states of all layers are kept, and in a layer query, key, value, output, residual and norm.
        attention = 6 * hidden + 2 * encoder.heads * encoder.tokens**2 * 4
        feed_forward = 3 * hidden + 3 * encoder.tokens * encoder.feed_forward * element
        return (encoder.layers + 1) * hidden + max(attention, feed_forward)

    return {"text encoder": max(layer(encoder) for encoder in components.text_encoders)}


# ---- Denoising


@dataclass(frozen=True)
class _Call:
    """A transformer call: bytes of hidden states, and what follows from the way it is run.

    Attributes:
        image: bytes of a hidden state of the image tokens.
        text: likewise of the text tokens.
        chunk: likewise of the tokens that a block takes at once, but for attention.
        chunked: whether that is not all of them.
        rotated: bytes while queries or keys are rotated by torch, per byte of them: what is stacked, and in fp32 two
            products and their sum.
        fused: whether one kernel prepares attention.
        summaries: bytes of the far field's keys, and of its values.
        attending: bytes of attention besides its inputs, output included.
    """

    image: float
    text: float
    chunk: float
    chunked: bool
    rotated: float
    fused: bool
    summaries: float
    attending: float

    @property
    def joint(self) -> float:
        """Bytes of a hidden state of all tokens."""
        return self.image + self.text


def denoise_moments(
    components: Components, plans: list[Plan], execution: Execution, guided_twice: bool = False
) -> dict[str, float]:
    """Bytes besides weights at the moments of a denoising step that may be its peak."""
    shape = components.transformer
    moments: dict[str, float] = {}
    for plan in plans:
        outside = _outside_blocks(shape, plan, len(plans), execution, guided_twice)
        call = _call(shape, plan, execution)
        if shape.family == "flux":
            blocks = (("double", shape.double_blocks, _flux_double), ("single", shape.single_blocks, _flux_single))
        else:
            blocks = (
                ("double", shape.double_blocks, _hunyuan_double),
                ("single", shape.single_blocks, _hunyuan_single),
            )
        for name, count, of_block in blocks:
            if count:
                for moment, size in of_block(call).items():
                    key = f"{moment} of a {name} block"
                    moments[key] = max(moments.get(key, 0.0), outside + size)
    return moments


def _call(shape: TransformerShape, plan: Plan, execution: Execution) -> _Call:
    row = shape.width * execution.element
    chunk = execution.chunk(plan.image_tokens)
    return _Call(
        image=plan.image_tokens * row,
        text=plan.text_len * row,
        chunk=(chunk or 0) * row,
        chunked=chunk is not None,
        rotated=1 + 3 * (4 / execution.element),
        fused=execution.fused,
        summaries=plan.summaries.rows * row,
        attending=_attending(shape, plan, execution),
    )


def _outside_blocks(shape: TransformerShape, plan: Plan, plans: int, execution: Execution, guided_twice: bool) -> float:
    """What is alive all through a transformer call, besides hidden states."""
    element = execution.element
    latents = plan.image_tokens * shape.token_channels * element
    prompt = plan.text_len * shape.text_channels * element
    # Latents, the same in group order, and with two calls per step the first one's prediction.
    total = latents * (2 + guided_twice) + prompt * (1 + guided_twice)
    rotated = plan.tokens if shape.family == "flux" else plan.image_tokens
    total += 2 * rotated * shape.head_dim * 4  # cosines and sines, fp32
    total += plans * 2 * plan.image_tokens * 8  # token order and its inverse, int64
    if shape.family == "flux":
        # Positions of three numbers: the pipeline's, and in fp32 in group order, with text, and of the rotation.
        total += plan.image_tokens * 3 * (element + 4) + 2 * plan.tokens * 3 * 4
    else:
        total += latents  # the pipeline's, which are fp32 where the transformer is not
    return total


def _attending(shape: TransformerShape, plan: Plan, execution: Execution) -> float:
    """Bytes that attention allocates: its output, and what the backend copies."""
    row = shape.width * execution.element
    out = plan.tokens * row
    if execution.kernel and not execution.on_cpu:
        return out
    source = 0.0
    if plan.summaries.rows:
        # Keys and values are copied once to join the summaries.
        source = 2 * (plan.tokens + plan.summaries.rows) * row + (plan.tokens + plan.summaries.rows) * 4
    gathered_keys = (_CPU_GATHER * execution.threads if execution.on_cpu else _DEVICE_GATHER) // (2 * row)
    keys_of_list = plan.span_lists.keys
    largest = 0.0
    batches: dict[tuple[int, int], int] = {}
    for run in plan.query_runs:
        keys = int(keys_of_list[run.span_list])
        spans = plan.span_lists[run.span_list]
        if len(spans) == 1:
            largest = max(largest, run.length * row)  # keys are a slice
        elif keys > gathered_keys:
            largest = max(largest, (2 * keys + run.length) * row)  # a window of keys and values
        else:
            batches[run.length, keys] = batches.get((run.length, keys), 0) + 1
    for (length, keys), runs in batches.items():
        together = min(runs, max(1, gathered_keys // keys))
        # Gathered queries, keys and values, then what they attended to.
        largest = max(largest, together * (2 * keys + 2 * length) * row)
    scratch = 0.0
    if execution.on_cpu:
        queries, keys = _SCORE_TILE
        scratch = execution.threads * queries * (keys + shape.head_dim + 2) * 4
    return out + source + largest + scratch


def _attention(call: _Call, video: bool, apart: bool) -> dict[str, float]:
    """Moments of attention, besides what the block holds.

    Args:
        call: the transformer call.
        video: whether image tokens alone are rotated, before they are joined with text.
        apart: whether text and image are projected apart, so that joining copies query, key and value.
    """
    n, i = call.joint, call.image
    # Projections are let go of when attention begins; joint ones lend it their value.
    attention = {"attention": 3 * n + 2 * call.summaries * call.fused + call.attending}
    joined = 3 if apart else 2
    if call.fused:
        return attention | {"preparation": (3 + joined) * n + 2 * call.summaries}
    if video:
        # The rotated query, the normalised key, and what its rotation takes; then both, and all three joined.
        return attention | {
            "rotation of keys": 3 * n + (2 + call.rotated) * i,
            "joining of video and text": 3 * n + 2 * i + 3 * n,
        }
    # Queries and keys before rotation, the rotated query, and what the key's rotation takes.
    return attention | {"rotation of keys": (3 + joined + 1 + call.rotated) * n}


def _flux_double(call: _Call) -> dict[str, float]:
    n, i = call.joint, call.image
    held = 2 * n  # hidden states and their norms
    moments = {name: held + size for name, size in _attention(call, video=False, apart=True).items()}
    if call.chunked:
        return moments | _chunked_double(call)
    # Hidden states, what attention put out, gated and not, the sum, its norm; then twice the inner layer.
    return moments | {"feed-forward": 2 * n + 3 * i + 8 * i}


def _flux_single(call: _Call) -> dict[str, float]:
    n = call.joint
    if call.chunked:
        return _chunked_single(call, video=False)
    held = (1 + 1 + 1 + 4) * n  # hidden states, those of text and image joined, their norms, and the inner layer
    moments = {name: held + size for name, size in _attention(call, video=False, apart=False).items()}
    # What attention put out, it and the inner layer side by side, the projection of these, gated and not.
    return moments | {"projection": held + (1 + 5 + 1 + 1) * n}


def _hunyuan_double(call: _Call) -> dict[str, float]:
    n, i = call.joint, call.image
    held = 2 * n
    moments = {name: held + size for name, size in _attention(call, video=True, apart=True).items()}
    if call.chunked:
        return moments | _chunked_double(call)
    # Hidden states, what attention put out, the sum, its norm; then twice the inner layer.
    return moments | {"feed-forward": 4 * n + 8 * i}


def _hunyuan_single(call: _Call) -> dict[str, float]:
    n = call.joint
    if call.chunked:
        return _chunked_single(call, video=True)
    held = (1 + 1 + 1 + 4) * n
    moments = {name: held + size for name, size in _attention(call, video=True, apart=True).items()}
    # As in Flux, and what attention put out is joined from video and text.
    return moments | {"projection": held + (1 + 1 + 5 + 1 + 1) * n}


def _chunked_double(call: _Call) -> dict[str, float]:
    """The end of a double block in chunks; `adapters.chunking` makes them."""
    # Hidden states, what attention put out, the result; of a chunk the sum, its norm, and twice the inner layer.
    return {"feed-forward": 3 * call.joint + (1 + 1 + 8) * call.chunk}


def _chunked_single(call: _Call, video: bool) -> dict[str, float]:
    """A single block in chunks, which makes its inner layer after attention."""
    n = call.joint
    held = 3 * n  # hidden states, those of text and image joined, their norms
    moments = {name: held + size for name, size in _attention(call, video, apart=video).items()}
    # In place of norms the result, and what attention put out; of a chunk the inner layer, it and attention's side by
    # side, and their projection.
    return moments | {"projection": held + n + (4 + 5 + 1) * call.chunk}


# ---- Decoding, encoding, saving


def decode_moments(shape: AutoencoderShape, size: Pixels, execution: Execution) -> dict[str, float]:
    """Bytes besides weights at the peak of decoding."""
    if shape.kind == "video":
        return _video_decode_moments(shape, size, execution)
    element = execution.autoencoder_element
    tile = execution.tile or PICTURE_TILE
    tiled = size.width * size.height > tile**2
    side = (tile, tile) if tiled else (size.height, size.width)
    latents = size.width * size.height // shape.scale**2 * shape.latent_channels * element
    of_tile = _decoder_peak(shape, side[0] // shape.scale, side[1] // shape.scale, element)
    # Pixels are collected in main memory in fp32.
    collected = size.count * 4 if execution.on_cpu else 0
    return {"decoder": of_tile + 2 * latents + collected}


def encode_moments(shape: AutoencoderShape, size: Pixels, execution: Execution) -> dict[str, float]:
    """Bytes besides weights at the peak of encoding a picture."""
    element = execution.autoencoder_element
    tile = execution.tile or PICTURE_TILE
    tiled = size.width * size.height > tile**2
    high, wide = (tile, tile) if tiled else (size.height, size.width)
    latents = size.width * size.height // shape.scale**2 * shape.latent_channels * element
    pixels = size.count * 4 if execution.on_cpu else 0
    return {"encoder": _encoder_peak(shape, high, wide, element) + latents + pixels}


def save_moments(size: Pixels, execution: Execution) -> dict[str, float]:
    """Bytes of main memory while pixels become a picture: fp32, 8 bits, and a band on its way from one to the other."""
    if size.frames > 1:
        return {"writing": size.count * execution.autoencoder_element}
    band = 3 * size.width * min(size.height, PICTURE_BAND)
    return {"writing": size.count * (4 + 1) + band * 4 * 3}


def _convolution(inputs: float, outputs: float) -> float:
    """What a convolution takes besides its input: it, its output, and both once more in the kernel's own layout.

    oneDNN frees the input's copy before the plain output is made. cuDNN's kernels for 16-bit tensors want another
    layout as well, and copy in their workspace.
    """
    return max(inputs + outputs, 2 * outputs)


def _residual_block(inputs: float, outputs: float) -> float:
    """What a residual block of two convolutions takes besides its input."""
    return max(
        2 * inputs,
        inputs + _convolution(inputs, outputs),
        outputs + _convolution(outputs, outputs),
        (4 if inputs != outputs else 3) * outputs,
    )


def _decoder_peak(shape: AutoencoderShape, rows: int, columns: int, element: int) -> float:
    """Of the decoder of an AutoencoderKL or AutoencoderTiny on latents of a size."""
    places = rows * columns * element
    peak = 0.0
    if shape.kind == "tiny":
        for level, channels in enumerate(reversed(shape.channels)):
            plane = places * 4**level * channels
            # A block's input, what its first layers made, and a convolution.
            peak = max(peak, 2 * plane + _convolution(plane, plane))
            if level + 1 < len(shape.channels):
                peak = max(peak, 4 * plane + _convolution(4 * plane, 4 * plane))
        return peak
    previous = shape.channels[-1]
    for level, channels in enumerate(reversed(shape.channels)):
        place = places * 4**level
        first, plane = previous * place, channels * place  # a level's input is held until it ends
        peak = max(peak, first + _residual_block(first, plane), first + plane + _residual_block(plane, plane))
        if level + 1 < len(shape.channels):
            up = 4 * plane
            peak = max(peak, first + plane + up + _convolution(up, up))
        previous = channels
    return peak


def _encoder_peak(shape: AutoencoderShape, high: int, wide: int, element: int) -> float:
    """Of the encoder of an AutoencoderKL or AutoencoderTiny on a picture of a size; its first level is the largest."""
    plane = high * wide * element * shape.channels[0]
    picture = 3 * high * wide * element
    if shape.kind == "tiny":
        return picture + 2 * plane + _convolution(plane, plane)
    return picture + 2 * plane + _residual_block(plane, plane)


def _video_decode_moments(shape: AutoencoderShape, size: Pixels, execution: Execution) -> dict[str, float]:
    element, scale = execution.autoencoder_element, shape.scale
    tile = execution.tile or VIDEO_TILE
    latent_frames, rows, columns = (size.frames - 1) // 4 + 1, size.height // scale, size.width // scale
    windows = [latent_frames]
    if latent_frames > VIDEO_WINDOW - 1:
        windows = _parts(latent_frames, VIDEO_WINDOW, VIDEO_WINDOW_STEP)
    high, wide = [rows], [columns]
    if max(size.height, size.width) > tile:
        step = max(scale, tile * 3 // 4 // scale * scale)
        high, wide = (_parts(side, tile // scale, step // scale) for side in (rows, columns))
    frame = 3 * size.height * size.width * element
    overlapping = sum(high) * sum(wide) / (rows * columns)

    # Tiles are kept until a window is whole, windows until the video is; both overlap.
    held = 2.0 * latent_frames * rows * columns * shape.latent_channels * element
    decoding = 0.0
    for frames in windows:
        of_tile = max(_video_decoder_peak(shape, frames, h, w, execution) for h in set(high) for w in set(wide))
        decoded = frame * (4 * frames - 3)
        in_tiles = decoded * overlapping if len(high) * len(wide) > 1 else 0
        decoding = max(decoding, held + in_tiles + of_tile, held + in_tiles + decoded)
        held += decoded
    return {"decoder": decoding, "joining of windows": held + frame * size.frames * (len(windows) > 1)}


def _parts(whole: int, size: int, step: int) -> list[int]:
    """Lengths of the overlapping parts of something."""
    return [min(size, whole - start) for start in range(0, whole, step)]


def _video_decoder_peak(shape: AutoencoderShape, frames: int, rows: int, columns: int, execution: Execution) -> float:
    """Of the decoder of an AutoencoderKLHunyuanVideo on latents of a size."""
    element = execution.autoencoder_element
    in_columns = execution.on_cpu and element == 4

    def convolution(inputs: int, outputs: int) -> float:
        """Besides an input of so many channels; it is padded first."""
        plane = frames * rows * columns * element
        padded = inputs * (frames + 2) * (rows + 2) * (columns + 2) * element
        if in_columns and inputs * (frames + 2) * (rows + 2) <= _SMALL_CONVOLUTION:
            return padded + (27 * inputs + outputs) * plane
        return padded + max(padded + outputs * plane, 2 * outputs * plane)

    def residual_block(inputs: int, outputs: int) -> float:
        plane = frames * rows * columns * element
        return max(
            2 * inputs * plane,
            inputs * plane + convolution(inputs, outputs),
            outputs * plane + convolution(outputs, outputs),
            (3 if inputs == outputs else 4) * outputs * plane,
        )

    peak, previous = 0.0, shape.channels[-1]
    for level, channels in enumerate(reversed(shape.channels)):
        places = frames * rows * columns * element
        first, plane = previous * places, channels * places  # a level's input is held until it ends
        peak = max(peak, first + residual_block(previous, channels), first + plane + residual_block(channels, channels))
        if level < 3:  # eight pixels per latent; time is doubled at the last two of the three
            rows, columns = 2 * rows, 2 * columns
            frames = 2 * frames - 1 if level > 0 else frames
            up = channels * frames * rows * columns * element
            later = up * (frames - 1) / frames  # of all frames but the first, which is joined
            peak = max(peak, first + plane + later + up + convolution(channels, channels))
        previous = channels
    return peak
