"""Other projects' sparse kernels, run beside ours on the same tensors where they are installed.

A peer computes the identical mask where it can express it; otherwise it runs at equal density, and its row says so.
What is not installed, or cannot run on the device, is absent: never a slow row. Preparation that a peer does once per
mask, and the layout that it wants its tensors in, are not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import numpy as np
import torch

from grat_cli.bench.baselines import Window, mask_row, natten_baseline, natten_obstacle
from grat_cli.bench.measure import guarded
from grat_cli.bench.results import Absent, Mask
from grat_cli.bench.sampled import AttendedRows, rows_of_mask, rows_of_plan
from grat_cli.fidelity.variants import Variant, na_window_near, size_text
from grat_kernels import Plan, SlidingTile, can_run, span_attention
from grat_kernels.analysis import reach

_HALF_PRECISION = (torch.float16, torch.bfloat16)
_WORKSPACE_BYTES = 128 * 2**20
_PISA_BLOCK = 64


@dataclass(frozen=True)
class Scene:
    """What every row of a case computes on.

    Attributes:
        query: `[1, N, H, D]`; key and value likewise.
        variants: those of the comparison.
        text_len: text tokens.
        text_first: whether they come before the image tokens.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    variants: Sequence[Variant]
    text_len: int
    text_first: bool

    @cached_property
    def patterns(self) -> list[Variant]:
        """The variants over groups that peers stand beside."""
        return [variant for variant in self.variants if variant.pattern is not None and variant.kind != "full-list"]

    def plan(self, variant: Variant) -> Plan:
        """The plan of a variant over groups, one pattern for all heads."""
        plan = variant.plan(self.text_len, self.text_first)
        assert isinstance(plan, Plan)
        return plan


@dataclass(frozen=True)
class PeerRow:
    """A peer beside one variant.

    Attributes:
        name: such as `flex (grat-b)`.
        description: what it computes.
        kernel: package and version.
        mask: how it relates to the variant's.
        density: attended pairs over all pairs.
        reach: farthest token that is attended exactly; None where the peer chooses at run time.
        call: runs it; raises `CannotRun` for whatever goes wrong in it, but for lack of memory.
        executed_pairs: for predicting its time.
        extra_bytes: for predicting its memory, output included.
        attended: what it should compute; None where it approximates.
    """

    name: str
    description: str
    kernel: str
    mask: Mask
    density: float
    reach: float | None
    call: Callable[[], torch.Tensor]
    executed_pairs: float
    extra_bytes: int
    attended: AttendedRows | None


def peer_rows(name: str, scene: Scene) -> list[PeerRow] | Absent:
    """The rows of a peer in a case, or why it has none."""
    rows = _PEERS[name](scene)
    if isinstance(rows, str):
        return Absent(name, rows)
    return rows or Absent(name, "nothing in --compare that it could stand beside: add grat-b")


# natten


