"""Norm, rotation, joining and pooling against exact arithmetic and stock diffusers, by torch and by the Triton kernel.

The kernel runs in Triton's interpreter, which rounds fp16 and fp32 rightly and bf16 wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import cases
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import transformer_flux, transformer_hunyuan_video
from hypothesis import given
from hypothesis import strategies as st

from grat_kernels import (
    Block,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    KernelFailure,
    Plan,
    Union,
    build_head_plan,
    build_plan,
    rope_norm,
    rope_norm_runs,
    summaries,
    trials,
)
from grat_kernels.rope_norm import Joined, Norms, Projections
from grat_kernels.rope_norm_sections import Outputs

if torch.cuda.is_available():
    pytest.skip("tests/gpu tests the compiled kernel", allow_module_level=True)

PLANS = {
    "no far field": build_plan(Grouping(Grid((5, 7)), (4, 4)), Block(0), 9),
    "far field": build_plan(Grouping(Grid((10, 11)), (8, 8)), Union(Block(0), Far([(0, (4, 4))])), 13),
    "far pyramid": build_plan(
        Grouping(Grid((9, 13)), (8, 8)), Union(Block(0), Far([(0, (2, 2)), (1, (4, 4)), (2, (8, 8))])), 5
    ),
    "video": build_plan(
        Grouping(Grid((3, 5, 9)), (2, 4, 8)), Union(CrissCross(2), Far([(0, (1, 2, 2)), (1, (2, 4, 4))])), 6, False
    ),
    "video without text": build_plan(Grouping(Grid((2, 3, 5)), (2, 2, 2)), Union(Block(0), Far([(0, (1, 1, 2))]))),
    "one token": build_plan(Grouping(Grid((1, 1)), (2, 2)), Union(Full(), Far([(0, (1, 1))])), 1, False),
}


@dataclass(frozen=True)
class Call:
    """Arguments of `rope_norm.rope_norm` but for the way it runs."""

    image: Projections
    norms: Norms
    rotation: tuple[torch.Tensor, torch.Tensor] | None
    plan: Plan
    text: Projections | None
    text_norms: Norms | None

    def run(self, fused: bool) -> Joined:
        return rope_norm.rope_norm(
            self.image, self.norms, self.rotation, self.plan, text=self.text, text_norms=self.text_norms, fused=fused
        )


def random_call(
    plan: Plan,
    dtype: torch.dtype,
    text_apart: bool,
    text_rotated: bool,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 16,
) -> Call:
    generator = torch.Generator().manual_seed(plan.tokens + head_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def projections(rows: int) -> Projections:
        # Tokens of very different sizes, so that a norm over the wrong ones would show.
        made = (random(batch, rows, heads, head_dim) * random(batch, rows, heads, 1).exp() for _ in range(3))
        return Projections(*(tensor.to(dtype) for tensor in made))

    def norms(eps: float) -> Norms:
        return Norms(random(head_dim).to(dtype), random(head_dim).to(dtype), eps)

    apart = text_apart and plan.text_len > 0
    angles = random(plan.tokens if text_rotated else plan.image_tokens, head_dim // 2) * 4
    angles = angles.repeat_interleave(2, dim=1)
    return Call(
        projections(plan.image_tokens if apart else plan.tokens),
        norms(1e-6),
        (angles.cos(), angles.sin()),
        plan,
        projections(plan.text_len) if apart else None,
        norms(1e-2) if apart else None,
    )


@dataclass(frozen=True)
class Exact:
    """Queries, keys and values in fp64, `[B, N, H, D]` each, with the sizes that rounding errors scale with.

    Attributes:
        sizes: for queries and keys, |a·cos| + |b·sin| of the two terms of a rotated channel.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sizes: tuple[torch.Tensor, torch.Tensor]


