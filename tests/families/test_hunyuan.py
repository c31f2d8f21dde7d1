"""The HunyuanVideo adapter against stock diffusers: full attention, patterns through masks in raster order, padding."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny_hunyuan
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from flux_runs import relative_difference
from hunyuan_runs import GROUP, StockUnderMask, attentions, raster_mask, snapshot, under_masks
from operator_names import record_operators

from grat_cli.attention.processor import SpanAttentionProcessor
from grat_cli.errors import BadInput
from grat_cli.families.hunyuan import HunyuanAdapter
from grat_cli.generation.timing import StepRecorder
from grat_kernels import Backend, Block, CrissCross, Far, Full, Grid, Grouping, Pattern, Plan, Union, build_plan

# Two computations of one fp32 forward pass: sums of a few hundred terms in another order, through three layers.
RELATIVE = 1e-5
GRID = Grid((5, 6, 8))
PADDED = (tiny_hunyuan.TEXT_TOKENS - 4, tiny_hunyuan.TEXT_TOKENS - 1)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_hunyuan.transformer()


class Run:
    """A run with a plan a layer; it keeps the lengths of text that it is asked for."""

    def __init__(self, grid: Grid, *patterns: Pattern) -> None:
        self.grid, self.patterns, self.text_lengths = grid, patterns, []

    def current_step(self) -> int:
        return 0

    def schedule(self, text_len: int, references: int = 0) -> Any:
        self.text_lengths.append(text_len)
        return self

    def density_of_step(self, step: int) -> float:
        return float(np.mean([self.plan(step, layer).density for layer in range(tiny_hunyuan.LAYERS)]))

    def plan(self, step: int, layer: int) -> Plan:
        pattern = self.patterns[layer % len(self.patterns)]
        return build_plan(Grouping(self.grid, GROUP), pattern, self.text_lengths[-1], text_first=False)


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("shape", [(5, 6, 8), (1, 7, 5), (4, 1, 1)])
@pytest.mark.parametrize("valid", [(tiny_hunyuan.TEXT_TOKENS,), (1,), PADDED])
@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.SDPA])
def test_full_attention_equals_stock(
    model: Any, shape: tuple[int, int, int], valid: tuple[int, ...], backend: Backend
) -> None:
    inputs = tiny_hunyuan.inputs(shape, valid)
    expected = model(**inputs)[0]
    run = Run(Grid(shape), Full())
    with HunyuanAdapter(model, Grid(shape)).attached(run, backend):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE
    assert run.text_lengths == [max(valid)], "padding beyond the longest text takes part"


@pytest.mark.parametrize(
    ("pattern", "radius", "share"),
    [(Block(1), 1, None), (Block(0), 0, None), (CrissCross(1), None, 1), (CrissCross(2), None, 2)],
)
@pytest.mark.parametrize("valid", [(tiny_hunyuan.TEXT_TOKENS,), PADDED])
def test_patterns_equal_stock_attention_under_a_mask(
    model: Any, pattern: Pattern, radius: int | None, share: int | None, valid: tuple[int, ...]
) -> None:
    inputs = tiny_hunyuan.inputs(GRID.shape, valid)
    expected = under_masks(model, inputs, raster_mask(GRID, radius, share))
    with HunyuanAdapter(model, GRID).attached(Run(GRID, pattern), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE
    assert relative_difference(result, model(**inputs)[0]) > 0.01, "the mask makes no difference: this shows nothing"


def test_each_layer_takes_its_own_plan_double_blocks_first(model: Any) -> None:
    inputs = tiny_hunyuan.inputs(GRID.shape)
    everything = np.ones((GRID.tokens,) * 2, bool)
    expected = under_masks(model, inputs, everything, raster_mask(GRID, 0, None), raster_mask(GRID, None, 2))
    with HunyuanAdapter(model, GRID).attached(Run(GRID, Full(), Block(0), CrissCross(2)), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE


def test_far_field_of_everything_nearby_equals_full_attention(model: Any) -> None:
    grid = Grid((2, 6, 6))
    inputs = tiny_hunyuan.inputs((2, 6, 6), PADDED)
    with HunyuanAdapter(model, grid).attached(Run(grid, Union(Block(1), Far([(1, (1, 3, 3))]))), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, model(**inputs)[0]) < RELATIVE


def test_positional_inputs_and_output_objects(model: Any) -> None:
    inputs = tiny_hunyuan.inputs(GRID.shape) | {"return_dict": True}
    names = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "pooled_projections",
        "guidance",
    )
    expected = model(**inputs).sample
    with HunyuanAdapter(model, GRID).attached(Run(GRID, Full()), Backend.SDPA):
        result = model(*(inputs[name] for name in names)).sample
    assert relative_difference(result, expected) < RELATIVE


def test_a_batch_may_change_between_calls(model: Any) -> None:
    with HunyuanAdapter(model, GRID).attached(Run(GRID, Full()), Backend.SDPA):
        results = [model(**tiny_hunyuan.inputs(GRID.shape, valid))[0] for valid in ((2,), PADDED, (7,))]
    for result, valid in zip(results, ((2,), PADDED, (7,)), strict=True):
        assert relative_difference(result, model(**tiny_hunyuan.inputs(GRID.shape, valid))[0]) < RELATIVE


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_processors_and_hooks(model: Any, fails: bool) -> None:
    before = snapshot(model)
    inputs = tiny_hunyuan.inputs(GRID.shape)
    expected = model(**inputs)[0]
    try:
        with HunyuanAdapter(model, GRID).attached(Run(GRID, Block(0)), Backend.SDPA):
            assert snapshot(model) != before
            model(**inputs)
            if fails:
                raise RuntimeError("inside")
    except RuntimeError:
        assert fails
    assert snapshot(model) == before
    assert torch.equal(model(**inputs)[0], expected)


def test_steps_are_timed_from_outside(model: Any) -> None:
    recorder = StepRecorder()
    with HunyuanAdapter(model, GRID).attached(Run(GRID, Block(1)), Backend.SDPA, recorder):
        model(**tiny_hunyuan.inputs(GRID.shape))
    (step,) = recorder.steps([700.0])
    assert 0 < step.attention_ms < step.total_ms
    assert 0 < step.density < 1
    (call,) = recorder._calls
    assert len(call.attentions) == tiny_hunyuan.LAYERS
    assert all(end <= begin for (_, end), (begin, _) in pairwise(call.attentions))


def attempt(model: Any, **changes: Any) -> None:
    with HunyuanAdapter(model, GRID).attached(Run(GRID, Full()), Backend.SDPA):
        model(**(tiny_hunyuan.inputs(GRID.shape) | changes))


def test_calls_that_do_not_fit_are_refused(model: Any) -> None:
    with pytest.raises(BadInput, match=r"installed for 5x6x8 video tokens .* the call has 5x8x6"):
        attempt(model, hidden_states=tiny_hunyuan.inputs((5, 8, 6))["hidden_states"])
    for mask in ([0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]):
        with pytest.raises(BadInput, match="pad prompts at their end"):
            attempt(model, encoder_attention_mask=torch.tensor([mask]).float())


def test_transformers_that_do_not_fit_are_refused(model: Any) -> None:
    replaced: Any = tiny_hunyuan.transformer()
    replaced.single_transformer_blocks[1].attn.set_processor(StockUnderMask(np.ones((1, 1), bool)))
    with pytest.raises(BadInput, match="replaced by StockUnderMask"):
        attempt(replaced)
    with pytest.raises(BadInput, match="compiled"):
        attempt(torch.compile(tiny_hunyuan.transformer(), backend="eager"))
    with HunyuanAdapter(model, GRID).attached(Run(GRID, Full()), Backend.SDPA):
        with pytest.raises(BadInput, match="already installed"):
            attempt(model)
        assert isinstance(attentions(model)[0].processor, SpanAttentionProcessor)
        stock = attentions(model)[0].processor
        attentions(model)[0].set_processor(HunyuanVideoAttnProcessor2_0())
        with pytest.raises(BadInput, match="replaced inside"):
            model(**tiny_hunyuan.inputs(GRID.shape))
        attentions(model)[0].set_processor(stock)


def test_latent_concatenation_equals_stock() -> None:
    """Image-to-video whose picture comes as further channels of the latents."""
    model: Any = tiny_hunyuan.transformer(in_channels=9, image_condition_type="latent_concat")
    inputs = tiny_hunyuan.inputs(GRID.shape)
    inputs["hidden_states"] = torch.randn(1, 9, *inputs["hidden_states"].shape[2:])
    expected = model(**inputs)[0]
    with HunyuanAdapter(model, GRID).attached(Run(GRID, Full()), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE


FAR = Union(Block(0), Far([(0, (1, 3, 3))]))


@pytest.mark.parametrize("pattern", [Full(), FAR], ids=["full", "far"])
@pytest.mark.parametrize("valid", [(tiny_hunyuan.TEXT_TOKENS,), PADDED], ids=["one", "padded"])
def test_the_fused_kernel_changes_nothing_but_roundings(pattern: Pattern, valid: tuple[int, ...]) -> None:
    """In Triton's interpreter; stock diffusers where attention is full."""
    model: Any = tiny_hunyuan.transformer()
    with torch.no_grad():
        for attention in attentions(model):  # weights of ones would hide that text took those of the video
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                if (norm := getattr(attention, name)) is not None:
                    norm.weight.uniform_(0.5, 1.5)
    inputs = tiny_hunyuan.inputs(GRID.shape, valid)
    apart, fused = HunyuanAdapter(model, GRID, fused=False), HunyuanAdapter(model, GRID, fused=True)
    with apart.attached(Run(GRID, pattern), Backend.SDPA):
        expected = model(**inputs)[0]
    before = snapshot(model)
    with fused.attached(Run(GRID, pattern), Backend.SDPA), record_operators() as called:
        result = model(**inputs)[0]
    assert called.count("grat::rope_norm") == tiny_hunyuan.LAYERS
    assert snapshot(model) == before
    assert relative_difference(result, expected) < RELATIVE
    if isinstance(pattern, Full):
        assert relative_difference(result, model(**inputs)[0]) < RELATIVE
    assert fused.preparation == "fused kernel"
    assert apart.preparation == "stock modules: the fused kernel was not wanted"