def _natten(scene: Scene) -> list[PeerRow] | str:
    """NATTEN (arXiv 2504.16922): `na` itself, sliding tiles as strided windows, else a window of equal density."""
    rows = []
    for variant in scene.variants:
        if variant.kind == "na" and variant.window is not None:
            rows.append((variant, variant.window, None, "identical"))
        elif variant.kind == "sta" and (tiles := _strided_window(variant)) is not None:
            rows.append((variant, *tiles, "identical"))
        elif variant in scene.patterns:
            keys = scene.plan(variant).attended_pairs / scene.query.shape[1] - scene.text_len
            rows.append((variant, na_window_near(variant.grid, max(keys, 1.0)), None, "equal density"))
    found = []
    for variant, size, stride, mask in rows:
        window = Window("na", variant.grid, size, scene.text_len, scene.text_first)
        if obstacle := natten_obstacle(window, scene.query.device):
            return obstacle
        words = f"neighbourhood attention: {size_text(size)} tokens around each token"
        attended = rows_of_mask(partial(mask_row, window, None))
        if stride is not None:
            words += f", {size_text(stride)} queries share a window"
            # The tensors are raster-ordered here: the mask is that of the tiles, not of the plan's token order.
            attended = rows_of_mask(partial(_strided_row, window, stride))
        baseline = natten_baseline(window, stride)
        pairs = scene.variants[0].grid.tokens * (math.prod(size) + scene.text_len)
        pairs += scene.text_len * scene.query.shape[1]
        reach = math.hypot(*(width - 1 for width in size)) if stride is None else variant.reach()
        found.append(
            PeerRow(
                name=f"natten ({variant.name})",
                description=words,
                kernel=_named("natten"),
                mask="identical" if mask == "identical" else "equal density",
                density=pairs / scene.query.shape[1] ** 2,
                reach=reach,
                call=partial(baseline.attention, scene.query, scene.key, scene.value),
                executed_pairs=pairs,
                extra_bytes=3 * scene.query.nbytes,
                attended=attended,
            )
        )
    if not found and importlib.util.find_spec("natten") is None:
        return "the package natten is not installed"
    return found


def _strided_window(variant: Variant) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Window and stride in tokens by which NATTEN computes sliding tiles; None where tiles do not fill the grid."""
    assert variant.grouping is not None
    assert isinstance(variant.pattern, SlidingTile)
    tile, widths = variant.grouping.group, variant.pattern.window
    if any(extent % size for extent, size in zip(variant.grid.shape, tile, strict=True)):
        return None
    if isinstance(widths, int):
        widths = (widths,) * variant.grid.axes
    size = tuple(
        min(width * side, extent) for width, side, extent in zip(widths, tile, variant.grid.shape, strict=True)
    )
    return size, tile


def _strided_row(window: Window, stride: tuple[int, ...], position: int) -> torch.Tensor | None:
    """`mask_row` where the queries of each stride share the window of the query in their middle."""
    if window.text.start <= position < window.text.stop:
        return None
    coordinates = np.unravel_index(position - window.image.start, window.grid.shape)
    inside = np.ones((), np.bool_)
    for coordinate, step, extent, size in zip(coordinates, stride, window.grid.shape, window.size, strict=True):
        leader = min(coordinate // step * step + step // 2, extent - 1)
        first = min(max(leader - size // 2, 0), extent - size)
        keys = np.arange(extent)
        inside = np.logical_and.outer(inside, (keys >= first) & (keys < first + size))
    row = torch.ones(window.tokens, dtype=torch.bool)
    row[window.image] = torch.from_numpy(inside.reshape(-1))
    return row


# flex


def _flex(scene: Scene) -> list[PeerRow] | str:
    """PyTorch's FlexAttention with the block mask of the plan: every pattern, summaries included."""
    query = scene.query
    ability = can_run("flex", query.device, query.dtype, query.shape[3], query.shape[1])
    if not ability:
        return ability.reason
    uncompiled_bytes = 3 * query.shape[2] * query.shape[1] ** 2 * 4 if query.device.type == "cpu" else 0
    return [
        _identical(
            "flex",
            f"torch {torch.__version__}",
            variant,
            scene,
            partial(span_attention, query, scene.key, scene.value, scene.plan(variant), backend="flex"),
            extra_bytes=3 * query.nbytes + uncompiled_bytes,
        )
        for variant in scene.patterns
        if not scene.plan(variant).chooses  # masks cannot say what is chosen
    ]


# flashinfer


def _flashinfer(scene: Scene) -> list[PeerRow] | str:
    """FlashInfer's block-sparse attention: blocks are groups, so it cannot say summaries."""
    module = _module("flashinfer", scene, _HALF_PRECISION)
    if isinstance(module, str):
        return module
    exact = [variant for variant in scene.patterns if not scene.plan(variant).summaries.rows]
    return [
        _identical(
            "flashinfer",
            _named("flashinfer", "flashinfer-python"),
            variant,
            scene,
            _once(lambda variant=variant: _flashinfer_call(module, scene, scene.plan(variant))),
            extra_bytes=scene.query.nbytes + _WORKSPACE_BYTES,
        )
        for variant in exact
    ]


