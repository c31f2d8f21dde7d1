"""The FLUX.2 adapter against stock diffusers: full attention, patterns through masks in raster order, references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_flux2
import torch
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor
from flux_runs import NoHostReads, relative_difference

from grat_cli.attention.chunking import in_chunks
from grat_cli.attention.schedule import segments_of
from grat_cli.errors import BadInput
from grat_cli.families.flux2 import Flux2Adapter
from grat_cli.generation.timing import StepRecorder
from grat_kernels import Backend, Block, CrissCross, Far, Full, Grid, Grouping, Pattern, Plan, Union, build_plan

# Two computations of one fp32 forward pass: sums of a few hundred terms in another order, through three layers.
RELATIVE = 5e-6
GROUP = (4, 4)
REFERENCES = ((5, 3), (4, 4))


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_flux2.transformer()


class Run:
    """A run with a plan a layer; it keeps what it is asked for."""

    def __init__(self, grid: Grid, *patterns: Pattern) -> None:
        self.grid, self.patterns, self.step = grid, patterns, 0
        self.asked: list[tuple[int, int]] = []

    def current_step(self) -> int:
        return self.step

    def schedule(self, text_len: int, references: int = 0) -> Any:
        self.asked.append((text_len, references))
        return self

    def density_of_step(self, step: int) -> float:
        return float(np.mean([self.plan(step, layer).density for layer in range(tiny_flux2.LAYERS)]))

    def plan(self, step: int, layer: int) -> Plan:
        segments = segments_of(self.asked[-1][0], True, self.asked[-1][1])
        return build_plan(Grouping(self.grid, GROUP), self.patterns[layer % len(self.patterns)], segments=segments)


def raster_mask(grid: Grid, radius: int | None, cross: bool, references: int = 0) -> torch.Tensor:
    """What GRAT-B or GRAT-X allows, `[N, N]` in raster order, text first; written without the project's own code."""
    row, column = np.divmod(np.arange(grid.tokens), grid.shape[1])
    rows, columns = row // GROUP[0], column // GROUP[1]
    apart = np.abs(rows[:, None] - rows[None, :]), np.abs(columns[:, None] - columns[None, :])
    near = np.maximum(*apart) <= (-1 if radius is None else radius)
    mask = np.ones((tiny_flux2.TEXT_TOKENS + grid.tokens + references,) * 2, bool)
    image = slice(tiny_flux2.TEXT_TOKENS, tiny_flux2.TEXT_TOKENS + grid.tokens)
    mask[image, image] = near | (cross & ((apart[0] == 0) | (apart[1] == 0)))
    return torch.from_numpy(mask)


def tokens_of(references: tuple[tuple[int, int], ...]) -> int:
    return sum(rows * columns for rows, columns in references)


def blocks_of(model: Any) -> list[Any]:
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def snapshot(model: Any) -> Any:
    """Everything that the adapter may touch."""
    hooks = [list(getattr(model, name)) for name in ("_forward_pre_hooks", "_forward_hooks")]
    blocks = [(id(block.attn.processor), sorted(vars(block))) for block in blocks_of(model)]
    return blocks, hooks, sorted(model.__dict__)


def compare(model: Any, inputs: dict[str, Any], run: Run, backend: Backend = Backend.SDPA, **options: Any) -> Any:
    with Flux2Adapter(model, run.grid, **options).attached(run, backend):
        return model(**inputs)[0]


@pytest.mark.parametrize("shape", [(16, 16), (18, 26), (5, 3), (1, 9)])
@pytest.mark.parametrize("references", [(), REFERENCES])
@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.SDPA])
def test_full_attention_equals_stock(
    model: Any, shape: tuple[int, int], references: tuple[tuple[int, int], ...], backend: Backend
) -> None:
    inputs = tiny_flux2.inputs(*shape, batch=2, references=references)
    run = Run(Grid(shape), Full())
    assert relative_difference(compare(model, inputs, run, backend), model(**inputs)[0]) < RELATIVE
    assert run.asked == [(tiny_flux2.TEXT_TOKENS, tokens_of(references))]


def test_full_attention_in_bfloat16_is_as_near_to_exact_as_stock() -> None:
    """Of two roundings of the same computation neither is the right one: both are held against fp32."""
    exact_model: Any = tiny_flux2.transformer(guidance=True)
    model = tiny_flux2.transformer(guidance=True).bfloat16()
    inputs = tiny_flux2.inputs(18, 26, batch=2, references=REFERENCES) | {"guidance": torch.full((2,), 4.0)}
    exact = exact_model(**inputs)[0]
    rounded = in_dtype(inputs, torch.bfloat16)
    stock = relative_difference(model(**rounded)[0].float(), exact)
    ours = relative_difference(compare(model, rounded, Run(Grid((18, 26)), Full())).float(), exact)
    assert 0 < ours < 2 * stock + 2**-8