def exact(call: Call) -> Exact:
    """The definition, by complex numbers; positions joined by concatenation."""
    plan = call.plan
    positions = slice(plan.image_start, plan.image_start + plan.image_tokens)
    text_rotated = call.rotation is not None and len(call.rotation[0]) == plan.tokens
    angles = torch.ones(plan.tokens, call.image.query.shape[3] // 2, dtype=torch.complex128)
    if call.rotation is not None:
        cosines, sines = (table[:, ::2].double() for table in call.rotation)
        angles[slice(None) if text_rotated else positions] = torch.complex(cosines, sines)

    def join(image: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        if text is None:
            return image
        return torch.cat([text, image] if plan.text_first else [image, text], dim=1)

    results, sizes = [], []
    for index in range(2):
        parts = []
        for part, norms in ((call.image, call.norms), (call.text, call.text_norms)):
            if part is None or norms is None:
                parts.append(None)
                continue
            tokens = part[index].double()
            normalised = tokens / (tokens.square().mean(-1, keepdim=True) + norms.eps).sqrt()
            weight = norms.key if index else norms.query
            parts.append(normalised if weight is None else normalised * weight.double())
        joined = join(parts[0], parts[1])  # type: ignore[arg-type]
        pairs = torch.view_as_complex(joined.unflatten(-1, (-1, 2)).contiguous())
        results.append(torch.view_as_real(pairs * angles[:, None]).flatten(-2))
        swapped = joined.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        turn = angles[:, None].repeat_interleave(2, dim=-1)
        sizes.append((joined * turn.real).abs() + (swapped * turn.imag).abs())
    value = join(call.image.value, call.text.value if call.text else None)
    return Exact(results[0], results[1], value, (sizes[0], sizes[1]))


def fp32_error(sizes: torch.Tensor) -> torch.Tensor:
    """What fp32 arithmetic may add: D squares and their sum (D·u, halved by the root), 2 units each for the root and
    the division, 4 products and a sum (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1)."""
    return (sizes.shape[-1] / 2 + 12) * 2.0**-24 * sizes


def rounding(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of `values` in a dtype, subnormal numbers included."""
    information = torch.finfo(dtype)
    return information.eps / 2 * values.abs() + information.tiny * information.eps / 2


def assert_exact_but_for_rounding(result: Joined, call: Call) -> None:
    """Computed in fp32 and rounded once; means of what was rounded."""
    expected = exact(call)
    dtype = call.image.query.dtype
    for tensor, truth, size in (
        (result.query, expected.query, expected.sizes[0]),
        (result.key, expected.key, expected.sizes[1]),
    ):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        error = fp32_error(size)
        assert ((tensor - truth).abs() <= error + rounding(truth.abs() + error, dtype)).all()
    assert torch.equal(result.value, expected.value)
    if not call.plan.summaries.rows:
        assert result.summaries is None
        return
    assert result.summaries is not None
    for means, tokens in zip(result.summaries, (result.key, result.value), strict=True):
        assert means.dtype == dtype
        assert means.is_contiguous()
        assert_means(means, tokens, call.plan)


def assert_means(means: torch.Tensor, tokens: torch.Tensor, plan: Plan) -> None:
    """Means accumulated in fp32 in any order and rounded once."""
    for row, (start, count) in enumerate(zip(plan.summaries.starts, plan.summaries.counts, strict=True)):
        block = tokens[:, start : start + count].double()
        truth, error = block.mean(1), (count + 2) * 2.0**-24 * block.abs().mean(1)
        assert ((means[:, row] - truth).abs() <= error + rounding(truth.abs() + error, tokens.dtype)).all()


FORMS = pytest.mark.parametrize("fused", [False, True], ids=["torch", "kernel"])
LAYOUTS = {
    "Flux double block": (True, True),
    "Flux single block": (False, True),
    "HunyuanVideo double block": (True, False),
    "HunyuanVideo single block": (False, False),
}


@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PLANS)
def test_equals_exact_arithmetic(name: str, layout: str, fused: bool) -> None:
    call = random_call(PLANS[name], torch.float32, *LAYOUTS[layout])
    assert_exact_but_for_rounding(call.run(fused), call)


@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_rounded_once(layout: str, fused: bool) -> None:
    call = random_call(PLANS["far pyramid"], torch.float16, *LAYOUTS[layout], batch=2, heads=3)
    assert_exact_but_for_rounding(call.run(fused), call)


def test_bfloat16_is_rounded_once_by_torch() -> None:
    call = random_call(PLANS["video"], torch.bfloat16, True, False, batch=2)
    assert_exact_but_for_rounding(call.run(False), call)


@pytest.mark.parametrize("head_dim", [2, 6, 64, 80, 128, 256])
@pytest.mark.parametrize("heads", [1, 9])
def test_head_dimensions_and_odd_heads(head_dim: int, heads: int) -> None:
    plan = build_plan(Grouping(Grid((3, 5)), (2, 4)), Union(Block(0), Far([(0, (2, 2))])), 3)
    call = random_call(plan, torch.float16, True, True, heads=heads, head_dim=head_dim)
    assert_exact_but_for_rounding(call.run(True), call)


@FORMS
def test_norms_without_weights_and_no_rotation(fused: bool) -> None:
    call = random_call(PLANS["far field"], torch.float32, True, True)
    plain = Norms(None, None, 1e-5)
    assert call.text_norms is not None
    for changed in (
        Call(call.image, plain, call.rotation, call.plan, call.text, plain),
        Call(call.image, call.norms, None, call.plan, call.text, call.text_norms),
        Call(call.image, Norms(None, call.norms.key, 1e-6), None, call.plan, call.text, plain),
    ):
        assert_exact_but_for_rounding(changed.run(fused), changed)


def test_weights_and_angles_of_other_dtypes() -> None:
    call = random_call(PLANS["far field"], torch.float16, True, True)
    assert call.rotation is not None
    norms = Norms(call.norms.query.float(), call.norms.key.bfloat16(), 1e-6)  # type: ignore[union-attr]
    rotation = call.rotation[0].half(), call.rotation[1].double()
    changed = Call(call.image, norms, rotation, call.plan, call.text, call.text_norms)
    assert_exact_but_for_rounding(changed.run(True), changed)


def _part_of_a_projection(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as the middle third of a fused projection's output."""
    batch, tokens, heads, head_dim = tensor.shape
    fused = torch.full((batch, tokens, 3, heads, head_dim), torch.nan, dtype=tensor.dtype)
    fused[:, :, 1] = tensor
    return fused[:, :, 1]


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with [B, H, N, D] in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _channels_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with channels that are not next to each other."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]


def _inside_a_larger_one(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN all around."""
    batch, tokens, heads, head_dim = tensor.shape
    larger = torch.full((batch + 2, tokens + 8, heads + 2, head_dim + 16), torch.nan, dtype=tensor.dtype)
    larger[1:-1, 4:-4, 1:-1, 8:-8] = tensor
    return larger[1:-1, 4:-4, 1:-1, 8:-8]


@FORMS
@pytest.mark.parametrize("layout", [_part_of_a_projection, _heads_first, _channels_apart, _inside_a_larger_one])
@pytest.mark.parametrize("apart", [True, False], ids=["double", "single"])
def test_strided_projections_give_the_same_result(
    layout: Callable[[torch.Tensor], torch.Tensor], apart: bool, fused: bool
) -> None:
    plan = build_plan(Grouping(Grid((5, 6)), (4, 4)), Union(Block(0), Far([(0, (2, 2))])), 6)
    call = random_call(plan, torch.float32, apart, True, batch=2, heads=3, head_dim=6)
    strided = Call(
        Projections(*map(layout, call.image)),
        call.norms,
        call.rotation,
        call.plan,
        Projections(*map(layout, call.text)) if call.text else None,
        call.text_norms,
    )
    result = strided.run(fused)
    if fused:
        assert_same_bits(result, call.run(fused))
    else:  # torch adds up in an order that depends on strides
        assert_exact_but_for_rounding(result, call)


def assert_same_bits(result: Joined, expected: Joined) -> None:
    pairs = zip((*result[:3], *(result.summaries or ())), (*expected[:3], *(expected.summaries or ())), strict=True)
    for tensor, other in pairs:
        assert torch.equal(tensor, other)


@FORMS
def test_a_joint_value_is_handed_on_without_a_copy(fused: bool) -> None:
    call = random_call(PLANS["far field"], torch.float32, False, True)
    assert call.run(fused).value is call.image.value


@FORMS
def test_a_token_that_is_not_finite_reaches_its_own_summaries_alone(fused: bool) -> None:
    call = random_call(PLANS["far pyramid"], torch.float32, True, True)
    clean = call.run(fused)
    plan, token = call.plan, 50
    for tensor in call.image:
        tensor[0, token, 1] = torch.nan
    result = call.run(fused)
    position = plan.image_start + token
    holds = torch.from_numpy(
        (plan.summaries.starts <= position) & (position < plan.summaries.starts + plan.summaries.counts)
    )
    assert holds.sum() == 3
    assert result.summaries is not None
    assert clean.summaries is not None
    for tensor, before in zip(result[:3], clean[:3], strict=True):
        assert tensor[0, position, 1].isnan().all()
        tensor[0, position, 1] = before[0, position, 1]
        assert torch.equal(tensor, before)
    for tensor, before in zip(result.summaries, clean.summaries, strict=True):
        assert tensor[0, holds, 1].isnan().all()
        tensor[0, holds, 1] = before[0, holds, 1]
        assert torch.equal(tensor, before)


def test_the_kernel_gives_the_same_bits_in_any_batch() -> None:
    call = random_call(PLANS["far pyramid"], torch.float16, True, True, batch=2, heads=3)
    both = call.run(True)
    assert_same_bits(call.run(True), both)
    assert call.text is not None
    for sample in range(2):
        image, text = (
            Projections(*(tensor[sample : sample + 1] for tensor in part)) for part in (call.image, call.text)
        )
        alone = Call(image, call.norms, call.rotation, call.plan, text, call.text_norms).run(True)
        assert both.summaries is not None
        row = slice(sample, sample + 1)
        expected = Joined(
            both.query[row], both.key[row], both.value[row], (both.summaries[0][row], both.summaries[1][row])
        )
        assert_same_bits(alone, expected)


def test_plans_by_head_share_their_summaries() -> None:
    grouping = Grouping(Grid((8, 9)), (4, 4), ((4, 4), (2, 2)))
    plan = build_head_plan(((grouping, Block(0)), (grouping, Union(Block(0), Far([(0, (2, 2))])))), (0, 1), 3)
    call = random_call(plan, torch.float32, True, True)  # type: ignore[arg-type]
    assert_exact_but_for_rounding(call.run(True), call)


@given(cases.plans().filter(lambda plan: plan.segments.tokens == plan.text_len), st.sampled_from([1, 2, 4]))
def test_runs_cover_the_sequence_and_no_block_is_cut(plan: Plan, most: int) -> None:
    runs = rope_norm_runs.build_runs(plan, most)
    starts, counts = runs.table[:, 0].astype(np.int64), runs.table[:, 1]
    assert runs.most <= most
    assert counts.min() >= 1
    assert counts.max() <= runs.most
    covered = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    assert np.array_equal(np.sort(covered), np.arange(plan.tokens))
    assert runs.chunks[0] == 0
    assert runs.chunks[-1] == len(runs.table)
    assert (np.diff(runs.chunks) > 0).all()
    texts = int(runs.chunks[runs.text_chunks])
    in_text = (starts >= plan.text_start) & (starts < plan.text_start + plan.text_len)
    assert in_text[:texts].all()
    assert not in_text[texts:].any()

    # Each block is whole runs of one chunk, and the last of them names it.
    chunk_of_run = np.searchsorted(runs.chunks, np.arange(len(runs.table)), side="right")
    rows = runs.table[:, 3::2]
    assert np.array_equal(np.sort(rows[rows >= 0]), np.arange(plan.summaries.rows))
    assert np.array_equal(runs.table[:, 2] != 0, (rows >= 0).any(axis=1))
    for run, level in zip(*np.nonzero(rows >= 0), strict=True):
        row = rows[run, level]
        members = (starts >= plan.summaries.starts[row]) & (starts <= starts[run])
        assert counts[members].sum() == plan.summaries.counts[row] == runs.table[run, 4 + 2 * level]
        assert len(set(chunk_of_run[members])) == 1


@dataclass
class Captured:
    """What a processor of diffusers hands to attention."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def capture(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[Captured]:
    calls: list[Captured] = []

    def dispatch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(Captured(query, key, value))
        return query

    monkeypatch.setattr(module, "dispatch_attention_fn", dispatch)
    return calls


def assert_as_stock(result: Joined, stock: Captured, call: Call, roundings: int) -> None:
    """Stock rounds each normalised channel `roundings` times before it rotates, and once after; ours once in all."""
    expected = exact(call)
    dtype = call.image.query.dtype
    for tensor, other, truth, size in (
        (result.query, stock.query, expected.query, expected.sizes[0]),
        (result.key, stock.key, expected.key, expected.sizes[1]),
    ):
        error = 2 * fp32_error(size) + roundings * rounding(size, dtype) * (1 + torch.finfo(dtype).eps)
        assert ((tensor.double() - other.double()).abs() <= error + 2 * rounding(truth.abs() + error, dtype)).all()
    assert torch.equal(result.value, stock.value)


def randomised(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.to(dtype)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@torch.no_grad()
def test_flux_attention_is_handed_what_stock_hands_it(
    double: bool, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PLANS["far field"]
    attn = randomised(
        transformer_flux.FluxAttention(12, 2, 16, added_kv_proj_dim=12 if double else None, eps=1e-6), dtype
    )
    call = random_call(plan, dtype, double, True, batch=2)
    image, text = torch.randn(2, plan.image_tokens if double else plan.tokens, 12), torch.randn(2, plan.text_len, 12)
    image, text = image.to(dtype), text.to(dtype)
    captured = capture(transformer_flux, monkeypatch)
    attn(image, text if double else None, image_rotary_emb=call.rotation)
    given_call = Call(
        Projections(*(layer(image).unflatten(-1, (2, 16)) for layer in (attn.to_q, attn.to_k, attn.to_v))),
        Norms(attn.norm_q.weight, attn.norm_k.weight, attn.norm_q.eps),
        call.rotation,
        plan,
        Projections(
            *(layer(text).unflatten(-1, (2, 16)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        )
        if double
        else None,
        Norms(attn.norm_added_q.weight, attn.norm_added_k.weight, attn.norm_added_q.eps) if double else None,
    )
    assert_as_stock(given_call.run(fused), captured[0], given_call, roundings=1)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@torch.no_grad()
def test_hunyuan_video_attention_is_handed_what_stock_hands_it(
    double: bool, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image first, text last and not rotated."""
    plan = PLANS["video"]
    attn = randomised(
        Attention(
            query_dim=32,
            heads=2,
            dim_head=16,
            bias=True,
            added_kv_proj_dim=32 if double else None,
            context_pre_only=False if double else None,
            pre_only=not double,
            qk_norm="rms_norm",
            eps=1e-6,
            processor=cast(Any, transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0()),
        ),
        dtype,
    )
    call = random_call(plan, dtype, double, False, batch=2)
    image, text = (torch.randn(2, rows, 32).to(dtype) for rows in (plan.image_tokens, plan.text_len))
    captured = capture(transformer_hunyuan_video, monkeypatch)
    attn(image, text, image_rotary_emb=call.rotation)
    tokens = image if double else torch.cat([image, text], dim=1)
    given_call = Call(
        Projections(*(layer(tokens).unflatten(-1, (2, 16)) for layer in (attn.to_q, attn.to_k, attn.to_v))),
        Norms(attn.norm_q.weight, attn.norm_k.weight, attn.norm_q.eps),
        call.rotation,
        plan,
        Projections(
            *(layer(text).unflatten(-1, (2, 16)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        )
        if double
        else None,
        Norms(attn.norm_added_q.weight, attn.norm_added_k.weight, attn.norm_added_q.eps) if double else None,
    )
    assert_as_stock(given_call.run(fused), captured[0], given_call, roundings=2)


def operator_arguments(call: Call, fused: bool) -> tuple[Any, ...]:
    assert call.text is not None
    assert call.text_norms is not None
    assert call.rotation is not None
    weights = (*call.norms[:2], *call.text_norms[:2])
    plan = call.plan
    numbers = (call.norms.eps, call.text_norms.eps, plan.key, plan.summaries.rows, fused)
    return (*call.image, *call.text, *weights, *call.rotation, *numbers)


@FORMS
def test_the_operator_passes_torchs_own_checks(fused: bool) -> None:
    call = random_call(PLANS["far field"], torch.float32, True, True)
    # Inference only: there is no backward formula to check.
    utilities = ("test_schema", "test_faketensor")
    operator = torch.ops.grat.rope_norm.default
    torch.library.opcheck(operator, operator_arguments(call, fused), test_utils=utilities)


@pytest.mark.parametrize("name", ["far field", "no far field"])
@pytest.mark.parametrize("apart", [True, False])
def test_compiled_code_keeps_one_graph(name: str, apart: bool) -> None:
    call = random_call(PLANS[name], torch.float32, apart, True)

    def block(scale: float) -> Joined:
        image = Projections(*(tensor * scale for tensor in call.image))
        return Call(image, call.norms, call.rotation, call.plan, call.text, call.text_norms).run(False)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(2.0), block(2.0))


def test_summaries_are_those_of_the_unfused_path() -> None:
    call = random_call(PLANS["far pyramid"], torch.float32, True, True)
    result = call.run(False)
    assert result.summaries is not None
    assert torch.equal(result.summaries[0], summaries.summarise(result.key, call.plan))
    assert torch.equal(result.summaries[1], summaries.summarise(result.value, call.plan))


def test_wrong_arguments_are_refused_in_words() -> None:
    call = random_call(PLANS["far field"], torch.float32, True, True)
    image, text, rotation = call.image, call.text, call.rotation
    assert text is not None
    assert rotation is not None
    weight = call.norms.query
    assert weight is not None

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            Call(**(call.__dict__ | changes)).run(False)

    refused("text and text_norms go together", text_norms=None)
    refused("joint query, key and value must be", text=None, text_norms=None)
    refused("image query, key and value must be", image=Projections(image.query[:, 1:], *image[1:]))
    refused("text query, key and value must be", text=Projections(*(tensor[..., :8] for tensor in text)))
    refused("share one dtype", image=Projections(image.query.half(), *image[1:]))
    refused("norm weights must be", norms=Norms(weight[:8], None, 1e-6))
    refused("eps must be positive", norms=Norms(weight, weight, 0.0))
    refused("cosines and sines must be", rotation=(rotation[0][1:], rotation[1][1:]))
    refused("differ in shape", rotation=(rotation[0], rotation[1][call.plan.text_len :]))
    refused("share one device", rotation=(rotation[0].to("meta"), rotation[1].to("meta")))
    odd = random_call(call.plan, torch.float32, True, True, head_dim=4)
    odd_image, odd_text = (Projections(*(tensor[..., :3] for tensor in part)) for part in (odd.image, odd.text or ()))
    with pytest.raises(ValueError, match="must be even, not 3"):
        Call(odd_image, Norms(None, None, 1e-6), None, call.plan, odd_text, Norms(None, None, 1e-6)).run(False)


def test_a_kernel_that_computes_something_else_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_call(PLANS["far field"], torch.float32, True, True)
    monkeypatch.setattr(trials, "_passed", set())
    monkeypatch.setattr(trials, "_failures", {})
    launch = rope_norm_runs.launch

    def broken(sections: Any, outputs: Outputs, plan: Any) -> None:
        launch(sections, outputs, plan)
        outputs.key[0, -1, 0, 0] += 1e-3

    monkeypatch.setattr(rope_norm_runs, "launch", broken)
    with pytest.raises(KernelFailure, match=r"fused norm and rotation kernel computes wrong results here.*float32"):
        call.run(True)
    monkeypatch.setattr(rope_norm_runs, "launch", launch)
    with pytest.raises(KernelFailure):  # once is enough
        call.run(True)
    monkeypatch.setattr(trials, "_failures", {})
    call.run(True)
    assert trials._passed == {("rope_norm", trials.Form(torch.device("cpu"), torch.float32, 16))}


def test_what_the_kernel_cannot_run_is_refused_by_name() -> None:
    call = random_call(PLANS["far field"], torch.bfloat16, True, True)
    with pytest.raises(ValueError, match="fused kernel cannot run here: Triton's interpreter"):
        call.run(True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert rope_norm.obstacle(cpu, torch.float16, 80) is None
    for device, dtype, head_dim, reason in (
        (cpu, torch.float64, 128, "not float64"),
        (cpu, torch.float16, 81, "even head dimensions"),
        (cpu, torch.float16, 258, "up to 256"),
        (cuda, torch.float16, 128, "no device cuda:0"),
        (torch.device("mps"), torch.float16, 128, "not on mps"),
    ):
        assert reason in (rope_norm.obstacle(device, dtype, head_dim) or "")


def test_the_choice_explains_itself_and_is_never_the_interpreter() -> None:
    assert rope_norm.choose(torch.device("cpu"), torch.float32, 64) == (
        False,
        "the fused kernel is for CUDA and ROCm devices, not for cpu",
    )
    chosen, reason = rope_norm.choose(torch.device("cuda", 0), torch.float64, 64)
    assert not chosen
    assert "not float64" in reason
