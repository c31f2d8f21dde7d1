"""How much memory each phase of a run needs at its peak, by arithmetic alone.

What is counted is what the code really allocates: weights, and at the moments that matter the tensors that are alive at
once, in stock diffusers 0.42.1 and in grat's own adapters. What a moment holds is listed where it is computed. Guidance
with two transformer calls runs them one after the other, and takes one more prediction. Not counted: Python and its
libraries, the driver of a GPU, and what an allocator holds back; `hardware.Device` keeps room for these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from grat_cli.attention.context_parallel import shares
from grat_cli.estimates.hardware import has_convolutions
from grat_cli.families.autoencoders import Coding, Pixels
from grat_cli.families.shapes import Components, TextEncoderShape, TransformerCall, TransformerShape
from grat_cli.models.parallel import ALONE, Parallel
from grat_cli.presets.caches import Broadcast, Cache, Faster, FirstBlock, Mag, Taylor
from grat_cli.presets.over_steps import Keep
from grat_cli.presets.schema import chunk_for
from grat_kernels import Plan
from grat_kernels.candidates import Candidates
from grat_kernels.sdpa_division import PER_GATHERED_KEY, Ordered, divide

Phase = Literal["text", "encode", "denoise", "decode", "save"]
OffloadKind = Literal["none", "model", "group", "sequential"]
OFFLOAD_KINDS = ("none", "model", "group", "sequential")
PHASES: tuple[Phase, ...] = ("text", "encode", "denoise", "decode", "save")

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes per weight of a quantized matrix, scales included: one fp32 scale per row of int8 and fp8, which is next to
# nothing, and one per 64 weights of nf4 (QLoRA, arXiv 2305.14314, section 3).
QUANTIZED_BYTES: Mapping[str, float] = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}

# Bytes per weight of a matrix of a GGUF file while it is turned back for a product: what its blocks are taken apart
# into, and the matrix in 16 bits and in the dtype of the run.
_TURNED_BACK = 8

# Rows of pixels that are turned to 8 bits at once.
_PICTURE_BAND = 1024

# sdpa_backend's own bounds on keys and values gathered at once.
_CPU_GATHER, _DEVICE_GATHER = 1 << 20, 256 << 20
# Those of choosing on scores that are held at once, and the bytes of a group and block while blocks are put in order.
_CPU_SCORES, _DEVICE_SCORES, _SORTING = 1 << 20, 256 << 20, 32
# torch's attention on a CPU keeps for each thread a tile of scores and of outputs in fp32, of 256 queries and 512 keys
# (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
_SCORE_TILE = 256, 512


@dataclass(frozen=True)
class Execution:
    """How a run uses its device.

    Attributes:
        dtype: of the transformer's weights and activations.
        on_cpu: whether it runs on the CPU.
        offload: which weights are on the device when: `none` all; `model` one part at a time; `group` two blocks;
            `sequential` one layer.
        quantize: `none`, or how matrices of the transformer and of large text encoders are stored.
        cast: `none`, or how those of the transformer wait that diffusers casts.
        chunk_tokens: feed-forward in chunks of so many tokens; `auto`, or None for never.
        tile: side in pixels of the tiles that are decoded one by one; None for the default.
        kernel: whether attention is one of grat's own kernels, and what prepares it the fused one.
        autoencoder_dtype: where it differs.
        text_dtype: likewise.
        threads: of a CPU.
        keep: where attention that is carried over steps is kept; None for where the preset says.
        parallel: how GPUs share its denoising; this is each of them.
        shards_weights: whether each of those that share a call has a share of the transformer's weights.
    """

    dtype: str = "bfloat16"
    on_cpu: bool = False
    offload: OffloadKind = "none"
    quantize: str = "none"
    cast: str = "none"
    chunk_tokens: int | Literal["auto"] | None = "auto"
    tile: int | None = None
    kernel: bool = True
    autoencoder_dtype: str | None = None
    text_dtype: str | None = None
    threads: int = 1
    keep: Keep | None = None
    parallel: Parallel = ALONE
    shards_weights: bool = False

    @property
    def element(self) -> int:
        """Bytes of an activation of the transformer."""
        return DTYPE_BYTES[self.dtype]

    @property
    def autoencoder_element(self) -> int:
        """Bytes of an activation of the autoencoder."""
        return DTYPE_BYTES[self.autoencoder_dtype or self.dtype]

    @property
    def coding(self) -> Coding:
        """How the autoencoder runs."""
        own = has_convolutions(self.autoencoder_dtype or self.dtype)
        return Coding(self.autoencoder_element, self.on_cpu, self.tile, own)

    @property
    def fused(self) -> bool:
        """Whether norms, rotation and joining are one kernel: not where hooks move the norms' weights."""
        return self.kernel and not self.on_cpu and self.offload in ("none", "model")

    def own(self, tokens: int) -> int:
        """Of so many tokens besides text those of the GPU that has most."""
        return max(shares(tokens, self.parallel.cp))

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


