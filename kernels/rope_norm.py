"""RMS norm and rotary embedding of queries and keys, text and image joined, far field pooled: one pass over each.

After the projections, a transformer block normalises queries and keys, rotates their positions in, and joins text and
image; then far-field attention needs means of keys and values. Done one after the other that reads and writes every
tensor several times. Here each is read and written once, by a Triton kernel where one runs and else by torch, in the
same arithmetic: all in fp32, rounded to the tensors' dtype at the end. Stock diffusers rounds in between as well,
after the norm (torch.nn.RMSNorm, Flux) or before and after its weight (diffusers' RMSNorm, HunyuanVideo).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from grat_kernels.geometry import Grid, Grouping
from grat_kernels.launching import Launch, on_device, padded_head_dim, triton_obstacle
from grat_kernels.pattern import Block, Far, Union
from grat_kernels.plan import build_plan, plan_by_key
from grat_kernels.self_test import require_close
from grat_kernels.summaries import summarise

if TYPE_CHECKING:
    from grat_kernels.sequence import JointSequence

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256

# A run's tokens lie in the registers of one thread, which limits their bytes: 4 tokens of 16-bit dtypes.
_RUN_BYTES = 8
# How many tokens one program takes on at least, run after run.
_CHUNK_TOKENS = 32
# Heads of one program, which share its angles, and the channels of all of them at one token that fall to a warp: each
# thread has 16 bytes of a 16-bit dtype.
_HEADS = 8
_WARP_ELEMENTS = 256


class Projections(NamedTuple):
    """Query, key and value as projected, `[B, rows, H, D]` each, of any strides."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Norms(NamedTuple):
    """RMS norms of queries and keys.

    Attributes:
        query: weight of the norm of queries, `[D]`; None for a norm without weights.
        key: likewise.
        eps: added to the mean square; positive.
    """

    query: torch.Tensor | None
    key: torch.Tensor | None
    eps: float


class Joined(NamedTuple):
    """The joint sequence as `span_attention` takes it.

    Attributes:
        query: normalised and rotated, `[B, N, H, D]`.
        key: likewise.
        value: `[B, N, H, D]`: the one given where that was joint already.
        summaries: means of key and value over the plan's blocks, `[B, R, H, D]` each; None without far field.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    summaries: tuple[torch.Tensor, torch.Tensor] | None


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel cannot run, in words, or None where it can. Never raises.

    Args:
        device: where the tensors lie.
        dtype: dtype of query, key and value.
        head_dim: channels per head.
    """
    if dtype not in _DTYPES:
        return f"it takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not 2 <= head_dim <= _MAX_HEAD_DIM or head_dim % 2:
        return f"it takes even head dimensions up to {_MAX_HEAD_DIM}, not {head_dim}"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter cuts bfloat16 off instead of rounding: use float16 or float32 there"
    return triton_obstacle(device)


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    """Whether the kernel is the way to go, and why. Triton's interpreter is for tests and never chosen."""
    if device.type != "cuda":
        return False, f"the fused kernel is for CUDA and ROCm devices, not for {device.type}"
    reason = obstacle(device, dtype, head_dim)
    return reason is None, f"the fused kernel cannot run here: {reason}" if reason else "fused kernel"


def rope_norm(
    image: Projections,
    norms: Norms,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    plan: JointSequence,
    *,
    text: Projections | None = None,
    text_norms: Norms | None = None,
    fused: bool | None = None,
) -> Joined:
    """Normalises and rotates queries and keys, joins text and image, and pools the far field.

    Args:
        image: projections of the image tokens in the plan's order; without `text`, of the whole joint sequence.
        norms: norms of queries and keys of `image`.
        rotation: cosines and sines of each channel, `[rows, D]`, as `diffusers.models.embeddings.apply_rotary_emb`
            takes them with `use_real_unbind_dim=-1`: rows for the joint sequence (Flux), or for its image tokens
            alone, and then text is not rotated (HunyuanVideo). None for no rotation.
        plan: the order of the joint sequence and the blocks of its far field.
        text: projections of the text tokens where they are apart.
        text_norms: norms of queries and keys of `text`.
        fused: whether by the Triton kernel or by torch; by default what `choose` says.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit one another or the plan, or `fused` is wanted where the
            kernel cannot run.
    """
    _check(image, norms, rotation, plan, text, text_norms)
    device, dtype, head_dim = image.query.device, image.query.dtype, image.query.shape[3]
    if fused is None:
        fused, _ = choose(device, dtype, head_dim)
    elif fused and (reason := obstacle(device, dtype, head_dim)):
        raise ValueError(f"the fused kernel cannot run here: {reason}")
    text_norms = text_norms or norms
    cosines, sines = rotation or (None, None)
    made = _operator(
        *image,
        *(text or (None, None, None)),
        norms.query,
        norms.key,
        text_norms.query,
        text_norms.key,
        cosines,
        sines,
        norms.eps,
        text_norms.eps,
        plan.key,
        plan.summaries.rows,
        fused,
    )
    query, key, value = made[0], made[1], image.value if text is None else made[2]
    return Joined(query, key, value, (made[-2], made[-1]) if plan.summaries.rows else None)