def test_on_a_cpu_stock_modules_prepare_attention(model: Any) -> None:
    adapter = HunyuanAdapter(model, GRID)
    assert adapter.preparation is None
    with adapter.attached(Run(GRID, FAR), Backend.SDPA), record_operators() as called:
        model(**tiny_hunyuan.inputs(GRID.shape))
    assert "grat::span_attention" in called
    assert "grat::rope_norm" not in called
    assert adapter.preparation == "stock modules: the fused kernel is for CUDA and ROCm devices, not for cpu"


def _hooked(attention: Any) -> None:
    attention.norm_added_k.register_forward_hook(lambda module, args, output: output)


def _with_replaced_forward(attention: Any) -> None:
    attention.norm_q.forward = attention.norm_q.forward


def _with_another_norm(attention: Any) -> None:
    attention.norm_k = torch.nn.RMSNorm(16)


def _without_a_norm(attention: Any) -> None:
    attention.norm_q = None


def _with_a_bias(attention: Any) -> None:
    norm: Any = RMSNorm(16, eps=1e-6, bias=True)
    norm.bias.fill_(1)
    attention.norm_q = norm


def _with_another_eps(attention: Any) -> None:
    attention.norm_added_q.eps = 1e-3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "norm_added_k is hooked"),
        (_with_replaced_forward, "norm_q is hooked"),
        (_with_another_norm, "norm_k is not the RMS norm of the stock model"),
        (_without_a_norm, "norm_q is not the RMS norm of the stock model"),
        (_with_a_bias, "norm_q is not the RMS norm of the stock model"),
        (_with_another_eps, "differ in eps"),
    ],
)
def test_norms_that_are_more_than_their_weights_are_left_to_their_modules(
    change: Callable[[Any], None], reason: str
) -> None:
    model: Any = tiny_hunyuan.transformer()
    change(model.transformer_blocks[0].attn)
    inputs = tiny_hunyuan.inputs(GRID.shape)
    with (
        pytest.raises(BadInput, match=f"fused kernel cannot run here: .*{reason}"),
        HunyuanAdapter(model, GRID, fused=True).attached(Run(GRID, Full()), Backend.SDPA),
    ):
        model(**inputs)
    adapter = HunyuanAdapter(model, GRID)
    with adapter.attached(Run(GRID, Full()), Backend.SDPA):
        result = model(**inputs)[0]
    assert reason in (adapter.preparation or "")
    assert relative_difference(result, model(**inputs)[0]) < RELATIVE


def test_norms_without_weights_are_fused_too() -> None:
    """diffusers' RMS norm has no weight where it is not elementwise affine."""
    model: Any = tiny_hunyuan.transformer()
    attention = model.single_transformer_blocks[0].attn
    attention.norm_q, attention.norm_k = (RMSNorm(16, eps=1e-6, elementwise_affine=False) for _ in range(2))
    inputs = tiny_hunyuan.inputs(GRID.shape)
    adapter = HunyuanAdapter(model, GRID, fused=True)
    with adapter.attached(Run(GRID, Full()), Backend.SDPA):
        result = model(**inputs)[0]
    assert adapter.preparation == "fused kernel"
    assert relative_difference(result, model(**inputs)[0]) < RELATIVE


def test_a_fused_kernel_that_cannot_run_is_refused_when_it_was_asked_for() -> None:
    model: Any = tiny_hunyuan.transformer().double()
    inputs = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in tiny_hunyuan.inputs(GRID.shape).items()
    }
    with (
        pytest.raises(BadInput, match=r"fused kernel cannot run here: .*float64"),
        HunyuanAdapter(model, GRID, fused=True).attached(Run(GRID, Full()), Backend.SDPA),
    ):
        model(**inputs)
