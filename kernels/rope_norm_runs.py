"""The launch of the kernel of `rope_norm`: a joint sequence in runs of tokens that no summary block cuts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from grat_kernels.launching import Launch, on_device, padded_head_dim

if TYPE_CHECKING:
    from grat_kernels.plan import JointSequence
    from grat_kernels.rope_norm_sections import Outputs, Section

# A run's tokens lie in the registers of one thread, which limits their bytes: 4 tokens of 16-bit dtypes.
_RUN_BYTES = 8
# How many tokens one program takes on at least, run after run.
_CHUNK_TOKENS = 32
# Heads of one program, which share its angles, and the channels of all of them at one token that fall to a warp: each
# thread has 16 bytes of a 16-bit dtype.
_HEADS = 8
_WARP_ELEMENTS = 256


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


def launch(sections: tuple[Section, Section], outputs: Outputs, plan: JointSequence) -> None:
    """Runs the kernel, which writes all outputs."""
    from grat_kernels.rope_norm_kernel import rope_norm_kernel

    made = launch_of(sections, outputs, plan)
    with on_device(outputs.query.device):
        rope_norm_kernel[(made.programs,)](*made.arguments, **made.options)


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