def _check(
    image: Projections,
    norms: Norms,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    plan: JointSequence,
    text: Projections | None,
    text_norms: Norms | None,
) -> None:
    """Raises ValueError as `rope_norm` says."""
    if (text is None) != (text_norms is None):
        raise ValueError("text and text_norms go together: give both or neither")
    if plan.segments.tokens != plan.text_len:
        raise ValueError(f"the plan has tokens besides image and text, which are not prepared here: {plan.segments}")
    batch, _, heads, head_dim = image.query.shape
    rows = plan.tokens if text is None else plan.image_tokens
    expected = [("image" if text else "joint", image, rows)]
    if text is not None:
        expected.append(("text", text, plan.text_len))
    for name, projections, length in expected:
        shape = (batch, length, heads, head_dim)
        if any(tensor.shape != shape for tensor in projections):
            shapes = [tuple(tensor.shape) for tensor in projections]
            raise ValueError(f"the {name} query, key and value must be {shape} for this plan, not {shapes}")
    if head_dim % 2:
        raise ValueError(f"channels are rotated in pairs: the head dimension must be even, not {head_dim}")
    if not (norms.eps > 0 and (text_norms or norms).eps > 0):
        raise ValueError("eps must be positive: a token of zeros has no direction")
    tensors = [*image, *(text or ())]
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
        raise ValueError(f"projections must share one dtype, not {[tensor.dtype for tensor in tensors]}")
    weights = [weight for pair in (norms, text_norms or norms) for weight in pair[:2] if weight is not None]
    if any(weight.shape != (head_dim,) for weight in weights):
        raise ValueError(f"norm weights must be [{head_dim}], not {[tuple(weight.shape) for weight in weights]}")
    for table in rotation or ():
        if table.shape not in ((plan.tokens, head_dim), (plan.image_tokens, head_dim)):
            raise ValueError(
                f"cosines and sines must be [{plan.tokens}, {head_dim}], or [{plan.image_tokens}, {head_dim}] to "
                f"rotate image tokens alone, not {tuple(table.shape)}"
            )
    if rotation and rotation[0].shape != rotation[1].shape:
        raise ValueError(f"cosines {tuple(rotation[0].shape)} and sines {tuple(rotation[1].shape)} differ in shape")
    devices = {tensor.device for tensor in (*tensors, *weights, *(rotation or ()))}
    if len(devices) > 1:
        raise ValueError(f"projections, norm weights, cosines and sines must share one device, not {devices}")


@torch.library.custom_op("grat::rope_norm", mutates_args=())
def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    text_query: torch.Tensor | None,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    text_query_weight: torch.Tensor | None,
    text_key_weight: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    eps: float,
    text_eps: float,
    plan_key: int,
    summary_rows: int,
    fused: bool,
) -> list[torch.Tensor]:
    """The operator that torch.compile sees: query, key, value if text was apart, and summaries if there are any."""
    plan = plan_by_key(plan_key)
    text = None
    if text_query is not None and text_key is not None and text_value is not None:
        text = Projections(text_query, text_key, text_value)
    rotation = None if cosines is None or sines is None else (cosines, sines)
    sections = sections_of(
        Projections(query, key, value),
        Norms(query_weight, key_weight, eps),
        text,
        Norms(text_query_weight, text_key_weight, text_eps),
        rotation,
        plan,
    )
    outputs = empty_outputs(query, plan.tokens, summary_rows, text is not None)
    if fused:
        _check_kernel(query.device, query.dtype, query.shape[3])
        _launch(sections, outputs, plan)
    else:
        _compute(sections, outputs, plan)
    return [tensor for tensor in outputs if tensor is not None]


