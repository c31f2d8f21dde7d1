"""Kernels on tensors in which offsets exceed 32 bits: pictures of a million image tokens, and two of a quarter million.

The tensors have their real sizes, in memory that is never touched but where a kernel reads and writes. Work lists are
written by hand, with a few tiles at either end of the sequence, so that no program runs for what lies between.
Triton's interpreter checks every sum, difference and product of 32-bit integers for overflow; so does the simulator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from gluon_simulator import Simulation
from large_tensors import zeros_on_demand

from grat_kernels import (
    Far,
    Full,
    Grid,
    Grouping,
    Plan,
    Union,
    build_plan,
    gluon_backend,
    rope_norm_runs,
    triton_backend,
)
from grat_kernels.launching import DeviceTiles
from grat_kernels.rope_norm_sections import Norms, Outputs, Projections, sections_of
from grat_kernels.tile_configs import GluonConfig, TileConfig

if torch.cuda.is_available():
    pytest.skip("tests/gpu tests the compiled kernels", allow_module_level=True)

BATCH, HEADS, HEAD_DIM = 2, 24, 128
SCALE = 1 / math.sqrt(HEAD_DIM)
BLOCK = 32
POINTERS = TileConfig(BLOCK, BLOCK, BLOCK, 1, 1, "pointers")
DESCRIPTORS = POINTERS._replace(form="tma")
HOPPER = GluonConfig(BLOCK, BLOCK, 2)
BLACKWELL = HOPPER._replace(tensor_memory=True)
FAR = Union(Full(), Far([(0, (1, 2))]))
PLANS = {
    "a million tokens": build_plan(Grouping(Grid((1024, 1024)), (1024, 1024)), FAR, 512),
    "two pictures": build_plan(Grouping(Grid((512, 512)), (512, 512)), FAR, 512),
}
SIZES = pytest.mark.parametrize("size", PLANS)


@pytest.fixture(autouse=True)
def _overflow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))


def test_the_interpreter_sees_an_overflow() -> None:
    """So that a run without complaint means something."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(output, row, stride):
        tl.store(output, (row * stride) % 7)

    output = torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](output, 2**20, 2**11 - 1)
    with pytest.raises(Exception, match="overflow"):
        kernel[(1,)](output, 2**20, 2**11)


def test_the_sizes_are_too_large_for_32_bits() -> None:
    elements = {name: BATCH * plan.tokens * HEADS * HEAD_DIM for name, plan in PLANS.items()}
    assert elements["a million tokens"] > 2**32
    assert 2 * elements["two pictures"] > 2**31
    assert BATCH * PLANS["a million tokens"].summaries.rows * HEADS * HEAD_DIM > 2**31