def run_memory(
    components: Components,
    size: Pixels,
    plans: Iterable[Plan],
    execution: Execution,
    *,
    guided_twice: bool = False,
    encodes: bool = False,
    lets_go: bool = False,
    cache: Cache | None = None,
    kept: float = 0.0,
) -> RunMemory:
    """What a run needs, or one stage of a run over several sizes.

    Args:
        components: parts of the pipeline.
        size: of the picture or video.
        plans: the attention plans of all steps and layers, or of the stage's.
        execution: how it uses its device.
        guided_twice: whether guidance takes a second transformer call per step.
        encodes: whether the stage begins with a picture, which is encoded.
        lets_go: whether parts are let go of once the run is done with them, where they are not offloaded.
        cache: what keeps attention or blocks from step to step.
        kept: bytes on the device where attention is carried over steps.
    """
    weights = component_weights(components, execution)
    decoding = _peak_of(components.autoencoder.decode_moments(size, execution.coding))
    activations, moment = _peak_of(denoise_moments(components, list(plans), execution, guided_twice, cache))
    saving = _peak_of(save_moments(size, execution))
    resident = _resident(_held(weights, components, execution), components, execution, lets_go)
    phases = [PhaseMemory("text", resident["text"], *_peak_of(_text_moments(components, execution)))]
    if encodes:
        encoding = _peak_of(components.autoencoder.encode_moments(size, execution.coding))
        phases.append(PhaseMemory("encode", resident["autoencoder"], *encoding))
    phases.append(PhaseMemory("denoise", resident["denoise"], activations + kept, moment))
    phases.append(PhaseMemory("decode", resident["decode"], *decoding))
    if execution.on_cpu:
        phases.append(PhaseMemory("save", resident["decode"], *saving))
    offloaded = 0.0 if execution.offload == "none" or execution.on_cpu else sum(weights.values())
    return RunMemory(tuple(phases), offloaded)


def _peak_of(moments: Mapping[str, float]) -> tuple[float, str]:
    moment = max(moments, key=lambda name: moments[name])
    return moments[moment], moment


# ---- Weights


def component_weights(components: Components, execution: Execution) -> dict[str, float]:
    """Bytes of the weights of `text`, `transformer`, or all of those that take turns, and `autoencoder`."""
    transformer, element = components.transformer, execution.element
    # Matrices of the blocks are quantized, what is outside of them is not.
    small = transformer.parameters - transformer.other_parameters
    of_small = QUANTIZED_BYTES.get(execution.quantize, element)
    if execution.cast != "none":
        small, of_small = transformer.cast_parameters, QUANTIZED_BYTES[execution.cast]
    size = small * of_small + (transformer.parameters - small) * element
    if components.transformer_bytes is not None:
        size = components.transformer_bytes
    return {
        "text": sum(_encoder_weights(encoder, execution) for encoder in components.text_encoders),
        "transformer": components.transformers * size + components.added * element,
        "autoencoder": components.autoencoder.parameters * execution.autoencoder_element,
    }


# A text encoder with more weights than this is quantized with the transformer.
_LARGE_ENCODER = 10**9


def _encoder_weights(encoder: TextEncoderShape, execution: Execution) -> float:
    element: float = DTYPE_BYTES[execution.text_dtype or execution.dtype]
    if encoder.parameters > _LARGE_ENCODER:
        element = QUANTIZED_BYTES.get(execution.quantize, element)
    return encoder.parameters * element