@_operator.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    text_query: torch.Tensor | None,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    text_query_weight: torch.Tensor | None,
    text_key_weight: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    eps: float,
    text_eps: float,
    plan_key: int,
    summary_rows: int,
    fused: bool,
) -> list[torch.Tensor]:
    tokens = query.shape[1] + (0 if text_query is None else text_query.shape[1])
    outputs = empty_outputs(query, tokens, summary_rows, text_query is not None)
    return [tensor for tensor in outputs if tensor is not None]


class Outputs(NamedTuple):
    """What is written, all contiguous.

    Attributes:
        query: `[B, N, H, D]`.
        key: `[B, N, H, D]`.
        value: `[B, N, H, D]`; None where the one given is joint already.
        summary_key: `[B, R, H, D]`; None without far field.
        summary_value: likewise.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor | None
    summary_key: torch.Tensor | None
    summary_value: torch.Tensor | None


def empty_outputs(query: torch.Tensor, tokens: int, summary_rows: int, text_apart: bool) -> Outputs:
    """Tensors to write to: of the joint sequence of `tokens`, and of `summary_rows` summaries."""
    batch, _, heads, head_dim = query.shape

    def empty(rows: int) -> torch.Tensor:
        return query.new_empty(batch, rows, heads, head_dim)

    return Outputs(
        empty(tokens),
        empty(tokens),
        empty(tokens) if text_apart else None,
        empty(summary_rows) if summary_rows else None,
        empty(summary_rows) if summary_rows else None,
    )


class Section(NamedTuple):
    """Text or image: a part of the joint sequence that is treated alike.

    Attributes:
        start: its first position in the joint sequence.
        length: its tokens.
        projections: tensors that hold it.
        row: position in the joint sequence of row 0 of `projections`.
        norms: of its queries and keys.
        rotation: cosines and sines, `[rows, D]` each; None for no rotation.
        rotation_row: position in the joint sequence of row 0 of `rotation`.
    """

    start: int
    length: int
    projections: Projections
    row: int
    norms: Norms
    rotation: tuple[torch.Tensor, torch.Tensor] | None
    rotation_row: int


def sections_of(
    image: Projections,
    norms: Norms,
    text: Projections | None,
    text_norms: Norms,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    plan: JointSequence,
) -> tuple[Section, Section]:
    """The text section, then the image section."""
    rotates_text = rotation is not None and rotation[0].shape[0] == plan.tokens
    return (
        Section(
            plan.text_start,
            plan.text_len,
            image if text is None else text,
            0 if text is None else plan.text_start,
            text_norms,
            rotation if rotates_text else None,
            0,
        ),
        Section(
            plan.image_start,
            plan.image_tokens,
            image,
            0 if text is None else plan.image_start,
            norms,
            rotation,
            0 if rotates_text else plan.image_start,
        ),
    )


def _compute(sections: tuple[Section, Section], outputs: Outputs, plan: JointSequence) -> None:
    """By torch, on any device: the definition of the kernel."""
    for section in sections:
        positions = slice(section.start, section.start + section.length)
        rows = slice(positions.start - section.row, positions.stop - section.row)
        rotation = section.rotation
        if rotation is not None:
            turns = slice(positions.start - section.rotation_row, positions.stop - section.rotation_row)
            rotation = rotation[0][turns], rotation[1][turns]
        query, key, value = section.projections
        outputs.query[:, positions] = _normalised_and_rotated(
            query[:, rows], section.norms.query, section.norms.eps, rotation
        )
        outputs.key[:, positions] = _normalised_and_rotated(
            key[:, rows], section.norms.key, section.norms.eps, rotation
        )
        if outputs.value is not None:
            outputs.value[:, positions] = value[:, rows]
    if outputs.summary_key is not None and outputs.summary_value is not None:
        value = sections[1].projections.value if outputs.value is None else outputs.value
        outputs.summary_key.copy_(summarise(outputs.key, plan))
        outputs.summary_value.copy_(summarise(value, plan))


def _normalised_and_rotated(
    tokens: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Tokens `[B, n, H, D]`, normalised and rotated by cosines and sines `[n, D]`, in fp32 or wider."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * weight
    if rotation is None:
        return wide
    real, imaginary = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    cosines, sines = (table.to(wide.dtype)[:, None] for table in rotation)
    return wide * cosines + turned * sines


class Runs(NamedTuple):
    """A joint sequence cut into runs of at most `most` tokens that no summary block cuts.

    Attributes:
        table: one row per run, text before image, `[runs, 3 + 2 · levels]` int32: first position, tokens, and whether
            a summary block ends with this run; then for each level the summary row that ends with it, or -1, and the
            tokens that row stands for.
        chunks: first run of each chunk, and the number of runs last, `[chunks + 1]` int32. Chunks of the image begin
            where a block of every level begins.
        text_chunks: chunks of text, which come first.
        most: a power of two.
    """

    table: np.ndarray
    chunks: np.ndarray
    text_chunks: int
    most: int


def build_runs(plan: JointSequence, most: int) -> Runs:
    """Cuts a plan's joint sequence into chunks and runs of at most `most` tokens, a power of two."""
    summaries = plan.summaries
    levels = [slice(*bounds) for bounds in itertools.pairwise(summaries.offsets)]
    text_stop, image_stop = plan.text_start + plan.text_len, plan.image_stop
    pieces = np.unique(np.append(summaries.starts, plan.image_start))
    lengths = np.diff(pieces, append=image_stop)
    most = min(most, 1 << (int(lengths.max()) - 1).bit_length())
    runs_of_piece = -(-lengths // most)
    first_run = np.cumsum(runs_of_piece) - runs_of_piece
    image = np.repeat(pieces - first_run * most, runs_of_piece) + np.arange(runs_of_piece.sum()) * most
    text = np.arange(plan.text_start, text_stop, most)

    # A chunk may begin where a block of every level does.
    bounds = image
    for level in levels:
        bounds = np.intersect1d(bounds, summaries.starts[level])
    text_chunks = _chunk_starts(text, plan.text_start)
    image_chunks = _chunk_starts(bounds, plan.image_start)
    chunks = np.concatenate(
        [
            np.searchsorted(text, text_chunks),
            np.searchsorted(image, image_chunks) + len(text),
            [len(text) + len(image)],
        ]
    )

    starts = np.concatenate([text, image])
    tokens = np.concatenate([np.diff(text, append=text_stop), np.diff(image, append=image_stop)])
    stops = starts + tokens
    columns = [starts, tokens, np.isin(stops, summaries.starts + summaries.counts)]
    for level in levels:
        block_stops = summaries.starts[level] + summaries.counts[level]
        block = np.minimum(np.searchsorted(block_stops, stops), len(block_stops) - 1)
        columns.append(np.where(block_stops[block] == stops, level.start + block, -1))
        columns.append(summaries.counts[level][block])
    return Runs(np.stack(columns, axis=1).astype(np.int32), chunks.astype(np.int32), len(text_chunks), most)


def _chunk_starts(starts: np.ndarray, origin: int) -> np.ndarray:
    """Those of `starts` that come first in each stretch of `_CHUNK_TOKENS` tokens after `origin`."""
    _, first = np.unique((starts - origin) // _CHUNK_TOKENS, return_index=True)
    return starts[first]


_passed: set[tuple[torch.device, torch.dtype, int]] = set()


def _check_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Compares the kernel with torch at its first use in this process for a device, dtype and head dimension.

    It waits for the device then, and inside a CUDA graph's capture leaves the test to the next call, as `self_test`
    does for the other kernels.

    Raises:
        KernelMismatch: if rounding cannot explain the difference.
    """
    if (device, dtype, head_dim) in _passed:
        return
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    plan = build_plan(Grouping(Grid((7, 6)), (4, 4)), Union(Block(0), Far([(0, (2, 2)), (1, (4, 4))])), 5)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        results = []
        for work_dtype, work in ((dtype, _launch), (dtype, _compute), (torch.float64, _compute)):
            sections = _random_sections(plan, device, dtype, head_dim, work_dtype)
            outputs = empty_outputs(sections[1].projections.query, plan.tokens, plan.summaries.rows, text_apart=True)
            work(sections, outputs, plan)
            results.append([tensor.double() for tensor in outputs if tensor is not None])
        for output, plain, exact in zip(*results, strict=True):
            require_close("the fused norm and rotation kernel", output.to(dtype), plain, exact)
    _passed.add((device, dtype, head_dim))


def _random_sections(
    plan: JointSequence, device: torch.device, dtype: torch.dtype, head_dim: int, work_dtype: torch.dtype
) -> tuple[Section, Section]:
    """Text and image of two samples and two heads, the same each time: values of `dtype`, held in `work_dtype`."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype).to(work_dtype)

    def projections(rows: int) -> Projections:
        return Projections(*(random(2, rows, 2, head_dim) for _ in range(3)))

    image, text = projections(plan.image_tokens), projections(plan.text_len)
    norms, text_norms = (Norms(random(head_dim), random(head_dim), 1e-6) for _ in range(2))
    angles = torch.randn(plan.tokens, head_dim // 2, generator=generator, device="cpu").repeat_interleave(2, dim=1)
    return sections_of(image, norms, text, text_norms, (angles.cos().to(device), angles.sin().to(device)), plan)


def _launch(sections: tuple[Section, Section], outputs: Outputs, plan: JointSequence) -> None:
    from grat_kernels.rope_norm_kernel import rope_norm_kernel

    launch = launch_of(sections, outputs, plan)
    with on_device(outputs.query.device):
        rope_norm_kernel[(launch.programs,)](*launch.arguments, **launch.options)


def launch_of(sections: tuple[Section, Section], outputs: Outputs, plan: JointSequence) -> Launch:
    """The launch for these tensors, which may lie on the meta device: ahead-of-time compilation asks for it too."""
    device = outputs.query.device
    batch, _, heads, head_dim = outputs.query.shape
    most = _RUN_BYTES // outputs.query.element_size()
    runs = plan.cached(("runs", device, most), lambda: _device_runs(plan, device, most))
    padded_dim = padded_head_dim(head_dim)
    text, image = (_section_arguments(section) for section in sections)
    joined, summaries = outputs[:3], outputs[3:]
    arguments = (
        *(*image.tokens, *text.tokens),
        *(*image.norms, *text.norms),
        *(*image.rotation, *text.rotation),
        *(joined, outputs.query.stride()[:3]),
        *(summaries, None if outputs.summary_key is None else outputs.summary_key.stride()[:3]),
        *(runs.table, runs.chunks, runs.text_chunks, batch, heads),
    )
    options = {
        "LEVELS": len(plan.summaries.offsets) - 1,
        "RUN": runs.most,
        "HEADS": _HEADS,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "num_warps": max(1, _HEADS * padded_dim // _WARP_ELEMENTS),
    }
    return Launch((len(runs.chunks) - 1) * batch * -(-heads // _HEADS), arguments, options)


class _SectionArguments(NamedTuple):
    """A section as the kernel takes it."""

    tokens: tuple[Any, ...]
    norms: tuple[Any, ...]
    rotation: tuple[Any, ...]


def _section_arguments(section: Section) -> _SectionArguments:
    tensors = tuple(tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in section.projections)
    weights = tuple(None if weight is None else weight.contiguous() for weight in section.norms[:2])
    rotation = (None, None) if section.rotation is None else tuple(table.contiguous() for table in section.rotation)
    return _SectionArguments(
        (tensors, tuple(tensor.stride()[:3] for tensor in tensors), section.row),
        (weights, section.norms.eps),
        (rotation, section.rotation_row),
    )


class _DeviceRuns(NamedTuple):
    """`Runs` on a device."""

    table: torch.Tensor
    chunks: torch.Tensor
    text_chunks: int
    most: int


def _device_runs(plan: JointSequence, device: torch.device, most: int) -> _DeviceRuns:
    runs = build_runs(plan, most)
    table, chunks = (torch.from_numpy(array).to(device) for array in (runs.table, runs.chunks))
    return _DeviceRuns(table, chunks, runs.text_chunks, runs.most)