@dataclass(frozen=True)
class Work:
    """What the last queries attend: tokens and summaries at both ends.

    Attributes:
        token_tiles: first token of each full tile.
        summary_tiles: first row of each full tile of summaries.
        packed: single keys: tokens, or N + row for a summary. Of the text, they are all that is attended.
    """

    plan: Plan
    token_tiles: tuple[int, ...]
    summary_tiles: tuple[int, ...]
    packed: tuple[int, ...]

    @classmethod
    def at_both_ends_of(cls, plan: Plan) -> Work:
        tokens, rows = plan.tokens, plan.summaries.rows
        packed = (508, tokens - 41, 511, tokens - 77, tokens + 5, tokens + rows - 1, 600, tokens + rows - 40)
        return cls(plan, (512, tokens // 2, tokens - BLOCK), (7, rows - BLOCK - 3), packed)

    @property
    def queries(self) -> slice:
        return slice(self.plan.tokens - BLOCK + 3, self.plan.tokens)

    @property
    def keys(self) -> torch.Tensor:
        """Rows of all keys, summaries counted after the tokens."""
        starts = [*self.token_tiles, *(self.plan.tokens + start for start in self.summary_tiles)]
        return torch.cat([*(torch.arange(start, start + BLOCK) for start in starts), torch.tensor(self.packed)])

    @property
    def query_tiles(self) -> list[int]:
        return [self.queries.start, self.queries.stop - self.queries.start]


class Tensors:
    """Query, key and value with their summaries, zeros but for the rows that some work needs.

    Attributes:
        keys: `[B, N, H, D]`, then their summaries, `[B, R, H, D]`.
        values: likewise.
        query: `[B, N, H, D]`, as the outer part of a fused projection.
        output: `[B, N, H, D]` contiguous.
    """

    def __init__(self, work: Work, dtype: torch.dtype) -> None:
        plan, generator = work.plan, torch.Generator().manual_seed(0)
        self.work, self.dtype = work, dtype
        rows = (plan.tokens, plan.summaries.rows)
        self.query = zeros_on_demand((BATCH, plan.tokens, 3, HEADS, HEAD_DIM), dtype)[:, :, 2]
        self.output = zeros_on_demand((BATCH, plan.tokens, HEADS, HEAD_DIM), dtype)
        self.keys, self.values = (
            tuple(zeros_on_demand((BATCH, count, HEADS, HEAD_DIM), dtype) for count in rows) for _ in range(2)
        )

        def random(count: int) -> torch.Tensor:
            return torch.randn(BATCH, count, HEADS, HEAD_DIM, generator=generator).to(dtype)

        self.used = random(BLOCK - 3), random(len(work.keys)), random(len(work.keys))
        self.query[:, work.queries] = self.used[0]
        for parts, rows_used in ((self.keys, self.used[1]), (self.values, self.used[2])):
            first = 0
            for part in parts:
                own = (work.keys >= first) & (work.keys < first + part.shape[1])
                part[:, work.keys[own] - first] = rows_used[:, own]
                first += part.shape[1]

    def assert_attended(self, written: torch.Tensor, bias: torch.Tensor) -> None:
        """`written` `[B, n, H, D]` is attention with `bias` `[B, keys]` on the scores, but for rounding."""
        exact, plain = (self._attention(bias, dtype) for dtype in (torch.float64, self.dtype))
        last_place = torch.finfo(self.dtype).eps * exact.abs().max()
        bound = 2 * (plain - exact).abs().max() + last_place
        assert (written - exact).abs().max() <= bound

    def _attention(self, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Dense attention of the rows in use, `[B, n, H, D]`."""
        query, key, value = (tensor.to(dtype).transpose(1, 2) for tensor in self.used)
        scores = query @ key.transpose(2, 3) * SCALE + bias[:, None, None].to(dtype)
        return (scores.softmax(-1) @ value).transpose(1, 2)


def expected_bias(work: Work, summary_bias: torch.Tensor, text_valid: torch.Tensor) -> torch.Tensor:
    """`[B, keys]`: 0 for tokens, -inf for padded text."""
    bias = torch.zeros(BATCH, len(work.keys))
    of_summaries = work.keys >= work.plan.tokens
    bias[:, of_summaries] = summary_bias[work.keys[of_summaries] - work.plan.tokens]
    padded = (work.keys < work.plan.text_len) & (work.keys >= text_valid[:, None])
    return bias.masked_fill(padded, -math.inf)


TEXT_VALID = torch.tensor([512, 509])


def tiles_of(work: Work, summary_bias: torch.Tensor) -> DeviceTiles:
    """What `launching.device_tiles` makes of a plan, for this work alone."""
    full, summaries = len(work.token_tiles), len(work.summary_tiles)
    packed = torch.full((1, BLOCK), -1, dtype=torch.int32)
    packed[0, ::2][: len(work.packed)] = torch.tensor(work.packed, dtype=torch.int32)
    bias = torch.cat([torch.zeros(work.plan.tokens), summary_bias, torch.tensor([-math.inf])]) / SCALE
    bounds = [0, full, full + summaries, full + summaries + 1]
    return DeviceTiles(
        torch.tensor([[*work.query_tiles, *bounds]], dtype=torch.int32),
        torch.tensor([*work.token_tiles, *work.summary_tiles, 0, 0], dtype=torch.int32),
        packed,
        bias[packed.long()],
        summary_bias / SCALE,
        None,
        count=1,
        leading=0,
    )


def launch_by_tiles(
    backend: Any, tensors: Tensors, config: Any, monkeypatch: pytest.MonkeyPatch, **choice: torch.Tensor
) -> tuple[Any, Any]:
    """The launch of a backend for the work of some tensors, and the bias of its keys; a choice as for `launch_of`."""
    work = tensors.work
    # Different from row to row, so that a wrong row shows.
    summary_bias = (torch.arange(work.plan.summaries.rows) % 7).float()
    tiles = tiles_of(work, summary_bias)
    if choice:
        # The last tile of each head holds what was packed.
        choice["chosen"][..., -BLOCK:] = tiles.packed_rows[0]
        last = choice["chosen"].shape[2] // BLOCK - 1
        query_tiles = tiles.query_tiles.clone()
        query_tiles[:, 5] -= 1
        tiles = tiles._replace(
            query_tiles=query_tiles, chosen_tiles=torch.tensor([[last, last + 1]], dtype=torch.int32)
        )
    monkeypatch.setattr(backend, "device_tiles", lambda *_, **__: tiles)
    (key, summary_key), (value, summary_value) = tensors.keys, tensors.values
    launch = backend.launch_of(
        *(tensors.query, key, value, tensors.output, summary_key, summary_value),
        *(work.plan, TEXT_VALID, SCALE, config),
        **choice,
    )
    return launch, expected_bias(work, summary_bias, TEXT_VALID)


@SIZES
@pytest.mark.parametrize(
    ("dtype", "config"),
    [(torch.float16, POINTERS), (torch.float32, POINTERS), (torch.float16, DESCRIPTORS)],
    ids=["fp16-pointers", "fp32-pointers", "fp16-descriptors"],
)
def test_the_triton_kernel(size: str, dtype: torch.dtype, config: TileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from grat_kernels.span_kernel import span_attention_kernel

    tensors = Tensors(Work.at_both_ends_of(PLANS[size]), dtype)
    launch, bias = launch_by_tiles(triton_backend, tensors, config, monkeypatch)
    assert launch.programs == BATCH * HEADS
    span_attention_kernel[(launch.programs,)](*launch.arguments, **launch.options)
    tensors.assert_attended(tensors.output[:, tensors.work.queries], bias)


def test_chosen_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of each head's, where those of all heads are more than 32 bits count."""
    from grat_kernels.span_kernel import span_attention_kernel

    work = Work.at_both_ends_of(PLANS["a million tokens"])
    # Chosen tiles hold no text.
    work = replace(work, packed=tuple(row for row in work.packed if row >= 512))
    tensors = Tensors(work, torch.float16)
    slots = -(-(2**31 // (BATCH * HEADS) + 1) // BLOCK) * BLOCK
    chosen = zeros_on_demand((BATCH, HEADS, slots), torch.int32)
    launch, bias = launch_by_tiles(triton_backend, tensors, POINTERS, monkeypatch, chosen=chosen)
    span_attention_kernel[(launch.programs,)](*launch.arguments, **launch.options)
    tensors.assert_attended(tensors.output[:, work.queries], bias)


@SIZES
@pytest.mark.parametrize("config", [HOPPER, BLACKWELL], ids=["hopper", "blackwell"])
def test_the_gluon_kernel(size: str, config: GluonConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Tensors(Work.at_both_ends_of(PLANS[size]), torch.float16)
    launch, bias = launch_by_tiles(gluon_backend, tensors, config, monkeypatch)
    assert launch.programs == BATCH * HEADS
    simulation = Simulation(seed=1, programs=1)
    simulation.run(launch)
    written, writes = (torch.from_numpy(array)[:, tensors.work.queries] for array in simulation.written(tensors.output))
    assert (writes == 1).all()
    tensors.assert_attended(written, bias)


CHUNK = rope_norm_runs._CHUNK_TOKENS


def last_rows(plan: Plan) -> list[slice]:
    """The last tokens of the image, and of the text, in the joint sequence."""
    stops = plan.image_start + plan.image_tokens, plan.text_start + plan.text_len
    return [slice(stop - CHUNK, stop) for stop in stops]


def last_chunks(plan: Plan, most: int) -> rope_norm_runs._DeviceRuns:
    """What `rope_norm` makes of a plan, for the last chunk of text and the last of the image alone."""
    runs = rope_norm_runs.build_runs(plan, most)
    text, image = (slice(*runs.chunks[last - 1 : last + 1]) for last in (runs.text_chunks, len(runs.chunks) - 1))
    table = torch.from_numpy(runs.table)
    chunks = [0, text.stop - text.start, text.stop - text.start + image.stop - image.start]
    return rope_norm_runs._DeviceRuns(
        torch.cat([table[text], table[image]]), torch.tensor(chunks, dtype=torch.int32), 1, runs.most
    )


@pytest.mark.parametrize(
    ("size", "dtype", "apart", "text_first"),
    [
        ("a million tokens", torch.float16, True, False),
        ("a million tokens", torch.float32, False, True),
        ("two pictures", torch.float16, True, True),
    ],
    ids=["a million tokens, double block", "a million tokens, single block", "two pictures, double block"],
)
def test_norm_rotation_and_pooling(
    size: str, dtype: torch.dtype, apart: bool, text_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last tokens of image and text give the bits that they give as a sequence of their own."""
    grid = PLANS[size].grouping.grid
    large = build_plan(Grouping(grid, grid.shape), FAR, 512, text_first)
    small = build_plan(Grouping(Grid((1, CHUNK)), (1, CHUNK)), FAR, CHUNK, text_first)
    most = rope_norm_runs._RUN_BYTES // dtype.itemsize
    monkeypatch.setitem(large._cache, ("runs", torch.device("cpu"), most), last_chunks(large, most))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def enlarged(tensor: torch.Tensor, rows: int, pairs: list[tuple[slice, slice]]) -> torch.Tensor:
        """Zeros but for some rows: where they go, and where in `tensor` `[B, n, ...]` they come from."""
        result = zeros_on_demand((len(tensor), rows, *tensor.shape[2:]), tensor.dtype)
        for target, source in pairs:
            result[:, target] = tensor[:, source]
        return result

    joint = list(zip(last_rows(large), last_rows(small), strict=True))
    ends = {count: [(slice(count - CHUNK, count), slice(CHUNK))] for count in (large.image_tokens, large.text_len)}

    def projections(rows: int, large_rows: int) -> tuple[Projections, Projections]:
        tensors = [random(BATCH, rows, HEADS, HEAD_DIM) for _ in range(3)]
        pairs = ends.get(large_rows, joint)
        return Projections(*tensors), Projections(*(enlarged(tensor, large_rows, pairs) for tensor in tensors))

    if apart:
        image, text = projections(CHUNK, large.image_tokens), projections(CHUNK, large.text_len)
    else:
        image, text = projections(small.tokens, large.tokens), (None, None)
    norms, text_norms = (Norms(random(HEAD_DIM), random(HEAD_DIM), 1e-6) for _ in range(2))
    tables = torch.randn(2, small.tokens, HEAD_DIM, generator=generator)
    rotations = tables, enlarged(tables, large.tokens, joint)

    results: list[list[Any]] = []
    for number, plan in enumerate((small, large)):
        rotation = rotations[number][0], rotations[number][1]
        sections = sections_of(image[number], norms, text[number], text_norms, rotation, plan)
        shapes = [plan.tokens, plan.tokens, plan.tokens if apart else 0, plan.summaries.rows, plan.summaries.rows]
        tensors: list[Any] = [
            zeros_on_demand((BATCH, rows, HEADS, HEAD_DIM), dtype) if rows else None for rows in shapes
        ]
        rope_norm_runs.launch(sections, Outputs(*tensors), plan)
        results.append(tensors)

    of_small, of_large = results
    for tensor, expected in zip(of_large[:3], of_small[:3], strict=True):
        if not apart and expected is None:
            assert tensor is None
            continue
        for target, source in joint:
            assert torch.equal(tensor[:, target], expected[:, source])
            assert expected[:, source].abs().amax((1, 3)).min() > 0
    for tensor, expected in zip(of_large[3:], of_small[3:], strict=True):
        assert torch.equal(tensor[:, -CHUNK // 2 :], expected)
        assert expected.abs().amax((2, 3)).min() > 0