def _flashinfer_call(module: Any, scene: Scene, plan: Plan) -> Callable[[], torch.Tensor]:
    """Blocks of one size where all groups and the text are cut into such; else blocks of the groups' own sizes."""
    _, tokens, heads, head_dim = scene.query.shape
    device, dtype = scene.query.device, scene.query.dtype
    attended, sizes = block_matrix(plan)
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    side = int(sizes.max())
    image_sizes = plan.grouping.sizes
    if (image_sizes == side).all() and plan.text_len % side == 0:
        attended = np.repeat(np.repeat(attended, sizes // side, axis=0), sizes // side, axis=1)
        indptr = torch.from_numpy(np.concatenate([[0], np.cumsum(attended.sum(1))]).astype(np.int32)).to(device)
        indices = torch.from_numpy(np.nonzero(attended)[1].astype(np.int32)).to(device)
        wrapper = module.BlockSparseAttentionWrapper(workspace)
        shape = (indptr, indices, tokens, tokens, side, side, heads, heads, head_dim)
        wrapper.plan(*shape, **_accepted(wrapper.plan, q_data_type=dtype, kv_data_type=dtype, o_data_type=dtype))
        tensors = [tensor[0].contiguous() for tensor in (scene.query, scene.key, scene.value)]
        return lambda: wrapper.run(*tensors)[None]
    mask = torch.from_numpy(attended).to(device).expand(heads, -1, -1).contiguous()
    block_sizes = torch.from_numpy(sizes.astype(np.int32)).to(device).expand(heads, -1).contiguous()
    wrapper = module.VariableBlockSparseAttentionWrapper(workspace)
    shape = (mask, block_sizes, block_sizes, heads, heads, head_dim)
    wrapper.plan(*shape, **_accepted(wrapper.plan, q_data_type=dtype, kv_data_type=dtype))
    tensors = [tensor[0].transpose(0, 1).contiguous() for tensor in (scene.query, scene.key, scene.value)]
    return lambda: wrapper.run(*tensors).transpose(0, 1)[None]


def block_matrix(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Which block of the joint sequence attends which, `[blocks, blocks]` bool, and the tokens of each block.

    Blocks are the groups in token order, and the text.
    """
    grouping = plan.grouping
    ranking = np.argsort(grouping.starts)
    levels = plan.pattern.levels(grouping.coordinates, grouping.coordinates, grouping.counts)
    attended, sizes = levels[ranking][:, ranking] == 0, grouping.sizes[ranking]
    if plan.text_len:
        place = 0 if plan.text_first else len(sizes)
        attended = np.insert(np.insert(attended, place, True, axis=0), place, True, axis=1)
        sizes = np.insert(sizes, place, plan.text_len)
    return attended, sizes


# sage


def _sage(scene: Scene) -> list[PeerRow] | str:
    """SageAttention (arXiv 2411.10958): dense attention in 8 bits; it knows no masks, so it stands beside `full`."""
    module = _module("sageattention", scene, _HALF_PRECISION)
    if isinstance(module, str):
        return module
    if scene.query.shape[3] > 128:
        return f"it takes head dimensions up to 128, not {scene.query.shape[3]}"
    tokens = scene.query.shape[1]
    call = partial(module.sageattn, scene.query, scene.key, scene.value, tensor_layout="NHD", is_causal=False)
    return [
        PeerRow(
            name="sage (full)",
            description="every token attends every token, in 8 bits",
            kernel=_named("sageattention"),
            mask="identical",
            density=1.0,
            reach=math.hypot(*(extent - 1 for extent in scene.variants[0].grid.shape)),
            call=guarded("sageattention", call),
            executed_pairs=tokens**2,
            extra_bytes=3 * scene.query.nbytes,
            attended=rows_of_mask(lambda position: None),
        )
    ]


# pisa


def _pisa(scene: Scene) -> list[PeerRow] | str:
    """PISA (arXiv 2602.01077) chooses at run time which blocks of 64 keys it computes exactly, and expands the rest."""
    module = _module("piecewise_attn", scene, _HALF_PRECISION)
    if isinstance(module, str):
        return module
    blocks = -(-scene.query.shape[1] // _PISA_BLOCK)

    def prepared(density: float) -> Callable[[], torch.Tensor]:
        tensors = [tensor.transpose(1, 2).contiguous() for tensor in (scene.query, scene.key, scene.value)]
        run = partial(module.piecewise_sparse_attention, *tensors, density=density, block_size=_PISA_BLOCK)
        return lambda: run().transpose(1, 2)

    rows = []
    for variant in scene.patterns:
        exact_blocks = max(1, round(scene.plan(variant).density * blocks))
        # It rounds `density * blocks` down.
        density = (exact_blocks + 0.5) / blocks
        rows.append(
            PeerRow(
                name=f"pisa ({variant.name})",
                description=f"{exact_blocks} of {blocks} blocks of {_PISA_BLOCK} keys exactly, all others expanded",
                kernel=_named("piecewise_attn", "piecewise-attn"),
                mask="equal density",
                density=exact_blocks / blocks,
                reach=None,
                call=guarded("piecewise_attn", _once(partial(prepared, density))),
                executed_pairs=scene.query.shape[1] ** 2 * exact_blocks / blocks,
                extra_bytes=5 * scene.query.nbytes,
                attended=None,
            )
        )
    return rows


_PEERS: dict[str, Callable[[Scene], list[PeerRow] | str]] = {
    "natten": _natten,
    "flex": _flex,
    "flashinfer": _flashinfer,
    "sage": _sage,
    "pisa": _pisa,
}


# What they share


def _identical(
    peer: str, kernel: str, variant: Variant, scene: Scene, call: Callable[[], torch.Tensor], extra_bytes: int
) -> PeerRow:
    """A row of a peer that computes the mask of a pattern, in the token order of its plan."""
    plan = scene.plan(variant)
    return PeerRow(
        name=f"{peer} ({variant.name})",
        description=variant.description,
        kernel=kernel,
        mask="identical",
        density=plan.density,
        reach=reach(plan),
        call=guarded(peer, call),
        executed_pairs=plan.attended_pairs,
        extra_bytes=extra_bytes,
        attended=rows_of_plan(plan),
    )


def _module(package: str, scene: Scene, dtypes: Sequence[torch.dtype]) -> ModuleType | str:
    """The package of a peer that needs a CUDA device, or why it cannot be used."""
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    if scene.query.device.type != "cuda":
        return f"it runs on CUDA devices, not {scene.query.device.type}"
    if scene.query.dtype not in dtypes:
        return f"it takes {' and '.join(map(_dtype_name, dtypes))}, not {_dtype_name(scene.query.dtype)}"
    try:
        return importlib.import_module(package)
    except Exception as error:  # another project's code: whatever it raises, it cannot be used
        return f"importing {package} failed: {type(error).__name__}: {error}"


def _once(prepare: Callable[[], Callable[[], torch.Tensor]]) -> Callable[[], torch.Tensor]:
    """A call whose preparation happens the first time, which is the warm-up."""
    prepared: list[Callable[[], torch.Tensor]] = []

    def call() -> torch.Tensor:
        if not prepared:
            prepared.append(prepare())
        return prepared[0]()

    return call


def _accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that a function takes: they came with later versions."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def _named(package: str, distribution: str | None = None) -> str:
    """Package and version."""
    try:
        return f"{package} {version(distribution or package)}"
    except PackageNotFoundError:
        return package


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
