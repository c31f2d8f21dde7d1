"""Tile sizes of the span kernel, one readable table: architecture, head dimension, width of the dtype.

Every row compiles without a spill inside a loop and within the shared memory of its architecture, which
`python -m aot` checks without a GPU.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class TileConfig(NamedTuple):
    """How the span kernel is compiled for one case.

    Attributes:
        block_m: queries per tile.
        block_n: keys per full tile.
        block_tail: keys per packed tile.
        warps: warps per program.
        stages: depth of the load pipelines.
        form: how full tiles are read: `tma` through tensor descriptors, `pointers` by addresses.
    """

    block_m: int
    block_n: int
    block_tail: int
    warps: int
    stages: int
    form: Literal["tma", "pointers"]


class Row(NamedTuple):
    """A row of the table: the largest head dimension and the dtype bits that it serves."""

    head_dim: int
    bits: int
    config: TileConfig


# fp32 keeps exact products (no TF32) on the ordinary arithmetic units and serves tests and small checks: these tiles
# fit every architecture.
_FP32 = (
    Row(64, 32, TileConfig(32, 32, 32, 4, 1, "pointers")),
    Row(256, 32, TileConfig(16, 16, 16, 4, 1, "pointers")),
)

# Rows in order of preference.
TABLE: dict[str, tuple[Row, ...]] = {
    # A100.
    "sm_80": (
        Row(64, 16, TileConfig(128, 64, 32, 4, 3, "pointers")),
        Row(96, 16, TileConfig(128, 32, 32, 8, 4, "pointers")),
        Row(128, 16, TileConfig(128, 64, 32, 8, 3, "pointers")),
        Row(256, 16, TileConfig(64, 16, 16, 4, 4, "pointers")),
        *_FP32,
    ),
    # RTX 30 and 40 series, A10, L4, L40.
    "sm_86": (
        Row(64, 16, TileConfig(128, 64, 32, 4, 3, "pointers")),
        Row(128, 16, TileConfig(128, 64, 32, 8, 3, "pointers")),
        Row(256, 16, TileConfig(64, 16, 16, 4, 3, "pointers")),
        *_FP32,
    ),
    # H100, H200.
    "sm_90": (
        Row(64, 16, TileConfig(128, 128, 64, 8, 3, "tma")),
        Row(128, 16, TileConfig(128, 128, 64, 8, 2, "tma")),
        Row(256, 16, TileConfig(128, 64, 16, 8, 2, "tma")),
        Row(64, 16, TileConfig(128, 128, 64, 8, 2, "pointers")),
        Row(128, 16, TileConfig(128, 64, 64, 8, 3, "pointers")),
        Row(256, 16, TileConfig(128, 32, 32, 8, 2, "pointers")),
        *_FP32,
    ),
    # B200, GB200.
    "sm_100": (
        Row(64, 16, TileConfig(128, 128, 64, 8, 3, "tma")),
        Row(128, 16, TileConfig(128, 128, 64, 8, 2, "tma")),
        Row(256, 16, TileConfig(128, 64, 32, 8, 2, "tma")),
        Row(64, 16, TileConfig(128, 128, 64, 8, 2, "pointers")),
        Row(128, 16, TileConfig(128, 128, 64, 8, 2, "pointers")),
        Row(256, 16, TileConfig(128, 64, 32, 8, 2, "pointers")),
        *_FP32,
    ),
    # RTX 50 series.
    "sm_120": (
        Row(64, 16, TileConfig(128, 64, 32, 8, 3, "pointers")),
        Row(128, 16, TileConfig(128, 64, 16, 8, 3, "pointers")),
        Row(256, 16, TileConfig(64, 16, 16, 4, 3, "pointers")),
        *_FP32,
    ),
    # AMD; MI300 (gfx942) is the one that is checked.
    "rocm": (
        Row(64, 16, TileConfig(128, 64, 32, 4, 1, "pointers")),
        Row(128, 16, TileConfig(128, 64, 16, 4, 1, "pointers")),
        Row(256, 16, TileConfig(64, 32, 16, 4, 1, "pointers")),
        *_FP32,
    ),
    # Triton's interpreter on the CPU: its time goes by the operation, so tiles are large for the sizes it is used on.
    "interpreter": (
        Row(256, 16, TileConfig(64, 64, 32, 1, 1, "pointers")),
        Row(256, 32, TileConfig(64, 64, 32, 1, 1, "pointers")),
    ),
}


class GluonConfig(NamedTuple):
    """How the Gluon kernel is compiled for one head dimension.

    Attributes:
        block_m: queries per tile, for both consumers.
        block_n: keys per tile.
        stages: tiles of keys in shared memory.
        value_stages: tiles of values.
        query_stages: tiles of queries; with two, those of the next work item are there before they are needed.
        tensor_memory: whether matrix products lie there: on Blackwell, not on Hopper.
    """

    block_m: int
    block_n: int
    stages: int
    value_stages: int = 2
    query_stages: int = 2
    tensor_memory: bool = False


# The Gluon kernel, by architecture and head dimension: as many stages as fit into shared memory, and no more than four.
# Products of Blackwell are of 128 queries, and those of two consumers fill its tensor memory at head dimension 128.
GLUON: dict[str, dict[int, GluonConfig]] = {
    "sm_90": {
        64: GluonConfig(128, 128, 4, value_stages=4),
        128: GluonConfig(128, 128, 3),
        256: GluonConfig(128, 64, 2, query_stages=1),
    },
    "sm_100": {
        64: GluonConfig(256, 128, 4, value_stages=4, tensor_memory=True),
        128: GluonConfig(256, 128, 3, query_stages=1, tensor_memory=True),
    },
}


class ScoreConfig(NamedTuple):
    """How the kernel that scores blocks is compiled.

    Attributes:
        groups: of queries per tile.
        columns: means within blocks that a program holds, unless one block has more.
        warps: warps per program.
    """

    groups: int
    columns: int
    warps: int


# By the bits of the dtype, on every architecture.
SCORES = {16: ScoreConfig(64, 16, 8), 32: ScoreConfig(32, 16, 8)}
# Wider heads would spill, and have their blocks scored by torch.
SCORED_HEAD_DIM = 128

# Shared memory that one program may use, in bytes: table of compute capabilities in the CUDA C++ programming guide;
# local data share in AMD's CDNA3 instruction set architecture.
SHARED_MEMORY_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}

_ROW_OF_CAPABILITY = {(8, 0): "sm_80", (8, 6): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_120"}


def architecture_of(capability: tuple[int, int]) -> str:
    """The table's architecture for a CUDA compute capability: the newest one that is not newer.

    Raises:
        ValueError: if the capability is older than 8.0.
    """
    older = [known for known in _ROW_OF_CAPABILITY if known <= capability]
    if not older:
        raise ValueError(f"compute capability {capability[0]}.{capability[1]} is older than 8.0")
    return _ROW_OF_CAPABILITY[max(older)]


def tile_config(architecture: str, head_dim: int, bits: int, *, descriptors: bool) -> TileConfig:
    """The table's tiles for a head dimension and a dtype width.

    Args:
        architecture: a key of `TABLE`.
        head_dim: channels per head.
        bits: of the dtype.
        descriptors: whether the tensors can be read through tensor descriptors.

    Raises:
        ValueError: if no row serves the case.
    """
    fitting = [
        row
        for row in TABLE[architecture]
        if row.bits == bits and row.head_dim >= head_dim and (descriptors or row.config.form == "pointers")
    ]
    if not fitting:
        raise ValueError(f"no tiles for head dimension {head_dim} in {bits} bits on {architecture}")
    return min(fitting, key=lambda row: row.head_dim).config
