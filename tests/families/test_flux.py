"""The Flux adapter against stock diffusers: full attention, patterns through masks in raster order, reversibility."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_flux
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from flux_runs import GROUP, RELATIVE, NoHostReads, Run, plan_of, raster_mask, relative_difference, run_with, snapshot
from operator_names import record_operators

from grat_cli.attention.processor import SpanAttentionProcessor
from grat_cli.errors import BadInput
from grat_cli.families.flux import FluxAdapter
from grat_cli.generation.timing import StepRecorder
from grat_kernels import (
    Backend,
    Block,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    Pattern,
    Union,
    build_head_plan,
)


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_flux.transformer()


@pytest.mark.parametrize("shape", [(16, 16), (18, 26), (5, 3), (1, 9)])
@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.SDPA])
def test_full_attention_equals_stock(model: Any, shape: tuple[int, int], backend: Backend) -> None:
    inputs = tiny_flux.inputs(*shape, batch=2)
    expected = model(**inputs)[0]
    with FluxAdapter(model, Grid(shape)).attached(run_with(Grid(shape), Full()), backend):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE


@pytest.mark.parametrize(
    ("pattern", "radius", "cross"),
    [
        (Block(1), 1, False),
        (Block(0), 0, False),
        (CrissCross(1), None, True),
        (Union(Block(1), CrissCross(1)), 1, True),
    ],
)
@pytest.mark.parametrize("shape", [(16, 20), (18, 26)])
def test_patterns_equal_stock_attention_under_a_mask(
    model: Any, shape: tuple[int, int], pattern: Pattern, radius: int | None, cross: bool
) -> None:
    inputs = tiny_flux.inputs(*shape, batch=2)
    mask = raster_mask(Grid(shape), radius, cross)
    expected = model(**inputs, joint_attention_kwargs={"attention_mask": mask})[0]
    with FluxAdapter(model, Grid(shape)).attached(run_with(Grid(shape), pattern), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE
    assert relative_difference(result, model(**inputs)[0]) > 0.01, (
        "the mask makes no difference: the test shows nothing"
    )


def test_each_layer_takes_its_own_plan_double_blocks_first(model: Any) -> None:
    grid = Grid((8, 12))
    plans = [plan_of(grid, pattern) for pattern in (Full(), Block(0), CrissCross(1))]
    dense = np.ones((tiny_flux.TEXT_TOKENS + grid.tokens,) * 2, bool)
    masks = [torch.from_numpy(dense), raster_mask(grid, 0, False), raster_mask(grid, None, True)]
    inputs = tiny_flux.inputs(*grid.shape)

    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    for block, mask in zip(blocks, masks, strict=True):
        block.attn.processor = StockWithMask(mask)
    expected = model(**inputs)[0]
    for block in blocks:
        block.attn.processor = block.attn._default_processor_cls()
    with FluxAdapter(model, grid).attached(Run(lambda step, layer: plans[layer]), Backend.SDPA):  # type: ignore[arg-type]
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE


def test_heads_of_a_layer_may_attend_differently(model: Any) -> None:
    """As a preset's rules for heads have it."""
    grid = Grid((8, 12))
    grouping = Grouping(grid, GROUP, (GROUP,))
    plan = build_head_plan(
        ((grouping, Block(0)), (grouping, CrissCross(1))), (1, 0), tiny_flux.TEXT_TOKENS, text_first=True
    )
    masks = torch.stack([raster_mask(grid, None, True), raster_mask(grid, 0, False)])[None]  # [1, H, N, N]
    inputs = tiny_flux.inputs(*grid.shape)
    expected = model(**inputs, joint_attention_kwargs={"attention_mask": masks})[0]
    for backend in (Backend.SDPA, Backend.REFERENCE):
        with FluxAdapter(model, grid).attached(Run(lambda step, layer: plan), backend):
            result = model(**inputs)[0]
        assert relative_difference(result, expected) < RELATIVE
    swapped = model(**inputs, joint_attention_kwargs={"attention_mask": masks.flip(1)})[0]
    assert relative_difference(swapped, expected) > 0.01


