"""Wan inside `grat_cli.install` and on its own, against stock diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from flux_runs import relative_difference
from hunyuan_runs import GROUP, raster_mask

import grat_cli
from grat_cli.errors import BadInput
from grat_cli.families.wan import WanAdapter
from grat_cli.presets import Preset
from grat_kernels import Backend, Block, CrissCross, Full, Grid, Grouping, Pattern, Plan, build_plan

# Two computations of one fp32 forward pass: sums of a few hundred terms in another order, through two layers.
RELATIVE = 1e-5
GRID = Grid((5, 6, 8))
STEPS = 3
LONG, SHORT = "waves at night under a red boat that sails across", "snow"
SIZES: dict[str, dict[str, int]] = {
    kind: {"height": 48, "width": 80, "num_frames": 13} for kind in tiny_wan.KINDS
}  # 4 x 3 x 5 tokens: ragged groups of 2x3x3
SIZES["timed"] = {"height": 96, "width": 160, "num_frames": 13}


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {kind: tiny_wan.pipeline(kind) for kind in tiny_wan.KINDS}


def preset(variant: str = "full", **attention: Any) -> Preset:
    return Preset.model_validate(
        {
            "name": "test",
            "model": "wan",
            "attention": {"variant": variant, "group": list(GROUP), **attention},
            "kernel": {"backend": "sdpa"},
        }
    )


def text_of(pipe: Any, prompts: list[str], name: str = "prompt_embeds") -> dict[str, torch.Tensor]:
    from grat_cli.families import FAMILIES

    one_by_one = [FAMILIES["wan"].encode_text(pipe, FAMILIES["wan"].models[0], prompt, None) for prompt in prompts]
    return {name: torch.cat([text["prompt_embeds"] for text in one_by_one])}


def call(pipe: Any, kind: str, prompts: list[str], *, guidance: float = 1.0, steps: int = STEPS, **more: Any) -> Any:
    """Latents for seed 5, with text that is encoded beforehand."""
    arguments = {**SIZES[kind], **text_of(pipe, prompts), "guidance_scale": guidance, "num_inference_steps": steps}
    if guidance > 1:
        arguments |= text_of(pipe, ["a dull grey sea"] * len(prompts), "negative_prompt_embeds")
    if "Image" in type(pipe).__name__:
        arguments["image"] = tiny_wan.picture(80, 48)
    options = {"generator": torch.Generator().manual_seed(5), "output_type": "latent", **more}
    return pipe(**arguments, **options).frames


def snapshot(pipe: Any) -> list[Any]:
    """Everything that an installation may touch."""
    found = []
    for model in (pipe.transformer, pipe.transformer_2):
        if model is not None:
            hooks = [
                (list(module._forward_pre_hooks), list(module._forward_hooks))
                for module in (model, model.rope, model.patch_embedding, model.proj_out)
            ]
            processors = [id(attention.processor) for block in model.blocks for attention in (block.attn1, block.attn2)]
            found.append([processors, hooks, sorted(model.__dict__)])
    return [found, id(pipe.scheduler)]


# ---- Pipelines


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["alone", "guided"])
@pytest.mark.parametrize("kind", tiny_wan.KINDS)
def test_full_attention_equals_the_stock_pipeline(pipes: dict[str, Any], kind: str, guidance: float) -> None:
    pipe = pipes[kind]
    prompts = [LONG, SHORT]
    expected, before = call(pipe, kind, prompts, guidance=guidance), snapshot(pipe)
    with grat_cli.install(pipe, preset(), **SIZES[kind]) as installation:
        assert snapshot(pipe) != before
        assert relative_difference(call(pipe, kind, prompts, guidance=guidance), expected) < RELATIVE
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe, kind, prompts, guidance=guidance), expected)
    assert installation.last_schedule.grid.shape == (4, 3, 5)
    assert installation.last_schedule.plans[0].text_len == 0


def test_the_first_frame_of_a_model_with_timed_tokens(pipes: dict[str, Any]) -> None:
    from grat_cli.families import FAMILIES

    pipe = FAMILIES["wan"].pipeline_for(pipes["timed"], frozenset({"start"}))
    assert pipe.config.expand_timesteps
    expected = call(pipe, "timed", [LONG], guidance=4.0)
    with grat_cli.install(pipe, preset(), **SIZES["timed"]):
        assert relative_difference(call(pipe, "timed", [LONG], guidance=4.0), expected) < RELATIVE
    assert relative_difference(expected, call(pipes["timed"], "timed", [LONG], guidance=4.0)) > 0.01


def test_both_transformers_of_a_model_take_their_turn_under_grat(pipes: dict[str, Any]) -> None:
    pipe = pipes["two"]
    called = []
    with grat_cli.install(pipe, preset("b", radius=0), **SIZES["two"]):
        hooks = [
            model.register_forward_pre_hook(lambda module, args: called.append(module))
            for model in (pipe.transformer, pipe.transformer_2)
        ]
        try:
            result = call(pipe, "two", [SHORT])
        finally:
            for hook in hooks:
                hook.remove()
    assert {id(model) for model in called} == {id(pipe.transformer), id(pipe.transformer_2)}
    assert relative_difference(result, call(pipe, "two", [SHORT])) > 1e-3


def test_leaving_restores_the_pipeline_after_an_exception(pipes: dict[str, Any]) -> None:
    pipe = pipes["two"]
    before, expected = snapshot(pipe), call(pipe, "two", [SHORT])

    def fail(*arguments: Any) -> dict[str, Any]:
        raise RuntimeError("in a callback")

    with pytest.raises(RuntimeError, match="in a callback"), grat_cli.install(pipe, preset("b"), **SIZES["two"]):
        call(pipe, "two", [SHORT], callback_on_step_end=fail)
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe, "two", [SHORT]), expected)


# ---- The transformer


class Run:
    """A run of one pattern."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def current_step(self) -> int:
        return 0

    def schedule(self, text_len: int, references: int = 0) -> Any:
        assert text_len == references == 0
        return self

    def density_of_step(self, step: int) -> float:
        return self.plan(step, 0).density

    def plan(self, step: int, layer: int) -> Plan:
        return build_plan(Grouping(GRID, GROUP), self.pattern, 0)


