"""Compiled blocks under GRAT: one graph for each kind of block, whatever the layers, steps and sizes, as uncompiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_hunyuan
import torch
from flux_runs import RELATIVE, relative_difference
from small_transformers import MODELS, Model, Run
from torch._dynamo.utils import counters

from grat_cli.errors import BadInput
from grat_cli.generation.timing import StepRecorder
from grat_cli.models.compiling import compile_blocks
from grat_kernels import Backend, Grid


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    import torch.fx.experimental._config as shapes

    dynamo: Any = torch._dynamo.config
    settings: Any = shapes
    torch._dynamo.reset()
    counters.clear()
    with dynamo.patch(recompile_limit=dynamo.recompile_limit), settings.patch(use_duck_shape=settings.use_duck_shape):
        yield
    torch._dynamo.reset()


def steps(model: Model, transformer: Any, grid: Grid, observer: Any = None) -> list[torch.Tensor]:
    """Predictions of four steps."""
    adapter = model.adapter(transformer, grid)
    run, inputs, made = Run(adapter), model.inputs(grid), []
    with torch.no_grad(), adapter.attached(run, Backend.SDPA, observer):  # pyright: ignore[reportArgumentType]
        for run.step in range(4):
            made.append(transformer(**inputs)[0])
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_kind_of_block_is_compiled_once_for_all_layers_steps_and_sizes(name: str) -> None:
    """`fullgraph` makes dynamo refuse whatever would break a graph."""
    model = MODELS[name]
    transformer = model.make()
    expected = {grid: steps(model, transformer, grid) for grid in model.grids}
    with torch.no_grad():
        stock = transformer(**model.inputs(model.grids[0]))[0]
    adapter = model.adapter(transformer, model.grids[0])
    for block in adapter.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=True)
    assert adapter.is_compiled
    assert not adapter.is_compiled_whole

    recorder = StepRecorder()
    for grid in (*model.grids, model.grids[0]):  # each in an installation of its own
        for result, uncompiled in zip(steps(model, transformer, grid, recorder), expected[grid], strict=True):
            assert relative_difference(result, uncompiled) < RELATIVE
        assert counters["stats"]["unique_graphs"] == model.forms
    assert all(0 < step.attention_ms < step.total_ms for step in recorder.steps([4.0, 3.0, 2.0, 1.0]))
    with torch.no_grad():
        assert relative_difference(transformer(**model.inputs(model.grids[0]))[0], stock) < RELATIVE


def test_blocks_that_replace_tokens_of_the_first_frame_are_not_compiled() -> None:
    transformer: Any = tiny_hunyuan.transformer(image_condition_type="token_replace")
    with pytest.raises(BadInput, match="compiles no blocks of the kind HunyuanVideoTokenReplaceSingleTransformerBlock"):
        compile_blocks([transformer])
    for block in transformer.transformer_blocks:
        block.compile(backend="eager")
    adapter = MODELS["hunyuan"].adapter(transformer, MODELS["hunyuan"].grids[0])
    with (
        pytest.raises(BadInput, match="compiled blocks that replace tokens of the first frame is not supported"),
        adapter.attached(Run(adapter), Backend.SDPA),
    ):
        pass


def test_chunks_of_tokens_and_compiled_blocks_exclude_each_other() -> None:
    model = MODELS["flux"]
    transformer, grid = model.make(), model.grids[0]
    adapter = model.adapter(transformer, grid, chunk_tokens=256)
    with torch.no_grad(), adapter.attached(Run(adapter), Backend.SDPA):
        transformer.compile_repeated_blocks(backend="eager")
        with pytest.raises(BadInput, match=r"compiled inside .*: compile it before, or give chunk_tokens=None"):
            transformer(**model.inputs(grid))
    with (
        pytest.raises(BadInput, match=r"cannot run in chunks of tokens: the transformer is compiled"),
        model.adapter(transformer, grid, chunk_tokens=256).attached(Run(adapter), Backend.SDPA),
    ):
        pass
    adapter = model.adapter(transformer, grid)
    with adapter.attached(Run(adapter), Backend.SDPA):
        assert adapter.chunking[0] is None