class StockWithMask:
    """Stock attention of one layer under a mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        self.mask, self.stock = mask, FluxAttnProcessor()

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        return self.stock(attn, hidden_states, encoder_hidden_states, self.mask, image_rotary_emb)  # pyright: ignore


def test_far_field_of_everything_nearby_equals_full_attention(model: Any) -> None:
    grid = Grid((8, 8))
    pattern = Union(Block(1), Far([(1, (2, 2))]))
    inputs = tiny_flux.inputs(*grid.shape)
    with FluxAdapter(model, grid).attached(run_with(grid, pattern), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, model(**inputs)[0]) < RELATIVE


def test_fused_projections_equal_stock() -> None:
    model, grid = tiny_flux.transformer(), Grid((8, 12))
    inputs = tiny_flux.inputs(*grid.shape)
    expected = model(**inputs)[0]
    model.fuse_qkv_projections()
    with FluxAdapter(model, grid).attached(run_with(grid, Full()), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE


def test_positional_inputs_and_output_objects(model: Any) -> None:
    grid = Grid((4, 6))
    inputs = tiny_flux.inputs(*grid.shape) | {"return_dict": True}
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    expected = model(**inputs).sample
    with FluxAdapter(model, grid).attached(run_with(grid, Full()), Backend.SDPA):
        result = model(*(inputs[name] for name in names)).sample
    assert relative_difference(result, expected) < RELATIVE


def test_text_length_is_that_of_the_call(model: Any) -> None:
    grid = Grid((4, 4))
    run = run_with(grid, Full())
    with FluxAdapter(model, grid).attached(run, Backend.SDPA):
        model(**tiny_flux.inputs(*grid.shape))
    assert run.text_lengths == [tiny_flux.TEXT_TOKENS]


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_processors_and_hooks(model: Any, fails: bool) -> None:
    handle = model.register_forward_pre_hook(lambda module, args: None)
    before = snapshot(model)
    inputs = tiny_flux.inputs(4, 4)
    expected = model(**inputs)[0]
    try:
        with FluxAdapter(model, Grid((4, 4))).attached(run_with(Grid((4, 4)), Block(0)), Backend.SDPA):
            assert snapshot(model) != before
            model(**inputs)
            if fails:
                raise RuntimeError("inside")
    except RuntimeError:
        assert fails
    assert snapshot(model) == before
    assert torch.equal(model(**inputs)[0], expected)
    handle.remove()


def attempt(model: Any, grid: Grid, **changes: Any) -> None:
    with FluxAdapter(model, grid).attached(run_with(grid, Full()), Backend.SDPA):
        model(**(tiny_flux.inputs(*grid.shape) | changes))


def test_calls_of_another_size_are_refused(model: Any) -> None:
    with pytest.raises(BadInput, match=r"installed for 4x6 = 24 image tokens, the call has 32"):
        attempt(model, Grid((4, 6)), **tiny_flux.inputs(4, 8))
    # As many tokens, other shape: only the positions tell.
    with pytest.raises(BadInput, match="positions are not those of the 4x6 grid"):
        attempt(model, Grid((4, 6)), **tiny_flux.inputs(6, 4))
    given = tiny_flux.inputs(4, 6)
    twice = {"hidden_states": given["hidden_states"].repeat(1, 2, 1), "img_ids": given["img_ids"].repeat(2, 1)}
    with pytest.raises(BadInput, match=r"= 24 image tokens, the call has 48"):
        attempt(model, Grid((4, 6)), **twice)
    ids = twice["img_ids"].clone()
    ids[:24, 0] = 1
    with pytest.raises(BadInput, match="references come before those of the image"):
        attempt(model, Grid((4, 6)), **twice | {"img_ids": ids})


def test_extras_are_refused(model: Any) -> None:
    grid = Grid((4, 4))
    residuals = [torch.zeros(1, 16, 32)]
    with pytest.raises(BadInput, match="ControlNet"):
        attempt(model, grid, controlnet_block_samples=residuals)
    with pytest.raises(BadInput, match="ControlNet"):
        attempt(model, grid, controlnet_single_block_samples=residuals)
    with pytest.raises(BadInput, match="ip_adapter_image_embeds"):
        attempt(model, grid, joint_attention_kwargs={"ip_adapter_image_embeds": [torch.zeros(1)]})
    with pytest.raises(BadInput, match="attention_mask"):
        attempt(model, grid, joint_attention_kwargs={"attention_mask": torch.ones(22, 22, dtype=torch.bool)})
    attempt(model, grid, joint_attention_kwargs={"scale": 1.0})


def test_replaced_processors_are_refused() -> None:
    model: Any = tiny_flux.transformer()
    grid = Grid((4, 4))
    model.transformer_blocks[0].attn.set_processor(StockWithMask(torch.ones(1)))
    with pytest.raises(BadInput, match="replaced by StockWithMask"):
        attempt(model, grid)

    model = tiny_flux.transformer()
    with FluxAdapter(model, grid).attached(run_with(grid, Full()), Backend.SDPA):
        with pytest.raises(BadInput, match="already installed"):
            attempt(model, grid)
        assert isinstance(model.transformer_blocks[0].attn.processor, SpanAttentionProcessor)
        model.transformer_blocks[0].attn.set_processor(model.transformer_blocks[0].attn._default_processor_cls())
        with pytest.raises(BadInput, match="replaced inside"):
            model(**tiny_flux.inputs(4, 4))


def test_positions_stay_exact_where_the_pipeline_rounds_them() -> None:
    """bf16 has no 257: stock gives columns 256 and 257 one position, ours keeps them apart."""
    model: Any = tiny_flux.transformer()
    grid = Grid((1, 264))
    inputs = tiny_flux.inputs(*grid.shape)
    rounded = inputs | {"img_ids": FluxPipeline._prepare_latent_image_ids(1, 1, 264, "cpu", torch.bfloat16)}
    expected = model(**inputs)[0]
    assert relative_difference(model(**rounded)[0], expected) > 1e-3
    with FluxAdapter(model, grid).attached(run_with(grid, Full()), Backend.SDPA):
        assert relative_difference(model(**rounded)[0], expected) < RELATIVE


FAR = Union(Block(0), Far([(0, (2, 2))]))


@pytest.mark.parametrize("fused_projections", [False, True])
@pytest.mark.parametrize("pattern", [Full(), FAR], ids=["full", "far"])
def test_the_fused_kernel_changes_nothing_but_roundings(pattern: Pattern, fused_projections: bool) -> None:
    """In Triton's interpreter; stock diffusers where attention is full."""
    model: Any = tiny_flux.transformer()
    if fused_projections:
        model.fuse_qkv_projections()
    grid = Grid((6, 7))
    inputs = tiny_flux.inputs(*grid.shape, batch=2)
    apart, fused = FluxAdapter(model, grid, fused=False), FluxAdapter(model, grid, fused=True)
    with apart.attached(run_with(grid, pattern), Backend.SDPA):
        expected = model(**inputs)[0]
    before = snapshot(model)
    with fused.attached(run_with(grid, pattern), Backend.SDPA), record_operators() as called:
        result = model(**inputs)[0]
    assert called.count("grat::rope_norm") == tiny_flux.LAYERS
    assert snapshot(model) == before
    assert relative_difference(result, expected) < RELATIVE
    if isinstance(pattern, Full):
        assert relative_difference(result, model(**inputs)[0]) < RELATIVE
    assert fused.preparation == "fused kernel"
    assert apart.preparation == "stock modules: the fused kernel was not wanted"


