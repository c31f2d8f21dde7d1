"""Adapters to other projects' kernels, against stand-ins with the interfaces that those projects publish.

A stand-in computes what its arguments say, in plain torch: a wrong mask, layout or density shows in the output. None
of the projects themselves runs here.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from grat_cli.bench import baselines, peers
from grat_cli.bench.attention_level import run_attention_level
from grat_cli.bench.measure import CannotRun
from grat_cli.bench.peers import PeerRow, Scene, peer_rows
from grat_cli.bench.results import Absent
from grat_cli.bench.sampled import sampled_error
from grat_cli.bench.sizes import Size
from grat_cli.fidelity.variants import PEERS, parse_variants, variant_for
from grat_kernels import Grid, reference

GRID, TEXT = Grid((16, 24)), 32


class Installed:
    """Makes stand-ins importable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._found = importlib.util.find_spec
        self._names: set[str] = set()
        monkeypatch.setattr(importlib.util, "find_spec", self._find)

    def add(self, name: str, **contents: Any) -> None:
        module = ModuleType(name)
        vars(module).update(contents)
        self._names.add(name)
        self._monkeypatch.setitem(sys.modules, name, module)

    def _find(self, name: str, package: str | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name in self._names else self._found(name, package)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    return Installed(monkeypatch)


def scene(compare: str, grid: Grid = GRID, text_len: int = TEXT, **options: Any) -> Scene:
    variants = [variant_for(request, grid) for request in parse_variants(compare)]
    generator = torch.Generator().manual_seed(0)
    shape = (1, grid.tokens + text_len, 2, options.get("head_dim", 16))
    dtype = options.get("dtype", torch.bfloat16)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return Scene(query, key, value, variants, text_len, grid.axes < 3)


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device checks of the adapters pass; everything still computes on the CPU."""
    real = peers._module

    def module(package: str, scene: Scene, dtypes: Any) -> ModuleType | str:
        answer = real(package, scene, dtypes)
        return sys.modules[package] if "CUDA devices" in str(answer) else answer

    monkeypatch.setattr(peers, "_module", module)
    monkeypatch.setattr(
        baselines,
        "natten_obstacle",
        lambda window, device: None if importlib.util.find_spec("natten") else "the package natten is not installed",
    )
    monkeypatch.setattr(peers, "natten_obstacle", baselines.natten_obstacle)


def rows_of(name: str, where: Scene) -> list[PeerRow]:
    rows = peer_rows(name, where)
    assert isinstance(rows, list), rows
    return rows


def assert_exact(row: PeerRow, where: Scene) -> None:
    """The output is what the row says it attends, up to the rounding of the tensors' dtype."""
    output = row.call()
    assert output.shape == where.query.shape
    assert row.attended is not None
    found = sampled_error(output, where.query, where.key, where.value, row.attended, samples=100)
    assert found.error <= 2 * found.plain_error + torch.finfo(where.query.dtype).eps * found.largest


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Attention of `[N, H, D]` tensors under a mask `[N, N]` or `[H, N, N]`."""
    heads_first = (tensor.transpose(0, 1).float() for tensor in (query, key, value))
    return scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).transpose(0, 1).to(query.dtype)


# What is not here


def test_what_is_not_installed_is_absent_and_never_a_row() -> None:
    size = Size("picture", Grid((8, 8)), 3)
    result = run_attention_level(
        parse_variants("full,grat-b"),
        [size],
        heads=1,
        head_dim=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
        peers=PEERS,
        repetitions=1,
        max_seconds=None,
        command="",
    )
    here = {
        name for name in ("natten", "flashinfer", "sageattention", "piecewise_attn") if importlib.util.find_spec(name)
    }
    assert not here, "this test describes a machine without them"
    assert {absent.name: absent.reason for absent in result.absent} == {
        "natten": "the package natten is not installed",
        "flashinfer": "the package flashinfer is not installed",
        "sage": "the package sageattention is not installed",
        "pisa": "the package piecewise_attn is not installed",
    }
    assert [row.name for row in result.cases[0].rows] == ["full", "grat-b", "flex (grat-b)"]
    flex = result.cases[0].rows[-1]
    assert (flex.role, flex.mask, flex.density) == ("peer", "identical", result.cases[0].rows[1].density)


@pytest.mark.parametrize("name", ["flashinfer", "sage", "pisa"])
def test_what_needs_a_gpu_says_so(name: str, installed: Installed) -> None:
    package = {"sage": "sageattention", "pisa": "piecewise_attn"}.get(name, name)
    installed.add(package)
    assert peer_rows(name, scene("grat-b")) == Absent(name, "it runs on CUDA devices, not cpu")


def test_what_needs_half_precision_or_breaks_on_import_says_so(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def module(dtype: torch.dtype) -> object:
        query: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype)
        return peers._module("broken", Scene(query, query, query, (), 0, True), (torch.float16, torch.bfloat16))

    installed.add("broken")
    assert module(torch.float32) == "it takes float16 and bfloat16, not float32"
    assert isinstance(module(torch.float16), ModuleType)
    monkeypatch.setitem(sys.modules, "broken", None)
    assert str(module(torch.float16)).startswith("importing broken failed: ModuleNotFoundError")


def test_nothing_to_stand_beside_is_said(installed: Installed) -> None:
    absent = peer_rows("flex", scene("full"))
    assert isinstance(absent, Absent)
    assert "add grat-b" in absent.reason


# flex


@pytest.mark.parametrize("compare", ["grat-b", "grat-far:radius=0", "sta"])
def test_flex_computes_the_pattern(compare: str) -> None:
    where = scene(f"full,{compare}", dtype=torch.float32)
    [row] = rows_of("flex", where)
    assert (row.name, row.mask) == (f"flex ({compare})", "identical")
    assert_exact(row, where)


# natten


def natten_stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: Any,
    stride: Any = 1,
    additional_keys: torch.Tensor | None = None,
    additional_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """Windows as NATTEN documents them: the queries of a stride share that of the one in their middle."""
    shape = query.shape[1:-2]
    strides = (stride,) * len(shape) if isinstance(stride, int) else stride
    inside = torch.ones(1, 1, dtype=torch.int)
    for extent, size, step in zip(shape, kernel_size, strides, strict=True):
        tokens = torch.arange(extent)
        leader = (tokens // step * step + step // 2).clamp(max=extent - 1)
        first = (leader - size // 2).clamp(0, extent - size)[:, None]
        of_axis = (tokens >= first) & (tokens < first + size)
        inside = torch.kron(inside, of_axis.int())
    query, key, value = (tensor.flatten(1, len(shape))[0] for tensor in (query, key, value))
    if additional_keys is not None and additional_values is not None:
        key, value = torch.cat([key, additional_keys[0]]), torch.cat([value, additional_values[0]])
        inside = torch.nn.functional.pad(inside, (0, additional_keys.shape[1]), value=1)
    return masked(query, key, value, inside.bool()).unflatten(0, shape)[None]


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize(
    ("compare", "grid", "mask"),
    [
        ("na:window=5x7", GRID, "identical"),
        ("na:window=3", Grid((4, 6, 5)), "identical"),
        ("sta:window=3:group=4x4", GRID, "identical"),
        ("sta:window=3:group=2x2x2", Grid((4, 8, 6)), "identical"),
        ("sta:window=3:group=5x5", GRID, "equal density"),
        ("grat-b", GRID, "equal density"),
    ],
)
def test_natten(compare: str, grid: Grid, mask: str, installed: Installed) -> None:
    installed.add("natten", na2d=natten_stand_in, na3d=natten_stand_in)
    where = scene(compare, grid)
    [row] = rows_of("natten", where)
    assert (row.name, row.mask, row.kernel) == (f"natten ({compare})", mask, "natten")
    assert_exact(row, where)
    [variant] = where.variants
    density = variant.attended_pairs(TEXT, where.text_first) / where.query.shape[1] ** 2
    assert row.density == pytest.approx(density, rel=0 if mask == "identical" else 0.35)
    if mask == "identical" and variant.kind == "sta":
        # In raster order, what the plan attends in its own.
        plan = where.plan(variant)
        order = torch.arange(where.query.shape[1])
        image = slice(plan.image_start, plan.image_start + plan.image_tokens)
        order[image] = plan.image_start + torch.from_numpy(plan.order)
        query, key, value = (tensor[:, order] for tensor in (where.query, where.key, where.value))
        expected = reference.attention(query, key, value, plan, None, 1 / math.sqrt(query.shape[3]))
        torch.testing.assert_close(row.call()[:, order], expected, rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_natten_is_the_baseline_where_it_is_installed(installed: Installed) -> None:
    installed.add("natten", na2d=natten_stand_in)
    window = baselines.Window("na", GRID, (3, 3), 0, True)
    assert baselines.baseline_for(window, torch.device("cpu"), torch.float32, 16).kernel == "NATTEN"
    clear = baselines.Window("clear", GRID, (3,), 0, True)
    assert baselines.baseline_for(clear, torch.device("cpu"), torch.float32, 16).kernel.startswith("torch SDPA")


# flashinfer


class BlockSparseAttentionWrapper:
    """Blocks of one size in compressed rows; `[N, H, D]` tensors."""

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        assert float_workspace_buffer.dtype == torch.uint8

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_data_type: Any = "float16",
        o_data_type: Any = "float16",
    ) -> None:
        assert indptr.dtype == indices.dtype == torch.int32
        assert (M % R, N % C) == (0, 0)
        assert q_data_type == o_data_type == torch.bfloat16
        blocks = torch.zeros(M // R, N // C, dtype=torch.bool)
        for row in range(M // R):
            blocks[row, indices[indptr[row] : indptr[row + 1]].long()] = True
        self.mask = blocks.repeat_interleave(R, 0).repeat_interleave(C, 1)

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert all(tensor.is_contiguous() for tensor in (q, k, v))
        return masked(q, k, v, self.mask)


class VariableBlockSparseAttentionWrapper:
    """Blocks of given sizes per head; `[H, N, D]` tensors."""

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        pass

    def plan(
        self,
        block_mask_map: torch.Tensor,
        block_row_sz: torch.Tensor,
        block_col_sz: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        assert block_mask_map.shape == (num_kv_heads, block_row_sz.shape[1], block_col_sz.shape[1])
        assert q_data_type == kv_data_type == torch.bfloat16
        pairs = zip(block_mask_map, block_row_sz, block_col_sz, strict=True)
        self.mask = torch.stack([m.repeat_interleave(r, 0).repeat_interleave(c, 1) for m, r, c in pairs])

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert all(tensor.is_contiguous() for tensor in (q, k, v))
        query, key, value = (tensor.transpose(0, 1) for tensor in (q, k, v))
        return masked(query, key, value, self.mask).transpose(0, 1)


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize(
    ("compare", "grid", "text_len"),
    [
        ("grat-b:group=4x4", GRID, TEXT),  # 16-token blocks, two of them text
        ("grat-x:group=4x4", GRID, 0),
        ("grat-b:group=4x4", GRID, 5),  # text is no whole number of blocks
        ("grat-bx:group=5x7", GRID, TEXT),  # ragged groups
        ("grat-x:share=2:group=2x4x4", Grid((5, 9, 8)), TEXT),  # text last
    ],
)
def test_flashinfer(compare: str, grid: Grid, text_len: int, installed: Installed) -> None:
    installed.add(
        "flashinfer",
        BlockSparseAttentionWrapper=BlockSparseAttentionWrapper,
        VariableBlockSparseAttentionWrapper=VariableBlockSparseAttentionWrapper,
    )
    where = scene(f"full,{compare},grat-far", grid, text_len)
    [row] = rows_of("flashinfer", where)  # it cannot say summaries: no row beside grat-far
    assert (row.name, row.mask) == (f"flashinfer ({compare})", "identical")
    assert_exact(row, where)


# sage and pisa


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_sage_is_dense_and_stands_beside_full(installed: Installed) -> None:
    def sageattn(q: Any, k: Any, v: Any, tensor_layout: str = "HND", is_causal: bool = False) -> torch.Tensor:
        assert tensor_layout == "NHD"
        return masked(q[0], k[0], v[0], torch.ones(q.shape[1], q.shape[1], dtype=torch.bool))[None]

    installed.add("sageattention", sageattn=sageattn)
    where = scene("full,grat-b")
    [row] = rows_of("sage", where)
    assert (row.name, row.density, row.mask) == ("sage (full)", 1.0, "identical")
    assert_exact(row, where)
    refused = peer_rows("sage", scene("full", head_dim=256))
    assert refused == Absent("sage", "it takes head dimensions up to 128, not 256")


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_pisa_runs_at_equal_density_and_promises_no_mask(installed: Installed) -> None:
    seen: list[int] = []

    def piecewise_sparse_attention(q: Any, k: Any, v: Any, density: float = 0.1, block_size: int = 64) -> torch.Tensor:
        assert q.shape[1:] == (2, 16 * 24 + TEXT, 16)  # [B, H, N, D]
        assert q.is_contiguous()
        seen.append(max(1, int(density * -(-q.shape[2] // block_size))))
        return q + v

    installed.add("piecewise_attn", piecewise_sparse_attention=piecewise_sparse_attention)
    where = scene("full,full-list,grat-b,grat-x")
    rows = rows_of("pisa", where)
    assert [(row.name, row.mask, row.attended) for row in rows] == [
        ("pisa (grat-b)", "equal density", None),
        ("pisa (grat-x)", "equal density", None),
    ]
    for row, variant in zip(rows, where.patterns, strict=True):
        torch.testing.assert_close(row.call(), where.query + where.value)
        blocks = -(-where.query.shape[1] // 64)
        assert row.density == seen[-1] / blocks
        assert abs(row.density - where.plan(variant).density) <= 0.5 / blocks


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_what_a_peer_raises_is_the_reason_of_its_row_and_memory_stays_memory(installed: Installed) -> None:
    def fails(*arguments: Any, **options: Any) -> torch.Tensor:
        raise AssertionError("CUDA architecture sm_30\nis not supported")

    def too_large(*arguments: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    installed.add("sageattention", sageattn=fails)
    with pytest.raises(CannotRun, match=r"^sageattention failed: AssertionError: CUDA architecture sm_30$"):
        rows_of("sage", scene("full"))[0].call()
    installed.add("sageattention", sageattn=too_large)
    with pytest.raises(torch.OutOfMemoryError):
        rows_of("sage", scene("full"))[0].call()
    installed.add("natten", na2d=fails)
    with pytest.raises(CannotRun, match=r"^NATTEN failed: AssertionError"):
        rows_of("natten", scene("na"))[0].call()