class UnderMask(WanAttnProcessor):
    """Stock attention over video tokens under a mask."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.mask = torch.from_numpy(mask)

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, mask: Any, rotary_emb: Any) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def under_mask(model: Any, inputs: dict[str, Any], mask: np.ndarray) -> torch.Tensor:
    stock = [block.attn1.processor for block in model.blocks]
    for block in model.blocks:
        block.attn1.set_processor(UnderMask(mask))
    try:
        return model(**inputs)[0]
    finally:
        for block, processor in zip(model.blocks, stock, strict=True):
            block.attn1.set_processor(processor)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(
    ("pattern", "radius", "share"),
    [(Block(1), 1, None), (Block((0, 1, 1)), (0, 1, 1), None), (CrissCross(1), None, 1), (CrissCross(2), None, 2)],
)
def test_patterns_equal_stock_attention_under_a_mask(
    pattern: Pattern, radius: Any, share: int | None, timed: bool
) -> None:
    model, inputs = tiny_wan.transformer(), tiny_wan.inputs(GRID.shape, 2, timed=timed)
    expected = under_mask(model, inputs, raster_mask(GRID, radius, share))
    with WanAdapter(model, GRID).attached(Run(pattern), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE
    assert relative_difference(result, model(**inputs)[0]) > 0.01, "the mask makes no difference: this shows nothing"


@pytest.mark.parametrize("timed", [False, True])
def test_half_precision_is_as_far_from_fp32_as_stock_is(timed: bool) -> None:
    model, inputs = tiny_wan.transformer(), tiny_wan.inputs(GRID.shape, timed=timed)
    exact = model(**inputs)[0]
    model.to(torch.bfloat16)
    half = {name: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in inputs.items()}
    stock = relative_difference(model(**half)[0].float(), exact)
    with WanAdapter(model, GRID).attached(Run(Full()), Backend.SDPA):
        ours = relative_difference(model(**half)[0].float(), exact)
    assert ours < 2 * stock


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_bit(dtype: torch.dtype, timed: bool) -> None:
    grid = Grid((4, 13, 15))
    model, inputs = tiny_wan.transformer(), tiny_wan.inputs(grid.shape, 2, timed=timed)
    model.to(dtype)
    inputs = {name: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for name, v in inputs.items()}
    expected = model(**inputs)[0]
    from grat_cli.attention.chunking import in_chunks

    adapter = WanAdapter(model, grid)
    before = [dict(vars(block)) for block in model.blocks]
    with in_chunks(adapter.blocks, adapter.chunked_blocks(), 256):
        assert torch.equal(model(**inputs)[0], expected)
    assert [dict(vars(block)) for block in model.blocks] == before


def test_what_does_not_fit_is_refused(pipes: dict[str, Any]) -> None:
    pipe = pipes["text"]

    def enter(pipe: Any = pipe, chosen: Any = None, **options: Any) -> None:
        with grat_cli.install(pipe, chosen or preset(), **(SIZES["text"] | options)):
            call(pipe, "text", [SHORT])

    with pytest.raises(BadInput, match="multiples of 16 for this model, not 40 and 80: the nearest are 32 and 80"):
        enter(height=40)
    with pytest.raises(BadInput, match=r"num_frames must be 4k\+1 for this model, not 14: use 13 or 17"):
        enter(num_frames=14)
    with pytest.raises(BadInput, match="makes videos: give num_frames"):
        enter(num_frames=None)
    with pytest.raises(BadInput, match="multiples of 32 for this model"):
        enter(pipes["timed"], height=48)
    with pytest.raises(BadInput, match=r"installed for 4x4x5 video tokens .* the call has 4x3x5"):
        enter(height=64)
    with pytest.raises(BadInput, match="preset flux-x is for flux models"):
        enter(chosen="flux-x")
    with (
        pytest.raises(BadInput, match="attention arguments masks are not supported"),
        grat_cli.install(pipe, preset(), **SIZES["text"]),
    ):
        call(pipe, "text", [SHORT], attention_kwargs={"masks": 1})
    block = pipe.transformer.blocks[1]
    stock = block.attn1.processor
    block.attn1.set_processor(UnderMask(np.ones((1, 1), bool)))
    with pytest.raises(BadInput, match="replaced by UnderMask"):
        enter()
    block.attn1.set_processor(stock)
    from diffusers.pipelines.wan.pipeline_wan_vace import WanVACEPipeline

    with pytest.raises(BadInput, match=r"WanVACEPipeline is not supported \(its transformer has further blocks"):
        enter(WanVACEPipeline.__new__(WanVACEPipeline))