def test_on_a_cpu_stock_modules_prepare_attention(model: Any) -> None:
    grid = Grid((4, 6))
    adapter = FluxAdapter(model, grid)
    assert adapter.preparation is None
    with adapter.attached(run_with(grid, FAR), Backend.SDPA), record_operators() as called:
        model(**tiny_flux.inputs(*grid.shape))
    assert "grat::span_attention" in called
    assert "grat::rope_norm" not in called
    assert adapter.preparation == "stock modules: the fused kernel is for CUDA and ROCm devices, not for cpu"


def test_norms_that_are_more_than_their_weights_are_left_to_their_modules() -> None:
    grid = Grid((4, 6))
    inputs = tiny_flux.inputs(*grid.shape)

    def changed(change: Callable[[Any], Any]) -> Any:
        model = tiny_flux.transformer()
        change(model.transformer_blocks[0].attn)
        return model

    def hooked(attn: Any) -> None:
        attn.norm_added_k.register_forward_hook(lambda module, args, output: output)

    def replaced_forward(attn: Any) -> None:
        attn.norm_q.forward = attn.norm_q.forward

    def other_norm(attn: Any) -> None:
        attn.norm_k = torch.nn.LayerNorm(16)

    def other_eps(attn: Any) -> None:
        attn.norm_added_q.eps = 1e-3

    for change, reason in (
        (hooked, "norm_added_k is hooked"),
        (replaced_forward, "norm_q is hooked"),
        (other_norm, "norm_k is not the RMS norm of the stock model"),
        (other_eps, "differ in eps"),
    ):
        model = changed(change)
        with (
            pytest.raises(BadInput, match=f"fused kernel cannot run here: .*{reason}"),
            FluxAdapter(model, grid, fused=True).attached(run_with(grid, Full()), Backend.SDPA),
        ):
            model(**inputs)
        adapter = FluxAdapter(model, grid)
        with adapter.attached(run_with(grid, Full()), Backend.SDPA):
            result = model(**inputs)[0]
        assert reason in (adapter.preparation or "")
        assert relative_difference(result, model(**inputs)[0]) < RELATIVE