@pytest.mark.parametrize(
    ("pattern", "radius", "cross"),
    [
        (Block(1), 1, False),
        (Block(0), 0, False),
        (CrissCross(1), None, True),
        (Union(Block(1), CrissCross(1)), 1, True),
    ],
)
@pytest.mark.parametrize("references", [(), REFERENCES])
@pytest.mark.parametrize("shape", [(16, 20), (18, 26)])
def test_patterns_equal_stock_attention_under_a_mask(
    model: Any,
    shape: tuple[int, int],
    references: tuple[tuple[int, int], ...],
    pattern: Pattern,
    radius: int | None,
    cross: bool,
) -> None:
    inputs = tiny_flux2.inputs(*shape, batch=2, references=references)
    mask = raster_mask(Grid(shape), radius, cross, tokens_of(references))
    expected = model(**inputs, joint_attention_kwargs={"attention_mask": mask})[0]
    result = compare(model, inputs, Run(Grid(shape), pattern))
    assert relative_difference(result, expected) < RELATIVE
    assert relative_difference(result, model(**inputs)[0]) > 0.01, "the mask makes no difference: this shows nothing"


def test_each_layer_takes_its_own_plan_double_blocks_first(model: Any) -> None:
    grid = Grid((8, 12))
    everything, block, cross = raster_mask(grid, 9, True), raster_mask(grid, 0, False), raster_mask(grid, None, True)
    inputs = tiny_flux2.inputs(*grid.shape)
    with pytest.MonkeyPatch.context() as patch:
        for layer, mask in zip(blocks_of(model), (everything, block, cross), strict=True):
            stock = layer.attn.forward
            patch.setattr(
                layer.attn, "forward", lambda *a, stock=stock, mask=mask, **k: stock(*a, attention_mask=mask, **k)
            )
        expected = model(**inputs)[0]
    result = compare(model, inputs, Run(grid, Full(), Block(0), CrissCross(1)))
    assert relative_difference(result, expected) < RELATIVE


def test_far_field_of_everything_nearby_equals_full_attention(model: Any) -> None:
    inputs = tiny_flux2.inputs(8, 8, references=REFERENCES)
    result = compare(model, inputs, Run(Grid((8, 8)), Union(Block(1), Far([(1, (2, 2))]))))
    assert relative_difference(result, model(**inputs)[0]) < RELATIVE


def test_fused_projections_equal_stock() -> None:
    model = tiny_flux2.transformer()
    inputs = tiny_flux2.inputs(8, 12)
    expected = model(**inputs)[0]
    model.fuse_qkv_projections()
    assert relative_difference(compare(model, inputs, Run(Grid((8, 12)), Full())), expected) < RELATIVE


def test_positional_inputs_and_output_objects(model: Any) -> None:
    grid = Grid((4, 6))
    inputs = tiny_flux2.inputs(*grid.shape) | {"return_dict": True}
    expected = model(**inputs).sample
    names = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids")
    with Flux2Adapter(model, grid).attached(Run(grid, Full()), Backend.SDPA):
        result = model(*(inputs[name] for name in names)).sample
    assert relative_difference(result, expected) < RELATIVE


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_processors_and_hooks(model: Any, fails: bool, chunk: int | None) -> None:
    before, grid = snapshot(model), Grid((8, 8))
    inputs = tiny_flux2.inputs(*grid.shape)
    expected = model(**inputs)[0]
    try:
        with Flux2Adapter(model, grid, chunk_tokens=chunk).attached(Run(grid, Block(0)), Backend.SDPA):
            assert snapshot(model) != before
            model(**inputs)
            if fails:
                raise RuntimeError("inside")
    except RuntimeError:
        assert fails
    assert snapshot(model) == before
    assert torch.equal(model(**inputs)[0], expected)


def attempt(model: Any, **changes: Any) -> None:
    grid = Grid((4, 6))
    compare(model, tiny_flux2.inputs(*grid.shape) | changes, Run(grid, Full()))


def test_calls_of_another_size_are_refused(model: Any) -> None:
    with pytest.raises(BadInput, match=r"installed for 4x6 = 24 image tokens, the call has 16"):
        attempt(model, **tiny_flux2.inputs(4, 4))
    # As many tokens, other shape; and more of the same picture: only positions tell.
    for other in (tiny_flux2.inputs(6, 4), tiny_flux2.inputs(5, 6), tiny_flux2.inputs(6, 4, references=REFERENCES)):
        with pytest.raises(BadInput, match=r"4x6 = 24 image tokens, which are not the call's first.*height and width"):
            attempt(model, **other)


