"""The compiled span kernels against the definition, on a CUDA device.

Needs torch, triton, numpy and pytest, and no downloads: `make gpu`.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grat_cli.bench.sampled import rows_of_plan, sampled_error
from grat_kernels import (
    Block,
    Choice,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    HeadPlan,
    Plan,
    SlidingTile,
    Union,
    build_head_plan,
    build_plan,
    can_run,
    choosing,
    reference,
    self_test,
    span_attention,
    triton_backend,
)
from grat_kernels.block_scores import block_scores
from grat_kernels.launching import fits_descriptor
from grat_kernels.summaries import summarise
from grat_kernels.tile_configs import TABLE, Row, TileConfig, architecture_of, tile_config
from grat_kernels.trials import Form

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
# A kernel, and how it reads full tiles where it can do so in two ways.
TRITON_FORMS = ("triton-descriptors", "triton-pointers")
KERNELS = pytest.mark.parametrize("kernel", [*TRITON_FORMS, "gluon"])
# A kernel as `span_attention` calls it: of triton the form that fits the tensors.
BACKENDS = pytest.mark.parametrize("kernel", ["triton", "gluon"])

PLANS = {
    "full": build_plan(Grouping(Grid((20, 26)), (16, 16)), Full(), 77),
    "block": build_plan(Grouping(Grid((45, 52)), (16, 16)), Block(1), 77),
    "block of a video": build_plan(Grouping(Grid((6, 21, 18)), (4, 8, 8)), Block((1, 1, 0)), 30, text_first=False),
    "criss-cross": build_plan(Grouping(Grid((40, 37)), (8, 16)), CrissCross(), 200, text_first=False),
    "planes": build_plan(Grouping(Grid((6, 21, 18)), (4, 8, 8)), CrissCross(1), 7),
    "lines": build_plan(Grouping(Grid((9, 21, 18)), (4, 8, 8)), CrissCross(2), 130, text_first=False),
    "union": build_plan(Grouping(Grid((45, 40)), (16, 16)), Union(Block(0), CrissCross()), 0),
    "sliding tiles": build_plan(Grouping(Grid((40, 50)), (8, 8)), SlidingTile((1, 3)), 33),
    "far field": build_plan(Grouping(Grid((45, 50)), (16, 16)), Union(Block(0), Far([(0, (2, 2))])), 13),
    "far pyramid": build_plan(
        Grouping(Grid((40, 50)), (8, 8)), Union(Block(0), Far([(0, (1, 2)), (2, (4, 4))])), 20, text_first=False
    ),
    "far field of a video": build_plan(
        Grouping(Grid((6, 17, 20)), (2, 8, 8)), Union(CrissCross(2), Far([(0, (1, 2, 2))])), 256, text_first=False
    ),
    "one token": build_plan(Grouping(Grid((1,)), (4,)), Full()),
    "one token and text": build_plan(Grouping(Grid((1, 1, 1)), (2, 2, 2)), Block(0), 3, text_first=False),
    "text and one token": build_plan(Grouping(Grid((1, 1)), (2, 2)), Block(0), 3),
}


def this_architecture() -> str:
    return architecture_of(torch.cuda.get_device_capability())


def rows_of_this_device() -> list[Row]:
    """Every row of the table for the device at hand; none where there is no device."""
    return list(TABLE[this_architecture()]) if torch.cuda.is_available() else []


def random_tensors(
    plan: Plan | HeadPlan, batch: int, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(plan.tokens + head_dim)
    shape = (batch, plan.tokens, heads, head_dim)
    query, key, value = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(3))
    return query, key, value


def tiles(dtype: torch.dtype, head_dim: int, descriptors: bool) -> TileConfig:
    return tile_config(this_architecture(), head_dim, dtype.itemsize * 8, descriptors=descriptors)


def run(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan | HeadPlan,
    text_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """One of `KERNELS`; skips the test where it does not run on this device or for these tensors."""
    dtype, head_dim = query.dtype, query.shape[3]
    backend, form = ("triton", kernel.partition("-")[2]) if kernel in TRITON_FORMS else (kernel, None)
    ability = can_run(backend, "cuda", dtype, head_dim, plan.tokens)
    if not ability:
        pytest.skip(f"{backend}: {ability.reason}")
    if form is None:
        return span_attention(query, key, value, plan, text_valid, backend=backend)
    config = tiles(dtype, head_dim, form == "descriptors")
    return triton_backend.attention(query, key, value, plan, text_valid, 1 / math.sqrt(head_dim), config=config)


def assert_accurate(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    text_valid: torch.Tensor | None = None,
) -> None:
    """At most twice the error of a dense computation in the same precision, and one unit in the last place."""
    scale = 1 / math.sqrt(query.shape[3])
    exact = reference.attention(
        query.double(), key.double(), value.double(), plan, text_valid, scale, compute_dtype=torch.float64
    )
    plain = reference.attention(query, key, value, plan, text_valid, scale, compute_dtype=query.dtype)
    last_place = torch.finfo(query.dtype).eps * exact.abs().max()
    assert output.dtype == query.dtype
    assert output.is_contiguous()
    assert (output - exact).abs().max() <= 2 * (plain - exact).abs().max() + last_place


CHOOSING = {
    "picture": build_plan(
        Grouping(Grid((45, 50)), (16, 16)), Union(Block(0), Far([(0, (8, 8))], Choice(3, 6, (4, 4)))), 77
    ),
    "video": build_plan(
        Grouping(Grid((6, 21, 18)), (4, 8, 8)),
        Union(Block(0), Far([(0, (2, 4, 4))], Choice(2, 9, (1, 2, 2)))),
        30,
        text_first=False,
    ),
}


@pytest.mark.parametrize("kernel", TRITON_FORMS)
@pytest.mark.parametrize("name", CHOOSING)
def test_what_groups_choose_is_attended(name: str, kernel: str) -> None:
    """In fp32, where rounding changes no choice."""
    plan = CHOOSING[name]
    tensors = random_tensors(plan, 2, 3, 64, torch.float32)
    text_valid = torch.tensor([plan.text_len, 5], device="cuda")
    assert_accurate(run(kernel, *tensors, plan, text_valid), *tensors, plan, text_valid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("by_head", [False, True])
def test_what_groups_choose_is_attended_in_16_bits(by_head: bool, head_dim: int, dtype: torch.dtype) -> None:
    device = torch.empty(0, device="cuda").device
    form = Form(device, dtype, head_dim, far=True, padded=True, by_head=by_head, choosing=True)
    self_test.compare("triton", triton_backend.attention, form)


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("name", CHOOSING)
def test_scores_of_blocks_equal_those_of_torch(
    name: str, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, scale = CHOOSING[name], 1 / math.sqrt(head_dim)
    query, key, value = random_tensors(plan, 2, 3, head_dim, dtype)
    summaries = summarise(key, plan), summarise(value, plan)
    by_torch: list[torch.Tensor] = []
    torchs_own = choosing._scores
    monkeypatch.setattr(choosing, "_scores", lambda *given: by_torch.append(torchs_own(*given)) or by_torch[-1])
    choosing.chosen_rows(query, summaries, plan, scale)
    expected = torch.cat(by_torch, dim=1)
    scores = block_scores(choosing.group_means(query, plan), *summaries, plan, scale)
    assert torch.equal(scores.isneginf(), expected.isneginf())
    told = scores.isfinite()
    bound = 4 * head_dim * torch.finfo(torch.float32).eps * expected[told].abs().max()
    assert (scores[told] - expected[told]).abs().max() <= bound


@DTYPES
@KERNELS
@pytest.mark.parametrize("name", PLANS)
def test_equals_the_definition(name: str, kernel: str, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    tensors = random_tensors(plan, 2, 3, 128, dtype)
    assert_accurate(run(kernel, *tensors, plan), *tensors, plan)


@pytest.mark.parametrize("row", rows_of_this_device(), ids=str)
@pytest.mark.parametrize("name", ["block", "far field", "far field of a video"])
def test_every_row_of_the_table(name: str, row: Row) -> None:
    plan = PLANS[name]
    text_valid = torch.tensor([plan.text_len, plan.text_len // 3], device="cuda")
    for dtype in (torch.bfloat16, torch.float16) if row.bits == 16 else (torch.float32,):
        tensors = random_tensors(plan, 2, 2, row.head_dim, dtype)
        scale = 1 / math.sqrt(row.head_dim)
        for valid in (None, text_valid):
            output = triton_backend.attention(*tensors, plan, valid, scale, config=row.config)
            assert_accurate(output, *tensors, plan, valid)


@DTYPES
@BACKENDS
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 112, 128, 160, 256])
def test_head_dimensions(head_dim: int, kernel: str, dtype: torch.dtype) -> None:
    plan = PLANS["far field of a video"]
    tensors = random_tensors(plan, 1, 5, head_dim, dtype)
    assert_accurate(run(kernel, *tensors, plan), *tensors, plan)


@DTYPES
@KERNELS
@pytest.mark.parametrize("padded", [False, True], ids=["all text", "padded text"])
def test_heads_of_different_classes(padded: bool, kernel: str, dtype: torch.dtype) -> None:
    cells = ((16, 16), (8, 8), (2, 2))
    fine, coarse = (Grouping(Grid((45, 50)), group, cells) for group in ((8, 8), (16, 16)))
    classes = (
        (coarse, Union(Block(0), Far([(0, (2, 2))]))),
        (fine, CrissCross()),
        (coarse, Full()),
        (fine, Union(Block(1), Far([(1, (2, 2)), (2, (8, 8))]))),
    )
    plan = build_head_plan(classes, (2, 0, 3, 1, 0), 77)
    query, key, value = random_tensors(plan, 2, 5, 128, dtype)
    text_valid = torch.tensor([77, 11], device="cuda") if padded else None
    output = run(kernel, query, key, value, plan, text_valid)
    for head, number in enumerate(plan.class_of_head):
        attended, own_query, own_key, own_value = (
            tensor[:, :, head : head + 1].contiguous() for tensor in (output, query, key, value)
        )
        assert_accurate(attended, own_query, own_key, own_value, plan.classes[number], text_valid)


@DTYPES
@KERNELS
@pytest.mark.parametrize(
    "name", ["block", "lines", "far field", "far field of a video", "one token and text", "text and one token"]
)
def test_padded_text_is_masked_in_each_sample(name: str, kernel: str, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    query, key, value = random_tensors(plan, 2, 2, 128, dtype)
    text_valid = torch.tensor([plan.text_len - 2, 0], device="cuda")
    output = run(kernel, query, key, value, plan, text_valid)
    assert_accurate(output, query, key, value, plan, text_valid)
    for sample, valid in enumerate(text_valid.tolist()):
        padding = slice(plan.text_start + valid, plan.text_start + plan.text_len)
        key[sample, padding] = torch.nan
        value[sample, padding] = torch.inf
    assert torch.equal(run(kernel, query, key, value, plan, text_valid), output)


@DTYPES
@KERNELS
@pytest.mark.parametrize("name", ["block", "lines", "far field", "far pyramid", "far field of a video"])
def test_nothing_unattended_reaches_the_output(name: str, kernel: str, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    query, key, value = random_tensors(plan, 1, 2, 128, dtype)
    clean = run(kernel, query, key, value, plan)
    for group in range(len(plan.list_of_group)):
        unseen = ~attended_tokens(plan, group)
        start = plan.image_start + int(plan.grouping.starts[group])
        rows = slice(start, start + int(plan.grouping.sizes[group]))
        bad_key, bad_value = key.clone(), value.clone()
        bad_key[:, unseen] = torch.nan if group % 2 else torch.inf
        bad_value[:, unseen] = torch.nan
        assert torch.equal(run(kernel, query, bad_key, bad_value, plan)[:, rows], clean[:, rows])


def attended_tokens(plan: Plan, group: int) -> torch.Tensor:
    """Which tokens a group attends, itself or through a summary, `[N]` bool."""
    attended = torch.zeros(plan.tokens, dtype=torch.bool)
    for span in plan.spans(group):
        if span.level == 0:
            attended[span.start : span.stop] = True
            continue
        offset = plan.summaries.offsets[span.level - 1]
        for row in range(offset + span.start, offset + span.stop):
            start = int(plan.summaries.starts[row])
            attended[start : start + int(plan.summaries.counts[row])] = True
    return attended.cuda()


@DTYPES
@BACKENDS
def test_layouts(kernel: str, dtype: torch.dtype) -> None:
    """Heads first, parts of a fused projection, and offsets that descriptors do not take: read in place."""
    plan = PLANS["far field"]
    query, key, value = random_tensors(plan, 2, 3, 128, dtype)
    heads_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    fused = torch.stack([query, key, value], dim=2).unbind(2)
    shifted = []
    for tensor in (query, key, value):
        buffer = torch.empty(tensor.numel() + 1, dtype=dtype, device="cuda")
        shifted.append(buffer[1:].view(tensor.shape).copy_(tensor))
    for (one, two, three), fits in (
        (heads_first, False),
        (fused, True),
        (shifted, False),
        ((query, fused[1], value), True),
    ):
        assert all(fits_descriptor(tensor) for tensor in (one, two, three)) == fits
        assert_accurate(run(kernel, one, two, three, plan), query, key, value, plan)


@KERNELS
def test_runs_repeat_bit_by_bit_on_any_stream(kernel: str) -> None:
    plan = PLANS["far field of a video"]
    tensors = random_tensors(plan, 2, 8, 128, torch.bfloat16)
    first = run(kernel, *tensors, plan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = [run(kernel, *tensors, plan) for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(output, first) for output in again)


def needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, there are {free:.0f}")


@KERNELS
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_tensors_of_more_than_two_to_the_31_elements(kernel: str, far: bool) -> None:
    needs_memory(40)
    pattern = Union(Block(1), Far([(1, (8, 8))])) if far else Block(1)
    plan = build_plan(Grouping(Grid((512, 512)), (16, 16)), pattern, 512)
    shape = (3, plan.tokens, 24, 128)
    assert math.prod(shape) > 2**31
    query, key, value = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    output = run(kernel, query, key, value, plan)
    sampled = sampled_error(output, query, key, value, rows_of_plan(plan), text_start=plan.text_start)
    assert sampled.error <= 2 * sampled.plain_error + torch.finfo(torch.bfloat16).eps * sampled.largest


@BACKENDS
def test_strides_of_more_than_two_to_the_31_elements(kernel: str) -> None:
    needs_memory(12)
    plan = PLANS["far field"]
    shape = (2, plan.tokens, 2, 64)
    buffer = torch.empty(2**31 + 2**24, dtype=torch.bfloat16, device="cuda")
    strides = (2**31 + 2**20, 128, 64, 1)
    query, key, value = random_tensors(plan, 2, 2, 64, torch.bfloat16)
    distant_key = torch.as_strided(buffer, shape, strides).copy_(key)
    distant_value = torch.as_strided(buffer, shape, strides, storage_offset=2**22).copy_(value)
    assert_accurate(run(kernel, query, distant_key, distant_value, plan), query, key, value, plan)


SANITIZED = """
import sys
import torch
from grat_kernels import Block, Far, Grid, Grouping, Union, build_plan, can_run, span_attention

backend = sys.argv[1]
launches = 0
for dtype in (torch.bfloat16, torch.float32):
    for head_dim in (64, 80, 128):
        for text_first in (True, False):
            plan = build_plan(Grouping(Grid((21, 37)), (8, 16)), Union(Block(0), Far([(0, (1, 2))])), 19, text_first)
            tensors = [torch.randn(2, plan.tokens, 2, head_dim, device="cuda").to(dtype) for _ in range(3)]
            for text_valid in (None, torch.tensor([19, 4], device="cuda")):
                if can_run(backend, "cuda", dtype, head_dim, plan.tokens):
                    span_attention(*tensors, plan, text_valid, backend=backend)
                    launches += 1
torch.cuda.synchronize()
assert launches
print("finished")
"""


SANITIZER_S = 100.0


@pytest.mark.seconds(SANITIZER_S + 20)
@BACKENDS
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(check: str, kernel: str) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    ability = can_run(kernel, "cuda", torch.bfloat16, 128)
    if not ability:
        pytest.skip(f"{kernel}: {ability.reason}")
    # Without torch's pool of memory, so that each tensor ends where its allocation ends.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, kernel]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=SANITIZER_S
    )
    if "not supported" in result.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "finished" in result.stdout
