"""The kernel around projections: RMS norm and rotary embedding of queries and keys, joined text, pooled far field.

One program takes a chunk of tokens and a few heads through a list of *runs*, short pieces of tokens that no summary
block cuts. Summary blocks are whole runs that follow one another inside one chunk, so each mean is summed by one
program in one order: no atomics, and the same bits every time.

Tiles are [tokens, columns], a column being one channel of one head. Threads spread over the columns, so that a thread
holds all tokens of a run and adds them up in its own registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normalised_and_rotated(states, weight, eps, cosines, sines, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """RMS norm of each head, then rotation of neighbouring channels, in fp32.

    Args:
        states: `[tokens, columns]`, zeros in channels past `HEAD_DIM`.
        weight: `[D]` fp32, or None.
        cosines: `[tokens, D]` fp32, or None for no rotation.
        sines: likewise.

    Returns:
        `[tokens, columns]` fp32.
    """
    tokens: tl.constexpr = states.shape[0]
    heads: tl.constexpr = states.shape[1] // PADDED_DIM
    states = tl.reshape(states.to(tl.float32), [tokens, heads, PADDED_DIM])
    mean_square = tl.sum(states * states, 2) / HEAD_DIM
    states = states * tl.rsqrt(mean_square + eps)[:, :, None]
    if weight is not None:
        states = states * weight[None, None, :]
    if cosines is not None:
        # Channels 2i and 2i + 1 are real and imaginary part of a complex number.
        real, imaginary = tl.split(tl.reshape(states, [tokens, heads, PADDED_DIM // 2, 2]))
        turned = tl.reshape(tl.join(-imaginary, real), [tokens, heads, PADDED_DIM])
        states = states * cosines[:, None, :] + turned * sines[:, None, :]
    return tl.reshape(states, [tokens, heads * PADDED_DIM])


@triton.jit
def _load_vector(pointer, channels, inside):
    """One value per channel as fp32, `[D]`; None where there is none."""
    if pointer is None:
        return None
    return tl.load(pointer + channels, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_positions(table, rows, channels, loaded, HEAD_DIM: tl.constexpr):
    """Cosines or sines of a run, `[tokens, D]` fp32; None where there are none."""
    if table is None:
        return None
    pointers = table + rows[:, None] * HEAD_DIM + channels[None, :]
    return tl.load(pointers, mask=loaded, other=0.0).to(tl.float32)


@triton.jit
def _offsets(batch, rows, heads, channels, strides):
    """Offsets into a tensor `[B, N, H, D]` with the strides of its first three dimensions, `[rows, columns]`."""
    columns = heads * strides[2] + channels
    return batch * strides[0] + rows[:, None] * strides[1] + columns[None, :]


@triton.jit
def _chunk(
    section,  # what the kernel takes of image or text
    outputs,
    runs,
    bounds,  # of the chunk's runs
    place,  # sample, and head of each column of the program, with whether there is such a column
    LEVELS: tl.constexpr,
    POOL: tl.constexpr,  # whether these tokens are summarised
    RUN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """The runs of one chunk."""
    tokens, strides, first_row, weights, eps, rotation, first_position = section
    joined, joined_strides, summaries, summary_strides = outputs
    first_run, last_run = bounds
    batch, heads, column_exists = place
    COLUMNS: tl.constexpr = heads.shape[0]
    channels = tl.arange(0, COLUMNS) % PADDED_DIM
    slots = tl.arange(0, RUN)
    head_channels = tl.arange(0, PADDED_DIM)
    inside = head_channels < HEAD_DIM
    query_weight = _load_vector(weights[0], head_channels, inside)
    key_weight = _load_vector(weights[1], head_channels, inside)
    RUN_FIELDS: tl.constexpr = 3 + 2 * LEVELS
    if POOL:
        # Sums of the runs since a block of any level ended, and of each level's blocks before that.
        key_sum = tl.zeros((COLUMNS,), tl.float32)
        value_sum = tl.zeros((COLUMNS,), tl.float32)
        PADDED_LEVELS: tl.constexpr = triton.next_power_of_2(LEVELS)
        levels = tl.arange(0, PADDED_LEVELS)
        key_sums = tl.zeros((PADDED_LEVELS, COLUMNS), tl.float32)
        value_sums = tl.zeros((PADDED_LEVELS, COLUMNS), tl.float32)

    for run in range(first_run, last_run):
        start = tl.load(runs + run * RUN_FIELDS).to(tl.int64)
        exists = slots < tl.load(runs + run * RUN_FIELDS + 1)
        loaded = exists[:, None] & column_exists[None, :]
        positions = start + slots
        rows = positions - first_row
        joined_offsets = _offsets(batch, positions, heads, channels, joined_strides)

        query = tl.load(tokens[0] + _offsets(batch, rows, heads, channels, strides[0]), mask=loaded, other=0.0)
        key = tl.load(tokens[1] + _offsets(batch, rows, heads, channels, strides[1]), mask=loaded, other=0.0)
        if POOL or (joined[2] is not None):
            value = tl.load(tokens[2] + _offsets(batch, rows, heads, channels, strides[2]), mask=loaded, other=0.0)
        turned = exists[:, None] & inside[None, :]
        cosines = _load_positions(rotation[0], positions - first_position, head_channels, turned, HEAD_DIM)
        sines = _load_positions(rotation[1], positions - first_position, head_channels, turned, HEAD_DIM)

        query = _normalised_and_rotated(query, query_weight, eps, cosines, sines, HEAD_DIM, PADDED_DIM)
        tl.store(joined[0] + joined_offsets, query.to(joined[0].dtype.element_ty), mask=loaded)
        key = _normalised_and_rotated(key, key_weight, eps, cosines, sines, HEAD_DIM, PADDED_DIM)
        key = key.to(joined[1].dtype.element_ty)
        tl.store(joined[1] + joined_offsets, key, mask=loaded)
        if joined[2] is not None:
            tl.store(joined[2] + joined_offsets, value, mask=loaded)

        if POOL:
            # Past the run's end there are zeros, which norm and rotation leave as they are.
            key_sum += tl.sum(key.to(tl.float32), 0)
            value_sum += tl.sum(value.to(tl.float32), 0)
            if tl.load(runs + run * RUN_FIELDS + 2) != 0:
                # For each level, the summary row that ends here, or -1, and the tokens that it stands for.
                entry = runs + run * RUN_FIELDS + 3 + 2 * levels
                summary_row = tl.load(entry, mask=levels < LEVELS, other=-1)
                summarised = tl.load(entry + 1, mask=levels < LEVELS, other=1).to(tl.float32)[:, None]
                ends = (summary_row >= 0)[:, None]
                stored = ends & column_exists[None, :]
                offsets = _offsets(batch, summary_row.to(tl.int64), heads, channels, summary_strides)
                key_sums += key_sum[None, :]
                value_sums += value_sum[None, :]
                tl.store(summaries[0] + offsets, (key_sums / summarised).to(summaries[0].dtype.element_ty), mask=stored)
                tl.store(
                    summaries[1] + offsets, (value_sums / summarised).to(summaries[1].dtype.element_ty), mask=stored
                )
                key_sums = tl.where(ends, 0.0, key_sums)
                value_sums = tl.where(ends, 0.0, value_sums)
                key_sum = tl.zeros_like(key_sum)
                value_sum = tl.zeros_like(value_sum)


@triton.jit(
    do_not_specialize=[
        "image_row",
        "text_row",
        "image_position",
        "text_position",
        "text_chunks",
        "batches",
        "head_count",
    ]
)
def rope_norm_kernel(
    image,  # query, key and value of the image tokens, each [B, rows, H, D] by its strides; or of the joint sequence
    image_strides,  # of batch, token and head, for each of the three; the last dimension's is 1
    image_row,  # position in the joint sequence of row 0 of `image`
    text,  # the same for the text tokens
    text_strides,
    text_row,
    image_weights,  # of the norms of query and key, [D] each, or None
    image_eps,
    text_weights,
    text_eps,
    image_rotation,  # cosines and sines, [rows, D] contiguous each, or None
    image_position,  # position in the joint sequence of row 0 of `image_rotation`
    text_rotation,
    text_position,
    joined,  # [B, N, H, D] by its strides; the value is None where it need not be written
    joined_strides,
    summaries,  # means of key and value, [B, R, H, D] each; None without far field
    summary_strides,
    runs,  # [runs, 3 + 2 · LEVELS] int32, see `rope_norm.Runs`
    chunks,  # [chunks + 1] int32: first run of each chunk, text chunks first
    text_chunks,
    batches,  # B
    head_count,  # H
    LEVELS: tl.constexpr,
    RUN: tl.constexpr,  # most tokens of a run, a power of two
    HEADS: tl.constexpr,  # heads per program, a power of two
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,  # next power of two
):
    """Queries and keys of a joint sequence, normalised, rotated and laid out as attention reads them."""
    # Heads of one chunk run next to each other: they read the same positions.
    program = tl.program_id(0)
    head_groups = tl.cdiv(head_count, HEADS)
    columns = tl.arange(0, HEADS * PADDED_DIM)
    heads = (program % head_groups) * HEADS + columns // PADDED_DIM
    column_exists = heads < head_count
    if HEAD_DIM != PADDED_DIM:
        column_exists = column_exists & (columns % PADDED_DIM < HEAD_DIM)
    # Offsets of whole tensors may exceed 32 bits.
    heads = heads.to(tl.int64)
    batch = (program // head_groups % batches).to(tl.int64)
    chunk = program // (head_groups * batches)
    first_run = tl.load(chunks + chunk)
    last_run = tl.load(chunks + chunk + 1)
    outputs = (joined, joined_strides, summaries, summary_strides)
    bounds = (first_run, last_run)
    place = (batch, heads, column_exists)
    if chunk < text_chunks:
        section = (text, text_strides, text_row, text_weights, text_eps, text_rotation, text_position)
        _chunk(section, outputs, runs, bounds, place, LEVELS, False, RUN, HEAD_DIM, PADDED_DIM)
    else:
        section = (image, image_strides, image_row, image_weights, image_eps, image_rotation, image_position)
        _chunk(section, outputs, runs, bounds, place, LEVELS, LEVELS > 0, RUN, HEAD_DIM, PADDED_DIM)