def _held(weights: Mapping[str, float], components: Components, execution: Execution) -> Mapping[str, float]:
    """The same of one of the GPUs that share them: its share, and of the block at work and the next one all."""
    if not execution.shards_weights:
        return weights
    transformer = components.transformer
    of_weight = weights["transformer"] / (components.transformers * transformer.parameters)
    held = weights["transformer"] / execution.parallel.cp + 2 * transformer.largest_block * of_weight
    return {**weights, "transformer": min(held, weights["transformer"])}


def _resident(
    weights: Mapping[str, float], components: Components, execution: Execution, lets_go: bool
) -> dict[str, float]:
    """Bytes of weights on the device in each phase."""
    everything = sum(weights.values())
    encoders = [_encoder_weights(encoder, execution) for encoder in components.text_encoders]
    if execution.offload == "none" or execution.on_cpu:
        if not lets_go:
            return dict.fromkeys(("text", "autoencoder", "denoise", "decode"), everything)
        # Text encoders after the text, transformers after denoising, and what encodes pictures never.
        of_pictures = sum(
            size for encoder, size in zip(components.text_encoders, encoders, strict=True) if encoder.of_pictures
        )
        denoise = weights["transformer"] + weights["autoencoder"] + of_pictures
        return {
            "text": everything,
            "autoencoder": denoise,
            "denoise": denoise,
            "decode": weights["autoencoder"] + of_pictures,
        }
    if execution.offload == "model":
        return {
            "text": max(encoders, default=0.0),
            "autoencoder": weights["autoencoder"],
            "denoise": weights["transformer"] / components.transformers,
            "decode": weights["autoencoder"],
        }
    transformer = components.transformer
    share = weights["transformer"] / (components.transformers * transformer.parameters)
    layers = [encoder.layers for encoder in components.text_encoders]
    one_layer = max((size / (count + 1) for size, count in zip(encoders, layers, strict=True)), default=0.0)
    if execution.offload == "group":
        # The block at work and the one that is on its way, what is outside of blocks, and the autoencoder.
        outside = components.transformers * transformer.other_parameters
        return {
            "text": 2 * one_layer + weights["autoencoder"],
            "autoencoder": weights["autoencoder"],
            "denoise": (2 * transformer.largest_block + outside) * share + weights["autoencoder"],
            "decode": weights["autoencoder"],
        }
    # One module at a time.
    return {
        "text": max((one.width * one.vocabulary for one in components.text_encoders), default=0) * execution.element,
        "autoencoder": 0.0,
        "denoise": transformer.largest_matrix * share,
        "decode": 9 * max(components.autoencoder.channels) ** 2 * execution.autoencoder_element,
    }


# ---- Text


def _text_moments(components: Components, execution: Execution) -> dict[str, float]:
    """The largest layer of the largest encoder; nothing where the text is known and none is loaded."""
    element = DTYPE_BYTES[execution.text_dtype or execution.dtype]

    def layer(encoder: TextEncoderShape) -> float:
        hidden = encoder.tokens * encoder.width * element
        # Hidden states of all layers are kept, and in a layer query, key, value, output, residual and norm.
        attention = 6 * hidden + 2 * encoder.heads * encoder.tokens**2 * 4
        feed_forward = 3 * hidden + 3 * encoder.tokens * encoder.feed_forward * element
        return (encoder.layers + 1) * hidden + max(attention, feed_forward)

    return {"text encoder": max(map(layer, components.text_encoders), default=0.0)}


# ---- Denoising


def denoise_moments(
    components: Components,
    plans: list[Plan],
    execution: Execution,
    guided_twice: bool = False,
    cache: Cache | None = None,
) -> dict[str, float]:
    """Bytes besides weights at the moments of a denoising step that may be its peak."""
    shape = components.transformer
    moments: dict[str, float] = {}
    for plan in plans:
        turned_back = components.transformer_bytes is not None
        outside = _outside_blocks(shape, plan, len(plans), execution, guided_twice, turned_back)
        outside += cached_bytes(cache, shape, plan, execution.element, execution.own) * (1 + guided_twice)
        for moment, size in shape.moments(_call(shape, plan, execution)).items():
            moments[moment] = max(moments.get(moment, 0.0), outside + size)
    return moments


