"""Tile sizes of the span kernel, one readable table: architecture, head dimension, width of the dtype.

Every row compiles without a spill inside a loop and within the shared memory of its architecture;
`python -m grat_kernels.aot` checks that without a GPU.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Form = Literal["tma", "pointers"]


class TileConfig(NamedTuple):
    """How the span kernel is compiled for one case.

    Attributes:
        block_m: queries per tile.
        block_n: keys per tile.
        warps: warps per program.
        stages: depth of the load pipeline in the loop over full tiles.
        form: how full tiles are read: `tma` through tensor descriptors, `pointers` through addresses.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    form: Form


class Case(NamedTuple):
    """One row key: the largest padded head dimension it serves and the bits of the dtype."""

    head_dim: int
    bits: int


# fp32 runs on the ordinary arithmetic units (exact products, no TF32) and serves tests and small checks: its tiles are
# chosen to fit every architecture, not to be fast.
_FP32 = {
    Case(64, 32): TileConfig(32, 32, 4, 1, "pointers"),
    Case(128, 32): TileConfig(32, 32, 4, 1, "pointers"),
    Case(256, 32): TileConfig(32, 16, 4, 1, "pointers"),
}

TABLE: dict[str, dict[Case, TileConfig]] = {
    # A100: 163 KB of shared memory per program.
    "sm_80": {
        Case(64, 16): TileConfig(128, 64, 4, 3, "pointers"),
        Case(128, 16): TileConfig(128, 64, 8, 2, "pointers"),
        Case(256, 16): TileConfig(64, 32, 4, 2, "pointers"),
        **_FP32,
    },
    # RTX 30 and 40 series, A10, L4, L40: 99 KB.
    "sm_86": {
        Case(64, 16): TileConfig(128, 64, 4, 2, "pointers"),
        Case(128, 16): TileConfig(128, 64, 8, 2, "pointers"),
        Case(256, 16): TileConfig(64, 32, 4, 2, "pointers"),
        **_FP32,
    },
    # H100, H200: 227 KB.
    "sm_90": {
        Case(64, 16): TileConfig(128, 128, 8, 2, "tma"),
        Case(128, 16): TileConfig(128, 128, 8, 2, "tma"),
        Case(256, 16): TileConfig(128, 64, 8, 2, "tma"),
        **_FP32,
    },
    # B200, GB200: 227 KB.
    "sm_100": {
        Case(64, 16): TileConfig(128, 128, 8, 2, "tma"),
        Case(128, 16): TileConfig(128, 128, 8, 2, "tma"),
        Case(256, 16): TileConfig(128, 64, 8, 2, "tma"),
        **_FP32,
    },
    # RTX 50 series: 99 KB.
    "sm_120": {
        Case(64, 16): TileConfig(128, 64, 4, 2, "pointers"),
        Case(128, 16): TileConfig(128, 64, 8, 2, "pointers"),
        Case(256, 16): TileConfig(64, 32, 4, 2, "pointers"),
        **_FP32,
    },
    # AMD: 64 KB of local memory.
    "rocm": {
        Case(64, 16): TileConfig(128, 64, 4, 1, "pointers"),
        Case(128, 16): TileConfig(128, 64, 4, 1, "pointers"),
        Case(256, 16): TileConfig(64, 32, 4, 1, "pointers"),
        **_FP32,
    },
    # Triton's interpreter on the CPU: small tiles, so that small tests meet full and partial ones.
    "interpreter": {
        Case(256, 16): TileConfig(32, 16, 1, 1, "pointers"),
        Case(256, 32): TileConfig(32, 16, 1, 1, "pointers"),
    },
}


def architecture_of(capability: tuple[int, int]) -> str:
    """The table's name for a CUDA compute capability: the nearest row that is not newer.

    Raises:
        ValueError: if it is older than 8.0.
    """
    rows = {(8, 0): "sm_80", (8, 6): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_120"}
    older = [row for row in rows if row <= capability]
    if not older:
        raise ValueError(f"compute capability {capability[0]}.{capability[1]} is older than 8.0")
    return rows[max(older)]


def tile_config(architecture: str, head_dim: int, bits: int) -> TileConfig:
    """The row for a head dimension (padded to a power of two) and a dtype width.

    Raises:
        ValueError: if no row serves the head dimension.
    """
    cases = [case for case in TABLE[architecture] if case.bits == bits and case.head_dim >= head_dim]
    if not cases:
        raise ValueError(f"no tiles for head dimension {head_dim} in {bits} bits on {architecture}")
    return TABLE[architecture][min(cases)]
