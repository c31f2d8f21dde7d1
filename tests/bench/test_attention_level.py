"""The attention level: figures that follow from plan and times, errors that catch a wrong kernel, rows that say no."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from grat_cli.bench import attention_level, dense
from grat_cli.bench.attention_level import run_attention_level
from grat_cli.bench.measure import CannotRun
from grat_cli.bench.results import BenchResult, Row
from grat_cli.bench.sampled import rows_of_mask, rows_of_plan, sampled_error
from grat_cli.bench.sizes import Size
from grat_cli.errors import BadInput
from grat_cli.estimates.peak_rates import peak_tflops
from grat_cli.fidelity.variants import NAMES, parse_variants
from grat_kernels import Block, CrissCross, Far, Grid, Grouping, Pattern, Union, build_plan, reference, span_attention
from grat_kernels.analysis import reach

CPU = torch.device("cpu")
PICTURE = Size("picture", Grid((13, 18)), 7)
VIDEO = Size("video", Grid((3, 7, 9)), 5)


def run(compare: str, *sizes: Size, **options: Any) -> BenchResult:
    settings: dict[str, Any] = {
        "heads": 2,
        "head_dim": 16,
        "dtype": torch.float32,
        "device": CPU,
        "repetitions": 2,
        "max_seconds": None,
        "command": "grat bench",
    }
    return run_attention_level(parse_variants(compare), sizes or (PICTURE,), **settings | options)


def test_every_variant_has_all_its_figures_on_two_and_three_axes() -> None:
    result = run(",".join(NAMES), PICTURE, VIDEO)
    assert [case.title for case in result.cases] == ["picture", "video"]
    for case, size in zip(result.cases, (PICTURE, VIDEO), strict=True):
        rows = {row.name: row for row in case.rows}
        assert list(rows) == list(NAMES)
        if size is VIDEO:
            clear = rows.pop("clear")
            assert (clear.skipped, clear.times_ms) == ("CLEAR is defined on two axes, not 3", ())
        full_ms = rows["full"].median_ms
        assert full_ms is not None
        for row in rows.values():
            assert len(row.times_ms) == 2, row
            median = row.median_ms or math.nan
            assert row.density is not None
            assert row.speedup == pytest.approx(full_ms / median)
            assert row.sparse_efficiency == pytest.approx(full_ms * row.density / median)
            pairs = row.density * size.tokens**2
            assert row.tflops == pytest.approx(4 * pairs * 2 * 16 / (median / 1000) / 1e12)
            assert row.pair_ns == pytest.approx(median * 1e6 / (pairs * 2))
            assert row.peak_share is None
            # Output and inputs are the least; fp32 is all that separates it from fp64.
            assert row.peak_memory_bytes is None or row.peak_memory_bytes >= 3 * size.tokens * 2 * 16 * 4
            assert row.error is not None
            assert row.error < 1e-5
            assert row.kernel is not None
        assert rows["full"].density == rows["full-list"].density == 1
        assert rows["full"].kernel == "torch SDPA"
        assert rows["grat-b"].kernel == "sdpa"
    assert BenchResult.from_json(json.dumps(result.as_dict())) == result


def test_density_and_reach_are_those_of_the_plan() -> None:
    [row] = run("grat-far:block=2x2:group=4x4").cases[0].rows
    plan = build_plan(Grouping(PICTURE.grid, (4, 4)), Union(Block(1), Far([(1, (2, 2))])), 7, True)
    assert (row.density, row.reach_tokens) == (plan.density, reach(plan))
    assert (row.speedup, row.sparse_efficiency) == (None, None)  # nothing to compare with


def test_heads_that_differ_do_as_much_as_heads_that_do_not() -> None:
    """The mean of the radii below and above is the radius, but for the borders of the axis that they differ on."""
    size = Size("long", Grid((64, 8)), 7)
    uniform, mixed = run("grat-b:group=4,grat-heads:group=4", size).cases[0].rows
    # Of 16 groups, radius 1 attends 3 * 16 - 2, radii 0 and 2 attend (16 + 5 * 16 - 6) / 2 on average: one less.
    assert (mixed.density or 0) - (uniform.density or 0) == pytest.approx(-((4 * 8) ** 2) / size.tokens**2)
    assert mixed.reach_tokens == math.hypot(11, 7)
    [alone] = run("grat-heads", heads=1).cases[0].rows
    assert alone.skipped == "2 patterns by head need as many heads, not 1"
    with pytest.raises(BadInput, match="must be 1 or more"):
        run("grat-heads:radius=0x1")


def test_full_comes_first_wherever_it_was_named() -> None:
    assert [row.name for row in run("grat-b,na,full").cases[0].rows] == ["full", "grat-b", "na"]


def test_several_backends_are_rows_of_their_own_and_one_that_cannot_run_says_why() -> None:
    rows = run("full,grat-b", backends=("sdpa", "reference", "triton")).cases[0].rows
    assert [row.name for row in rows] == ["full", "grat-b (sdpa)", "grat-b (reference)", "grat-b (triton)"]
    assert [row.kernel for row in rows[1:]] == ["sdpa", "reference", "triton"]
    [refused] = run("grat-b", Size("long", Grid((129, 128)), 0), backends=("flex",)).cases[0].rows
    assert "16512 tokens are more than" in str(refused.skipped)


def test_kernels_that_cannot_choose_by_content_say_so() -> None:
    row, refused = run("choose:group=4", backends=("sdpa", "flex")).cases[0].rows
    assert row.error is not None
    assert row.error < 1e-5
    assert "chosen by content" in str(refused.skipped)


def test_a_kernel_that_is_wrong_shows_in_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        output = span_attention(*arguments, **options).clone()
        output[:, 100:] *= 1.01
        return output

    right = run("grat-b").cases[0].rows[0]
    monkeypatch.setattr(attention_level, "span_attention", wrong)
    found = run("grat-b").cases[0].rows[0]
    assert right.error is not None
    assert found.error is not None
    assert found.error > 100 * right.error


def test_output_that_is_not_finite_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_level, "span_attention", lambda q, *rest, **options: torch.full_like(q, math.nan))
    row = run("grat-b").cases[0].rows[0]
    assert (row.skipped, row.times_ms) == ("its output is not finite", ())


def test_sizes_beyond_memory_and_time_are_skipped_before_anything_is_allocated() -> None:
    huge = Size("huge", Grid((400_000, 400_000)), 0)
    rows = run("full,na:window=3,clear:window=3", huge).cases[0].rows
    assert all("GiB more memory" in str(row.skipped) for row in rows)
    slow = run("full,grat-b", Size("slow", Grid((512, 512)), 512), max_seconds=0.5).cases[0].rows
    assert all("(--max-seconds)" in str(row.skipped) for row in slow)
    assert [row.density for row in slow] == [1.0, pytest.approx(0.0123, abs=1e-4)]


def test_what_does_not_fit_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(BadInput, match=r"--compare grat-b:radius=1x1 on 3x7x9 tokens"):
        run("grat-b:radius=1x1", PICTURE, VIDEO)


def test_the_fastest_dense_kernel_is_full_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            output = quick(query, key, value)
        return output

    def absent(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        raise CannotRun("it wants another GPU")

    [quick] = dense.dense_candidates(CPU).values()
    candidates = {"slow": slow, "absent": absent, "quick": quick}
    monkeypatch.setattr(dense, "dense_candidates", lambda device: candidates)
    result = run("full")
    [full] = result.cases[0].rows
    assert full.kernel == "quick"
    trials = result.settings["dense_trials_ms"]["picture"]
    assert trials["absent"] == "it wants another GPU"
    assert trials["slow"] > (full.median_ms or math.inf)

    monkeypatch.setattr(dense, "dense_candidates", lambda device: {"absent": absent, "gone": absent})
    [full] = run("full").cases[0].rows
    assert full.skipped == "it wants another GPU"


@pytest.mark.parametrize(
    "pattern",
    [Union(CrissCross(), Far([(0, (2, 4))])), Union(Block(0), Far([(0, (2, 4))], (3, 5, (2, 1))))],
    ids=["far", "choose"],
)
def test_sampled_errors_against_the_oracle(pattern: Pattern) -> None:
    """Exact rows are the reference's, with means of ragged blocks and text; a change of any kind is found."""
    plan = build_plan(Grouping(Grid((9, 10)), (4, 4)), pattern, 6, False)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, plan.tokens, 3, 8, generator=generator) for _ in range(3))
    exact = reference.attention(query.double(), key.double(), value.double(), plan, None, 8**-0.5)
    found = sampled_error(exact, query, key, value, rows_of_plan(plan), text_start=plan.text_start, samples=200)
    assert found.error < 1e-6  # the reference itself computes in fp32
    assert 0 < found.plain_error < 1e-5
    shifted = sampled_error(exact + 0.5, query, key, value, rows_of_plan(plan))
    assert shifted.error == pytest.approx(0.5, abs=1e-5)
    dense_error = sampled_error(exact, query, key, value, rows_of_mask(lambda position: None))
    assert dense_error.error > 0.01


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA A10G", None),
        ("AMD EPYC", None),
    ],
)
def test_peak_rates(name: str, tflops: float | None) -> None:
    assert peak_tflops(name, "bfloat16") == tflops
    assert peak_tflops(name, "float32") is None


def test_share_of_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_level, "device_name", lambda device: "NVIDIA H200")
    row: Row = run("full", dtype=torch.bfloat16).cases[0].rows[0]
    assert row.peak_share == pytest.approx((row.tflops or 0) / 989.4)


def test_it_runs_without_the_packages_of_the_command_line() -> None:
    """On a GPU machine that has torch, triton and numpy alone."""
    code = """
import sys
for name in ("typer", "rich", "pydantic", "diffusers", "yaml", "PIL", "transformers"):
    sys.modules[name] = None
import torch
from grat_cli.bench.attention_level import run_attention_level
from grat_cli.bench.results import BenchResult
from grat_cli.bench.sizes import Size
from grat_cli.fidelity.variants import parse_variants
from grat_kernels import Grid
result = run_attention_level(
    parse_variants("full,na,grat-b"), [Size("small", Grid((8, 8)), 3)], heads=1, head_dim=16, dtype=torch.float32,
    device=torch.device("cpu"), repetitions=1, max_seconds=None, command="", peers=("natten", "flex", "sage"),
)
assert all(row.times_ms for row in result.cases[0].rows), result
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