def cached_bytes(
    cache: Cache | None,
    shape: TransformerShape,
    plan: Plan,
    element: int,
    own: Callable[[int], int] = lambda tokens: tokens,
) -> float:
    """Bytes that a cache keeps from step to step, of one of the calls of a step.

    Args:
        cache: which.
        shape: of the transformer.
        plan: of the call.
        element: bytes of an activation.
        own: of so many tokens besides text those that a GPU has.
    """
    row, tokens = shape.width * element, own(plan.tokens - plan.text_len)
    image, joint = tokens * row, (tokens + plan.text_len) * row
    if isinstance(cache, FirstBlock):
        # The first block's output and residual, and what the others add to image and text.
        return image + 2 * joint
    if isinstance(cache, Mag):
        return 2 * image  # what blocks are given, and what they add
    if isinstance(cache, Taylor):
        if cache.use_lite_mode:
            return (cache.max_order + 1) * tokens * shape.token_channels * element
        kept = {"auto": element, "float32": 4}.get(cache.taylor_factors_dtype, 2) / element
        per_layer = 1 if shape.joins_text else 2  # attention to text is one more
        return (cache.max_order + 1) * shape.layers * per_layer * joint * kept
    if isinstance(cache, Broadcast | Faster):
        return (1 if isinstance(cache, Broadcast) else 2) * shape.layers * joint
    return 0.0


def _call(shape: TransformerShape, plan: Plan, execution: Execution) -> TransformerCall:
    row = shape.width * execution.element
    chunk = execution.chunk(plan.image_tokens)
    own = execution.own(plan.tokens - plan.text_len)
    return TransformerCall(
        image=own * row,
        text=plan.text_len * row,
        chunk=(chunk or 0) * row,
        chunked=chunk is not None,
        rotated=1 + 3 * (4 / execution.element),
        fused=execution.fused,
        summaries=plan.summaries.rows * row / execution.parallel.cp,
        attending=_attending_shared(shape, plan, execution, own),
    )