def test_a_fused_kernel_that_cannot_run_is_refused_when_it_was_asked_for() -> None:
    grid = Grid((4, 4))
    model: Any = tiny_flux.transformer().double()
    inputs = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in tiny_flux.inputs(*grid.shape).items()
    }
    with (
        pytest.raises(BadInput, match=r"fused kernel cannot run here: .*float64"),
        FluxAdapter(model, grid, fused=True).attached(run_with(grid, Full()), Backend.SDPA),
    ):
        model(**inputs)


def test_the_fused_kernel_stays_inside_one_compiled_graph() -> None:
    torch._dynamo.reset()
    model: Any = tiny_flux.transformer(num_single_layers=1)
    grid = Grid((4, 6))
    inputs = tiny_flux.inputs(*grid.shape)
    plans = plan_of(grid, FAR, ((4, 4), (2, 2))), plan_of(grid, Block(0), ((4, 4), (2, 2)))
    run = Run(lambda step, layer: plans[(step + layer) % 2])  # type: ignore[arg-type]
    expected = []
    with FluxAdapter(model, grid).attached(run, Backend.SDPA):
        for run.step in range(2):
            expected.append(model(**inputs)[0])
    graphs: list[str] = []

    def record(module: Any, example: Any) -> Any:
        graphs.append(module.code)
        return module.forward

    called: Any = torch.compile(model, backend=record, fullgraph=True)
    with FluxAdapter(called, grid, fused=True).attached(run, Backend.SDPA):
        for run.step in range(2):
            assert relative_difference(called(**inputs)[0], expected[run.step]) < RELATIVE
    assert [graph.count("grat.prepared_layer_attention") for graph in graphs] == [2]  # one graph for both steps
    torch._dynamo.reset()


def test_later_calls_of_a_run_never_read_from_the_device(model: Any) -> None:
    grid = Grid((8, 12))
    inputs = tiny_flux.inputs(*grid.shape)
    run = run_with(grid, CrissCross(1))
    with FluxAdapter(model, grid).attached(run, Backend.SDPA):
        model(**inputs)
        with NoHostReads():
            model(**inputs)
    with pytest.raises(AssertionError), NoHostReads():
        torch.ones(1).item()


@pytest.mark.parametrize("form", ["wrapped", "blocks", "in place"])
def test_compiled_transformers_attend_over_spans(form: str) -> None:
    """`torch.compile` of the transformer, of its blocks as diffusers recommends, and `transformer.compile()`."""
    torch._dynamo.reset()
    model: Any = tiny_flux.transformer(num_single_layers=1)
    called: Any = model
    grid = Grid((8, 12))
    inputs = tiny_flux.inputs(*grid.shape)
    plans = plan_of(grid, Block(1)), plan_of(grid, CrissCross(1))
    run = Run(lambda step, layer: plans[(step + layer) % 2])  # type: ignore[arg-type]
    expected = []
    with FluxAdapter(model, grid).attached(run, Backend.SDPA):
        for run.step in range(2):
            expected.append(model(**inputs)[0])
    if form == "wrapped":
        called = torch.compile(model, backend="eager", fullgraph=True)
    elif form == "blocks":
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    else:
        model.compile(backend="eager")
    with FluxAdapter(called, grid).attached(run, Backend.SDPA):
        for run.step in range(2):
            assert relative_difference(called(**inputs)[0], expected[run.step]) < RELATIVE
    recorder = StepRecorder()
    with FluxAdapter(called, grid).attached(run, Backend.SDPA, observer=recorder):
        for run.step in range(2):
            assert relative_difference(called(**inputs)[0], expected[run.step]) < RELATIVE
    for step in recorder.steps([2.0, 1.0]):
        assert 0 < step.attention_ms < step.total_ms
    torch._dynamo.reset()
