"""What the softmaxes of the Gluon kernel share: the maximum in use, and biases of scores. Device code only."""

# What is `constexpr` to Gluon's compiler is no Python object of that type.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Where the running maximum starts. Finite, so that a tile whose keys are all masked gives exp2(-inf) = 0 and never
# exp2(-inf - -inf) = NaN; the lowest float32, so that no finite score lies below it.
LOWEST = gl.constexpr(-3.4028234663852886e38)

# The maximum in use may lag behind that of the scores by so many powers of two, so that it seldom changes and the
# output seldom has to be rescaled (FlashAttention-4). Output and total are relative to the same maximum, whichever it
# is, and their quotient is exact. A weight is at most 2^8, for which float16 (to 2^16) and bfloat16 have the same
# relative precision as for 1; the total over 2^31 keys at most 2^39, and the output, of float16's values, 2^55: both
# far below float32's 2^128, which only bfloat16's largest values reach, and now 2^8 sooner. The total is about 1 at
# least, as the tile that set the maximum holds a weight of 1.
MOST_RISE = gl.constexpr(8.0)
# Below any total but that of no key, which is 0.
LEAST_TOTAL = gl.constexpr(0.5)


@gluon.jit
def bias_of(index, tile, columns, bounds, padding, biases, lists, BLOCK_N: gl.constexpr):
    """What is added to the scores of some columns of a tile: 0 for tokens, -inf for slots that hold nothing.

    `bounds` are those of the item's list in `key_tiles`, where the tile has this index.
    """
    _begin, full_end, full_summary_end, _end = bounds
    summary_bias, packed_bias = biases
    _key_tiles, packed_rows, text_valid = lists
    LAYOUT: gl.constexpr = columns.type.layout
    bias = gl.zeros([columns.shape[0]], gl.float32, LAYOUT)
    if index >= full_end:
        if packed_rows is None:
            tile_bias = summary_bias + tile
        else:
            tile_bias = packed_bias + tile * BLOCK_N
            # The outer condition is the compiler's, which tells it from that of the device only apart.
            if summary_bias is not None:  # noqa: SIM102
                if index < full_summary_end:
                    tile_bias = summary_bias + tile
        bias = gl.load(tile_bias + columns)
        if text_valid is not None:  # noqa: SIM102
            if index >= full_summary_end:
                rows = gl.load(packed_rows + tile * BLOCK_N + columns)
                padding_start, padding_stop = padding
                bias = gl.where((rows >= padding_start) & (rows < padding_stop), float("-inf"), bias)
    return bias


@gluon.jit
def raised(highest, reached):
    """The maximum in use from now on, when the scores of some rows have reached so much."""
    risen = gl.maximum(highest, reached)
    return gl.where(risen - highest > MOST_RISE, risen, highest)