def _attending_shared(shape: TransformerShape, plan: Plan, execution: Execution, own: int) -> float:
    """Bytes that attention allocates where GPUs share it (`attention.context_parallel`): query, key and value of own
    heads and all tokens, beside them the same as they are sent and received, later what is attended."""
    if execution.parallel.cp == 1:
        return attending_bytes(shape, plan, execution)
    of_rank = replace(shape, heads=shape.heads // execution.parallel.cp)
    row, row_of_rank = shape.width * execution.element, of_rank.width * execution.element
    return 3 * plan.tokens * row_of_rank + max(2 * 3 * own * row, attending_bytes(of_rank, plan, execution))


def _outside_blocks(
    shape: TransformerShape,
    plan: Plan,
    plans: int,
    execution: Execution,
    guided_twice: bool,
    turned_back: bool,
) -> float:
    """What is alive all through a transformer call, besides hidden states."""
    element = execution.element
    latents = (plan.tokens - plan.text_len) * shape.token_channels * element  # references, where there are any, too
    prompt = plan.text_len * shape.text_channels * element
    # Latents, the same in group order, and with two calls per step the first one's prediction.
    total = latents * (2 + guided_twice) + prompt * (1 + guided_twice)
    rotated = plan.tokens if shape.rotates_text else plan.tokens - plan.text_len
    total += 2 * rotated * shape.head_dim * 4  # cosines and sines, fp32
    total += plans * 2 * plan.image_tokens * 8  # token order and its inverse, int64
    if turned_back:
        total += shape.largest_matrix * _TURNED_BACK
    return total + shape.pipeline_bytes(plan, element)


def attending_bytes(shape: TransformerShape, plan: Plan, execution: Execution) -> float:
    """Bytes that attention allocates: its output, and what the backend copies."""
    row = shape.width * execution.element
    out = plan.tokens * row
    if execution.kernel and not execution.on_cpu:
        return out + (sum(_choosing(shape, plan, plan.candidates, execution)) if plan.candidates else 0.0)
    if plan.candidates is not None:
        table, scores = _choosing(shape, plan, plan.candidates, execution)
        means = 2 * plan.summaries.rows * row
        attending = _attending_chosen(shape, plan, plan.candidates, execution) + _scratch(shape, execution)
        return out + means + table + max(scores, attending)
    if execution.on_cpu and (divided := divide(plan, PER_GATHERED_KEY)) is not None:
        return _attending_in_parts(shape, plan, divided, execution) + _scratch(shape, execution)
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
        else:
            batches[run.length, keys] = batches.get((run.length, keys), 0) + 1
    for (length, keys), runs in batches.items():
        together = min(runs, max(1, gathered_keys // keys))
        # Gathered queries, keys and values, then what they attended to.
        largest = max(largest, together * (2 * keys + 2 * length) * row)
    return out + source + largest + _scratch(shape, execution)


def _attending_in_parts(shape: TransformerShape, plan: Plan, divided: list[Ordered], execution: Execution) -> float:
    """Bytes that attention in parts allocates: what is merged, and the most that is made at once to be merged."""
    row, of_sums = shape.width * execution.element, shape.width // shape.head_dim * 4
    merged = plan.tokens * (shape.width * 4 + of_sums)
    moments = [plan.tokens * row if execution.element < 4 else 0, 2 * plan.summaries.rows * row]
    for order, parts in divided:
        queries = max((part.queries.stop - part.queries.start for part in parts), default=0)
        # A copy of keys and values, and attention to some of them, in fp32 as well where it is not.
        copied = 0 if order is None else 2 * plan.image_tokens * row
        moments.append(copied + queries * (row + of_sums) + (queries * shape.width * 4 if execution.element < 4 else 0))
    return merged + max(moments)


def _scratch(shape: TransformerShape, execution: Execution) -> float:
    """Bytes that torch's attention works in besides."""
    queries, keys = _SCORE_TILE
    return execution.threads * queries * (keys + shape.head_dim + 2) * 4 if execution.on_cpu else 0.0


def _choosing(shape: TransformerShape, plan: Plan, candidates: Candidates, execution: Execution) -> tuple[float, float]:
    """Bytes of the rows that all heads and groups choose, and of what scores and sorts blocks for some heads at once.

    Args:
        shape: of the transformer.
        plan: with candidates.
        candidates: of the plan.
        execution: how it is run.
    """
    groups, blocks = len(candidates.list_of_group), candidates.of_list.shape[1]
    heads = shape.width // shape.head_dim
    pairs = groups * blocks
    budget = _CPU_SCORES if execution.on_cpu else _DEVICE_SCORES
    at_once = min(heads, max(1, budget // (pairs * candidates.means * 4)))
    # Weights, and what a form makes of them; masses, order and slots of blocks; keys and values and their differences.
    scored = pairs * (2 * candidates.means * 4 + _SORTING) + blocks * candidates.means * shape.head_dim * 3 * 4
    means_of_queries = groups * shape.width * 4
    return heads * groups * candidates.width * 4, at_once * scored + means_of_queries


def _attending_chosen(shape: TransformerShape, plan: Plan, candidates: Candidates, execution: Execution) -> float:
    """Bytes that attention to chosen rows allocates besides its output and the rows, where keys are gathered."""
    element = execution.element
    keys = plan.span_lists.keys[candidates.list_of_group] + candidates.slots
    # Of one head: keys and values; rows and their biases; queries and what comes of them.
    held = 2 * (plan.tokens + plan.summaries.rows + plan.image_tokens) * shape.head_dim * element
    return (
        held
        + int(keys.sum()) * (4 + element)
        + (_CPU_GATHER * execution.threads if execution.on_cpu else _DEVICE_GATHER)
    )


# ---- Saving


def save_moments(size: Pixels, execution: Execution) -> dict[str, float]:
    """Bytes of main memory while pixels become a picture: fp32, 8 bits, and a band on its way from one to the other."""
    if size.frames > 1:
        return {"writing": size.count * execution.autoencoder_element}
    band = 3 * size.width * min(size.height, _PICTURE_BAND)
    return {"writing": size.count * (4 + 1) + band * 4 * 3}