def test_extras_are_refused(model: Any) -> None:
    with pytest.raises(BadInput, match="attention_mask"):
        attempt(model, joint_attention_kwargs={"attention_mask": torch.ones(30, 30, dtype=torch.bool)})
    with pytest.raises(BadInput, match="references come before the image"):
        attempt(model, kv_cache_mode="extract", num_ref_tokens=4)
    attempt(model, joint_attention_kwargs={"scale": 1.0})


def test_replaced_processors_are_refused() -> None:
    model: Any = tiny_flux2.transformer()
    model.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
    with pytest.raises(BadInput, match="replaced by Flux2KVAttnProcessor"):
        attempt(model)
    model = tiny_flux2.transformer()
    grid = Grid((4, 6))
    with Flux2Adapter(model, grid).attached(Run(grid, Full()), Backend.SDPA):
        with pytest.raises(BadInput, match="already installed"):
            attempt(model)
        model.transformer_blocks[0].attn.set_processor(model.transformer_blocks[0].attn._default_processor_cls())
        with pytest.raises(BadInput, match="replaced inside"):
            model(**tiny_flux2.inputs(4, 6))
    with pytest.raises(BadInput, match="no fused kernel"):
        Flux2Adapter(model, grid, fused=True)


def test_later_steps_of_a_run_never_read_from_the_device(model: Any) -> None:
    """Though pipelines join positions anew at each step."""
    run = Run(Grid((8, 12)), CrissCross(1))
    with Flux2Adapter(model, run.grid).attached(run, Backend.SDPA):
        model(**tiny_flux2.inputs(*run.grid.shape, references=REFERENCES))
        run.step = 1
        later = tiny_flux2.inputs(*run.grid.shape, references=REFERENCES)
        with NoHostReads():
            model(**later)
        run.step = 0  # another run, which may be of another size
        with pytest.raises(BadInput, match="positions"):
            model(**tiny_flux2.inputs(12, 8, references=REFERENCES))


def test_steps_are_timed_from_outside(model: Any) -> None:
    recorder, grid = StepRecorder(), Grid((8, 12))
    with Flux2Adapter(model, grid).attached(Run(grid, Block(0)), Backend.SDPA, recorder):
        model(**tiny_flux2.inputs(*grid.shape))
    (step,) = recorder.steps([700.0])
    assert 0 < step.attention_ms < step.total_ms
    assert 0 < step.density < 1


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


CHUNK = 256
FORWARDS = Flux2Adapter(tiny_flux2.transformer(), Grid((1, 1))).chunked_blocks()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_in_chunks_it_is_the_same_bit_by_bit(dtype: torch.dtype, batch: int) -> None:
    model: Any = tiny_flux2.transformer()
    model.to(dtype)
    inputs = in_dtype(tiny_flux2.inputs(25, 31, batch=batch, references=REFERENCES), dtype)
    stock = model(**inputs)[0]
    with in_chunks(blocks_of(model), FORWARDS, CHUNK):
        assert torch.equal(model(**inputs)[0], stock)
    run = Run(Grid((25, 31)), Block(1))
    assert torch.equal(compare(model, inputs, run, chunk_tokens=CHUNK), compare(model, inputs, run))


def test_single_blocks_take_text_apart_as_well() -> None:
    block: Any = tiny_flux2.transformer().single_transformer_blocks[0]
    text, image, modulation = torch.randn(1, 6, 32), torch.randn(1, 500, 32), torch.randn(1, 96)
    stock = block(image, text, modulation, split_hidden_states=True)
    with in_chunks([block], FORWARDS, CHUNK):
        assert all(map(torch.equal, block(image, text, modulation, split_hidden_states=True), stock))
        assert torch.equal(block(image, text, modulation), torch.cat(stock, dim=1))


@pytest.mark.parametrize("form", ["wrapped", "blocks", "in place"])
def test_compiled_transformers_attend_over_spans(form: str) -> None:
    """`torch.compile` of the transformer, of its blocks as diffusers recommends, and `transformer.compile()`."""
    torch._dynamo.reset()
    model: Any = tiny_flux2.transformer(num_single_layers=1)
    called: Any = model
    grid = Grid((8, 12))
    inputs = tiny_flux2.inputs(*grid.shape, references=REFERENCES)
    patterns = [(Block(1), CrissCross(1)), (CrissCross(1), Block(0))]  # of two steps
    expected = [compare(model, inputs, Run(grid, *of_step)) for of_step in patterns]
    if form == "wrapped":
        called = torch.compile(model, backend="eager", fullgraph=True)
    elif form == "blocks":
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    else:
        model.compile(backend="eager")
    run = Run(grid, *patterns[0])
    with Flux2Adapter(called, grid).attached(run, Backend.SDPA):
        for run.step, run.patterns in enumerate(patterns):
            assert relative_difference(called(**inputs)[0], expected[run.step]) < RELATIVE
    torch._dynamo.reset()
